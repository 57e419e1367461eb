//! `monitor` and `status`: looking at a run from another terminal.

use super::{lose, print, Error, Result};
use crate::monitor::bar::Bar;
use crate::monitor::conn::{self, Target};
use crate::monitor::json::Json;
use crate::monitor::plain::{clock, failure, grouped, Plain};
use crate::monitor::state::RunState;
use crate::monitor::{summary, Display, View};
use serde_json::json;
use std::io::IsTerminal;
use std::path::Path;
use unisono_proto::v1::StatusReply;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono monitor runs/tiny-001
  unisono monitor --plain | grep validation
  UNISONO_TOKEN_FILE=monitor.token unisono monitor node1:7070

The token of ADDR is made on the coordinator's machine: unisono token RUN --role monitor > monitor.token

Exit codes: 0 the run finished or was stopped, 2 it cannot be looked at, 3 it failed.")]
pub struct MonitorArgs {
    /// A run's directory, or its coordinator's host:port (token from UNISONO_TOKEN or UNISONO_TOKEN_FILE);
    /// default: the newest in ./runs
    #[arg(value_name = "RUN|ADDR")]
    target: Option<String>,
    /// One line per event instead of a progress bar
    #[arg(long)]
    plain: bool,
    /// One JSON object per event on standard output
    #[arg(long, conflicts_with = "plain")]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono status runs/tiny-001
  unisono status runs/tiny-001 --json | jq .step")]
pub struct StatusArgs {
    /// A run's directory, or its coordinator's host:port (token from UNISONO_TOKEN or UNISONO_TOKEN_FILE);
    /// default: the newest in ./runs
    #[arg(value_name = "RUN|ADDR")]
    target: Option<String>,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

impl From<conn::Error> for Error {
    fn from(error: conn::Error) -> Self {
        if error.bad_input() {
            Error::bad_input(error)
        } else {
            Error::failed(error)
        }
    }
}

pub fn monitor(args: MonitorArgs) -> Result<()> {
    let target = Target::parse(args.target.as_deref())?;
    let view: Box<dyn View> = match (args.json, args.plain || !std::io::stderr().is_terminal()) {
        (true, _) => Box::new(Json::new(std::io::stdout())),
        (false, true) => Box::new(Plain::new(std::io::stdout(), 0.0).without_failure()),
        (false, false) => Box::new(Bar::default()),
    };
    let mut display = Display::new(vec![view]);
    let state = runtime()?.block_on(conn::follow(&target, &mut |event| display.observe(event)))?;
    // The bar leaves the screen before the last words.
    if !display.catch_up() {
        lose(&std::io::Error::other("not every event could be written"));
    }
    drop(display);
    match &state.failed {
        Some(failed) => Err(Error::Failed(failure(failed))),
        None if args.json => Ok(()),
        None => {
            let stopped = state.stopped.as_ref().map(|stopped| format!("\n{}\n", stopped.message));
            print(&format!("\n{}{}", summary::summary(&state), stopped.unwrap_or_default()));
            Ok(())
        }
    }
}

pub fn status(args: StatusArgs) -> Result<()> {
    let target = Target::parse(args.target.as_deref())?;
    let reply = runtime()?.block_on(conn::status(&target))?;
    let mut state = RunState::default();
    if let Target::Run(path) = &target {
        conn::replay(path, &mut state, &mut |_| {})?;
    }
    let text = match args.json {
        true => format!("{}\n", object(&target, &state, reply.as_ref())),
        false => screen(&target, &state, reply.as_ref()),
    };
    print(&text);
    Ok(())
}

/// What the run is doing: the coordinator's word, else what the ledger ends with.
fn phase(state: &RunState, reply: Option<&StatusReply>) -> String {
    match reply {
        Some(reply) => reply.state.clone(),
        None if state.done.is_some() => "finished".into(),
        None if state.failed.is_some() => "failed".into(),
        None if state.stopped.is_some() => "stopped".into(),
        None => "ended without a last word".into(),
    }
}

fn progress(state: &RunState, reply: Option<&StatusReply>) -> (u64, u64) {
    let (step, steps) = reply.map_or((0, 0), |r| (r.step, r.steps));
    (step.max(state.step_number()), steps.max(state.steps()))
}

fn directory(target: &Target, reply: Option<&StatusReply>) -> String {
    match (target, reply) {
        (Target::Run(path), _) => Path::display(path).to_string(),
        (_, Some(reply)) => reply.run_dir.clone(),
        (Target::Address(address), None) => address.clone(),
    }
}

fn screen(target: &Target, state: &RunState, reply: Option<&StatusReply>) -> String {
    let (step, steps) = progress(state, reply);
    let mut out = format!("{}: {}, step {step}/{steps}", directory(target, reply), phase(state, reply));
    if let Some(last) = &state.last_step {
        out += &format!(", loss {:.4}", last.loss);
    }
    if let (Some(rate), None) = (state.recent_tokens_per_second(), &state.done) {
        out += &format!(", {} tokens/s", grouped(rate.round() as u64));
    }
    if let (Some(eta), false) = (state.eta_seconds(), state.ended()) {
        out += &format!(", ETA {}", clock(eta));
    }
    out.push('\n');
    for worker in reply.iter().flat_map(|r| &r.workers) {
        out += &format!(
            "worker      rank {} on {} (pid {}): {}, last heard {:.1} s ago\n",
            worker.rank,
            worker.host,
            worker.pid,
            worker.phase().word(),
            worker.silent_seconds
        );
    }
    let failed = state.failed.as_ref().or(reply.and_then(|r| r.failure.as_ref()));
    if let Some(failed) = failed {
        out += &format!("failed      {}\n", failure(failed));
    }
    if let Some(stopped) = &state.stopped {
        out += &format!("stopped     {}\n", stopped.message);
    }
    if let Some(warning) = &state.warning {
        out += &format!("warning     {}\n", warning.message);
    }
    out += &summary::summary(state);
    out
}

fn object(target: &Target, state: &RunState, reply: Option<&StatusReply>) -> serde_json::Value {
    let (step, steps) = progress(state, reply);
    let workers = reply.iter().flat_map(|r| &r.workers).map(|w| {
        json!({"rank": w.rank, "host": w.host, "pid": w.pid, "phase": w.phase().word(), "silent_seconds": w.silent_seconds})
    });
    json!({
        "run_dir": directory(target, reply),
        "state": phase(state, reply),
        "step": step,
        "steps": steps,
        "loss": state.last_step.as_ref().map(|s| s.loss),
        "tokens_per_second": state.recent_tokens_per_second(),
        "eta_seconds": state.eta_seconds().filter(|_| !state.ended()),
        "workers": workers.collect::<Vec<_>>(),
        "failure": state.failed.as_ref().or(reply.and_then(|r| r.failure.as_ref())).map(failure),
        "stopped": state.stopped.as_ref().map(|s| &s.message),
        "quarantined": state.quarantined,
        "warning": state.warning.as_ref().map(|w| &w.message),
        "digest": state.done.as_ref().map(|d| &d.digest),
        "export": state.done.as_ref().map(|d| &d.export),
    })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::failed)
}
