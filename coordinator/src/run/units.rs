//! Fixed units of work outside of training: validation and test rows of one task, or prompts to continue. Like
//! micro-batches they are a pure function of rows and config, whoever computes them.

use super::bounds::{fits, limits};
use super::cost::CostModel;
use super::plan::{Error, MicroBatch, Size, Worst};
use std::ops::Range;
use unisono_configs::run::Train;

/// Prompts continued side by side in one unit: as many as a worker decodes at once, fewer where there are not many, so
/// that every worker finds some.
const PROMPTS_PER_UNIT: std::ops::RangeInclusive<usize> = 16..=64;
/// Bytes of continuations in one message, which has room for twice as many.
const ANSWER_BYTES: usize = 2 << 20;

/// The units of one suite, in the order in which their results are summed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Units {
    units: Vec<Unit>,
    worst: Worst,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    pub task: u32,
    pub work: MicroBatch,
}

impl Units {
    /// Evaluation rows: a unit holds consecutive rows of one task. Units are cut so that there are about
    /// `train.micro_batches` at least, so that every worker finds some; and, but for longer rows, at `most` tokens:
    /// what training brings, so that evaluation does not need more memory.
    pub fn evaluation(
        suite: &'static str,
        sizes: &[Size],
        train: &Train,
        cost: CostModel,
        most: u32,
    ) -> Result<Self, Error> {
        let max = u64::from(limits(train)?.min(most.max(1)));
        fits(suite, sizes, train.max_tokens_per_micro_batch)?;
        let total: u64 = sizes.iter().map(|s| u64::from(s.tokens)).sum();
        let cap = total.div_ceil(train.micro_batches as u64).clamp(1, max);
        let tasks = sizes.iter().map(|s| s.task).max().map_or(0, |t| t + 1);
        let mut units = Units::default();
        for task in 0..tasks {
            let (mut rows, mut tokens) = (Vec::new(), 0);
            for (row, size) in sizes.iter().enumerate().filter(|(_, s)| s.task == task) {
                if !rows.is_empty() && tokens + u64::from(size.tokens) > cap {
                    units.push(task, MicroBatch::new(std::mem::take(&mut rows), cost), sizes);
                    tokens = 0;
                }
                rows.push((row as u32, *size));
                tokens += u64::from(size.tokens);
            }
            if !rows.is_empty() {
                units.push(task, MicroBatch::new(rows, cost), sizes);
            }
        }
        Ok(units)
    }

    /// About the tokens of a training micro-batch, as far as rows like these tell: a pure function of them, so that the
    /// units do not depend on what else is known when they are made.
    pub fn like_training(sizes: &[Size], train: &Train) -> u32 {
        let total: u64 = sizes.iter().map(|s| u64::from(s.tokens)).sum();
        let longest = sizes.iter().map(|s| s.tokens).max().unwrap_or(0);
        let documents = train.global_batch_size.div_ceil(train.micro_batches.max(1)) as u64;
        let typical = (total * documents).div_ceil((sizes.len() as u64).max(1));
        u32::try_from(typical).unwrap_or(u32::MAX).max(longest)
    }

    /// Prompts, in their order. `max_new_tokens` counts towards the cost and the worst document.
    pub fn prompts(lengths: &[u32], max_new_tokens: u32, cost: CostModel) -> Self {
        let size = |&tokens: &u32| Size { tokens, targets: max_new_tokens, task: 0 };
        let sizes: Vec<Size> = lengths.iter().map(size).collect();
        let mut units = Units::default();
        let rows: Vec<u32> = (0..lengths.len() as u32).collect();
        let together = lengths.len().div_ceil(8).clamp(*PROMPTS_PER_UNIT.start(), *PROMPTS_PER_UNIT.end());
        let together = together.min(ANSWER_BYTES / bytes(max_new_tokens)).max(1);
        for rows in rows.chunks(together) {
            units.push(0, MicroBatch::new(rows.iter().map(|&row| (row, sizes[row as usize])), cost), &sizes);
        }
        units.worst.document += max_new_tokens;
        let positions =
            |unit: &Unit| u64::from(unit.work.tokens) + unit.work.rows.len() as u64 * u64::from(max_new_tokens);
        units.worst.positions = units.units.iter().map(positions).max().unwrap_or(0);
        units
    }

