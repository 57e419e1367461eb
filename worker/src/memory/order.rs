//! In which order ways to run a step are tried: the cheapest in time first.

use super::placement::Offload;
use crate::model::{Recompute, TOGETHER};
use crate::optim::reduction::Stage;

/// One way to run a step: no choice changes a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    pub stage: Stage,
    /// Micro-batches that go through the model together.
    pub wave: usize,
    pub recompute: Recompute,
    /// All of it where there is no GPU.
    pub offload: Offload,
}

/// What may be chosen from.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    /// Absent: any.
    pub stage: Option<Stage>,
    pub wave: Option<usize>,
    pub recompute: Option<Recompute>,
    pub offload: Option<Offload>,
    /// Micro-batches of the largest step with their tokens, and workers that share them.
    pub micro_batches: usize,
    pub tokens: usize,
    pub world: usize,
    /// They compute on GPUs.
    pub gpu: bool,
    /// AdamW's bytes beside each parameter: what masters lack there, and moments.
    pub state: (usize, usize),
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
                for offload in self.offloads() {
                    choices.extend(levels.iter().map(|&recompute| Choice { stage, wave, recompute, offload }));
                }
            }
        }
        choices
    }

    /// What may be left on the host.
    fn offloads(&self) -> Vec<Offload> {
        match (self.gpu, self.offload) {
            (false, _) => vec![Offload::All],
            (true, Some(offload)) => vec![offload],
            // Where parameters hold the whole masters there is nothing of them to leave.
            (true, None) if self.state.0 == 0 => vec![Offload::Nothing, Offload::State, Offload::All],
            (true, None) => Offload::EVERY.to_vec(),
        }
    }

    /// All micro-batches of a step in one wave, a fair share of them, and fewer and fewer.
    fn waves(&self, stage: Stage) -> Vec<usize> {
        if let Some(wave) = self.wave {
            return vec![wave.max(1)];
        }
        let mut waves = match stage {
            // Accumulators of the whole model wait for the next wave anyway: more would add nothing, and a GPU adds one by one.
            Stage::One if self.gpu => vec![1],
            Stage::One => vec![self.share().min(TOGETHER)],
            _ => vec![self.micro_batches.max(1), self.share()],
        };
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
    /// What is left on the host is rated by bytes and clocks nobody has measured yet: 50 GB/s each way at once, 400 TFLOP/s, and a
    /// processor that adds a leaf's element and updates a parameter in 2 ns.
    fn cost(&self, choice: Choice) -> u32 {
        let again = match choice.recompute {
            Recompute::Nothing => 0,
            Recompute::Norms => 20,
            Recompute::UpProjection => 120,
            Recompute::Block => 300,
        };
        let waves = self.share().div_ceil(choice.wave) as u32;
        let travel = match choice.stage {
            Stage::One => 0,
            Stage::Two => 30 + 20 * (waves - 1),
            Stage::Three => 50 * waves + 20 * (waves - 1),
        };
        // What several micro-batches leave behind lies further away than what one does: 6 % in a model of under a million
        // parameters, and as much as their passes save in one of 47 million with 900 tokens in each.
        let apart = if choice.wave.min(self.share()) > 1 && !self.gpu { 60 } else { 0 };
        again + travel + apart + self.moved(choice.offload) + self.passes(choice.wave)
    }

    /// Thousandths for passing over the accumulators more often than once for [`TOGETHER`] leaves: 0.84 ns for each parameter
    /// and pass, beside a core's 400 GFLOP/s and 6 operations for each parameter and token.
    fn passes(&self, wave: usize) -> u32 {
        if self.gpu {
            return 0;
        }
        let most = self.share().min(TOGETHER);
        let more = 1.0 / wave.min(most) as f64 - 1.0 / most as f64;
        let tokens = self.tokens.div_ceil(self.micro_batches.max(1)).max(1);
        (1000.0 * 0.84 * more / (0.015 * tokens as f64)) as u32
    }

    /// Thousandths for what is left on the host.
    fn moved(&self, offload: Offload) -> u32 {
        if !self.gpu {
            return 0;
        }
        let (masters, moments) = self.state;
        let left = |leaves: bool, bytes| if leaves { 0 } else { bytes };
        let bytes = left(offload.leaves_masters(), masters) + left(offload.leaves_moments(), moments);
        // Picoseconds for each parameter of the model; computing takes 6 operations for each token.
        let tokens = self.tokens.div_ceil(self.world.max(1)).max(1);
        let computing = 0.015 * tokens as f64;
        let picoseconds = match offload {
            Offload::All => 2000.0 * (self.share() as f64 + 1.0),
            _ => 20.0 * bytes as f64 / self.world.max(1) as f64,
        };
        (1000.0 * picoseconds / computing) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_comes_first_and_what_is_asked_for_is_kept() {
        let any = Range {
            stage: None,
            wave: None,
            recompute: None,
            offload: None,
            micro_batches: 8,
            tokens: 8 * 160,
            world: 2,
            gpu: false,
            state: (2, 8),
        };
        let groups = any.groups();
        let first: Vec<_> = groups[0].iter().map(|c| (c.stage, c.wave, c.recompute)).collect();
        let nothing = Recompute::Nothing;
        assert_eq!(first, [(Stage::One, 4, nothing)]);
        assert_eq!(
            groups[1],
            [Choice { stage: Stage::One, wave: 4, recompute: Recompute::Norms, offload: Offload::All }]
        );
        let two = |wave| Choice { stage: Stage::Two, wave, recompute: nothing, offload: Offload::All };
        assert_eq!(groups[2], [two(8), two(4)]);
        let larger = Range { tokens: 8 * 1100, ..any };
        assert_eq!(
            (larger.groups()[0][0].stage, larger.groups()[0][0].wave),
            (Stage::One, 1),
            "they pay for themselves"
        );
        let last = groups.last().unwrap()[0];
        assert_eq!((last.stage, last.wave, last.recompute), (Stage::Three, 1, Recompute::Block));
        let fixed = Range { stage: Some(Stage::Three), wave: Some(2), recompute: Some(Recompute::Norms), ..any };
        let (stage, wave, recompute, offload) = (Stage::Three, 2, Recompute::Norms, Offload::All);
        assert_eq!(fixed.groups(), [[Choice { stage, wave, recompute, offload }]]);
        let alone = Range { stage: Some(Stage::Three), world: 1, ..any };
        assert!(alone.groups().iter().flatten().all(|c| c.stage == Stage::Two));
    }

    #[test]
    fn less_is_left_on_the_host_first_and_the_more_tokens_the_less_it_costs() {
        let (stage, wave, recompute) = (Some(Stage::One), None, Some(Recompute::Nothing));
        let micro_batches = 8;
        let range = |offload, tokens, state| Range {
            stage,
            wave,
            recompute,
            offload,
            micro_batches,
            tokens,
            world: 1,
            gpu: true,
            state,
        };
        let order = |range: Range| range.groups().concat().iter().map(|c| c.offload).collect::<Vec<_>>();
        assert_eq!(order(range(None, 8 * 4096, (2, 8))), Offload::EVERY);
        assert_eq!(order(range(None, 8 * 4096, (0, 8))), [Offload::Nothing, Offload::State, Offload::All]);
        assert_eq!(order(range(Some(Offload::Masters), 8 * 4096, (2, 8))), [Offload::Masters]);
        let moments = |tokens| range(None, tokens, (2, 8)).moved(Offload::Moments);
        assert_eq!((moments(32_768), moments(262_144)), (325, 40));
    }
}
