//! From a checkpoint to a Hugging Face directory that `from_pretrained` opens. Without libtorch, and tensor by tensor,
//! so that a model of any size is exported on any machine.

use crate::checkpoint::manifest::{Dtype, Tensor};
use crate::checkpoint::state::{self, elements, Part, State};
use half::bf16;
use serde_json::{json, Map, Value};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use unisono_configs::run::{Compute, RunConfig};

/// Weights above this are cut into several files.
const SHARD_BYTES: u64 = 4 << 30;

/// What makes the base model's directory a whole one besides weights and config.json, where it is there.
const COPIED: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Beginnings of the names of files that carry the base model's terms, in lower case.
const TERMS: &[&str] = &["license", "licence", "notice", "copying", "use_policy"];

/// Why nothing was exported. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    State(#[from] state::Error),
    #[error("{path} exists; choose another --out, or remove it")]
    Exists { path: PathBuf },
    #[error("{path}: cannot be read ({source}); the export needs the base model where it was at the start of the run")]
    Base { path: PathBuf, source: io::Error },
    #[error("{path}: not JSON ({source}); restore the base model's file")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{path}: cannot be written ({source}); check the permissions and the space left")]
    Write { path: PathBuf, source: io::Error },
}

/// What to export.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The run's resolved configuration: names the base model, and the precision of the weights.
    pub config: &'a RunConfig,
    /// The checkpoint's directory.
    pub checkpoint: &'a Path,
    /// Directory to make; must not exist.
    pub out: &'a Path,
    /// The checkpoint's digest, for the model card.
    pub digest: &'a str,
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    pub path: PathBuf,
    pub weight_files: usize,
    pub weight_bytes: u64,
}

/// Writes the directory whole or not at all.
pub fn export(request: Request<'_>) -> Result<Exported, Error> {
    export_sharded(request, SHARD_BYTES)
}

fn export_sharded(request: Request<'_>, shard_bytes: u64) -> Result<Exported, Error> {
    let out = request.out;
    if fs::symlink_metadata(out).is_ok() {
        return Err(Error::Exists { path: out.into() });
    }
    let state = State::open(request.checkpoint)?;
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let partial = out.with_file_name(format!(".{name}.partial-{}", std::process::id()));
    let made = write_directory(request, &state, &partial, shard_bytes)
        .and_then(|exported| rename(&partial, out).map(|()| exported));
    if made.is_err() {
        // Whatever stands there is half an export; the first error is the one to tell.
        let _ = fs::remove_dir_all(&partial);
    }
    made
}

fn rename(partial: &Path, out: &Path) -> Result<(), Error> {
    let act = || {
        File::open(partial)?.sync_all()?;
        fs::rename(partial, out)?;
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent)?.sync_all()
    };
    act().map_err(|source| Error::Write { path: out.into(), source })
}

fn write_directory(request: Request<'_>, state: &State, directory: &Path, shard_bytes: u64) -> Result<Exported, Error> {
    fs::create_dir_all(directory).map_err(|source| Error::Write { path: directory.into(), source })?;
    let base = request.config.model.path.as_path();
    let half = request.config.model.compute == Compute::Bf16;
    let width = if half { 2 } else { 4 };
    let shards = shards(&state.manifest.tensors, width, shard_bytes);
    let weight_bytes = state.manifest.tensors.iter().map(|t| elements(t) * width).sum();
    let mut index = Map::new();
    for (number, tensors) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        index.extend(tensors.iter().map(|t| (t.name.clone(), Value::from(name.as_str()))));
        write_weights(state, tensors, half, &directory.join(name))?;
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": weight_bytes}, "weight_map": index});
        write_json(&directory.join("model.safetensors.index.json"), &index)?;
    }
    write_json(&directory.join("config.json"), &config_json(base, half)?)?;
    copy_base(base, directory)?;
    write(&directory.join("README.md"), card(request, state).as_bytes())?;
    Ok(Exported { path: request.out.into(), weight_files: shards.len(), weight_bytes })
}

/// Consecutive tensors, as many as fit; a tensor larger than a file has one of its own.
fn shards(tensors: &[Tensor], width: u64, most: u64) -> Vec<Vec<&Tensor>> {
    let mut shards: Vec<Vec<&Tensor>> = Vec::new();
    let mut room = 0;
    for tensor in tensors {
        let size = elements(tensor) * width;
        match shards.last_mut() {
            Some(shard) if size <= room => shard.push(tensor),
            _ => {
                shards.push(vec![tensor]);
                room = most;
            }
        }
        room = room.saturating_sub(size);
    }
    shards
}

