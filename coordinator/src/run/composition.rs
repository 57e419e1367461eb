//! What a plan consists of: each task's part, how full micro-batches are, and how evenly the ranks are loaded. All of it
//! is a function of the plan, so it can be told at any time and of any part.

use super::assign::assign;
use super::pace::FULL;
use super::plan::Plan;
use unisono_configs::run::Assignment;

/// One task's part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Part {
    pub examples: u64,
    /// Completion tokens.
    pub targets: u64,
}

/// Sums over some steps.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Composition {
    /// By task.
    pub parts: Vec<Part>,
    /// Tokens of micro-batches as a share of what they may have.
    pub fill: f64,
    /// Cost of the dearest rank of a step, divided by the mean rank's, over the steps: 1 is perfect.
    pub imbalance: f64,
}

impl Composition {
    /// Of the steps from `first` to `last`, whose rows are known, for `world` ranks.
    pub fn of(plan: &Plan, first: u64, last: u64, world: u32, assignment: Assignment, seed: u64) -> Self {
        let mut parts: Vec<Part> = Vec::new();
        let (mut tokens, mut capacity, mut dearest, mut mean) = (0u64, 0u64, 0.0, 0.0);
        for step in first..=last {
            let dealt = plan.step(step);
            for size in dealt.examples.iter().filter_map(|&row| plan.size(row)) {
                let task = size.task as usize;
                if parts.len() <= task {
                    parts.resize(task + 1, Part::default());
                }
                parts[task].examples += 1;
                parts[task].targets += u64::from(size.targets);
            }
            tokens += dealt.tokens;
            capacity += dealt.micro_batches.len() as u64 * u64::from(plan.max_tokens());
            let costs: Vec<u64> = dealt.micro_batches.iter().map(|m| m.cost).collect();
            let (speeds, mut ranks) = (vec![FULL; world.max(1) as usize], vec![0u64; world.max(1) as usize]);
            for (rank, share) in ranks.iter_mut().zip(assign(assignment, &costs, &speeds, step, seed)) {
                *rank += share.iter().map(|&m| costs[m as usize]).sum::<u64>();
            }
            dearest += ranks.iter().copied().max().unwrap_or(0) as f64;
            mean += costs.iter().sum::<u64>() as f64 / ranks.len() as f64;
        }
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        Composition { parts, fill: ratio(tokens as f64, capacity as f64), imbalance: ratio(dearest, mean) }
    }

    /// Each task's share of examples and of completion tokens.
    pub fn shares(&self) -> Vec<(f64, f64)> {
        let examples: u64 = self.parts.iter().map(|p| p.examples).sum();
        let targets: u64 = self.parts.iter().map(|p| p.targets).sum();
        let share = |part: u64, whole: u64| if whole > 0 { part as f64 / whole as f64 } else { 0.0 };
        self.parts.iter().map(|p| (share(p.examples, examples), share(p.targets, targets))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::{reversed, sizes, train, COST};
    use super::*;
    use std::sync::Arc;

    #[test]
    fn an_epoch_is_composed_of_its_rows() {
        let plan = Plan::new(Arc::new(sizes(90)), reversed(90), &train(16, 4), COST).unwrap();
        let whole = Composition::of(&plan, 1, plan.steps(), 3, Assignment::Balanced, 0);
        let targets = |task: u32| sizes(90).iter().filter(|s| s.task == task).map(|s| u64::from(s.targets)).sum();
        let expected: Vec<Part> = (0..3).map(|task| Part { examples: 30, targets: targets(task) }).collect();
        assert_eq!(whole.parts, expected);
        let tokens: u64 = sizes(90).iter().map(|s| u64::from(s.tokens)).sum();
        let micro_batches: usize = (1..=plan.steps()).map(|s| plan.step(s).micro_batches.len()).sum();
        assert_eq!(whole.fill, tokens as f64 / (micro_batches * 256) as f64);
        assert!((1.0..2.0).contains(&whole.imbalance), "{}", whole.imbalance);
        let sum: (f64, f64) = whole.shares().iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        assert!((sum.0 - 1.0).abs() < 1e-12 && (sum.1 - 1.0).abs() < 1e-12);
        // One rank has everything.
        assert_eq!(Composition::of(&plan, 1, 2, 1, Assignment::Shuffled, 5).imbalance, 1.0);
    }
}
