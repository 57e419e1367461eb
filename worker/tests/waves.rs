//! Micro-batches that go through the layers together give what each gives alone, bit for bit, and a dry run knows what
//! that takes.
#![allow(clippy::unwrap_used)]

mod support;

use support::{batch, model, one_thread, parameters, specs, Collected};
use tch::Kind;
use unisono_configs::model::{Layout, ModelSpec};
use unisono_worker::model::{Batch, Leaves, Model, Nowhere, Owed, Recompute, Wave};
use unisono_worker::optim::exact::ExactSum;

/// Of different lengths; one has no targets.
fn batches(vocab: usize) -> Vec<Batch> {
    let lengths: [&[usize]; 4] = [&[40, 3, 64, 5], &[120], &[7, 9], &[33, 60]];
    let share = |i: usize| if i == 2 { 0.0 } else { 0.7 };
    lengths.iter().enumerate().map(|(i, lengths)| batch(vocab, lengths, share(i), 8 + i as u64)).collect()
}

fn all_the_way(model: &Model, batches: &[Batch], trains: bool, leaves: &mut dyn Leaves) -> Wave {
    let mut wave = model.wave(batches.to_vec()).unwrap();
    model.way(trains).into_iter().for_each(|station| wave.pass(model, station, 0.01, leaves).unwrap());
    wave
}

fn sums(exact: &mut ExactSum, layout: &Layout) -> Vec<Vec<i64>> {
    exact.settle();
    (0..layout.buckets.len()).map(|bucket| exact.bucket(bucket).to_vec()).collect()
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn together_or_one_by_one_is_the_same_to_the_bit() {
    one_thread();
    for compute in [Kind::Float, Kind::BFloat16] {
        for (name, spec) in specs() {
            let spec = ModelSpec { layers: 3, ..spec };
            let batches = batches(spec.vocab);
            let mut model = model(&spec, &parameters(&spec, 5), compute);
            let layout = model.layout().clone();
            let mut alone = ExactSum::new(layout.clone(), 8);
            let losses: Vec<_> =
                batches.iter().map(|batch| model.forward_backward(batch, 0.01, &mut alone).unwrap()).collect();
            let alone = sums(&mut alone, &layout);
            for level in Recompute::ALL {
                model.set_plan(level, usize::MAX);
                let mut together = ExactSum::new(layout.clone(), 8);
                let wave = all_the_way(&model, &batches, true, &mut together);
                assert_eq!(
                    wave.losses().map(Owed::read).collect::<Vec<_>>(),
                    losses,
                    "{name} in {compute:?} at {level:?}"
                );
                assert!(sums(&mut together, &layout) == alone, "{name} in {compute:?} at {level:?}");
            }
            let wave = all_the_way(&model, &batches, false, &mut Nowhere);
            let found: Vec<_> = batches.iter().map(|batch| model.evaluate(batch).unwrap()).collect();
            assert_eq!(wave.losses().map(Owed::read).collect::<Vec<_>>(), found, "{name} in {compute:?}");
        }
    }
}

#[test]
fn a_dry_run_takes_the_very_bytes_of_a_wave() {
    one_thread();
    for (name, spec) in specs() {
        let spec = ModelSpec { layers: 3, ..spec };
        let batches = batches(spec.vocab);
        let sketch = Model::sketch(spec.clone(), Kind::BFloat16).unwrap();
        for level in Recompute::ALL {
            let mut model = model(&spec, &parameters(&spec, 5), Kind::BFloat16);
            model.set_plan(level, usize::MAX);
            let mut leaves = Collected::new(model.layout());
            all_the_way(&model, &batches, true, &mut leaves);
            let planned = sketch.dry_run(&batches, level, true).unwrap();
            assert_eq!(planned, model.activation_bytes(), "{name} at {level:?}");
        }
    }
}
