//! What the coordinator's process shows and tells: events to the views, milestones to the supervisor.

use crate::data::{Progress, Report};
use crate::launch::report::{self, Reporter};
use crate::monitor::bar::Bar;
use crate::monitor::json::Json;
use crate::monitor::plain::{grouped, Plain};
use crate::monitor::state::RunState;
use crate::monitor::{Display, View};
use crate::serve::control::Control;
use crate::serve::setup::Observer;
use indicatif::{ProgressBar, ProgressDrawTarget};
use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use unisono_configs::run::{Cluster, Count};
use unisono_proto::v1::{event::Body, Event};

/// Seconds between two step lines where no bar can be drawn.
const PACE: f64 = 2.0;

/// Looks on for a person, a script and the supervisor at once.
pub struct Screen {
    inner: Mutex<Inner>,
}

struct Inner {
    display: Display,
    reporter: Reporter,
    workers: usize,
    restarts: u32,
    /// The run's directory, where no supervisor starts the workers: its user has to be told how they join.
    invitation: Option<PathBuf>,
}

impl Screen {
    /// `quiet` shows nothing of the run's events, for commands whose output is something else.
    pub fn new(reporter: Reporter, run_dir: &Path, cluster: &Cluster, json: bool, quiet: bool) -> Self {
        let mut views: Vec<Box<dyn View>> = Vec::new();
        if json && !quiet {
            views.push(Box::new(Json::new(std::io::stdout())));
        }
        if !quiet {
            match std::io::stderr().is_terminal() {
                true => views.push(Box::new(Bar::default())),
                // The command says a failure's sentence itself.
                false => views.push(Box::new(Plain::new(std::io::stderr(), PACE).without_failure())),
            }
        }
        let workers = match cluster.workers {
            Count::Exactly(workers) => workers,
            Count::Auto => 1,
        };
        let restarts = cluster.restarts;
        let invitation = (!reporter.supervised()).then(|| run_dir.to_path_buf());
        Screen { inner: Mutex::new(Inner { display: Display::new(views), reporter, workers, restarts, invitation }) }
    }

    /// Whether a supervisor started this process.
    pub fn supervised(&self) -> bool {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).reporter.supervised()
    }

    /// What the events told, and the screen free for the last words.
    pub fn finish(&self) -> RunState {
        let mut inner = self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        std::mem::take(&mut inner.display).state
    }
}

impl Observer for Screen {
    fn listening(&self, control: &Control) {
        let mut inner = self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(run_dir) = &inner.invitation {
            eprint!("{}", invitation(run_dir, control, inner.workers));
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
        let mut inner = self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        inner.display.observe(event);
        match &event.body {
            Some(Body::Step(step)) => {
                let steps = inner.display.state.steps();
                inner.reporter.send(&report::Report::Progress { step: step.step, steps });
            }
            Some(Body::Done(_) | Body::Failed(_) | Body::Stopped(_)) => inner.reporter.send(&report::Report::Over),
            Some(Body::Lost(lost)) => inner.reporter.send(&report::Report::Lost { pid: lost.pid }),
            _ => {}
        }
    }
}

/// How workers join. The token goes into a file of its own, so that it can be copied to their machines.
fn invitation(run_dir: &Path, control: &Control, workers: usize) -> String {
    let path = run_dir.join("worker.token");
    let written = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
    let told = match written.and_then(|mut file| writeln!(file, "{}", control.tokens.worker)) {
        Ok(()) => format!("with {}", path.display()),
        Err(error) => format!(
            "with tokens.worker of {}/control.json as worker.token ({}: {error})",
            run_dir.display(),
            path.display()
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
