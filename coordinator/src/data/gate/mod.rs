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
pub use words::{Frame, SAMPLE};

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
