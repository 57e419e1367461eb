//! What one rendered row tells: its flaws, and hashes by which it is compared with all others. A pure function of the
//! row's texts, to be called on any thread.

use super::marks::{Class, Marks};
use super::words::{mix, Frame, Sketch};

/// A prompt, a completion, or a message of a conversation.
#[derive(Debug, Clone, Copy)]
pub struct Turn<'t> {
    pub text: &'t str,
    /// The model is trained to say it.
    pub asked: bool,
}

/// The texts of one row.
#[derive(Debug, Clone, Copy)]
pub struct Texts<'t> {
    pub turns: &'t [Turn<'t>],
    /// A prompt and its completion, written one after the other; not messages that a chat template will separate.
    pub pair: bool,
}

/// Flaws of a single row, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flaws(u32);

impl Flaws {
    pub const END: Flaws = Flaws(1);
    /// The last completion ends with the end of text.
    pub const END_LAST: Flaws = Flaws(2);
    pub const SPECIAL: Flaws = Flaws(4);
    pub const FOREIGN: Flaws = Flaws(8);
    pub const BRACES: Flaws = Flaws(16);
    pub const BROKEN: Flaws = Flaws(32);
    pub const GLUED: Flaws = Flaws(64);
    pub const NO_PROMPT: Flaws = Flaws(128);
    pub const EMPTY_TURN: Flaws = Flaws(256);
    pub const ECHO: Flaws = Flaws(512);
    pub const PLACEHOLDER: Flaws = Flaws(1024);
    pub const HEADING: Flaws = Flaws(2048);

    pub fn has(self, flaw: Flaws) -> bool {
        self.0 & flaw.0 != 0
    }

    pub fn any(self) -> bool {
        self.0 != 0
    }

    fn set(&mut self, flaw: Flaws) {
        self.0 |= flaw.0;
    }
}

/// How prompt and completion meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seam {
    /// Hash of the prompt's last word; 0 where it is a mark.
    pub ending: u32,
    /// White space that ends the prompt: none, spaces, line ends.
    pub after: u8,
    /// White space that begins the completion, alike.
    pub before: u8,
}

/// What is kept of a row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Look {
    pub flaws: Flaws,
    /// First mark of the classes End, Special, Foreign and Heading.
    pub marks: [u16; 4],
    /// Hash of everything before the last completion; 0 where there is nothing.
    pub prompt: u64,
    /// Of everything.
    pub whole: u64,
    /// The same without regard to case and white space.
    pub loose: u64,
    pub seam: Seam,
    pub sketch: Sketch,
    /// Hash of the last completion, its outer white space aside.
    pub answer: u64,
    /// The answer itself, where it is short enough for a label.
    pub label: Option<Box<str>>,
}

/// Bytes of the longest label.
const LABEL: usize = 64;
/// A prompt shorter than this may well occur in its completion.
const ECHO: usize = 24;

/// Completions by which other programs write that there is none.
const PLACEHOLDERS: &[&str] =
    &["nan", "NaN", "None", "null", "NULL", "undefined", "[object Object]", "<NA>", "#N/A", "[deleted]", "[removed]"];

impl Look {
    /// `frame`: what the rows of the table have in common.
    pub fn at(texts: &Texts<'_>, marks: &Marks, frame: &Frame) -> Self {
        let mut flaws = Flaws::default();
        let mut first = [u16::MAX; 4];
        let last = texts.turns.iter().rposition(|turn| turn.asked).unwrap_or(texts.turns.len());
        let (mut prompt, mut whole, mut loose) = (0u64, 0u64, 0u64);
        for (index, turn) in texts.turns.iter().enumerate() {
            if index < last && !turn.text.is_empty() {
                prompt = mix(prompt.rotate_left(9) ^ exact(turn.text));
            }
            whole = mix(whole.rotate_left(9) ^ exact(turn.text));
            loose = mix(loose.rotate_left(9) ^ loosely(turn.text));
            if control(turn.text) {
                flaws.set(Flaws::BROKEN);
            }
            if !texts.pair && turn.text.trim().is_empty() {
                flaws.set(Flaws::EMPTY_TURN);
            }
            for (mark, _, end) in marks.find(turn.text) {
                let (flaw, slot) = match marks.get(mark).class {
                    Class::End => (Flaws::END, Some(0)),
                    Class::Special => (Flaws::SPECIAL, Some(1)),
                    Class::Foreign => (Flaws::FOREIGN, Some(2)),
                    Class::Heading => (Flaws::HEADING, Some(3)),
                    Class::Braces => (Flaws::BRACES, None),
                    Class::Broken => (Flaws::BROKEN, None),
                };
                flaws.set(flaw);
                if let Some(slot) = slot {
                    first[slot] = first[slot].min(mark);
                }
                if flaw == Flaws::END && index == last && turn.text[end..].trim().is_empty() {
                    flaws.set(Flaws::END_LAST);
                }
            }
        }
        let answer = texts.turns.get(last).map_or("", |turn| turn.text.trim());
        if PLACEHOLDERS.contains(&answer) {
            flaws.set(Flaws::PLACEHOLDER);
        }
        let mut seam = Seam::default();
        if let (true, [before, after]) = (texts.pair, texts.turns) {
            seam = meet(before.text, after.text, &mut flaws);
        }
        let sketch = Sketch::of(texts.turns.iter().map(|turn| turn.text), frame);
        let label = (answer.len() <= LABEL).then(|| answer.into());
        Look { flaws, marks: first, prompt, whole, loose, seam, sketch, answer: exact(answer), label }
    }
}

