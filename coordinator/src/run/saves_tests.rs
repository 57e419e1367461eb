//! Saves that fail and runs that are asked to stop, with simulated workers.

use super::event::{Connection, Event, NotCommitted};
use super::phases::Phase;
use super::simulated::*;
use proptest::prelude::*;
use unisono_configs::run::Assignment;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::{RunStopped, Warning};

fn warnings(world: &World) -> Vec<Warning> {
    let warning = |e: &Entry| match e {
        Entry::Warning(w) => Some(w.clone()),
        _ => None,
    };
    world.ledger.iter().filter_map(warning).collect()
}

fn saved(world: &World) -> Vec<u64> {
    let step = |e: &Entry| match e {
        Entry::Checkpoint(c) => Some(c.step),
        _ => None,
    };
    world.ledger.iter().filter_map(step).collect()
}

fn stopped(world: &World) -> RunStopped {
    let stopped = |e: &Entry| match e {
        Entry::Stopped(s) => Some(s.clone()),
        _ => None,
    };
    world.ledger.iter().find_map(stopped).expect("the run was stopped")
}

fn full() -> Option<String> {
    Some("/runs/one: there is no room".into())
}

#[test]
fn a_save_that_fails_is_told_and_tried_again_at_a_later_barrier() {
    let mut world = World::new(2, 12, Assignment::Balanced);
    // Rank 1 cannot write the first save, rank 0 not the second.
    world.disk.extend([None, full(), full(), None]);
    world.settle_for(60.0);
    assert_eq!(world.machine.phase(), Phase::Finished);
    assert_eq!(world.steps(), alone(12), "training went on, to the bit");
    let told = warnings(&world);
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].message.contains("rank 1 on ada") && told[0].message.contains("no room"), "{}", told[0].message);
    assert!(told[1].message.contains("rank 0 on ada"), "{}", told[1].message);
    let saved = saved(&world);
    assert!(saved.len() >= 2 && !saved.contains(&4) && saved.last() == Some(&12), "{saved:?}");
}

#[test]
fn the_last_save_is_tried_a_few_times_and_then_fails_the_run() {
    let mut world = World::new(2, 3, Assignment::Balanced);
    world.disk.extend((0..6).map(|_| full()));
    world.settle_for(60.0);
    assert_eq!(world.machine.phase(), Phase::Finished, "the fourth attempt is good");
    assert_eq!((warnings(&world).len(), saved(&world)), (3, vec![3]));

    let mut world = World::new(2, 3, Assignment::Balanced);
    world.disk.extend((0..100).map(|_| full()));
    world.settle_for(60.0);
    assert_eq!(world.machine.phase(), Phase::Failed);
    let message = world.failure().message;
    assert!(message.contains("failed 5 times") && message.contains("no room"), "{message}");
    assert_eq!(world.steps(), alone(3), "what was trained stays on record");
}

#[test]
fn a_commit_that_fails_is_tried_again_and_one_that_cannot_succeed_fails_the_run() {
    for fatal in [false, true] {
        let mut world = World::new(2, 3, Assignment::Balanced);
        let connections = [Connection(0), Connection(1)];
        while world.commits.is_empty() {
            for from in connections {
                world.say(from);
            }
        }
        let attempt = world.commits.pop_front().unwrap().attempt;
        let error = NotCommitted { message: "MANIFEST.json: cannot be written".into(), fatal };
        world.apply(Event::CheckpointCommitted { attempt, result: Err(error) }).unwrap();
        world.settle_for(60.0);
        let end = if fatal { Phase::Failed } else { Phase::Finished };
        assert_eq!(world.machine.phase(), end);
        assert_eq!(warnings(&world).len(), usize::from(!fatal));
    }
}

