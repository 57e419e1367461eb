//! The kernels of GPUs, run as written on a processor, against the host's loops: the same operations through the same
//! calls. The loops are held against autograd in fp64 elsewhere. What a GPU adds of its own (rounding of exponentials,
//! memory that several threads share at one instant) is seen only there.
#![allow(clippy::unwrap_used)]

mod support;

use support::{distance, one_thread, Collected, Random};
use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Layout, Rope, RopeScaling};
use unisono_worker::model::Model;
use unisono_worker::ops::documents::Documents;
use unisono_worker::ops::heads::{self, Columns, HeadNorm, Heads, NormGradient};
use unisono_worker::ops::kernels::emulator::Emulated;
use unisono_worker::ops::norm::{self, Addend, Normed};
use unisono_worker::ops::rotation::Rotation;
use unisono_worker::ops::swiglu::{self, GateUp};
use unisono_worker::ops::{cross_entropy, rows};

const KINDS: [(Kind, f64); 2] = [(Kind::Float, 2e-6), (Kind::BFloat16, 5e-3)];

struct Inputs(Random);

impl Inputs {
    fn tensor(&mut self, shape: &[i64], kind: Kind) -> Tensor {
        let values = self.0.vector(shape.iter().product::<i64>() as usize, 2.0);
        Tensor::from_slice(&values).to_kind(kind).view(shape)
    }
}

fn inputs() -> Inputs {
    one_thread();
    Inputs(Random(23))
}

/// Outputs must be written whole: what was there is not a number.
fn empty(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::full(shape, f64::NAN, (kind, Device::Cpu))
}

/// `work` by loops and by kernels: what it gives must agree.
#[track_caller]
fn agree(what: &str, limit: f64, work: impl Fn() -> Vec<Tensor>) {
    let loops = work();
    let kernels = {
        let _emulated = Emulated::begin().unwrap();
        work()
    };
    assert_eq!(loops.len(), kernels.len());
    for (index, (a, b)) in loops.iter().zip(&kernels).enumerate() {
        assert_eq!(a.size(), b.size());
        let off = distance(b, a);
        assert!(off <= limit, "{what}: result {index} is off by {off:.2e}");
    }
}

#[test]
fn norms() {
    let mut make = inputs();
    for (kind, limit) in KINDS {
        for (t, h) in [(9, 37), (50, 64), (3, 1100)] {
            let (x, add, bias) =
                (make.tensor(&[t, h], Kind::Float), make.tensor(&[t, h], kind), make.tensor(&[h], kind));
            let (w, dy, dx) = (make.tensor(&[h], kind), make.tensor(&[t, h], kind), make.tensor(&[t, h], Kind::Float));
            for bias in [None, Some(&bias)] {
                agree(&format!("norm {kind:?} {t}x{h}"), limit, || {
                    let (mut residual, mut rstd) = (empty(&[t, h], Kind::Float), empty(&[t], Kind::Float));
                    let mut output = empty(&[t, h], kind);
                    let out = Normed { residual: Some(&mut residual), rstd: &mut rstd, output: &mut output };
                    norm::forward(&x, Some(Addend { output: &add, bias }), &w, 1e-5, out);
                    let mut alone = empty(&[t, h], kind);
                    let out = Normed { residual: None, rstd: &mut rstd, output: &mut alone };
                    norm::forward(&x, None, &w, 1e-5, out);
                    let (mut grad, mut rounded, mut weight) =
                        (dx.copy(), empty(&[t, h], kind), empty(&[h], Kind::Float));
                    let saved = norm::Saved { residual: &x, rstd: &rstd, weight: &w };
                    norm::backward(&dy, saved, &mut grad, &mut rounded, &mut weight);
                    vec![residual, rstd, output, alone, grad, rounded, weight]
                });
            }
        }
    }
}

#[test]
fn activations() {
    let mut make = inputs();
    for (kind, limit) in KINDS {
        for (t, f) in [(7, 21), (5, 64)] {
            let both = make.tensor(&[t, 2 * f], kind) * 3.0;
            let (dy, bias) = (make.tensor(&[t, f], kind), make.tensor(&[f], kind));
            agree(&format!("swiglu {kind:?} {t}x{f}"), limit, || {
                let (mut merged, mut output) = (both.copy(), empty(&[t, f], kind));
                let (mut gate, mut up) = (both.narrow(1, 0, f).contiguous(), both.narrow(1, f, f).contiguous());
                let mut apart = empty(&[t, f], kind);
                swiglu::forward(GateUp::Merged(&mut merged), None, &mut output);
                swiglu::forward(GateUp::Apart(&mut gate, &mut up), Some((&bias, &bias)), &mut apart);
                swiglu::backward(&dy, GateUp::Merged(&mut merged));
                swiglu::backward(&dy, GateUp::Apart(&mut gate, &mut up));
                vec![output, apart, merged, gate, up]
            });
        }
    }
}

