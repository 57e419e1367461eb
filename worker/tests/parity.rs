//! Parity with transformers and torch: the goldens of `goldens/make.py`. Needs neither of them.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::Value;
use std::ops::Range;
use std::path::{Path, PathBuf};
use support::*;
use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Layout, ModelSpec};
use unisono_proto::NO_TARGET;
use unisono_worker::collective::courier::Courier;
use unisono_worker::collective::tcp::Stopper;
use unisono_worker::collective::{self, Collective};
use unisono_worker::model::weights::Weights;
use unisono_worker::model::{BadNumber, Batch, Leaves, Model};
use unisono_worker::optim::adamw::Settings;
use unisono_worker::optim::reduction::{Adding, Turn};
use unisono_worker::optim::state::Form;
use unisono_worker::optim::Optimizer;

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
/// Whether a mutation changes anything in such a model.
type Applies = fn(&ModelSpec) -> bool;

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
    let mutations: [(&str, Mutation, Applies); 4] = [
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
        println!("{name}: bf16 errs by {error:.4}, autocast by {autocast:.4}");
        assert!(error <= 1.25 * autocast, "{name}: bf16 errs by {error:.4}, autocast by {autocast:.4}");
    }
}

/// A world of one.
struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn world(&self) -> usize {
        1
    }
    fn reduce_scatter(&mut self, _: &mut [i64], _: &[Range<usize>]) -> Result<(), collective::Error> {
        Ok(())
    }
    fn all_gather(&mut self, _: &mut Tensor, _: &[Range<usize>]) -> Result<(), collective::Error> {
        Ok(())
    }
    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, collective::Error> {
        Ok(vec![mine.to_vec()])
    }
}

#[test]
fn twenty_steps_of_adamw_are_torchs() {
    one_thread();
    let settings = Settings {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        max_grad_norm: 1.0,
        form: Form::Whole,
        seed: 0,
    };
    for name in MODELS {
        let golden = Golden::read(name);
        let mut model = golden.model(Kind::Float);
        let mut optimizer = Optimizer::new(model.layout().clone(), 0, 1, settings, Adding::in_place(8));
        let mut courier = Courier::new(Box::new(Alone), &Stopper::default());
        let weights = Weights::open(&golden.dir).unwrap();
        optimizer.load_masters(|name, range, out| weights.read_f32(name, range, out)).unwrap();
        let scale = 1.0 / targets(&golden.batch) as f64;
        for (step, point) in (1..).zip(golden.json["curve"].as_array().unwrap()) {
            let loss = model.forward_backward(&golden.batch, scale, &mut optimizer.reduction).unwrap().sum * scale;
            let buckets = 0..model.layout().buckets.len();
            buckets.clone().for_each(|bucket| optimizer.reduction.finish(bucket, Turn::ONLY, &mut courier));
            let norm = optimizer.reduction.norm(&mut courier).unwrap();
            for (what, found) in [("loss", loss), ("grad_norm", norm)] {
                let exact = point[what].as_f64().unwrap();
                assert!(
                    (found / exact - 1.0).abs() <= 2e-5,
                    "{name}: step {step}: {what} is {found}, torch has {exact}"
                );
            }
            let update = optimizer.plan(step, 1e-3, norm);
            buckets.for_each(|bucket| optimizer.update(bucket, &update, &mut model));
        }
        let at = golden.number("logits_document") as usize;
        let (start, end) = (golden.batch.starts[at], golden.batch.starts[at + 1]);
        let rows: Vec<u32> = (start..end).collect();
        let logits = model.logits(&golden.batch, &rows).unwrap();
        let off = (logits - golden.tensor("logits")).abs().max().double_value(&[]);
        assert!(off <= 1e-4, "{name}: logits after the last step are off by {off:.2e}");
    }
}
