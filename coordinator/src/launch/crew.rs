//! The children of one supervisor: started, watched, started again when they die, and ended with it.

use super::local::{Ended, Error, Launch, Signals, LAST_WORDS};
use super::member::{forward, manner, Member};
use super::relay::Relay;
use super::report::Report;
use super::restarts::Restarts;
use super::{child, LIFELINE_FD, LISTEN_FD, REPORT_FD, TOKEN};
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{sleep_until, Instant};

/// How long the coordinator may take to name the fault of a worker that died for good.
const TESTIMONY: Duration = Duration::from_secs(5);
/// How long the coordinator may take to stop when asked to.
const STOP: Duration = Duration::from_secs(10);
/// What the dynamic loader exits with when a library or a symbol is missing.
pub(super) const CANNOT_LOAD: i32 = 127;
/// A worker's exit code when the user's input is at fault.
const BAD_INPUT: i32 = 2;
/// Deaths of the coordinator in a row that a run survives.
const COORDINATORS: u32 = 3;

pub(super) struct Crew {
    launch: Launch,
    listener: TcpListener,
    coordinator: Member,
    coordinators: Restarts,
    /// With what they join, once the coordinator has said it.
    terms: Option<Terms>,
    workers: Vec<Slot>,
    /// Coordinators so far.
    starts: u32,
    /// Where a coordinator that is started again goes on.
    run_dir: Option<PathBuf>,
    /// Entries that the run's ledger had before the first of them.
    history: u64,
    relay: Option<Relay>,
    progress: Option<(u64, u64)>,
    /// The signal by which somebody asked the run to stop: nobody is started again.
    pub asked: Option<i32>,
    /// A coordinator accepts workers. While it reads the data, none of them can join, and none of their deaths tells anything.
    ready: bool,
    /// The run has ended: nobody is needed any more, and whoever joins is sent away.
    over: bool,
    sender: mpsc::UnboundedSender<Report>,
    lifeline: PipeReader,
    /// Held, never written: its end is the children's.
    _lifeline_writer: PipeWriter,
}

/// A place for a worker.
struct Slot {
    worker: Member,
    restarts: Restarts,
    /// Which coordinator the worker was started under.
    start: u32,
}

struct Terms {
    address: String,
    token: String,
    restarts: u32,
}

