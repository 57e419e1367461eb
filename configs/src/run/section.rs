//! One section of the configuration: typed values within their ranges, or a sentence.

use super::names::nearest;
use super::tree::{Document, Node, Place, Value};
use super::Error;
use std::path::{Path, PathBuf};

pub(super) struct Section<'a> {
    pub document: &'a Document,
    /// `train`, or `data` for each of its tables.
    pub name: &'static str,
    pub table: &'a [(String, Node)],
    /// Of the section's header; the first line where there is none.
    pub place: Place,
    /// Where relative paths of the file begin.
    pub base: &'a Path,
}

impl<'a> Section<'a> {
    pub fn new(document: &'a Document, name: &'static str, base: &'a Path) -> Result<Self, Error> {
        let empty: &[(String, Node)] = &[];
        let (table, place) = match document.root.iter().find(|(key, _)| key == name) {
            None => (empty, Place::Line(1)),
            Some((_, Node { value: Value::Table(table), place })) => (table.as_slice(), place.clone()),
            Some((_, node)) => {
                let problem = format!("is {} and must be a section; write [{name}]", node.show());
                return Err(document.error(&node.place, name, problem));
            }
        };
        Ok(Section { document, name, table, place, base })
    }

    /// The tables of `[[name]]`.
    pub fn list(document: &'a Document, name: &'static str, base: &'a Path) -> Result<Vec<Self>, Error> {
        let Some((_, node)) = document.root.iter().find(|(key, _)| key == name) else { return Ok(Vec::new()) };
        let wrong =
            |node: &Node| document.error(&node.place, name, format!("must be a list of tables; write [[{name}]]"));
        let Value::Array(nodes) = &node.value else { return Err(wrong(node)) };
        nodes
            .iter()
            .map(|node| match &node.value {
                Value::Table(table) => Ok(Section { document, name, table, place: node.place.clone(), base }),
                _ => Err(wrong(node)),
            })
            .collect()
    }

    pub fn node(&self, key: &str) -> Option<&'a Node> {
        self.table.iter().find(|(known, _)| known == key).map(|(_, node)| node)
    }

    pub fn field(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    pub fn fail(&self, key: &str, problem: impl Into<String>) -> Error {
        let place = self.node(key).map_or(&self.place, |node| &node.place);
        self.document.error(place, &self.field(key), problem)
    }

    fn wrong(&self, key: &str, node: &Node, must: &str) -> Error {
        self.fail(key, format!("is {} and must be {must}", node.show()))
    }

    /// A whole number of at least `least`.
    pub fn whole(&self, key: &str, default: u64, least: u64) -> Result<u64, Error> {
        let Some(node) = self.node(key) else { return Ok(default) };
        match node.value {
            Value::Integer(n) if u64::try_from(n).is_ok_and(|n| n >= least) => Ok(n as u64),
            _ => Err(self.wrong(key, node, &format!("a whole number of at least {least}"))),
        }
    }

    /// A number for which `holds`; `must` says in words which.
    pub fn real(&self, key: &str, default: f64, holds: impl Fn(f64) -> bool, must: &str) -> Result<f64, Error> {
        let Some(node) = self.node(key) else { return Ok(default) };
        match node.number() {
            Some(x) if x.is_finite() && holds(x) => Ok(x),
            _ => Err(self.wrong(key, node, must)),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        let Some(node) = self.node(key) else { return Ok(default) };
        match node.value {
            Value::Flag(b) => Ok(b),
            _ => Err(self.wrong(key, node, "true or false")),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.node(key) {
            None => Ok(None),
            Some(Node { value: Value::Text(text), .. }) if !text.is_empty() => Ok(Some(text)),
            Some(node) => Err(self.wrong(key, node, "a string that is not empty")),
        }
    }

    /// A string that may be empty.
    pub fn any_text(&self, key: &str, default: &str) -> Result<String, Error> {
        match self.node(key) {
            None => Ok(default.to_owned()),
            Some(Node { value: Value::Text(text), .. }) => Ok(text.clone()),
            Some(node) => Err(self.wrong(key, node, "a string")),
        }
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&self, key: &str, default: T, words: &[(&'static str, T)]) -> Result<T, Error> {
        let Some(node) = self.node(key) else { return Ok(default) };
        let word = match &node.value {
            Value::Text(text) => text.clone(),
            _ => node.show(),
        };
        if let Some((_, value)) = words.iter().find(|(known, _)| *known == word) {
            return Ok(*value);
        }
        let all: Vec<String> = words.iter().map(|(known, _)| format!("\"{known}\"")).collect();
        let hint = nearest(&word, words.iter().map(|(known, _)| *known)).map(|n| format!("; did you mean \"{n}\"?"));
        Err(self.wrong(key, node, &format!("{}{}", all.join(" or "), hint.unwrap_or_default())))
    }

    /// A path, absolute: relative ones begin at the configuration file, those of the command line where it was called.
    pub fn path(&self, key: &str) -> Result<Option<PathBuf>, Error> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        let place = &self.node(key).expect("text() found the node").place;
        Ok(Some(self.absolute(text, place)))
    }

    /// A path as [`Self::path`] has it; or as it is written, where it is a URL or the name of something on the Hugging Face
    /// Hub (`org/name`, for data also with files in it) that no file or directory here has.
    pub fn source(&self, key: &str) -> Result<Option<PathBuf>, Error> {
        let (text, path) = match (self.text(key)?, self.path(key)?) {
            (Some(text), Some(path)) => (text, path),
            _ => return Ok(None),
        };
        let place = &self.node(key).expect("text() found the node").place;
        let named = hub_name(text).is_some_and(|name| !self.absolute(name, place).exists());
        Ok(Some(if text.contains("://") || named { text.into() } else { path }))
    }

    pub fn absolute(&self, text: &str, place: &Place) -> PathBuf {
        let path = match place {
            Place::Line(_) => self.base.join(text),
            Place::Option(_) => PathBuf::from(text),
        };
        // Only an empty path has no absolute form.
        let path = std::path::absolute(&path).unwrap_or(path);
        path.components().collect()
    }
}

/// The `org/name` that a text begins with if it may name something on the Hugging Face Hub.
fn hub_name(text: &str) -> Option<&str> {
    let mut parts = text.splitn(3, '/');
    let (org, name) = (parts.next()?, parts.next()?);
    let plain = |part: &str| {
        let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(inside)
    };
    let file = [".jsonl", ".json", ".parquet"].iter().any(|ending| name.ends_with(ending));
    (plain(org) && plain(name) && !file).then(|| &text[..org.len() + 1 + name.len()])
}

#[cfg(test)]
mod tests {
    use super::hub_name;

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        assert_eq!(hub_name("Qwen/Qwen3-0.6B"), Some("Qwen/Qwen3-0.6B"));
        assert_eq!(hub_name("openai/gsm8k/main/train-*.parquet"), Some("openai/gsm8k"));
        for path in ["rows", "./a/b", "/a/b", "../a/b", "a/*.jsonl", "a/b.jsonl", "~/a", "a//b", "a b/c", "s3://a/b"] {
            assert_eq!(hub_name(path), None, "{path}");
        }
    }
}
