//! A source row becomes prompt and completion: by its columns, or by a Jinja template that sees nothing but the row.

use super::chat::ChatTemplate;
use super::conversation::{Conversation, Names};
use super::detect::Kind;
use super::problem::{Problem, Remedy};
use super::promptsource::TemplateFile;
use super::row::{Field, Row};
use super::shots::Draws;
use super::Error;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Object, Value};
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use minijinja_contrib::pycompat::unknown_method_callback;
use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use unisono_configs::run::{Data, Turns};

/// Stands for `|||` while a template is rendered, so that a row which contains `|||` is not cut there.
const SEPARATOR: &str = "\u{10FFFD}";
/// Instructions that a template may execute for one row.
const FUEL: u64 = 1_000_000;
/// Nested macro calls.
const RECURSION: usize = 64;
/// Bytes that a template may print for one row.
const OUTPUT: usize = 16 << 20;

/// One row as text.
pub enum Rendered<'r> {
    Pair {
        prompt: Cow<'r, str>,
        completion: Cow<'r, str>,
    },
    /// A conversation, and the byte ranges of it that the model is asked for.
    Chat {
        text: String,
        spans: Vec<Range<usize>>,
        /// What each message says, and whether the model is to say it.
        messages: Vec<(String, bool)>,
    },
}

impl Rendered<'_> {
    /// Names the text and what of it is asked for: rows with the same key have the same tokens.
    pub fn key(&self) -> u128 {
        let mut hasher = blake3::Hasher::new_derive_key("unisono 1 rendered row");
        match self {
            Rendered::Pair { prompt, completion } => {
                hasher.update(&[0]).update(&(prompt.len() as u64).to_le_bytes()).update(prompt.as_bytes());
                hasher.update(completion.as_bytes());
            }
            Rendered::Chat { text, spans, .. } => {
                hasher.update(&[1]).update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
                for span in spans {
                    hasher.update(&(span.start as u64).to_le_bytes()).update(&(span.end as u64).to_le_bytes());
                }
            }
        }
        let mut bytes = [0; 16];
        hasher.finalize_xof().fill(&mut bytes);
        u128::from_be_bytes(bytes)
    }
}

/// How one data table is rendered: its form, what precedes a prompt, and which rows belong together.
pub struct Renderer {
    form: Form,
    kind: Kind,
    data: Data,
    draws: Draws,
}

enum Form {
    Columns,
    Text,
    Alpaca,
    Template(Box<Template>),
    File(Box<TemplateFile>),
    Chat { template: Box<ChatTemplate>, kind: Kind, names: Names, roles: Vec<String>, turns: Turns },
}

pub struct Template {
    environment: Environment<'static>,
    /// Names that the template takes from the row.
    wanted: Vec<String>,
}

impl Renderer {
    /// `model` is the directory whose chat template renders conversations.
    pub fn new(data: &Data, table: &str, kind: Kind, model: &Path, draws: &Draws) -> Result<Self, Error> {
        if let (Some(name), None) = (&data.template_name, &data.template_file) {
            let problem =
                format!("data.template_name = \"{name}\" names a template of no file; set data.template_file");
            return Err(Error::Table { table: table.into(), problem });
        }
        let form = Form::new(data, table, kind, model)?;
        if data.few_shot > 0 && matches!(form, Form::Chat { .. } | Form::Text) {
            let problem =
                format!("data.few_shot needs prompts and completions, but its rows are {}; remove it", kind.name());
            return Err(Error::Table { table: table.into(), problem });
        }
        Ok(Renderer { form, kind, data: data.clone(), draws: draws.clone() })
    }

    /// What a row is split by: rows of one source are never on two sides.
    pub fn source(&self, row: &Row<'_>) -> Result<u128, Problem> {
        self.kind.source(&self.data, row)
    }

    /// Errors are what is wrong with the row, in words.
    pub fn render<'r>(&self, row: &'r Row<'_>) -> Result<Rendered<'r>, Problem> {
        let Some(shots) = &self.draws.shots else {
            return self.form.render(row, self.draws.seed, None, &self.data).map(|(rendered, _)| rendered);
        };
        let (rendered, template) = self.form.render(row, self.draws.seed, None, &self.data)?;
        let Rendered::Pair { prompt, completion } = rendered else { return Ok(rendered) };
        let mut text = String::new();
        shots.draw(row, self.source(row)?, self.draws.seed, |example| {
            let Ok((Rendered::Pair { prompt, completion }, _)) =
                self.form.render(example, self.draws.seed, template, &self.data)
            else {
                return false;
            };
            for part in [&prompt, &completion, self.data.few_shot_delimiter.as_str()] {
                text += part;
            }
            true
        })?;
        Ok(Rendered::Pair { prompt: (text + &prompt).into(), completion })
    }
}

