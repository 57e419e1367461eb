//! `demo`: the whole of it, on a machine with two cores, from nothing.

use super::{print, run_dir, Error, Result};
use crate::demo::{self, screen};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono demo
  unisono demo --seed 1 --run-dir /tmp/demo")]
pub struct Args {
    /// Of corpus, weights and order
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Workers of the first fine-tuning; the second has one
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(2..=8))]
    workers: u16,
    /// Directory to make; default: runs/demo-<number>
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// At the end one JSON object on standard output instead of a screen
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let directory = run_dir::create(args.run_dir.as_deref(), "demo", &|_| Ok(true))?;
    let story = demo::run(&directory, args.seed, args.workers.into()).map_err(|error| match error {
        demo::Error::Command { code, .. } => {
            eprintln!("unisono: {error}; what there is lies in {}", directory.display());
            Error::Code(code)
        }
        error => Error::failed(error),
    })?;
    match args.json {
        true => print(&format!("{}\n", screen::object(&story))),
        false => print(&format!("\n{}", screen::screen(&story))),
    }
    match screen::is_one_result(&story) {
        true => Ok(()),
        false => {
            Err(Error::failed("the digests of the two fine-tunings differ; please report it with the output above"))
        }
    }
}
