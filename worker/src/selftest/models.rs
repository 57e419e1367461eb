//! Whole models: losses and gradients on a device against the same model in fp64 on the host, twice for the same bits, and
//! against what transformers made of the goldens.

use super::{distance, Error, Form, Random, Reporter};
use crate::model::{BadNumber, Batch, Leaves, Model};
use serde_json::{json, Value};
use std::path::Path;
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Layout, ModelSpec};
use unisono_proto::NO_TARGET;

/// Adds leaves up in fp64 on the host, one flat tensor for each bucket.
struct Sums(Vec<Tensor>);

impl Sums {
    fn new(layout: &Layout) -> Self {
        let zeros = |n: usize| Tensor::zeros([n as i64], (Kind::Double, Device::Cpu));
        Sums(layout.buckets.iter().map(|b| zeros(b.elements)).collect())
    }
}

impl Leaves for Sums {
    fn dense(&mut self, bucket: usize, offset: usize, gradient: &Tensor) -> Result<(), BadNumber> {
        let leaf = gradient.to_device(Device::Cpu).to_kind(Kind::Double).reshape([-1]);
        let _ = self.0[bucket].narrow(0, offset as i64, leaf.numel() as i64).g_add_(&leaf);
        Ok(())
    }

    fn rows(&mut self, bucket: usize, offset: usize, rows: &[u32], gradient: &Tensor) -> Result<(), BadNumber> {
        let leaf = gradient.to_device(Device::Cpu).to_kind(Kind::Double).reshape([rows.len() as i64, -1]);
        let width = leaf.size()[1];
        for (i, &row) in rows.iter().enumerate() {
            let mut place = self.0[bucket].narrow(0, offset as i64 + i64::from(row) * width, width);
            let _ = place.g_add_(&leaf.get(i as i64));
        }
        Ok(())
    }
}

/// Mean loss and its gradient by bucket.
fn passes(model: &Model, batch: &Batch) -> Result<(f64, Vec<Tensor>), Error> {
    let targets = batch.targets.iter().filter(|t| **t != NO_TARGET).count() as f64;
    let mut sums = Sums::new(model.layout());
    let loss = model.forward_backward(batch, 1.0 / targets, &mut sums)?;
    Ok((loss.sum / targets, sums.0))
}

/// Small models with what families differ in; heads as FlashAttention takes them.
fn specs() -> Result<Vec<(&'static str, ModelSpec)>, Error> {
    let base = json!({
        "vocab_size": 307, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 512, "rope_theta": 10000.0
    });
    let with = |more: Value| -> Result<ModelSpec, Error> {
        let mut config = base.clone();
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        Ok(ModelSpec::from_json(&config, Path::new("config.json"))?)
    };
    Ok(vec![
        ("llama", with(json!({"model_type": "llama"}))?),
        ("llama tied", with(json!({"model_type": "llama", "tie_word_embeddings": true}))?),
        (
            "qwen2",
            with(json!({"model_type": "qwen2", "head_dim": null, "num_attention_heads": 2, "num_key_value_heads": 1}))?,
        ),
        ("qwen3", with(json!({"model_type": "qwen3"}))?),
        ("mistral", with(json!({"model_type": "mistral", "sliding_window": 20}))?),
    ])
}

/// Parameters that bf16 holds, so that every kind computes the same model.
fn random_model(spec: &ModelSpec, compute: Kind, device: Device) -> Result<Model, Error> {
    let mut model = Model::new(spec.clone(), compute, device);
    model.fill(|name, range, out| {
        let seed =
            name.bytes().fold(range.start as u64 + 7, |seed, b| seed.wrapping_mul(31).wrapping_add(u64::from(b)));
        let values = Random(seed).tensor(&[out.len() as i64]);
        let scaled = if name.contains("norm") { values * 0.25 + 1.0 } else { values * 0.125 };
        let values = Vec::<f64>::try_from(scaled.to_kind(Kind::BFloat16).to_kind(Kind::Double)).expect("a vector");
        out.iter_mut().zip(values).for_each(|(out, v)| *out = v as f32);
        Ok::<(), crate::model::Error>(())
    })?;
    Ok(model)
}

