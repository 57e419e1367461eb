//! What a micro-batch gives depends on nothing but the micro-batch: not on what was computed before, and (but for
//! rounding) not on how documents are packed.
#![allow(clippy::unwrap_used)]

mod support;

use support::*;
use tch::Kind;
use unisono_configs::model::Layout;
use unisono_worker::model::{Batch, Model};

fn gradient(model: &Model, batches: &[Batch], scale: f64) -> (f64, Collected) {
    let mut leaves = Collected::new(model.layout());
    let loss = batches.iter().map(|b| model.forward_backward(b, scale, &mut leaves).unwrap().sum).sum();
    (loss, leaves)
}

/// Every document of `batch` as a batch of its own.
fn alone(batch: &Batch) -> Vec<Batch> {
    let ends = batch.starts[1..].iter().map(|&s| s as usize).chain([batch.tokens.len()]);
    let cut = |(&start, end): (&u32, usize)| Batch {
        tokens: batch.tokens[start as usize..end].to_vec(),
        targets: batch.targets[start as usize..end].to_vec(),
        starts: vec![0],
    };
    batch.starts.iter().zip(ends).map(cut).collect()
}

#[test]
fn documents_together_are_documents_alone() {
    one_thread();
    for (compute, limit) in [(Kind::Double, 1e-9), (Kind::Float, 1e-5), (Kind::BFloat16, 0.02)] {
        for (name, spec) in specs() {
            let model = model(&spec, &parameters(&spec, 3), compute);
            let batch = batch(spec.vocab, &[40, 3, 64, 65, 1, 20, 22], 0.7, 8);
            let (together, apart) =
                (gradient(&model, std::slice::from_ref(&batch), 0.01), gradient(&model, &alone(&batch), 0.01));
            assert!((together.0 / apart.0 - 1.0).abs() < limit, "{name}: {} and {}", together.0, apart.0);
            for (index, bucket) in Layout::new(&spec).buckets.iter().enumerate() {
                let off = distance(&together.1.buckets[index], &apart.1.buckets[index]);
                assert!(off <= limit, "{name}: {} in {compute:?} is off by {off:.2e}", bucket.name);
            }
        }
    }
}

#[test]
fn what_came_before_does_not_change_a_bit() {
    one_thread();
    for compute in [Kind::Float, Kind::BFloat16] {
        for (name, spec) in specs() {
            let model = model(&spec, &parameters(&spec, 3), compute);
            let first = batch(spec.vocab, &[40, 3, 64, 5], 0.7, 8);
            let fresh = gradient(&model, std::slice::from_ref(&first), 0.01);
            // Other shapes leave their numbers in the buffers, and so does an overflow.
            gradient(&model, &[batch(spec.vocab, &[200, 90], 0.9, 9), batch(spec.vocab, &[9], 0.9, 10)], 0.01);
            gradient(&model, &[batch(spec.vocab, &[150, 31], 0.9, 9)], f64::INFINITY);
            model.evaluate(&batch(spec.vocab, &[100], 0.5, 11)).unwrap();
            let again = gradient(&model, &[first], 0.01);
            assert_eq!(fresh.0.to_bits(), again.0.to_bits(), "{name}");
            assert!(fresh.1.buckets.iter().zip(&again.1.buckets).all(|(a, b)| a.equal(b)), "{name} in {compute:?}");
        }
    }
}

#[test]
fn leaves_are_wide_but_for_products() {
    one_thread();
    let spec = specs().into_iter().find(|(name, _)| *name == "qwen3 with biases").unwrap().1;
    let model = model(&spec, &parameters(&spec, 3), Kind::BFloat16);
    let (_, leaves) = gradient(&model, &[batch(spec.vocab, &[40], 0.7, 8)], 0.01);
    let matrices = Layout::new(&spec).tensors().filter(|(bucket, slot)| *bucket > 0 && slot.decays()).count();
    let narrow = leaves.kinds.iter().filter(|k| **k == Kind::BFloat16).count();
    // Gate and up are one product each here, because of their places; the head's is the embedding's.
    assert!(narrow <= matrices + 1 && narrow > spec.layers, "{narrow} leaves in bf16 for {matrices} matrices");
    assert!(leaves.kinds.iter().all(|k| matches!(k, Kind::BFloat16 | Kind::Float)));
}

#[test]
fn a_batch_without_targets_has_no_leaves() {
    let spec = tiny();
    let model = model(&spec, &parameters(&spec, 3), Kind::Float);
    let (loss, leaves) = gradient(&model, &[batch(spec.vocab, &[40, 7], 0.0, 8)], 0.01);
    assert_eq!((loss, leaves.kinds.len()), (0.0, 0));
}