impl Crew {
    pub fn start(launch: Launch) -> Result<(Self, mpsc::UnboundedReceiver<Report>), Error> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (lifeline, writer) = io::pipe()?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut relay = match launch.events {
            true => Some(Relay::new(std::fs::File::from(io::stdout().as_fd().try_clone_to_owned()?))),
            false => None,
        };
        let coordinator = coordinate(&launch, &launch.arguments, &listener, &lifeline, &sender, relay.as_mut())?;
        let crew = Crew {
            launch,
            listener,
            coordinator,
            coordinators: Restarts::default(),
            terms: None,
            workers: Vec::new(),
            starts: 1,
            run_dir: None,
            history: 0,
            relay,
            progress: None,
            asked: None,
            ready: false,
            over: false,
            sender,
            lifeline,
            _lifeline_writer: writer,
        };
        Ok((crew, receiver))
    }

    /// As many workers as the coordinator wants, those included that are there or on their way.
    fn hire(&mut self, workers: usize) -> Result<(), Error> {
        for slot in 0..workers {
            match self.workers.get(slot) {
                None => {
                    let (worker, start) = (self.worker()?, self.starts);
                    self.workers.push(Slot { worker, restarts: Restarts::default(), start });
                }
                // It left when its work seemed done; now there is more.
                Some(Slot { worker, restarts, .. }) if worker.ended.is_some() && restarts.due().is_none() => {
                    self.fill(slot)?;
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// A new worker in a place whose worker has ended.
    fn fill(&mut self, slot: usize) -> Result<(), Error> {
        self.workers[slot].worker = self.worker()?;
        self.workers[slot].restarts.started();
        self.workers[slot].start = self.starts;
        Ok(())
    }

    fn worker(&self) -> Result<Member, Error> {
        let Some(terms) = &self.terms else {
            return Err(io::Error::other("no coordinator has told its address").into());
        };
        let mut command = Command::new(&self.launch.worker);
        command
            .args(["join", &terms.address])
            .env(TOKEN, &terms.token)
            .env(LIFELINE_FD, self.lifeline.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        child::bind(&mut command, vec![self.lifeline.as_raw_fd()]);
        let spawned = command.spawn();
        let mut child = spawned.map_err(|source| Error::Spawn { path: self.launch.worker.clone(), source })?;
        let words = Arc::default();
        if let Some(stderr) = child.stderr.take() {
            let (words, pid) = (Arc::clone(&words), child.id());
            std::thread::spawn(move || forward(stderr, pid, &words));
        }
        Ok(Member { child, ended: None, words })
    }

    /// Until the run has ended or must end; children may still live then.
    pub async fn watch(
        &mut self,
        signals: &mut Signals,
        reports: &mut mpsc::UnboundedReceiver<Report>,
    ) -> Result<Ended, Error> {
        let mut suspicion: Option<Instant> = None;
        loop {
            while let Ok(report) = reports.try_recv() {
                self.heed(report)?;
            }
            let now = Instant::now();
            if self.coordinators.due().is_none() {
                if let Some(status) = self.coordinator.reap() {
                    if let Some(signal) = self.asked.filter(|asked| status.signal() == Some(*asked)) {
                        // It had not come so far that it could save.
                        return Ok(Ended::Interrupted { signal, place: self.place(), advice: self.advice() });
                    }
                    if self.asked.is_some()
                        || status.code().is_some()
                        || self.coordinators.died(now.into(), COORDINATORS).is_none()
                    {
                        return self.judge_coordinator(status);
                    }
                    self.say_restart("the coordinator", self.coordinator.child.id(), status);
                    (self.ready, suspicion) = (false, None);
                }
            }
            if self.reap_workers(now).await? {
                suspicion.get_or_insert(now + TESTIMONY);
            }
            let due = self.start_again(now)?;
            // A coordinator whose run is over waits for whoever reads its events, and that has an end.
            let unread =
                self.relay.as_ref().filter(|_| self.over).and_then(Relay::patience_ends).map(Instant::from_std);
            if let Some(relay) = self.relay.as_ref().filter(|_| unread.is_some_and(|at| at <= now)) {
                relay.give_up();
            }
            let unread = unread.filter(|at| *at > now);
            let deadline = suspicion.into_iter().chain(due).chain(unread).min();
            tokio::select! {
                _ = signals.child.recv() => {}
                Some(report) = reports.recv() => self.heed(report)?,
                // The coordinator saves and ends the run; it knows how long that may take. Before there are workers there
                // is nothing to save, and whoever asks twice does not want to wait.
                signal = signals.requests.next() => {
                    if self.asked.is_some() || self.workers.is_empty() || self.coordinators.due().is_some() {
                        return Ok(Ended::Interrupted { signal, place: self.place(), advice: self.advice() });
                    }
                    // How long saving may take, and who is missing for it, the coordinator knows.
                    (self.asked, suspicion) = (Some(signal), None);
                    self.coordinator.send(signal);
                }
                () = sleep_until(deadline.unwrap_or(now)), if deadline.is_some() => {
                    if suspicion.is_some_and(|at| at <= Instant::now()) {
                        return Err(self.judge_worker());
                    }
                }
            }
        }
    }

    /// Looks who has died. True where somebody is not to be started again: the coordinator ought to say why.
    async fn reap_workers(&mut self, now: Instant) -> Result<bool, Error> {
        let most = self.terms.as_ref().map_or(0, |terms| terms.restarts);
        let mut hopeless = false;
        for slot in 0..self.workers.len() {
            if self.workers[slot].worker.ended.is_some() {
                continue;
            }
            let Some(status) = self.workers[slot].worker.reap() else { continue };
            if status.code() == Some(CANNOT_LOAD) {
                return Err(self.cannot_load(slot).await);
            }
            // Once the next coordinator is there, it says how many it wants.
            if !self.ready || self.over {
                continue;
            }
            // One that was dismissed by an earlier coordinator may be needed by this one.
            if status.success() && self.workers[slot].start == self.starts {
                continue;
            }
            if self.asked.is_some() {
                continue;
            }
            let again =
                status.code() != Some(BAD_INPUT) && self.workers[slot].restarts.died(now.into(), most).is_some();
            match again {
                true => self.say_restart("a worker", self.workers[slot].worker.child.id(), status),
                false => hopeless = true,
            }
        }
        Ok(hopeless)
    }

    fn say_restart(&self, who: &str, pid: u32, status: ExitStatus) {
        // Whoever ends by itself has said why, or the run is ending.
        if let Some(signal) = status.signal() {
            eprintln!("unisono: {who} (pid {pid}) was killed by signal {signal}{}; it is started again", self.place());
        }
    }

    /// Starts those again whose time has come; when the next one's comes.
    fn start_again(&mut self, now: Instant) -> Result<Option<Instant>, Error> {
        let ripe = |restarts: &Restarts| restarts.due().is_some_and(|at| at <= now.into_std());
        if ripe(&self.coordinators) {
            let arguments: Vec<OsString> = match &self.run_dir {
                Some(run) => {
                    let mut arguments = self.launch.again.clone();
                    arguments.extend(["--resume".into(), run.into()]);
                    if let Some(relay) = &mut self.relay {
                        let told = relay.told().max(self.history).to_string();
                        arguments.extend(["--told".into(), told.into()]);
                    }
                    arguments
                }
                // The one before may have died when it had just made the run's directory.
                None if self.launch.arguments.first().is_some_and(|first| first == "coordinator") => {
                    let mut arguments = self.launch.arguments.clone();
                    // In front of what a user may have put behind "--".
                    arguments.insert(1, "--adopt".into());
                    arguments
                }
                None => self.launch.arguments.clone(),
            };
            self.coordinator = coordinate(
                &self.launch,
                &arguments,
                &self.listener,
                &self.lifeline,
                &self.sender,
                self.relay.as_mut(),
            )?;
            self.coordinators.started();
            self.starts += 1;
        }
        // Those whose time comes meanwhile start when the coordinator has said that it is there.
        let wanted = self.ready && !self.over && self.asked.is_none();
        for slot in 0..self.workers.len() {
            if wanted && ripe(&self.workers[slot].restarts) {
                self.fill(slot)?;
            }
        }
        let workers = self.workers.iter().map(|slot| &slot.restarts).filter(|_| wanted);
        let due = workers.chain([&self.coordinators]);
        Ok(due.filter_map(Restarts::due).min().map(Instant::from_std))
    }

    fn heed(&mut self, report: Report) -> Result<(), Error> {
        match report {
            Report::Created { run_dir, entries } => {
                if self.run_dir.replace(run_dir).is_none() {
                    self.history = entries;
                }
            }
            Report::Ready { address, workers, token, restarts } => {
                self.terms = Some(Terms { address, token, restarts });
                (self.ready, self.over) = (true, false);
                match self.asked {
                    // It may not have heard it while it came up.
                    Some(signal) => self.coordinator.send(signal),
                    None => self.hire(workers)?,
                }
            }
            Report::Over => self.over = true,
            Report::Progress { step, steps } => {
                if self.progress.is_none_or(|(before, _)| step > before) {
                    self.workers.iter_mut().for_each(|slot| slot.restarts.forgive());
                    self.coordinators.forgive();
                }
                self.progress = Some((step, steps));
            }
            // It may only be stopped or cut off: whoever takes its place must be alone there.
            Report::Lost { pid } => {
                let found = self.workers.iter().find(|slot| slot.worker.child.id() == pid);
                found.inspect(|slot| slot.worker.send(libc::SIGKILL));
            }
        }
        Ok(())
    }

    pub fn say_last_words(&self) {
        for Slot { worker, .. } in &self.workers {
            let Ok(words) = worker.words.lock() else { continue };
            for line in words.iter().filter(|line| line.starts_with(LAST_WORDS)) {
                eprintln!("worker (pid {}): {line}", worker.child.id());
            }
        }
    }

    /// Where the run was, as far as the coordinator told.
    fn place(&self) -> String {
        match self.progress {
            Some((step, steps)) if step < steps => format!(" in the step after step {step} of {steps}"),
            Some((step, _)) => format!(" after the last step, {step}"),
            None if self.workers.is_empty() => " while preparing the run".into(),
            None => " while workers joined and loaded".into(),
        }
    }

    /// How to go on: where no run was made, there is nothing to resume.
    fn advice(&self) -> String {
        match &self.run_dir {
            None => "nothing was begun; start it again".into(),
            Some(run_dir) => {
                let here = std::env::current_dir().ok().and_then(|here| run_dir.strip_prefix(here).ok());
                format!("go on with --resume {}", here.unwrap_or(run_dir).display())
            }
        }
    }

    fn judge_coordinator(&self, status: ExitStatus) -> Result<Ended, Error> {
        match status.code() {
            Some(code) => Ok(Ended::Code(u8::try_from(code).unwrap_or(u8::MAX))),
            None => {
                let pid = self.coordinator.child.id();
                Err(Error::Coordinator { pid, how: manner(status), place: self.place(), advice: self.advice() })
            }
        }
    }

    /// A worker died for good, and the coordinator knows nothing of it: it had not joined.
    fn judge_worker(&self) -> Error {
        let dead = self.workers.iter().map(|slot| &slot.worker);
        let dead = dead.filter_map(|w| Some((w, w.ended.filter(|s| !s.success())?))).next();
        let Some((worker, status)) = dead else { return io::Error::other("no worker died").into() };
        let last = worker.words.lock().ok().and_then(|words| words.back().cloned());
        Error::Worker {
            pid: worker.child.id(),
            how: manner(status),
            place: self.place(),
            words: last.map(|line| format!(" ({line})")).unwrap_or_default(),
            advice: self.advice(),
            bad_input: status.code() == Some(BAD_INPUT),
        }
    }

    async fn cannot_load(&self, slot: usize) -> Error {
        // The loader's words are on their way through the forwarding thread.
        let mut found = None;
        for _ in 0..50 {
            let words = self.workers[slot].worker.words.lock();
            found = words.ok().and_then(|words| words.iter().find_map(|line| super::local::missing_library(line)));
            if found.is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Error::cannot_load(&self.launch.worker, found)
    }

    /// Ends whoever still lives: the coordinator is asked first, workers get `patience`, then all are killed.
    /// A further signal to the supervisor ends the patience, and there is none where a second one brought it here.
    pub async fn stop(&mut self, signals: &mut Signals, patience: Duration) {
        if self.coordinator.reap().is_none() && self.asked.is_none() {
            self.coordinator.send(libc::SIGTERM);
            let deadline = Instant::now() + STOP;
            while self.coordinator.reap().is_none() && signals.wait_until(deadline).await {}
        }
        self.coordinator.send(libc::SIGKILL);
        let deadline = Instant::now() + patience;
        while self.workers.iter_mut().any(|slot| slot.worker.reap().is_none()) && signals.wait_until(deadline).await {}
        for member in self.workers.iter_mut().map(|slot| &mut slot.worker).chain([&mut self.coordinator]) {
            member.send(libc::SIGKILL);
            if member.ended.is_none() {
                member.ended = member.child.wait().ok();
            }
        }
    }
}

impl Crew {
    /// Waits until every event that was told is passed on, at most `patience` and as long as somebody reads; nobody who asks again
    /// has to.
    pub async fn pass_on(&mut self, signals: &mut Signals, patience: Option<Duration>) {
        let Some(mut relay) = self.relay.take() else { return };
        let patience = async {
            match patience {
                Some(patience) => tokio::time::sleep(patience).await,
                None => std::future::pending().await,
            }
        };
        let unread = tokio::select! {
            unread = relay.finish() => unread,
            () = patience => relay.unwritten(),
            _ = signals.requests.next() => relay.unwritten(),
        };
        if unread > 0 {
            let run = self.run_dir.as_deref().map(|run| format!(" of {}", run.display())).unwrap_or_default();
            eprintln!("unisono: {unread} events were not taken from standard output; the ledger{run} has them all");
        }
    }
}

/// Starts a coordinator on the supervisor's socket. What it reports goes to `sender`.
fn coordinate(
    launch: &Launch,
    arguments: &[OsString],
    listener: &TcpListener,
    lifeline: &PipeReader,
    sender: &mpsc::UnboundedSender<Report>,
    relay: Option<&mut Relay>,
) -> Result<Member, Error> {
    let (reports, report_writer) = io::pipe()?;
    let mut command = Command::new(&launch.program);
    command.args(arguments).stdin(Stdio::null());
    for (variable, fd) in
        [(LISTEN_FD, listener.as_raw_fd()), (REPORT_FD, report_writer.as_raw_fd()), (LIFELINE_FD, lifeline.as_raw_fd())]
    {
        command.env(variable, fd.to_string());
    }
    child::bind(&mut command, vec![listener.as_raw_fd(), report_writer.as_raw_fd(), lifeline.as_raw_fd()]);
    if relay.is_some() {
        command.stdout(Stdio::piped());
    }
    let mut child = command.spawn().map_err(|source| Error::Spawn { path: launch.program.clone(), source })?;
    if let (Some(relay), Some(stdout)) = (relay, child.stdout.take()) {
        relay.read(stdout);
    }
    let sender = sender.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(reports).lines().map_while(Result::ok) {
            if let Ok(report) = serde_json::from_str(&line) {
                if sender.send(report).is_err() {
                    break;
                }
            }
        }
    });
    Ok(Member { child, ended: None, words: Arc::default() })
}
