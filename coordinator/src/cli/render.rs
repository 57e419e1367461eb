//! `render`: the instruction set as a file.

use super::config::ConfigArgs;
use super::inspect::Part;
use super::{Error, Result};
use crate::data::instructions::render;
use std::io::{BufWriter, Write};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  unisono render recipe.toml > rows.jsonl
  unisono render recipe.toml --split train --limit 1000 > sample.jsonl

Each line has prompt, completion, task, split and row. Training on the lines of a split gives the tokens that training
on the configuration gives.")]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Only rows of this part
    #[arg(long, value_enum)]
    split: Option<Part>,
    /// At most so many rows of each task
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// At the end, on standard error: one JSON object with the number of rows instead of a sentence
    #[arg(long)]
    json: bool,
}

/// JSON Lines on standard output, everything else on standard error.
pub fn run(args: Args) -> Result<()> {
    let (config, _) = args.config.load()?;
    let wanted = args.split.map(|part| match part {
        Part::Train => "train",
        Part::Validation => "validation",
        Part::Test => "test",
    });
    let mut out = BufWriter::new(std::io::stdout().lock());
    let (mut written, mut of_task, mut task, mut failed) = (0u64, 0u64, String::new(), None);
    let count = render(&config, &(), &mut |instruction| {
        if instruction.task != task {
            (task, of_task) = (instruction.task.clone(), 0);
        }
        let fits = wanted.is_none_or(|split| split == instruction.split);
        if !fits || args.limit.is_some_and(|limit| of_task >= limit) {
            return true;
        }
        (written, of_task) = (written + 1, of_task + 1);
        let line = serde_json::to_string(&instruction).map_err(std::io::Error::from);
        match line.and_then(|line| writeln!(out, "{line}")) {
            Ok(()) => true,
            Err(error) => {
                failed = Some(error);
                false
            }
        }
    })
    .map_err(Error::bad_input)?;
    match failed.map_or_else(|| out.flush(), Err) {
        Ok(()) => (),
        // A reader that has left (`| head`) is no error.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
        Err(error) => return Err(Error::failed(format!("standard output: {error}"))),
    }
    match args.json {
        true => eprintln!("{}", serde_json::json!({"event": "rendered", "rows": written, "dropped": count.dropped})),
        false => eprintln!(
            "{written} {}{}",
            if written == 1 { "row" } else { "rows" },
            if count.dropped > 0 { format!(", {} dropped", count.dropped) } else { String::new() }
        ),
    }
    Ok(())
}
