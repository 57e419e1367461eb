//! A run whose processes are killed, at named places and at any instant: what was killed where, and what became of it.

use crate::fixture;
use crate::processes::{kill, wait_until_gone};
use crate::train::{Live, Train};
use serde_json::{json, Value};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where a worker can be made to die: the phases of its life.
pub const WORKER: [&str; 8] = ["join", "load", "forward", "reduce", "update", "gather", "evaluate", "checkpoint"];

/// Where a coordinator can: around what it makes durable.
pub const COORDINATOR: [&str; 4] = ["before-append", "after-append", "before-commit", "after-commit"];

/// Where either can when all steps are done.
pub const LATE: [&str; 2] = ["drain", "conclude"];

/// The environment variable that names the directory of armed places.
const FAIL_POINTS: &str = "UNISONO_FAIL_POINTS";

/// One death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    /// The first process that comes to this place aborts.
    At(&'static str),
    /// SIGKILL to a worker at once.
    Worker,
    /// SIGKILL to the coordinator at once.
    Coordinator,
    /// A worker aborts in its forward pass, and while everyone regroups another process that loads.
    Regrouping,
}

impl Kill {
    /// Every kind once.
    pub fn all() -> Vec<Kill> {
        let places = WORKER.iter().skip(2).chain(&COORDINATOR).map(|place| Kill::At(place));
        places.chain([Kill::Worker, Kill::Coordinator, Kill::Regrouping]).collect()
    }

    fn name(self) -> &'static str {
        match self {
            Kill::At(place) => place,
            Kill::Worker => "worker, any instant",
            Kill::Coordinator => "coordinator, any instant",
            Kill::Regrouping => "regroup",
        }
    }
}

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
}

/// The run that everything happens to; with `steps` steps.
pub fn train(dir: &Path, steps: u64) -> Train {
    let micro = fixture::of(fixture::MICRO);
    Train::new(&micro.model, &micro.data, dir)
        .set("model.compute", "fp32")
        .set("train.steps", steps)
        .set("train.global_batch_size", 24)
        .set("train.learning_rate", 1e-3)
        .set("checkpoint.every", 5)
        .set("eval.every", 7)
}

/// What became of a run that was killed at.
#[derive(Debug)]
pub struct Disturbed {
    pub digest: String,
    pub losses: Vec<f64>,
    /// One line for each death: what, at which step, and seconds until the next new step.
    pub deaths: Vec<Value>,
}

/// Carries `kills` out one after another, each after the run has got on, at instants of `dice`; then lets processes die
/// at the places in `late`, and waits for the end.
pub fn disturb(
    dir: &Path,
    steps: u64,
    workers: usize,
    kills: &[Kill],
    late: &[&'static str],
    dice: &mut Dice,
) -> Disturbed {
    let armed = tempfile::tempdir_in(dir).expect("the temporary directory can be written");
    let arm = |place: &str| std::fs::write(armed.path().join(place), "").expect("the directory can be written");
    let mut live = train(dir, steps).workers(workers).env(FAIL_POINTS, armed.path()).start();
    let mut deaths = Vec::new();
    live.wait_for("step");
    for place in late {
        arm(place);
    }
    for &what in kills {
        std::thread::sleep(Duration::from_millis(dice.roll(120)));
        let begun = Instant::now();
        let step = live.wait_for("step")["step"].as_u64().unwrap_or(0);
        // Where there is no time left for it, it does not happen.
        if step + 15 >= steps {
            break;
        }
        match what {
            Kill::At(place) => {
                arm(place);
                taken(&armed.path().join(place));
            }
            Kill::Worker => {
                let found = live.workers();
                kill(found[dice.roll(found.len() as u64) as usize].pid);
            }
            Kill::Coordinator => kill(live.coordinator().pid),
            Kill::Regrouping => {
                arm("load");
                arm("forward");
                taken(&armed.path().join("forward"));
                taken(&armed.path().join("load"));
            }
        }
        let next = next_step(&mut live, begun);
        deaths.push(json!({"place": what.name(), "step": step, "seconds": next}));
    }
    let ended = live.finish();
    wait_until_gone(&ended.mark, Duration::from_secs(5));
    for place in late {
        assert!(!armed.path().join(place).exists(), "nobody came to {place}");
        deaths.push(json!({"place": place, "step": steps, "seconds": null}));
    }
    assert_eq!(ended.code(), Some(0), "the run did not survive {deaths:?}: {}", ended.stderr);
    let numbers: Vec<u64> = ended.events("step").iter().filter_map(|s| s["step"].as_u64()).collect();
    assert!(numbers.windows(2).all(|w| w[0] < w[1]), "a step was said twice: {numbers:?}");
    Disturbed { digest: digest(&ended.run_dir), losses: ledger_losses(&ended.run_dir), deaths }
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

/// Appends `lines` to the log of all deaths, and returns every line that it has.
pub fn keep(log: &Path, lines: &[Value]) -> Vec<Value> {
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(log).expect("the log can be written");
    for line in lines {
        writeln!(file, "{line}").expect("the log can be written");
    }
    let text = std::fs::read_to_string(log).expect("it was written just now");
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}
