//! The protocol, between a real `serve` and fake workers over real TLS.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request};
use unisono::checkpoint::manifest::{self, Manifest};
use unisono::run::event::Outcome;
use unisono::serve::ledger::{Reader, LEDGER};
use unisono::serve::Work;
use unisono_proto::dial::{dial, monitor, training, Role};
use unisono_proto::v1::event::Body;
use unisono_proto::v1::training_client::TrainingClient;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{
    BatchKey, BatchRequest, Event, Join, Phase, StatusRequest, Suite, WatchRequest, WorkerMessage,
};
use unisono_proto::MAX_MESSAGE_BYTES;
use unisono_tests::fake_worker::{judge, norm, End, FakeWorker};
use unisono_tests::served::{Served, Serving};

fn worker(served: &Served, serving: &Serving) -> FakeWorker {
    let token = serving.control.token(Role::Worker).unwrap();
    FakeWorker::new(&serving.control.address, token, served.layout())
}

async fn follow(serving: &Serving, after: u64) -> Vec<Event> {
    let token = serving.control.token(Role::Monitor).unwrap();
    let mut client = monitor(dial(&serving.control.address, &token).await.unwrap());
    let mut request = Request::new(WatchRequest { after });
    token.authorize(&mut request);
    let mut stream = client.watch(request).await.unwrap().into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await.unwrap() {
        events.push(event);
    }
    events
}

/// Serves `work` to as many fake workers as the configuration says.
async fn whole_run(served: &Served, name: &str, work: Work, workers: usize) -> (Outcome, Vec<Event>, Vec<End>) {
    let serving = served.start(name, work).await;
    let mut lives = JoinSet::new();
    let watched = {
        let watching = follow(&serving, 0);
        tokio::pin!(watching);
        // The viewer is there before the first worker, and sees the run's first event live.
        assert!(tokio::time::timeout(Duration::from_millis(100), &mut watching).await.is_err());
        for _ in 0..workers {
            lives.spawn(worker(served, &serving).live());
        }
        watching.await
    };
    let run_dir = serving.run_dir.clone();
    let told = serving.events.clone();
    let outcome = serving.outcome().await;
    assert_eq!(watched, *told.lock().unwrap());
    assert_eq!(watched, Reader::open(&run_dir.join(LEDGER)).unwrap().after(0, 10_000).unwrap());
    assert!(watched.iter().map(|e| e.sequence).eq(1..=watched.len() as u64));
    (outcome, watched, lives.join_all().await)
}

