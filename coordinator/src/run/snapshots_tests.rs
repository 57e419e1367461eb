//! What workers hold decides what the run goes on from: always the newest whole state, never a mix of steps.

use super::event::Connection;
use super::phases::Phase;
use super::simulated::*;
use super::snapshots::*;
use proptest::prelude::*;
use unisono_configs::run::Assignment;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::{Held, Membership};

const NOW: Timeline = [1; 32];

fn held(step: u64, rank: u32, world: u32) -> Held {
    let (timeline, blake3) = (NOW.to_vec().into(), vec![step as u8, rank as u8, world as u8].into());
    Held { step, timeline, rank, world, bytes: 1, blake3 }
}

fn holdings<'a>(layout: &'a unisono_configs::model::Layout, lists: &'a [Vec<Held>]) -> Holdings<'a> {
    Holdings::new(layout, &NOW, lists.iter().map(Vec::as_slice))
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
    while world.steps().len() < steps {
        (0..2).for_each(|id| {
            world.say(Connection(id));
        });
        world.commit();
    }
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
    while world.steps().len() < 7 {
        (0..3).for_each(|id| {
            world.say(Connection(id));
        });
        world.commit();
    }
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
