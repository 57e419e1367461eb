//! `generate`: the same coordinator and worker as in training, continuing prompts.

use super::config::resolve;
use super::screen::{Screen, Show};
use super::{checkpoints, coordinator, print, train, Error, Result};
use crate::data::asking::{self, Asking, Prompt};
use crate::data::TextTokenizer;
use crate::launch::report::Reporter;
use crate::model;
use crate::serve::setup::{Setup, VIEWER_PATIENCE};
use crate::serve::work::Work;
use serde_json::{json, Value};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use unisono_configs::run::{Checkpoint, Cluster, Compute, Count, Eval, Mix, Model, RunConfig, Split, Tokens, Train};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono generate runs/tiny-001 --prompt $'Question: what is 2 + 3?\\nAnswer:'
  unisono generate runs/chat-001 --prompt \"What is 2 + 3?\"      # a run on conversations: one turn of the user's
  unisono generate models/tiny --data prompts.jsonl --max-new-tokens 32 > completions.jsonl

--data reads the field \"prompt\" of every row and prints {\"prompt\", \"completion\", \"ended\"} for it, in order;
\"ended\" is false where --max-new-tokens cut the completion off. A row with \"messages\" is rendered by the model's chat
template, its last answer left out. In a run that was trained on conversations a prompt is a turn of the user's.
Exit codes: 0 done, 2 bad input, 3 the run failed.")]
pub struct Args {
    /// A run's directory (its export is used) or a Hugging Face model directory
    #[arg(value_name = "RUN|MODEL")]
    source: PathBuf,
    /// Text to continue; may be repeated
    #[arg(long, value_name = "TEXT", required_unless_present = "data", allow_hyphen_values = true)]
    prompt: Vec<String>,
    /// File with a field "prompt" or "messages" in every row: .jsonl, .json or .parquet, a directory or a glob
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    data: Option<PathBuf>,
    /// Take prompts as they are, also in a run that was trained on conversations
    #[arg(long)]
    raw: bool,
    /// Render prompts with the chat template, also where nobody knows whether the model was trained with it
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// Longest continuation, tokens
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..100_000))]
    max_new_tokens: u32,
    /// One JSON object per prompt on standard output
    #[arg(long)]
    json: bool,
    /// Precision of the arithmetic; default: as the run was trained, else bf16 where the processor has it
    #[arg(long, value_name = "bf16|fp32", value_parser = ["bf16", "fp32"])]
    compute: Option<String>,
    /// Where the coordinator keeps its ledger; set by the supervisor
    #[arg(long, hide = true)]
    scratch: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    match &args.scratch {
        Some(scratch) => coordinate(&args, scratch),
        None => {
            // Refused here rather than in the child, before anything is started.
            prompts(&args)?;
            if args.prompt.iter().any(|prompt| prompt.contains("\\n")) {
                eprintln!(
                    "unisono: a prompt has a backslash and an n, which is no line end; in bash write $'...\\n...'"
                );
            }
            let scratch = Scratch::new()?;
            let mut arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
            // In front of what a user may have put behind "--".
            arguments.splice(1..1, ["--scratch".into(), scratch.0.clone().into()]);
            train::supervise(arguments, Vec::new(), false)
        }
    }
}

/// A directory that goes with the process that made it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("unisono-generate-{}", std::process::id()));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|error| {
            Error::BadInput(format!(
                "{}: cannot be created ({error}); set TMPDIR to a directory that you may write",
                path.display()
            ))
        })?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The child's part: what a coordinator does when the work is to continue prompts.
fn coordinate(args: &Args, scratch: &Path) -> Result<()> {
    let reporter = Reporter::from_environment();
    let listener = coordinator::listener(None)?;
    let (config, talks) = config(args)?;
    let spec = model::check(&config.model.path).map_err(Error::bad_input)?.spec;
    let tokenizer = TextTokenizer::read(&config.model.path, spec.vocab).map_err(Error::bad_input)?;
    let prompts = prompts(args)?;
    let manner = Manner::of(args, &config.model.path, talks)?;
    eprintln!("{}", manner.told);
    let mut ids = Vec::with_capacity(prompts.len());
    for (place, prompt) in &prompts {
        let tokens = manner.tokens(&tokenizer, place, prompt)?;
        let room = spec.max_positions.saturating_sub(args.max_new_tokens as usize);
        let problem = if tokens.is_empty() {
            "the prompt has no tokens; give it some text".to_string()
        } else if tokens.len() > room {
            format!("the prompt has {} tokens and leaves no room for --max-new-tokens {} within the model's {} positions; shorten one of the two", tokens.len(), args.max_new_tokens, spec.max_positions)
        } else if let Some(&id) = tokens.iter().find(|&&id| id as usize >= spec.vocab) {
            return Err(Error::bad_input(tokenizer.beyond(id, spec.vocab)));
        } else {
            ids.push(tokens);
            continue;
        };
        return Err(Error::BadInput(format!("{place}: {problem}")));
    }
    let mut ends = end_tokens(&config.model.path, tokenizer.eos());
    ends.extend(manner.template.as_ref().filter(|_| manner.renders).and_then(|template| template.end(&tokenizer)));
    ends.sort_unstable();
    ends.dedup();
    let work = Work::generate(ids, args.max_new_tokens, ends, &spec);
    let screen = Arc::new(Screen::new(reporter, scratch, &config.cluster, Show::Nothing));
    let setup = Setup {
        listener,
        advertise: None,
        run_dir: scratch.into(),
        config,
        spec,
        work,
        observer: screen.clone(),
        viewer_patience: VIEWER_PATIENCE,
        resume: None,
        conclude: None,
    };
    let outcome = coordinator::serve(setup, &screen)?;
    let as_json = args.json || args.data.is_some();
    for ((_, prompt), continuation) in prompts.iter().zip(&outcome.continuations) {
        let completion = tokenizer.decode(&continuation.tokens);
        match as_json {
            true => {
                let (name, told) = prompt.told();
                let line = json!({name: told, "completion": completion, "ended": continuation.ended});
                print(&format!("{line}\n"));
            }
            false => print(&format!("{completion}\n")),
        }
    }
    Ok(())
}

