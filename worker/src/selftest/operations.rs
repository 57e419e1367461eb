//! Every operation on random data: what a device gives against the same operation in fp64 on the host.

use super::{distance, Error, Form, Random, Reporter};
use crate::ops::documents::Documents;
use crate::ops::flash;
use crate::ops::heads::{self, Columns, HeadNorm, Heads, NormGradient};
use crate::ops::norm::{self, Addend, Normed};
use crate::ops::rotation::Rotation;
use crate::ops::swiglu::{self, GateUp};
use crate::ops::{cross_entropy, rows};
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Rope, RopeScaling};

/// Kind to compute in, kind of what is wide, device: what an operation is tried in.
#[derive(Clone, Copy)]
struct Trial {
    compute: Kind,
    wide: Kind,
    device: Device,
}

impl Trial {
    fn compute(&self, tensor: &Tensor) -> Tensor {
        tensor.to_device(self.device).to_kind(self.compute).copy()
    }

    fn wide(&self, tensor: &Tensor) -> Tensor {
        tensor.to_device(self.device).to_kind(self.wide).copy()
    }

    /// Outputs must be written whole: what was there is not a number.
    fn empty(&self, shape: &[i64], kind: Kind) -> Tensor {
        Tensor::full(shape, f64::NAN, (kind, self.device))
    }
}

type Operation = (&'static str, Box<dyn Fn(Trial) -> Vec<Tensor>>);

pub(super) fn check(device: Device, reporter: &mut Reporter<'_>) -> Result<(), Error> {
    let exact = Trial { compute: Kind::Double, wide: Kind::Double, device: Device::Cpu };
    for (name, operation) in operations() {
        let expected = operation(exact);
        for &form in Form::all(device) {
            for (compute, limit) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
                let begun = Instant::now();
                let _guard = form.begin()?;
                let found = operation(Trial { compute, wide: Kind::Float, device });
                let off = found.iter().zip(&expected).map(|(f, e)| distance(f, e)).fold(0.0, f64::max);
                reporter.compare(name, form.name(device), compute, off, limit, begun);
            }
        }
    }
    attention(device, reporter)
}

fn operations() -> Vec<Operation> {
    let mut random = Random(11);
    // Wide enough for several slabs and packs; odd, so that tails are met too.
    let mut all: Vec<Operation> = Vec::new();
    for (t, h) in [(70, 1536), (9, 37)] {
        let [x, add, dy, dx] = [0; 4].map(|_| random.tensor(&[t, h]));
        let [bias, w] = [0; 2].map(|_| random.tensor(&[h]));
        all.push((
            "norm",
            Box::new(move |trial| {
                let (mut residual, mut rstd) = (trial.empty(&[t, h], trial.wide), trial.empty(&[t], trial.wide));
                let (mut output, w) = (trial.empty(&[t, h], trial.compute), trial.compute(&w));
                let out = Normed { residual: Some(&mut residual), rstd: &mut rstd, output: &mut output };
                let addend = Addend { output: &trial.compute(&add), bias: Some(&trial.compute(&bias)) };
                norm::forward(&trial.wide(&x), Some(addend), &w, 1e-5, out);
                let (mut grad, mut rounded) = (trial.wide(&dx), trial.empty(&[t, h], trial.compute));
                let mut weight = trial.empty(&[h], trial.wide);
                let saved = norm::Saved { residual: &residual, rstd: &rstd, weight: &w };
                norm::backward(&trial.compute(&dy), saved, &mut grad, &mut rounded, &mut weight);
                vec![residual, rstd, output, grad, rounded, weight]
            }),
        ));
    }
    let [both, dy] = [random.tensor(&[33, 2 * 264]) * 4.0, random.tensor(&[33, 264])];
    all.push((
        "swiglu",
        Box::new(move |trial| {
            let (mut merged, mut output) = (trial.compute(&both), trial.empty(&[33, 264], trial.compute));
            swiglu::forward(GateUp::Merged(&mut merged), None, &mut output);
            swiglu::backward(&trial.compute(&dy), GateUp::Merged(&mut merged));
            vec![output, merged]
        }),
    ));
    let logits = random.tensor(&[40, 5003]) * 6.0;
    all.push((
        "cross-entropy",
        Box::new(move |trial| {
            let targets: Vec<u32> = (0..37).map(|i| i * 131).collect();
            let mut gradient = trial.compute(&logits);
            let loss = cross_entropy::loss_and_gradient(&mut gradient, &targets, 0.02).sum();
            vec![gradient, Tensor::from(loss)]
        }),
    ));
    let [table, grad, matrix] = [random.tensor(&[90, 320]), random.tensor(&[128, 320]), random.tensor(&[200, 77])];
    all.push((
        "rows",
        Box::new(move |trial| {
            let ids: Vec<u32> = (0..100).map(|i| (i * i) % 83).collect();
            let mut looked_up = trial.empty(&[128, 320], trial.wide);
            rows::look_up(&trial.compute(&table), &ids, &mut looked_up);
            let mut sums = trial.empty(&[rows::distinct(&ids).len() as i64, 320], trial.wide);
            rows::sum_by_id(&trial.wide(&grad), &ids, &mut sums);
            vec![looked_up, sums, rows::sum_columns(&trial.compute(&matrix), trial.wide)]
        }),
    ));
    for (name, dim) in [("rope", 64), ("rope with head norm", 128)] {
        let normed = name != "rope";
        let [matrix, grad] = [random.tensor(&[128, 6 * dim]), random.tensor(&[128 * 4 * dim])];
        let (weight, bias) = (random.tensor(&[dim]), random.tensor(&[4 * dim]));
        all.push((
            name,
            Box::new(move |trial| {
                let documents = Documents::flat(&[0, 9, 10, 60], 100, trial.device);
                let heads = Heads { count: 4, kv: 2, dim: dim as usize };
                let rope = Rope { theta: 10_000.0, scaling: RopeScaling::None };
                let rotation = Rotation::new(&rope, dim as usize, 64, trial.wide, trial.device);
                let (matrix, weight) = (trial.compute(&matrix), trial.compute(&weight));
                let bias = trial.compute(&bias);
                let source = Columns { matrix: &matrix, first: dim as usize, bias: Some(&bias) };
                let norm = normed.then_some(HeadNorm { weight: &weight, eps: 1e-6 });
                let mut split = trial.empty(&[128 * 4 * dim], trial.compute);
                heads::split(source, norm, Some(&rotation), &documents, heads, &mut split);
                let (mut joined, mut of_weight) = (trial.compute(&matrix), trial.empty(&[dim], trial.wide));
                let gradient = norm.map(|norm| NormGradient { source, norm, grad_weight: &mut of_weight });
                heads::join(
                    &trial.compute(&grad),
                    gradient,
                    Some(&rotation),
                    &documents,
                    heads,
                    &mut joined,
                    dim as usize,
                );
                vec![split, joined].into_iter().chain(normed.then_some(of_weight)).collect()
            }),
        ));
    }
    all
}

