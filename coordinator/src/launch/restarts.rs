//! How often a process that died is started again, and after which pause. Pure: time is an argument.

use std::time::{Duration, Instant};

/// The pause before the first restart; it doubles with each further one.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(5);

/// One process's deaths since the run last got on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Restarts {
    deaths: u32,
    due: Option<Instant>,
}

impl Restarts {
    /// It died: when it is started again, unless it has died more than `most` times in a row.
    pub fn died(&mut self, now: Instant, most: u32) -> Option<Instant> {
        self.deaths += 1;
        let pause = PAUSE.saturating_mul(1 << (self.deaths - 1).min(16)).min(LONGEST);
        self.due = (self.deaths <= most).then(|| now + pause);
        self.due
    }

    /// When it is to be started again.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// It has been started again.
    pub fn started(&mut self) {
        self.due = None;
    }

    /// The run got on: what happened before counts no more.
    pub fn forgive(&mut self) {
        self.deaths = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_progress_forgives() {
        let now = Instant::now();
        let mut restarts = Restarts::default();
        let pause = |restarts: &mut Restarts| restarts.died(now, 3).map(|at| at - now);
        assert_eq!(pause(&mut restarts), Some(PAUSE));
        assert_eq!(pause(&mut restarts), Some(2 * PAUSE));
        restarts.started();
        assert_eq!(restarts.due(), None);
        assert_eq!(pause(&mut restarts), Some(4 * PAUSE));
        assert_eq!(pause(&mut restarts), None);
        restarts.forgive();
        assert_eq!(pause(&mut restarts), Some(PAUSE));
        assert_eq!(Restarts::default().died(now, 0), None);
    }
}
