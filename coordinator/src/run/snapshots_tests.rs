//! What workers hold decides what the run goes on from: always the newest whole state, never a mix of steps.

use super::event::{Connection, Event};
use super::phases::Phase;
use super::simulated::*;
use super::snapshots::*;
use proptest::prelude::*;
use std::collections::BTreeSet;
use unisono_configs::run::Assignment;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{Held, Membership};

const NOW: Timeline = [1; 32];

fn held(step: u64, rank: u32, world: u32) -> Held {
    let (timeline, blake3) = (NOW.to_vec().into(), vec![step as u8, rank as u8, world as u8].into());
    Held { step, timeline, rank, world, bytes: 1, blake3 }
}

fn holdings<'a>(layout: &'a unisono_configs::model::Layout, lists: &'a [Vec<Held>]) -> Holdings<'a> {
    Holdings::new(layout, &[(NOW, 100)], lists.iter().map(Vec::as_slice))
}

/// Every chunk that `lists` has of `step`, as (bucket, chunk).
fn chunks<'a>(all: impl Iterator<Item = &'a Held>) -> std::collections::BTreeSet<(usize, usize)> {
    let of = |h: &Held| layout().shard(h.rank as usize, h.world as usize);
    let numbered =
        |h: &Held| of(h).into_iter().enumerate().flat_map(|(b, r)| r.map(move |c| (b, c))).collect::<Vec<_>>();
    all.flat_map(numbered).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn it_is_the_newest_whole_state_and_everybody_gets_the_own_part_of_it(
        lists in prop::collection::vec(prop::collection::vec((1u64..5, 0u32..4, 1u32..5), 0..8), 1..5),
        after in 0u64..4, until in 0u64..6,
    ) {
        let make = |list: &Vec<(u64, u32, u32)>| list.iter().map(|&(s, r, w)| held(s, r % w, w)).collect::<Vec<_>>();
        let lists: Vec<Vec<Held>> = lists.iter().map(make).collect();
        let (layout, world) = (layout(), lists.len());
        let whole = |step: u64| {
            let of_step = lists.iter().flatten().filter(|h| h.step == step);
            chunks(of_step).len() == layout.buckets.iter().map(|b| b.chunks()).sum::<usize>()
        };
        let expected = (after + 1..=until.max(after)).rev().find(|&step| whole(step));
        let holdings = holdings(&layout, &lists);
        let newest = holdings.newest(after, until);
        prop_assert_eq!(newest, expected);
        let Some(step) = newest else { return Ok(()) };
        for rank in 0..world {
            let sources = holdings.sources(step, rank, world);
            prop_assert!(sources.iter().all(|s| s.held.step == step && lists[s.holder].contains(s.held)));
            let found = chunks(sources.iter().map(|s| s.held));
            let needed = chunks([&held(step, rank as u32, world as u32)].into_iter());
            prop_assert!(needed.is_subset(&found), "rank {} of {} lacks some of {:?}", rank, world, needed);
            let mut before = std::collections::BTreeSet::new();
            for source in &sources {
                let brings = &chunks([source.held].into_iter()) & &needed;
                prop_assert!(!brings.is_subset(&before), "nothing is fetched for nothing");
                before.extend(brings);
            }
            let own = held(step, rank as u32, world as u32);
            if lists[rank].contains(&own) {
                prop_assert_eq!(sources.len(), usize::from(!needed.is_empty()), "what is here is not fetched");
                prop_assert!(sources.iter().all(|s| s.holder == rank));
            }
        }
    }
}

#[test]
fn another_timeline_and_copies_that_differ_are_no_sources() {
    let layout = layout();
    let mut lists = vec![vec![held(4, 0, 2), held(4, 1, 2)], vec![held(4, 1, 2)]];
    assert_eq!(holdings(&layout, &lists).newest(0, 9), Some(4));
    lists[1][0].blake3 = vec![9].into();
    assert_eq!(holdings(&layout, &lists).newest(0, 9), None);
    lists[1].clear();
    assert_eq!(holdings(&layout, &lists).newest(0, 9), Some(4));
    lists[0][0].timeline = vec![2; 32].into();
    assert_eq!(holdings(&layout, &lists).newest(0, 9), None);
    let nonsense = Held { rank: 5, ..held(4, 0, 2) };
    assert_eq!(holdings(&layout, &[vec![nonsense]]).newest(0, 9), None);
}

