//! `unisono demo`: a small model learns small tasks from nothing, through the same commands that a user types.
//!
//! Every step is a child process of this program: `init-model`, `train`, `generate`. Nothing here knows the
//! coordinator's insides.

pub mod corpus;
pub mod score;
pub mod screen;
pub mod words;

use crate::launch::child;
use crate::launch::LIFELINE_FD;
use crate::monitor::conn;
use crate::monitor::state::RunState;
use corpus::{Corpus, Files, Row, TEXT};
use score::Answer;
use serde_json::json;
use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Longest answer, tokens.
const ANSWER_TOKENS: u32 = 16;

/// Why the demo stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command has said why.
    #[error("`unisono {command}` failed")]
    Command { command: String, code: u8 },
    #[error("{path}: {source}; check the permissions and the space left")]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: row {row} is not what `generate` writes ({problem})")]
    Answers { path: PathBuf, row: usize, problem: String },
    #[error("the run in {path} cannot be read ({source})")]
    Run { path: PathBuf, source: conn::Error },
}

/// What the last screen shows.
pub struct Story {
    pub directory: PathBuf,
    pub corpus: Corpus,
    /// Answers by the pretrained and by the fine-tuned model: known templates, then the unseen one, task by task.
    pub before: Vec<Answer>,
    pub after: Vec<Answer>,
    pub pretrained: RunState,
    /// The fine-tuning with several workers, and with one.
    pub several: RunState,
    pub one: RunState,
    pub seconds: f64,
}

