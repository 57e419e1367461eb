//! Viewers cost the run little, those that never read and those that read: the coordinator's time for a step, and its memory.

#![allow(clippy::unwrap_used)]

use serde_json::json;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use unisono::serve::control::Control;
use unisono::serve::setup::VIEWER_PATIENCE;
use unisono_proto::dial::{dial, dial_with, monitor, Role};
use unisono_proto::v1::WatchRequest;
use unisono_tests::fake_worker::FakeWorker;
use unisono_tests::processes::{resident_bytes, usage};
use unisono_tests::served::Served;
use unisono_tests::train::{Live, Train};
use unisono_tests::{chronicle, fixture};

/// Waits for `steps` further steps; the coordinator's CPU seconds for each.
fn cpu_for_a_step(live: &mut Live, steps: u64) -> f64 {
    let pid = live.coordinator().pid;
    let (begun, cpu) = (live.newest_step(), usage(pid).unwrap().cpu);
    while live.newest_step() < begun + steps {
        std::thread::sleep(Duration::from_millis(20));
    }
    (usage(pid).unwrap().cpu - cpu) / (live.newest_step() - begun) as f64
}

/// A viewer that reads nothing answers pings all the same: its connection is ended, and what waited for it is given back. One
/// that reads is served to the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_that_never_reads_is_cut_off() {
    let mut served = Served::new(600, 1);
    (served.config.train.epochs, served.config.train.global_batch_size) = (20, 8);
    (served.config.eval.every, served.config.checkpoint.every) = (0, 0);
    served.viewer_patience = Duration::from_millis(500);
    let serving = served.start("run", served.training()).await;
    let token = serving.control.token(Role::Monitor).unwrap();
    let watch = async |window: u32| {
        let channel =
            dial_with(&serving.control.address, &token, |e| e.initial_stream_window_size(window)).await.unwrap();
        let mut request = tonic::Request::new(WatchRequest { after: 0 });
        token.authorize(&mut request);
        monitor(channel).watch(request).await.unwrap().into_inner()
    };
    let (mut deaf, mut reader) = (watch(1 << 10).await, watch(1 << 20).await);
    let worker =
        FakeWorker::new(&serving.control.address, serving.control.token(Role::Worker).unwrap(), served.layout());
    let life = tokio::spawn(worker.live());
    let mut last = 0;
    while let Some(event) = reader.message().await.unwrap() {
        assert_eq!(event.sequence, last + 1);
        last = event.sequence;
    }
    assert!(last > 1000, "{last} events do not fill what lies on the way");
    life.await.unwrap();
    let mut seen = 0;
    let end = loop {
        match deaf.message().await {
            Ok(Some(_)) => seen += 1,
            end => break end,
        }
    };
    assert!(end.is_err() && seen < last, "it saw {seen} of {last} events: {end:?}");
}

/// `count` viewers of the run of `live`; each is read from if they are `readers`.
fn attach(live: &Live, runtime: &Runtime, count: u64, readers: bool) -> Vec<JoinHandle<()>> {
    let control = Control::read(&live.run_dir).unwrap();
    let token = control.token(Role::Monitor).unwrap();
    runtime.block_on(async {
        let mut viewers = Vec::new();
        for _ in 0..count {
            let mut request = tonic::Request::new(WatchRequest { after: 0 });
            token.authorize(&mut request);
            let mut client = monitor(dial(&control.address, &token).await.unwrap());
            let mut stream = client.watch(request).await.unwrap().into_inner();
            viewers.push(tokio::spawn(async move {
                while readers && stream.message().await.unwrap().is_some() {}
                std::future::pending::<()>().await;
                drop(stream);
            }));
        }
        viewers
    })
}

/// `UNISONO_MONITORS` (default 1,000) of them, and then as many that read.
#[test]
#[ignore = "minutes; make chaos"]
fn a_thousand_viewers_cost_little() {
    const STEPS: u64 = 400;
    /// More than 64 KiB of them, which is what an own viewer lets come.
    const FILLING: u64 = 500;
    let count = chronicle::asked("UNISONO_MONITORS", 1000);
    let dir = tempfile::tempdir().unwrap();
    let tiny = fixture::tiny();
    let train = Train::new(&tiny.model, &tiny.data, dir.path()).workers(2).set("model.compute", "fp32");
    let mut live = train.set("train.steps", 1_000_000).set("checkpoint.every", 0).set("eval.every", 0).start();
    live.wait_for("step");
    cpu_for_a_step(&mut live, 50);
    let before = cpu_for_a_step(&mut live, STEPS);
    let pid = live.coordinator().pid;
    let bytes_without = resident_bytes(pid).unwrap();

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let viewers = attach(&live, &runtime, count, false);
    let attached = Instant::now();
    // Until nothing more fits on the way to any of them.
    let filling = cpu_for_a_step(&mut live, FILLING);
    let with = cpu_for_a_step(&mut live, STEPS / 2);
    assert!(attached.elapsed() < VIEWER_PATIENCE, "they are cut off already: {:?}", attached.elapsed());
    let bytes_with = resident_bytes(pid).unwrap();
    viewers.iter().for_each(JoinHandle::abort);
    cpu_for_a_step(&mut live, 50);
    let after = cpu_for_a_step(&mut live, STEPS);
    let readers = attach(&live, &runtime, count, true);
    cpu_for_a_step(&mut live, STEPS);
    let reading = cpu_for_a_step(&mut live, STEPS);
    readers.iter().for_each(JoinHandle::abort);
    drop(runtime);
    let without = (before + after) / 2.0;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{count} viewers: {:.3} ms of CPU for a step without ({:.3} and {:.3}), {:.3} ms with them, {:.3} ms while they were \
         sent what fits, {:.3} ms with as many that read; memory {:.1} and {:.1} MiB",
        1e3 * without, 1e3 * before, 1e3 * after, 1e3 * with, 1e3 * filling, 1e3 * reading,
        mib(bytes_without), mib(bytes_with),
    );
    chronicle::note(
        "monitors",
        json!({"monitors": count, "cpu_before": before, "cpu_after": after, "cpu_without": without, "cpu_with": with,
               "cpu_filling": filling, "cpu_reading": reading, "bytes_without": bytes_without, "bytes_with": bytes_with}),
    );
    assert!(bytes_with < bytes_without + (64 << 20), "memory grew by {:.1} MiB", mib(bytes_with - bytes_without));
    // The goal, two hundredths, is below what two measurements without any differ by where others use the machine.
    assert!(with < without * 1.1, "a step costs {with} s of CPU instead of {without} s");
    assert!(reading < without * 1.2, "a step costs {reading} s of CPU with viewers that read instead of {without} s");
}