/// One safetensors file of masters, rounded to bf16 as for computing where `half`.
fn write_weights(state: &State, tensors: &[&Tensor], half: bool, path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Write { path: path.into(), source };
    let (dtype, width) = if half { ("BF16", 2) } else { ("F32", 4) };
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + elements(tensor) * width;
        let entry = json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    // Data begins at a multiple of eight, as safetensors asks for.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(failed)?);
    out.write_all(&(text.len() as u64).to_le_bytes()).and_then(|()| out.write_all(&text)).map_err(failed)?;
    let mut rounded = Vec::new();
    for tensor in tensors {
        let write = &mut |block: &[u8]| {
            if !half || tensor.dtype == Dtype::Bf16 {
                return out.write_all(block);
            }
            rounded.clear();
            rounded.extend(block.as_chunks::<4>().0.iter().flat_map(|w| round(f32::from_le_bytes(*w)).to_le_bytes()));
            out.write_all(&rounded)
        };
        state.read(&tensor.name, Part::Master, write).map_err(|error| match error {
            state::Error::Sink(source) => failed(source),
            other => other.into(),
        })?;
    }
    out.into_inner().map_err(|error| failed(error.into_error()))?.sync_all().map_err(failed)
}

/// To the nearest bf16, ties away from zero: the parameter that workers compute with is this of its master.
fn round(master: f32) -> bf16 {
    let bits = master.to_bits();
    bf16::from_bits(if master.is_nan() { 0x7fc0 } else { (bits.wrapping_add(0x8000) >> 16) as u16 })
}

/// The base model's config.json with the precision of the exported weights, under the key that it used.
fn config_json(base: &Path, half: bool) -> Result<Value, Error> {
    let path = base.join("config.json");
    let text = fs::read(&path).map_err(|source| Error::Base { path: path.clone(), source })?;
    let mut config: Map<String, Value> =
        serde_json::from_slice(&text).map_err(|source| Error::Json { path, source })?;
    // Every release of transformers reads torch_dtype; only newer ones write dtype.
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    if key == "dtype" {
        config.remove("torch_dtype");
    }
    config.insert(key.into(), if half { "bfloat16" } else { "float32" }.into());
    Ok(Value::Object(config))
}

