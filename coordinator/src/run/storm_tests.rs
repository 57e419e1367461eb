//! Whatever the weather: committed steps are those of the undisturbed run, once each and in order; generations are never
//! used twice; every run ends; and every seed replays.

use super::program::Program;
use super::simulated::program;
use super::storm::{story, Storm, Tally};
use std::collections::{BTreeMap, BTreeSet};
use unisono_proto::v1::event::Body as Entry;

/// What one seed's weather came to; panics where an invariant is broken.
fn weather(seed: u64) -> (u64, Tally) {
    let mut storm = Storm::new(seed);
    let trace = storm.pass();
    let (steps, ledger) = (storm.steps(), &storm.world.ledger);
    assert_eq!(story(&storm.world), storm.expected, "committed steps, and rows that were left out");
    let mut tally = storm.tally;
    *tally.0.entry("quarantine").or_default() += storm.expected.1.len() as u64;
    // A generation, once it has members, never has others.
    let mut generations = BTreeSet::new();
    let (mut newest, mut lost) = (0, 0);
    let mut checkpoints = 0;
    let mut evaluated = BTreeSet::new();
    for entry in ledger {
        match entry {
            Entry::Membership(m) => {
                assert!(
                    generations.insert(m.generation) && m.generation >= newest,
                    "generation {} again",
                    m.generation
                );
                newest = m.generation;
            }
            Entry::Lost(l) => {
                assert!(l.generation > newest.max(lost), "generation {} began before", l.generation);
                (newest, lost) = (newest.max(l.generation), l.generation);
            }
            Entry::Checkpoint(c) => {
                assert!(c.step > checkpoints, "the checkpoint after step {} came after that of {checkpoints}", c.step);
                checkpoints = c.step;
            }
            Entry::Eval(e) => {
                assert!(evaluated.insert((e.step, e.split.clone(), e.task.clone())), "evaluated twice: {e:?}");
            }
            _ => {}
        }
    }
    let Some(Entry::Done(done)) = ledger.last() else { panic!("the run did not end: {:?}", ledger.last()) };
    assert_eq!(done.steps, steps);
    (trace, tally)
}

/// Each row is trained on once an epoch, and what the committed steps were made of is the plan's.
#[test]
fn every_row_is_dealt_once_an_epoch() {
    let Program::Train(training) = program(40) else { unreachable!() };
    let plan = &training.plan;
    let mut epochs: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for step in 1..=plan.steps() {
        let dealt = plan.step(step);
        let mut rows: Vec<u32> = dealt.micro_batches.iter().flat_map(|m| m.rows.clone()).collect();
        rows.sort_unstable();
        let mut examples = dealt.examples.clone();
        examples.sort_unstable();
        assert_eq!(rows, examples, "step {step} computes what it is said to");
        epochs.entry(dealt.epoch).or_default().extend(rows);
    }
    let last = *epochs.last_key_value().unwrap().0;
    for (epoch, mut rows) in epochs {
        rows.sort_unstable();
        assert!(rows.windows(2).all(|w| w[0] < w[1]), "a row came twice in epoch {epoch}");
        assert!(epoch == last || rows.iter().copied().eq(0..rows.len() as u32), "a row is missing in epoch {epoch}");
    }
}

/// `UNISONO_STORMS` seeds (default 200), each twice; the first one is a million times `UNISONO_SEED`, or `UNISONO_STORM`.
#[test]
fn whatever_happens_the_ledger_is_the_undisturbed_one_and_every_seed_replays() {
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let first = number("UNISONO_STORM", number("UNISONO_SEED", 1).wrapping_mul(1_000_000));
    let seeds = number("UNISONO_STORMS", 200);
    let mut tally: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in first..first + seeds {
        let told = std::panic::catch_unwind(|| [weather(seed), weather(seed)]);
        let Ok([told, again]) = told else { panic!("seed {seed}: see above") };
        assert_eq!(told, again, "seed {seed}: the second time was another");
        told.1 .0.into_iter().for_each(|(what, count)| *tally.entry(what).or_default() += count);
    }
    println!("{seeds} seeds from {first}: {tally:?}");
    if let Some(directory) = std::env::var_os("UNISONO_CHAOS") {
        let line = serde_json::json!({"kind": "seeds", "seeds": seeds, "first": first, "weather": tally});
        std::fs::create_dir_all(&directory).unwrap();
        let path = std::path::Path::new(&directory).join("seen.jsonl");
        let mut log = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        std::io::Write::write_all(&mut log, format!("{line}\n").as_bytes()).unwrap();
    }
    // The weather was bad.
    if seeds < 100 {
        return;
    }
    let all =
        "death,vanishes,sleeps,wakes,coordinator dies,disk full,commit fails,late join,complaint,resumed,quarantine";
    for what in all.split(',').chain(["stuck in an exchange"]) {
        assert!(tally.get(what).is_some_and(|&count| count >= seeds / 10), "{what}: {tally:?}");
    }
}