/// The generation that asked for the last save is over when its commit fails: the next one goes back, and does not save
/// what it has then under the last step's name.
#[test]
fn a_commit_that_fails_late_is_tried_again_only_where_the_run_stands_there_again() {
    for (steps, joins_first) in [(3, false), (9, false), (12, false), (12, true), (3, true), (2, true), (1, true)] {
        let mut world = World::new(2, steps, Assignment::Balanced);
        while world.commits.front().is_none_or(|pending| pending.step < steps) {
            let commits = world.commits.front().is_some();
            if commits {
                world.commit();
            }
            for id in [0, 1] {
                world.say(Connection(id));
            }
        }
        world.dies(Connection(1));
        if joins_first {
            while world.next_joins() {}
            (2..4).for_each(|id| assert!(world.say(Connection(id))));
            assert_eq!(world.machine.phase(), Phase::Running);
        }
        world.refusals = 1;
        world.commit();
        world.now += 1.0;
        world.settle_for(60.0);
        assert_eq!(world.machine.phase(), Phase::Finished);
        assert_eq!((world.steps(), saved(&world).last().copied()), (alone(steps), Some(steps)));
    }
}

/// Everything is written, and only the commit is under way: whoever is lost now is not missed.
#[test]
fn a_worker_lost_while_the_last_commit_of_a_stop_is_under_way_costs_nothing() {
    for fails in [false, true] {
        let mut world = World::new(2, 12, Assignment::Balanced);
        while world.steps().len() < 2 {
            for id in [0, 1] {
                world.say(Connection(id));
            }
        }
        world.apply(Event::Interrupt { by: "SIGTERM".into() }).unwrap();
        while world.commits.is_empty() {
            for id in [0, 1] {
                world.say(Connection(id));
            }
        }
        world.dies(Connection(1));
        assert_eq!(world.machine.phase(), Phase::Running, "the commit is waited for");
        world.refusals = u32::from(fails);
        world.commit();
        assert_eq!(world.machine.phase(), Phase::Stopped);
        let RunStopped { step, checkpoint, message } = stopped(&world);
        assert_eq!((step, checkpoint), (world.steps().len() as u64, if fails { 0 } else { step }), "{message}");
        assert_eq!(world.kinds()[world.kinds().len() - 2..], [if fails { "warning" } else { "checkpoint" }, "stopped"]);
    }
}

/// What only the survivors' memory has is saved before the run stops, without waiting for anybody to come.
#[test]
fn a_run_that_is_asked_to_stop_after_a_loss_saves_what_the_others_hold() {
    for (loading, both_survive) in [(false, true), (true, true), (false, false)] {
        let mut world = World::with(snapshotting(3, 12, Assignment::Balanced, 1), 3, Vec::new());
        while world.steps().len() < 3 {
            for id in 0..3 {
                world.say(Connection(id));
            }
        }
        world.dies(Connection(2));
        world.joining.retain(|listen| listen == "ada:0" || listen == "ada:1" && both_survive);
        if loading {
            world.joins("ada:7".into());
            while world.next_joins() {}
            assert_eq!(world.machine.phase(), Phase::Loading);
        }
        world.apply(Event::Interrupt { by: "SIGTERM".into() }).unwrap();
        world.settle_for(20.0);
        assert_eq!(world.machine.phase(), Phase::Stopped);
        let RunStopped { step, checkpoint, message } = stopped(&world);
        match both_survive {
            true => assert!(checkpoint > 0 && checkpoint == step && saved(&world) == [step], "{loading} {message}"),
            // One does not come back: when the grace is over, the run ends as it is.
            false => assert!(checkpoint == 0 && step > 0, "{message}"),
        }
    }
}

#[test]
fn a_checkpoint_that_is_being_loaded_is_kept_until_it_is() {
    let mut world = World::new(2, 12, Assignment::Balanced);
    while world.commits.front().is_none_or(|pending| pending.step < 8) {
        if !world.commits.is_empty() {
            world.commit();
        }
        for id in [0, 1] {
            world.say(Connection(id));
        }
    }
    world.dies(Connection(1));
    while world.next_joins() {}
    assert_eq!(world.machine.phase(), Phase::Loading);
    world.commit();
    assert_eq!(world.pruned, Some((Some(8), Some(4))));
    for id in [2, 3] {
        world.say(Connection(id));
    }
    assert_eq!((world.machine.phase(), world.pruned), (Phase::Running, Some((Some(8), None))));
}

