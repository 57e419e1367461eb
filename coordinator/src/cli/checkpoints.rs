//! `digest` and `export`: what a run's checkpoints hold.

use super::run_dir::CONFIG;
use super::{print, Error, Result};
use crate::checkpoint::manifest::{self, MANIFEST};
use crate::{digest, export};
use serde_json::json;
use std::path::{Path, PathBuf};
use unisono_configs::run::RunConfig;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono digest runs/tiny-001
  unisono digest runs/tiny-001/checkpoints/step-00000100

`python3 scripts/digest.py` computes the same from the same files, independently.")]
pub struct DigestArgs {
    /// A run's directory (its newest checkpoint is taken) or a checkpoint's
    #[arg(value_name = "RUN|CHECKPOINT")]
    path: PathBuf,
    /// One JSON object: the checkpoint and its digest
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono export runs/tiny-001 --out exported
  unisono export runs/tiny-001 --checkpoint 100 --out exported-100
  python3 -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('exported')\"")]
pub struct ExportArgs {
    /// The run's directory
    run: PathBuf,
    /// Step of the checkpoint; default: the newest
    #[arg(long, value_name = "STEP")]
    checkpoint: Option<u64>,
    /// Directory to make
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// One JSON object: the directory, its weights, and the checkpoint with its digest
    #[arg(long)]
    json: bool,
}

pub fn digest(args: DigestArgs) -> Result<()> {
    let checkpoint = match args.path.join(MANIFEST).exists() {
        true => args.path,
        false => checkpoint(&args.path, None)?,
    };
    let digest = digest::digest(&checkpoint).map_err(Error::bad_input)?;
    match args.json {
        true => print(&format!("{}\n", json!({"event": "digest", "checkpoint": checkpoint, "digest": digest}))),
        false => print(&format!("{digest}\n")),
    }
    Ok(())
}

pub fn export(args: ExportArgs) -> Result<()> {
    let config = config(&args.run)?;
    let checkpoint = checkpoint(&args.run, args.checkpoint)?;
    let digest = digest::digest(&checkpoint).map_err(Error::bad_input)?;
    let request = export::Request { config: &config, checkpoint: &checkpoint, out: &args.out, digest: &digest };
    let exported = export::export(request).map_err(Error::bad_input)?;
    match args.json {
        true => print(&format!(
            "{}\n",
            json!({"event": "export", "path": exported.path, "weight_files": exported.weight_files,
                "weight_bytes": exported.weight_bytes, "checkpoint": checkpoint, "digest": digest})
        )),
        false => print(&format!("{}\n", exported.path.display())),
    }
    Ok(())
}

/// The resolved configuration of a run.
pub fn config(run: &Path) -> Result<RunConfig> {
    if !run.is_dir() {
        return Err(Error::BadInput(format!("{}: no such directory; name a run's directory", run.display())));
    }
    let path = run.join(CONFIG);
    if !path.is_file() {
        let model = if run.join("config.json").is_file() { ", but a model's" } else { "" };
        return Err(Error::BadInput(format!(
            "{}: is no run's directory{model} (it has no {CONFIG}); name one that unisono train made, for example runs/tiny-001",
            run.display()
        )));
    }
    RunConfig::read(&path, &[]).map_err(Error::bad_input)
}

/// Directory of a run's checkpoint: of `step`, or the newest.
pub fn checkpoint(run: &Path, step: Option<u64>) -> Result<PathBuf> {
    let found = manifest::list(run);
    let wanted = |at: u64| step.is_none_or(|step| step == at);
    match found.iter().rev().find(|(at, _)| wanted(*at)) {
        Some((_, path)) => Ok(path.clone()),
        None if found.is_empty() && run.join(CONFIG).is_file() => Err(Error::BadInput(format!(
            "{}: the run has saved no checkpoint yet; wait for the first one (checkpoint.every), or for its end",
            run.display()
        ))),
        None if found.is_empty() => Err(Error::BadInput(format!(
            "{}: no checkpoint there; name a run's directory, or the directory of a checkpoint",
            run.display()
        ))),
        None => {
            let steps: Vec<String> = found.iter().map(|(at, _)| at.to_string()).collect();
            Err(Error::BadInput(format!(
                "{}: no checkpoint of step {}; there are {}",
                run.display(),
                step.unwrap_or(0),
                steps.join(", ")
            )))
        }
    }
}
