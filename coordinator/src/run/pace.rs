//! How fast each rank computes, from its own reports: who is slow and why, and how much less it is dealt. It decides who
//! computes what and never a bit.

use unisono_proto::v1::StepSeconds;

/// What a rank of usual speed is worth when micro-batches are dealt.
pub const FULL: u32 = 16;

/// Weight of the newest step in the running averages.
const NEWEST: f64 = 0.3;
/// A rank that needs so many times as long as the median of the others is slow ...
const SLOW: f64 = 1.5;
/// ... if that costs a step so many seconds ...
const FELT: f64 = 0.02;
/// ... and goes on for so many steps.
const PATIENCE: u32 = 4;

/// What a slow rank spends its time on, as far as its reports tell. That of a slow network all ranks spend alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    Compute,
    /// Waiting for micro-batches.
    Data,
}

impl Cause {
    pub fn words(self) -> &'static str {
        match self {
            Cause::Compute => "computing (something else runs on that machine, or it is throttled)",
            Cause::Data => "waiting for micro-batches (its connection to the coordinator is slow)",
        }
    }
}

/// A rank that has become slow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Straggler {
    pub rank: usize,
    /// Its seconds per token against the median of the others.
    pub ratio: f64,
    pub cause: Cause,
}

#[derive(Debug, Clone, Copy, Default)]
struct Rank {
    /// Running averages: seconds per token, and tokens a step.
    compute: Option<f64>,
    data: Option<f64>,
    tokens: f64,
    slow: u32,
    /// How slow it was last, once it was named.
    named: Option<f64>,
}

/// The paces of one generation's ranks.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    ranks: Vec<Rank>,
}

impl Pace {
    pub fn new(world: usize) -> Self {
        Pace { ranks: vec![Rank::default(); world] }
    }

    /// A step's reports: for each rank its seconds and the tokens that it computed. Returns who is slow since now.
    pub fn note(&mut self, reports: impl Iterator<Item = (StepSeconds, u64)>) -> Vec<Straggler> {
        for (rank, (seconds, tokens)) in self.ranks.iter_mut().zip(reports) {
            // Whoever had nothing to compute shows no pace.
            if tokens > 0 {
                let average = |old: Option<f64>, new: f64| old.map_or(new, |old| old + NEWEST * (new - old));
                let tokens = tokens as f64;
                rank.tokens = average(rank.compute.map(|_| rank.tokens), tokens);
                rank.compute = Some(average(rank.compute, seconds.compute / tokens));
                rank.data = Some(average(rank.data, seconds.data / tokens));
            }
        }
        let found = self.slow_ones();
        let mut stragglers = Vec::new();
        for (rank, (state, found)) in self.ranks.iter_mut().zip(found).enumerate() {
            let Some((ratio, cause)) = found else {
                (state.slow, state.named) = (0, None);
                continue;
            };
            state.slow += 1;
            if state.slow >= PATIENCE && state.named.replace(ratio).is_none() {
                stragglers.push(Straggler { rank, ratio, cause });
            }
        }
        stragglers
    }

    /// For each rank how much longer than the others' median it takes, and on what; `None` where that is usual.
    fn slow_ones(&self) -> Vec<Option<(f64, Cause)>> {
        let pace = |rank: &Rank| Some((rank.compute?, rank.data?));
        let paces = self.ranks.iter().enumerate().filter_map(|(rank, state)| Some((rank, pace(state)?)));
        let mut sorted: Vec<(usize, (f64, f64))> = paces.collect();
        sorted.sort_by(|(_, a), (_, b)| (a.0 + a.1).total_cmp(&(b.0 + b.1)));
        let mut found = vec![None; self.ranks.len()];
        if sorted.len() < 2 {
            return found;
        }
        let middle = (sorted.len() - 1) / 2;
        for (place, &(rank, (compute, data))) in sorted.iter().enumerate() {
            // The median of all but this one.
            let (_, (usual, waited)) = sorted[if place > middle { middle } else { middle + 1 }];
            let (ratio, excess) = ((compute + data) / (usual + waited), compute + data - usual - waited);
            let cause = if compute - usual >= data - waited { Cause::Compute } else { Cause::Data };
            let felt = excess * self.ranks[rank].tokens > FELT;
            found[rank] = (ratio > SLOW && felt).then_some((ratio, cause));
        }
        found
    }

    /// What each rank is worth when micro-batches are dealt: [`FULL`], and less for one that was named.
    pub fn speeds(&self) -> Vec<u32> {
        let worth = |rank: &Rank| rank.named.map_or(FULL, |ratio| ((f64::from(FULL) / ratio) as u32).clamp(1, FULL));
        self.ranks.iter().map(worth).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(pace: &mut Pace, reports: &[(f64, f64, u64)]) -> Vec<Straggler> {
        let seconds =
            |&(compute, data, tokens): &(f64, f64, u64)| (StepSeconds { compute, data, ..Default::default() }, tokens);
        pace.note(reports.iter().map(seconds))
    }

    #[test]
    fn a_slow_rank_is_named_within_ten_steps_and_once_and_recovers() {
        let mut pace = Pace::new(3);
        for _ in 0..5 {
            assert_eq!(note(&mut pace, &[(1.0, 0.0, 100), (1.1, 0.1, 100), (0.9, 0.0, 90)]), []);
        }
        assert_eq!(pace.speeds(), [FULL; 3]);
        let mut named = Vec::new();
        for step in 0..20 {
            let told = note(&mut pace, &[(1.0, 0.0, 100), (4.0, 0.1, 100), (0.9, 0.0, 90)]);
            named.extend(told.into_iter().map(|s| (step, s)));
        }
        let (step, straggler) = named[0];
        assert_eq!((named.len(), straggler.rank, straggler.cause), (1, 1, Cause::Compute));
        assert!(step < 10 && straggler.ratio > SLOW);
        assert!((3..=5).contains(&pace.speeds()[1]), "{:?}", pace.speeds());
        for _ in 0..20 {
            note(&mut pace, &[(1.0, 0.0, 100), (0.4, 0.0, 40), (0.9, 0.0, 90)]);
        }
        assert_eq!(pace.speeds(), [FULL; 3]);
    }

    #[test]
    fn a_rank_that_is_stopped_every_other_step_is_slow_all_the_time() {
        let mut pace = Pace::new(2);
        let stops = (0..10).map(|step| if step % 2 == 0 { 0.25 } else { 0.01 });
        let named: Vec<_> = stops.flat_map(|own| note(&mut pace, &[(own, 0.0, 50), (0.01, 0.0, 50)])).collect();
        assert_eq!(named.iter().map(|s| s.rank).collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn waiting_for_data_is_told_apart_and_what_nobody_feels_is_not_told() {
        let mut pace = Pace::new(2);
        let told: Vec<_> = (0..9).flat_map(|_| note(&mut pace, &[(1.0, 3.0, 100), (1.0, 0.1, 100)])).collect();
        assert_eq!(told.iter().map(|s| (s.rank, s.cause)).collect::<Vec<_>>(), [(0, Cause::Data)]);
        let mut alone = Pace::new(1);
        assert!((0..9).all(|i| note(&mut alone, &[(f64::from(i), 0.0, 10)]).is_empty()));
        let mut quick = Pace::new(2);
        assert!((0..9).all(|_| note(&mut quick, &[(0.004, 0.0, 10), (0.001, 0.0, 10)]).is_empty()));
    }
}
