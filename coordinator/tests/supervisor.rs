//! The supervisor with dummy children: whoever dies, nobody stays behind, and the right words are said.

#![allow(clippy::unwrap_used)]

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use unisono::launch::local::{self, Ended, Launch};

const COORDINATOR: &str = "TEST_COORDINATOR";
const WORKER: &str = "TEST_WORKER";
const EVENTS: &str = "TEST_EVENTS";

/// Waits for its lifeline like a real child, and leaves word of its pid.
const JOIN: &str = r#"echo $$ >> "$0.pids"; exec cat /proc/self/fd/$UNISONO_LIFELINE_FD > /dev/null"#;
const READY: &str =
    r#"echo '{"report":"ready","address":"127.0.0.1:1","workers":2,"token":"t"}' > /proc/self/fd/$UNISONO_REPORT_FD;"#;

/// Not a test of its own: the process that the tests below start as their supervisor.
#[test]
fn supervisor_process() {
    let (Some(coordinator), Some(worker)) = (std::env::var_os(COORDINATOR), std::env::var_os(WORKER)) else { return };
    let arguments: Vec<OsString> = Vec::new();
    let events = std::env::var_os(EVENTS).is_some();
    let launch = Launch { program: coordinator.into(), arguments, again: Vec::new(), worker: worker.into(), events };
    let code = match local::run(launch) {
        Ok(Ended::Code(code)) => code.into(),
        Ok(Ended::Interrupted { signal, .. }) => 128 + signal,
        Err(error) => {
            eprintln!("unisono: {error}");
            if error.bad_input() {
                2
            } else {
                3
            }
        }
    };
    std::process::exit(code);
}

struct Stage {
    dir: tempfile::TempDir,
    coordinator: PathBuf,
    worker: PathBuf,
}

