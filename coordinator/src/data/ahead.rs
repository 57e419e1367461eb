//! Tokenizing ahead of training: rows in the order of the plan, on threads that take only the time that workers leave.
//!
//! It does not stop at a window: tokens go to the disk and what is kept of a row is a few bytes, so it runs on to the end
//! of the plan, and a row that cannot be trained on is found minutes into a run rather than days. Steps become known in
//! order, in portions that grow: the first step must not wait for the second.

use super::dataset::Dataset;
use super::gate::Severity;
use super::referee::Referee;
use super::Error;
use crate::run::plan::{Plan, Rows};
use rayon::ThreadPool;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// Rows of the largest portion.
const PORTION: usize = 2048;
/// Weight of the threads: the least there is, yet far more than training needs of it. A core that tokenizes makes about a
/// million tokens per second, so even a fiftieth of one feeds what the other cores can train on.
const NICE: i32 = 19;

/// What is told about the plan's rows.
#[derive(Debug, Clone, PartialEq)]
pub enum Notice {
    /// The rows of the steps up to `steps` are known.
    Prepared { steps: u64 },
    /// A row of `step` makes it impossible to go on; a sentence.
    Unprepared { step: u64, message: String },
}

/// The thread that runs ahead. It ends after the portion that it is working on when this is dropped.
pub struct Ahead {
    stop: Arc<AtomicBool>,
}

impl Ahead {
    /// Tokenizes the rows of the steps after `start`. `tell` returns false when nobody listens any more.
    pub fn spawn(
        dataset: Arc<Dataset>,
        plan: Arc<Plan>,
        start: u64,
        tell: impl Fn(Notice) -> bool + Send + 'static,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        std::thread::Builder::new().name("tokenizing".into()).spawn(move || {
            let pool = match pool() {
                Ok(pool) => pool,
                Err(error) => {
                    let message = format!("no thread can be started to tokenize rows ({error})");
                    tell(Notice::Unprepared { step: start + 1, message });
                    return;
                }
            };
            let go_on = || !stopped.load(Ordering::Relaxed);
            walk(&dataset, &plan, start, &pool, go_on, tell);
        })?;
        Ok(Ahead { stop })
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn pool() -> Result<ThreadPool, rayon::ThreadPoolBuildError> {
    rayon::ThreadPoolBuilder::new()
        .thread_name(|index| format!("tokenizing-{index}"))
        .start_handler(|_| {
            // On Linux this is the calling thread's own. Refused, it stays as it was.
            rustix::process::setpriority_process(None, NICE).ok();
        })
        .build()
}

fn walk(
    dataset: &Dataset,
    plan: &Plan,
    start: u64,
    pool: &ThreadPool,
    go_on: impl Fn() -> bool,
    tell: impl Fn(Notice) -> bool,
) {
    let left_out = (0..dataset.train_rows() as u32).filter(|&row| dataset.is_left_out(row));
    let mut referee = Referee::new(dataset, left_out);
    let (mut step, mut portion) = (start, 1);
    while step < plan.steps() && go_on() {
        if dataset.all_known() && step > start {
            // What the gate says of all tokens is not said of a part of them: it speaks of shares.
            match judge(dataset) {
                None => tell(Notice::Prepared { steps: plan.steps() }),
                Some(message) => tell(Notice::Unprepared { step, message }),
            };
            return;
        }
        let first = step + 1;
        let mut rows = Vec::new();
        while step < plan.steps() && rows.len() < portion {
            step += 1;
            rows.extend(plan.places(step));
        }
        portion = (rows.len() * 2).min(PORTION);
        if let Err((step, error)) = prepare(dataset, plan, first..=step, &rows, pool, &mut referee) {
            tell(Notice::Unprepared { step, message: error.to_string() });
            return;
        }
        if !tell(Notice::Prepared { steps: step }) {
            return;
        }
    }
}

/// Why the gate refuses the tokens of the rows, which are known by now; what it only warns of is logged.
fn judge(dataset: &Dataset) -> Option<String> {
    let findings = dataset.token_findings();
    for finding in findings.iter().filter(|f| f.severity == Severity::Warning) {
        tracing::warn!(task = finding.task, kind = finding.kind.id(), "{}", finding.text);
    }
    let refused = findings.iter().find(|f| f.severity == Severity::Error)?;
    Some(format!(
        "the gate refuses this data: {} in task \"{}\" ({}); change the data, or set gate.{} = \"warn\"",
        refused.kind.id(),
        refused.task,
        refused.text,
        refused.kind.key()
    ))
}

/// Everything that dealing `steps` needs to know; an error with the step that it belongs to.
fn prepare(
    dataset: &Dataset,
    plan: &Plan,
    steps: std::ops::RangeInclusive<u64>,
    rows: &[u32],
    pool: &ThreadPool,
    referee: &mut Referee<'_>,
) -> Result<(), (u64, Error)> {
    let Some(store) = dataset.store() else { return Ok(()) };
    let known = rows.iter().all(|&row| store.is_known(row));
    if !known {
        pool.install(|| store.resolve(rows)).map_err(|error| (*steps.start(), error))?;
    }
    for step in steps {
        let rows = plan.places(step);
        let good = rows.iter().any(|&row| !store.is_left_out(row));
        // A step without a row looks for one further on, and waits for it.
        let rows = if good { rows } else { plan.reach(step) };
        referee.see(rows.iter().copied()).map_err(|error| (step, error))?;
        if !rows.iter().any(|&row| !store.is_left_out(row)) {
            let table = dataset.tasks.join("\", \"");
            let problem = "no row is left to train on, all are dropped; correct the rows".into();
            return Err((step, Error::Table { table, problem }));
        }
    }
    Ok(())
}
