//! The gate between the data and the first batch: names what is silently wrong before a worker starts.
//!
//! Text checks see every row's rendered texts once ([`Gate::look`] on any thread, [`text::Text::row`] in order, then
//! [`Gate::judge`]); token checks see its tokens ([`Gate::tokens`] on any thread, [`tokens::Tokens::row`] in order). Of a
//! row about a hundred bytes are kept. `docs/data.md` explains every kind of finding.

mod answers;
mod finding;
mod kind;
mod look;
mod marks;
mod repeats;
mod show;
mod sources;
mod text;
mod tokens;
mod words;

pub use finding::{Finding, Severity};
pub use kind::Kind;
pub use look::{Look, Texts, Turn};
pub use show::show;
pub use text::{Place, Text};
pub use tokens::{TokenFlaws, Tokens};
pub use words::{sample, Frame, SAMPLE};

use super::{Error, Example, TextTokenizer};
use marks::Marks;
use tokens::Ids;
use unisono_configs::run;

/// What the checks know of tokenizer and configuration.
#[derive(Debug)]
pub struct Gate {
    config: run::Gate,
    marks: Marks,
    ids: Ids,
}

impl Gate {
    pub fn new(config: &run::RunConfig, tokenizer: &TextTokenizer) -> Result<Self, Error> {
        let end = tokenizer.piece(tokenizer.eos());
        let marks = Marks::new(&tokenizer.specials(), &end)
            .map_err(|error| tokenizer.refuse(format!("its special tokens cannot be looked for ({error})")))?;
        Ok(Gate { config: config.gate.clone(), marks, ids: Ids::new(tokenizer) })
    }

    pub fn config(&self) -> &run::Gate {
        &self.config
    }

    /// What a row's texts tell; `frame`: what the rows of its table have in common.
    pub fn look(&self, texts: &Texts<'_>, frame: &Frame) -> Look {
        Look::at(texts, &self.marks, frame)
    }

    /// What a row's tokens tell; `truncated`: they were cut at `train.max_length`.
    pub fn tokens(&self, example: &Example, truncated: bool) -> TokenFlaws {
        self.ids.look(example, truncated)
    }

    /// What the texts of all rows tell, the gravest first.
    pub fn judge(&self, text: &Text) -> Vec<Finding> {
        let mut findings = text.finish(&self.config, &self.marks);
        finding::sort(&mut findings);
        findings
    }

    /// What the tokens of all rows tell, the gravest first.
    pub fn judge_tokens(&self, tokens: &Tokens) -> Vec<Finding> {
        let mut findings = tokens.finish(&self.config);
        finding::sort(&mut findings);
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::words::mix;
    use super::*;
    use crate::data::split::Part;
    use rayon::prelude::*;
    use std::time::Instant;

    /// Rows like those of school problems: some 45 words of 8,000, about 290 bytes.
    fn row(n: u64) -> (String, String) {
        let word = |i: u64| format!("w{}", mix(n * 1000 + i) % 8000);
        let question: Vec<String> = (0..45).map(word).collect();
        (format!("Question: {}\nAnswer:", question.join(" ")), format!(" {}", mix(n) % 1000))
    }

    /// `cargo test -p unisono-coordinator --lib -- --ignored --nocapture a_million` prints what the text gate takes.
    #[test]
    #[ignore = "a measurement"]
    fn a_million_rows_take_seconds() {
        let rows: Vec<(String, String)> = (0..1_000_000).into_par_iter().map(row).collect();
        let bytes: usize = rows.iter().map(|(p, c)| p.len() + c.len()).sum();
        let marks = Marks::new(&["</s>".into()], "</s>").unwrap();
        let frame = Frame::learn(rows[..SAMPLE].iter().map(|(p, c)| [p.as_str(), c.as_str()]));
        let begin = Instant::now();
        let looks: Vec<Look> = rows
            .par_iter()
            .map(|(prompt, completion)| {
                let turns = [Turn { text: prompt, asked: false }, Turn { text: completion, asked: true }];
                Look::at(&Texts { turns: &turns, pair: true }, &marks, &frame)
            })
            .collect();
        let looked = begin.elapsed();
        let config = run::Gate::default();
        let mut text = Text::default();
        let (task, file) = (text.task("t", true, &config), text.file("t.jsonl"));
        for (line, look) in looks.into_iter().enumerate() {
            let part = if line % 500 == 0 { Part::Validation } else { Part::Train };
            text.row(task, part, Place { file, line: line as u32 + 1 }, look);
        }
        let listed = begin.elapsed();
        let findings = text.finish(&config, &marks);
        assert!(findings.is_empty(), "{findings:?}");
        println!(
            "{} MB of text: looked at in {looked:?}, listed in {:?}, judged in {:?}; {} bytes kept for a row",
            bytes / 1_000_000,
            listed - looked,
            begin.elapsed() - listed,
            std::mem::size_of::<text::Seen>()
        );
    }
}
