//! A row of messages, whatever its columns are called, as a chat template takes it.

use super::render::json;
use super::row::{Field, Row};
use minijinja::value::Value;
use serde_json::{json, Value as Json};

pub struct Conversation {
    pub messages: Vec<Value>,
    /// Of each message.
    pub roles: Vec<String>,
    /// Messages before this one are a prompt and not trained on.
    pub first: usize,
    /// None where there are none.
    pub tools: Value,
    /// Further variables of the template: the row's chat_template_kwargs.
    pub options: Vec<(String, Value)>,
}

/// What other tools call a role.
const ROLES: &[(&str, &str)] = &[
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("model", "assistant"),
    ("chatgpt", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("function", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
];

impl Conversation {
    /// Columns messages or conversations, of objects with role and content.
    pub fn of_messages(row: &Row<'_>, names: &Names) -> Result<Self, String> {
        let name = if row.get("messages").is_some() { "messages" } else { "conversations" };
        Self::new(row, names.standard(list(row, name)?), name, 0)
    }

    /// Columns prompt, a list of messages, and completion, another or the text of the answer.
    pub fn of_columns(row: &Row<'_>, names: &Names) -> Result<Self, String> {
        let mut messages = names.standard(list(row, "prompt")?);
        let first = messages.len();
        match row.get("completion") {
            Some(Field::Text(answer)) => messages.push(json!({"role": "assistant", "content": answer})),
            _ => messages.extend(names.standard(list(row, "completion")?)),
        }
        Self::new(row, messages, "prompt and completion", first)
    }

    /// A column conversations of objects with from and value.
    pub fn of_sharegpt(row: &Row<'_>, names: &Names) -> Result<Self, String> {
        let mut messages = Vec::new();
        if let Some(Field::Text(system)) = row.get("system") {
            if !system.is_empty() {
                messages.push(json!({"role": "system", "content": system}));
            }
        }
        for (index, turn) in list(row, "conversations")?.iter().enumerate() {
            let place = format!("message {} of field \"conversations\"", index + 1);
            let Names { role, content } = names;
            let (Some(from), Some(value)) = (turn[role].as_str(), turn[content].as_str()) else {
                return Err(format!("{place} must have strings \"{role}\" and \"{content}\""));
            };
            let Some((_, role)) = ROLES.iter().find(|(known, _)| *known == from) else {
                let known: Vec<&str> = ROLES.iter().map(|(known, _)| *known).collect();
                return Err(format!("{place} is from \"{from}\", but must be from one of {}", known.join(", ")));
            };
            messages.push(json!({"role": role, "content": value}));
        }
        Self::new(row, messages, "conversations", 0)
    }

    /// What each message says, and whether its role is among `roles`: the model is to say it.
    pub fn contents(&self, roles: &[String]) -> Vec<(String, bool)> {
        let content = |message: &Value| match message.get_attr("content") {
            Ok(content) if content.is_none() || content.is_undefined() => String::new(),
            Ok(content) => content.as_str().map_or_else(|| content.to_string(), str::to_owned),
            Err(_) => String::new(),
        };
        let asked = |turn: usize| turn >= self.first && roles.contains(&self.roles[turn]);
        self.messages.iter().enumerate().map(|(turn, message)| (content(message), asked(turn))).collect()
    }

    /// Up to the last message that is no answer.
    pub fn unanswered(mut self) -> Self {
        while self.roles.last().is_some_and(|role| role == "assistant") {
            self.roles.pop();
            self.messages.pop();
        }
        self
    }

    fn new(row: &Row<'_>, mut messages: Vec<Json>, field: &str, first: usize) -> Result<Self, String> {
        if messages.is_empty() {
            return Err(format!("field \"{field}\" has no messages"));
        }
        let mut roles = Vec::with_capacity(messages.len());
        for (index, message) in messages.iter_mut().enumerate() {
            let place = format!("message {} of field \"{field}\"", index + 1);
            if let Some(parts) = message.get("content").and_then(Json::as_array) {
                message["content"] =
                    joined(parts).map_err(|kind| format!("{place} has a part of type {kind}, not text"))?;
            }
            let Some(role) = message["role"].as_str() else {
                return Err(format!("{place} must be an object with a string \"role\""));
            };
            let content = message.get("content");
            let empty = match content {
                None | Some(Json::Null) => true,
                Some(Json::String(text)) => text.trim().is_empty(),
                Some(_) => false,
            };
            let calls =
                ["tool_calls", "function_call", "reasoning_content"].iter().any(|key| message.get(key).is_some());
            if empty && !calls && role != "system" {
                return Err(format!("{place} ({role}) is empty"));
            }
            roles.push(role.to_owned());
        }
        let tools = match row.get("tools") {
            None | Some(Field::Other(Json::Null)) => Value::from(()),
            Some(Field::Other(tools @ Json::Array(list))) if !list.is_empty() => json(tools),
            Some(Field::Other(_)) => Value::from(()),
            Some(Field::Text(text)) if text.trim().is_empty() => Value::from(()),
            Some(Field::Text(text)) => match serde_json::from_str::<Json>(text) {
                Ok(tools @ Json::Array(_)) => json(&tools),
                _ => return Err("field \"tools\" is a string, but not one that holds a JSON list".into()),
            },
        };
        let options = match row.get("chat_template_kwargs") {
            Some(Field::Other(Json::Object(map))) => map.iter().map(|(k, v)| (k.clone(), json(v))).collect(),
            _ => Vec::new(),
        };
        Ok(Conversation { messages: messages.iter().map(json).collect(), roles, first, tools, options })
    }
}

/// What a message calls its role and its content.
pub struct Names {
    pub role: String,
    pub content: String,
}

impl Default for Names {
    fn default() -> Self {
        Names { role: "role".into(), content: "content".into() }
    }
}

impl Names {
    /// The messages with role and content called so.
    fn standard(&self, messages: &[Json]) -> Vec<Json> {
        if self.role == "role" && self.content == "content" {
            return messages.to_vec();
        }
        let standard = |message: &Json| match message.as_object() {
            None => message.clone(),
            Some(fields) => (fields.iter())
                .filter(|(name, _)| {
                    **name == self.role || **name == self.content || !matches!(name.as_str(), "role" | "content")
                })
                .map(|(name, value)| match name {
                    name if *name == self.role => ("role".to_owned(), value.clone()),
                    name if *name == self.content => ("content".to_owned(), value.clone()),
                    name => (name.clone(), value.clone()),
                })
                .collect(),
        };
        messages.iter().map(standard).collect()
    }
}

/// The text of a content that is written in parts; the type of a part that is no text.
fn joined(parts: &[Json]) -> Result<Json, String> {
    let text = |part: &Json| match (part.get("type").and_then(Json::as_str), part.get("text").and_then(Json::as_str)) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        (kind, _) => Err(kind.map_or("unknown".into(), |kind| format!("\"{kind}\""))),
    };
    parts.iter().map(text).collect::<Result<String, _>>().map(Json::String)
}

fn list<'r>(row: &'r Row<'_>, name: &str) -> Result<&'r [Json], String> {
    match row.get(name) {
        Some(Field::Other(Json::Array(list))) => Ok(list),
        Some(other) => Err(format!("field \"{name}\" is {}, but must be a list of messages", other.kind())),
        None => Err(format!("field \"{name}\" is missing; the row has {}", row.names())),
    }
}
