//! Rows that give bad numbers or spikes: whoever computes and whatever happens, the same rows are left out from the same step.

use super::event::Connection;
use super::machine::Machine;
use super::phases::Phase;
use super::program::Program;
use super::simulated::*;
use super::storm::story;
use proptest::prelude::*;
use std::collections::BTreeSet;
use unisono_configs::run::{Assignment, OnSpike};

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
        for (kind, pick) in script {
            let connections: Vec<Connection> = disturbed.workers.keys().copied().collect();
            let Some(&from) = connections.get(pick as usize % connections.len().max(1)) else { break };
            match kind {
                0 => disturbed.dies(from),
                1..=2 => drop(disturbed.next_joins()),
                3 => disturbed.commit(),
                _ => drop(disturbed.say(from)),
            }
        }
        disturbed.settle_for(200.0);
        let (told, end) = (story(&disturbed), disturbed.machine.status(0.0).failure);
        match end {
            None => prop_assert_eq!(told, expected.clone()),
            // Two processes that say that they are the same one end every run.
            Some(failure) => {
                prop_assert!(failure.message.contains("losses in a row"), "{:?}", failure);
                prop_assert_eq!(&told.0[..], &expected.0[..told.0.len()]);
                prop_assert_eq!(&told.1[..], &expected.1[..told.1.len()]);
            }
        }
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