impl Form {
    fn new(data: &Data, table: &str, kind: Kind, model: &Path) -> Result<Self, Error> {
        Ok(match kind {
            Kind::Template => match &data.template_file {
                Some(path) => {
                    let file = TemplateFile::read(path)?;
                    Form::File(Box::new(match &data.template_name {
                        Some(name) => file.only(name)?,
                        None => file,
                    }))
                }
                None => Form::Template(Box::new(Template::new(data.template.as_deref().unwrap_or_default(), table)?)),
            },
            Kind::Columns => Form::Columns,
            Kind::Text => Form::Text,
            Kind::Alpaca => Form::Alpaca,
            Kind::ChatColumns | Kind::Messages | Kind::Sharegpt => {
                let Some(template) = ChatTemplate::read(model)? else {
                    let problem = format!(
                        "its rows are conversations, but {} has no chat template; put a chat_template.jinja there, for \
                         example of the model's instruction-tuned sister, or set data.template",
                        model.display()
                    );
                    return Err(Error::Table { table: table.into(), problem });
                };
                let (roles, turns) = (data.roles_to_train.clone(), data.turns);
                let (role, content) = if kind == Kind::Sharegpt { ("from", "value") } else { ("role", "content") };
                let named = |name: &str, default: &str| data.columns.get(name).map_or(default, |own| own).to_owned();
                let names = Names { role: named("role", role), content: named("content", content) };
                Form::Chat { template: Box::new(template), kind, names, roles, turns }
            }
        })
    }

    /// The text of a row, and which template of a file made it: `template`, or one drawn by seed and row.
    fn render<'r>(
        &self,
        row: &'r Row<'_>,
        seed: u64,
        template: Option<usize>,
        data: &Data,
    ) -> Result<(Rendered<'r>, Option<usize>), Problem> {
        let rendered = match self {
            Form::Columns => Rendered::Pair { prompt: column(row, "prompt")?, completion: column(row, "completion")? },
            Form::Text => Rendered::Pair { prompt: "".into(), completion: column(row, "text")? },
            Form::Alpaca => alpaca(row)?,
            Form::Template(template) => template.render(row)?,
            Form::File(file) => {
                let (index, prompt, completion) = file.render(row, row.hash(), seed, template)?;
                let completion = format!("{}{completion}", data.delimiter);
                return Ok((Rendered::Pair { prompt: prompt.into(), completion: completion.into() }, Some(index)));
            }
            Form::Chat { template, kind, names, roles, turns } => {
                let talk = match kind {
                    Kind::ChatColumns => Conversation::of_columns(row, names)?,
                    Kind::Sharegpt => Conversation::of_sharegpt(row, names)?,
                    _ => Conversation::of_messages(row, names)?,
                };
                let rendered = template.render(&talk, roles, *turns)?;
                Rendered::Chat { text: rendered.text, spans: rendered.spans, messages: talk.contents(roles) }
            }
        };
        Ok((rendered, None))
    }
}

fn column<'r>(row: &'r Row<'_>, name: &str) -> Result<Cow<'r, str>, Problem> {
    match row.get(name) {
        Some(Field::Text(text)) => Ok(Cow::Borrowed(text)),
        Some(other) => Err(format!("field \"{name}\" is {}, but must be a string", other.kind()).into()),
        None => {
            let words = format!("field \"{name}\" is missing; the row has {}{}", row.names(), advice(row));
            Err(Problem::new(words, Remedy::Said))
        }
    }
}

/// The words that Stanford Alpaca's models were trained on.
fn alpaca<'r>(row: &'r Row<'_>) -> Result<Rendered<'r>, Problem> {
    let (instruction, completion) = (column(row, "instruction")?, column(row, "output")?);
    let input = match row.get("input") {
        None | Some(Field::Other(serde_json::Value::Null)) => "".into(),
        Some(_) => column(row, "input")?,
    };
    let prompt = match input.is_empty() {
        true => format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        ),
        false => format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write \
             a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### \
             Input:\n{input}\n\n### Response:\n"
        ),
    };
    Ok(Rendered::Pair { prompt: prompt.into(), completion })
}

/// What to do about a row without `prompt`, `completion` or `text`.
fn advice(row: &Row<'_>) -> String {
    let known = [
        ("question", "answer"),
        ("instruction", "output"),
        ("input", "output"),
        ("source", "target"),
        ("problem", "solution"),
    ];
    let both = |(a, b): &(&str, &str)| row.get(a).is_some() && row.get(b).is_some();
    match known.iter().find(|pair| both(pair)) {
        Some((prompt, completion)) => {
            format!("; set data.columns = {{ prompt = \"{prompt}\", completion = \"{completion}\" }}, or data.template")
        }
        None => "; set data.columns, or data.template to make a prompt and a completion of them".into(),
    }
}

