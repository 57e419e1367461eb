//! Do the weights fit the configuration? Answered from config.json and the safetensors headers alone.

use super::Error;
use safetensors::tensor::{Dtype, Metadata};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use unisono_configs::model::{Layout, ModelSpec};

/// Longest header that is read, bytes; safetensors' own limit.
const LONGEST_HEADER: u64 = 100_000_000;

/// A model directory whose weights can be loaded.
#[derive(Debug, Clone)]
pub struct CheckedModel {
    pub spec: ModelSpec,
    pub layout: Layout,
    /// Parameters in all; a tied head counts once.
    pub parameters: usize,
    /// Files with weights, in ascending order of name.
    pub files: Vec<PathBuf>,
    /// Their size, bytes.
    pub bytes: u64,
}

/// Where a tensor was found.
struct Found {
    path: PathBuf,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// Checks `dir`: every tensor that config.json asks for is there, whole, once, of the right shape and of a supported
/// type, and nothing else is.
pub fn check(dir: &Path) -> Result<CheckedModel, Error> {
    let spec = ModelSpec::read(dir)?;
    let layout = Layout::new(&spec);
    let files = weight_files(dir)?;
    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    let mut bytes = 0;
    for path in &files {
        let (metadata, size) = read_header(path)?;
        bytes += size;
        let tensors: BTreeMap<String, _> = metadata.tensors().into_iter().collect();
        for (name, info) in tensors {
            let here = Found { path: path.clone(), dtype: info.dtype, shape: info.shape.clone() };
            if let Some(before) = found.insert(name.clone(), here) {
                let problem = format!("is also in {}; download the model again", before.path.display());
                return Err(Error::Tensor { path: path.clone(), tensor: name, problem });
            }
        }
    }
    let first = files.first().expect("weight_files() finds at least one");
    for (_, slot) in layout.tensors() {
        let Some(tensor) = found.remove(&slot.name) else { return Err(missing(first, &slot.name, &spec, &found)) };
        fits(&slot.name, &slot.shape, &tensor)?;
    }
    found.retain(|name, _| !harmless(name, &spec));
    if let Some((name, tensor)) = found.iter().next() {
        let more = if found.len() > 1 { format!(" and {} more are", found.len() - 1) } else { " is".into() };
        let problem = format!(
            "{more} not part of a {:?} model with this config.json; the weights belong to another model",
            spec.family
        );
        return Err(Error::Tensor {
            path: tensor.path.clone(),
            tensor: name.clone(),
            problem: problem.trim_start().into(),
        });
    }
    Ok(CheckedModel { parameters: layout.parameters(), spec, layout, files, bytes })
}

/// Saved by older exporters, computed by us; and the copy of the embedding that a tied model does not need.
fn harmless(name: &str, spec: &ModelSpec) -> bool {
    name.ends_with("rotary_emb.inv_freq") || spec.tied && name == "lm_head.weight"
}

fn fits(name: &str, shape: &[usize], tensor: &Found) -> Result<(), Error> {
    let refuse = |problem: String| Err(Error::Tensor { path: tensor.path.clone(), tensor: name.into(), problem });
    if tensor.shape != shape {
        return refuse(format!(
            "has shape {:?}, but config.json asks for {shape:?}; the weights belong to another config.json",
            tensor.shape
        ));
    }
    match tensor.dtype {
        Dtype::F32 | Dtype::BF16 | Dtype::F16 => Ok(()),
        other => refuse(format!(
            "has type {other:?}, but only F32, BF16 and F16 are supported; use the model's unquantized weights"
        )),
    }
}

fn missing(path: &Path, name: &str, spec: &ModelSpec, rest: &BTreeMap<String, Found>) -> Error {
    let problem = match name {
        "lm_head.weight" if !spec.tied => {
            "is missing, and config.json says tie_word_embeddings = false; set it to true if the model ties them"
        }
        _ if rest.contains_key(name.trim_start_matches("model.")) => {
            "is missing; the file holds a model without its head: save it with AutoModelForCausalLM"
        }
        _ => "is missing; the download is incomplete, or the weights belong to another config.json",
    };
    Error::Tensor { path: path.into(), tensor: name.into(), problem: problem.into() }
}

/// `model.safetensors`, or the shards that `model.safetensors.index.json` names, as transformers looks for them.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if single.exists() {
        return Ok(vec![single]);
    }
    let refuse = |path: &Path, problem: String| Err(Error::File { path: path.into(), problem });
    if !index.exists() {
        return match dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists() {
            true => refuse(dir, "has only pickled weights, which can carry code; save it with save_pretrained(..., safe_serialization=True)".into()),
            false => refuse(&single, "is missing; model.path must hold model.safetensors, or its shards with model.safetensors.index.json".into()),
        };
    }
    let again = "download it again";
    let text = match std::fs::read(&index) {
        Ok(text) => text,
        Err(error) => return refuse(&index, format!("cannot be read ({error})")),
    };
    let value: serde_json::Value = match serde_json::from_slice(&text) {
        Ok(value) => value,
        Err(error) => return refuse(&index, format!("not valid JSON ({error}); {again}")),
    };
    let Some(map) = value["weight_map"].as_object().filter(|m| !m.is_empty()) else {
        return refuse(&index, format!("has no \"weight_map\"; {again}"));
    };
    let mut names = BTreeSet::new();
    for (tensor, name) in map {
        match name.as_str() {
            Some(name) if !name.contains(['/', '\\']) => names.insert(name),
            _ => return refuse(&index, format!("names no file beside it for tensor \"{tensor}\"; {again}")),
        };
    }
    let files: Vec<PathBuf> = names.into_iter().map(|name| dir.join(name)).collect();
    match files.iter().find(|path| !path.exists()) {
        Some(absent) => {
            refuse(absent, "is missing, but model.safetensors.index.json names it; the download is incomplete".into())
        }
        None => Ok(files),
    }
}

