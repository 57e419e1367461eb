//! Other trainers' configurations as ours: Axolotl's YAML, and TRL's arguments on a command line, in YAML or in JSON.
//! What decides the training is translated with the other trainer's defaults; what has no equivalent is named.

mod datasets;
mod settings;
mod source;
#[cfg(test)]
mod tests;

use source::Given;
use std::path::{Path, PathBuf};
use unisono_configs::run::RunConfig;

/// The file cannot be imported: exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: cannot be read ({error}); give an Axolotl configuration, or TRL's arguments")]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error("{path}:{line}: {key}: {problem}")]
    Key { path: PathBuf, line: usize, key: String, problem: String },
    #[error("the translation does not hold here: {0}")]
    Invalid(#[from] unisono_configs::run::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Axolotl,
    Trl,
}

impl Origin {
    pub fn name(self) -> &'static str {
        match self {
            Origin::Axolotl => "Axolotl",
            Origin::Trl => "TRL",
        }
    }
}

/// A key of the imported file that has no equivalent here.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Left {
    pub key: String,
    pub value: String,
    pub reason: String,
}

/// A translated configuration.
#[derive(Debug)]
pub struct Imported {
    pub origin: Origin,
    pub toml: String,
    pub left: Vec<Left>,
    /// What is the same key, but not quite the same thing.
    pub notes: Vec<String>,
}

/// What translating gathers.
struct Draft {
    origin: Origin,
    /// Section, key and value in TOML, in the order of the sections of a configuration.
    values: Vec<(&'static str, &'static str, toml::Value)>,
    data: Vec<toml::Table>,
    left: Vec<Left>,
    notes: Vec<String>,
}

impl Draft {
    fn set(&mut self, section: &'static str, key: &'static str, value: impl Into<toml::Value>) {
        self.values.retain(|(known_section, known, _)| (*known_section, *known) != (section, key));
        self.values.push((section, key, value.into()));
    }

    fn leave(&mut self, key: &str, value: &str, reason: impl Into<String>) {
        self.left.push(Left { key: key.into(), value: value.into(), reason: reason.into() });
    }

    fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }
}

/// Reads and translates `path`. `gpus` is what the batch size of one device is multiplied with, where the file does not say.
pub fn import(path: &Path, gpus: Option<u64>) -> Result<Imported, Error> {
    let given = Given::read(path)?;
    let mut draft =
        Draft { origin: given.origin, values: Vec::new(), data: Vec::new(), left: Vec::new(), notes: Vec::new() };
    settings::translate(&given, gpus, &mut draft)?;
    datasets::translate(&given, &mut draft)?;
    let toml = write(&draft, path);
    // The configuration must be one that this program reads.
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    RunConfig::parse(&format!("the import of {file}"), &toml, path.parent().unwrap_or(Path::new("")))?;
    Ok(Imported { origin: draft.origin, toml, left: draft.left, notes: draft.notes })
}

fn write(draft: &Draft, path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut out = format!("# Imported from {} ({}).\n", one_line(&name), draft.origin.name());
    for note in &draft.notes {
        out += &format!("# Note: {}\n", one_line(note));
    }
    let section = |name: &str| {
        let own: Vec<String> = (draft.values.iter())
            .filter(|(section, ..)| *section == name)
            .map(|(_, key, value)| format!("{key} = {value}\n"))
            .collect();
        if own.is_empty() {
            String::new()
        } else {
            format!("\n[{name}]\n{}", own.concat())
        }
    };
    out += &section("model");
    for table in &draft.data {
        out += "\n[[data]]\n";
        for (key, value) in table {
            out += &format!("{key} = {value}\n");
        }
    }
    for name in ["split", "train", "cluster", "eval", "checkpoint"] {
        out += &section(name);
    }
    if !draft.left.is_empty() {
        out += "\n# Without an equivalent:\n";
    }
    for left in &draft.left {
        out += &format!("# {} = {}: {}\n", one_line(&left.key), one_line(&left.value), one_line(&left.reason));
    }
    out
}

/// A comment must not become a line of the configuration.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
