//! The learning rate of every step.
//!
//! Steps count from 1 to `steps`, the first `warmup` of them warm up: step i has `peak * i / warmup`, so that no step is
//! wasted at zero. Step i after the warmup has `peak * lambda(i - 1)` with the `lambda` of transformers'
//! `get_{cosine,linear,constant,wsd}_schedule(_with_warmup)`: full at first, and zero just after the last step. Without
//! warmup that is, step by step, what a plain loop `optimizer.step(); scheduler.step()` uses.

use unisono_configs::run::{Schedule, Train};

/// A resolved schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    peak: f64,
    shape: Schedule,
    warmup: u64,
    steps: u64,
}

impl LearningRate {
    /// `train.warmup_steps` below 1 is a share of `steps`, rounded up.
    pub fn new(train: &Train, steps: u64) -> Self {
        let warmup = match train.warmup_steps {
            share if share < 1.0 => (share.max(0.0) * steps as f64).ceil() as u64,
            count => count.ceil() as u64,
        };
        LearningRate { peak: train.learning_rate, shape: train.schedule, warmup: warmup.min(steps), steps }
    }

    /// Learning rate of `step`, from 1.
    pub fn at(&self, step: u64) -> f64 {
        if step <= self.warmup {
            return self.peak * (step as f64 / self.warmup as f64);
        }
        let (done, steps, warmup) = ((step - 1) as f64, self.steps as f64, self.warmup as f64);
        let left = |from: f64| ((steps - done) / (steps - from).max(1.0)).clamp(0.0, 1.0);
        let factor = match self.shape {
            Schedule::Constant => 1.0,
            Schedule::Linear => left(warmup),
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * (1.0 - left(warmup))).cos()),
            // The last fifth decays.
            Schedule::Wsd => left((steps - (steps / 5.0).ceil()).max(warmup)),
        };
        self.peak * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule, warmup_steps: f64, steps: u64) -> Vec<f64> {
        let train = Train { schedule, warmup_steps, learning_rate: 1.0, ..Train::default() };
        (1..=steps).map(|step| LearningRate::new(&train, steps).at(step)).collect()
    }

    fn near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?} is not {expected:?}");
    }

    /// transformers: `[LambdaLR(opt, ...).get_last_lr() for each step]` of `get_*_schedule` without warmup.
    #[test]
    fn without_warmup_steps_are_those_of_transformers() {
        near(&rates(Schedule::Linear, 0.0, 4), &[1.0, 0.75, 0.5, 0.25]);
        let cosine: Vec<f64> = (0..4).map(|i| 0.5 * (1.0 + (std::f64::consts::PI * i as f64 / 4.0).cos())).collect();
        near(&rates(Schedule::Cosine, 0.0, 4), &cosine);
        near(&rates(Schedule::Constant, 0.0, 3), &[1.0; 3]);
        near(&rates(Schedule::Wsd, 0.0, 10), &[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5]);
    }

    #[test]
    fn warmup_wastes_no_step() {
        near(&rates(Schedule::Linear, 2.0, 6), &[0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
        near(&rates(Schedule::Constant, 0.5, 4), &[0.5, 1.0, 1.0, 1.0]);
        near(&rates(Schedule::Cosine, 0.03, 2)[..1], &[1.0]);
        near(&rates(Schedule::Linear, 10.0, 2), &[0.5, 1.0]);
    }
}
