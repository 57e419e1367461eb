//! A TOML document whose every value knows where it came from: a line of the file, or a command line option.

use super::Error;
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// Where a key stands, as an error names it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Place {
    Line(usize),
    Option(String),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub value: Value,
    pub place: Place,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Table(Table),
    Array(Vec<Node>),
    Text(String),
    Integer(i64),
    Real(f64),
    Flag(bool),
    Date,
}

/// Keys in the order of their places.
pub(super) type Table = Vec<(String, Node)>;

pub(super) struct Document {
    /// How the file is called in errors.
    pub name: String,
    pub root: Table,
}

impl Document {
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::Read { path: path.into(), error })?;
        Self::parse(path.display().to_string(), &text)
    }

    pub fn parse(name: String, text: &str) -> Result<Self, Error> {
        let lines = Lines::new(text);
        let table = DeTable::parse(text).map_err(|error| Error::Syntax {
            place: error.span().map_or(name.clone(), |span| format!("{name}:{}", lines.at(span.start))),
            problem: error.message().replace('\n', " "),
        })?;
        Ok(Document { root: convert_table(table.get_ref(), &lines), name })
    }

    pub fn place(&self, place: &Place) -> String {
        match place {
            Place::Line(line) => format!("{}:{line}", self.name),
            Place::Option(option) => option.clone(),
        }
    }

    pub fn error(&self, place: &Place, field: &str, problem: impl Into<String>) -> Error {
        Error::Field { place: self.place(place), field: field.into(), problem: problem.into() }
    }

    /// Sets `a.b` as `--set a.b=value` does: `value` is TOML, or else a string. `data.key` sets the key of every table,
    /// `data.0.key` that of the first one.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), Error> {
        let place = Place::Option(format!("--set {key}={value}"));
        let parsed = DeValue::parse(value).ok();
        let mut node = match parsed {
            Some(parsed) => convert(parsed.get_ref(), 0, &Lines::new("")),
            None => Node { value: Value::Text(value.into()), place: place.clone() },
        };
        node.relocate(&place);
        let Some((section, name)) = key.split_once('.') else {
            return Err(super::names::without_section(self, key, &node));
        };
        let empty = || Node { value: Value::Table(Vec::new()), place: place.clone() };
        match entry(&mut self.root, section, empty) {
            Node { value: Value::Table(table), .. } => *entry(table, name, || node.clone()) = node.clone(),
            Node { value: Value::Array(tables), .. } => {
                let (only, name) = match name.split_once('.').map(|(index, rest)| (index.parse::<usize>(), rest)) {
                    Some((Ok(index), rest)) if index < tables.len() => (index..index + 1, rest),
                    _ => (0..tables.len(), name),
                };
                for table in &mut tables[only] {
                    if let Value::Table(table) = &mut table.value {
                        *entry(table, name, || node.clone()) = node.clone();
                    }
                }
            }
            _ => return Err(self.error(&place, section, "is a value, not a section; correct the configuration file")),
        }
        Ok(())
    }
}

fn entry<'t>(table: &'t mut Table, key: &str, default: impl FnOnce() -> Node) -> &'t mut Node {
    let index = table.iter().position(|(known, _)| known == key).unwrap_or_else(|| {
        table.push((key.to_owned(), default()));
        table.len() - 1
    });
    &mut table[index].1
}

impl Node {
    fn relocate(&mut self, place: &Place) {
        self.place = place.clone();
        match &mut self.value {
            Value::Array(nodes) => nodes.iter_mut().for_each(|n| n.relocate(place)),
            Value::Table(table) => table.iter_mut().for_each(|(_, n)| n.relocate(place)),
            _ => (),
        }
    }

    /// As the user wrote it, for an error.
    pub fn show(&self) -> String {
        match &self.value {
            Value::Text(text) => format!("\"{text}\""),
            Value::Integer(n) => n.to_string(),
            Value::Real(x) if x.abs() < 1e-3 && *x != 0.0 => format!("{x:e}"),
            Value::Real(x) => x.to_string(),
            Value::Flag(b) => b.to_string(),
            Value::Date => "a date".into(),
            Value::Array(_) => "a list".into(),
            Value::Table(_) => "a table".into(),
        }
    }

    pub fn number(&self) -> Option<f64> {
        match self.value {
            Value::Integer(n) => Some(n as f64),
            Value::Real(x) => Some(x),
            _ => None,
        }
    }
}

/// Line numbers, from 1, of byte offsets.
struct Lines(Vec<usize>);

impl Lines {
    fn new(text: &str) -> Self {
        Lines(text.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(at, _)| at).collect())
    }

    fn at(&self, offset: usize) -> usize {
        self.0.partition_point(|&end| end < offset) + 1
    }
}

fn convert_table(table: &DeTable<'_>, lines: &Lines) -> Table {
    let mut entries: Vec<(usize, String, Node)> = table
        .iter()
        .map(|(key, value)| {
            let start = key.span().start;
            (start, key.get_ref().to_string(), convert(value.get_ref(), start, lines))
        })
        .collect();
    entries.sort_by_key(|(start, _, _)| *start);
    entries.into_iter().map(|(_, key, node)| (key, node)).collect()
}

/// A value is on the line of its key, `start`.
fn convert(value: &DeValue<'_>, start: usize, lines: &Lines) -> Node {
    let value = match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(n) => match i64::from_str_radix(n.as_str(), n.radix()) {
            Ok(n) => Value::Integer(n),
            // Beyond 64 bits: no field takes it, and the error should show it.
            Err(_) => Value::Text(n.to_string()),
        },
        DeValue::Float(x) => Value::Real(x.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(b) => Value::Flag(*b),
        DeValue::Datetime(_) => Value::Date,
        DeValue::Array(list) => {
            Value::Array(list.iter().map(|v| convert(v.get_ref(), v.span().start, lines)).collect())
        }
        DeValue::Table(table) => Value::Table(convert_table(table, lines)),
    };
    Node { value, place: Place::Line(lines.at(start)) }
}
