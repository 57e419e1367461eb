//! The way to a run: its directory or its coordinator's address, live or from the ledger that it left.

use super::state::RunState;
use crate::serve::control::Control;
use crate::serve::ledger::{Reader, LEDGER};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{sleep, Instant};
use unisono_proto::dial::{self, Role, Token};
use unisono_proto::v1::{Event, StatusReply, StatusRequest, WatchRequest};

/// Between two attempts to reach a coordinator.
const RETRY: Duration = Duration::from_millis(300);
/// How long a coordinator may stay out of reach while nothing says that it is gone.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a coordinator that was killed may take to come back.
const RESTART: Duration = Duration::from_secs(5);
/// Ledger entries read at once.
const PAGE: usize = 1000;

/// Why a run cannot be looked at. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no run in ./runs; name a run's directory, or the address of a coordinator")]
    NoRun,
    #[error("{path}: not a run's directory (it has neither control.json nor ledger.sqlite); name one under runs/")]
    NotARun { path: PathBuf },
    #[error(transparent)]
    Dial(#[from] dial::Error),
    #[error(transparent)]
    Control(#[from] crate::serve::control::Error),
    #[error(transparent)]
    Ledger(#[from] crate::serve::ledger::Error),
    #[error("{address}: the coordinator refused ({message})")]
    Refused { address: String, message: String },
    #[error("the coordinator is gone and did not say how the run ended (after step {step}); look into {place}")]
    Gone { step: u64, place: String },
}

impl Error {
    /// Whether the command was given something wrong, rather than the run having failed.
    pub fn bad_input(&self) -> bool {
        !matches!(self, Error::Gone { .. })
    }
}

/// What to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A run's directory on this machine.
    Run(PathBuf),
    /// host:port; the token comes from the environment.
    Address(String),
}

impl Target {
    /// A directory, else an address; nothing: the newest run in ./runs.
    pub fn parse(text: Option<&str>) -> Result<Self, Error> {
        let Some(text) = text else { return newest(Path::new("runs")).map(Target::Run).ok_or(Error::NoRun) };
        let path = PathBuf::from(text);
        if !path.is_dir() && !text.contains('/') && text.contains(':') {
            return Ok(Target::Address(text.into()));
        }
        let known = path.join(crate::serve::control::CONTROL).exists()
            || path.join(LEDGER).exists()
            || path.join("config.toml").exists();
        if known {
            Ok(Target::Run(path))
        } else {
            Err(Error::NotARun { path })
        }
    }

    fn place(&self) -> String {
        match self {
            Target::Run(path) => path.display().to_string(),
            Target::Address(address) => address.clone(),
        }
    }

    /// Address and token; for a run as its control.json gives them now.
    fn access(&self) -> Result<(String, Token), Error> {
        match self {
            Target::Run(path) => {
                let control = Control::read(path)?;
                Ok((control.address.clone(), control.token(Role::Monitor)?))
            }
            Target::Address(address) => Ok((address.clone(), Token::from_environment()?)),
        }
    }

    /// Whether the coordinator may still come, or come back.
    fn may_live(&self) -> bool {
        match self {
            Target::Address(_) => true,
            Target::Run(path) => match Control::read(path) {
                Ok(control) => Path::new(&format!("/proc/{}", control.pid)).exists(),
                // Not written yet, perhaps.
                Err(_) => true,
            },
        }
    }
}

fn newest(runs: &Path) -> Option<PathBuf> {
    let runs = std::fs::read_dir(runs).ok()?.flatten().filter(|e| e.path().join("config.toml").exists());
    runs.max_by_key(|e| e.metadata().and_then(|m| m.modified()).ok()).map(|e| e.path())
}

/// Gives `sink` every event of the run, from its first on, until it has ended; returns what they tell. A lost
/// connection is made again, and goes on where it was.
pub async fn follow(target: &Target, sink: &mut dyn FnMut(&Event)) -> Result<RunState, Error> {
    let mut state = RunState::default();
    let mut heard = Instant::now();
    loop {
        let before = state.sequence;
        let lost = match watch(target, &mut state, sink).await {
            Ok(()) => None,
            // Neither gets better with time.
            Err(error @ (Error::Dial(dial::Error::WrongAuthority { .. }) | Error::Refused { .. })) => {
                return Err(error)
            }
            Err(
                error @ Error::Dial(dial::Error::NoToken | dial::Error::Token { .. } | dial::Error::Address { .. }),
            ) => return Err(error),
            Err(error) => Some(error),
        };
        if let Target::Run(path) = target {
            replay(path, &mut state, sink)?;
        }
        if state.ended() {
            return Ok(state);
        }
        // A stream that ended in order was a coordinator's, also where it had nothing to tell.
        if state.sequence > before || lost.is_none() {
            heard = Instant::now();
        }
        // One that was killed is started again.
        let patience = if target.may_live() { PATIENCE } else { RESTART };
        if heard.elapsed() > patience {
            return match lost {
                Some(error) if state.sequence == 0 => Err(error),
                _ => Err(Error::Gone { step: state.step_number(), place: target.place() }),
            };
        }
        sleep(RETRY).await;
    }
}

/// One connection's worth of events.
async fn watch(target: &Target, state: &mut RunState, sink: &mut dyn FnMut(&Event)) -> Result<(), Error> {
    let (address, token) = target.access()?;
    let mut client = dial::monitor(dial::dial(&address, &token).await?);
    let mut request = tonic::Request::new(WatchRequest { after: state.sequence });
    token.authorize(&mut request);
    let mut events = client.watch(request).await.map_err(|status| refused(&address, &status))?.into_inner();
    // The coordinator ends the stream; an end within it was that of an earlier start. A stream that breaks is a coordinator that ended: what it wrote before is in the ledger.
    while let Ok(Some(event)) = events.message().await {
        if state.apply(&event) {
            sink(&event);
        }
    }
    Ok(())
}

fn refused(address: &str, status: &tonic::Status) -> Error {
    match status.code() {
        tonic::Code::Unauthenticated | tonic::Code::PermissionDenied | tonic::Code::Unimplemented => {
            Error::Refused { address: address.into(), message: status.message().into() }
        }
        _ => Error::Dial(dial::Error::Connect { address: address.into(), problem: status.message().into() }),
    }
}

/// What the ledger holds beyond `state`.
pub fn replay(run_dir: &Path, state: &mut RunState, sink: &mut dyn FnMut(&Event)) -> Result<(), Error> {
    let path = run_dir.join(LEDGER);
    if !path.exists() {
        return Ok(());
    }
    let reader = Reader::open(&path)?;
    loop {
        let events = reader.after(state.sequence, PAGE)?;
        if events.is_empty() {
            return Ok(());
        }
        for event in &events {
            if state.apply(event) {
                sink(event);
            }
        }
    }
}

/// The coordinator's own word on where it is; `None` where it cannot be reached and the ledger has to do.
pub async fn status(target: &Target) -> Result<Option<StatusReply>, Error> {
    let ask = async {
        let (address, token) = target.access()?;
        let mut client = dial::monitor(dial::dial(&address, &token).await?);
        let mut request = tonic::Request::new(StatusRequest {});
        token.authorize(&mut request);
        let reply = client.status(request).await.map_err(|status| refused(&address, &status))?;
        Ok(Some(reply.into_inner()))
    };
    match (ask.await, target) {
        (Err(Error::Control(_) | Error::Dial(dial::Error::Connect { .. })), Target::Run(_)) => Ok(None),
        (answer, _) => answer,
    }
}
