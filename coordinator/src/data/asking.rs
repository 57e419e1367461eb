//! What a model is asked: texts as they are, or conversations that its chat template renders.

use super::chat::ChatTemplate;
use super::conversation::{Conversation, Names};
use super::detect::Kind;
use super::files::files;
use super::lines::map_lines;
use super::row::{Field, Row};
use super::{Error, TextTokenizer};
use serde_json::{json, Value as Json};
use std::path::Path;
use unisono_configs::run::Data;

/// Stands for an answer, to find what the template prints after one.
const ANSWER: &str = "An answer.";

/// A text, or a conversation up to the answer.
pub enum Prompt {
    Text(String),
    Talk {
        talk: Box<Conversation>,
        /// Its messages as the row has them.
        messages: Vec<Json>,
    },
}

/// A model's chat template, for what follows next.
pub struct Asking(ChatTemplate);

impl Prompt {
    /// Under which name a script finds it again, and what it is.
    pub fn told(&self) -> (&'static str, Json) {
        match self {
            Prompt::Text(text) => ("prompt", text.as_str().into()),
            Prompt::Talk { messages, .. } => ("messages", messages.clone().into()),
        }
    }

    /// Texts prompt, lists of messages prompt, or messages and conversations, whose last answer is left out.
    fn of(row: &Row<'_>) -> Result<Self, String> {
        let list = |name: &str| match row.get(name) {
            Some(Field::Other(Json::Array(list))) => Some(list),
            _ => None,
        };
        let (talk, mut messages) = if let Some(messages) = list("messages") {
            (Conversation::of_messages(row, &Names::default())?, messages.clone())
        } else if let Some(turns) = list("conversations") {
            let talk = match turns.first().is_some_and(|turn| turn.get("from").is_some()) {
                true => Conversation::of_sharegpt(row, &Names { role: "from".into(), content: "value".into() })?,
                false => Conversation::of_messages(row, &Names::default())?,
            };
            (talk, turns.clone())
        } else if let Some(messages) = list("prompt") {
            (conversation(messages.clone())?, messages.clone())
        } else {
            return match row.get("prompt") {
                Some(Field::Text(text)) => Ok(Prompt::Text(text.to_string())),
                Some(other) => Err(format!("prompt: is {}, but must be a text or a list of messages", other.kind())),
                None => Err(format!(
                    "prompt: is missing; the row has {}; give every row a \"prompt\" or \"messages\"",
                    row.names()
                )),
            };
        };
        let whole = talk.roles.len();
        let talk = talk.unanswered();
        messages.truncate((messages.len() + talk.roles.len()).saturating_sub(whole));
        match talk.roles.is_empty() {
            true => Err("has nothing but answers; give it a message of the user".into()),
            false => Ok(Prompt::Talk { talk: Box::new(talk), messages }),
        }
    }
}

/// Every prompt of the rows of `path`, with the place that an error names.
pub fn prompts(path: &Path) -> Result<Vec<(String, Prompt)>, Error> {
    let mut all = Vec::new();
    for file in files(path, "--data")? {
        let refuse =
            |line: u64, problem: String| Error::File { path: format!("{}:{line}", file.display()).into(), problem };
        let found = map_lines(&file, "--data", &(), |at, text| {
            let row: Row<'_> = serde_json::from_slice(text)
                .map_err(|error| refuse(at.line, format!("not valid JSON ({error}); correct the row")))?;
            let prompt = Prompt::of(&row).map_err(|problem| refuse(at.line, problem))?;
            Ok::<_, Error>((format!("{}:{}", file.display(), at.line), prompt))
        })?;
        for prompt in found.results {
            all.push(prompt?);
        }
    }
    match all.is_empty() {
        true => Err(Error::File { path: path.into(), problem: "no row; give every line a \"prompt\"".into() }),
        false => Ok(all),
    }
}

