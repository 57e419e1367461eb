//! Every operation's forward and backward against libtorch's autograd in fp64: the slow twins in fp64, the fused loops in
//! fp32 and bf16. Sizes are odd, so that the loops' tails are met.
#![allow(clippy::unwrap_used)]

mod support;

use support::{distance, one_thread, Random};
use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Rope, RopeScaling};
use unisono_worker::ops::documents::Documents;
use unisono_worker::ops::heads::{self, Columns, HeadNorm, Heads, NormGradient};
use unisono_worker::ops::norm::{self, Addend, Normed};
use unisono_worker::ops::rotation::Rotation;
use unisono_worker::ops::softmax::{self, Scores, Statistics};
use unisono_worker::ops::swiglu::{self, GateUp};
use unisono_worker::ops::{cross_entropy, rows};

/// Compute kind, kind of what is wide, and how far results may be off.
const KINDS: [(Kind, Kind, f64); 3] =
    [(Kind::Double, Kind::Double, 1e-9), (Kind::Float, Kind::Float, 1e-5), (Kind::BFloat16, Kind::Float, 1e-2)];

struct Inputs(Random);

impl Inputs {
    /// Values that bf16 holds exactly, so that every kind computes with the same inputs; fp64.
    fn tensor(&mut self, shape: &[i64]) -> Tensor {
        let values = self.0.vector(shape.iter().product::<i64>() as usize, 2.0);
        Tensor::from_slice(&values).to_kind(Kind::BFloat16).to_kind(Kind::Double).view(shape)
    }
}

fn inputs() -> Inputs {
    Inputs(Random(17))
}

fn empty(shape: &[i64], kind: Kind) -> Tensor {
    // Outputs must be written whole: what was there is not a number.
    Tensor::full(shape, f64::NAN, (kind, Device::Cpu))
}

fn leaf(t: &Tensor) -> Tensor {
    t.copy().set_requires_grad(true)
}

#[track_caller]
fn close(what: &str, compute: Kind, found: &Tensor, exact: &Tensor, limit: f64) {
    let off = distance(found, exact);
    assert!(off <= limit, "{what} in {compute:?} is off by {off:.2e}");
}

#[test]
fn norm_with_residual() {
    one_thread();
    let (mut make, eps) = (inputs(), 1e-5);
    let (t, h) = (9i64, 37i64);
    let (x, add, bias, w, dy, dr) = (
        make.tensor(&[t, h]),
        make.tensor(&[t, h]),
        make.tensor(&[h]),
        make.tensor(&[h]),
        make.tensor(&[t, h]),
        make.tensor(&[t, h]),
    );
    let (sum, weight) = (leaf(&(&x + &add + &bias)), leaf(&w));
    let exact = &sum * (sum.square().mean_dim([-1i64].as_slice(), true, Kind::Double) + eps).rsqrt() * &weight;
    ((&exact * &dy).sum(Kind::Double) + (&sum * &dr).sum(Kind::Double)).backward();
    for (compute, wide, limit) in KINDS {
        let (c, f) = (|t: &Tensor| t.to_kind(compute).copy(), |t: &Tensor| t.to_kind(wide).copy());
        let (mut residual, mut rstd, mut output) = (empty(&[t, h], wide), empty(&[t], wide), empty(&[t, h], compute));
        let out = Normed { residual: Some(&mut residual), rstd: &mut rstd, output: &mut output };
        norm::forward(&f(&x), Some(Addend { output: &c(&add), bias: Some(&c(&bias)) }), &c(&w), eps, out);
        close("sum", compute, &residual, &sum.detach(), limit);
        close("norm", compute, &output, &exact.detach(), limit);
        let mut again = empty(&[t, h], compute);
        let out = Normed { residual: None, rstd: &mut rstd, output: &mut again };
        norm::forward(&residual, None, &c(&w), eps, out);
        assert!(again.equal(&output), "with and without an addend");
        let (mut grad, mut rounded, mut grad_weight) = (f(&dr), empty(&[t, h], compute), empty(&[h], wide));
        let saved = norm::Saved { residual: &residual, rstd: &rstd, weight: &c(&w) };
        norm::backward(&c(&dy), saved, &mut grad, &mut rounded, &mut grad_weight);
        // The inputs are exact, so bf16 differs only where it is stored.
        close("gradient", compute, &grad, &sum.grad(), limit.min(1e-5));
        close("weight's gradient", compute, &grad_weight, &weight.grad(), limit.min(1e-5));
        assert!(rounded.equal(&grad.to_kind(compute)));
    }
}

