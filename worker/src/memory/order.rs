//! In which order ways to run a step are tried: the cheapest in time first.

use crate::model::Recompute;
use crate::optim::reduction::Stage;

/// One way to run a step: no choice changes a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    pub stage: Stage,
    /// Micro-batches that go through the model together.
    pub wave: usize,
    pub recompute: Recompute,
}

/// What may be chosen from.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    /// Absent: any.
    pub stage: Option<Stage>,
    pub wave: Option<usize>,
    pub recompute: Option<Recompute>,
    /// Micro-batches of the largest step, and workers that share them.
    pub micro_batches: usize,
    pub world: usize,
}

impl Range {
    /// All choices in groups of about the same cost, the cheapest first.
    pub fn groups(&self) -> Vec<Vec<Choice>> {
        let mut all: Vec<(u32, Choice)> =
            self.choices().into_iter().map(|choice| (self.cost(choice), choice)).collect();
        all.sort_by_key(|(cost, _)| *cost);
        let groups = all.chunk_by(|(a, _), (b, _)| a == b);
        groups.map(|group| group.iter().map(|(_, choice)| *choice).collect()).collect()
    }

    fn choices(&self) -> Vec<Choice> {
        let stages = match (self.stage, self.world) {
            // The parameters of a world of one are all its own.
            (Some(Stage::Three), 1) => vec![Stage::Two],
            (Some(stage), _) => vec![stage],
            (None, 1) => vec![Stage::One, Stage::Two],
            (None, _) => vec![Stage::One, Stage::Two, Stage::Three],
        };
        let levels = self.recompute.map_or(Recompute::ALL.to_vec(), |level| vec![level]);
        let mut choices = Vec::new();
        for stage in stages {
            for wave in self.waves(stage) {
                choices.extend(levels.iter().map(|&recompute| Choice { stage, wave, recompute }));
            }
        }
        choices
    }

    /// All micro-batches of a step in one wave, a fair share of them, and fewer and fewer.
    fn waves(&self, stage: Stage) -> Vec<usize> {
        if let Some(wave) = self.wave {
            return vec![wave.max(1)];
        }
        // Accumulators of the whole model wait for the next micro-batch anyway.
        if stage == Stage::One {
            return vec![1];
        }
        let mut waves = vec![self.micro_batches.max(1), self.share()];
        while waves[waves.len() - 1] > 1 {
            waves.push(waves[waves.len() - 1].div_ceil(2));
        }
        waves.dedup();
        waves
    }

    fn share(&self) -> usize {
        self.micro_batches.div_ceil(self.world.max(1)).max(1)
    }

    /// Thousandths of a step's time that a choice takes longer than the fastest, about: what is computed again as shares
    /// of a forward pass, what travels as shares of what it was measured to cost. (47 million parameters, two workers, bf16,
    /// 1.5k and 7k tokens a step, in turn: ZeRO-2 1 to 5 % slower than ZeRO-1, ZeRO-3 4 to 6 %; docs/benchmarks.md.)
    fn cost(&self, choice: Choice) -> u32 {
        let again = match choice.recompute {
            Recompute::Nothing => 0,
            Recompute::Norms => 20,
            Recompute::UpProjection => 120,
            Recompute::Block => 300,
        };
        let waves = self.share().div_ceil(choice.wave) as u32;
        let travel = match (self.world, choice.stage) {
            (1, _) | (_, Stage::One) => 0,
            (_, Stage::Two) => 30 + 20 * (waves - 1),
            (_, Stage::Three) => 50 * waves + 20 * (waves - 1),
        };
        again + travel
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_comes_first_and_what_is_asked_for_is_kept() {
        let any = Range { stage: None, wave: None, recompute: None, micro_batches: 8, world: 2 };
        let groups = any.groups();
        let first: Vec<_> = groups[0].iter().map(|c| (c.stage, c.wave, c.recompute)).collect();
        let nothing = Recompute::Nothing;
        assert_eq!(first, [(Stage::One, 1, nothing)]);
        let third: Vec<_> = groups[2].iter().map(|c| (c.stage, c.wave, c.recompute)).collect();
        assert_eq!(third, [(Stage::Two, 8, nothing), (Stage::Two, 4, nothing)]);
        let last = groups.last().unwrap()[0];
        assert_eq!((last.stage, last.wave, last.recompute), (Stage::Three, 1, Recompute::Block));
        let fixed = Range { stage: Some(Stage::Three), wave: Some(2), recompute: Some(Recompute::Norms), ..any };
        assert_eq!(fixed.groups(), [[Choice { stage: Stage::Three, wave: 2, recompute: Recompute::Norms }]]);
        let alone = Range { stage: Some(Stage::Three), world: 1, ..any };
        assert!(alone.groups().iter().flatten().all(|c| c.stage == Stage::Two));
    }
}
