//! Tokens per second of forward and backward passes, where the time goes, and what matrix products alone would take.

use super::{synchronise, Error, Random, Reporter};
use crate::device::Gpu;
use crate::model::{Batch, Model, Nowhere, Recompute};
use crate::ops::operation;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use unisono_configs::model::ModelSpec;
use unisono_proto::NO_TARGET;

/// What is computed.
#[derive(Debug)]
pub struct Load {
    /// A Hugging Face directory; its weights decide nothing here, so only config.json is read.
    pub model: PathBuf,
    pub compute: Kind,
    /// Tokens of a micro-batch, in documents of `document` tokens.
    pub tokens: usize,
    pub document: usize,
    /// How many of the tokens have a target.
    pub share: f64,
    pub passes: usize,
    /// Absent: nothing is computed again.
    pub recompute: Option<Recompute>,
}

/// Floating-point operations of forward and backward pass of one token, matrix products alone: those of weights, those of
/// the head on tokens with targets, and half of attention's scores.
fn work(spec: &ModelSpec, document: usize, share: f64) -> f64 {
    let (hidden, head) = (spec.hidden as f64, spec.head_dim as f64);
    let (queries, keys) = (spec.heads as f64 * head, spec.kv_heads as f64 * head);
    let block = hidden * (2.0 * queries + 2.0 * keys) + 3.0 * hidden * spec.intermediate as f64;
    let layers = spec.layers as f64;
    6.0 * (layers * block + share * spec.vocab as f64 * hidden) + 6.0 * layers * queries * document as f64
}

/// The rate of large square matrix products, in operations per second.
fn matmul_peak(kind: Kind, device: Device) -> Result<f64, tch::TchError> {
    let n = if device == Device::Cpu { 512 } else { 8192 };
    // Zeros would make a GPU draw less power, and run faster, than real numbers do.
    let [a, b] = [1, 2].map(|_| Tensor::randn([n, n], (Kind::Float, device)).to_kind(kind));
    let out = a.empty_like();
    let run = |times: i64| -> Result<f64, tch::TchError> {
        synchronise(device);
        let begun = Instant::now();
        (0..times).try_for_each(|_| a.f_mm_out(&out, &b).map(drop))?;
        synchronise(device);
        Ok((2 * n * n * n * times) as f64 / begun.elapsed().as_secs_f64())
    };
    run(3)?;
    (0..3).try_fold(0.0, |best: f64, _| Ok(best.max(run(8)?)))
}

fn batch(load: &Load, vocab: usize) -> Batch {
    let mut random = Random(3);
    let tokens: Vec<u32> = (0..load.tokens).map(|_| random.below(vocab) as u32).collect();
    let target = |i: usize| {
        let last = (i + 1).is_multiple_of(load.document) || i + 1 == load.tokens;
        let chosen = (i % 1000) as f64 / 1000.0 < load.share;
        if last || !chosen {
            NO_TARGET
        } else {
            tokens[i + 1]
        }
    };
    let targets = (0..load.tokens).map(target).collect();
    Batch { targets, starts: (0..load.tokens as u32).step_by(load.document.max(1)).collect(), tokens }
}

pub(super) fn measure(device: Device, load: &Load, reporter: &mut Reporter<'_>) -> Result<(), Error> {
    let spec = ModelSpec::read(&load.model)?;
    let peak = matmul_peak(load.compute, device).map_err(crate::model::Error::from)?;
    let held = || match device {
        Device::Cuda(index) => Gpu::describe(index).map_or(0, |gpu| gpu.total - gpu.free),
        _ => crate::memory::resident(),
    };
    let before = held();
    let mut model = Model::new(spec.clone(), load.compute, device);
    model.fill(|name, range, out| {
        // Small and different: all that speed and finite numbers need.
        let scale = if name.contains("norm") { 0.0 } else { 0.02 };
        let centre = if name.contains("norm") { 1.0 } else { 0.0 };
        let value = |i: usize| centre + scale * ((i.wrapping_mul(2_654_435_761) & 0xffff) as f32 / 32768.0 - 1.0);
        out.iter_mut().zip(range).for_each(|(out, i)| *out = value(i));
        Ok::<(), crate::model::Error>(())
    })?;
    model.set_plan(load.recompute.unwrap_or_default(), usize::MAX);
    let batch = batch(load, spec.vocab);
    let pass = || model.forward_backward(&batch, 1e-4, &mut Nowhere);
    let loss = pass()?.sum;
    pass()?;
    synchronise(device);
    let begun = Instant::now();
    for _ in 0..load.passes {
        pass()?;
    }
    synchronise(device);
    let seconds = begun.elapsed().as_secs_f64() / load.passes.max(1) as f64;
    let bytes = held().saturating_sub(before);
    // Once more with a wait after every operation: where the time goes.
    operation::start_waiting(move || synchronise(device));
    pass()?;
    let parts: serde_json::Map<_, _> = operation::stop()
        .into_iter()
        .map(|(name, time, calls)| (name.to_owned(), json!({"seconds": time.as_secs_f64(), "calls": calls})))
        .collect();
    let rate = load.tokens as f64 / seconds;
    let targets = batch.targets.iter().filter(|t| **t != NO_TARGET).count() as f64 / load.tokens as f64;
    let used = rate * work(&spec, load.document, targets);
    reporter.say(json!({
        "speed": load.model.file_name().map(|n| n.to_string_lossy()),
        "kind": super::word(load.compute),
        "tokens": load.tokens,
        "document": load.document,
        "targets": targets,
        "recompute": load.recompute.unwrap_or_default().to_string(),
        "seconds": seconds,
        "tokens_per_second": rate,
        "tflops": used / 1e12,
        "matmul_tflops": peak / 1e12,
        "mfu": used / peak,
        "loss": loss,
        "bytes": bytes,
        "activation_bytes": model.activation_bytes(),
        "operations": parts,
    }));
    reporter.good &= loss.is_finite();
    Ok(())
}
