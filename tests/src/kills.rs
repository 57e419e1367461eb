//! A run whose processes are killed, at named places and at any instant: what was killed where, and what became of it.

use crate::audience::Audience;
use crate::fixture;
use crate::processes::wait_until_gone;
use crate::train::{Finished, Live, Train};
use serde_json::{json, Value};
use std::path::Path;
use std::time::{Duration, Instant};

/// Where a worker can be made to die while it trains. (It also can while it joins and loads: [`Kill::Joining`] and
/// [`Kill::Loading`].)
pub const WORKER: [&str; 6] = ["forward", "reduce", "update", "gather", "evaluate", "checkpoint"];

/// Where a coordinator can: around what it makes durable.
pub const COORDINATOR: [&str; 4] = ["before-append", "after-append", "before-commit", "after-commit"];

/// Where either can when all steps are done.
pub const LATE: [&str; 2] = ["drain", "conclude"];

/// Where the first death can be, before any step.
pub const FIRST: [&str; 2] = ["join", "load"];

/// The environment variable that names the directory of armed places.
const FAIL_POINTS: &str = "UNISONO_FAIL_POINTS";

/// One death, or one and another that follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    /// The first process that comes to this place aborts.
    At(&'static str),
    /// SIGKILL to a worker at once.
    Worker,
    /// SIGKILL to the coordinator at once.
    Coordinator,
    /// SIGKILL to a worker, and then the first of its successor and the others that joins again aborts.
    Joining,
    /// SIGKILL to a worker, and then the first of its successor and the others that loads again aborts.
    Loading,
    /// A worker aborts in its forward pass, and while everyone regroups another process that loads.
    Regrouping,
}

impl Kill {
    /// Every kind once.
    pub fn all() -> Vec<Kill> {
        let places = WORKER.iter().chain(&COORDINATOR).map(|place| Kill::At(place));
        places.chain([Kill::Worker, Kill::Coordinator, Kill::Joining, Kill::Loading, Kill::Regrouping]).collect()
    }

    /// The deaths that it is made of: place, and whether the others regroup meanwhile.
    fn deaths(self) -> Vec<(&'static str, bool)> {
        match self {
            Kill::At(place) => vec![(place, false)],
            Kill::Worker => vec![(ANY_WORKER, false)],
            Kill::Coordinator => vec![("coordinator, any instant", false)],
            Kill::Joining => vec![(ANY_WORKER, false), ("join", true)],
            Kill::Loading => vec![(ANY_WORKER, false), ("load", true)],
            Kill::Regrouping => vec![("forward", false), ("load", true)],
        }
    }
}

const ANY_WORKER: &str = "worker, any instant";

/// SplitMix64 (Steele et al. 2014): instants and places from a seed.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }

    /// In an order of its own (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.roll(last as u64 + 1) as usize);
        }
    }
}

/// The settings of the run that everything happens to; with `steps` steps.
pub fn settings(steps: u64) -> Vec<String> {
    let steps = format!("train.steps={steps}");
    let rest = ["train.global_batch_size=24", "train.learning_rate=1e-3", "checkpoint.every=5", "eval.every=7"];
    [&steps, "model.compute=fp32"].into_iter().chain(rest).map(str::to_owned).collect()
}

/// The run that everything happens to; with `steps` steps.
pub fn train(dir: &Path, steps: u64) -> Train {
    let micro = fixture::of(fixture::MICRO);
    let train = Train::new(&micro.model, &micro.data, dir);
    settings(steps).iter().fold(train, |train, setting| train.arg("--set").arg(setting))
}

/// Digest and losses of the run that nothing happens to.
pub fn undisturbed(dir: &Path, steps: u64) -> (String, Vec<f64>) {
    result(&train(dir, steps).workers(1).succeed().run_dir)
}

/// Digest and losses of a run that has come to its good end, without leaving anybody or saying a step twice.
pub fn ended_well(ended: &Finished) -> (String, Vec<f64>) {
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    wait_until_gone(&ended.mark, Duration::from_secs(5));
    let steps: Vec<u64> = ended.events("step").iter().filter_map(|step| step["step"].as_u64()).collect();
    assert!(steps.windows(2).all(|w| w[0] < w[1]), "a step was said twice: {steps:?}");
    result(&ended.run_dir)
}

/// What is done to a run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub steps: u64,
    pub workers: usize,
    pub viewers: usize,
    /// Where somebody dies before the first step.
    pub first: Option<&'static str>,
    /// One after another, each after the run has got on.
    pub kills: Vec<Kill>,
    /// Where somebody dies when all steps are done.
    pub late: Vec<&'static str>,
}

/// What became of a run that was killed at.
#[derive(Debug)]
pub struct Disturbed {
    pub digest: String,
    pub losses: Vec<f64>,
    /// One line for each death: where, at which step, in the middle of what, and for the last one of several the seconds
    /// until the next new step.
    pub deaths: Vec<Value>,
    /// For each generation but the first, how many steps that were committed had to be computed again.
    pub replays: Vec<u64>,
}

