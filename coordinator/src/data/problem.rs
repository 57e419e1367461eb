//! What is wrong with a row, and what to do about it: the row is not always at fault.

use std::fmt::{self, Display};
use unisono_configs::run::Data;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub words: String,
    pub remedy: Remedy,
}

/// What would help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    Row,
    /// The row, or the template that makes text of it.
    Template,
    /// The words say it.
    Said,
    MaxLength,
    FewShot,
    GroupBy,
    /// The file is none that is read.
    Format,
}

impl Problem {
    pub fn new(words: impl Into<String>, remedy: Remedy) -> Self {
        Problem { words: words.into(), remedy }
    }

    /// The same problem of a row of `data`, whose template may be to blame.
    pub fn of(self, data: &Data) -> Self {
        let templated = data.template.is_some() || data.template_file.is_some();
        let remedy = if templated && self.remedy == Remedy::Row { Remedy::Template } else { self.remedy };
        Problem { remedy, ..self }
    }
}

impl Remedy {
    /// The end of the sentence; `all`: no row is good, so that dropping the bad ones would leave nothing.
    pub fn advice(self, all: bool) -> String {
        let own = match self {
            Remedy::Said if all => return String::new(),
            Remedy::Template if all => "correct the row, or data.template",
            Remedy::Row | Remedy::Template | Remedy::Said => "correct the row",
            Remedy::MaxLength => "raise train.max_length",
            Remedy::FewShot => "lower data.few_shot",
            Remedy::GroupBy => "correct data.group_by",
            Remedy::Format if all => "only .jsonl, .json and .parquet files are read: convert it",
            Remedy::Format => "correct the row",
        };
        match all {
            true => format!("; {own}"),
            false => format!("; {own}, or set data.on_bad_row = \"drop\""),
        }
    }
}

impl From<String> for Problem {
    fn from(words: String) -> Self {
        Problem { words, remedy: Remedy::Row }
    }
}

impl From<&str> for Problem {
    fn from(words: &str) -> Self {
        words.to_owned().into()
    }
}

impl Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}
