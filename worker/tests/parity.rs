//! Parity with transformers and torch: the goldens of `goldens/make.py`. Needs neither of them.

mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use support::*;
use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Layout, ModelSpec};
use unisono_proto::NO_TARGET;
use unisono_worker::model::weights::Weights;
use unisono_worker::model::{BadNumber, Batch, Leaves, Model};

const MODELS: [&str; 8] =
    ["llama", "llama-tied", "mistral", "mistral-tied", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied"];

struct Golden {
    dir: PathBuf,
    spec: ModelSpec,
    json: Value,
    batch: Batch,
    tensors: Vec<(String, Tensor)>,
}

impl Golden {
    fn read(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens").join(name);
        let json: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
        let mut batch = Batch { tokens: Vec::new(), targets: Vec::new(), starts: Vec::new() };
        for document in json["documents"].as_array().unwrap() {
            batch.starts.push(batch.tokens.len() as u32);
            let ids = |key: &str| {
                document[key].as_array().unwrap().iter().map(|v| v.as_u64().map_or(NO_TARGET, |id| id as u32))
            };
            batch.tokens.extend(ids("tokens"));
            batch.targets.extend(ids("targets"));
        }
        let tensors = Tensor::read_safetensors(dir.join("golden.safetensors")).unwrap();
        Golden { spec: ModelSpec::read(&dir).unwrap(), dir, json, batch, tensors }
    }

    fn number(&self, key: &str) -> f64 {
        self.json[key].as_f64().unwrap()
    }

    fn tensor(&self, name: &str) -> &Tensor {
        &self.tensors.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("golden of {name}")).1
    }

    fn model(&self, compute: Kind) -> Model {
        Model::load(&self.dir, self.spec.clone(), compute, Device::Cpu).unwrap()
    }

    /// Mean loss and gradient of the first step, `mutation` applied to the leaf of each tensor.
    fn first_step(&self, compute: Kind, mutation: Mutation) -> (f64, Vec<Tensor>) {
        let model = self.model(compute);
        let scale = 1.0 / targets(&self.batch) as f64;
        let mut leaves = Mutated { layout: model.layout(), mutation, inner: Collected::new(model.layout()) };
        let loss = model.forward_backward(&self.batch, scale, &mut leaves).unwrap();
        (loss.sum * scale, leaves.inner.buckets)
    }

    /// The first thing that is not as transformers and torch have it.
    fn check(&self, loss: f64, gradient: &[Tensor]) -> Result<(), String> {
        let within = |what: &str, found: f64, golden: f64, limit: f64| {
            let off = (found / golden - 1.0).abs();
            if off <= limit {
                Ok(())
            } else {
                Err(format!("{what} is {found}, golden {golden}: off by {off:.2e}"))
            }
        };
        within("loss", loss, self.number("loss"), 1e-6)?;
        within("loss against fp64", loss, self.number("loss_fp64"), 1e-6)?;
        for (name, part) in parts(&self.spec, gradient) {
            let off = distance(&part, self.tensor(&name));
            if off > 1e-5 {
                return Err(format!("gradient of {name} is off by {off:.2e}"));
            }
        }
        within("gradient norm", norm(gradient), self.number("grad_norm"), 2e-6)
    }
}

/// Views of every tensor in flat buckets.
fn parts(spec: &ModelSpec, buckets: &[Tensor]) -> Vec<(String, Tensor)> {
    let view = |(bucket, slot): (usize, &unisono_configs::model::TensorSlot)| {
        (slot.name.clone(), buckets[bucket].narrow(0, slot.offset as i64, slot.elements() as i64))
    };
    Layout::new(spec).tensors().map(view).collect()
}

fn norm(buckets: &[Tensor]) -> f64 {
    buckets.iter().map(|b| b.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt()
}

type Mutation = fn(&str, Tensor) -> Tensor;

fn none(_: &str, leaf: Tensor) -> Tensor {
    leaf
}

/// Applies a mutation to the leaf of each tensor on its way.
struct Mutated<'a> {
    layout: &'a Layout,
    mutation: Mutation,
    inner: Collected,
}

impl Leaves for Mutated<'_> {
    fn dense(&mut self, bucket: usize, offset: usize, gradient: &Tensor) -> Result<(), BadNumber> {
        let end = offset + gradient.numel();
        let flat = gradient.view([-1]);
        for slot in &self.layout.buckets[bucket].tensors {
            if slot.offset >= offset && slot.range().end <= end {
                let part = flat.narrow(0, (slot.offset - offset) as i64, slot.elements() as i64);
                self.inner.dense(bucket, slot.offset, &(self.mutation)(&slot.name, part))?;
            }
        }
        Ok(())
    }

    fn rows(&mut self, bucket: usize, offset: usize, rows: &[u32], gradient: &Tensor) -> Result<(), BadNumber> {
        let name = &self.layout.buckets[bucket].tensors[0].name;
        self.inner.rows(bucket, offset, rows, &(self.mutation)(name, gradient.shallow_clone()))
    }
}

#[test]
fn the_first_step_is_transformers() {
    one_thread();
    for name in MODELS {
        let golden = Golden::read(name);
        let (loss, gradient) = golden.first_step(Kind::Float, none);
        golden.check(loss, &gradient).unwrap_or_else(|problem| panic!("{name}: {problem}"));
    }
}

