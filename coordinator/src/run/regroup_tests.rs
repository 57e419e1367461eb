//! Workers that are lost, at any point, and come back or do not: the run ends like the undisturbed one.

use super::event::{Connection, Event};
use super::phases::Phase;
use super::simulated::*;
use proptest::prelude::*;
use unisono_configs::run::Assignment;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{Failure, Heartbeat, Phase as Place, WorkerLost, WorkerMessage};

fn losses(world: &World) -> Vec<WorkerLost> {
    let lost = |e: &Entry| match e {
        Entry::Lost(lost) => Some(lost.clone()),
        _ => None,
    };
    world.ledger.iter().filter_map(lost).collect()
}

fn generations(world: &World) -> Vec<u64> {
    let generation = |e: &Entry| match e {
        Entry::Membership(m) => Some(m.generation),
        Entry::Lost(l) => Some(l.generation),
        _ => None,
    };
    world.ledger.iter().filter_map(generation).collect()
}

/// Two workers that have said that they are ready.
fn running(workers: u32) -> World {
    let mut world = World::new(workers, 9, Assignment::Balanced);
    (0..workers).for_each(|id| {
        world.say(Connection(u64::from(id)));
    });
    assert_eq!(world.machine.phase(), Phase::Running);
    world
}

fn complain(world: &mut World, from: Connection, message: &str) {
    accuse(world, from, None, message);
}

fn accuse(world: &mut World, from: Connection, rank: Option<u32>, message: &str) {
    let complaint = Failure {
        rank,
        phase: Place::Reduce.into(),
        step: Some(1),
        message: message.into(),
        recoverable: true,
        ..Default::default()
    };
    let message = WorkerMessage { epoch: world.workers[&from].epoch, body: Some(Report::Failure(complaint)) };
    world.apply(Event::Message { from, message }).unwrap();
}

/// Runs to the end, with deaths where `script` has them and a snapshot each `every` steps, and returns the whole ledger.
fn disturbed(workers: u32, steps: u64, every: u64, script: &[(u8, u64)]) -> Vec<Entry> {
    let machine = snapshotting(workers, steps, Assignment::Balanced, every);
    let mut world = World::with(machine, workers, Vec::new());
    for &(kind, pick) in script {
        world.now += 0.1;
        let connections: Vec<Connection> = world.workers.keys().copied().collect();
        let from = connections.get(pick as usize % connections.len().max(1)).copied();
        match (kind, from) {
            (0, Some(from)) => world.dies(from),
            (1..=2, _) => {
                world.next_joins();
            }
            (3, _) => world.commit(),
            (4, _) => world.apply(Event::Tick).unwrap_or_default(),
            (_, Some(from)) => {
                world.say(from);
            }
            _ => {}
        }
        if world.machine.phase().is_final() {
            break;
        }
    }
    // Whoever is waited for in vain is given up in time.
    world.settle_for(200.0);
    world.ledger
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    /// Deaths at any point: no committed step is lost, doubled or changed, generations only grow, and the same seed
    /// gives the same trace.
    #[test]
    fn whoever_dies_whenever_the_ledger_reads_like_an_undisturbed_one(
        workers in 1u32..5, steps in 1u64..12, every in 0u64..4, script in prop::collection::vec((0u8..40, 0u64..5), 0..400),
    ) {
        let ledger = disturbed(workers, steps, every, &script);
        prop_assert_eq!(&ledger, &disturbed(workers, steps, every, &script));
        let committed: Vec<(u64, u64)> = ledger.iter().filter_map(|e| match e {
            Entry::Step(s) => Some((s.step, s.loss.to_bits())),
            _ => None,
        }).collect();
        let reference = alone(steps);
        prop_assert_eq!(&committed[..], &reference[..committed.len()]);
        let checkpoints: Vec<u64> = ledger.iter().filter_map(|e| match e {
            Entry::Checkpoint(c) => Some(c.step),
            _ => None,
        }).collect();
        prop_assert!(checkpoints.windows(2).all(|w| w[0] < w[1]), "{:?}", checkpoints);
        let mut seen = std::collections::BTreeSet::new();
        for entry in &ledger {
            if let Entry::Eval(e) = entry {
                prop_assert!(seen.insert((e.step, e.split.clone(), e.task.clone())), "evaluated twice: {:?}", e);
            }
        }
        match ledger.last() {
            Some(Entry::Done(done)) => {
                prop_assert_eq!(committed.len(), reference.len());
                prop_assert_eq!(done.steps, steps);
            }
            Some(Entry::Failed(failure)) => prop_assert!(failure.message.contains("losses in a row"), "{:?}", failure),
            other => prop_assert!(false, "the run hangs after {:?}", other),
        }
    }
}

