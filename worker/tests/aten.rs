//! The whole model by ATen calls alone, as on a device without loops of its own: what the loops give, but for rounding.
#![allow(clippy::unwrap_used)]

mod support;

use support::{batch, distance, model, one_thread, parameters, specs, Collected};
use tch::Kind;
use unisono_configs::model::Layout;
use unisono_worker::ops::form::AtenOnly;

#[test]
fn losses_and_gradients_are_those_of_the_loops() {
    one_thread();
    for (compute, limit) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.02)] {
        for (name, spec) in specs() {
            let model = model(&spec, &parameters(&spec, 3), compute);
            let batch = batch(spec.vocab, &[40, 3, 64, 65, 1, 300], 0.7, 8);
            let run = || {
                let mut leaves = Collected::new(&Layout::new(&spec));
                (model.forward_backward(&batch, 0.01, &mut leaves).unwrap().sum, leaves)
            };
            let (loss, loops) = run();
            let (aten_loss, aten) = {
                let _aten = AtenOnly::begin();
                run()
            };
            assert!((aten_loss / loss - 1.0).abs() < limit, "{name} in {compute:?}: {loss} and {aten_loss}");
            for (index, (a, b)) in loops.buckets.iter().zip(&aten.buckets).enumerate() {
                let off = distance(a, b);
                assert!(off < limit, "{name} in {compute:?}: bucket {index} is off by {off:.2e}");
            }
        }
    }
}

#[test]
fn evaluation_is_that_of_the_loops() {
    one_thread();
    for (name, spec) in specs() {
        let model = model(&spec, &parameters(&spec, 3), Kind::Float);
        let batch = batch(spec.vocab, &[40, 3, 64], 0.7, 8);
        let loops = model.evaluate(&batch).unwrap();
        let _aten = AtenOnly::begin();
        let aten = model.evaluate(&batch).unwrap();
        assert!((aten.sum / loops.sum - 1.0).abs() < 1e-5, "{name}");
        assert_eq!((aten.targets, aten.correct), (loops.targets, loops.correct), "{name}");
    }
}