#[test]
fn swiglu_merged_and_apart() {
    one_thread();
    let mut make = inputs();
    let (t, f) = (7i64, 21i64);
    let (gate, up, dy) = (make.tensor(&[t, f]) * 3.0, make.tensor(&[t, f]), make.tensor(&[t, f]));
    let (g, u) = (leaf(&gate), leaf(&up));
    let exact = g.silu() * &u;
    (&exact * &dy).sum(Kind::Double).backward();
    for (compute, _, limit) in KINDS {
        let c = |t: &Tensor| t.to_kind(compute).copy();
        let (mut merged, mut gates, mut ups) = (Tensor::cat(&[c(&gate), c(&up)], 1), c(&gate), c(&up));
        let mut output = empty(&[t, f], compute);
        swiglu::forward(GateUp::Merged(&mut merged), None, &mut output);
        close("merged", compute, &output, &exact.detach(), limit);
        swiglu::forward(GateUp::Apart(&mut gates, &mut ups), None, &mut output);
        close("apart", compute, &output, &exact.detach(), limit);
        swiglu::backward(&c(&dy), GateUp::Merged(&mut merged));
        swiglu::backward(&c(&dy), GateUp::Apart(&mut gates, &mut ups));
        close("gate", compute, &gates, &g.grad(), limit);
        close("up", compute, &ups, &u.grad(), limit);
        close("merged gradients", compute, &merged, &Tensor::cat(&[&gates, &ups], 1), 1e-12);
        let (bias, twice) = (c(&make.tensor(&[f])), c(&up));
        let (mut plain, mut biased) = (c(&gate) + &bias, c(&gate));
        swiglu::forward(GateUp::Apart(&mut plain, &mut (&twice + &bias)), None, &mut output);
        let mut other = empty(&[t, f], compute);
        swiglu::forward(GateUp::Apart(&mut biased, &mut twice.copy()), Some((&bias, &bias)), &mut other);
        close("biases", compute, &other, &output, 1e-12);
    }
}

/// The layout of heads, written down once more: rows of `[tokens, heads, D]` by document, kv head, position and group.
fn layout_of(values: &Tensor, documents: &Documents, heads: Heads) -> Tensor {
    let group = heads.count / heads.kv;
    let mut blocks = Vec::new();
    for tile in &documents.tiles {
        for document in &tile.documents {
            for kv in 0..heads.kv {
                let rows = values.narrow(0, document.start as i64, document.length as i64);
                let rows = rows.narrow(1, (kv * group) as i64, group as i64).reshape([-1, heads.dim as i64]);
                let missing = ((tile.padded - document.length) * group) as i64;
                blocks.push(rows.constant_pad_nd([0, 0, 0, missing]).reshape([-1]));
            }
        }
    }
    Tensor::cat(&blocks, 0)
}

