//! `import`: another trainer's configuration as ours.

use super::{print, Error, Result};
use crate::import::import;
use std::io::Write;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  unisono import axolotl.yml > run.toml
  unisono import sft.sh --gpus 4 --out run.toml      # TRL's command line; YAML and JSON of its arguments, too
  unisono import axolotl.yml --json")]
pub struct Args {
    /// Axolotl's YAML, or TRL's arguments: a command line in a file, YAML or JSON
    file: PathBuf,
    /// Devices that the file was used with, where it does not say: their batch sizes are added up
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    gpus: Option<u64>,
    /// Write the configuration there instead of to standard output; an existing file is refused
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// One JSON object: the configuration, what has no equivalent and why, and notes
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let imported = import(&args.file, args.gpus).map_err(Error::bad_input)?;
    if let Some(out) = &args.out {
        let mut file = std::fs::File::create_new(out).map_err(|error| {
            Error::bad_input(format!("{}: cannot be created ({error}); choose another --out", out.display()))
        })?;
        file.write_all(imported.toml.as_bytes())
            .map_err(|error| Error::failed(format!("{}: {error}", out.display())))?;
    }
    if args.json {
        let (origin, toml) = (imported.origin.name(), &imported.toml);
        let line = serde_json::json!({"event": "import", "origin": origin, "config": toml, "left_out": imported.left, "notes": imported.notes});
        print(&format!("{line}\n"));
        return Ok(());
    }
    if args.out.is_none() {
        print(&imported.toml);
    }
    for note in &imported.notes {
        eprintln!("note: {note}");
    }
    for left in &imported.left {
        eprintln!("without an equivalent: {} = {}: {}", left.key, left.value, left.reason);
    }
    Ok(())
}