/// How prompts become text.
struct Manner {
    template: Option<Asking>,
    /// Texts are turns of the user's.
    renders: bool,
    /// What is done, in words.
    told: String,
}

impl Manner {
    /// `talks`: the run was trained on conversations.
    fn of(args: &Args, model: &Path, talks: bool) -> Result<Self> {
        let template = Asking::read(model).map_err(Error::bad_input)?;
        if args.chat && template.is_none() {
            return Err(Error::BadInput(format!(
                "{}: has no chat template; put a chat_template.jinja there, or leave --chat out",
                model.display()
            )));
        }
        let renders = template.is_some() && !args.raw && (talks || args.chat);
        let told = match (&template, renders, args.raw) {
            (_, true, _) => "prompts are rendered with the model's chat template, as turns of the user's; --raw takes them as they are",
            (Some(_), false, false) => "prompts are taken as they are; --chat renders them with the model's chat template",
            _ => "prompts are taken as they are",
        };
        Ok(Manner { template, renders, told: told.into() })
    }

    fn tokens(&self, tokenizer: &TextTokenizer, place: &str, prompt: &Prompt) -> Result<Vec<u32>> {
        let refuse = |problem: &str| Error::BadInput(format!("{place}: {problem}"));
        let template = match (prompt, &self.template) {
            (Prompt::Text(text), _) if !self.renders => return tokenizer.encode_prompt(text).map_err(Error::bad_input),
            (_, Some(template)) => template,
            (_, None) => {
                return Err(refuse("has messages, but the model has no chat template; put a chat_template.jinja there"))
            }
        };
        let text = template.text(prompt).map_err(|problem| refuse(&problem))?;
        // The template has written out what begins a text.
        tokenizer.encode_completion(&text).map_err(Error::bad_input)
    }
}

/// Every prompt with the place that an error names.
fn prompts(args: &Args) -> Result<Vec<(String, Prompt)>> {
    match &args.data {
        Some(path) => asking::prompts(path).map_err(Error::bad_input),
        None => Ok(args.prompt.iter().map(|text| ("--prompt".to_string(), Prompt::Text(text.clone()))).collect()),
    }
}

/// And whether the run that is named was trained on conversations.
fn config(args: &Args) -> Result<(RunConfig, bool)> {
    let source = &args.source;
    let (path, mut compute, talks) = if source.join("config.toml").exists() {
        let run = checkpoints::config(source)?;
        let export = source.join("export");
        if !export.is_dir() {
            return Err(Error::BadInput(format!(
                "{}: the run has not exported a model; wait until it has finished, or `unisono export {} --out DIR` and name DIR",
                source.display(),
                source.display()
            )));
        }
        (export, run.model.compute, asking::holds_conversations(&run.data))
    } else if source.join("config.json").exists() {
        (source.clone(), Compute::Auto, false)
    } else {
        return Err(Error::BadInput(format!(
            "{}: neither a run's directory nor a model's (it has no config.toml and no config.json)",
            source.display()
        )));
    };
    match args.compute.as_deref() {
        Some("bf16") => compute = Compute::Bf16,
        Some("fp32") => compute = Compute::Fp32,
        _ => {}
    }
    let path = std::path::absolute(&path).map_err(Error::failed)?;
    let mut config = RunConfig {
        model: Model { path, revision: None, compute },
        data: Vec::new(),
        gate: Default::default(),
        split: Split::default(),
        mix: Mix::default(),
        tokens: Tokens::default(),
        train: Train::default(),
        cluster: Cluster { workers: Count::Exactly(1), ..Cluster::default() },
        eval: Eval::default(),
        checkpoint: Checkpoint::default(),
    };
    resolve(&mut config)?;
    Ok((config, talks))
}

/// Every token that ends a text, as generation_config.json and config.json list them, and the tokenizer's own.
fn end_tokens(model: &Path, eos: u32) -> Vec<u32> {
    let mut ends = vec![eos];
    for name in ["generation_config.json", "config.json"] {
        let value: Value =
            std::fs::read(model.join(name)).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
        let ids = &value["eos_token_id"];
        let list = ids.as_array().cloned().unwrap_or_else(|| vec![ids.clone()]);
        ends.extend(list.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
    }
    ends.sort_unstable();
    ends.dedup();
    ends
}