/// Tells the whole story in `directory`, which exists and is empty.
pub fn run(directory: &Path, seed: u64, workers: usize) -> Result<Story, Error> {
    let begun = Instant::now();
    let stage = Stage::new(directory)?;
    stage.say("making a corpus: eight tasks with ten templates each, and plain text");
    let corpus = Corpus::new(seed);
    let place = directory.join("corpus");
    let files = corpus.write(&place).map_err(|source| Error::File { path: place.clone(), source })?;
    stage.say("making a model: random weights, and a tokenizer trained on the corpus");
    stage.init_model(&files, seed)?;
    stage.say("pretraining on plain text");
    stage.write("pretrain.toml", &pretraining(&files, seed))?;
    stage.train("pretrain", workers)?;
    let prompts = stage.prompts(&corpus)?;
    stage.say("asking the pretrained model");
    let before = stage.generate("pretrain", &prompts)?;
    stage.write("finetune.toml", &fine_tuning(&files, seed))?;
    stage.say(&format!("fine-tuning with {workers} workers"));
    let several = format!("tuned-{workers}");
    stage.train_as("finetune", &several, workers)?;
    stage.say("asking the fine-tuned model");
    let after = stage.generate(&several, &prompts)?;
    stage.say("fine-tuning once more, with one worker: the result must be the same, bit for bit");
    stage.train_as("finetune", "tuned-1-worker", 1)?;
    Ok(Story {
        directory: directory.into(),
        before,
        after,
        pretrained: stage.state("pretrain")?,
        several: stage.state(&several)?,
        one: stage.state("tuned-1-worker")?,
        corpus,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Rows of the tests in the order in which they are asked: task by task, known templates, then the unseen one.
pub fn questions(corpus: &Corpus) -> Vec<(&'static str, &[Row], &[Row])> {
    let tests = &corpus.tests;
    words::TASKS.iter().map(|t| (t.task, tests.known[t.task].as_slice(), tests.unseen[t.task].as_slice())).collect()
}

/// Where children run and what ties them to this process.
struct Stage<'a> {
    directory: &'a Path,
    program: PathBuf,
    lifeline: PipeReader,
    _writer: PipeWriter,
}

impl<'a> Stage<'a> {
    fn new(directory: &'a Path) -> Result<Self, Error> {
        let system = |source| Error::File { path: directory.into(), source };
        let (lifeline, writer) = io::pipe().map_err(system)?;
        let program = std::env::current_exe().map_err(system)?;
        Ok(Stage { directory, program, lifeline, _writer: writer })
    }

    fn say(&self, what: &str) {
        eprintln!("\n--- {what}");
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf, Error> {
        let path = self.directory.join(name);
        fs::write(&path, text).map_err(|source| Error::File { path: path.clone(), source })?;
        Ok(path)
    }

    /// Runs a command to its end and returns what it wrote on standard output.
    fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Vec<u8>, Error> {
        let words: Vec<String> = arguments.iter().map(|a| a.as_ref().to_string_lossy().into_owned()).collect();
        eprintln!("$ unisono {}", words.join(" "));
        let mut command = Command::new(&self.program);
        command.args(arguments).env(LIFELINE_FD, self.lifeline.as_raw_fd().to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        child::bind(&mut command, vec![self.lifeline.as_raw_fd()]);
        let started = command.spawn().and_then(std::process::Child::wait_with_output);
        let output = started.map_err(|source| Error::File { path: self.program.clone(), source })?;
        match output.status.success() {
            true => Ok(output.stdout),
            false => {
                let code = output.status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(3);
                Err(Error::Command { command: words.first().cloned().unwrap_or_default(), code })
            }
        }
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    fn init_model(&self, files: &Files, seed: u64) -> Result<(), Error> {
        let mut arguments: Vec<String> = ["init-model", &self.path("model"), "--data"].map(String::from).to_vec();
        let data = std::iter::once(&files.texts).chain(files.tasks.iter().map(|(_, path)| path));
        arguments.extend(data.map(|path| path.display().to_string()));
        let seed = seed.to_string();
        let shape = [
            ["--vocab", "640"],
            ["--split", "letters"],
            ["--layers", "4"],
            ["--hidden", "128"],
            ["--heads", "4"],
            ["--kv-heads", "2"],
            ["--intermediate", "384"],
            ["--max-positions", "256"],
            ["--deviation", "0.08"],
            ["--seed", &seed],
        ];
        arguments.extend(shape.concat().into_iter().map(String::from));
        self.command(&arguments).map(drop)
    }

    fn train(&self, name: &str, workers: usize) -> Result<(), Error> {
        self.train_as(name, name, workers)
    }

    fn train_as(&self, recipe: &str, run: &str, workers: usize) -> Result<(), Error> {
        let recipe = self.path(&format!("{recipe}.toml"));
        self.command(&["train", &recipe, "--workers", &workers.to_string(), "--run-dir", &self.path(run)]).map(drop)
    }

    fn prompts(&self, corpus: &Corpus) -> Result<PathBuf, Error> {
        let rows = questions(corpus).into_iter().flat_map(|(_, known, unseen)| known.iter().chain(unseen));
        let lines: String = rows.map(|row| format!("{}\n", json!({"prompt": row.prompt}))).collect();
        self.write("questions.jsonl", &lines)
    }

    fn generate(&self, run: &str, prompts: &Path) -> Result<Vec<Answer>, Error> {
        let most = ANSWER_TOKENS.to_string();
        let prompts = prompts.display().to_string();
        let arguments = ["generate", &self.path(run), "--data", &prompts, "--max-new-tokens", &most];
        let output = self.command(&arguments)?;
        let path = self.write(&format!("answers-{run}.jsonl"), &String::from_utf8_lossy(&output))?;
        let parse = |(row, line)| {
            serde_json::from_slice(line).map_err(|error: serde_json::Error| Error::Answers {
                path: path.clone(),
                row: row + 1,
                problem: error.to_string(),
            })
        };
        output.split(|b| *b == b'\n').filter(|line| !line.is_empty()).enumerate().map(parse).collect()
    }

    fn state(&self, run: &str) -> Result<RunState, Error> {
        let path = self.directory.join(run);
        let mut state = RunState::default();
        conn::replay(&path, &mut state, &mut |_| {}).map_err(|source| Error::Run { path, source })?;
        Ok(state)
    }
}

/// A path as TOML writes a text.
fn quoted(path: &Path) -> String {
    toml::Value::String(path.display().to_string()).to_string()
}

/// Paths in a recipe are relative to it; the corpus lies beside it.
fn beside(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    let parent = path.parent().and_then(Path::file_name).unwrap_or_default();
    let grand = if parent == OsStr::new("corpus") { PathBuf::new() } else { PathBuf::from("corpus") };
    quoted(&grand.join(parent).join(name))
}

fn pretraining(files: &Files, seed: u64) -> String {
    format!(
        "\
# Plain text, from random weights: unisono train pretrain.toml
[model]
path = \"model\"
compute = \"fp32\"

[[data]]
name = \"{TEXT}\"
path = {}
format = \"text\"
validation = 0.0
test = {}
{}",
        beside(&files.texts),
        beside(&files.test_texts),
        settings(32, seed)
    )
}

fn fine_tuning(files: &Files, seed: u64) -> String {
    let mut out = format!(
        "\
# Eight tasks, and some of the plain text again, so that it is not forgotten: unisono train finetune.toml
[model]
path = \"pretrain/export\"
compute = \"fp32\"

[[data]]
name = \"{TEXT}\"
path = {}
format = \"text\"
validation = 0.0
test = {}
",
        beside(&files.replayed),
        beside(&files.test_texts)
    );
    for ((task, path), validation) in files.tasks.iter().zip(&files.validation) {
        let _ = write!(
            out,
            "\n[[data]]\nname = \"{task}\"\npath = {}\nvalidation = {}\ntest = 0.0\n",
            beside(path),
            beside(validation)
        );
    }
    out + &settings(64, seed)
}

fn settings(batch: usize, seed: u64) -> String {
    format!(
        "
[train]
epochs = 1
global_batch_size = {batch}
max_length = 128
learning_rate = 3e-3
schedule = \"cosine\"
warmup_steps = 0.05
betas = [0.9, 0.98]
seed = {seed}

[eval]
every = 0

[checkpoint]
every = 0
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_configs::run::RunConfig;

    #[test]
    fn the_recipes_are_valid_and_find_their_files() {
        let dir = tempfile::tempdir().unwrap();
        let files = Corpus::new(1).write(&dir.path().join("corpus")).unwrap();
        for (name, text, tables) in
            [("pretrain.toml", pretraining(&files, 1), 1), ("finetune.toml", fine_tuning(&files, 1), 9)]
        {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            let config = RunConfig::read(&path, &[]).unwrap();
            assert_eq!(config.data.len(), tables);
            for data in &config.data {
                assert!(data.path.is_file(), "{}", data.path.display());
                for held in [&data.validation, &data.test].into_iter().flatten() {
                    if let unisono_configs::run::Held::File(path) = held {
                        assert!(path.is_file(), "{}", path.display());
                    }
                }
            }
        }
    }
}
