//! What the coordinator's process shows and tells: events to the views, milestones to the supervisor.

use super::token;
use crate::data::{Progress, Report};
use crate::launch::report::{self, Reporter};
use crate::monitor::bar::Bar;
use crate::monitor::json::Json;
use crate::monitor::plain::{grouped, Plain};
use crate::monitor::state::RunState;
use crate::monitor::{Display, View};
use crate::serve::control::Control;
use crate::serve::identity::{Identity, Terms};
use crate::serve::ledger::{self, Reader, LEDGER};
use crate::serve::setup::Observer;
use indicatif::{ProgressBar, ProgressDrawTarget};
use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use unisono_configs::run::{Cluster, Count};
use unisono_proto::dial::Role;
use unisono_proto::v1::{event::Body, Event};

/// Seconds between two step lines where no bar can be drawn.
const PACE: f64 = 2.0;

/// Entries read from the ledger at once.
const PAGE: usize = 256;
/// Before the ledger or an output that failed is tried again, and how often when the run is over.
const PAUSE: Duration = Duration::from_secs(1);
const TRIES: u32 = 10;

/// What is shown of a run's events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// For commands whose output is something else.
    Nothing,
    /// To a person.
    Progress,
    /// And to a script, those after entry `told` of the ledger.
    Events { told: u64 },
}

/// Looks on for a person, a script and the supervisor at once. The loop that steers the run only says which entry is the
/// newest; a thread shows what the ledger has, each entry once, so that an output that nobody takes holds no step up.
pub struct Screen {
    inner: Mutex<Inner>,
    desk: Arc<Desk>,
}

struct Inner {
    reporter: Reporter,
    workers: usize,
    restarts: u32,
    steps: u64,
    /// The run's directory, where no supervisor starts the workers: its user has to be told how they join.
    invitation: Option<PathBuf>,
    /// Of the token that they join with.
    terms: Terms,
}

/// Between the loop and the thread that shows.
#[derive(Default)]
struct Desk {
    shown: Mutex<Shown>,
    changed: Condvar,
}

