//! The three forms of an imported file: YAML, JSON, and a command line as one would type it.

use super::{Error, Origin};
use crate::yaml::{self, Content, Node};
use std::path::{Path, PathBuf};

/// The keys of the imported file.
pub struct Given {
    pub path: PathBuf,
    pub origin: Origin,
    entries: Vec<(String, Node)>,
}

impl Given {
    pub fn read(path: &Path) -> Result<Self, Error> {
        let refuse = |problem: String| Error::File { path: path.into(), problem };
        let text = std::fs::read_to_string(path).map_err(|error| Error::Read { path: path.into(), error })?;
        let entries = if text.trim_start().starts_with('{') {
            let json = serde_json::from_str(&text).map_err(|error| refuse(format!("is not valid JSON ({error})")))?;
            node_of_json(&json, 1).entries().to_vec()
        } else if is_command_line(&text) {
            arguments(&text)
        } else {
            yaml::parse(&text).map_err(refuse)?.entries().to_vec()
        };
        let has = |names: &[&str]| entries.iter().any(|(key, _)| names.contains(&key.as_str()));
        let origin = if has(&["base_model", "micro_batch_size", "sequence_len"]) {
            Origin::Axolotl
        } else if has(&[
            "model_name_or_path",
            "dataset_name",
            "per_device_train_batch_size",
            "num_train_epochs",
            "output_dir",
        ]) {
            Origin::Trl
        } else {
            return Err(refuse(
                "is neither Axolotl's YAML (it has no base_model) nor TRL's arguments (no model_name_or_path)".into(),
            ));
        };
        Ok(Given { path: path.into(), origin, entries })
    }

    /// Keys that say something: neither null nor empty.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.entries.iter().filter(|(_, node)| !node.is_null()).map(|(key, node)| (key.as_str(), node))
    }

    pub fn node(&self, key: &str) -> Option<&Node> {
        self.entries().find(|(known, _)| *known == key).map(|(_, node)| node)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.node(key).and_then(Node::text)
    }

    /// A number; Axolotl reads 2e-5 as one, though YAML 1.1 does not.
    pub fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        let Some(node) = self.node(key) else { return Ok(None) };
        match node.text().and_then(|text| text.replace('_', "").parse().ok()).filter(|x: &f64| x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(self.wrong(key, node, "a number")),
        }
    }

    /// A whole number, from 0.
    pub fn whole(&self, key: &str) -> Result<Option<i64>, Error> {
        match self.number(key)? {
            None => Ok(None),
            Some(x) if x.fract() == 0.0 && x.abs() < 9e15 => Ok(Some(x as i64)),
            Some(_) => match self.node(key) {
                Some(node) => Err(self.wrong(key, node, "a whole number")),
                None => Ok(None),
            },
        }
    }

    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.text(key)?.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => Some(true),
            "false" | "no" | "off" | "0" => Some(false),
            _ => None,
        }
    }

    fn wrong(&self, key: &str, node: &Node, must: &str) -> Error {
        let problem = format!("is {} and must be {must}", show(node));
        Error::Key { path: self.path.clone(), line: node.line, key: key.into(), problem }
    }
}

/// A value on one line.
pub fn show(node: &Node) -> String {
    match &node.content {
        Content::Scalar(text, _) => text.clone(),
        Content::List(items) => format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(", ")),
        Content::Map(entries) => {
            let all: Vec<String> = entries.iter().map(|(key, node)| format!("{key}: {}", show(node))).collect();
            format!("{{{}}}", all.join(", "))
        }
    }
}

fn node_of_json(value: &serde_json::Value, line: usize) -> Node {
    use serde_json::Value as Json;
    let content = match value {
        Json::Null => Content::Scalar("null".into(), true),
        Json::String(text) => Content::Scalar(text.clone(), false),
        Json::Array(items) => Content::List(items.iter().map(|item| node_of_json(item, line)).collect()),
        Json::Object(map) => Content::Map(map.iter().map(|(k, v)| (k.clone(), node_of_json(v, line))).collect()),
        other => Content::Scalar(other.to_string(), true),
    };
    Node { line, content }
}

/// Options at the beginning of words, and no YAML key before the first of them.
fn is_command_line(text: &str) -> bool {
    let words = text.lines().filter(|line| !line.trim_start().starts_with('#')).flat_map(str::split_whitespace);
    let mut before = words.take_while(|word| !word.starts_with("--"));
    text.split_whitespace().any(|word| word.starts_with("--")) && !before.any(|word| word.ends_with(':'))
}

/// `--key value`, `--key=value`, `--key` and `--no_key`, with a shell's quotes, comments and line ends.
fn arguments(text: &str) -> Vec<(String, Node)> {
    let mut entries: Vec<(String, Node)> = Vec::new();
    for (line, word, quoted) in words(text) {
        let scalar = |text: &str| Node { line, content: Content::Scalar(text.to_owned(), !quoted) };
        match word.strip_prefix("--").filter(|name| !quoted && name.starts_with(|c: char| c.is_ascii_alphabetic())) {
            Some(option) => {
                let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
                entries.push((name.replace('-', "_"), scalar(value.unwrap_or(""))));
            }
            // The script that a launcher starts.
            None if word.ends_with(".py") => (),
            None => {
                let Some((_, node)) = entries.last_mut() else { continue };
                match &mut node.content {
                    Content::Scalar(old, _) if old.is_empty() => *node = scalar(&word),
                    Content::List(items) => items.push(scalar(&word)),
                    _ => *node = Node { line, content: Content::List(vec![node.clone(), scalar(&word)]) },
                }
            }
        }
    }
    // An option without a value is a flag.
    for (name, node) in &mut entries {
        if matches!(&node.content, Content::Scalar(text, _) if text.is_empty()) {
            let (positive, value) =
                name.strip_prefix("no_").map_or((name.clone(), "true"), |n| (n.to_owned(), "false"));
            (*name, node.content) = (positive, Content::Scalar(value.into(), true));
        }
    }
    entries
}

/// A shell's words with their lines, and whether they were quoted.
fn words(text: &str) -> Vec<(usize, String, bool)> {
    let (mut all, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    let (mut line, mut quote) = (1, None);
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                (quote, quoted) = (Some(c), true);
                word.get_or_insert_default();
            }
            (None, '\\') => match rest.next() {
                Some('\n') | None => line += 1,
                Some(c) => word.get_or_insert_default().push(c),
            },
            (None, '#') if word.is_none() => while rest.next_if(|c| *c != '\n').is_some() {},
            (None, c) if c.is_whitespace() => {
                all.extend(word.take().map(|word| (line, word, quoted)));
                quoted = false;
                line += usize::from(c == '\n');
            }
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    all.extend(word.map(|word| (line, word, quoted)));
    all
}
