//! The machine against simulated workers: whatever the order of events, its invariants hold.

use super::event::{Connection, Event};
use super::machine::Machine;
use super::phases::Phase;
use super::program::Program;
use proptest::prelude::*;
use unisono_configs::run::Assignment;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{Drained, Epoch, Failure, Heartbeat, Phase as Place, StepReport, WorkerMessage};

use super::simulated::*;
proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whoever speaks first, and whatever else happens, every committed step is the one that a lone worker commits.
    #[test]
    fn any_order_of_events_keeps_the_invariants(
        workers in 1u32..5, steps in 1u64..12, shuffled: bool,
        events in prop::collection::vec((0u8..12, 0u64..5), 0..250),
        fatal in prop::option::of((0usize..250, 0u8..5)),
    ) {
        let assignment = if shuffled { Assignment::Shuffled } else { Assignment::Balanced };
        let mut world = World::new(workers, steps, assignment);
        for (index, (kind, pick)) in events.into_iter().enumerate() {
            world.now += 0.5;
            let from = Connection(pick % u64::from(workers));
            let state = world.machine.phase();
            match kind {
                0..=7 => { world.say(from); }
                8 => world.commit(),
                9 => {
                    let heartbeat = Heartbeat { phase: Place::Forward.into(), step: Some(1), ..Heartbeat::default() };
                    for (&from, worker) in &world.workers {
                        let message = WorkerMessage { epoch: worker.epoch, body: Some(Report::Heartbeat(heartbeat.clone())) };
                        // Refused after the end.
                        world.machine.apply(world.now, Event::Message { from, message }).ok();
                    }
                }
                10 => {
                    let stale = Epoch { term: 2, generation: 9 };
                    let message = WorkerMessage { epoch: Some(stale), body: Some(Report::Step(StepReport::default())) };
                    let refused = world.apply(Event::Message { from, message });
                    prop_assert!(refused.is_err());
                }
                _ => {
                    let mut other = join("ada:9");
                    other.fingerprint.as_mut().unwrap().binary = "another".into();
                    let refused = world.apply(Event::Joined { from: Connection(99), join: other });
                    prop_assert!(refused.is_err());
                }
            }
            if state.is_final() {
                prop_assert_eq!(world.machine.phase(), state);
            }
            if let Some((at, how)) = fatal {
                if at == index && !world.machine.phase().is_final() {
                    let message = |body| WorkerMessage { epoch: world.workers[&from].epoch, body: Some(body) };
                    let failure = Failure { phase: Place::Forward.into(), message: "no memory".into(), ..Default::default() };
                    let event = match how {
                        0 | 1 => Event::Message { from, message: message(Report::Failure(failure)) },
                        2 => Event::Message { from, message: message(Report::Drained(Drained {})) },
                        3 => Event::Stop { reason: "enough".into() },
                        _ => Event::Stop { reason: "now".into() },
                    };
                    world.apply(event).unwrap();
                    let drained = matches!(world.machine.phase(), Phase::Finished) || world.ledger.len() > 1;
                    prop_assert!(drained);
                }
            }
        }
        if !world.machine.phase().is_final() {
            world.settle();
        }
        prop_assert!(world.machine.phase().is_final() || fatal.is_some());
        let committed = world.steps();
        let reference = alone(steps);
        prop_assert_eq!(&committed[..], &reference[..committed.len()], "a prefix, to the bit");
        if world.machine.phase() == Phase::Finished {
            prop_assert_eq!(committed.len(), reference.len());
            prop_assert_eq!(world.kinds().last().copied(), Some("done"));
            prop_assert!(world.workers.values().all(|w| w.acknowledged == steps && !w.aborted));
        }
        if world.machine.phase() == Phase::Failed {
            prop_assert_eq!(world.kinds().last().copied(), Some("failed"));
            prop_assert!(world.workers.values().all(|w| w.aborted));
            prop_assert!(!world.failure().message.is_empty());
        }
        for worker in world.workers.values() {
            // Directives come in order, without gaps, and never far ahead of what is committed.
            prop_assert!(worker.steps.iter().copied().eq(1..=worker.steps.len() as u64));
            prop_assert!(worker.steps.len() <= committed.len() + 4);
        }
    }
}

#[test]
fn a_run_evaluates_and_saves_when_it_should() {
    let mut world = World::new(2, 7, Assignment::Balanced);
    world.settle();
    let told: Vec<String> = world
        .ledger
        .iter()
        .filter_map(|e| match e {
            Entry::Step(s) => Some(format!("step {}", s.step)),
            Entry::Eval(e) if e.task.is_empty() => Some(format!("{} {}", e.split, e.step)),
            Entry::Checkpoint(c) => Some(format!("checkpoint {}", c.step)),
            Entry::Done(d) => Some(format!("done {}", d.steps)),
            _ => None,
        })
        .collect();
    let expected = [
        "step 1",
        "step 2",
        "step 3",
        "validation 3",
        "step 4",
        "checkpoint 4",
        "step 5",
        "step 6",
        "validation 6",
        "step 7",
        "validation 7",
        "checkpoint 7",
        "test 7",
        "done 7",
    ];
    let mut sorted = told.clone();
    sorted.sort();
    let mut wanted: Vec<String> = expected.iter().map(|s| s.to_string()).collect();
    wanted.sort();
    assert_eq!(sorted, wanted, "{told:?}");
    assert_eq!(told.last().unwrap(), "done 7");
    assert_eq!(world.kinds().iter().filter(|k| **k == "memory").count(), 4);
}