/// The header of a safetensors file and the size of the file, bytes.
fn read_header(path: &Path) -> Result<(Metadata, u64), Error> {
    let refuse = |problem: String| Error::File { path: path.into(), problem };
    let io = |error: std::io::Error| refuse(format!("cannot be read ({error})"));
    let mut file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    let mut bytes = Vec::new();
    file.by_ref().take(8).read_to_end(&mut bytes).map_err(io)?;
    if bytes == b"version " {
        return Err(refuse("is a Git LFS pointer, not the weights; run git lfs pull".into()));
    }
    let corrupt = |what: String| refuse(format!("corrupt safetensors header ({what}); download the file again"));
    let length = match <[u8; 8]>::try_from(bytes.as_slice()) {
        Ok(prefix) => u64::from_le_bytes(prefix),
        Err(_) => return Err(corrupt(format!("the file has only {size} bytes"))),
    };
    if length > LONGEST_HEADER || length + 8 > size {
        return Err(corrupt(format!("it claims to be {length} bytes long, the file has {size}")));
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).map_err(io)?;
    let text = std::str::from_utf8(&header).map_err(|_| corrupt("it is not UTF-8".into()))?;
    if !text.starts_with('{') {
        return Err(corrupt("it does not begin with {".into()));
    }
    let metadata: Metadata = serde_json::from_str(text).map_err(|error| corrupt(error.to_string()))?;
    let promised = 8 + length + metadata.data_len() as u64;
    if size != promised {
        let cut = if size < promised { "truncated" } else { "longer than its header says" };
        return Err(refuse(format!("is {cut} ({size} bytes instead of {promised}); download the file again")));
    }
    Ok((metadata, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, Value};

    /// A tiny model: its directory, its config and its tensors as (name, dtype, shape).
    type Tensors = Vec<(String, &'static str, Vec<usize>)>;

    fn tiny(tied: bool) -> (tempfile::TempDir, Value, Tensors) {
        let config = json!({"model_type": "llama", "vocab_size": 12, "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied});
        let spec = ModelSpec::from_json(&config, Path::new("config.json")).unwrap();
        let tensors =
            Layout::new(&spec).tensors().map(|(_, slot)| (slot.name.clone(), "F32", slot.shape.clone())).collect();
        (tempfile::tempdir().unwrap(), config, tensors)
    }

    fn file(path: &Path, tensors: &[(String, &str, Vec<usize>)]) {
        let (mut header, mut at) = (serde_json::Map::new(), 0);
        for (name, dtype, shape) in tensors {
            let each = match *dtype {
                "F64" => 8,
                "F32" => 4,
                _ => 2,
            };
            let end = at + shape.iter().product::<usize>() * each;
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]}));
            at = end;
        }
        let header = Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + at, 0);
        std::fs::write(path, bytes).unwrap();
    }

    fn outcome(dir: &Path, config: &Value) -> Result<CheckedModel, String> {
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        check(dir).map_err(|e| e.to_string().replace(&format!("{}/", dir.display()), ""))
    }

    /// The outcome with changed tensors in one file.
    fn with(tied: bool, change: impl Fn(&mut Tensors)) -> Result<CheckedModel, String> {
        let (dir, config, mut tensors) = tiny(tied);
        change(&mut tensors);
        file(&dir.path().join("model.safetensors"), &tensors);
        outcome(dir.path(), &config)
    }

    #[test]
    fn a_whole_model_passes() {
        let model = with(true, |_| ()).unwrap();
        assert_eq!(model.parameters, 12 * 8 + 8 * 3 + (8 + 4 + 4 + 8) * 8 + 3 * 16 * 8);
        with(false, |_| ()).unwrap();
        with(true, |t| t.push(("lm_head.weight".into(), "F32", vec![12, 8]))).unwrap();
        with(true, |t| t.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), "F32", vec![2]))).unwrap();
        with(true, |t| t.iter_mut().for_each(|t| t.1 = "BF16")).unwrap();
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused() {
        let norm = "model.safetensors: tensor \"model.norm.weight\"";
        assert_eq!(
            with(true, |t| t.retain(|t| t.0 != "model.norm.weight")).unwrap_err(),
            format!("{norm} is missing; the download is incomplete, or the weights belong to another config.json")
        );
        assert_eq!(
            with(false, |t| t.retain(|t| t.0 != "lm_head.weight")).unwrap_err(),
            "model.safetensors: tensor \"lm_head.weight\" is missing, and config.json says tie_word_embeddings = false; set it to true if the model ties them"
        );
        assert_eq!(
            with(true, |t| t.iter_mut().for_each(|t| t.0 = t.0.replace("model.", ""))).unwrap_err(),
            "model.safetensors: tensor \"model.embed_tokens.weight\" is missing; the file holds a model without its head: save it with AutoModelForCausalLM"
        );
        assert_eq!(
            with(true, |t| t[0].2 = vec![13, 8]).unwrap_err(),
            "model.safetensors: tensor \"model.embed_tokens.weight\" has shape [13, 8], but config.json asks for [12, 8]; the weights belong to another config.json"
        );
        assert_eq!(
            with(true, |t| t.last_mut().unwrap().1 = "F64").unwrap_err(),
            format!(
                "{norm} has type F64, but only F32, BF16 and F16 are supported; use the model's unquantized weights"
            )
        );
        assert_eq!(
            with(true, |t| t.push(("model.layers.1.mlp.up_proj.weight".into(), "F32", vec![16, 8]))).unwrap_err(),
            "model.safetensors: tensor \"model.layers.1.mlp.up_proj.weight\" is not part of a Llama model with this config.json; the weights belong to another model"
        );
    }

    #[test]
    fn files_that_are_damaged_are_refused() {
        let (dir, config, tensors) = tiny(true);
        let path = dir.path().join("model.safetensors");
        file(&path, &tensors);
        let whole = std::fs::read(&path).unwrap();
        let after = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            outcome(dir.path(), &config).unwrap_err()
        };
        let (size, short) = (whole.len(), whole.len() - 1);
        assert_eq!(
            after(&whole[..short]),
            format!("model.safetensors: is truncated ({short} bytes instead of {size}); download the file again")
        );
        assert_eq!(
            after(&whole[..5]),
            "model.safetensors: corrupt safetensors header (the file has only 5 bytes); download the file again"
        );
        assert!(after(&whole[..100]).starts_with("model.safetensors: corrupt safetensors header (it claims to be"));
        let mut corrupt = whole.clone();
        corrupt[20] = 0xFF;
        assert_eq!(
            after(&corrupt),
            "model.safetensors: corrupt safetensors header (it is not UTF-8); download the file again"
        );
        let mut corrupt = whole.clone();
        corrupt[8] = b'[';
        assert!(after(&corrupt).contains("it does not begin with {"));
        assert_eq!(
            after(b"version https://git-lfs"),
            "model.safetensors: is a Git LFS pointer, not the weights; run git lfs pull"
        );
        for at in 0..200 {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x15;
            // Whatever the damage, it is a sentence or no damage (white space, a name that nobody reads); never a panic.
            std::fs::write(&path, flipped).unwrap();
            let _ = outcome(dir.path(), &config);
        }
    }

    #[test]
    fn shards_are_read_by_their_index() {
        let (dir, config, tensors) = tiny(true);
        let (first, second) = tensors.split_at(3);
        let map = |tensors: &[(String, &str, Vec<usize>)], file: &str| -> Vec<(String, Value)> {
            tensors.iter().map(|t| (t.0.clone(), file.into())).collect()
        };
        file(&dir.path().join("a.safetensors"), first);
        let weights: serde_json::Map<_, _> =
            map(first, "a.safetensors").into_iter().chain(map(second, "b.safetensors")).collect();
        std::fs::write(dir.path().join("model.safetensors.index.json"), json!({"weight_map": weights}).to_string())
            .unwrap();
        assert_eq!(
            outcome(dir.path(), &config).unwrap_err(),
            "b.safetensors: is missing, but model.safetensors.index.json names it; the download is incomplete"
        );
        file(&dir.path().join("b.safetensors"), second);
        assert_eq!(outcome(dir.path(), &config).unwrap().files.len(), 2);
        file(&dir.path().join("b.safetensors"), &tensors[2..]);
        assert!(outcome(dir.path(), &config).unwrap_err().contains("is also in"));
    }

    #[test]
    fn weights_that_are_not_there_are_named() {
        let (dir, config, _) = tiny(true);
        assert!(outcome(dir.path(), &config)
            .unwrap_err()
            .starts_with("model.safetensors: is missing; model.path must hold"));
        std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        assert!(outcome(dir.path(), &config).unwrap_err().contains("has only pickled weights"));
    }
}
