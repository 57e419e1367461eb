//! Networks that fall apart, and workers that stop and wake up again: nobody's late words count, and the digest is that of
//! the undisturbed run.

#![allow(clippy::unwrap_used)]

use serde_json::json;
use std::net::TcpListener;
use std::time::{Duration, Instant};
use unisono_tests::chronicle;
use unisono_tests::crowd::Crowd;
use unisono_tests::kills::{ended_well, settings, train, undisturbed, Dice};
use unisono_tests::processes::signal;
use unisono_tests::proxy::{Flow, Proxy};

const LONG: Duration = Duration::from_secs(30);

fn crowd(dir: &std::path::Path, steps: u64, more: &[&str]) -> Crowd {
    let more = more.iter().map(|setting| (*setting).to_owned()).collect();
    Crowd::start(dir, &[settings(steps), more].concat())
}

/// Two workers, one of which reaches the coordinator only through the proxy.
fn behind_a_proxy(dir: &std::path::Path, steps: u64) -> (Crowd, Proxy) {
    let mut crowd = crowd(dir, steps, &["cluster.workers=2", "cluster.rejoin_timeout=20", "cluster.restarts=9"]);
    let proxy = Proxy::new(crowd.address());
    crowd.hire();
    crowd.hire_by(proxy.address(), &[], &[]);
    crowd.live.wait_for("step");
    (crowd, proxy)
}