#[test]
fn joins_are_refused_with_a_sentence() {
    let mut machine = machine(2, 5, Assignment::Balanced);
    let mut other = join("ada:2");
    other.fingerprint.as_mut().unwrap().libtorch = "2.10.0".into();
    machine.apply(0.0, Event::Joined { from: Connection(0), join: join("ada:1") }).unwrap();
    let refused = machine.apply(0.0, Event::Joined { from: Connection(1), join: other }).unwrap_err().to_string();
    assert!(refused.contains("libtorch \"2.10.0\" against \"2.11.0\""), "{refused}");
    let refused = machine.apply(0.0, Event::Joined { from: Connection(2), join: join("") }).unwrap_err().to_string();
    assert!(refused.contains("did not say"), "{refused}");
    // One that leaves before the run begins is forgotten.
    machine.apply(0.0, Event::Ended { from: Connection(0), reason: "ended".into() }).unwrap();
    machine.apply(0.0, Event::Joined { from: Connection(3), join: join("ada:3") }).unwrap();
    assert_eq!(machine.phase(), Phase::Gathering);
    machine.apply(0.0, Event::Joined { from: Connection(4), join: join("ada:4") }).unwrap();
    assert_eq!(machine.phase(), Phase::Loading);
    // One more is a spare, if its arithmetic is the same.
    assert_eq!(machine.apply(0.0, Event::Joined { from: Connection(5), join: join("ada:5") }).unwrap(), []);
    let mut other = join("ada:6");
    other.fingerprint.as_mut().unwrap().instruction_set = "avx2".into();
    machine.apply(0.0, Event::Joined { from: Connection(6), join: other }).unwrap_err();
}

#[test]
fn gpus_of_two_kinds_do_not_run_together() {
    let outcome = |device: &str| {
        let mut settings = settings(2, Assignment::Balanced);
        settings.assign.device = device.into();
        let mut machine = Machine::new(settings, program(5));
        let of = |listen: &str, gpu: &str| {
            let mut join = join(listen);
            join.fingerprint.as_mut().unwrap().gpu = gpu.into();
            join
        };
        let joined = |id, join| Event::Joined { from: Connection(id), join };
        machine.apply(0.0, joined(0, of("ada:1", "NVIDIA H100 (9.0)"))).unwrap();
        machine.apply(0.0, joined(1, of("ada:2", "NVIDIA H200 (9.0)"))).map(drop).map_err(|e| e.to_string())
    };
    let refused = outcome("cuda").unwrap_err();
    assert!(refused.contains("GPU \"NVIDIA H200 (9.0)\" against \"NVIDIA H100 (9.0)\""), "{refused}");
    // What is not computed on decides nothing.
    outcome("cpu").unwrap();
}

#[test]
fn a_worker_that_answers_out_of_turn_or_wrongly_is_named() {
    let mut world = World::new(2, 5, Assignment::Balanced);
    (0..2).for_each(|id| {
        world.say(Connection(id));
    });
    let epoch = world.workers[&Connection(1)].epoch;
    let report = StepReport { step: 2, ..Default::default() };
    let message = WorkerMessage { epoch, body: Some(Report::Step(report)) };
    world.apply(Event::Message { from: Connection(1), message }).unwrap();
    assert_eq!(world.failure().rank, Some(1));
    assert!(world.failure().message.contains("step 2"));

    let mut world = World::new(2, 5, Assignment::Balanced);
    (0..2).for_each(|id| {
        world.say(Connection(id));
    });
    if let Some((_, Report::Step(report))) = world.workers.get_mut(&Connection(1)).unwrap().outbox.front_mut() {
        report.grad_norm = 0.25;
    }
    world.settle();
    assert!(world.failure().message.contains("rank 1 has"), "{}", world.failure().message);
    assert!(world.steps().is_empty());
}

#[test]
fn only_prepared_steps_are_dealt_and_results_do_not_depend_on_when() {
    let mut machine = machine(2, 9, Assignment::Balanced);
    let Program::Train(training) = &mut machine.program else { unreachable!() };
    training.prepared = 2;
    let mut world = World::with(Machine::new(machine.settings, machine.program), 2, Vec::new());
    for (prepared, steps) in [(2, 2), (1, 2), (3, 3), (7, 7), (9, 9)] {
        world.apply(Event::Prepared { steps: prepared }).unwrap();
        world.settle();
        assert_eq!(world.steps().len(), steps);
    }
    assert_eq!((world.machine.phase(), world.steps()), (Phase::Finished, alone(9)));
}

#[test]
fn a_row_that_cannot_be_prepared_ends_the_run_as_bad_input() {
    let mut world = World::new(2, 9, Assignment::Balanced);
    world.apply(Event::Unprepared { step: 7, message: "rows.jsonl:3: the completion is empty".into() }).unwrap();
    let failure = world.failure();
    assert!(failure.bad_input && failure.step == Some(7) && failure.message.contains("rows.jsonl:3"), "{failure:?}");
    assert!(world.workers.values().all(|w| w.aborted));
}