#[test]
fn neighbours_are_on_other_hosts_where_hosts_allow_it_and_everyone_is_one() {
    let check = |hosts: &[&str]| {
        let found: Vec<usize> = neighbours(hosts).into_iter().map(Option::unwrap).collect();
        let mut everyone = found.clone();
        everyone.sort_unstable();
        assert_eq!(everyone, (0..hosts.len()).collect::<Vec<_>>());
        assert!(found.iter().enumerate().all(|(rank, &other)| rank != other));
        found.iter().enumerate().filter(|(rank, &other)| hosts[*rank] == hosts[other]).count()
    };
    assert_eq!(neighbours(&["a"]), [None]);
    assert_eq!(check(&["a", "a", "a"]), 3);
    assert_eq!(check(&["a", "b", "a", "b", "c"]), 0);
    assert_eq!(check(&["a", "a", "a", "b", "b", "b"]), 0);
    // Four of six on one host: two of them have to share it.
    assert_eq!(check(&["a", "a", "a", "a", "b", "c"]), 2);
}

/// A run of two workers with a snapshot every second step and a checkpoint every fourth, after `steps` committed steps and
/// with everything said.
fn running(steps: usize) -> World {
    let mut world = World::with(snapshotting(2, 9, Assignment::Balanced, 2), 2, Vec::new());
    world.speak_until(steps);
    world
}

fn memberships(world: &World) -> Vec<Membership> {
    let membership = |e: &Entry| match e {
        Entry::Membership(m) => Some(m.clone()),
        _ => None,
    };
    world.ledger.iter().filter_map(membership).collect()
}

/// Where the second generation began: after which step, from memory or not, and how many steps it computed again.
fn second(world: &World) -> (u64, bool, u64) {
    let second = &memberships(world)[1];
    (second.resume_step, second.from_memory, second.replayed)
}

#[test]
fn after_a_loss_the_run_goes_on_from_the_newest_snapshot() {
    let mut world = running(7);
    world.dies(Connection(1));
    world.settle();
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
    let (step, from_memory, replayed) = second(&world);
    assert!(from_memory && (5..8).contains(&step) && replayed == 7 - step, "{:?}", second(&world));
}

#[test]
fn where_both_holders_are_lost_the_checkpoint_is_gone_on_from() {
    let mut world = running(7);
    world.dies(Connection(1));
    world.dies(Connection(0));
    world.settle();
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
    assert_eq!(second(&world), (4, false, 3));
}

#[test]
fn fewer_and_more_workers_go_on_from_the_same_snapshot() {
    let mut world = World::with(snapshotting(3, 9, Assignment::Balanced, 2), 3, Vec::new());
    world.speak_until(7);
    world.dies(Connection(1));
    world.joining.retain(|listen| !listen.ends_with('\''));
    world.settle_for(120.0);
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
    let told = memberships(&world);
    assert_eq!((told[1].members.len(), told[1].from_memory), (2, true));
}

#[test]
fn a_coordinator_that_comes_back_finds_the_snapshots_and_never_goes_beyond_its_ledger() {
    let before = running(7);
    // The newest steps never reached the disk.
    let ledger: Vec<Entry> =
        before.ledger.iter().filter(|e| !matches!(e, Entry::Step(s) if s.step > 6)).cloned().collect();
    for lost in [0, 1] {
        let ledger: Vec<Entry> =
            ledger.iter().filter(|e| !matches!(e, Entry::Step(s) if s.step > 6 - lost)).cloned().collect();
        let mut world = World::resumed_with(2, 9, 4, 2, &ledger, before.memory.clone());
        world.settle();
        assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
        // The membership of the coordinator before is in the ledger too.
        let expected = if lost == 0 { (6, true, 0) } else { (4, false, 1) };
        assert_eq!(second(&world), expected);
    }
}