fn meet(prompt: &str, completion: &str, flaws: &mut Flaws) -> Seam {
    if prompt.trim().is_empty() {
        flaws.set(Flaws::NO_PROMPT);
    }
    let own = prompt.trim();
    if own.len() >= ECHO && completion.trim_start().starts_with(own) {
        flaws.set(Flaws::ECHO);
    }
    // Scripts without spaces between words have no glued ones.
    let joins = |c: char| c.is_alphanumeric() && (c as u32) < 0x0E00;
    if prompt.ends_with(joins) && completion.starts_with(joins) {
        flaws.set(Flaws::GLUED);
    }
    let space = |text: &str| match text {
        "" => 0,
        text if text.contains('\n') => 2,
        _ => 1,
    };
    let word = prompt.trim_end();
    let tail = &prompt[word.len()..];
    let head = &completion[..completion.len() - completion.trim_start().len()];
    let word = word.rsplit(char::is_whitespace).next().unwrap_or_default();
    let ending = if word.contains(char::is_alphanumeric) { (exact(word) >> 32) as u32 | 1 } else { 0 };
    Seam { ending, after: space(tail), before: space(head) }
}

/// Eight bytes at a time; the length at the end tells a short rest from zeros.
fn exact(text: &str) -> u64 {
    let mut hash = 0x9E37_79B9_7F4A_7C15u64;
    let mut chunks = text.as_bytes().chunks_exact(8);
    for chunk in &mut chunks {
        let word = u64::from_le_bytes(chunk.try_into().expect("chunks_exact(8) yields 8 bytes"));
        hash = mix(hash.rotate_left(23) ^ word);
    }
    let mut rest = [0; 8];
    rest[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    mix(mix(hash.rotate_left(23) ^ u64::from_le_bytes(rest)) ^ text.len() as u64)
}

/// Lower case, and white space as one space between words.
fn loosely(text: &str) -> u64 {
    let mut hash = 0xCBF2_9CE4_8422_2325u64;
    let mut step = |value: u32| hash = (hash ^ u64::from(value)).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(7);
    let mut inside = false;
    for c in text.chars() {
        if c.is_whitespace() {
            if std::mem::take(&mut inside) {
                step(u32::from(' '));
            }
            continue;
        }
        inside = true;
        match c.is_ascii() {
            true => step(u32::from(c.to_ascii_lowercase())),
            false => c.to_lowercase().for_each(|lower| step(lower as u32)),
        }
    }
    if inside {
        step(u32::from(' '));
    }
    mix(hash)
}

/// Control characters other than tabulator, line feed and carriage return.
fn control(text: &str) -> bool {
    let mut before = 0u8;
    text.bytes().any(|byte| {
        // U+0080 to U+009F are C2 80 to C2 9F.
        let high = before == 0xC2 && byte < 0xA0;
        before = byte;
        high || byte == 0x7F || byte < 0x20 && !matches!(byte, b'\t' | b'\n' | b'\r')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn pair(prompt: &str, completion: &str) -> Look {
        let marks = Marks::new(&["</s>".into(), "<s>".into()], "</s>").unwrap();
        let turns = [Turn { text: prompt, asked: false }, Turn { text: completion, asked: true }];
        Look::at(&Texts { turns: &turns, pair: true }, &marks, &Frame::default())
    }

    #[test]
    fn each_flaw_is_seen_and_a_plain_row_has_none() {
        assert!(!pair("Question: 1 + 1?\nAnswer:", " 2").flaws.any());
        for (prompt, completion, flaw) in [
            ("a ", "b</s>", Flaws::END_LAST),
            ("a ", "b<|endoftext|> c", Flaws::END),
            ("<s>a ", "b", Flaws::SPECIAL),
            ("[INST] a [/INST]", " b", Flaws::FOREIGN),
            ("{{ question }} ", "b", Flaws::BRACES),
            ("a\u{0}", " b", Flaws::BROKEN),
            ("a\u{85}", " b", Flaws::BROKEN),
            ("What", "Yes", Flaws::GLUED),
            (" \n", "b", Flaws::NO_PROMPT),
            ("What is the capital of France?", " What is the capital of France? Paris", Flaws::ECHO),
            ("a: ", "nan", Flaws::PLACEHOLDER),
        ] {
            assert!(pair(prompt, completion).flaws.has(flaw), "{prompt:?} {completion:?}");
        }
        assert!(!pair("a ", "b<|endoftext|> c").flaws.has(Flaws::END_LAST));
    }

    #[test]
    fn hashes_tell_what_is_the_same() {
        let (a, b) = (pair("Ask it:", " Yes"), pair("ask  it:", "  yes\n"));
        assert_eq!((a.loose, a.prompt == b.prompt, a.whole == b.whole), (b.loose, false, false));
        assert_eq!(pair("x", " Yes").answer, pair("y", "Yes\n").answer);
        assert_ne!(pair("5 + 3", " x").loose, pair("5 - 3", " x").loose);
        assert_ne!(pair("ab", "c").whole, pair("a", "bc").whole);
        assert_eq!(pair("", "c").prompt, 0);
        assert_ne!(exact("a\0"), exact("a"));
    }
}
