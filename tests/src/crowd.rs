//! A run without a supervisor, as on a cluster: a coordinator, and workers that come and go as the test likes.

use crate::train::Live;
use crate::{binaries, fixture, processes};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use unisono::serve::control::Control;

/// How long a worker may take to leave once its run is over.
const FAREWELL: Duration = Duration::from_secs(20);

/// Coordinator and workers; dropping it kills them all.
#[derive(Debug)]
pub struct Crowd {
    pub live: Live,
    pub workers: Vec<Child>,
    dir: PathBuf,
    token: String,
    address: String,
}

impl Crowd {
    /// A coordinator of the tiny run of [`crate::kills`], with `settings` (`key=value`), that nobody has joined yet.
    pub fn start(dir: &Path, settings: &[String]) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let (run_dir, mark) = (dir.join(format!("crowd-{count}")), format!("crowd-{}-{count}", std::process::id()));
        let micro = fixture::of(fixture::MICRO);
        let mut command = binaries::command(&["coordinator", "--json", "--listen", "127.0.0.1:0"]);
        command.arg("--model").arg(&micro.model).arg("--data").arg(&micro.data).arg("--run-dir").arg(&run_dir);
        for setting in settings {
            command.args(["--set", setting]);
        }
        command.env(processes::MARK, &mark).env("XDG_CACHE_HOME", dir.join("cache")).current_dir(dir);
        let live = Live::follow(command, mark, run_dir.clone());
        let Control { address, tokens, .. } = control(&run_dir);
        let token = tokens.worker;
        Crowd { live, workers: Vec::new(), dir: dir.into(), token, address }
    }

    /// Where the coordinator listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The workers' token.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// A worker joins; its place in `workers`.
    pub fn hire(&mut self) -> usize {
        let address = self.address.clone();
        self.hire_by(&address, &[], &[])
    }

    /// A worker joins by an address of the caller's, with further arguments and environment.
    pub fn hire_by(&mut self, address: &str, arguments: &[&str], environment: &[(&str, &str)]) -> usize {
        let words = std::fs::File::create(self.dir.join(format!("worker-{}.log", self.workers.len())));
        let mut command = Command::new(binaries::worker());
        command.args(["join", address]).args(arguments).envs(environment.iter().copied());
        command.env("UNISONO_TOKEN", &self.token).env(processes::MARK, &self.live.mark);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(words.expect("the directory can be written"));
        self.workers.push(command.spawn().expect("unisono-worker can be started"));
        self.workers.len() - 1
    }

    /// What a worker has said on standard error.
    pub fn words(&self, worker: usize) -> String {
        std::fs::read_to_string(self.dir.join(format!("worker-{worker}.log"))).unwrap_or_default()
    }

    /// Those that live.
    pub fn here(&mut self) -> Vec<usize> {
        let living = |(index, child): (usize, &mut Child)| child.try_wait().ok()?.is_none().then_some(index);
        self.workers.iter_mut().enumerate().filter_map(living).collect()
    }

    /// A worker's machine fails.
    pub fn lose(&mut self, worker: usize) {
        let child = &mut self.workers[worker];
        child.kill().expect("an own child can be killed");
        child.wait().expect("an own child can be waited for");
    }

    /// Sends a signal to a worker.
    pub fn signal(&self, worker: usize, name: &str) {
        processes::signal(self.workers[worker].id(), name);
    }

    /// To the end of the run; every worker that was not killed leaves with 0.
    pub fn finish(mut self) -> crate::train::Finished {
        let here = self.here();
        let ended = self.live.finish_in_place();
        let deadline = Instant::now() + FAREWELL;
        for worker in here {
            let status = loop {
                match self.workers[worker].try_wait().expect("an own child can be waited for") {
                    Some(status) => break status,
                    None => assert!(Instant::now() < deadline, "worker {worker} stays after the end"),
                }
                std::thread::sleep(Duration::from_millis(10));
            };
            assert_eq!(status.code(), Some(0), "worker {worker}: {}; {}", self.words(worker), ended.stderr);
        }
        ended
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            let _ = worker.kill();
            let _ = worker.wait();
        }
    }
}

/// The run's control file, once it is there.
fn control(run_dir: &Path) -> Control {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Ok(control) = Control::read(run_dir) {
            return control;
        }
        assert!(Instant::now() < deadline, "no coordinator came up in {}", run_dir.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}
