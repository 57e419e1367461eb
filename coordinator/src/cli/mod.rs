//! Thin commands: each reads its arguments, calls the room that does the work and prints.
#![allow(clippy::print_stdout)]

pub mod check;
pub mod checkpoints;
pub mod config;
pub mod coordinator;
pub mod demo;
pub mod generate;
pub mod import;
pub mod init_model;
pub mod inspect;
pub mod memory;
pub mod planned;
pub mod render;
pub mod resume;
pub mod run_dir;
pub mod screen;
pub mod shares;
pub mod token;
pub mod train;
pub mod watch;

use clap::{Parser, Subcommand};
use std::fmt::Display;
use std::process::ExitCode;
use std::sync::OnceLock;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  2    bad input: one sentence on standard error says what to change
  3    the run failed: rank, phase and step are named
  75   asked to stop by SIGTERM, Ctrl-C or SIGUSR1, and saved: go on with --resume
  143  ended by SIGTERM before it was saved (130: by Ctrl-C, 138: by SIGUSR1)";

const EXAMPLES: &str = "\
Examples:
  unisono train --model models/tiny --data rows.jsonl
  unisono train recipe.toml --workers 2 --set train.learning_rate=1e-4
  unisono train --resume runs/recipe-001 --workers 3
  unisono monitor runs/recipe-001
  unisono generate runs/recipe-001 --prompt $'Question: what is 2 + 3?\\nAnswer:'";

/// Fine-tunes language models on instructions; the result is the same, bit for bit, for any number of workers.
#[derive(Debug, Parser)]
#[command(name = "unisono", version, after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"), max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fine-tune a model on this machine: coordinator, workers and export.
    Train(train::Args),
    /// Coordinate a run whose workers join from this or other machines.
    Coordinator(coordinator::Args),
    /// Follow a run from its first step until it ends.
    Monitor(watch::MonitorArgs),
    /// Show on one screen where a run is.
    Status(watch::StatusArgs),
    /// Make a token with which somebody joins a run, or looks on, from another machine.
    Token(token::Args),
    /// Continue prompts greedily with a trained run or a model.
    Generate(generate::Args),
    /// Make a small model, teach it small tasks with several workers and with one, and compare.
    Demo(demo::Args),
    /// Print the digest of a run's state: equal digests, equal runs.
    Digest(checkpoints::DigestArgs),
    /// Look for what is silently wrong in the data, and plan the run, without training.
    Check(check::Args),
    /// Show what the model will see and be asked for: counts per task, rows as tokens with the loss mask.
    Inspect(inspect::Args),
    /// Translate an Axolotl configuration, or TRL's arguments; what has no equivalent is listed.
    Import(import::Args),
    /// Write the instruction set: prompt, completion, task, split and row of every row, as JSON Lines.
    Render(render::Args),
    /// Make a new model: random weights, and a tokenizer trained on a corpus.
    InitModel(init_model::Args),
    /// Write a run's weights as a Hugging Face directory.
    Export(checkpoints::ExportArgs),
}

/// How a command ends when it does not end well.
#[derive(Debug)]
pub enum Error {
    /// The user's input is at fault: exit code 2.
    BadInput(String),
    /// The run is at fault: exit code 3.
    Failed(String),
    /// Everything has been said.
    Code(u8),
}

impl Error {
    pub fn bad_input(sentence: impl Display) -> Self {
        Error::BadInput(sentence.to_string())
    }

    pub fn failed(sentence: impl Display) -> Self {
        Error::Failed(sentence.to_string())
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// Runs the command line's command.
pub fn main() -> ExitCode {
    // Before anything else: a process whose supervisor has died must not live on.
    crate::launch::child::hold_lifeline();
    let cli = Cli::parse();
    trace();
    // A run that has been trained is not a failed one because its last screen could not be written.
    let trained = matches!(cli.command, Command::Coordinator(_));
    let ended = match cli.command {
        Command::Train(args) => train::run(args),
        Command::Coordinator(args) => coordinator::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Monitor(args) => watch::monitor(args),
        Command::Status(args) => watch::status(args),
        Command::Token(args) => token::run(args),
        Command::Check(args) => check::check(args),
        Command::Inspect(args) => inspect::inspect(args),
        Command::Import(args) => import::run(args),
        Command::Render(args) => render::run(args),
        Command::InitModel(args) => init_model::init_model(args),
        Command::Digest(args) => checkpoints::digest(args),
        Command::Export(args) => checkpoints::export(args),
    };
    let lost = LOST.get().filter(|_| ended.is_ok());
    if let Some(problem) = lost {
        eprintln!(
            "unisono: standard output cannot be written ({problem}); what is missing there was not kept anywhere else"
        );
    }
    match ended {
        Ok(()) if lost.is_some() && !trained => ExitCode::from(3),
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Code(code)) => ExitCode::from(code),
        Err(Error::BadInput(sentence)) => {
            eprintln!("unisono: {sentence}");
            ExitCode::from(2)
        }
        Err(Error::Failed(sentence)) => {
            eprintln!("unisono: {sentence}");
            ExitCode::from(3)
        }
    }
}

/// Logs go to standard error; `UNISONO_LOG=unisono=debug` shows more.
fn trace() {
    let filter = std::env::var("UNISONO_LOG").unwrap_or_else(|_| "warn".into());
    // A filter that does not parse is not worth a refused run.
    let filter = tracing_subscriber::EnvFilter::new(filter);
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// Why something that was to be printed is not on standard output: the command's exit code tells.
static LOST: OnceLock<String> = OnceLock::new();

/// Writes to standard output; a reader that has left (`| head`) is no error.
pub(crate) fn print(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => lose(&error),
        _ => {}
    }
}

/// Notes that a part of the output is lost.
pub(crate) fn lose(error: &std::io::Error) {
    LOST.get_or_init(|| error.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_an_example() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            let help = sub.get_after_help().map(|h| h.to_string()).unwrap_or_default();
            assert!(help.contains("unisono"), "{} has no example", sub.get_name());
        }
    }
}
