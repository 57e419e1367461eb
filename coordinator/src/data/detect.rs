//! What kind of rows a file holds, by its first ones.

use super::lines::first_rows;
use super::problem::{Problem, Remedy};
use super::row::{Field, Row};
use super::Error;
use serde_json::Value;
use std::path::Path;
use unisono_configs::run::{Data, Format};

/// Rows that are looked at.
const ROWS: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Template,
    /// Texts prompt and completion.
    Columns,
    /// A list of messages prompt, and another or the text of one, completion.
    ChatColumns,
    Messages,
    Alpaca,
    Sharegpt,
    Text,
}

impl Kind {
    /// As the configuration calls it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Template => "template",
            Kind::Columns => "prompt-completion",
            Kind::ChatColumns => "prompt-completion of messages",
            Kind::Messages => "messages",
            Kind::Alpaca => "alpaca",
            Kind::Sharegpt => "sharegpt",
            Kind::Text => "text",
        }
    }

    /// What a row is split by: the field that data.group_by names; of a row that was rendered before, its prompt, because
    /// the row itself would set two completions of one prompt apart; else all of it.
    pub fn source(self, data: &Data, row: &Row<'_>) -> Result<u128, Problem> {
        match (&data.group_by, self) {
            (Some(name), _) => {
                let known = data.columns.iter().find(|(_, own)| *own == name).map_or(name, |(known, _)| known);
                let missing = || {
                    let words = format!("field \"{known}\" of data.group_by is missing; the row has {}", row.names());
                    Problem::new(words, Remedy::GroupBy)
                };
                row.hash_of(known).ok_or_else(missing)
            }
            (None, Kind::Columns | Kind::ChatColumns) => Ok(row.hash_of("prompt").unwrap_or_else(|| row.hash())),
            (None, _) => Ok(row.hash()),
        }
    }

    /// The kind of the rows of `path`, which `key` of the configuration named.
    pub fn of_file(data: &Data, path: &Path, key: &str) -> Result<Self, Error> {
        match data.format {
            _ if data.template.is_some() || data.template_file.is_some() => return Ok(Kind::Template),
            Format::Messages => return Ok(Kind::Messages),
            Format::Alpaca => return Ok(Kind::Alpaca),
            Format::Sharegpt => return Ok(Kind::Sharegpt),
            Format::Text => return Ok(Kind::Text),
            Format::Auto | Format::PromptCompletion => (),
        }
        let mut found: Option<(u64, Kind)> = None;
        for (line, kind) in first_rows(path, key, ROWS, |text| {
            let mut row: Row<'_> = serde_json::from_slice(text).ok()?;
            row.rename(&data.columns);
            Self::of(&row)
        })? {
            let Some(kind) = kind else { continue };
            match found {
                None => found = Some((line, kind)),
                Some((first, known)) if known != kind => {
                    let problem = format!(
                        "line {first} looks like {}, line {line} like {}; set data.format, or give each its own [[data]] table",
                        known.name(),
                        kind.name()
                    );
                    return Err(Error::File { path: path.into(), problem });
                }
                Some(_) => (),
            }
        }
        Ok(match (found.map(|(_, kind)| kind), data.format) {
            // The columns are missing, and the rows' own error says so.
            (None, _) => Kind::Columns,
            (Some(kind), Format::Auto) => kind,
            (Some(Kind::ChatColumns), _) => Kind::ChatColumns,
            (Some(_), _) => Kind::Columns,
        })
    }

    fn of(row: &Row<'_>) -> Option<Self> {
        let has = |name: &str| row.get(name).is_some();
        let list = |name: &str| match row.get(name) {
            Some(Field::Other(Value::Array(list))) => Some(list),
            _ => None,
        };
        if has("prompt") && has("completion") {
            return Some(if list("prompt").is_some() { Kind::ChatColumns } else { Kind::Columns });
        }
        if list("messages").is_some() {
            return Some(Kind::Messages);
        }
        if let Some(list) = list("conversations") {
            let from = list.first().is_some_and(|turn| turn.get("from").is_some());
            return Some(if from { Kind::Sharegpt } else { Kind::Messages });
        }
        if has("instruction") && has("output") {
            return Some(Kind::Alpaca);
        }
        (has("text") && !has("prompt") && !has("completion")).then_some(Kind::Text)
    }
}
