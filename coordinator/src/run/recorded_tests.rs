//! A run that goes on, against simulated workers: it ends like the undisturbed one, and says nothing twice.

use super::event::{Effect, Event};
use super::phases::Phase;
use super::program::Program;
use super::recorded::Recorded;
use super::simulated::{alone, program, World};
use proptest::prelude::*;
use unisono_configs::run::Assignment;
use unisono_proto::v1::event::Body as Entry;

/// An undisturbed run of `steps` steps with one worker.
fn undisturbed(steps: u64) -> World {
    let mut world = World::new(1, steps, Assignment::Balanced);
    world.settle();
    assert_eq!(world.machine.phase(), Phase::Finished);
    world
}

fn recorded(ledger: &[Entry]) -> Recorded {
    let mut recorded = Recorded::default();
    ledger.iter().for_each(|entry| recorded.note(entry));
    recorded
}

/// The entries of a run that ended after committing `step`.
fn until(ledger: &[Entry], step: u64) -> Vec<Entry> {
    let end = ledger.iter().position(|e| matches!(e, Entry::Step(s) if s.step > step)).unwrap_or(ledger.len());
    ledger[..end].iter().filter(|e| !matches!(e, Entry::Done(_))).cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_run_that_goes_on_ends_like_the_undisturbed_one(
        steps in 1u64..12, workers in 1u32..5, ended in 0u64..12, back in 0u64..12,
    ) {
        let whole = undisturbed(steps);
        let ended = ended.min(steps);
        let start = ended - back.min(ended);
        let ledger = until(&whole.ledger, ended);
        let mut world = World::resumed(workers, steps, start, &ledger);
        world.settle();
        prop_assert_eq!(world.machine.phase(), Phase::Finished);
        // Nothing is said twice, and the whole ledger reads like that of the undisturbed run.
        prop_assert_eq!(world.steps(), alone(steps));
        let evaluations = |ledger: &[Entry]| -> Vec<(u64, String, String)> {
            let key = |e: &Entry| match e {
                Entry::Eval(e) => Some((e.step, e.split.clone(), e.task.clone())),
                _ => None,
            };
            ledger.iter().filter_map(key).collect()
        };
        prop_assert_eq!(evaluations(&world.ledger), evaluations(&whole.ledger));
        let tokens = |w: &World| w.ledger.iter().find_map(|e| match e {
            Entry::Done(done) => Some((done.steps, done.tokens)),
            _ => None,
        });
        prop_assert_eq!(tokens(&world), tokens(&whole));
        let first = world.workers.values().flat_map(|w| w.steps.first()).min().copied();
        prop_assert_eq!(first, (start < steps).then_some(start + 1));
    }
}

#[test]
fn a_step_that_comes_out_differently_stops_the_run() {
    let mut ledger = until(&undisturbed(8).ledger, 6);
    for entry in &mut ledger {
        if let Entry::Step(step) = entry {
            if step.step == 6 {
                step.loss = f64::from_bits(step.loss.to_bits() + 1);
            }
        }
    }
    let mut world = World::resumed(2, 8, 4, &ledger);
    world.settle();
    assert_eq!(world.machine.phase(), Phase::Failed);
    let failure = world.failure();
    assert_eq!((failure.step, failure.rank), (Some(6), None));
    assert!(failure.message.contains("on record"), "{}", failure.message);
}

#[test]
fn other_learning_rates_are_another_run_from_there_on() {
    // With 16 steps instead of 8 the schedule has other rates from the first step after the warmup on.
    let ledger = until(&undisturbed(8).ledger, 6);
    let Program::Train(mut training) = program(16) else { unreachable!() };
    training.start = 4;
    let mut followed = recorded(&ledger);
    followed.follow(&Program::Train(training));
    assert_eq!(followed.newest(), 4);
    let mut world = World::resumed(1, 16, 4, &ledger);
    world.settle();
    assert_eq!(world.machine.phase(), Phase::Finished);
    let steps: Vec<u64> = world.steps().iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, (1..=6).chain(5..=16).collect::<Vec<_>>());
    // The new history replaces the old one.
    assert_eq!(recorded(&world.ledger).newest(), 16);
}

#[test]
fn workers_are_told_to_go_on_after_the_checkpoint() {
    let ledger = until(&undisturbed(8).ledger, 6);
    let mut world = World::resumed(1, 8, 4, &ledger);
    let status = world.machine.status(world.now);
    // What was committed once is committed for good.
    assert_eq!((status.step, status.steps), (6, 8));
    let stopped = world.machine.apply(world.now, Event::Stop { reason: "enough".into() }).unwrap();
    assert!(stopped.iter().any(|e| matches!(e, Effect::Done(outcome) if outcome.steps == 4)));
}