/// The network between a worker and the coordinator is `flow` for so long.
fn disturb(crowd: &mut Crowd, proxy: &Proxy, flow: Flow, pause: Duration) {
    proxy.set(flow);
    std::thread::sleep(pause);
    proxy.set(Flow::Open);
    // On, with or without another generation.
    let newest = crowd.live.newest_step();
    let begun = Instant::now();
    while crowd.live.newest_step() <= newest + 2 {
        if crowd.live.all("done").len() == 1 {
            return;
        }
        assert!(begun.elapsed() < LONG, "{flow:?} for {pause:?}: no step since");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_worker_that_is_cut_off_from_the_coordinator_is_replaced_by_itself() {
    const STEPS: u64 = 400;
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let (mut crowd, proxy) = behind_a_proxy(dir.path(), STEPS);
    disturb(&mut crowd, &proxy, Flow::Held, Duration::from_millis(2500));
    disturb(&mut crowd, &proxy, Flow::Cut, Duration::from_millis(500));
    disturb(&mut crowd, &proxy, Flow::HeldBack, Duration::from_millis(400));
    let ended = crowd.finish();
    assert!(ended.events("lost").len() >= 2, "{:?}", ended.events("lost"));
    assert_eq!(ended_well(&ended), whole);
}

/// Two workers, and a proxy between them: rank 0 is called by the others.
fn with_a_proxy_between(dir: &std::path::Path, steps: u64) -> (Crowd, Proxy) {
    let more = ["cluster.workers=2", "cluster.peer_timeout=2", "cluster.rejoin_timeout=20", "cluster.restarts=9"];
    let mut crowd = crowd(dir, steps, &more);
    // Free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let proxy = Proxy::new(&listen);
    let address = crowd.address().to_owned();
    crowd.hire_by(&address, &["--listen", &listen, "--advertise", proxy.address()], &[]);
    // Whoever joins first has rank 0.
    std::thread::sleep(Duration::from_secs(2));
    crowd.hire();
    crowd.live.wait_for("step");
    assert!(proxy.calls() > 0, "the workers talk through the proxy");
    (crowd, proxy)
}

#[test]
fn workers_that_are_cut_off_from_each_other_meet_again() {
    const STEPS: u64 = 400;
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let (mut crowd, proxy) = with_a_proxy_between(dir.path(), STEPS);
    disturb(&mut crowd, &proxy, Flow::Held, Duration::from_millis(1000));
    disturb(&mut crowd, &proxy, Flow::Cut, Duration::from_millis(100));
    disturb(&mut crowd, &proxy, Flow::HeldForth, Duration::from_millis(2500));
    assert_eq!(ended_well(&crowd.finish()), whole);
}

#[test]
fn a_zombie_finds_its_place_taken_and_leaves_with_the_run() {
    const STEPS: u64 = 500;
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let mut crowd = crowd(dir.path(), STEPS, &["cluster.workers=2", "cluster.rejoin_timeout=30"]);
    crowd.hire();
    let zombie = crowd.hire();
    crowd.live.wait_for("step");
    crowd.signal(zombie, "STOP");
    let lost = crowd.live.wait_for("lost");
    assert_eq!(lost["pid"], crowd.workers[zombie].id());
    crowd.hire();
    let members = crowd.live.wait_for("membership")["members"].clone();
    let pids: Vec<u64> = members.as_array().unwrap().iter().map(|m| m["pid"].as_u64().unwrap()).collect();
    assert!(pids.len() == 2 && !pids.contains(&u64::from(crowd.workers[zombie].id())), "{pids:?}");
    crowd.live.wait_for("step");
    crowd.signal(zombie, "CONT");
    let words = dir.path().join(format!("worker-{zombie}.log"));
    let ended = crowd.finish();
    // It may have got a place again only if somebody else was lost.
    assert_eq!(ended.events("lost").len(), 1, "the zombie disturbed the run: {:?}", ended.events("lost"));
    let words = std::fs::read_to_string(words).unwrap();
    assert!(words.contains("waited as a spare and was not needed"), "{words}");
    assert_eq!(ended_well(&ended), whole);
}

/// `UNISONO_PARTITIONS` (default 24) faults of the network from `UNISONO_SEED`, half of them between workers.
#[test]
#[ignore = "minutes; make chaos"]
fn random_partitions() {
    const STEPS: u64 = 1500;
    let (count, seed) = (chronicle::asked("UNISONO_PARTITIONS", 24), chronicle::asked("UNISONO_SEED", 1));
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let (mut made, mut run) = (0, 0);
    while made < count {
        let mut dice = Dice(seed.wrapping_mul(11_000_003) + run);
        let between = run % 2 == 1;
        let (mut crowd, proxy) =
            if between { with_a_proxy_between(dir.path(), STEPS) } else { behind_a_proxy(dir.path(), STEPS) };
        let mut told = Vec::new();
        while crowd.live.newest_step() + 150 < STEPS && told.len() < 8 {
            let flow = Flow::ALL_FAULTS[dice.roll(4) as usize];
            let most = if flow == Flow::Cut && between { 300 } else { 3500 };
            let pause = Duration::from_millis(50 + dice.roll(most));
            disturb(&mut crowd, &proxy, flow, pause);
            told.push((flow, pause));
        }
        let same = ended_well(&crowd.finish()) == whole;
        for (flow, pause) in &told {
            let whom = if between { "between workers" } else { "worker and coordinator" };
            chronicle::note(
                "partition",
                json!({"seed": seed, "run": run, "how": format!("{whom}, {}", flow.name()),
                       "seconds": pause.as_secs_f64(), "same": same}),
            );
        }
        println!("seed {seed}, run {run}: {told:?}");
        assert!(same, "seed {seed}, run {run}: another result after {told:?}");
        made += told.len() as u64;
        run += 1;
    }
}

/// `UNISONO_HANGS` (default 100) workers that stop, at any instant; under `unisono train`, whose supervisor replaces them.
#[test]
#[ignore = "minutes; make chaos"]
fn many_hangs_are_found_and_replaced() {
    const STEPS: u64 = 900;
    let (count, seed) = (chronicle::asked("UNISONO_HANGS", 100), chronicle::asked("UNISONO_SEED", 1));
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let (mut made, mut run) = (0, 0);
    while made < count {
        let mut dice = Dice(seed.wrapping_mul(13_000_027) + run);
        let mut live = train(dir.path(), STEPS).workers(2).start();
        live.wait_for("step");
        let mut told = Vec::new();
        while made + (told.len() as u64) < count && live.newest_step() + 40 < STEPS {
            std::thread::sleep(Duration::from_millis(dice.roll(150)));
            live.newest_step();
            let workers = live.workers();
            let victim = workers[dice.roll(workers.len() as u64) as usize].pid;
            let begun = Instant::now();
            signal(victim, "STOP");
            let lost = live.wait_for("lost");
            let found = begun.elapsed().as_secs_f64();
            assert_eq!(lost["pid"], victim, "another one was taken for it: {lost}");
            live.wait_for("membership");
            live.wait_for("step");
            told.push((found, begun.elapsed().as_secs_f64(), lost["phase"].clone()));
        }
        let same = ended_well(&live.finish()) == whole;
        for (found, again, phase) in &told {
            chronicle::note(
                "hang",
                json!({"seed": seed, "run": run, "found": found, "again": again, "phase": phase, "same": same,
                       "load": chronicle::load()}),
            );
        }
        assert!(same, "seed {seed}, run {run}: another result");
        made += told.len() as u64;
        run += 1;
        let column = |pick: fn(&(f64, f64, serde_json::Value)) -> f64| told.iter().map(pick).collect::<Vec<_>>();
        let (found, again) =
            (chronicle::median_and_most(&column(|t| t.0)), chronicle::median_and_most(&column(|t| t.1)));
        println!("seed {seed}, run {run}: {} hangs, found {found:?}, again {again:?}", told.len());
    }
}