#[test]
fn what_belongs_to_the_step_of_a_snapshot_is_not_left_out() {
    // A validation every third step, a snapshot every third: the validation comes after the snapshot.
    for said in 0..60 {
        let mut world = World::with(snapshotting(2, 9, Assignment::Balanced, 3), 2, Vec::new());
        for turn in 0..said {
            world.say(Connection(turn % 2));
            world.commit();
        }
        world.dies(Connection(1));
        world.settle();
        let evaluated = |e: &Entry| match e {
            Entry::Eval(e) if e.split == "validation" && e.task.is_empty() => Some(e.step),
            _ => None,
        };
        let steps: Vec<u64> = world.ledger.iter().filter_map(evaluated).collect();
        assert_eq!(steps, [3, 6, 9], "a death after {said} words");
        assert_eq!(world.steps(), alone(9));
    }
}

#[test]
fn a_snapshot_that_is_missed_is_followed_by_whole_ones() {
    for unsent in [vec![(0, 4)], vec![(1, 4)], vec![(0, 4), (1, 4)], vec![(0, 2), (1, 4), (0, 6)]] {
        let mut world = World::with(snapshotting(2, 12, Assignment::Balanced, 2), 2, Vec::new());
        world.unsent = unsent;
        while world.steps().len() < 11 {
            world.speak();
        }
        world.dies(Connection(1));
        world.settle();
        assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(12)));
        let (step, from_memory, _) = second(&world);
        assert!(from_memory && step >= 8, "after step {step} with {:?} missed", world.unsent);
    }
}

#[test]
fn where_no_snapshot_becomes_whole_somebody_is_told_once() {
    let mut world = World::with(snapshotting(2, 12, Assignment::Balanced, 1), 2, Vec::new());
    world.unsent = (1..12).map(|step| (1, step)).collect();
    world.settle();
    let warning = |e: &Entry| match e {
        Entry::Warning(w) if w.kind == "snapshot" => Some(w.clone()),
        _ => None,
    };
    let warnings: Vec<_> = world.ledger.iter().filter_map(warning).collect();
    assert_eq!((warnings.len(), warnings[0].step, world.steps()), (1, Some(3), alone(12)));
    let told = &warnings[0].message;
    assert!(
        told.contains("Rank 1 on ada") && told.contains("cannot be reached") && told.contains("beginning"),
        "{told}"
    );
}

#[test]
fn a_checkpoint_that_was_due_is_taken_at_once_where_the_run_goes_on_beyond_it() {
    let mut world = World::with(snapshotting(2, 12, Assignment::Balanced, 3), 2, Vec::new());
    while world.steps().len() < 7 {
        // Rank 1 never says that its part of the checkpoint after step 4 is written.
        let writing = world.workers.get_mut(&Connection(1)).unwrap();
        writing.outbox.retain(|(_, word)| !matches!(word, Report::Checkpoint(_)));
        world.speak();
    }
    world.dies(Connection(1));
    world.settle();
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(12)));
    assert_eq!(second(&world), (6, true, 1));
    let saved = |e: &Entry| match e {
        Entry::Checkpoint(c) => Some(c.step),
        _ => None,
    };
    assert_eq!(world.ledger.iter().filter_map(saved).collect::<Vec<_>>(), [6, 8, 12]);
}

#[test]
fn a_state_that_cannot_be_fetched_is_passed_over_and_the_holder_named() {
    let mut world = running(7);
    // Rank 1 comes back with empty hands and cannot reach rank 0.
    world.unreachable = Some("ada:0".into());
    world.dies(Connection(1));
    world.settle_for(30.0);
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
    let told = memberships(&world);
    assert_eq!((told[1].from_memory, told[2].from_memory, told[2].resume_step), (true, false, 4));
    let lost = |e: &Entry| match e {
        Entry::Lost(lost) => lost.failure.clone(),
        _ => None,
    };
    let failures: Vec<_> = world.ledger.iter().filter_map(lost).collect();
    let named = failures.iter().map(|f| f.rank).collect::<Vec<_>>();
    assert_eq!(named, [Some(1), Some(0)], "{failures:?}");
}

