//! The link against a coordinator that does what a test tells it.

use super::fake::{Attendant, Fake};
use super::*;
use unisono_proto::v1::{Abort, Checkpoint, Finish, Go, Phase, Step, StepReport};

fn batch(key: &BatchKey) -> Batch {
    Batch { tokens: vec![key.micro_batch; 3], targets: vec![1, 2, unisono_proto::NO_TARGET], starts: vec![0, 2] }
}

fn assign(rank: u32) -> FromCoordinator {
    FromCoordinator::Assign(Assign { rank, world: 2, ..Default::default() })
}

fn step(step: u64, micro_batches: &[u32]) -> directive::Body {
    directive::Body::Step(Step { step, micro_batches: micro_batches.to_vec(), ..Default::default() })
}

fn joined(fake: &Fake) -> (Link, Attendant) {
    let link = fake.link(Join { host: "here".into(), ..Default::default() }, |_, _| {});
    let (attendant, join) = fake.welcome();
    assert_eq!(join.host, "here");
    attendant.tell(1, assign(1));
    link.assignment().unwrap();
    (link, attendant)
}

#[test]
fn a_worker_s_life_in_order() {
    let fake = Fake::start(batch);
    let (link, attendant) = joined(&fake);
    assert_eq!(link.rank(), Some(1));
    attendant.tell(1, FromCoordinator::Go(Go::default()));
    link.go().unwrap();
    attendant.direct(1, step(7, &[3, 1]));
    attendant.direct(2, directive::Body::Finish(Finish {}));
    let directive = link.directive().unwrap();
    let keys = keys(&directive);
    assert_eq!(keys.iter().map(|k| (k.step, k.micro_batch)).collect::<Vec<_>>(), [(7, 3), (7, 1)]);
    // In another order than asked for: early ones are kept.
    for key in keys.iter().rev() {
        assert_eq!(link.batch(key).unwrap(), batch(key));
    }
    link.report(ToCoordinator::Step(StepReport { step: 7, ..Default::default() })).unwrap();
    let message = std::iter::from_fn(|| attendant.message())
        .find(|m| matches!(m.body, Some(ToCoordinator::Step(_))))
        .expect("a report");
    assert_eq!(message.epoch, Some(Epoch { term: 1, generation: 1 }));
    assert_eq!(link.directive().unwrap().id, 2);
    let leaving = std::thread::spawn(move || link.drained());
    assert!(matches!(attendant.hear(), Some(ToCoordinator::Drained(_))));
    assert!(attendant.message().is_none(), "Drained is the last message");
    drop(attendant);
    leaving.join().unwrap().unwrap();
}

#[test]
fn no_more_batches_are_asked_for_than_credit_allows() {
    let asked = Arc::new(AtomicU64::new(0));
    let counted = asked.clone();
    let fake = Fake::start(move |key| {
        counted.fetch_add(1, Ordering::SeqCst);
        batch(key)
    });
    let (link, attendant) = joined(&fake);
    let shares: Vec<_> = (0..20).collect();
    attendant.direct(1, step(1, &shares));
    let keys = keys(&link.directive().unwrap());
    for (taken, key) in (0u64..).zip(&keys) {
        link.batch(key).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(asked.load(Ordering::SeqCst) <= taken + 1 + CREDIT as u64);
    }
    assert_eq!(asked.load(Ordering::SeqCst), 20);
}

#[test]
fn an_abort_ends_every_wait_and_names_whose_fault_it_was() {
    let fake = Fake::start(batch);
    let (told, heard) = plain::channel();
    let told = Mutex::new(told);
    let link = fake.link(Join::default(), move |error, rank| lock(&told).send((error.to_string(), rank)).unwrap());
    let (attendant, _) = fake.welcome();
    attendant.tell(1, assign(0));
    link.assignment().unwrap();
    let failure = Failure {
        rank: Some(1),
        host: "there".into(),
        phase: Phase::Reduce as i32,
        step: Some(7),
        message: "it fell silent".into(),
        bad_input: true,
        recoverable: false,
        micro_batch: None,
        snapshot: false,
        norm: false,
    };
    let sentence = "stopped by the coordinator because of rank 1 on there, reduce, step 7: it fell silent";
    let waiting = std::thread::spawn(move || {
        let key = BatchKey { suite: Suite::Train as i32, step: 1, micro_batch: 0 };
        (link.batch(&key).unwrap_err(), link.directive().unwrap_err())
    });
    attendant.tell(1, FromCoordinator::Abort(Abort { failure: Some(failure), regroup: false }));
    for error in <[Error; 2]>::from(waiting.join().unwrap()) {
        assert!(matches!(&error, Error::Aborted(failure) if failure.bad_input), "{error:?}");
        assert_eq!(error.to_string(), sentence);
    }
    assert_eq!(heard.recv_timeout(Duration::from_secs(5)).unwrap(), (sentence.to_owned(), Some(0)));
}

#[test]
fn a_lost_coordinator_is_an_error_and_its_refusal_a_sentence() {
    let fake = Fake::start(batch);
    let (link, attendant) = joined(&fake);
    drop(attendant);
    assert!(matches!(link.directive(), Err(Error::Lost(_))));
    let (link, attendant) = joined(&fake);
    attendant.refuse("workers differ in libtorch");
    let error = link.directive().unwrap_err();
    assert!(matches!(error, Error::Refused(_)) && error.to_string().contains("differ in libtorch"), "{error}");
}

#[test]
fn messages_of_the_past_are_dropped() {
    let fake = Fake::start(batch);
    let link = fake.link(Join::default(), |_, _| {});
    let (attendant, _) = fake.welcome();
    attendant.tell(5, assign(0));
    link.assignment().unwrap();
    attendant.tell(4, FromCoordinator::Abort(Abort::default()));
    attendant.tell(4, FromCoordinator::Go(Go::default()));
    let checkpoint = directive::Body::Checkpoint(Checkpoint { step: 3, ..Default::default() });
    attendant.tell(5, FromCoordinator::Directive(Directive { id: 1, body: Some(checkpoint) }));
    assert_eq!(link.directive().unwrap().id, 1);
}

#[test]
fn heartbeats_tell_phase_and_step() {
    let fake = Fake::start(batch);
    let (link, attendant) = joined(&fake);
    link.progress().enter(Phase::Reduce);
    link.progress().set_step(Some(12));
    let told = std::iter::from_fn(|| attendant.message()).any(
        |m| matches!(m.body, Some(ToCoordinator::Heartbeat(h)) if h.phase() == Phase::Reduce && h.step == Some(12)),
    );
    assert!(told);
    link.progress().set_step(None);
    let told = std::iter::from_fn(|| attendant.message())
        .any(|m| matches!(m.body, Some(ToCoordinator::Heartbeat(h)) if h.step.is_none()));
    assert!(told);
}

#[test]
fn malformed_micro_batches_are_refused() {
    for (tokens, targets, starts) in [
        (vec![1, 2], vec![1], vec![0]),
        (vec![1, 2], vec![], vec![1]),
        (vec![1, 2], vec![], vec![0, 2]),
        (vec![1, 2, 3], vec![], vec![0, 2, 1]),
        (vec![], vec![], vec![]),
    ] {
        let fake =
            Fake::start(move |_| Batch { tokens: tokens.clone(), targets: targets.clone(), starts: starts.clone() });
        let (link, attendant) = joined(&fake);
        attendant.direct(1, step(1, &[0]));
        let keys = keys(&link.directive().unwrap());
        assert!(matches!(link.batch(&keys[0]), Err(Error::Protocol(_))));
    }
}