fn random_batch(vocab: usize) -> Batch {
    let mut random = Random(5);
    let lengths = [40, 3, 64, 65, 1, 90];
    let starts = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end - length)
    });
    let starts: Vec<u32> = starts.collect();
    let tokens: Vec<u32> = (0..lengths.iter().sum::<u32>()).map(|_| random.below(vocab) as u32).collect();
    let target = |i: usize| match tokens.get(i + 1) {
        Some(&next) if !starts.contains(&(i as u32 + 1)) && random.below(3) > 0 => next,
        _ => NO_TARGET,
    };
    let targets = (0..tokens.len()).map(target).collect();
    Batch { tokens, targets, starts }
}

pub(super) fn check(device: Device, reporter: &mut Reporter<'_>) -> Result<(), Error> {
    for (name, spec) in specs()? {
        let batch = random_batch(spec.vocab);
        let (exact_loss, exact) = passes(&random_model(&spec, Kind::Double, Device::Cpu)?, &batch)?;
        for &form in Form::all(device) {
            for (compute, limit) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
                // A thousand times slower: one kind, once.
                if form == Form::Emulated && compute == Kind::Float {
                    continue;
                }
                let begun = Instant::now();
                let _guard = form.begin()?;
                let model = random_model(&spec, compute, device)?;
                let (loss, found) = passes(&model, &batch)?;
                let gradients = found.iter().zip(&exact).map(|(f, e)| distance(f, e));
                let off = gradients.fold((loss / exact_loss - 1.0).abs(), f64::max);
                reporter.compare(name, form.name(device), compute, off, limit, begun);
                if form == Form::Emulated {
                    continue;
                }
                let begun = Instant::now();
                let (loss_again, again) = passes(&model, &batch)?;
                let same = loss_again.to_bits() == loss.to_bits() && again.iter().zip(&found).all(|(a, f)| a.equal(f));
                let what = format!("{name}, again");
                reporter.compare(&what, form.name(device), compute, f64::from(!same), 0.0, begun);
            }
        }
    }
    Ok(())
}

/// Every directory below `dir` that `goldens/make.py` made: loss and gradients in fp32.
pub(super) fn goldens(device: Device, dir: &Path, reporter: &mut Reporter<'_>) -> Result<(), Error> {
    let failed = |path: &Path, problem: String| Error::Golden { path: path.to_path_buf(), problem };
    let entries = std::fs::read_dir(dir).map_err(|e| failed(dir, e.to_string()))?;
    let mut models: Vec<_> = entries.flatten().map(|e| e.path()).filter(|p| p.join("golden.json").exists()).collect();
    models.sort();
    if models.is_empty() {
        return Err(failed(dir, "holds no goldens: give the directory goldens of a checkout".into()));
    }
    for path in models {
        let begun = Instant::now();
        let text = std::fs::read_to_string(path.join("golden.json")).map_err(|e| failed(&path, e.to_string()))?;
        let golden: Value = serde_json::from_str(&text).map_err(|e| failed(&path, e.to_string()))?;
        let batch =
            golden_batch(&golden).ok_or_else(|| failed(&path, "golden.json is not as make.py writes it".into()))?;
        let tensors = Tensor::read_safetensors(path.join("golden.safetensors"));
        let tensors = tensors.map_err(|e| failed(&path, e.to_string()))?;
        let model = Model::load(&path, ModelSpec::read(&path)?, Kind::Float, device)?;
        let (loss, found) = passes(&model, &batch)?;
        let mut off = (loss / golden["loss"].as_f64().unwrap_or(f64::NAN) - 1.0).abs();
        for (bucket, slot) in model.layout().tensors() {
            let part = found[bucket].narrow(0, slot.offset as i64, slot.elements() as i64);
            let expected = tensors.iter().find(|(name, _)| *name == slot.name);
            off = off.max(expected.map_or(f64::INFINITY, |(_, golden)| distance(&part, golden)));
        }
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        reporter.compare(&format!("golden {name}"), Form::Own.name(device), Kind::Float, off, 1e-5, begun);
    }
    Ok(())
}

fn golden_batch(golden: &Value) -> Option<Batch> {
    let mut batch = Batch { tokens: Vec::new(), targets: Vec::new(), starts: Vec::new() };
    for document in golden["documents"].as_array()? {
        let ids = |key: &str| document[key].as_array().cloned();
        batch.starts.push(batch.tokens.len() as u32);
        batch.tokens.extend(ids("tokens")?.iter().map(|id| id.as_u64().unwrap_or(0) as u32));
        batch.targets.extend(ids("targets")?.iter().map(|id| id.as_u64().map_or(NO_TARGET, |id| id as u32)));
    }
    Some(batch)
}