#[test]
fn heads_with_bias_norm_and_rotation() {
    one_thread();
    let documents = Documents::new(&[0, 5, 38, 41], 48);
    let rope = Rope { theta: 100.0, scaling: RopeScaling::Linear { factor: 2.0 } };
    let heads = Heads { count: 4, kv: 2, dim: 18 };
    let (t, width, dim, stride, first, eps) = (64i64, 72i64, 18i64, 80i64, 5usize, 1e-6);
    let mut make = inputs();
    let (source, bias, weight) = (make.tensor(&[t, stride]), make.tensor(&[width]), make.tensor(&[dim]));
    let dy = make.tensor(&[(documents.padded * heads.width()) as i64]);
    let rotation = Rotation::new(&rope, 18, 64, Kind::Double, Device::Cpu);
    for (normed, rotated, biased) in
        [(true, true, true), (false, true, false), (true, true, false), (false, false, false), (false, false, true)]
    {
        let (x, w) = (leaf(&source), leaf(&weight));
        let mut values = x.narrow(1, first as i64, width).reshape([t, 4, dim]);
        if biased {
            values = &values + bias.view([4, dim]);
        }
        if normed {
            values = &values * (values.square().mean_dim([-1i64].as_slice(), true, Kind::Double) + eps).rsqrt() * &w;
        }
        if rotated {
            let position = |token: i64| {
                documents
                    .tiles
                    .iter()
                    .flat_map(|t| &t.documents)
                    .map(|d| token - d.start as i64)
                    .filter(|p| *p >= 0)
                    .min()
                    .unwrap()
            };
            let positions = Tensor::from_slice(&(0..t).map(position).collect::<Vec<_>>());
            let table = |half: &Tensor| half.index_select(0, &positions).repeat([1, 2]).unsqueeze(1);
            let halves = values.chunk(2, -1);
            let turned = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
            values = &values * table(&rotation.cos) + turned * table(&rotation.sin);
        }
        let exact = layout_of(&values, &documents, heads);
        (&exact * &dy).sum(Kind::Double).backward();
        for (compute, wide, limit) in KINDS {
            let c = |t: &Tensor| t.to_kind(compute).copy();
            let (matrix, bias, weight) = (c(&source), c(&bias), c(&weight));
            let tables = Rotation::new(&rope, 18, 64, wide, Device::Cpu);
            let rotation = rotated.then_some(&tables);
            let columns = Columns { matrix: &matrix, first, bias: biased.then_some(&bias) };
            let norm = normed.then_some(HeadNorm { weight: &weight, eps });
            let mut flat = empty(&[dy.numel() as i64], compute);
            heads::split(columns, norm, rotation, &documents, heads, &mut flat);
            close("split", compute, &flat, &exact.detach(), limit);
            for grad in [c(&dy), dy.to_kind(wide)] {
                let (mut joined, mut grad_weight) = (empty(&[t, stride], compute), empty(&[dim], wide));
                let gradient = norm.map(|norm| NormGradient { source: columns, norm, grad_weight: &mut grad_weight });
                heads::join(&grad, gradient, rotation, &documents, heads, &mut joined, first);
                close(
                    "join",
                    compute,
                    &joined.narrow(1, first as i64, width),
                    &x.grad().narrow(1, first as i64, width),
                    limit,
                );
                if normed {
                    close("head norm's gradient", compute, &grad_weight, &w.grad(), limit.min(1e-5));
                }
            }
        }
    }
}

#[test]
fn softmax_of_documents_and_windows() {
    one_thread();
    let (kv_heads, group) = (2usize, 3usize);
    for (starts, tokens, window) in [
        (vec![0u32, 20, 50], 60usize, None),
        (vec![0, 33], 70, Some(9)),
        (vec![0], 500, Some(40)),
        (vec![0], 500, None),
    ] {
        let documents = Documents::new(&starts, tokens);
        let statistics = (documents.padded * kv_heads * group) as i64;
        for tile in &documents.tiles {
            for block in tile.blocks(window) {
                let which = Scores { tile, block: &block, kv_heads, group, window, scale: 0.3 };
                let (n, q, k) = (tile.documents.len(), block.queries.len(), block.keys.len());
                let shape = [(n * kv_heads) as i64, (q * group) as i64, k as i64];
                let mut make = inputs();
                let (scores, dy) = (make.tensor(&shape) * 4.0, make.tensor(&shape));
                let s = leaf(&scores);
                let mut seen = Vec::new();
                for document in &tile.documents {
                    for _ in 0..kv_heads {
                        for position in block.queries.clone() {
                            for _ in 0..group {
                                seen.extend(block.keys.clone().map(|key| {
                                    position < document.length
                                        && key <= position
                                        && window.is_none_or(|w| position - key < w)
                                }));
                            }
                        }
                    }
                }
                let mask = Tensor::from_slice(&seen).view(shape.as_slice());
                let scaled = (&s * 0.3).masked_fill(&mask.logical_not(), -1e300);
                let exact = scaled.softmax(-1, Kind::Double) * mask.to_kind(Kind::Double);
                (&exact * &dy).sum(Kind::Double).backward();
                for (compute, wide, limit) in KINDS {
                    let c = |t: &Tensor| t.to_kind(compute).copy();
                    let (mut p, mut lse) = (c(&scores), Tensor::zeros([statistics], (wide, Device::Cpu)));
                    softmax::forward(&mut p, which, &mut lse);
                    close("probabilities", compute, &p, &exact.detach(), limit);
                    let (mut p, mut grad) = (c(&scores), c(&dy));
                    // Where the statistics of this block's rows lie, from the layout's definition.
                    let products = (exact.detach() * &dy).sum_dim_intlist([-1i64].as_slice(), false, Kind::Double);
                    let mut delta = Tensor::zeros([statistics], (wide, Device::Cpu));
                    for d in 0..n {
                        for kv in 0..kv_heads {
                            let row =
                                ((tile.base + d * tile.padded) * kv_heads + kv * tile.padded + block.queries.start)
                                    * group;
                            let part = products.get((d * kv_heads + kv) as i64);
                            delta.narrow(0, row as i64, (q * group) as i64).copy_(&part);
                        }
                    }
                    softmax::backward(&mut p, &mut grad, which, Statistics { lse: &lse, delta: &delta });
                    close("probabilities again", compute, &p, &exact.detach(), limit);
                    close("scores' gradient", compute, &grad, &s.grad(), limit);
                    let _ = delta.zero_();
                }
            }
        }
    }
}