fn copy_base(base: &Path, directory: &Path) -> Result<(), Error> {
    let read = |source| Error::Base { path: base.into(), source };
    for entry in fs::read_dir(base).map_err(read)? {
        let entry = entry.map_err(read)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let lower = name.to_lowercase();
        let wanted = COPIED.contains(&name.as_str()) || TERMS.iter().any(|t| lower.starts_with(t));
        // Models from a hub's cache are links to files.
        if wanted && entry.path().is_file() {
            let bytes = fs::read(entry.path()).map_err(|source| Error::Base { path: entry.path(), source })?;
            write(&directory.join(&name), &bytes)?;
        }
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<(), Error> {
    let mut text = serde_json::to_vec_pretty(value).expect("strings and numbers serialize");
    text.push(b'\n');
    write(path, &text)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let act = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    act().map_err(|source| Error::Write { path: path.into(), source })
}

/// The model card: what a reader of the exported directory needs to know about where it comes from.
fn card(request: Request<'_>, state: &State) -> String {
    let Request { config, digest, .. } = request;
    let base = config.model.path.file_name().unwrap_or_default().to_string_lossy();
    let train = &config.train;
    let tasks: Vec<String> = config.data.iter().map(|d| d.task()).collect();
    let parameters: u64 = state.manifest.tensors.iter().map(elements).sum();
    let precision = if config.model.compute == Compute::Bf16 { "bf16" } else { "fp32" };
    let rows = [
        ("Base model", base.to_string()),
        ("Parameters", parameters.to_string()),
        ("Data", tasks.join(", ")),
        ("Steps", format!("{} of {} examples", state.manifest.step, train.global_batch_size)),
        ("Learning rate", format!("{:e}, schedule {:?}", train.learning_rate, train.schedule).to_lowercase()),
        ("AdamW", format!("betas {:?}, eps {:e}, weight decay {}", train.betas, train.eps, train.weight_decay)),
        ("Longest example", format!("{} tokens", train.max_length)),
        ("Seed", train.seed.to_string()),
        ("Compute, weights", precision.to_string()),
        ("Digest", format!("`{digest}`")),
    ];
    let mut text = format!("---\nlibrary_name: transformers\nbase_model: {base}\ntags:\n- unisono\n---\n\n");
    text += &format!("# {base}, fine-tuned\n\nEvery parameter was trained with Unisono on prompts and completions; the loss was taken on completion tokens only.\n\n| | |\n|---|---|\n");
    for (name, value) in rows {
        text += &format!("| {name} | {value} |\n");
    }
    text += "\nThe licence of the base model applies; its files are beside this one where the base model had them.\n";
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::state::tests::write as write_checkpoint;
    use safetensors::SafeTensors;

    fn base(dir: &Path) -> PathBuf {
        let base = dir.join("base");
        fs::create_dir(&base).unwrap();
        fs::write(base.join("config.json"), r#"{"model_type": "llama", "torch_dtype": "float16", "hidden_size": 5}"#)
            .unwrap();
        fs::write(base.join("tokenizer.json"), "{}").unwrap();
        fs::write(base.join("LICENSE.txt"), "terms").unwrap();
        fs::write(base.join("pytorch_model.bin"), "no").unwrap();
        write_checkpoint(&dir.join("checkpoint"), 3);
        base
    }

    fn config(base: &Path, compute: &str) -> RunConfig {
        toml::from_str(&format!(
            "[model]\npath = {:?}\ncompute = \"{compute}\"\n[[data]]\npath = \"gsm8k.jsonl\"",
            base.display().to_string()
        ))
        .unwrap()
    }

    fn run(dir: &Path, compute: &str, out: &str, shard_bytes: u64) -> Result<Exported, Error> {
        let config = config(&dir.join("base"), compute);
        let (checkpoint, out) = (dir.join("checkpoint"), dir.join(out));
        export_sharded(Request { config: &config, checkpoint: &checkpoint, out: &out, digest: "d1" }, shard_bytes)
    }

    #[test]
    fn masters_come_out_whole_or_rounded_as_for_computing() {
        let dir = tempfile::tempdir().unwrap();
        base(dir.path());
        run(dir.path(), "fp32", "full", SHARD_BYTES).unwrap();
        run(dir.path(), "bf16", "half", SHARD_BYTES).unwrap();
        let full = fs::read(dir.path().join("full/model.safetensors")).unwrap();
        let half = fs::read(dir.path().join("half/model.safetensors")).unwrap();
        let (full, half) = (SafeTensors::deserialize(&full).unwrap(), SafeTensors::deserialize(&half).unwrap());
        assert_eq!(full.names().len(), 3);
        let name = "model.layers.0.mlp.up_proj.weight";
        assert_eq!(full.tensor(name).unwrap().shape(), [11, 5]);
        let words: Vec<f32> =
            full.tensor(name).unwrap().data().chunks(4).map(|w| f32::from_le_bytes(w.try_into().unwrap())).collect();
        assert_eq!(words[54], 6.25 * 50.5);
        let rounded: Vec<bf16> =
            half.tensor(name).unwrap().data().chunks(2).map(|w| bf16::from_le_bytes(w.try_into().unwrap())).collect();
        assert!(words.iter().zip(&rounded).all(|(w, r)| round(*w) == *r));
        // 1 and half a unit of bf16's last place, which torch would round to the even 1.
        assert_eq!(round(1.003_906_2), bf16::from_f32(1.007_812_5));
        assert_eq!(round(-1.003_906_2), bf16::from_f32(-1.007_812_5));
        let config: Value = serde_json::from_slice(&fs::read(dir.path().join("half/config.json")).unwrap()).unwrap();
        assert_eq!((&config["torch_dtype"], &config["hidden_size"]), (&json!("bfloat16"), &json!(5)));
        let names = |d: &str| {
            let mut names: Vec<String> = fs::read_dir(dir.path().join(d))
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names("half"), ["LICENSE.txt", "README.md", "config.json", "model.safetensors", "tokenizer.json"]);
        assert!(fs::read_to_string(dir.path().join("half/README.md")).unwrap().contains("| Digest | `d1` |"));
    }

    #[test]
    fn large_models_are_sharded_with_an_index() {
        let dir = tempfile::tempdir().unwrap();
        base(dir.path());
        let exported = run(dir.path(), "fp32", "out", 170).unwrap();
        assert_eq!((exported.weight_files, exported.weight_bytes), (2, 95 * 4));
        let index = fs::read(dir.path().join("out/model.safetensors.index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["weight_map"]["model.norm.weight"], "model-00001-of-00002.safetensors");
        assert_eq!(index["metadata"]["total_size"], 380);
        let second = fs::read(dir.path().join("out/model-00002-of-00002.safetensors")).unwrap();
        assert_eq!(SafeTensors::deserialize(&second).unwrap().names(), ["model.layers.0.mlp.up_proj.weight"]);
    }

    #[test]
    fn an_existing_directory_is_refused_and_a_failed_export_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        base(dir.path());
        fs::create_dir(dir.path().join("there")).unwrap();
        assert!(matches!(run(dir.path(), "fp32", "there", SHARD_BYTES), Err(Error::Exists { .. })));
        fs::remove_file(dir.path().join("base/config.json")).unwrap();
        assert!(matches!(run(dir.path(), "fp32", "out", SHARD_BYTES), Err(Error::Base { .. })));
        assert!(fs::read_dir(dir.path()).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().contains("out")));
    }
}