#[test]
fn mutations_are_found() {
    one_thread();
    let mutations: [(&str, Mutation, fn(&ModelSpec) -> bool); 4] = [
        ("no k-bias gradient", |n, g| if n.ends_with("k_proj.bias") { g.zeros_like() } else { g }, |s| s.qkv_bias),
        (
            "no q- and k-norm gradient",
            |n, g| if n.contains("q_norm") || n.contains("k_norm") { g.zeros_like() } else { g },
            |s| s.qk_norm,
        ),
        ("norm gradients x 0.9", |n, g| if n.contains("norm.weight") { g * 0.9 } else { g }, |_| true),
        (
            "weight gradients rounded to bf16",
            |n, g| if n.ends_with("proj.weight") { g.to_kind(Kind::BFloat16).to_kind(Kind::Float) } else { g },
            |_| true,
        ),
    ];
    for name in MODELS {
        let golden = Golden::read(name);
        for (what, mutation, applies) in mutations.iter().filter(|m| m.2(&golden.spec)) {
            assert!(applies(&golden.spec));
            let (loss, gradient) = golden.first_step(Kind::Float, *mutation);
            assert!(golden.check(loss, &gradient).is_err(), "{name}: {what} passes the parity check");
        }
    }
}

#[test]
fn bf16_errs_no_more_than_autocast() {
    one_thread();
    for name in MODELS {
        let golden = Golden::read(name);
        let (_, gradient) = golden.first_step(Kind::BFloat16, none);
        let exact: Vec<_> = parts(&golden.spec, &gradient).iter().map(|(n, _)| golden.tensor(n).view([-1])).collect();
        let ours: Vec<_> = parts(&golden.spec, &gradient).into_iter().map(|(_, part)| part).collect();
        let error = distance(&Tensor::cat(&ours, 0), &Tensor::cat(&exact, 0));
        let autocast = golden.number("autocast_error");
        assert!(error <= 1.25 * autocast, "{name}: bf16 errs by {error:.4}, autocast by {autocast:.4}");
    }
}

/// Plain AdamW in fp32 as torch has it: decay on matrices only, gradients clipped to norm 1.
struct AdamW {
    spec: ModelSpec,
    master: Vec<Tensor>,
    m: Vec<Tensor>,
    v: Vec<Tensor>,
    step: i32,
}

impl AdamW {
    fn new(golden: &Golden) -> Self {
        let weights = Weights::open(&golden.dir).unwrap();
        let read = |bucket: &unisono_configs::model::Bucket| {
            let mut flat = vec![0.0f32; bucket.elements];
            for slot in &bucket.tensors {
                weights.read_f32(&slot.name, 0..slot.elements(), &mut flat[slot.range()]).unwrap();
            }
            Tensor::from_slice(&flat)
        };
        let master: Vec<Tensor> = Layout::new(&golden.spec).buckets.iter().map(read).collect();
        let zeros = || master.iter().map(Tensor::zeros_like).collect();
        AdamW { spec: golden.spec.clone(), m: zeros(), v: zeros(), step: 0, master }
    }

    fn update(&mut self, gradient: &[Tensor], clip: f64) {
        let (lr, beta1, beta2, eps, decay) = (1e-3, 0.9, 0.999, 1e-8, 0.01);
        self.step += 1;
        let (c1, c2) = (1.0 - f64::powi(beta1, self.step), 1.0 - f64::powi(beta2, self.step));
        let layout = Layout::new(&self.spec);
        for (bucket, slot) in layout.tensors() {
            let of = |flat: &Tensor| flat.narrow(0, slot.offset as i64, slot.elements() as i64);
            let g = (of(&gradient[bucket]) * clip).to_kind(Kind::Float);
            let (mut p, mut m, mut v) = (of(&self.master[bucket]), of(&self.m[bucket]), of(&self.v[bucket]));
            if slot.decays() {
                let _ = p.g_mul_scalar_(1.0 - lr * decay);
            }
            m.copy_(&(&m * beta1 + &g * (1.0 - beta1)));
            v.copy_(&(&v * beta2 + g.square() * (1.0 - beta2)));
            p.copy_(&(&p - lr / c1 * &m / ((&v / c2).sqrt() + eps)));
        }
    }
}

#[test]
fn twenty_steps_of_adamw_are_torchs() {
    one_thread();
    for name in MODELS {
        let golden = Golden::read(name);
        let mut model = golden.model(Kind::Float);
        let mut optimizer = AdamW::new(&golden);
        let scale = 1.0 / targets(&golden.batch) as f64;
        for (step, point) in golden.json["curve"].as_array().unwrap().iter().enumerate() {
            let mut leaves = Collected::new(model.layout());
            let loss = model.forward_backward(&golden.batch, scale, &mut leaves).unwrap().sum * scale;
            let (exact, norm) = (point["loss"].as_f64().unwrap(), norm(&leaves.buckets));
            assert!((loss / exact - 1.0).abs() <= 2e-5, "{name}: step {step} has loss {loss}, torch {exact}");
            optimizer.update(&leaves.buckets, (1.0 / (norm + 1e-6)).min(1.0));
            for (index, flat) in optimizer.master.iter().enumerate() {
                model.bucket_mut(index).copy_(flat);
            }
        }
        let at = golden.number("logits_document") as usize;
        let (start, end) = (golden.batch.starts[at], golden.batch.starts[at + 1]);
        let rows: Vec<u32> = (start..end).collect();
        let logits = model.logits(&golden.batch, &rows).unwrap();
        let off = (logits - golden.tensor("logits")).abs().max().double_value(&[]);
        assert!(off <= 1e-4, "{name}: logits after the last step are off by {off:.2e}");
    }
}
