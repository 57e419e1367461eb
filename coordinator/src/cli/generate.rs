//! `generate`: the same coordinator and worker as in training, continuing prompts.

use super::config::resolve;
use super::screen::{Screen, Show};
use super::{checkpoints, coordinator, print, train, Error, Result};
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
  unisono generate runs/tiny-001 --prompt \"Question: what is 2 + 3?\\nAnswer:\"
  unisono generate models/tiny --data prompts.jsonl --max-new-tokens 32 > completions.jsonl

--data reads the field \"prompt\" of every row and prints {\"prompt\", \"completion\", \"ended\"} for it, in order;
\"ended\" is false where --max-new-tokens cut the completion off.
Exit codes: 0 done, 2 bad input, 3 the run failed.")]
pub struct Args {
    /// A run's directory (its export is used) or a Hugging Face model directory
    #[arg(value_name = "RUN|MODEL")]
    source: PathBuf,
    /// Text to continue; may be repeated
    #[arg(long, value_name = "TEXT", required_unless_present = "data")]
    prompt: Vec<String>,
    /// JSON Lines file with a field "prompt" in every row
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    data: Option<PathBuf>,
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
    let config = config(args)?;
    let spec = model::check(&config.model.path).map_err(Error::bad_input)?.spec;
    let tokenizer = TextTokenizer::read(&config.model.path, spec.vocab).map_err(Error::bad_input)?;
    let prompts = prompts(args)?;
    let mut ids = Vec::with_capacity(prompts.len());
    for (place, prompt) in &prompts {
        let tokens = tokenizer.encode_prompt(prompt).map_err(Error::bad_input)?;
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
    let work = Work::generate(ids, args.max_new_tokens, end_tokens(&config.model.path, tokenizer.eos()), &spec);
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
            true => print(&format!(
                "{}\n",
                json!({"prompt": prompt, "completion": completion, "ended": continuation.ended})
            )),
            false => print(&format!("{completion}\n")),
        }
    }
    Ok(())
}

/// Every prompt with the place that an error names.
fn prompts(args: &Args) -> Result<Vec<(String, String)>> {
    let Some(path) = &args.data else {
        return Ok(args.prompt.iter().map(|p| ("--prompt".to_string(), p.clone())).collect());
    };
    let text = std::fs::read_to_string(path).map_err(|error| {
        Error::BadInput(format!("{}: cannot be read ({error}); set --data to an existing file", path.display()))
    })?;
    let mut prompts = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{}:{}", path.display(), number + 1);
        let row: Value = serde_json::from_str(line)
            .map_err(|error| Error::BadInput(format!("{place}: not valid JSON ({error}); correct the row")))?;
        let Some(prompt) = row["prompt"].as_str() else {
            return Err(Error::BadInput(format!(
                "{place}: prompt: is missing or not a text; give every row a \"prompt\""
            )));
        };
        prompts.push((place, prompt.to_string()));
    }
    match prompts.is_empty() {
        true => Err(Error::BadInput(format!("{}: no row; give every line a \"prompt\"", path.display()))),
        false => Ok(prompts),
    }
}

fn config(args: &Args) -> Result<RunConfig> {
    let source = &args.source;
    let (path, mut compute) = if source.join("config.toml").exists() {
        let run = checkpoints::config(source)?;
        let export = source.join("export");
        if !export.is_dir() {
            return Err(Error::BadInput(format!(
                "{}: the run has not exported a model; wait until it has finished, or `unisono export {} --out DIR` and name DIR",
                source.display(),
                source.display()
            )));
        }
        (export, run.model.compute)
    } else if source.join("config.json").exists() {
        (source.clone(), Compute::Auto)
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
    Ok(config)
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
