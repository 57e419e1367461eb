//! A model's chat template, rendered as transformers renders it, and which parts of the text are the turns to train on.

use super::conversation::Conversation;
use super::python;
use super::tokenizer::json;
use super::Error;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use minijinja_contrib::pycompat::unknown_method_callback;
use std::ops::Range;
use std::path::{Path, PathBuf};
use unisono_configs::run::Turns;

/// Around what a template's `{% generation %}` block printed. Noncharacters: no text has them.
const BEGIN: char = '\u{10FFFE}';
const END: char = '\u{10FFFF}';
/// The filter that stands for the block, which minijinja does not know.
const FILTER: &str = "unisono_generation";
/// Instructions that a template may execute for one rendering.
const FUEL: u64 = 20_000_000;
/// What `strftime_now` tells the time of: a run that is repeated next year must see the same text. Llama's templates
/// name this day where there is no clock.
const TODAY: (i32, u32, u32) = (2024, 7, 26);

pub struct ChatTemplate {
    environment: Environment<'static>,
    /// bos_token and its like, as the tokenizer's files name them.
    tokens: Vec<(String, String)>,
    /// The template says itself which text is generated.
    marked: bool,
}

/// A conversation as text, with the byte ranges that the model is asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    pub spans: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// The template of a model directory: chat_template.jinja, else tokenizer_config.json's. None where there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>, Error> {
        let config = json(dir, "tokenizer_config.json")?;
        let own = dir.join("chat_template.jinja");
        let (path, source) = match std::fs::read_to_string(&own) {
            Ok(source) => (own, source),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::File { path: own, problem: format!("cannot be read ({error})") });
            }
            Err(_) => match template(&config["chat_template"]) {
                Some(source) => (dir.join("tokenizer_config.json"), source),
                None => return Ok(None),
            },
        };
        let mut tokens: Vec<(String, String)> = Vec::new();
        for file in [config, json(dir, "special_tokens_map.json")?] {
            for (key, value) in file.as_object().into_iter().flatten().filter(|(k, _)| k.ends_with("_token")) {
                let text = value.get("content").unwrap_or(value).as_str();
                if let (Some(text), false) = (text, tokens.iter().any(|(known, _)| known == key)) {
                    tokens.push((key.clone(), text.to_owned()));
                }
            }
        }
        Self::new(&source, tokens, &path).map(Some)
    }

    fn new(source: &str, tokens: Vec<(String, String)>, path: &Path) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let refuse = |error: minijinja::Error| Error::File {
            path: PathBuf::from(path),
            problem: format!("the chat template cannot be used: {}", words(&error)),
        };
        let mut syntax = SyntaxConfig::builder();
        environment.set_syntax(syntax.trim_blocks(true).lstrip_blocks(true).build().map_err(refuse)?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment
            .set_formatter(|out, _, value| out.write_str(&python::string(value)).map_err(minijinja::Error::from));
        environment.add_filter("tojson", |value: &Value, options: Kwargs| python::to_json(value, &options));
        environment.add_filter("string", |value: &Value| python::string(value));
        environment.add_filter(FILTER, |text: String| format!("{BEGIN}{text}{END}"));
        python::add_tests(&mut environment);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| python::date(TODAY, format));
        // Jinja reads line ends as Python does.
        let source = without_generation_tags(&source.replace("\r\n", "\n").replace('\r', "\n"));
        let marked = source.contains(FILTER);
        environment.add_template_owned("chat", source).map_err(refuse)?;
        Ok(ChatTemplate { environment, tokens, marked })
    }

    /// The first `upto` messages as text; `ask` adds what precedes an answer.
    fn print(&self, talk: &Conversation, upto: usize, ask: bool) -> Result<String, String> {
        let mut context: Vec<(String, Value)> =
            self.tokens.iter().map(|(key, text)| (key.clone(), Value::from(text.as_str()))).collect();
        context.extend(talk.options.iter().cloned());
        context.push(("messages".into(), Value::from(talk.messages[..upto].to_vec())));
        context.push(("tools".into(), talk.tools.clone()));
        context.push(("documents".into(), Value::from(())));
        context.push(("add_generation_prompt".into(), Value::from(ask)));
        let template = self.environment.get_template("chat").map_err(|error| words(&error))?;
        template.render(Value::from_pairs(context)).map_err(|error| words(&error))
    }

    /// The messages, and what announces an answer.
    pub fn ask(&self, talk: &Conversation) -> Result<String, String> {
        self.print(talk, talk.roles.len(), true).map(|text| unmark(text).0)
    }

    /// The whole conversation as text.
    pub fn whole(&self, talk: &Conversation) -> Result<String, String> {
        self.print(talk, talk.roles.len(), false).map(|text| unmark(text).0)
    }

    /// The whole conversation and the turns to train on: those of `roles` among its messages from `talk.first` on.
    pub fn render(&self, talk: &Conversation, roles: &[String], turns: Turns) -> Result<Rendered, String> {
        let wanted: Vec<usize> =
            (talk.first..talk.roles.len()).filter(|&turn| roles.contains(&talk.roles[turn])).collect();
        let wanted = match (turns, wanted.last()) {
            (_, None) => return Err(format!("has no message whose role is {} to train on", roles.join(" or "))),
            (Turns::All, _) => wanted,
            (Turns::Last, Some(&last)) => vec![last],
        };
        let whole = self.print(talk, talk.roles.len(), false).map_err(|e| format!("the chat template failed: {e}"))?;
        let (text, marks) = unmark(whole);
        if self.marked && roles == ["assistant"] {
            let spans = self.marks(talk, &wanted, marks)?;
            return Ok(Rendered { text, spans });
        }
        let spans = wanted.iter().map(|&turn| self.span(talk, turn, &text)).collect::<Result<_, _>>()?;
        Ok(Rendered { text, spans })
    }

    /// Those of the blocks `marks` that belong to the turns `wanted`; a turn may have several, or none.
    fn marks(
        &self,
        talk: &Conversation,
        wanted: &[usize],
        marks: Vec<Range<usize>>,
    ) -> Result<Vec<Range<usize>>, String> {
        let all = talk.roles.iter().filter(|role| *role == "assistant").count();
        let spans = match wanted.len() == all {
            true => marks,
            false => {
                let before = |upto: usize| self.beginning(talk, upto, false).map(|text| unmark(text).1.len());
                let mut spans = Vec::new();
                for &turn in wanted {
                    let first = if turn == 0 { 0 } else { before(turn)? };
                    let end = if turn + 1 == talk.roles.len() { marks.len() } else { before(turn + 1)? };
                    spans.extend_from_slice(marks.get(first..end).unwrap_or_default());
                }
                spans
            }
        };
        match spans.iter().all(|span| span.is_empty()) {
            true => {
                Err("the {% generation %} blocks of the chat template print nothing of the turns to train on".into())
            }
            false => Ok(spans),
        }
    }

    fn beginning(&self, talk: &Conversation, upto: usize, ask: bool) -> Result<String, String> {
        let failed = |e| format!("the chat template failed for the messages up to turn {upto}: {e}");
        self.print(talk, upto, ask).map_err(failed)
    }

    /// Where `turn` stands in `text`: from the end of what precedes it to the end of what ends with it.
    fn span(&self, talk: &Conversation, turn: usize, text: &str) -> Result<Range<usize>, String> {
        let number = turn + 1;
        let print = |upto: usize, ask: bool| self.beginning(talk, upto, ask).map(|text| unmark(text).0);
        let upto = match number == talk.roles.len() {
            true => text.to_owned(),
            false => print(number, false)?,
        };
        let ask = talk.roles[turn] == "assistant";
        let before = match turn {
            // Templates insist on a first message, so what announces an answer is learnt from the end.
            0 if ask => {
                let more = print(talk.roles.len(), true)?;
                let announced =
                    more.strip_prefix(text).filter(|a| !a.is_empty()).and_then(|a| Some(upto.find(a)? + a.len()));
                upto[..announced.unwrap_or(0)].to_owned()
            }
            0 => String::new(),
            turn => print(turn, ask)?,
        };
        if !text.starts_with(&before) || !text.starts_with(&upto) || before.len() >= upto.len() {
            return Err(format!(
                "the chat template does not print turn {number} ({}) alike at the end of a conversation and inside of \
                 it, so what to train on is not defined; set data.turns = \"last\", or put {{% generation %}} into the \
                 template",
                talk.roles[turn]
            ));
        }
        Ok(before.len()..upto.len())
    }
}