#[derive(Default)]
struct Shown {
    /// The first entry that is not shown yet; nothing is known of it before the run's first.
    next: Option<u64>,
    newest: u64,
    /// Nothing follows.
    closed: bool,
    /// The thread has ended.
    ended: bool,
    state: RunState,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Screen {
    pub fn new(reporter: Reporter, run_dir: &Path, cluster: &Cluster, show: Show) -> Self {
        let mut views: Vec<Box<dyn View>> = Vec::new();
        let next = match show {
            Show::Events { told } => Some(told + 1),
            _ => None,
        };
        if next.is_some() {
            match std::io::stdout().as_fd().try_clone_to_owned() {
                Ok(stdout) => views.push(Box::new(Json::new(std::fs::File::from(stdout)))),
                Err(error) => tracing::error!(%error, "standard output cannot be written"),
            }
        }
        if show != Show::Nothing {
            match std::io::stderr().is_terminal() {
                true => views.push(Box::new(Bar::default())),
                // The command says a failure's sentence itself.
                false => views.push(Box::new(Plain::new(std::io::stderr(), PACE).without_failure())),
            }
        }
        let desk = Arc::new(Desk::default());
        *desk.lock() = Shown { next, ended: views.is_empty(), ..Shown::default() };
        if !views.is_empty() {
            let (desk, ledger, display) = (desk.clone(), run_dir.join(LEDGER), Display::new(views));
            std::thread::spawn(move || AtItsEnd(desk).show(&ledger, display));
        }
        let workers = match cluster.workers {
            Count::Exactly(workers) => workers,
            Count::Auto => 1,
        };
        let restarts = cluster.restarts;
        let uses = match cluster.token_uses {
            Count::Exactly(uses) => uses,
            // One for each, and one for whoever replaces it without its pass.
            Count::Auto => 2 * workers,
        };
        let terms = Terms { hours: cluster.token_hours, uses: Some(u32::try_from(uses).unwrap_or(u32::MAX)) };
        let invitation = (!reporter.supervised()).then(|| run_dir.to_path_buf());
        Screen { inner: Mutex::new(Inner { reporter, workers, restarts, steps: 0, invitation, terms }), desk }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a supervisor started this process.
    pub fn supervised(&self) -> bool {
        self.lock().reporter.supervised()
    }

    /// Waits until all events are shown, at most `patience`. What they told, and the screen free for the last words.
    pub fn finish(&self, patience: Option<Duration>) -> RunState {
        let mut shown = self.desk.lock();
        shown.closed = true;
        self.desk.changed.notify_all();
        let under_way = |shown: &mut Shown| !shown.ended;
        let patience = patience.unwrap_or(Duration::MAX);
        let waited = self.desk.changed.wait_timeout_while(shown, patience, under_way);
        std::mem::take(&mut waited.unwrap_or_else(PoisonError::into_inner).0.state)
    }
}

/// However the thread ends, nobody waits for it any more.
struct AtItsEnd(Arc<Desk>);

impl Drop for AtItsEnd {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

impl AtItsEnd {
    /// Shows what the ledger has until nothing follows.
    fn show(self, ledger: &Path, mut display: Display) {
        let (mut reader, mut tries) = (None, 0);
        loop {
            let idle = |shown: &mut Shown| !shown.closed && shown.next.is_none_or(|next| next > shown.newest);
            let shown = self.0.changed.wait_while(self.0.lock(), idle).unwrap_or_else(PoisonError::into_inner);
            let (next, newest, closed) = (shown.next.unwrap_or(u64::MAX), shown.newest, shown.closed);
            drop(shown);
            let outcome = match next > newest {
                true => Ok(None),
                false => page(&mut reader, ledger, next - 1).map(|events| {
                    events.iter().for_each(|event| display.observe(event));
                    events.last().map(|event| event.sequence)
                }),
            };
            if let Ok(Some(last)) = outcome {
                self.0.lock().next = Some(last + 1);
            }
            let caught_up = display.catch_up();
            match &outcome {
                Ok(Some(_)) if caught_up => tries = 0,
                // All is shown.
                Ok(None) if caught_up && next > newest => {
                    if closed {
                        break;
                    }
                }
                _ => {
                    tries += 1;
                    if tries == 1 {
                        tracing::warn!(?outcome, "an event cannot be shown yet");
                    }
                    if closed && tries > TRIES {
                        eprintln!("unisono: not every event could be shown; the ledger has them all");
                        break;
                    }
                    std::thread::sleep(PAUSE);
                }
            }
        }
        // The views leave the screen before the last words.
        let Display { state, .. } = std::mem::take(&mut display);
        self.0.lock().state = state;
    }
}

fn page(reader: &mut Option<Reader>, ledger: &Path, after: u64) -> Result<Vec<Event>, ledger::Error> {
    let reader = match reader {
        Some(reader) => reader,
        None => reader.insert(Reader::open(ledger)?),
    };
    reader.after(after, PAGE)
}

impl Observer for Screen {
    fn listening(&self, control: &Control) {
        let mut inner = self.lock();
        if let Some(run_dir) = &inner.invitation {
            eprint!("{}", invitation(run_dir, control, inner.workers, inner.terms));
        }
        let ready = report::Report::Ready {
            address: control.address.clone(),
            workers: inner.workers,
            token: control.tokens.worker.clone(),
            restarts: inner.restarts,
        };
        inner.reporter.send(&ready);
    }

    fn event(&self, event: &Event) {
        let mut shown = self.desk.lock();
        shown.newest = event.sequence;
        shown.next.get_or_insert(event.sequence);
        self.desk.changed.notify_all();
        drop(shown);
        let mut inner = self.lock();
        match &event.body {
            Some(Body::Started(started)) => inner.steps = started.steps,
            Some(Body::Step(step)) => {
                let steps = inner.steps;
                inner.reporter.send(&report::Report::Progress { step: step.step, steps });
            }
            Some(Body::Done(_) | Body::Failed(_) | Body::Stopped(_)) => inner.reporter.send(&report::Report::Over),
            Some(Body::Lost(lost)) => inner.reporter.send(&report::Report::Lost { pid: lost.pid }),
            _ => {}
        }
    }
}

/// How workers join. A token that ends goes into a file of its own, so that it can be copied to their machines.
fn invitation(run_dir: &Path, control: &Control, workers: usize, terms: Terms) -> String {
    let path = run_dir.join("worker.token");
    let made = Identity::seal_of(run_dir).map_err(|error| error.to_string()).and_then(|seal| {
        let token = seal.invite(Role::Worker, terms);
        let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        let written = opened.and_then(|mut file| writeln!(file, "{}", token.reveal()));
        written.map_err(|error| format!("{}: {error}", path.display()))
    });
    let told = match made {
        Ok(()) => format!("with {} ({})", path.display(), token::terms(Role::Worker, terms)),
        Err(problem) => format!(
            "with what `unisono token {} --uses {}` prints as worker.token ({problem})",
            run_dir.display(),
            terms.uses.unwrap_or(1)
        ),
    };
    let plural = if workers == 1 { "worker" } else { "workers" };
    format!(
        "waiting for {workers} {plural}; on each machine, {told}:\n  UNISONO_TOKEN_FILE=worker.token unisono-worker join {}\n",
        control.address
    )
}

/// Reading and tokenizing, as a bar where there is a terminal.
pub struct Reading {
    bar: ProgressBar,
}

impl Default for Reading {
    fn default() -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(8));
        Reading { bar }
    }
}

impl Progress for Reading {
    fn begin(&self, file: &str, size: u64) {
        self.bar.inc_length(size);
        self.bar.set_message(file.to_owned());
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// One line on what became of a data table, and one for each row that was left out and is shown.
pub fn data_lines(report: &Report) -> String {
    let mut out = format!(
        "data {}: {} rows ({} train, {} validation, {} test)",
        report.task,
        grouped(report.rows),
        grouped(report.train),
        grouped(report.validation),
        grouped(report.test),
    );
    out += &match report.is_whole() {
        true => format!(
            ", {} prompt and {} completion tokens, longest {}",
            grouped(report.prompt_tokens),
            grouped(report.completion_tokens),
            report.longest
        ),
        false => ", tokenized ahead of training".to_owned(),
    };
    for (count, what) in [
        (report.truncated, "completions cut at train.max_length"),
        (report.dropped, "rows dropped"),
        (report.leaked, "training rows that are also held out"),
    ] {
        if count > 0 {
            out += &format!(", {} {what}", grouped(count));
        }
    }
    out.push('\n');
    for bad in &report.bad {
        out += &format!("  dropped {bad}\n");
    }
    out
}