#[test]
fn cross_entropy_and_its_gradient() {
    one_thread();
    let (r, v, scale) = (6i64, 131i64, 0.01);
    let logits = inputs().tensor(&[r, v]) * 4.0;
    let targets = [3u32, 130, 0, 77];
    let x = leaf(&logits);
    let at = Tensor::from_slice(&targets.map(|t| t as i64)).unsqueeze(1);
    let exact = -x.narrow(0, 0, 4).log_softmax(-1, Kind::Double).gather(1, &at, false).sum(Kind::Double);
    (&exact * scale).backward();
    for (compute, _, limit) in KINDS {
        let mut grad = logits.to_kind(compute).copy();
        let choices = cross_entropy::first_choices(&mut grad);
        let loss = cross_entropy::loss_and_gradient(&mut grad, &targets, scale).sum();
        // Cross-entropy is in fp32 even of bf16 logits, and those are exact here.
        assert!((loss / exact.double_value(&[]) - 1.0).abs() < limit.min(1e-6), "{compute:?}: {loss}");
        close("logits' gradient", compute, &grad, &x.grad(), limit);
        let exact: Vec<i64> = Vec::try_from(logits.argmax(-1, false)).unwrap();
        assert!(choices.iter().zip(exact).all(|(a, b)| *a as i64 == b));
        let mut tie = Tensor::from_slice(&[1.0, 5.0, 5.0, 2.0]).to_kind(compute).view([1, 4]);
        assert_eq!(cross_entropy::first_choices(&mut tie), [1], "the lowest id wins a tie");
        assert_eq!(cross_entropy::loss_and_correct(&mut tie, &[2]).1, 0);
    }
}

#[test]
fn rows_are_looked_up_and_summed() {
    one_thread();
    let mut make = inputs();
    let (table, grad) = (make.tensor(&[11, 19]), make.tensor(&[8, 19]));
    let ids = [7u32, 2, 7, 10, 0, 2, 7];
    let x = leaf(&table);
    let at = Tensor::from_slice(&ids.map(|i| i as i64));
    let exact = x.index_select(0, &at);
    (&exact * grad.narrow(0, 0, 7)).sum(Kind::Double).backward();
    for (compute, wide, limit) in KINDS {
        let mut found = empty(&[8, 19], wide);
        rows::look_up(&table.to_kind(compute), &ids, &mut found);
        assert_eq!(distance(&found.narrow(0, 0, 7), &exact.detach()), 0.0);
        assert_eq!(distance(&found.get(7), &Tensor::zeros([19], (Kind::Double, Device::Cpu))), 0.0);
        let distinct = rows::distinct(&ids);
        let mut sums = empty(&[distinct.len() as i64, grad.size()[1]], wide);
        rows::sum_by_id(&grad.to_kind(wide), &ids, &mut sums);
        assert_eq!(distinct, [0, 2, 7, 10]);
        let at = Tensor::from_slice(&[0i64, 2, 7, 10]);
        close("sums by id", compute, &sums, &x.grad().index_select(0, &at), limit.min(1e-6));

        let all = table.to_kind(compute);
        let mut picked = empty(&[4, 19], compute);
        rows::pick(&all, &[6, 1, 3], &mut picked);
        assert!(picked.narrow(0, 0, 3).equal(&all.index_select(0, &Tensor::from_slice(&[6i64, 1, 3]))));
        assert_eq!(picked.get(3).abs().max().double_value(&[]), 0.0);
        let mut spread = empty(&[8, 19], compute);
        rows::scatter(&picked, &[6, 1, 3], &mut spread);
        assert!(spread.get(1).equal(&picked.get(1)) && spread.get(6).equal(&picked.get(0)));
        assert_eq!(spread.get(2).abs().max().double_value(&[]), 0.0);
        let add = all.narrow(0, 0, 8).copy();
        close(
            "columns",
            compute,
            &rows::sum_columns(&add, wide),
            &table.narrow(0, 0, 8).sum_dim_intlist([0i64].as_slice(), false, Kind::Double),
            1e-6,
        );
    }
}