/// FlashAttention, forward and backward, against autograd in fp64; and twice, for the same bits.
fn attention(device: Device, reporter: &mut Reporter<'_>) -> Result<(), Error> {
    let mut random = Random(12);
    let starts = [0, 5, 70, 71];
    let (rows, heads, kv) = (256, 4, 2);
    for (dim, window) in [(64, None), (128, None), (64, Some(20))] {
        let q = random.tensor(&[rows, heads, dim]);
        let [k, v] = [0; 2].map(|_| random.tensor(&[rows, kv, dim]));
        let dy = random.tensor(&[rows, heads, dim]);
        let scale = 1.0 / (dim as f64).sqrt();
        let (output, gradients) = exact_attention([&q, &k, &v], &dy, &starts, window, scale);
        let begun = Instant::now();
        let run = || -> Result<Vec<Tensor>, Error> {
            let flat = Documents::flat(&starts, 200, device).flat.expect("they lie flat");
            let attention = flash::Attention { flat: &flat, window, scale };
            let [q, k, v, dy] = [&q, &k, &v, &dy].map(|t| t.to_device(device).to_kind(Kind::BFloat16));
            let attended = attention.forward(&q, &k, &v).map_err(crate::model::Error::from)?;
            let gradients = attention.backward(&dy, (&q, &k, &v), &attended).map_err(crate::model::Error::from)?;
            Ok([attended.output].into_iter().chain(gradients).map(|t| t.to_device(Device::Cpu)).collect())
        };
        let found = run()?;
        // The last 56 rows hold no token.
        let tokens = |t: &Tensor| t.narrow(0, 0, 200);
        let expected = [output].into_iter().chain(gradients);
        let off = found.iter().zip(expected).map(|(f, e)| distance(&tokens(f), &tokens(&e))).fold(0.0, f64::max);
        let name = match window {
            None => format!("attention of {dim}"),
            Some(_) => format!("attention of {dim} in a window"),
        };
        reporter.compare(&name, "flash", Kind::BFloat16, off, 2e-2, begun);
        let begun = Instant::now();
        let same = run()?.iter().zip(&found).all(|(again, first)| again.equal(first));
        reporter.compare(&format!("{name}, again"), "flash", Kind::BFloat16, f64::from(!same), 0.0, begun);
    }
    Ok(())
}

/// Output, and gradients of queries, keys and values.
fn exact_attention(
    inputs: [&Tensor; 3],
    dy: &Tensor,
    starts: &[u32],
    window: Option<usize>,
    scale: f64,
) -> (Tensor, Vec<Tensor>) {
    tch::with_grad(|| {
        let leaves = inputs.map(|t| t.copy().set_requires_grad(true));
        let ends = starts.iter().skip(1).copied().chain([200]);
        let parts: Vec<Tensor> = starts
            .iter()
            .zip(ends)
            .map(|(&start, end)| {
                let length = i64::from(end - start);
                let heads = leaves[0].size()[1];
                let part = |t: &Tensor| {
                    let part = t.narrow(0, i64::from(start), length).transpose(0, 1);
                    let group = heads / part.size()[0];
                    part.repeat_interleave_self_int(group, 0, None)
                };
                let [q, k, v] = [0, 1, 2].map(|i| part(&leaves[i]));
                let seen = Tensor::ones([length, length], (Kind::Double, Device::Cpu)).tril(0);
                let seen = window.map_or(seen.shallow_clone(), |w| seen.triu(1 - w as i64));
                let scores = (q.matmul(&k.transpose(1, 2)) * scale).masked_fill(&seen.eq(0.0), f64::NEG_INFINITY);
                scores.softmax(-1, Kind::Double).matmul(&v).transpose(0, 1)
            })
            .collect();
        let output = Tensor::cat(&parts, 0);
        (&output * dy.narrow(0, 0, 200)).sum(Kind::Double).backward();
        (output.detach(), leaves.iter().map(Tensor::grad).collect())
    })
}
