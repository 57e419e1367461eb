//! Strings that have no business in a row's text: special tokens, other chat templates' markers, unrendered templates,
//! text decoded with the wrong encoding. All are looked for in one pass.

use aho_corasick::{AhoCorasick, MatchKind};

/// What ends a text, a turn or a message in models that people train.
const ENDS: &[&str] = &[
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|eos|>",
    "<eos>",
    "<EOS>",
    "[EOS]",
    "<end_of_turn>",
    "<turn|>",
    "<|return|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|endofprompt|>",
    "<｜end▁of▁sentence｜>",
];

/// What begins a turn or a text in chat templates that people train.
const TURNS: &[&str] = &[
    "<|im_start|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|begin▁of▁sentence｜>",
    "<start_of_turn>",
    "<|START_OF_TURN_TOKEN|>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|start|>",
    "<|channel|>",
    "<bos>",
    "<BOS>",
    "[BOS]",
];

/// Plain words that open a turn: where all rows of a task have them, its own template wrote them.
const HEADINGS: &[&str] =
    &["### Instruction:", "### Input:", "### Response:", "\nHuman: ", "\nUSER: ", "\nASSISTANT: ", "\nAssistant: "];

/// UTF-8 read as Windows-1252 and the like, and characters that a decoder puts where it failed.
const BROKEN: &[&str] = &[
    "\u{FFFD}",
    "â€™",
    "â€œ",
    "â€\u{9d}",
    "â€“",
    "â€”",
    "â€¦",
    "Ã©",
    "Ã¨",
    "Ã¼",
    "Ã¶",
    "Ã¤",
    "Ã±",
    "Ã§",
    "ï¿½",
    "ï»¿",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Ends a text, here or in some model.
    End,
    /// Another special token of the tokenizer.
    Special,
    /// A marker of a template that is not the tokenizer's.
    Foreign,
    /// Plain words that open a turn.
    Heading,
    /// Opens a template's expression or statement.
    Braces,
    Broken,
}

/// One string and whether it is a special token of the tokenizer.
#[derive(Debug, Clone)]
pub struct Mark {
    pub text: String,
    pub class: Class,
    pub own: bool,
}

/// Finds every mark in a text.
#[derive(Debug)]
pub struct Marks {
    all: Vec<Mark>,
    finder: AhoCorasick,
}

impl Marks {
    /// `specials`: the tokenizer's special tokens; `ends`: the one that ends a text.
    pub fn new(specials: &[String], end: &str) -> Result<Self, aho_corasick::BuildError> {
        let mut all: Vec<Mark> = Vec::new();
        let mut add = |text: &str, class, own| {
            if !text.is_empty() && all.iter().all(|mark| mark.text != text) {
                all.push(Mark { text: text.to_owned(), class, own });
            }
        };
        add(end, Class::End, true);
        for special in specials {
            let class = if ENDS.contains(&special.as_str()) { Class::End } else { Class::Special };
            add(special, class, true);
        }
        ENDS.iter().for_each(|text| add(text, Class::End, false));
        TURNS.iter().for_each(|text| add(text, Class::Foreign, false));
        HEADINGS.iter().for_each(|text| add(text, Class::Heading, false));
        ["{{", "{%"].iter().for_each(|text| add(text, Class::Braces, false));
        BROKEN.iter().for_each(|text| add(text, Class::Broken, false));
        let finder =
            AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(all.iter().map(|m| &m.text))?;
        Ok(Marks { all, finder })
    }

    pub fn get(&self, index: u16) -> &Mark {
        &self.all[usize::from(index)]
    }

    /// Every mark of `text`: its index, and where it begins and ends.
    pub fn find<'t>(&'t self, text: &'t str) -> impl Iterator<Item = (u16, usize, usize)> + 't {
        self.finder
            .find_iter(text)
            .map(|found| (found.pattern().as_u32() as u16, found.start(), found.end()))
            .filter(|&(index, begin, _)| self.get(index).class != Class::Braces || is_template(&text[begin..]))
    }
}

/// Whether `{{` or `{%` opens what a template would have: `{{ question }}`, `{% if x %}`; not LaTeX's `{{a}}`.
fn is_template(text: &str) -> bool {
    let (inside, statement) = match text.strip_prefix("{%") {
        Some(rest) => (rest, true),
        None => (&text[2..], false),
    };
    let inside = inside.strip_prefix('-').unwrap_or(inside);
    let name = inside.trim_start_matches(' ');
    let word: &str = name.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default();
    if statement {
        const STATEMENTS: &[&str] = &["if", "for", "set", "else", "elif", "endif", "endfor", "macro", "generation"];
        return STATEMENTS.contains(&word);
    }
    let named = word.len() >= 2 && word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let rest = &name[word.len()..];
    let closes = rest.bytes().take(80).position(|b| b == b'}' || b == b'{' || b == b'\n');
    named && closes.is_some_and(|at| rest[at..].starts_with("}}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(Class, bool, String)> {
        let marks = Marks::new(&["<pad>".into(), "<|im_end|>".into(), "</s>".into()], "</s>").unwrap();
        marks.find(text).map(|(i, ..)| marks.get(i)).map(|m| (m.class, m.own, m.text.clone())).collect()
    }

    #[test]
    fn each_mark_has_its_class() {
        let one = |text: &str| found(text).pop().map(|(class, own, _)| (class, own));
        assert_eq!(one("a</s>"), Some((Class::End, true)));
        assert_eq!(one("a<|im_end|>"), Some((Class::End, true)));
        assert_eq!(one("a<|endoftext|>"), Some((Class::End, false)));
        assert_eq!(one("<pad>"), Some((Class::Special, true)));
        assert_eq!(one("[INST] x"), Some((Class::Foreign, false)));
        assert_eq!(one("### Response:\n"), Some((Class::Heading, false)));
        assert_eq!(one("caf\u{FFFD}"), Some((Class::Broken, false)));
        assert_eq!(one("It â€™s"), Some((Class::Broken, false)));
        assert_eq!(found("<|im_end|></s>").len(), 2);
        assert_eq!(one("ordinary <b>text</b>, naïve café, 3 < 5"), None);
    }

    #[test]
    fn templates_are_told_from_latex_and_code() {
        for text in ["{{ question }}", "{{question}}", "{{- row.text | trim }}", "{% if x %}", "{%- endif -%}"] {
            assert!(!found(text).is_empty(), "{text}");
        }
        for text in ["\\frac{{a}}{{b}}", "{{", "{{ 3 }}", "f\"{{{x}}}\"", "{%", "{% comment", "{{ a b\n }}", "{{é}}"] {
            assert!(found(text).is_empty(), "{text}");
        }
    }
}
