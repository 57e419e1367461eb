//! promptsource's template files: named Jinja templates with answer choices, rendered as its `Template.apply` does.

use super::jinja::{Draw, Fault, Limits, Program, Value};
use super::row::{Field, Row};
use super::Error;
use crate::yaml::{self, Node};
use std::path::{Path, PathBuf};

/// Stands for `|||` in a row's strings while they are rendered, so that they are not cut there: promptsource's own word.
const PROTECTOR: &str = "3ed2dface8203c4c9dfb1a5dc58e41e0";
const SEPARATOR: &str = "|||";
/// Bounds on what rendering one row may use.
const LIMITS: Limits = Limits { fuel: 1_000_000, depth: 64, output: 16 << 20 };
/// The variable that holds a row's answer choices.
const CHOICES: &str = "answer_choices";

/// One template of a file.
#[derive(Debug)]
pub struct Template {
    pub name: String,
    /// Enters what it draws at random.
    id: String,
    program: Program,
    choices: Option<Program>,
}

/// The templates of a file, in its order.
#[derive(Debug)]
pub struct TemplateFile {
    pub path: PathBuf,
    pub templates: Vec<Template>,
}

impl TemplateFile {
    pub fn read(path: &Path) -> Result<Self, Error> {
        let refuse = |problem: String| Error::File { path: path.into(), problem };
        let text = std::fs::read_to_string(path).map_err(|error| Error::Read {
            path: path.into(),
            key: "data.template_file".into(),
            error,
        })?;
        let root = yaml::parse(&text).map_err(refuse)?;
        let Some(all) = root.get("templates").filter(|node| !node.entries().is_empty()) else {
            return Err(refuse(
                "holds no \"templates\"; set data.template_file to a templates.yaml of promptsource's form".into(),
            ));
        };
        let templates = all.entries().iter().map(|(id, node)| Template::read(id, node).map_err(refuse));
        Ok(TemplateFile { path: path.into(), templates: templates.collect::<Result<_, _>>()? })
    }

    /// Only the template of this name.
    pub fn only(mut self, name: &str) -> Result<Self, Error> {
        let names: Vec<String> = self.templates.iter().map(|t| format!("\"{}\"", t.name)).collect();
        self.templates.retain(|template| template.name == name);
        match self.templates.is_empty() {
            false => Ok(self),
            true => Err(Error::File {
                path: self.path,
                problem: format!("has no template \"{name}\"; set data.template_name to one of {}", names.join(", ")),
            }),
        }
    }

    /// Prompt and completion by the template at `fixed`, else by one of those that apply to the row, drawn by `seed` and
    /// the row's `hash`; and which it was. A template that prints nothing does not apply.
    pub fn render(
        &self,
        row: &Row<'_>,
        hash: u128,
        seed: u64,
        fixed: Option<usize>,
    ) -> Result<(usize, String, String), String> {
        let mut left: Vec<usize> = fixed.map_or_else(|| (0..self.templates.len()).collect(), |index| vec![index]);
        let mut draw = Draw::new(&[&seed.to_le_bytes(), &hash.to_le_bytes(), b"which template"]);
        while !left.is_empty() {
            let index = left.remove(draw.below(left.len()));
            let template = &self.templates[index];
            let mut parts = template.apply(row, hash, seed)?;
            let name = &template.name;
            match (parts.len(), parts.pop()) {
                (2, Some(completion)) => return Ok((index, parts.swap_remove(0), completion)),
                (1, Some(text)) if text.is_empty() => (),
                (1, _) => return Err(format!("template \"{name}\" printed no ||| for this row")),
                _ => return Err(format!("template \"{name}\" printed more than one ||| for this row")),
            }
        }
        Err(match (self.templates.as_slice(), fixed) {
            ([one], _) => format!("template \"{}\" prints nothing for this row", one.name),
            (all, Some(index)) => format!("template \"{}\" prints nothing for this row", all[index].name),
            _ => "no template of the file prints anything for this row".into(),
        })
    }
}

impl Template {
    fn read(id: &str, node: &Node) -> Result<Self, String> {
        let text = |key: &str| node.get(key).and_then(Node::text);
        let name = text("name").unwrap_or(id).to_owned();
        let compile = |key: &str, source: &str| {
            Program::compile(source).map_err(|fault| {
                let line = node.get(key).map_or(node.line, |node| node.line);
                format!("line {line}: {key} of template \"{name}\" is not valid Jinja: {fault}; correct it there")
            })
        };
        let jinja = text("jinja").ok_or_else(|| format!("line {}: template \"{name}\" has no jinja", node.line))?;
        let choices = text(CHOICES).map(|source| compile(CHOICES, source)).transpose()?;
        Ok(Template { id: id.to_owned(), program: compile("jinja", jinja)?, choices, name })
    }

    /// What the template prints for a row, cut at `|||`, each part stripped. What it draws at random depends on the seed
    /// and the row's `hash`. An error is what is wrong with the row, in words.
    pub fn apply(&self, row: &Row<'_>, hash: u128, seed: u64) -> Result<Vec<String>, String> {
        if row.get(CHOICES).is_some() {
            return Err(format!("the row has a field \"{CHOICES}\", which templates keep for themselves; rename it"));
        }
        let mut draw = Draw::new(&[&seed.to_le_bytes(), &hash.to_le_bytes(), self.id.as_bytes()]);
        let look_up = |name: &str| row.get(name).map(value);
        let choices = match &self.choices {
            None => Value::None,
            Some(program) => {
                let text = program.render(&look_up, &mut draw, LIMITS).map_err(|fault| self.sentence(&fault, row))?;
                Value::list(text.split(SEPARATOR).map(|part| Value::str(restored(strip(part)))).collect())
            }
        };
        let look_up = |name: &str| match name {
            CHOICES => Some(choices.clone()),
            name => row.get(name).map(value),
        };
        let text = self.program.render(&look_up, &mut draw, LIMITS).map_err(|fault| self.sentence(&fault, row))?;
        Ok(text.split(SEPARATOR).map(|part| strip(&restored(part)).to_owned()).collect())
    }

    fn sentence(&self, fault: &Fault, row: &Row<'_>) -> String {
        let name = &self.name;
        match fault {
            Fault::Fuel => format!(
                "template \"{name}\" ran too long for this row ({} operations are the most); simplify it, or leave it out by data.template_name",
                LIMITS.fuel
            ),
            Fault::Output => format!("template \"{name}\" printed more than {} MiB for this row", LIMITS.output >> 20),
            Fault::Undefined(what) => {
                format!("template \"{name}\" uses {what}, which is undefined; the row has {}", row.names())
            }
            other => format!("template \"{name}\" failed: {other}"),
        }
    }
}

fn strip(text: &str) -> &str {
    text.trim_matches(super::jinja::is_space)
}

fn restored(text: &str) -> String {
    text.replace(PROTECTOR, SEPARATOR)
}

fn value(field: &Field<'_>) -> Value {
    match field {
        Field::Text(text) if text.contains(SEPARATOR) => Value::str(text.replace(SEPARATOR, PROTECTOR)),
        Field::Text(text) => Value::str(text.as_ref()),
        Field::Other(value) => Value::from_json(value),
    }
}

#[cfg(test)]
mod tests;
