//! Rows that give bad numbers or spikes: whoever computes and whatever happens, the same rows are left out from the same step.

use super::event::{Connection, Event};
use super::machine::Machine;
use super::phases::Phase;
use super::program::Program;
use super::simulated::*;
use super::storm::story;
use proptest::prelude::*;
use std::collections::BTreeSet;
use unisono_configs::run::{Assignment, OnBadNumbers, OnSpike};
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{Failure, Phase as Place, Quarantined, WorkerMessage};

const STEPS: u64 = 12;

fn world(workers: u32, poison: &BTreeSet<u32>, spiky: &BTreeSet<u32>) -> World {
    let mut settings = quarantining(workers);
    (settings.snapshots.every, settings.restarts) = (2, 100);
    let mut world = World::with(Machine::new(settings, program(STEPS)), workers, Vec::new());
    (world.poison, world.spiky) = (poison.clone(), spiky.clone());
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn whoever_computes_and_dies_the_same_rows_are_left_out_and_the_rest_is_as_if_they_had_never_been_there(
        poison in prop::collection::btree_set(0u32..23, 0..3), spiky in prop::collection::btree_set(0u32..23, 0..2),
        workers in 1u32..4, script in prop::collection::vec((0u8..30, 0u64..4), 0..150),
    ) {
        let mut alone = world(1, &poison, &spiky);
        alone.settle_for(100.0);
        let expected = story(&alone);
        prop_assume!(alone.machine.phase() == Phase::Finished);
        let mut disturbed = world(workers, &poison, &spiky);
        disturbed.follow(&script, false);
        disturbed.settle_for(200.0);
        prop_assert_eq!(story(&disturbed), expected.clone(), "{:?}", disturbed.machine.status(0.0).failure);
        // Left out from the start on, the same rows lead to the same steps.
        let Program::Train(training) = program(STEPS) else { unreachable!() };
        expected.1.iter().for_each(|(step, rows)| training.plan.quarantine(*step, rows));
        let settings = settings(1, Assignment::Balanced);
        let mut without = World::with(Machine::new(settings, Program::Train(training)), 1, Vec::new());
        // A row may have been trained on before it made a spike.
        without.spiky = spiky;
        without.settle();
        prop_assert_eq!(without.steps(), expected.0);
    }
}

#[test]
fn where_every_micro_batch_is_bad_it_is_not_the_rows() {
    let mut world = world(2, &(0..23).collect(), &BTreeSet::new());
    world.settle_for(50.0);
    let failure = world.failure();
    assert!(failure.message.contains("every micro-batch of step 1"), "{failure:?}");
    assert_eq!(world.steps(), []);
}

#[test]
fn a_run_that_is_to_stop_at_a_spike_does_and_does_not_commit_it() {
    let mut world = world(2, &BTreeSet::new(), &BTreeSet::from([9]));
    world.machine.settings.on_spike = OnSpike::Stop;
    world.settle_for(50.0);
    let failure = world.failure();
    assert!(failure.message.contains("is above") && failure.message.contains("--resume"), "{failure:?}");
    let step = failure.message.split(' ').nth(4).unwrap().trim_end_matches(',').to_owned();
    assert_eq!(step, (world.steps().len() + 1).to_string());
}

/// Rows of a step of the first epoch, which nobody has been trained on before.
fn rows_of(step: u64) -> Vec<u32> {
    let Program::Train(training) = program(STEPS) else { unreachable!() };
    training.plan.places(step)
}

#[test]
fn what_a_step_came_to_is_known_before_what_follows_it_is_judged() {
    // Step 4 is a spike. What is trained on it gives a bad number in step 5, or when it is evaluated: by then some rank may not
    // have said what its part of step 4 was.
    let mut ended = BTreeSet::new();
    for (poisoned, first) in rows_of(5).into_iter().flat_map(|row| [(row, 0), (row, 1)]) {
        let mut world = world(2, &BTreeSet::from([poisoned]), &BTreeSet::from([rows_of(4)[0]]));
        world.machine.settings.on_bad_numbers = OnBadNumbers::Stop;
        world.speak_until(3);
        // One is as far ahead of the other as it can be.
        while world.workers.contains_key(&Connection(first)) && world.say(Connection(first)) {}
        world.settle_for(100.0);
        let failure = world.failure();
        assert_eq!(failure.step, Some(5), "{failure:?}");
        assert!(failure.message.contains("train.on_bad_numbers"), "{failure:?}");
        let (steps, left_out) = story(&world);
        ended.insert((steps.len(), left_out));
    }
    let all: Vec<_> = ended.into_iter().collect();
    assert!(all.len() == 1 && all[0].0 == 4 && all[0].1[0].0 == 4, "{all:?}");
}

#[test]
fn a_norm_that_is_no_number_waits_for_the_step_before_it_too() {
    let mut world = world(2, &BTreeSet::new(), &BTreeSet::from([rows_of(4)[0]]));
    world.machine.settings.on_bad_numbers = OnBadNumbers::Stop;
    world.machine.settings.snapshots.every = 0;
    world.speak_until(3);
    while world.workers[&Connection(0)].steps.len() > 3 && world.say(Connection(0)) {}
    reports(&mut world, Failure { norm: true, ..in_the_reduction("inf") });
    world.settle_for(100.0);
    assert_eq!((world.machine.phase(), story(&world).1[0].0), (Phase::Finished, 4));
}

/// In step 5.
fn in_the_reduction(what: &str) -> Failure {
    Failure { phase: Place::Reduce.into(), step: Some(5), message: what.into(), ..Failure::default() }
}

fn reports(world: &mut World, failure: Failure) {
    let message = WorkerMessage { epoch: world.workers[&Connection(0)].epoch, body: Some(Report::Failure(failure)) };
    world.apply(Event::Message { from: Connection(0), message }).unwrap();
}

#[test]
fn what_else_fails_in_the_reduction_ends_the_run_at_once() {
    let mut world = world(2, &BTreeSet::new(), &BTreeSet::new());
    world.machine.settings.snapshots.every = 0;
    world.speak_until(3);
    while world.workers[&Connection(0)].steps.len() > 3 && world.say(Connection(0)) {}
    reports(&mut world, in_the_reduction("an internal error, please report it"));
    let failure = world.failure();
    assert_eq!((world.machine.phase(), failure.rank, failure.step), (Phase::Failed, Some(0), Some(5)), "{failure:?}");
    assert_eq!(failure.message, "an internal error, please report it");
}

#[test]
fn rows_that_gave_bad_numbers_are_no_spikes() {
    let mut world = world(2, &BTreeSet::new(), &BTreeSet::from([rows_of(4)[0]]));
    for _ in 0..3 {
        let bad = Quarantined { step: 4, message: "bad numbers".into(), ..Quarantined::default() };
        world.machine.settings.recorded.note(&Entry::Quarantined(bad));
    }
    world.settle_for(100.0);
    assert_eq!((world.machine.phase(), story(&world).1[0].0), (Phase::Finished, 4));
}

#[test]
fn a_step_that_is_dealt_anew_is_tried_anew() {
    let mut world = world(2, &BTreeSet::new(), &BTreeSet::from([rows_of(4)[0]]));
    // A machine that fails found a bad number in it, which nobody found again.
    world.machine.cleared = Some(4);
    world.settle_for(100.0);
    assert_eq!((world.machine.phase(), story(&world).1[0].0), (Phase::Finished, 4));
    assert_eq!(world.machine.cleared, None, "it has other micro-batches now");
}