#[test]
fn a_directory_that_cannot_be_made_fails_the_attempt_in_its_own_words() {
    let mut world = World::new(1, 3, Assignment::Balanced);
    world.disk.push_back(Some("no such directory".into()));
    for _ in 0..8 {
        world.say(Connection(0));
        world.apply(Event::CheckpointUnprepared { attempt: 1, problem: "disk full".into() }).ok();
    }
    world.settle_for(60.0);
    assert_eq!(world.machine.phase(), Phase::Finished);
    assert!(warnings(&world)[0].message.contains("disk full"), "{:?}", warnings(&world));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whenever somebody asks, all workers come to stand after the same step, which is saved; and the run that goes on
    /// from there ends like the undisturbed one.
    #[test]
    fn a_run_that_is_asked_to_stop_loses_nothing(
        workers in 1u32..5, steps in 1u64..14, picks in prop::collection::vec(0u64..5, 0..120),
        failing in prop::collection::vec(prop::option::of(Just(())), 0..4),
    ) {
        let mut world = World::new(workers, steps, Assignment::Balanced);
        world.disk = failing.into_iter().map(|f| f.and(full())).collect();
        for pick in picks {
            match pick {
                4 => world.commit(),
                pick => {
                    world.say(Connection(pick % u64::from(workers)));
                }
            }
        }
        let running = world.machine.phase() == Phase::Running;
        if !world.machine.phase().is_final() {
            world.apply(Event::Interrupt { by: "SIGTERM".into() }).unwrap();
        }
        world.settle_for(30.0);
        prop_assert!(world.machine.phase().is_final());
        let committed = world.steps();
        let reference = alone(steps);
        prop_assert_eq!(&committed[..], &reference[..committed.len()], "a prefix, to the bit");
        if world.machine.phase() == Phase::Finished {
            return Ok(());
        }
        prop_assert_eq!(world.machine.phase(), Phase::Stopped);
        let RunStopped { step, checkpoint, message } = stopped(&world);
        prop_assert_eq!(step, committed.len() as u64);
        prop_assert!(message.contains("SIGTERM") && message.contains("--resume"), "{}", message);
        prop_assert_eq!(world.kinds().last().copied(), Some("stopped"));
        if running {
            prop_assert_eq!(checkpoint, step, "{}", message);
            prop_assert_eq!(saved(&world).last().copied(), Some(step).filter(|&s| s > 0));
        }
        let mut again = World::resumed(3, steps, checkpoint, &world.ledger);
        again.settle_for(60.0);
        prop_assert_eq!(again.machine.phase(), Phase::Finished);
        prop_assert_eq!(again.steps(), reference);
    }
}

#[test]
fn when_the_grace_is_over_the_run_ends_as_it_is() {
    let mut world = World::new(2, 9, Assignment::Balanced);
    while world.steps().len() < 2 {
        for id in [0, 1] {
            world.say(Connection(id));
        }
    }
    world.apply(Event::Interrupt { by: "SIGUSR1".into() }).unwrap();
    // One worker hangs: only the other answers.
    for _ in 0..20 {
        world.say(Connection(0));
    }
    world.now += 9.9;
    world.machine.apply(world.now, Event::Tick).ok();
    assert_eq!(world.machine.phase(), Phase::Running);
    world.now += 0.2;
    world.apply(Event::Tick).unwrap();
    assert_eq!(world.machine.phase(), Phase::Stopped);
    let RunStopped { checkpoint, message, .. } = stopped(&world);
    assert!(checkpoint == 0 && message.contains("before that was saved"), "{message}");
    assert!(world.workers.values().all(|w| w.aborted));
}