/// Carries `plan` out, at instants of `dice`, and waits for the end. Viewers are there all the time, and see every step.
pub fn disturb(dir: &Path, plan: &Plan, dice: &mut Dice) -> Disturbed {
    let armed = tempfile::tempdir_in(dir).expect("the temporary directory can be written");
    let arm = |place: &str| std::fs::write(armed.path().join(place), "").expect("the directory can be written");
    let taken = |place: &str| taken(&armed.path().join(place));
    let mut deaths = Vec::new();
    let begun = Instant::now();
    plan.first.into_iter().for_each(arm);
    let mut live = train(dir, plan.steps).workers(plan.workers).env(FAIL_POINTS, armed.path()).start();
    live.wait_for("step");
    if let Some(place) = plan.first {
        taken(place);
        let seconds = begun.elapsed().as_secs_f64();
        deaths.push(json!({"place": place, "step": 0, "while": "start", "seconds": seconds}));
    }
    let audience = Audience::attach(&live.run_dir, &live.mark, plan.viewers);
    plan.late.iter().for_each(|place| arm(place));
    for &kill in &plan.kills {
        std::thread::sleep(Duration::from_millis(dice.roll(120)));
        let begun = Instant::now();
        let step = live.wait_for("step")["step"].as_u64().unwrap_or(0);
        // Where there is no time left for it, it does not happen.
        if step + 15 >= plan.steps {
            break;
        }
        let any_worker = |dice: &mut Dice| {
            // Between a death and the next start there may be none.
            let mut found = live.workers();
            while found.is_empty() {
                std::thread::sleep(Duration::from_millis(5));
                found = live.workers();
            }
            crate::processes::kill(found[dice.roll(found.len() as u64) as usize].pid);
        };
        match kill {
            Kill::At(place) => {
                arm(place);
                taken(place);
            }
            Kill::Worker => any_worker(dice),
            Kill::Coordinator => crate::processes::kill(live.coordinator().pid),
            Kill::Joining | Kill::Loading => {
                let place = if kill == Kill::Joining { "join" } else { "load" };
                arm(place);
                any_worker(dice);
                taken(place);
            }
            Kill::Regrouping => {
                arm("load");
                arm("forward");
                taken("forward");
                taken("load");
            }
        }
        let seconds = next_step(&mut live, begun);
        let made = kill.deaths();
        for (index, &(place, regroups)) in made.iter().enumerate() {
            let during = if regroups { "regroup" } else { "step" };
            let seconds = (index + 1 == made.len()).then_some(seconds);
            deaths.push(json!({"place": place, "step": step, "while": during, "seconds": seconds}));
        }
    }
    let ended = live.finish();
    assert_eq!(ended.code(), Some(0), "the run did not survive {deaths:?}: {}", ended.stderr);
    audience.saw_all(plan.steps);
    wait_until_gone(&ended.mark, Duration::from_secs(5));
    for place in &plan.late {
        assert!(!armed.path().join(place).exists(), "nobody came to {place}");
        deaths.push(json!({"place": place, "step": plan.steps, "while": "end", "seconds": null}));
    }
    let numbers: Vec<u64> = ended.events("step").iter().filter_map(|s| s["step"].as_u64()).collect();
    assert!(numbers.iter().copied().eq(1..=plan.steps), "each step is told once: {numbers:?}");
    let (digest, losses) = result(&ended.run_dir);
    Disturbed { digest, losses, deaths, replays: replays(&ended.run_dir) }
}

/// Seconds since `begun` when the run has committed a step that it had not before.
fn next_step(live: &mut Live, begun: Instant) -> f64 {
    // Whoever died, ranks are assigned anew; steps that were on their way come before.
    live.wait_for("membership");
    live.wait_for("step");
    begun.elapsed().as_secs_f64()
}

/// Waits until a process has come to an armed place.
fn taken(place: &Path) {
    let begun = Instant::now();
    while place.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "nobody came to {}", place.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Digest and losses, from the ledger.
pub fn result(run_dir: &Path) -> (String, Vec<f64>) {
    (digest(run_dir), ledger_losses(run_dir))
}

/// The run's own word on its digest, from its ledger.
pub fn digest(run_dir: &Path) -> String {
    let ledger = rusqlite::Connection::open(run_dir.join("ledger.sqlite")).expect("a run has a ledger");
    let sql = "SELECT json_extract(body, '$.digest') FROM events WHERE kind = 'done' ORDER BY sequence DESC LIMIT 1";
    ledger.query_row(sql, [], |row| row.get(0)).expect("a run that ended well is done")
}

/// Losses by step, from the ledger: each committed step has one entry.
pub fn ledger_losses(run_dir: &Path) -> Vec<f64> {
    let ledger = rusqlite::Connection::open(run_dir.join("ledger.sqlite")).expect("a run has a ledger");
    let mut rows = ledger.prepare("SELECT loss FROM steps ORDER BY step").expect("a ledger has steps");
    let losses = rows.query_map([], |row| row.get(0)).expect("a ledger has losses");
    losses.map(|loss| loss.expect("a loss is a number")).collect()
}

/// From the ledger, for each generation but the first: how many committed steps were computed again.
pub fn replays(run_dir: &Path) -> Vec<u64> {
    let ledger = rusqlite::Connection::open(run_dir.join("ledger.sqlite")).expect("a run has a ledger");
    let sql =
        "SELECT ifnull(json_extract(body, '$.replayed'), 0) FROM events WHERE kind = 'membership' ORDER BY sequence";
    let mut rows = ledger.prepare(sql).expect("a ledger has events");
    let replays = rows.query_map([], |row| row.get(0)).expect("a ledger has events");
    replays.skip(1).map(|steps| steps.expect("it is a number")).collect()
}