/// A string, or the one named "default" in a list of templates.
fn template(value: &serde_json::Value) -> Option<String> {
    match value.as_array() {
        None => value.as_str(),
        Some(list) => list.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str()),
    }
    .map(str::to_owned)
}

/// The text without the marks of generation blocks, and where they were.
fn unmark(marked: String) -> (String, Vec<Range<usize>>) {
    if !marked.contains(BEGIN) {
        return (marked, Vec::new());
    }
    let (mut text, mut spans, mut begin) = (String::with_capacity(marked.len()), Vec::new(), 0);
    for c in marked.chars() {
        match c {
            BEGIN => begin = text.len(),
            END => spans.push(begin..text.len()),
            c => text.push(c),
        }
    }
    (text, spans)
}

/// `{% generation %}` ... `{% endgeneration %}` as a filter block, white space control kept.
fn without_generation_tags(source: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(at) = rest.find("{%") {
        out += &rest[..at];
        rest = &rest[at..];
        let Some(end) = rest.find("%}") else { break };
        let (tag, after) = rest.split_at(end + 2);
        let inner = &tag[2..end];
        out += &match inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => tag.replace("generation", &format!("filter {FILTER}")),
            "endgeneration" => tag.replace("endgeneration", "endfilter"),
            _ => tag.to_owned(),
        };
        rest = after;
    }
    out + rest
}

