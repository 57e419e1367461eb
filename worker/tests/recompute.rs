//! Computing again instead of keeping changes no bit and needs less memory; a dry run knows how much.
#![allow(clippy::unwrap_used)]

mod support;

use support::{batch, model, one_thread, parameters, specs, tiny, Collected, Random};
use tch::Kind;
use unisono_configs::model::{Layout, ModelSpec};
use unisono_worker::model::{Batch, Model, Recompute};

/// Loss and leaves at a level, and the bytes of activations and temporaries.
fn run(spec: &ModelSpec, compute: Kind, batch: &Batch, level: Recompute) -> (f64, Collected, usize) {
    let mut model = model(spec, &parameters(spec, 5), compute);
    model.set_plan(level, usize::MAX);
    let mut leaves = Collected::new(&Layout::new(spec));
    let loss = model.forward_backward(batch, 0.01, &mut leaves).unwrap().sum;
    (loss, leaves, model.activation_bytes())
}

#[test]
fn no_level_changes_a_bit() {
    one_thread();
    for compute in [Kind::Float, Kind::BFloat16, Kind::Double] {
        for (name, spec) in specs() {
            let spec = ModelSpec { layers: 3, ..spec };
            let batch = batch(spec.vocab, &[40, 3, 64, 5], 0.7, 8);
            let (loss, kept, _) = run(&spec, compute, &batch, Recompute::Nothing);
            for level in Recompute::ALL {
                let (again_loss, again, _) = run(&spec, compute, &batch, level);
                assert_eq!(loss.to_bits(), again_loss.to_bits(), "{name} in {compute:?} at {level:?}");
                for (index, (a, b)) in kept.buckets.iter().zip(&again.buckets).enumerate() {
                    assert!(a.equal(b), "{name} in {compute:?} at {level:?}: bucket {index} differs");
                }
            }
        }
    }
}

#[test]
fn every_level_needs_less_memory_than_the_one_before() {
    one_thread();
    let spec = ModelSpec { layers: 12, ..tiny() };
    let batch = batch(spec.vocab, &[200, 180, 190, 210], 0.6, 8);
    let bytes = Recompute::ALL.map(|level| run(&spec, Kind::BFloat16, &batch, level).2);
    assert!(bytes.windows(2).all(|pair| pair[1] < pair[0]), "{bytes:?}");
    assert!(bytes[3] * 2 < bytes[0], "{bytes:?}");
}

#[test]
fn a_dry_run_takes_the_very_bytes_of_the_run() {
    one_thread();
    for compute in [Kind::Float, Kind::BFloat16] {
        for (name, spec) in specs() {
            let spec = ModelSpec { layers: 3, ..spec };
            for lengths in [&[40, 3, 64, 5][..], &[700], &[1; 9]] {
                let batch = batch(spec.vocab, lengths, 0.7, 8);
                let sketch = Model::sketch(spec.clone(), compute).unwrap();
                for level in Recompute::ALL {
                    let (planned, real) = (
                        sketch.dry_run(std::slice::from_ref(&batch), level, true).unwrap(),
                        run(&spec, compute, &batch, level).2,
                    );
                    assert_eq!(planned, real, "{name} in {compute:?} at {level:?}, {lengths:?}");
                }
                let model = model(&spec, &parameters(&spec, 5), compute);
                model.evaluate(&batch).unwrap();
                let planned = sketch.dry_run(std::slice::from_ref(&batch), Recompute::Nothing, false).unwrap();
                assert_eq!(planned, model.activation_bytes(), "{name} in {compute:?}, {lengths:?}, evaluated");
            }
        }
    }
}

#[test]
fn micro_batches_of_any_shape_stay_within_the_plan() {
    one_thread();
    let spec = ModelSpec { layers: 4, ..tiny() };
    let mut model = model(&spec, &parameters(&spec, 5), Kind::BFloat16);
    let worst = batch(spec.vocab, &[256; 4], 0.9, 1);
    let planned = model.dry_run(std::slice::from_ref(&worst), Recompute::Nothing, true).unwrap();
    model.set_plan(Recompute::Nothing, planned);
    let mut random = Random(7);
    let mut leaves = Collected::new(&Layout::new(&spec));
    for round in 0..200 {
        let mut lengths: Vec<usize> = Vec::new();
        while lengths.iter().sum::<usize>() < 700 && lengths.len() < 40 {
            let most = [16, 64, 256][random.below(3)];
            lengths.push(1 + random.below(most));
        }
        model.forward_backward(&batch(spec.vocab, &lengths, 0.8, round), 0.01, &mut leaves).unwrap();
        let bytes = model.activation_bytes();
        assert!(bytes <= planned + planned / 20, "round {round}: {bytes} of {planned} planned, {lengths:?}");
    }
}
