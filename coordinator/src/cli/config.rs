//! The options that name or change a run configuration, shared by every command that takes one.

use super::{Error, Result};
use crate::locate::locate;
use crate::model;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use unisono_configs::model::ModelSpec;
use unisono_configs::run::{Count, Device, RunConfig};

/// Where the run's configuration comes from.
#[derive(Debug, Clone, clap::Args)]
pub struct ConfigArgs {
    /// Run configuration (TOML); instead of it: --model and --data
    #[arg(value_name = "CONFIG", conflicts_with_all = ["model", "data"])]
    config: Option<PathBuf>,
    /// Hugging Face model: a directory, a name in the Hugging Face cache, or an s3:// or gs:// URL
    #[arg(long, value_name = "DIR", requires = "data")]
    model: Option<PathBuf>,
    /// Rows to train on: a .jsonl, .json or .parquet file, a directory, a glob, the name of a data set in the Hugging Face
    /// cache, or an s3:// or gs:// URL; several make several tasks
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "model")]
    data: Vec<PathBuf>,
    /// Number of workers; default: one per core, at most train.micro_batches
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Set a key of the configuration, for example train.epochs=3; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
}

fn assignment(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().into(), value.trim().into())),
        _ => Err("write it as key=value, for example train.epochs=3".into()),
    }
}

impl ConfigArgs {
    /// The configuration, every "auto" replaced by its value on this machine, and the model that it names.
    pub fn load(&self) -> Result<(RunConfig, ModelSpec)> {
        let mut config = self.read()?;
        resolve(&mut config)?;
        locate(&mut config).map_err(Error::bad_input)?;
        let spec = model::check(&config.model.path).map_err(Error::bad_input)?.spec;
        Ok((config, spec))
    }

    /// Where checkpoints are copied to, if anywhere.
    pub fn copy_to(&self) -> Result<Option<String>> {
        Ok(self.read()?.checkpoint.copy_to)
    }

    fn read(&self) -> Result<RunConfig> {
        if let Some(path) = &self.config {
            let advice = match path.extension().and_then(|ending| ending.to_str()) {
                Some("yaml" | "yml") => {
                    Some("another trainer's configuration? unisono import FILE > run.toml translates it")
                }
                Some("jsonl" | "parquet") => Some("rows are given with --model DIR --data FILE"),
                _ => None,
            };
            if let Some(advice) = advice {
                return Err(Error::BadInput(format!("{}: is no run configuration in TOML; {advice}", path.display())));
            }
        }
        let mut overrides = self.set.clone();
        overrides.extend(self.workers.map(|n| ("cluster.workers".to_owned(), n.to_string())));
        let read = match (&self.config, &self.model) {
            (Some(path), _) => RunConfig::read(path, &overrides),
            (None, Some(model)) => RunConfig::for_files(model, &self.data, &overrides),
            (None, None) => return Err(Error::bad_input("give a run configuration, or --model DIR --data FILE")),
        };
        read.map_err(Error::bad_input)
    }

    /// Whether a configuration is named at all.
    pub fn is_given(&self) -> bool {
        self.config.is_some() || self.model.is_some()
    }

    /// The configuration with which the run in `run_dir` goes on: the one given here, else the one that it recorded, with
    /// the options given here. A change that would make it another run is refused.
    pub fn load_again(&self, run_dir: &Path) -> Result<(RunConfig, ModelSpec)> {
        let path = run_dir.join(super::run_dir::CONFIG);
        let recorded = RunConfig::read(&path, &[]).map_err(Error::bad_input)?;
        let (wanted, place) = match &self.config {
            Some(given) => (self.load()?, given.display().to_string()),
            None if self.is_given() => (self.load()?, "command line".into()),
            None => (ConfigArgs { config: Some(path), ..self.clone() }.load()?, "command line".into()),
        };
        recorded.check_resume(&wanted.0, &place).map_err(Error::bad_input)?;
        Ok(wanted)
    }

    /// What a run of this configuration is called.
    pub fn name(&self) -> String {
        let stem = |path: &Path| path.file_stem().map(|s| s.to_string_lossy().into_owned());
        let directory =
            |path: &Path| std::path::absolute(path).ok()?.file_name().map(|s| s.to_string_lossy().into_owned());
        let name = self.config.as_deref().and_then(stem).or_else(|| self.model.as_deref().and_then(directory));
        name.filter(|n| !n.is_empty()).unwrap_or_else(|| "run".into())
    }

    /// The same options as arguments of another command.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        if let Some(model) = &self.model {
            option("--model", model.into());
        }
        self.data.iter().for_each(|file| option("--data", file.into()));
        if let Some(workers) = self.workers {
            option("--workers", workers.to_string().into());
        }
        self.set.iter().for_each(|(key, value)| option("--set", format!("{key}={value}").into()));
        if let Some(config) = &self.config {
            arguments.extend(["--".into(), config.into()]);
        }
        arguments
    }
}

/// Replaces every "auto" by its value on this machine.
pub fn resolve(config: &mut RunConfig) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    // GPUs are used where they are asked for: "auto" is the processor until they have proved themselves.
    let gpus = if config.cluster.device == Device::Cuda { gpus() } else { 0 };
    config.resolve(cores, gpus, cpu_has_bf16()).map_err(Error::bad_input)
}

/// The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible.
fn gpus() -> usize {
    let devices = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let numbered = |name: &str| name.strip_prefix("nvidia").is_some_and(|n| n.parse::<u32>().is_ok());
    let count = devices.filter(|entry| entry.file_name().to_str().is_some_and(numbered)).count();
    match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(list) => list.split(',').take_while(|id| !id.trim().is_empty() && id.trim() != "-1").count().min(count),
        Err(_) => count,
    }
}

/// The number of workers of a resolved configuration.
pub fn workers(config: &RunConfig) -> usize {
    match config.cluster.workers {
        Count::Exactly(workers) => workers,
        Count::Auto => 1,
    }
}

/// Whether bf16 GEMMs are faster than fp32 ones here: the instruction sets that oneDNN has bf16 kernels for.
fn cpu_has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512bf16");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("bf16");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args, Command, FromArgMatches};

    fn parse(arguments: &[&str]) -> ConfigArgs {
        let command = ConfigArgs::augment_args(Command::new("test").no_binary_name(true));
        ConfigArgs::from_arg_matches(&command.try_get_matches_from(arguments).unwrap()).unwrap()
    }

    #[test]
    fn arguments_survive_being_passed_on() {
        let cases: [&[&str]; 3] = [
            &["a.toml", "--set", "train.epochs=3", "--set", "data.0.name = x=y"],
            &["--model", "m", "--data", "a.jsonl", "b.jsonl", "--workers", "3"],
            &["--", "-odd.toml"],
        ];
        for arguments in cases {
            let first = parse(arguments);
            let passed: Vec<String> = first.arguments().into_iter().map(|a| a.into_string().unwrap()).collect();
            let second = parse(&passed.iter().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(format!("{first:?}"), format!("{second:?}"));
        }
    }

    #[test]
    fn other_files_than_a_configuration_are_told_where_they_belong() {
        for (file, words) in [("run.yaml", "unisono import"), ("rows.jsonl", "--data FILE")] {
            match parse(&[file]).read() {
                Err(Error::BadInput(sentence)) => assert!(sentence.contains(words), "{sentence}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_run_is_named_after_its_recipe_or_model() {
        assert_eq!(parse(&["recipes/gsm8k.toml"]).name(), "gsm8k");
        assert_eq!(parse(&["--model", "models/tiny/", "--data", "a.jsonl"]).name(), "tiny");
    }
}