/// A Jinja error on one line.
fn words(error: &minijinja::Error) -> String {
    let line = error.line().map(|l| format!(" (template line {l})")).unwrap_or_default();
    let detail = error.detail().map(str::to_owned).unwrap_or_else(|| error.kind().to_string());
    format!("{}{line}", detail.replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::super::conversation::Names;
    use super::super::row::Row;
    use super::super::TextTokenizer;
    use super::*;
    use serde_json::Value as Json;

    /// Whether the mask is transformers'; false where both refuse.
    fn check(template: &ChatTemplate, tokenizer: &TextTokenizer, expected: &Json) -> Result<bool, String> {
        let row = expected.to_string();
        let talk = Conversation::of_messages(&serde_json::from_str::<Row<'_>>(&row).unwrap(), &Names::default())?;
        let found = template.render(&talk, &["assistant".to_owned()], Turns::All);
        let same = |ours: Json, key: &str| match ours == expected[key] {
            true => Ok(()),
            false => Err(format!("{key} is\n{ours}\nnot\n{}", expected[key])),
        };
        if let Some(error) = expected["error"].as_str() {
            let ours = found.err().ok_or(format!("is not refused: {error}"))?;
            let alike = ours.contains(error) || expected["raised"] == false;
            return if alike { Ok(false) } else { Err(format!("{ours}, not {error}")) };
        }
        same(unmark(template.print(&talk, talk.roles.len(), false)?).0.into(), "text")?;
        if let Some(turn) = expected["unstable"].as_u64() {
            let ours = found.err().ok_or(format!("turn {turn} is not refused"))?;
            let named =
                ours.contains(&format!("turn {turn} (assistant)")) || ours.contains(&format!("up to turn {turn}: "));
            return if named { Ok(false) } else { Err(format!("{ours}, not turn {turn}")) };
        }
        let found = found?;
        let (ids, asked) = tokenizer.encode_spans(&found.text, &found.spans).unwrap();
        same(ids.into(), "ids")?;
        same(asked.into_iter().map(u8::from).collect(), "mask")?;
        Ok(true)
    }

    /// What transformers made of the conversations in goldens/chat: every text, id and mask.
    #[test]
    fn conversations_are_those_of_transformers() {
        let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens/chat");
        let (mut masks, mut refused, mut wrong) = (0, 0, Vec::new());
        let mut dirs: Vec<PathBuf> = std::fs::read_dir(all).unwrap().map(|e| e.unwrap().path()).collect();
        dirs.sort();
        for dir in dirs {
            let name = dir.file_name().unwrap().to_string_lossy().into_owned();
            let template = ChatTemplate::read(&dir).unwrap().unwrap();
            // A golden directory is no model: its end-of-text token comes from tokenizer_config.json.
            let tokenizer = TextTokenizer::read(&dir, 1000).unwrap();
            let golden: Vec<Json> =
                serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
            for (index, expected) in golden.iter().enumerate() {
                match check(&template, &tokenizer, expected) {
                    Ok(true) => masks += 1,
                    Ok(false) => refused += 1,
                    Err(problem) => wrong.push(format!("{name} {index}: {problem}")),
                }
            }
        }
        assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
        assert!(masks > 90 && refused >= 10, "{masks} masks, {refused} refused");
    }

    #[test]
    fn the_last_turn_of_a_thinking_model_can_be_trained_on() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens/chat/qwen3");
        let template = ChatTemplate::read(&dir).unwrap().unwrap();
        let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#;
        let talk =
            Conversation::of_messages(&serde_json::from_str::<Row<'_>>(row).unwrap(), &Names::default()).unwrap();
        let found = template.render(&talk, &["assistant".to_owned()], Turns::Last).unwrap();
        let asked: Vec<&str> = found.spans.iter().map(|span| &found.text[span.clone()]).collect();
        assert_eq!(asked, ["<think>\n\n</think>\n\nd<|im_end|>\n"]);
        // What precedes the second question is printed otherwise once there is the second question.
        let error = template.render(&talk, &["user".to_owned()], Turns::All).unwrap_err();
        assert!(error.contains("turn 3 (user)"), "{error}");
    }
}