#[test]
fn the_run_goes_on_from_the_newest_checkpoint_with_the_successor() {
    let mut world = running(2);
    while world.steps().len() < 6 {
        world.say(Connection(0));
        world.say(Connection(1));
        world.commit();
    }
    world.dies(Connection(1));
    assert_eq!(world.machine.status(world.now).state, "regrouping");
    world.settle();
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
    let lost = losses(&world);
    let failure = lost[0].failure.clone().unwrap();
    assert_eq!((lost.len(), failure.rank, lost[0].resume_step), (1, Some(1), 4));
    assert_eq!(generations(&world), [1, 2, 2]);
    // Rank 0 kept its place, and both went on after step 4.
    let again: Vec<_> = world.workers.values().filter(|w| w.epoch.is_some_and(|e| e.generation == 2)).collect();
    assert_eq!(again.iter().map(|w| (w.rank, w.steps[0])).collect::<Vec<_>>().len(), 2);
    assert!(again.iter().any(|w| w.listen == "ada:0" && w.rank == 0));
    assert!(again.iter().all(|w| w.steps.first() == Some(&5)));
}

#[test]
fn if_nobody_comes_the_rest_go_on() {
    let mut world = running(3);
    world.dies(Connection(2));
    world.joining.retain(|listen| listen == "ada:0" || listen == "ada:1");
    let beat = |world: &mut World| {
        world.now += 1.0;
        for (&from, worker) in &world.workers {
            let body = Some(Report::Heartbeat(Heartbeat::default()));
            let message = WorkerMessage { epoch: worker.epoch, body };
            // Those of the generation before are strangers.
            world.machine.apply(world.now, Event::Message { from, message }).ok();
        }
        world.apply(Event::Tick).unwrap();
    };
    world.next_joins();
    (0..32).for_each(|_| beat(&mut world));
    assert_eq!(world.machine.phase(), Phase::Gathering, "one more is still expected");
    world.next_joins();
    beat(&mut world);
    assert_eq!(world.machine.phase(), Phase::Loading);
    world.settle();
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
}

/// A run of two workers that goes on with one, since nobody came for the other.
fn short_handed() -> World {
    let mut world = running(2);
    world.dies(Connection(1));
    world.joining.retain(|listen| listen == "ada:0");
    world.next_joins();
    // One leap of the clock is a sleep of the coordinator's, and nobody's silence.
    world.now += 31.0;
    world.apply(Event::Tick).unwrap();
    world.apply(Event::Tick).unwrap();
    world
}

#[test]
fn a_late_worker_gets_a_place_at_the_next_checkpoint() {
    let mut world = short_handed();
    world.say(Connection(2));
    assert_eq!(world.machine.phase(), Phase::Running);
    assert_eq!(world.machine.status(world.now).workers.len(), 1);
    world.joins("ada:7".into());
    world.settle();
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
    assert_eq!(world.machine.status(world.now).workers.len(), 2);
    assert_eq!(losses(&world).len(), 1, "growing is no loss");
}

/// Somebody complained of a peer just before everyone regrouped for another reason: nobody is blamed for it afterwards.
#[test]
fn a_complaint_ends_with_its_generation() {
    let mut world = short_handed();
    while world.machine.phase() != Phase::Running || world.commits.is_empty() {
        world.say(Connection(2));
    }
    world.joins("ada:7".into());
    complain(&mut world, Connection(2), "peer closed");
    world.commit();
    assert_eq!(world.machine.status(world.now).state, "regrouping");
    while world.next_joins() {}
    assert_eq!(world.machine.phase(), Phase::Loading);
    world.now += 3.0;
    world.apply(Event::Tick).unwrap();
    world.settle();
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
    assert_eq!(losses(&world).len(), 1, "growing is no loss");
}

#[test]
fn a_worker_that_is_lost_again_and_again_ends_the_run() {
    let mut world = running(2);
    for _ in 0..4 {
        let newest = *world.workers.keys().last().unwrap();
        world.dies(newest);
        while world.next_joins() {}
    }
    let failure = world.failure();
    assert!(failure.message.contains("4 losses in a row") && failure.message.contains("--resume"), "{failure:?}");
    assert_eq!(losses(&world).len(), 3);
}

