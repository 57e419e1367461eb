//! The hand-written forward and backward of whole models against libtorch's autograd in fp64.
#![allow(clippy::unwrap_used)]

mod support;

use support::*;
use tch::{Kind, Tensor};
use unisono_configs::model::{Layout, ModelSpec};
use unisono_worker::model::Batch;

/// Gradients of every tensor, named, ours and the oracle's.
fn gradients(spec: &ModelSpec, batch: &Batch, compute: Kind) -> (f64, f64, Vec<(String, Tensor, Tensor)>) {
    let parameters = parameters(spec, 7);
    let scale = 1.0 / targets(batch) as f64;
    let oracle = Oracle::new(spec, &parameters);
    let exact = oracle.backward(batch, scale);
    let model = model(spec, &parameters, compute);
    let mut leaves = Collected::new(model.layout());
    let loss = model.forward_backward(batch, scale, &mut leaves).unwrap();
    assert_eq!(loss.targets as usize, targets(batch));
    let layout = Layout::new(spec);
    let tensors = layout.tensors().map(|(bucket, slot)| {
        let narrow = |flat: &Tensor| flat.narrow(0, slot.offset as i64, slot.elements() as i64);
        (slot.name.clone(), narrow(&leaves.buckets[bucket]), narrow(&oracle.leaves[bucket].grad()))
    });
    (loss.sum, exact, tensors.collect())
}

const LENGTHS: [usize; 6] = [5, 33, 1, 70, 31, 12];

#[test]
fn every_gradient_is_autograds_in_fp64() {
    one_thread();
    for (name, spec) in specs() {
        let (loss, exact, tensors) = gradients(&spec, &batch(spec.vocab, &LENGTHS, 0.6, 3), Kind::Double);
        assert!((loss / exact - 1.0).abs() < 1e-12, "{name}: loss {loss}, autograd has {exact}");
        for (tensor, ours, autograd) in tensors {
            assert!(distance(&ours, &autograd) <= 1e-9, "{name}: {tensor} is off by {}", distance(&ours, &autograd));
        }
    }
}

#[test]
fn every_gradient_in_fp32_is_close_to_fp64() {
    one_thread();
    for (name, spec) in specs() {
        let (loss, exact, tensors) = gradients(&spec, &batch(spec.vocab, &LENGTHS, 0.6, 3), Kind::Float);
        assert!((loss / exact - 1.0).abs() < 1e-6, "{name}: loss {loss}, autograd has {exact}");
        for (tensor, ours, autograd) in tensors {
            assert!(distance(&ours, &autograd) <= 1e-5, "{name}: {tensor} is off by {}", distance(&ours, &autograd));
        }
    }
}

#[test]
fn gradients_in_bf16_are_near() {
    one_thread();
    for (name, spec) in specs() {
        let (loss, exact, tensors) = gradients(&spec, &batch(spec.vocab, &LENGTHS, 0.6, 3), Kind::BFloat16);
        assert!((loss / exact - 1.0).abs() < 2e-2, "{name}: loss {loss}, autograd has {exact}");
        for (tensor, ours, autograd) in tensors {
            assert!(distance(&ours, &autograd) <= 0.15, "{name}: {tensor} is off by {}", distance(&ours, &autograd));
        }
    }
}

#[test]
fn long_documents_attend_in_blocks() {
    one_thread();
    for window in [None, Some(50), Some(300)] {
        let spec = ModelSpec { sliding_window: window, layers: 1, ..tiny() };
        let (loss, exact, tensors) = gradients(&spec, &batch(spec.vocab, &[700, 40], 0.3, 3), Kind::Float);
        assert!((loss / exact - 1.0).abs() < 1e-6, "{window:?}: loss {loss}, autograd has {exact}");
        for (tensor, ours, autograd) in tensors {
            assert!(distance(&ours, &autograd) <= 1e-5, "{window:?}: {tensor}: {}", distance(&ours, &autograd));
        }
    }
}

#[test]
fn many_targets_take_several_chunks_of_logits() {
    one_thread();
    for compute in [Kind::Double, Kind::Float] {
        // So many that no more than 512 rows go together.
        let spec = ModelSpec { tied: false, layers: 1, vocab: 17_000, ..tiny() };
        let (_, _, tensors) = gradients(&spec, &batch(spec.vocab, &[300, 300, 290, 280], 1.0, 5), compute);
        let head = tensors.iter().find(|(name, ..)| name == "lm_head.weight").unwrap();
        assert!(distance(&head.1, &head.2) <= 1e-5, "{compute:?}: {}", distance(&head.1, &head.2));
    }
}
