//! Two hosts: coordinator and a worker in one network namespace, a worker in another, joined by a virtual cable, with
//! TLS and a token from a file. The result is the one of a single machine.

#![allow(clippy::unwrap_used)]

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use unisono_tests::processes::{wait_until_gone, MARK};
use unisono_tests::{binaries, fixture, train::Train};

/// Two namespaces with a cable between them; both go with the value.
struct Hosts {
    names: [String; 2],
}

const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2)];

fn ip(arguments: &[&str]) -> Result<(), String> {
    // Debian keeps it where users' PATHs do not look.
    let program = ["/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip", "/bin/ip"].into_iter().find(|p| Path::new(p).exists());
    let program = program.ok_or("iproute2 is not installed")?;
    let output = Command::new(program).args(arguments).output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
    }
}

impl Hosts {
    fn new() -> Result<Self, String> {
        let pid = std::process::id();
        let hosts = Hosts { names: [format!("unisono-a-{pid}"), format!("unisono-b-{pid}")] };
        for name in &hosts.names {
            ip(&["netns", "add", name])?;
        }
        let [a, b] = &hosts.names;
        ip(&["-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b])?;
        for (name, address) in hosts.names.iter().zip(ADDRESSES) {
            ip(&["-n", name, "address", "add", &format!("{address}/24"), "dev", "cable"])?;
            ip(&["-n", name, "link", "set", "cable", "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(hosts)
    }

    /// A command that runs on host `index`.
    fn on(&self, index: usize, program: &Path) -> Command {
        let mut command = Command::new("/usr/bin/env");
        command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
        command
            .args(["ip", "netns", "exec", &self.names[index]])
            .arg(program)
            .env_remove("UNISONO_TOKEN")
            .env_remove("UNISONO_TOKEN_FILE");
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

fn wait(child: &mut Child, what: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("{what} did not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut text = String::new();
    use std::io::Read;
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success(), "{what} failed: {text}");
    text
}

#[test]
fn two_hosts_give_the_result_of_one() {
    let hosts = match Hosts::new() {
        Ok(hosts) => hosts,
        Err(reason) => {
            println!("skipped: network namespaces cannot be made here ({reason})");
            return;
        }
    };
    let dir = tempfile::tempdir().unwrap();
    let tiny = fixture::tiny();
    let local = Train::new(&tiny.model, &tiny.data, dir.path())
        .workers(2)
        .set("model.compute", "fp32")
        .set("train.steps", 4)
        .set("train.global_batch_size", 24)
        .succeed();

    let config = dir.path().join("cluster.toml");
    let text = format!(
        "[model]\npath = \"{}\"\ncompute = \"fp32\"\n\n[[data]]\npath = \"{}\"\n\n[train]\nsteps = 4\nglobal_batch_size = 24\n\n[cluster]\nworkers = 2\ntransport = \"tcp\"\n",
        tiny.model.display(),
        tiny.data.display()
    );
    std::fs::write(&config, text).unwrap();
    let run_dir = dir.path().join("cluster-run");
    let mark = format!("netns-{}", std::process::id());
    let address = format!("{}:7077", ADDRESSES[0]);
    let mut coordinator = hosts
        .on(0, &binaries::unisono())
        .arg("coordinator")
        .arg(&config)
        .args(["--listen", &address, "--run-dir"])
        .arg(&run_dir)
        .env(MARK, &mark)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let token = worker_token(&run_dir, &mut coordinator);
    let token_file = dir.path().join("token");
    std::fs::write(&token_file, format!("{token}\n")).unwrap();

    // Without the token nobody joins, and the run waits on.
    let stranger = hosts
        .on(1, &binaries::worker())
        .args(["join", &address])
        .env("UNISONO_TOKEN", forged(&token))
        .env(MARK, &mark)
        .output()
        .unwrap();
    assert!(!stranger.status.success(), "a forged token was let in");

    let mut workers: Vec<Child> = (0..2)
        .map(|host| {
            hosts
                .on(host, &binaries::worker())
                .args(["join", &address])
                .env("UNISONO_TOKEN_FILE", &token_file)
                .env(MARK, &mark)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    wait(&mut coordinator, "the coordinator");
    for worker in &mut workers {
        wait(worker, "a worker");
    }
    wait_until_gone(&mark, Duration::from_secs(2));
    let beside = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let passes: Vec<_> = beside.filter(|path| path.display().to_string().contains("/token.pass-")).collect();
    assert_eq!(passes.len(), 1, "what a worker was let in with is kept once for its host: {passes:?}");
    owner_only(&passes[0]);
    let digest = binaries::command(&["digest"]).arg(&run_dir).output().unwrap();
    let digest = String::from_utf8_lossy(&digest.stdout).into_owned();
    assert!(digest.contains(&local.digest()), "two hosts: {digest}, one machine: {}", local.digest());
}

/// The token that is made for other machines, once it is there.
fn worker_token(run_dir: &Path, coordinator: &mut Child) -> String {
    let path = run_dir.join("worker.token");
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if text.ends_with('\n') {
            owner_only(&path);
            owner_only(&run_dir.join("control.json"));
            return text.trim_end().to_owned();
        }
        if let Some(status) = coordinator.try_wait().unwrap() {
            panic!("the coordinator ended early: {status}: {}", wait(coordinator, "the coordinator"));
        }
        assert!(Instant::now() < deadline, "{} did not appear", path.display());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn owner_only(path: &Path) {
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600, "{} is for its owner only", path.display());
}

/// The same token with another secret.
fn forged(token: &str) -> String {
    let last = if token.ends_with('0') { '1' } else { '0' };
    format!("{}{last}", &token[..token.len() - 1])
}