#[test]
fn the_lost_rank_is_named_and_not_the_one_that_noticed() {
    let mut world = running(3);
    complain(&mut world, Connection(0), "peer closed");
    assert_eq!(world.machine.phase(), Phase::Running);
    world.dies(Connection(2));
    let failure = losses(&world)[0].failure.clone().unwrap();
    assert_eq!((failure.rank, failure.host.as_str(), failure.step), (Some(2), "ada", Some(1)));
    assert!(failure.message.contains("was lost"), "{}", failure.message);
    world.settle();
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
}

#[test]
fn a_complaint_that_nothing_explains_is_a_loss_by_itself() {
    let mut world = running(2);
    complain(&mut world, Connection(1), "bad frame");
    world.now += 1.0;
    world.apply(Event::Tick).unwrap();
    assert_eq!(world.machine.phase(), Phase::Running);
    world.now += 1.5;
    world.apply(Event::Tick).unwrap();
    let failure = losses(&world)[0].failure.clone().unwrap();
    assert_eq!((failure.rank, failure.message.as_str()), (Some(1), "bad frame"));
}

/// Ranks that wait for each other: the one that nobody hears, and that says nothing itself, is to blame.
#[test]
fn of_crossed_complaints_the_end_of_the_chain_is_blamed() {
    let mut world = running(3);
    for (by, of) in [(0, 1), (1, 2)] {
        accuse(&mut world, Connection(by), Some(of), "silent");
    }
    world.now += 2.5;
    world.apply(Event::Tick).unwrap();
    let failure = losses(&world)[0].failure.clone().unwrap();
    assert_eq!(failure.rank, Some(2));
    assert!(failure.message.contains("rank 1 on ada says so, in reduce"), "{}", failure.message);
}

#[test]
fn a_silent_worker_is_lost_and_its_late_words_are_refused() {
    let mut world = running(2);
    for _ in 0..13 {
        world.now += 1.0;
        world.say(Connection(0));
        world.apply(Event::Tick).unwrap();
        let message = WorkerMessage { epoch: world.workers[&Connection(0)].epoch, body: None };
        world.apply(Event::Message { from: Connection(0), message }).ok();
        let body = Some(Report::Heartbeat(Heartbeat::default()));
        let message = WorkerMessage { epoch: world.workers[&Connection(0)].epoch, body };
        world.apply(Event::Message { from: Connection(0), message }).ok();
    }
    let failure = losses(&world)[0].failure.clone().unwrap();
    assert_eq!((failure.rank, failure.phase(), failure.step), (Some(1), Place::Forward, Some(1)));
    assert!(failure.message.contains("silent for"), "{}", failure.message);
    // It only slept: what it says now belongs to nobody, and it waits as a spare when it joins again.
    assert!(!world.say(Connection(1)));
    world.settle();
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
}

/// A run goes on with the arithmetic that it began with, also under another coordinator; another build is told.
#[test]
fn the_arithmetic_outlives_the_coordinator() {
    let mut world = running(1);
    while world.steps().len() < 5 {
        world.say(Connection(0));
        world.commit();
    }
    let again = |change: fn(&mut unisono_proto::v1::Fingerprint)| {
        let mut world = World::resumed(0, 9, 4, &world.ledger);
        let mut join = join("bob:0");
        change(join.fingerprint.as_mut().unwrap());
        let told = world.machine.apply(200.0, Event::Joined { from: Connection(7), join });
        told.map(|effects| {
            effects.iter().any(|e| matches!(e, super::event::Effect::Append(Entry::Warning(w)) if w.kind == "build"))
        })
    };
    assert_eq!(again(|_| {}), Ok(false));
    assert_eq!(again(|f| f.binary = "another".into()), Ok(true));
    let refused = again(|f| f.libtorch = "2.12.0".into()).unwrap_err().to_string();
    assert!(refused.contains("2.12.0") && refused.contains("2.11.0"), "{refused}");
}

#[test]
fn only_those_who_load_for_the_first_time_share_what_memory_is_left() {
    let mut machine = machine(2, 5, Assignment::Balanced);
    machine.apply(0.0, Event::Joined { from: Connection(0), join: join("ada:0") }).unwrap();
    let again = unisono_proto::v1::Join { again: true, ..join("ada:1") };
    let effects = machine.apply(0.0, Event::Joined { from: Connection(1), join: again }).unwrap();
    let fresh: Vec<u32> = effects
        .iter()
        .filter_map(|effect| match effect {
            super::event::Effect::Assign { assign, .. } => Some(assign.fresh),
            _ => None,
        })
        .collect();
    assert_eq!(fresh, [1, 1]);
}
