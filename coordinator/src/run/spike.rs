//! Loss spikes: a step's loss far above what the steps before it had.

use std::collections::VecDeque;

/// Losses before which nothing is called a spike: the first steps of a run fall too fast to be measured against.
const LEAST: usize = 20;

/// What makes a loss a spike: more than `mads` median absolute deviations above the median of the last `window` losses.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rule {
    pub window: usize,
    /// 0: nothing is a spike.
    pub mads: f64,
}

/// The losses that the next one is held against.
#[derive(Debug, Clone)]
pub(super) struct Spikes {
    rule: Rule,
    recent: VecDeque<f64>,
}

/// How far a loss is out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spike {
    pub(super) median: f64,
    pub(super) limit: f64,
}

impl Spikes {
    /// `before`: earlier losses, oldest first.
    pub(super) fn new(rule: Rule, before: impl Iterator<Item = f64>) -> Self {
        let mut spikes = Spikes { rule, recent: VecDeque::new() };
        before.for_each(|loss| spikes.keep(loss));
        spikes
    }

    /// Takes the next loss, and says whether it is a spike.
    pub(super) fn note(&mut self, loss: f64) -> Option<Spike> {
        let spike = self.judge(loss);
        self.keep(loss);
        spike
    }

    /// Whether a loss would be a spike.
    pub(super) fn judge(&self, loss: f64) -> Option<Spike> {
        if self.rule.mads <= 0.0 || self.recent.len() < LEAST.min(self.rule.window) {
            return None;
        }
        let mut losses: Vec<f64> = self.recent.iter().copied().collect();
        let center = median(&mut losses);
        losses.iter_mut().for_each(|x| *x = (*x - center).abs());
        let limit = center + self.rule.mads * median(&mut losses);
        (loss > limit).then_some(Spike { median: center, limit })
    }

    fn keep(&mut self, loss: f64) {
        self.recent.push_back(loss);
        while self.recent.len() > self.rule.window {
            self.recent.pop_front();
        }
    }
}

/// The mean of the two in the middle where their number is even; of at least one.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Rule = Rule { window: 100, mads: 6.0 };

    /// Losses around 2 with a median absolute deviation of 0.1.
    fn calm(n: usize) -> impl Iterator<Item = f64> {
        (0..n).map(|i| 2.0 + [-0.2, -0.1, 0.0, 0.1, 0.2][i % 5])
    }

    #[test]
    fn what_is_far_out_is_a_spike_and_what_is_not_is_none() {
        let mut spikes = Spikes::new(RULE, calm(100));
        assert_eq!(spikes.note(2.59), None);
        let spike = spikes.note(2.7).expect("a spike");
        assert!((spike.median - 2.0).abs() < 1e-9 && (spike.limit - 2.6).abs() < 1e-9, "{spike:?}");
        assert_eq!(spikes.note(0.1), None, "a loss that falls is none");
    }

    #[test]
    fn one_spike_does_not_make_the_next_one_normal() {
        let mut spikes = Spikes::new(RULE, calm(50));
        assert!((0..10).all(|_| spikes.note(9.0).is_some()));
    }

    #[test]
    fn too_few_losses_and_a_rule_of_zero_call_nothing_a_spike() {
        assert_eq!(Spikes::new(RULE, calm(LEAST - 1)).note(1e9), None);
        assert!(Spikes::new(RULE, calm(LEAST)).note(1e9).is_some());
        assert_eq!(Spikes::new(Rule { mads: 0.0, ..RULE }, calm(100)).note(1e9), None);
        // What is older than the window is forgotten.
        let mut short = Spikes::new(Rule { window: 20, ..RULE }, (0..20).map(|_| 50.0).chain(calm(20)));
        assert!(short.note(3.0).is_some());
    }
}