#[test]
fn spares_wait_for_those_who_hold_the_state() {
    let mut world = running(7);
    world.joins("ada:8".into());
    world.joins("ada:9".into());
    world.dies(Connection(1));
    assert_eq!(world.machine.phase(), Phase::Gathering, "two spares would be enough, and hold nothing");
    world.settle();
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
    assert!(second(&world).1, "{:?}", second(&world));
    // Nobody comes back: they do not wait for ever.
    let mut world = running(7);
    world.joins("ada:8".into());
    world.joins("ada:9".into());
    world.dies(Connection(1));
    world.joining.clear();
    world.settle_for(120.0);
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
    assert_eq!(second(&world), (4, false, 3));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whoever is slow to say what became of its snapshot, and whoever dies: where a snapshot is gone on from, it is the newest but
    /// for the steps between two and one, and for those that could not be taken.
    #[test]
    fn a_loss_costs_no_more_than_the_steps_between_two_snapshots_and_one(
        workers in 2u32..5, every in 1u64..6, script in prop::collection::vec((0u8..60, 0u64..5), 100..500),
    ) {
        let mut world = World::with(snapshotting(workers, 40, Assignment::Balanced, every), workers, Vec::new());
        world.machine.settings.restarts = 100;
        // Who takes both places of a shard at once takes the newest snapshot too.
        world.follow(&script, true);
        world.settle_for(100.0);
        prop_assert_eq!(world.machine.phase(), Phase::Finished);
        prop_assert_eq!(world.steps(), alone(40));
        let newest = |told: &Membership| told.resume_step + told.replayed;
        for pair in memberships(&world).windows(2) {
            let (before, told) = (&pair[0], &pair[1]);
            // How far one came that made nothing new is nowhere.
            if !told.from_memory || newest(told) == newest(before) {
                continue;
            }
            // One that a worker could not take is known to be missing: nobody waits for it, and the next one follows it.
            let again = told.resume_step + 1..=newest(told);
            let missed = |&&(generation, step): &&(u64, u64)| generation == before.generation && again.contains(&step);
            let missed: BTreeSet<u64> = world.missed.iter().filter(missed).map(|(_, step)| *step).collect();
            let most = every * (1 + missed.len() as u64) + 1;
            prop_assert!(told.replayed <= most, "{} steps again with one every {}: {:?}", told.replayed, every, missed);
        }
    }
}

#[test]
fn nobody_waits_for_ever_for_a_snapshot() {
    for silent in [&[1][..], &[0, 1]] {
        let mut world = World::with(snapshotting(2, 12, Assignment::Balanced, 2), 2, Vec::new());
        while world.machine.phase() != Phase::Finished && world.now < 200.0 {
            // These never say what became of their snapshots.
            world.workers.values_mut().filter(|w| silent.contains(&w.rank)).for_each(|worker| {
                worker.outbox.retain(|(_, word)| !matches!(word, Report::Kept(_)));
            });
            world.speak();
            world.commit();
            let committed = world.steps().len();
            assert!(
                committed <= 3 || world.now > 100.9,
                "{committed} steps before it is known what became of the second one's"
            );
            world.now += 0.02;
            // Refused after the end.
            world.apply(Event::Tick).ok();
        }
        assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(12)));
        assert!(world.now < 104.5, "three waits of a second each, and then no more, not {}", world.now - 100.0);
        let late = |e: &&Entry| matches!(e, Entry::Warning(w) if w.message.contains("took longer than training waits"));
        assert_eq!(world.ledger.iter().filter(late).count(), 1, "{silent:?} are silent");
    }
}