impl Stage {
    fn new(coordinator: &str, worker: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, body: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        Stage { coordinator: write("coordinator", coordinator), worker: write("worker", worker), dir }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "supervisor_process", "--nocapture"])
            .env(COORDINATOR, &self.coordinator)
            .env(WORKER, &self.worker)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn start(&self) -> Child {
        self.command().spawn().unwrap()
    }

    /// Pids of the dummy children, once `count` of them have started.
    fn pids(&self, name: &str, count: usize) -> Vec<i32> {
        let file = self.dir.path().join(format!("{name}.pids"));
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            if text.lines().count() >= count {
                return text.lines().map(|l| l.parse().unwrap()).collect();
            }
            assert!(Instant::now() < deadline, "{name} never started: {text:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn alive(pid: i32) -> bool {
    // A zombie is dead for our purposes: its parent has not looked yet.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|s| s.chars().next()).is_some_and(|state| state != 'Z' && state != 'X')
        && Path::new(&format!("/proc/{pid}")).exists()
}

fn all_gone(pids: &[i32]) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while pids.iter().any(|p| alive(*p)) {
        assert!(Instant::now() < deadline, "still alive: {:?}", pids.iter().filter(|p| alive(**p)).collect::<Vec<_>>());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn end(mut child: Child) -> (ExitStatus, String) {
    let stderr = child.stderr.take().unwrap();
    let words: Vec<String> = BufReader::new(stderr).lines().map_while(Result::ok).collect();
    (child.wait().unwrap(), words.join("\n"))
}

fn signal(pid: i32, name: &str) {
    assert!(Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().unwrap().success());
}

#[test]
fn killing_the_supervisor_ends_everything() {
    // Children that look at nothing but the lifeline, and children that would sleep on: both must go.
    for body in [JOIN, r#"echo $$ >> "$0.pids"; exec sleep 1000"#] {
        let stage = Stage::new(&format!("{READY} {body}"), body);
        let supervisor = stage.start();
        let mut pids = stage.pids("worker", 2);
        pids.extend(stage.pids("coordinator", 1));
        assert!(pids.iter().all(|p| alive(*p)));
        signal(supervisor.id() as i32, "KILL");
        assert_eq!(end(supervisor).0.signal(), Some(9));
        all_gone(&pids);
    }
}

#[test]
fn the_lifeline_alone_is_enough() {
    // A grandchild is not covered by PDEATHSIG; the pipe it inherited still tells it.
    let body = r#"cat /proc/self/fd/$UNISONO_LIFELINE_FD > /dev/null & echo $! >> "$0.pids"; exec sleep 1000"#;
    let stage = Stage::new(&format!("{READY} {JOIN}"), body);
    let supervisor = stage.start();
    let pids = stage.pids("worker", 2);
    signal(supervisor.id() as i32, "KILL");
    end(supervisor);
    all_gone(&pids);
}

#[test]
fn the_coordinators_code_is_passed_through() {
    for code in [0, 2, 3] {
        let stage = Stage::new(&format!("{READY} sleep 0.3; exit {code}"), r#"echo $$ >> "$0.pids"; sleep 0.5"#);
        let (status, words) = end(stage.start());
        assert_eq!((status.code(), words.as_str()), (Some(code), ""));
        all_gone(&stage.pids("worker", 2));
    }
}

#[test]
fn a_refusal_before_workers_starts_none() {
    let stage = Stage::new("echo 'unisono: bad' >&2; exit 2", JOIN);
    let (status, words) = end(stage.start());
    assert_eq!((status.code(), words.as_str()), (Some(2), "unisono: bad"));
    assert!(!stage.dir.path().join("worker.pids").exists());
}

#[test]
fn a_dead_coordinator_is_named_with_the_place() {
    let progress = r#"echo '{"report":"progress","step":7,"steps":20}' > /proc/self/fd/$UNISONO_REPORT_FD;"#;
    let stage = Stage::new(&format!("{READY} {progress} {JOIN}"), JOIN);
    let supervisor = stage.start();
    let workers = stage.pids("worker", 2);
    // Each successor that gets no further is followed by another one, a few times.
    let mut coordinator = 0;
    for start in 1..=4 {
        coordinator = stage.pids("coordinator", start)[start - 1];
        std::thread::sleep(Duration::from_millis(100));
        signal(coordinator, "KILL");
    }
    let (status, words) = end(supervisor);
    assert_eq!(status.code(), Some(3));
    assert!(
        words.contains(&format!(
            "the coordinator (pid {coordinator}) was killed by signal 9 in the step after step 7 of 20"
        )),
        "{words}"
    );
    all_gone(&workers);
}

#[test]
fn a_killed_worker_is_started_again_and_a_lost_one_is_killed() {
    let stage = Stage::new(
        &format!(
            r#"{} while ! test -s "$0.lost"; do sleep 0.05; done
            echo "{{\"report\":\"lost\",\"pid\":$(cat "$0.lost")}}" > /proc/self/fd/$UNISONO_REPORT_FD; {JOIN}"#,
            READY.replace("\"token\"", "\"restarts\":2,\"token\"")
        ),
        JOIN,
    );
    let supervisor = stage.start();
    let first = stage.pids("worker", 2);
    signal(first[0], "KILL");
    let second = stage.pids("worker", 3)[2];
    // Stopped, it would never notice anything.
    signal(first[1], "STOP");
    std::fs::write(stage.dir.path().join("coordinator.lost"), first[1].to_string()).unwrap();
    let third = stage.pids("worker", 4)[3];
    assert!(alive(second) && alive(third));
    all_gone(&first);
    signal(supervisor.id() as i32, "KILL");
    end(supervisor);
    all_gone(&[second, third]);
}

/// Workers that go while the run is stopping, or when it is over, are not missed, however they go.
#[test]
fn nobody_is_suspected_while_the_run_stops_or_when_it_is_over() {
    let over = r#"echo '{"report":"over"}' > /proc/self/fd/$UNISONO_REPORT_FD;"#;
    let stage = Stage::new(&format!("{READY} {over} sleep 7; exit 0"), "sleep 0.5; exit 2");
    assert_eq!(end(stage.start()).0.code(), Some(0));

    let stops = format!(r#"trap 'sleep 7; exit 75' TERM; {READY} while :; do sleep 0.05; done"#);
    let stage = Stage::new(&stops, r#"echo $$ >> "$0.pids"; sleep 1; exit 3"#);
    let supervisor = stage.start();
    stage.pids("worker", 2);
    signal(supervisor.id() as i32, "TERM");
    assert_eq!(end(supervisor).0.code(), Some(75));
}

/// One that was started again reads its data, and has nothing that it could save yet.
#[test]
fn a_coordinator_that_is_not_up_again_ends_by_the_signal() {
    let coordinator = format!(
        r#"if test -e "$0.second"; then echo $$ >> "$0.pids"; exec sleep 1000; fi
        touch "$0.second"; echo $$ >> "$0.pids"; {READY} sleep 0.5; kill -9 $$"#
    );
    let stage = Stage::new(&coordinator, JOIN);
    let supervisor = stage.start();
    let mut pids = stage.pids("coordinator", 2);
    pids.extend(stage.pids("worker", 2));
    signal(supervisor.id() as i32, "TERM");
    assert_eq!(end(supervisor).0.code(), Some(143));
    all_gone(&pids);
}

#[test]
fn events_are_passed_on_whole_and_the_next_coordinator_goes_on_after_the_last() {
    let stage = Stage::new(
        &format!(
            r#"if test -e "$0.second"; then echo "{{\"sequence\":8,\"with\":\"$*\"}}"; exit 0; fi
            touch "$0.second"; echo '{{"report":"created","run_dir":"/runs/one"}}' > /proc/self/fd/$UNISONO_REPORT_FD;
            {READY} printf '{{"sequence":6}}\n{{"sequence":7}}\n{{"sequ'; sleep 0.3; kill -9 $$"#
        ),
        "sleep 1",
    );
    let mut command = stage.command();
    let supervisor = command.env(EVENTS, "1").stdout(Stdio::piped()).spawn().unwrap();
    let output = supervisor.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with('{')).collect();
    assert_eq!(output.status.code(), Some(0));
    let last = r#"{"sequence":8,"with":"--resume /runs/one --told 7"}"#;
    assert_eq!(lines, [r#"{"sequence":6}"#, r#"{"sequence":7}"#, last]);
}

#[test]
fn whoever_reads_nothing_holds_nobody_up_and_gets_every_event_once() {
    // 30 MB of events: more than may wait. The first coordinator dies in the middle of telling them.
    let stage = Stage::new(
        &format!(
            r#"for told; do :; done; case "$told" in [0-9]*) ;; *) told=0;; esac
            echo '{{"report":"created","run_dir":"/runs/one"}}' > /proc/self/fd/$UNISONO_REPORT_FD; {READY}
            if ! test -e "$0.second"; then touch "$0.second"; (sleep 0.5; kill -9 $$) & else echo $$ >> "$0.pids"; fi
            exec awk -v told=$told 'BEGIN {{ fill = sprintf("%3000s", ""); for (i = told + 1; i <= 10000; i++) printf "{{\"sequence\":%d,\"fill\":\"%s\"}}\n", i, fill }}'"#
        ),
        "sleep 1",
    );
    let mut supervisor = stage.command().env(EVENTS, "1").stdout(Stdio::piped()).spawn().unwrap();
    // Nothing has been read, and the next one is there.
    stage.pids("coordinator", 1);
    let reader = BufReader::new(supervisor.stdout.take().unwrap());
    let sequence = |line: String| {
        let number = line.strip_prefix("{\"sequence\":")?.split(',').next()?;
        Some(number.parse::<u64>().unwrap())
    };
    let told: Vec<u64> = reader.lines().map_while(Result::ok).filter_map(sequence).collect();
    assert!(told.iter().copied().eq(1..=10_000), "{} events, the last one {:?}", told.len(), told.last());
    assert_eq!(end(supervisor).0.code(), Some(0));
}

#[test]
fn a_standard_output_that_cannot_be_written_ends_the_telling_and_not_the_run() {
    let stage = Stage::new(&format!(r#"{READY} echo '{{"sequence":6}}'; sleep 0.5; exit 0"#), "sleep 1");
    let unwritable = std::fs::File::open("/dev/null").unwrap();
    let (status, words) = end(stage.command().env(EVENTS, "1").stdout(unwritable).spawn().unwrap());
    assert_eq!(status.code(), Some(0));
    assert!(words.contains("standard output cannot be written") && words.lines().count() == 1, "{words}");
}

#[test]
fn a_worker_that_cannot_load_libtorch_says_what_to_do() {
    let loader = r#"echo "$0: error while loading shared libraries: libtorch_cpu.so: cannot open shared object file" >&2; exit 127"#;
    let stage = Stage::new(&format!("{READY} {JOIN}"), loader);
    let (status, words) = end(stage.start());
    assert_eq!(status.code(), Some(2));
    assert_eq!(words.lines().count(), 1, "{words}");
    assert!(words.contains("cannot load libtorch_cpu.so; run `make setup`"), "{words}");
    all_gone(&stage.pids("coordinator", 1));
}

#[test]
fn a_worker_that_cannot_start_says_so() {
    // Its pid is known before it says that it is ready, after which it may be ended at once.
    let stage = Stage::new(&format!(r#"echo $$ >> "$0.pids"; {READY} {JOIN}"#), "");
    std::fs::set_permissions(&stage.worker, std::fs::Permissions::from_mode(0o644)).unwrap();
    let (status, words) = end(stage.start());
    assert_eq!(status.code(), Some(2));
    assert!(words.contains("cannot be started"), "{words}");
    all_gone(&stage.pids("coordinator", 1));
}

#[test]
fn a_worker_that_dies_unseen_is_named_and_its_words_kept() {
    let stage = Stage::new(&format!("{READY} {JOIN}"), "echo 'out of luck' >&2; exit 1");
    let (status, words) = end(stage.start());
    assert_eq!(status.code(), Some(3));
    assert!(words.contains("ended with exit code 1") && words.contains("(out of luck)"), "{words}");
    all_gone(&stage.pids("coordinator", 1));
}

#[test]
fn signals_reach_the_coordinator_and_the_exit_code() {
    // The coordinator saves and says how that went.
    for name in ["TERM", "USR1"] {
        let coordinator = format!(
            r#"trap 'echo stopped >&2; exit 75' {name}; {READY} echo $$ >> "$0.pids"; while :; do sleep 0.05; done"#
        );
        let stage = Stage::new(&coordinator, JOIN);
        let supervisor = stage.start();
        let mut pids = stage.pids("worker", 2);
        pids.extend(stage.pids("coordinator", 1));
        signal(supervisor.id() as i32, name);
        let (status, words) = end(supervisor);
        assert_eq!((status.code(), words.as_str()), (Some(75), "stopped"));
        all_gone(&pids);
    }
}

#[test]
fn whoever_asks_twice_does_not_wait() {
    let deaf = format!(r#"trap '' TERM; {READY} echo $$ >> "$0.pids"; while :; do sleep 0.05; done"#);
    for (name, code) in [("INT", 130), ("TERM", 143)] {
        let stage = Stage::new(&deaf, JOIN);
        let supervisor = stage.start();
        let mut pids = stage.pids("worker", 2);
        pids.extend(stage.pids("coordinator", 1));
        signal(supervisor.id() as i32, "TERM");
        std::thread::sleep(Duration::from_millis(200));
        assert!(pids.iter().all(|p| alive(*p)), "the first one is passed on");
        let asked = Instant::now();
        signal(supervisor.id() as i32, name);
        assert_eq!(end(supervisor).0.code(), Some(code));
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        all_gone(&pids);
    }
}

#[test]
fn workers_get_no_writing_end_of_the_lifeline() {
    let body = r#"readlink /proc/$$/fd/$UNISONO_LIFELINE_FD >> "$0.fds"; ls -l /proc/$$/fd | awk '{print $1, $11}' >> "$0.fds";
        echo $$ >> "$0.pids"; exec sleep 1000"#;
    let stage = Stage::new(&format!("{READY} {JOIN}"), body);
    let supervisor = stage.start();
    stage.pids("worker", 2);
    let seen = std::fs::read_to_string(stage.dir.path().join("worker.fds")).unwrap();
    signal(supervisor.id() as i32, "KILL");
    end(supervisor);
    let lifeline = seen.lines().next().unwrap();
    assert!(lifeline.starts_with("pipe:"), "{seen}");
    let ends: Vec<&str> = seen.lines().filter(|l| l.ends_with(lifeline) && *l != lifeline).collect();
    assert_eq!(ends.len(), 2, "one end for each of two workers: {seen}");
    assert!(ends.iter().all(|l| l.starts_with("lr-")), "{seen}");
}