fn steps(events: &[Event]) -> Vec<(u64, u64, u64, u64)> {
    let step = |e: &Event| match &e.body {
        Some(Body::Step(s)) => Some((s.step, s.loss.to_bits(), s.grad_norm.to_bits(), s.lr.to_bits())),
        _ => None,
    };
    events.iter().filter_map(step).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_workers_and_one_commit_the_same_steps_and_state() {
    let mut digests = BTreeSet::new();
    let mut committed = Vec::new();
    for workers in [3, 1] {
        let mut served = Served::new(75, workers);
        served.config.train.epochs = 2;
        if workers == 3 {
            served.config.cluster.assignment = unisono_configs::run::Assignment::Shuffled;
        }
        let work = served.training();
        let plan_steps = work.plan().unwrap().steps();
        assert_eq!(plan_steps, 10);
        let (outcome, events, ends) = whole_run(&served, "run", work.clone(), workers).await;
        assert_eq!(outcome.failure, None);
        assert_eq!(outcome.steps, plan_steps);
        // Every micro-batch of the plan by exactly one worker.
        let mut computed = BTreeSet::new();
        for end in ends {
            let End::Drained { computed: own } = end else { panic!("{end:?}") };
            own.into_iter().for_each(|one| assert!(computed.insert(one)));
        }
        for step in 1..=plan_steps {
            let dealt = work.plan().unwrap().step(step);
            let parts: Vec<_> = (0..dealt.micro_batches.len() as u32)
                .map(|micro_batch| {
                    assert!(computed.contains(&(step, micro_batch)));
                    let key = BatchKey { suite: Suite::Train.into(), step, micro_batch };
                    judge(&work.micro_batch(key).unwrap().unwrap())
                })
                .collect();
            let loss =
                parts.iter().map(|p| p.loss_sum).sum::<f64>() / parts.iter().map(|p| p.targets).sum::<u64>() as f64;
            let found = steps(&events)[step as usize - 1];
            assert_eq!((found.0, found.1, found.2), (step, loss.to_bits(), norm(step).to_bits()));
        }
        let kinds: Vec<&str> = events.iter().filter_map(|e| e.body.as_ref()).map(Body::kind).collect();
        assert_eq!((kinds[0], kinds[kinds.len() - 1]), ("started", "done"));
        let evaluations = kinds.iter().filter(|k| **k == "eval").count();
        assert_eq!(evaluations, 5 * 3 + 3, "five validations and one test, of two tasks and both together");
        assert_eq!(kinds.iter().filter(|k| **k == "checkpoint").count(), 4);
        let run_dir = outcome_dir(&events);
        let kept: Vec<u64> = manifest::list(&run_dir).into_iter().map(|(step, _)| step).collect();
        assert_eq!(kept, [6, 9, 10]);
        let last = Manifest::read(&manifest::directory(&run_dir, 10)).unwrap();
        assert_eq!((last.cursor.epoch, last.cursor.position), (2, 0));
        assert_eq!(unisono::digest::digest(&manifest::directory(&run_dir, 10)).unwrap(), outcome.conclusion.digest);
        assert!(!run_dir.join("control.json").exists());
        digests.insert(outcome.conclusion.digest);
        committed.push(steps(&events));
    }
    assert_eq!(digests.len(), 1);
    assert_eq!(committed[0], committed[1]);
}

fn outcome_dir(events: &[Event]) -> std::path::PathBuf {
    match &events[0].body {
        Some(Body::Started(started)) => started.run_dir.clone().into(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_worker_is_replaced_and_the_run_ends_like_the_undisturbed_one() {
    let served = Served::new(60, 3);
    let (_, undisturbed, _) = whole_run(&served, "undisturbed", served.training(), 3).await;
    let serving = served.start("run", served.training()).await;
    let mut lives = JoinSet::new();
    lives.spawn(worker(&served, &serving).live_on());
    lives.spawn(worker(&served, &serving).live_on());
    let (dying, successor) = (FakeWorker { dies_in: Some(4), ..worker(&served, &serving) }, worker(&served, &serving));
    lives.spawn(async move {
        assert_eq!(dying.live().await, End::Died);
        successor.live_on().await
    });
    let events = follow(&serving, 0).await;
    assert_eq!(serving.outcome().await.failure, None);
    let ends = lives.join_all().await;
    assert!(ends.iter().all(|e| matches!(e, End::Drained { .. })), "{ends:?}");
    let values = |events: &[Event]| steps(events).iter().map(|s| (s.0, s.1, s.2)).collect::<Vec<_>>();
    assert_eq!(values(&events), values(&undisturbed));
    let count = |events: &[Event], kind: &str| {
        events.iter().filter_map(|e| e.body.as_ref()).filter(|body| body.kind() == kind).count()
    };
    assert_eq!((count(&events, "lost"), count(&events, "membership")), (1, 2));
    for kind in ["eval", "checkpoint", "done"] {
        assert_eq!(count(&events, kind), count(&undisturbed, kind), "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_once_too_often_is_named_to_everyone() {
    let mut served = Served::new(60, 3);
    served.config.cluster.restarts = 0;
    let serving = served.start("run", served.training()).await;
    let mut lives = JoinSet::new();
    lives.spawn(worker(&served, &serving).live());
    lives.spawn(worker(&served, &serving).live());
    lives.spawn(FakeWorker { dies_in: Some(3), ..worker(&served, &serving) }.live());
    let watching = follow(&serving, 0).await;
    let outcome = serving.outcome().await;
    let failure = outcome.failure.unwrap();
    assert_eq!((failure.step, failure.phase(), failure.host.as_str()), (Some(3), Phase::Forward, "fake"));
    assert!(failure.rank.is_some() && failure.message.contains("the worker was lost"), "{}", failure.message);
    assert_eq!(outcome.steps, 2);
    let ends = lives.join_all().await;
    assert_eq!(ends.iter().filter(|e| **e == End::Aborted(failure.clone())).count(), 2, "{ends:?}");
    assert_eq!(watching.last().unwrap().body, Some(Body::Failed(failure)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_fails_says_why_and_a_stop_ends_the_run() {
    let served = Served::new(60, 2);
    let serving = served.start("run", served.training()).await;
    let mut lives = JoinSet::new();
    lives.spawn(worker(&served, &serving).live());
    lives.spawn(FakeWorker { fails_in: Some(2), ..worker(&served, &serving) }.live());
    let failure = serving.outcome().await.failure.unwrap();
    assert_eq!((failure.step, failure.phase()), (Some(2), Phase::Forward));
    assert_eq!(failure.message, "the device is out of memory");
    lives.join_all().await;

    let serving = served.start("again", served.training()).await;
    serving.stop.send("interrupted by the user".into()).unwrap();
    let outcome = served_outcome(serving.run_dir.clone()).await;
    assert_eq!(outcome, "interrupted by the user");
}

/// Waits for the failure in the ledger of a run whose handle was given up.
async fn served_outcome(run_dir: std::path::PathBuf) -> String {
    let reader = Reader::open(&run_dir.join(LEDGER)).unwrap();
    for _ in 0..100 {
        if let Some(Event { body: Some(Body::Failed(failure)), .. }) = reader.last("failed").unwrap() {
            return failure.message;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the run does not end");
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_are_the_same_whoever_asks_and_unknown_ones_are_refused() {
    let served = Served::new(30, 1);
    let serving = served.start("run", served.training()).await;
    let token = serving.control.token(Role::Worker).unwrap();
    let mut client = training(dial(&serving.control.address, &token).await.unwrap());
    let (sender, requests) = tokio::sync::mpsc::channel(8);
    let mut request = Request::new(ReceiverStream::new(requests));
    token.authorize(&mut request);
    let key = |step, micro_batch| BatchKey { suite: Suite::Train.into(), step, micro_batch };
    for key in [key(2, 1), key(1, 0), key(2, 1), key(9, 0)] {
        sender.send(BatchRequest { key: Some(key) }).await.unwrap();
    }
    let mut batches = client.batches(request).await.unwrap().into_inner();
    let first = batches.message().await.unwrap().unwrap();
    let second = batches.message().await.unwrap().unwrap();
    assert_eq!(batches.message().await.unwrap().unwrap(), first);
    assert_ne!(first.tokens, second.tokens);
    let refused = batches.message().await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(refused.message().contains("no micro-batch 0 in step 9"), "{}", refused.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn joins_are_refused_with_a_sentence() {
    let served = Served::new(30, 2);
    let serving = served.start("run", served.training()).await;
    let token = serving.control.token(Role::Monitor).unwrap();
    let mut client = monitor(dial(&serving.control.address, &token).await.unwrap());
    let mut status = async || {
        let mut request = Request::new(StatusRequest {});
        token.authorize(&mut request);
        client.status(request).await.unwrap().into_inner()
    };
    assert_eq!(status().await.state, "gathering");
    let mut lives = JoinSet::new();
    lives.spawn(worker(&served, &serving).live());
    while status().await.workers.is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut other = worker(&served, &serving);
    other.fingerprint.instruction_set = "avx2".into();
    let End::Refused(sentence) = other.live().await else { panic!("not refused") };
    assert!(sentence.contains("instruction set \"avx2\" against \"\""), "{sentence}");
    serving.stop.send("enough".into()).unwrap();
    let ends = lives.join_all().await;
    assert!(matches!(&ends[0], End::Aborted(failure) if failure.message == "enough"), "{ends:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_beyond_the_limit_and_streams_without_join_are_refused() {
    let served = Served::new(30, 1);
    let serving = served.start("run", served.training()).await;
    let token = serving.control.token(Role::Worker).unwrap();
    let channel = dial(&serving.control.address, &token).await.unwrap();
    // Without the client's own limits.
    let mut client = TrainingClient::new(channel);
    let huge = Join { host: "x".repeat(MAX_MESSAGE_BYTES + 1), ..Default::default() };
    let early = Report::Ready(Default::default());
    for (first, word) in [(Report::Join(huge), "Join"), (early, "Join")] {
        let (sender, messages) = tokio::sync::mpsc::channel(1);
        sender.send(WorkerMessage { epoch: None, body: Some(first) }).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(messages));
        token.authorize(&mut request);
        let refused = match client.attend(request).await {
            Ok(mut stream) => stream.get_mut().message().await.unwrap_err(),
            Err(status) => status,
        };
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(word), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn evaluations_and_continuations_need_no_training() {
    let served = Served::new(30, 2);
    let (outcome, events, _) = whole_run(&served, "evaluate", served.evaluating(), 2).await;
    assert_eq!(outcome.failure, None);
    let told: Vec<(String, String)> = outcome.evaluations.iter().map(|e| (e.split.clone(), e.task.clone())).collect();
    let wanted =
        ["validation", "test"].map(|split| ["copy", "count", ""].map(|task| (split.to_string(), task.to_string())));
    assert_eq!(told, wanted.concat());
    assert_eq!(events.last().unwrap().body.as_ref().unwrap().kind(), "done");

    let prompts: Vec<Vec<u32>> = (1..40).map(|length| vec![7; length]).collect();
    let work = Work::generate(prompts, 3, vec![0], &served.spec);
    let (outcome, ..) = whole_run(&served, "generate", work, 2).await;
    assert_eq!(outcome.failure, None);
    let lengths: Vec<u32> = outcome.continuations.iter().map(|c| c.tokens[0]).collect();
    assert_eq!(lengths, (1..40).collect::<Vec<_>>());
    assert!(outcome.continuations.iter().all(|c| c.tokens.len() == 3 && !c.ended));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_directory_is_served_by_one_coordinator_at_a_time() {
    let served = Served::new(30, 1);
    let first = served.start("run", served.training()).await;
    assert_eq!(first.control.term, 1);
    let refused = unisono::serve::ledger::Ledger::open(&first.run_dir).unwrap_err().to_string();
    assert!(refused.contains("another coordinator"), "{refused}");
}

/// Somebody else holds the ledger for longer than SQLite waits by itself: the run stands still, and goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_that_cannot_be_written_for_a_while_ends_nothing() {
    let served = Served::new(30, 1);
    let serving = served.start("run", served.training()).await;
    let other = rusqlite::Connection::open(serving.run_dir.join(LEDGER)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let life = tokio::spawn(worker(&served, &serving).live());
    tokio::time::sleep(Duration::from_secs(7)).await;
    other.execute_batch("ROLLBACK").unwrap();
    life.await.unwrap();
    let outcome = serving.outcome().await;
    assert_eq!(outcome.failure, None);
    assert!(outcome.steps > 0);
}