impl Template {
    fn new(source: &str, table: &str) -> Result<Self, Error> {
        let refuse = |problem: String| Error::Template { table: table.into(), problem };
        if !source.contains("|||") {
            return Err(refuse("has no |||; put ||| between prompt and completion".into()));
        }
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        // An inline template is taken literally, its last line end too.
        environment.set_syntax(syntax.keep_trailing_newline(true).build().map_err(|error| refuse(words(&error)))?);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        // Templates written for Python call methods of its strings, lists and dictionaries.
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_formatter(|out, state, value| {
            // Jinja would print null as the word "none".
            if value.is_none() {
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "prints a field that is null"));
            }
            minijinja::escape_formatter(out, state, value)
        });
        environment
            .add_template_owned("template", source.replace("|||", SEPARATOR))
            .map_err(|error| refuse(format!("is not valid Jinja: {}; correct data.template", words(&error))))?;
        let template = environment.get_template("template").map_err(|error| refuse(words(&error)))?;
        let mut wanted: Vec<String> = template.undeclared_variables(false).into_iter().collect();
        wanted.sort();
        Ok(Template { environment, wanted })
    }

    fn render(&self, row: &Row<'_>) -> Result<Rendered<'static>, String> {
        let template = self.environment.get_template("template").map_err(|error| words(&error))?;
        let fields: Vec<(Box<str>, Value)> = row.fields.iter().map(|(k, v)| (k.as_ref().into(), value(v))).collect();
        let mut output = Bounded::default();
        if let Err(error) = template.render_captured_to(Value::from_object(Fields(fields)), &mut output) {
            return Err(self.sentence(&error, row, output.full));
        }
        let text = String::from_utf8(output.bytes).map_err(|_| "the template printed bytes that are not UTF-8")?;
        let mut parts = text.split(SEPARATOR);
        match (parts.next(), parts.next(), parts.next()) {
            (Some(prompt), Some(completion), None) => {
                Ok(Rendered::Pair { prompt: prompt.to_owned().into(), completion: completion.to_owned().into() })
            }
            (_, None, _) => Err("the template printed no ||| for this row".into()),
            _ => Err("the template printed more than one ||| for this row".into()),
        }
    }

    fn sentence(&self, error: &minijinja::Error, row: &Row<'_>, full: bool) -> String {
        if full {
            return format!("the template printed more than {} MiB for this row", OUTPUT >> 20);
        }
        let missing: Vec<&String> = self.wanted.iter().filter(|name| row.get(name).is_none()).collect();
        match error.kind() {
            ErrorKind::UndefinedError if !missing.is_empty() => {
                let names: Vec<String> = missing.iter().map(|n| format!("\"{n}\"")).collect();
                let (noun, verb) = if names.len() == 1 { ("field", "is") } else { ("fields", "are") };
                format!("{noun} {} of the template {verb} missing; the row has {}", names.join(", "), row.names())
            }
            ErrorKind::OutOfFuel => "the template ran too long for this row".into(),
            _ => {
                let null = self
                    .wanted
                    .iter()
                    .find(|name| matches!(row.get(name), Some(Field::Other(serde_json::Value::Null))));
                match (error.detail(), null) {
                    (Some(detail), Some(name)) if detail.contains("null") => {
                        format!("field \"{name}\" of the template is null")
                    }
                    _ => format!("the template failed: {}", words(error)),
                }
            }
        }
    }
}

/// A Jinja error on one line.
fn words(error: &minijinja::Error) -> String {
    let line = error.line().map(|l| format!(" (template line {l})")).unwrap_or_default();
    let detail = error.detail().map(str::to_owned).unwrap_or_else(|| error.kind().to_string());
    format!("{}{line}", detail.replace('\n', " ").replace(SEPARATOR, "|||"))
}

/// The row as a template sees it.
#[derive(Debug)]
struct Fields(Vec<(Box<str>, Value)>);

impl Object for Fields {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.0.iter().find(|(name, _)| &**name == key).map(|(_, value)| value.clone())
    }
}

fn value(field: &Field<'_>) -> Value {
    match field {
        Field::Text(text) => Value::from(text.as_ref()),
        Field::Other(value) => json(value),
    }
}

pub fn json(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => Value::from(*b),
        serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (None, Some(u)) => Value::from(u),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(s) => Value::from(s.as_str()),
        serde_json::Value::Array(list) => Value::from(list.iter().map(json).collect::<Vec<_>>()),
        serde_json::Value::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), json(v)))),
    }
}

/// Takes at most [`OUTPUT`] bytes.
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl std::io::Write for Bounded {
    fn write(&mut self, part: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + part.len() > OUTPUT {
            self.full = true;
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
