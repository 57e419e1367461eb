//! Whoever is killed, and wherever: the run goes on by itself, and its digest is that of the undisturbed run.

#![allow(clippy::unwrap_used)]

use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::path::Path;
use unisono_tests::binaries;
use unisono_tests::kills::{digest, disturb, keep, ledger_losses, train, Dice, Kill, LATE};

fn undisturbed(dir: &Path, steps: u64) -> (String, Vec<f64>) {
    let whole = train(dir, steps).workers(1).succeed();
    (digest(&whole.run_dir), ledger_losses(&whole.run_dir))
}

#[test]
fn a_death_at_every_place_changes_no_bit() {
    const STEPS: u64 = 500;
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let kills = Kill::all();
    let told = disturb(dir.path(), STEPS, 2, &kills, &LATE, &mut Dice(7));
    assert_eq!(told.deaths.len(), kills.len() + LATE.len(), "the run was too short: {:?}", told.deaths);
    assert_eq!((told.digest, told.losses), whole);
}

/// `UNISONO_KILLS` deaths (20 where it is not set) in runs of two and three workers, from `UNISONO_SEED`. Every death is
/// kept in `target/<profile>/kills.jsonl`, over all that were ever made; the table is of all of them.
#[test]
#[ignore = "minutes; make chaos"]
fn many_deaths_change_no_bit() {
    const STEPS: u64 = 700;
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default);
    let (kills, seed) = (number("UNISONO_KILLS", 20), number("UNISONO_SEED", 1));
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), STEPS);
    let log = binaries::profile_dir().join("kills.jsonl");
    let (mut all, mut made, mut run) = (Vec::new(), 0, 0);
    while made < kills {
        let mut dice = Dice(seed.wrapping_mul(1_000_003) + run);
        let kinds = Kill::all();
        let chosen: Vec<Kill> = (0..12).map(|_| kinds[dice.roll(kinds.len() as u64) as usize]).collect();
        let late = &LATE[..dice.roll(LATE.len() as u64 + 1) as usize];
        let told = disturb(dir.path(), STEPS, 2 + (run % 2) as usize, &chosen, late, &mut dice);
        let same = (&told.digest, &told.losses) == (&whole.0, &whole.1);
        let line = |death: &Value| {
            let mut line = json!({"seed": seed, "run": run, "same": same});
            line.as_object_mut().unwrap().extend(death.as_object().unwrap().clone());
            line
        };
        all = keep(&log, &told.deaths.iter().map(line).collect::<Vec<_>>());
        assert!(same, "seed {seed}, run {run}: digest {} instead of {} after {:?}", told.digest, whole.0, told.deaths);
        made += told.deaths.len() as u64;
        run += 1;
    }
    print!("{}", table(&all));
}

/// Deaths by place: how many, how many changed the result, seconds until the next new step.
fn table(all: &[Value]) -> String {
    let mut places: BTreeMap<&str, (usize, usize, Vec<f64>)> = BTreeMap::new();
    for line in all {
        let (count, other, seconds) = places.entry(line["place"].as_str().unwrap_or("?")).or_default();
        *count += 1;
        *other += usize::from(line["same"] != true);
        seconds.extend(line["seconds"].as_f64());
    }
    let mut text =
        "| place | deaths | other digests | seconds to the next new step: median, most |\n|---|---|---|---|\n"
            .to_owned();
    for (place, (count, other, mut seconds)) in places {
        seconds.sort_by(f64::total_cmp);
        let (median, most) = (seconds.get(seconds.len() / 2), seconds.last());
        let show = |x: Option<&f64>| x.map_or("-".to_owned(), |x| format!("{x:.2}"));
        text += &format!("| {place} | {count} | {other} | {}, {} |\n", show(median), show(most));
    }
    text + &format!("{} deaths in all\n", all.len())
}