#[test]
fn losses() {
    let mut make = inputs();
    for (kind, limit) in KINDS {
        for vocab in [31, 1000, 5003] {
            let logits = make.tensor(&[6, vocab], kind) * 5.0;
            let targets = [3, 30, 0, 17];
            agree(&format!("cross-entropy {kind:?} of {vocab}"), limit, || {
                let mut gradient = logits.copy();
                let loss = cross_entropy::loss_and_gradient(&mut gradient, &targets, 0.25).sum();
                assert_eq!(f64::try_from(gradient.narrow(0, 4, 2).abs().sum(Kind::Double)).unwrap(), 0.0);
                let (again, correct) = cross_entropy::loss_and_correct(&mut logits.copy(), &targets);
                vec![gradient, Tensor::from(loss), Tensor::from(again.sum()), Tensor::from(correct as f64)]
            });
        }
    }
    let _emulated = Emulated::begin().unwrap();
    let bad = Tensor::from_slice(&[1.0f32, f32::NAN, 2.0, 3.0, f32::NEG_INFINITY, 3.0]).view([2, 3]);
    assert!(cross_entropy::loss_and_gradient(&mut bad.copy(), &[0, 0], 1.0).sum().is_nan());
    let loss = cross_entropy::loss_and_gradient(&mut bad.narrow(0, 1, 1), &[2], 1.0).sum();
    assert!((loss - 2f64.ln()).abs() < 1e-6, "a logit of minus infinity is no choice: {loss}");
}

#[test]
fn rows_and_columns() {
    let mut make = inputs();
    for (kind, limit) in KINDS {
        let (table, width) = (make.tensor(&[40, 300], kind), 300);
        let ids: Vec<u32> = (0..50).map(|i| (i * i) % 37).collect();
        let grad = make.tensor(&[64, width], Kind::Float);
        let matrix = make.tensor(&[50, 77], kind);
        agree(&format!("rows {kind:?}"), limit, || {
            let mut output = empty(&[64, width], Kind::Float);
            rows::look_up(&table, &ids, &mut output);
            let mut sums = empty(&[rows::distinct(&ids).len() as i64, width], Kind::Float);
            rows::sum_by_id(&grad, &ids, &mut sums);
            vec![output, sums, rows::sum_columns(&matrix, Kind::Float)]
        });
    }
}

#[test]
fn heads_and_back() {
    let mut make = inputs();
    let documents = Documents::flat(&[0, 5, 6, 40], 70, Device::Cpu);
    let rope = Rope { theta: 10_000.0, scaling: RopeScaling::None };
    for (kind, limit) in KINDS {
        for (count, kv, dim) in [(4, 2, 8), (2, 1, 64), (3, 3, 80), (1, 1, 256)] {
            let heads = Heads { count, kv, dim };
            let (width, rows) = (heads.width() as i64, documents.rows as i64);
            let rotation = Rotation::new(&rope, dim, 64, Kind::Float, Device::Cpu);
            let (matrix, offset) = (make.tensor(&[rows, width + 24], kind), make.tensor(&[width], kind));
            let (weight, grad) = (make.tensor(&[dim as i64], kind), make.tensor(&[rows * width], kind));
            for (norm, bias, turn) in
                [(false, false, true), (true, true, true), (true, false, false), (false, true, false)]
            {
                let source = Columns { matrix: &matrix, first: 16, bias: bias.then_some(&offset) };
                let (norm, turn) = (norm.then_some(HeadNorm { weight: &weight, eps: 1e-6 }), turn.then_some(&rotation));
                agree(&format!("{count} heads of {dim} in {kind:?}"), limit, || {
                    let mut split = empty(&[rows * width], kind);
                    heads::split(source, norm, turn, &documents, heads, &mut split);
                    let mut results = vec![split];
                    // Columns that belong to other heads stay as they are.
                    for grad in [grad.shallow_clone(), grad.to_kind(Kind::Float)] {
                        let (mut joined, mut grad_weight) = (matrix.copy(), empty(&[dim as i64], Kind::Float));
                        let gradient = norm.map(|norm| NormGradient { source, norm, grad_weight: &mut grad_weight });
                        heads::join(&grad, gradient, turn, &documents, heads, &mut joined, 16);
                        results.push(joined);
                        results.extend(norm.map(|_| grad_weight));
                    }
                    results
                });
            }
        }
    }
}

/// Documents that lie flat, for FlashAttention, against documents in tiles: by loops, and by the kernels of a GPU.
#[test]
fn models_over_documents_that_lie_flat() {
    one_thread();
    for (compute, limit) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.03)] {
        for (name, spec) in support::specs() {
            let mut model = support::model(&spec, &support::parameters(&spec, 3), compute);
            let batch = support::batch(spec.vocab, &[40, 3, 64, 65, 1, 20], 0.7, 8);
            let run = |model: &Model| {
                let mut leaves = Collected::new(&Layout::new(&spec));
                (model.forward_backward(&batch, 0.01, &mut leaves).unwrap().sum, leaves)
            };
            let (loss, tiles) = run(&model);
            model.lay_flat(true);
            let mut ways = vec![run(&model)];
            // One of them is enough for fibers.
            if name.starts_with("qwen3 with") {
                let _emulated = Emulated::begin().unwrap();
                ways.push(run(&model));
            }
            for (flat_loss, flat) in ways {
                assert!((flat_loss / loss - 1.0).abs() < limit, "{name} in {compute:?}: {loss} and {flat_loss}");
                for (index, (a, b)) in tiles.buckets.iter().zip(&flat.buckets).enumerate() {
                    let off = distance(b, a);
                    assert!(off < limit, "{name} in {compute:?}: bucket {index} is off by {off:.2e}");
                }
            }
        }
    }
}