/// Whether any of the tables holds conversations. Files that are no longer there tell nothing.
pub fn holds_conversations(tables: &[Data]) -> bool {
    let is_chat = |data: &Data| {
        let file = files(&data.path, "data.path").ok()?.into_iter().next()?;
        let kind = Kind::of_file(data, &file, "data.path").ok()?;
        Some(matches!(kind, Kind::Messages | Kind::Sharegpt | Kind::ChatColumns))
    };
    tables.iter().any(|data| is_chat(data).unwrap_or(false))
}

impl Asking {
    /// None where the model has no chat template.
    pub fn read(model: &Path) -> Result<Option<Self>, Error> {
        ChatTemplate::read(model).map(|template| template.map(Asking))
    }

    /// The prompt with what announces the answer; a text is one turn of the user's.
    pub fn text(&self, prompt: &Prompt) -> Result<String, String> {
        let asked = match prompt {
            Prompt::Talk { talk, .. } => self.0.ask(talk),
            Prompt::Text(text) => self.0.ask(&conversation(vec![json!({"role": "user", "content": text})])?),
        };
        asked.map_err(|problem| format!("the chat template failed: {problem}"))
    }

    /// The special token that the template prints behind an answer.
    pub fn end(&self, tokenizer: &TextTokenizer) -> Option<u32> {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let talk = conversation(vec![turn("user", "A question?"), turn("assistant", ANSWER)]).ok()?;
        let text = self.0.whole(&talk).ok()?;
        let behind = &text[text.rfind(ANSWER)? + ANSWER.len()..];
        let first = *tokenizer.encode_completion(behind.trim_start()).ok()?.first()?;
        tokenizer.specials().contains(&tokenizer.piece(first)).then_some(first)
    }
}

fn conversation(messages: Vec<Json>) -> Result<Conversation, String> {
    let row = Row { fields: vec![("messages".into(), Field::Other(Json::Array(messages)))] };
    Conversation::of_messages(&row, &Names::default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn goldens(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens/chat").join(name)
    }

    #[test]
    fn a_text_is_a_users_turn_and_the_answer_is_announced() {
        let asking = Asking::read(&goldens("qwen3")).unwrap().unwrap();
        let text = asking.text(&Prompt::Text("What is 2 + 3?".into())).unwrap();
        assert_eq!(text, "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n");
        let tokenizer = TextTokenizer::read(&goldens("qwen3"), 1000).unwrap();
        assert_eq!(asking.end(&tokenizer).map(|id| tokenizer.piece(id)).as_deref(), Some("<|im_end|>"));
    }

    #[test]
    fn rows_ask_in_texts_and_in_messages_whose_answer_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompts.jsonl");
        let rows = [
            r#"{"prompt": "a"}"#,
            r#"{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}"#,
            r#"{"prompt": [{"role": "user", "content": "d"}]}"#,
            r#"{"conversations": [{"from": "human", "value": "e"}, {"from": "gpt", "value": "f"}]}"#,
        ];
        std::fs::write(&path, rows.join("\n")).unwrap();
        let told: Vec<Json> = prompts(&path).unwrap().iter().map(|(_, prompt)| prompt.told().1).collect();
        let user = |text: &str| json!([{"role": "user", "content": text}]);
        assert_eq!(told, [json!("a"), user("b"), user("d"), json!([{"from": "human", "value": "e"}])]);
        for (row, words) in [
            (r#"{"question": "a"}"#, "prompts.jsonl:1: prompt: is missing; the row has \"question\""),
            (r#"{"prompt": 3}"#, "prompts.jsonl:1: prompt: is a number"),
            (r#"{"messages": [{"role": "assistant", "content": "c"}]}"#, "nothing but answers"),
            ("{", "prompts.jsonl:1: not valid JSON"),
            ("", "no row"),
        ] {
            std::fs::write(&path, row).unwrap();
            let sentence = prompts(&path).err().unwrap().to_string();
            assert!(sentence.contains(words), "{sentence}");
        }
    }
}