    /// Prompts' units, as many together as have their continuations in one message, whoever computes how many of them.
    pub fn parts(&self, max_new_tokens: u32) -> impl Iterator<Item = Range<usize>> + '_ {
        let each = bytes(max_new_tokens);
        let mut start = 0;
        std::iter::from_fn(move || {
            let (mut end, mut sum) = (start, 0);
            while let Some(unit) = self.units.get(end) {
                sum += unit.work.rows.len() * each;
                if end > start && sum > ANSWER_BYTES {
                    break;
                }
                end += 1;
            }
            let part = start..end;
            start = end;
            (!part.is_empty()).then_some(part)
        })
    }

    fn push(&mut self, task: u32, work: MicroBatch, sizes: &[Size]) {
        self.worst = self.worst.join(Worst {
            tokens: work.tokens,
            document: work.rows.iter().map(|&row| sizes[row as usize].tokens).max().unwrap_or(0),
            documents: work.rows.len() as u32,
            ..Worst::default()
        });
        self.units.push(Unit { task, work });
    }

    pub fn as_slice(&self) -> &[Unit] {
        &self.units
    }

    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    pub fn worst(&self) -> Worst {
        self.worst
    }

    pub fn costs(&self) -> Vec<u64> {
        self.units.iter().map(|unit| unit.work.cost).collect()
    }
}

/// The most that a continuation takes in a message.
fn bytes(max_new_tokens: u32) -> usize {
    4 * max_new_tokens as usize + 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::plan::tests::{sizes, train, COST};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_row_once_and_one_task_a_unit(rows in 0usize..200, bins in 1usize..10) {
            let sizes = sizes(rows);
            let units = Units::evaluation("validation", &sizes, &train(8, bins), COST, 150).unwrap();
            let mut seen: Vec<u32> = units.as_slice().iter().flat_map(|u| u.work.rows.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..rows as u32).collect::<Vec<_>>());
            for unit in units.as_slice() {
                prop_assert!(unit.work.rows.iter().all(|&r| sizes[r as usize].task == unit.task));
                prop_assert!(unit.work.tokens <= units.worst().tokens && unit.work.tokens <= 150);
            }
            let total: u64 = sizes.iter().map(|s| u64::from(s.tokens)).sum();
            let cap = total.div_ceil(bins as u64).max(97);
            prop_assert!(units.as_slice().iter().all(|u| u64::from(u.work.tokens) <= cap));
        }
    }

    #[test]
    fn the_continuations_of_a_part_fit_into_a_message() {
        for (prompts, most) in [(1, 8), (40, 128), (20_000, 128), (3000, 4096), (9, 1_000_000)] {
            let units = Units::prompts(&vec![5; prompts], most, COST);
            let parts: Vec<_> = units.parts(most).collect();
            assert!(parts
                .iter()
                .map(|part| part.start)
                .eq(std::iter::once(0).chain(parts.iter().map(|part| part.end)).take(parts.len())));
            assert_eq!(parts.last().unwrap().end, units.as_slice().len());
            for part in parts {
                let rows: usize = units.as_slice()[part.clone()].iter().map(|unit| unit.work.rows.len()).sum();
                assert!(rows * (4 * most as usize + 16) <= ANSWER_BYTES || rows == 1, "{prompts} {most}: {part:?}");
            }
        }
        assert_eq!(Units::prompts(&[5; 40], 128, COST).parts(128).count(), 1);
    }

    #[test]
    fn prompts_keep_their_order() {
        let units = Units::prompts(&[5; 40], 10, COST);
        let rows: Vec<u32> = units.as_slice().iter().flat_map(|u| u.work.rows.clone()).collect();
        assert_eq!(rows, (0..40).collect::<Vec<_>>());
        assert_eq!((units.worst().document, units.worst().positions), (15, 16 * 15));
        assert_eq!(units.as_slice().len(), 3);
        assert_eq!(Units::prompts(&[5; 400], 10, COST).as_slice().len(), 8);
    }
}
