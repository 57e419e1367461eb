//! What the chronicle says about each goal, as tables for people.

use crate::chronicle::median_and_most;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A goal, what has been seen of it, and in how many observations.
struct Goal {
    number: u32,
    text: &'static str,
    seen: fn(&[Value]) -> Option<String>,
}

const GOALS: [Goal; 13] = [
    Goal { number: 1, text: "kill -9 any process at any instant: same digest", seen: kills },
    Goal { number: 2, text: "a coordinator's crash loses no committed step", seen: coordinators },
    Goal { number: 3, text: "same digest for any number of workers, changing", seen: worlds },
    Goal { number: 4, text: "every sample exactly once an epoch", seen: samples },
    Goal { number: 5, text: "no torn checkpoint loads", seen: torn },
    Goal { number: 7, text: "zombies and partitions are fenced", seen: partitions },
    Goal { number: 8, text: "a hang is found in 2 s, training again in 5 s", seen: hangs },
    Goal { number: 9, text: "at most the steps between two snapshots and one are computed again", seen: replays },
    Goal { number: 10, text: "a signal saves and ends the run within the grace", seen: signals },
    Goal { number: 13, text: "goodput at a kill a minute; cost of checkpoints", seen: goodput },
    Goal { number: 14, text: "1,000 monitors that never read", seen: monitors },
    Goal { number: 16, text: "simulated runs, each twice with equal traces", seen: seeds },
    Goal { number: 17, text: "parsers fuzzed", seen: fuzzed },
];

/// All tables, as Markdown.
pub fn tables(all: &[Value]) -> String {
    let mut text = String::from("| goal | | seen |\n|---|---|---|\n");
    for Goal { number, text: goal, seen } in &GOALS {
        let seen = seen(all).unwrap_or_else(|| "nothing yet".into());
        text += &format!("| {number} | {goal} | {seen} |\n");
    }
    text + "\n" + &places(all)
}

/// Deaths by place: how many, how many changed the result, seconds until the next new step.
pub fn places(all: &[Value]) -> String {
    let mut places: BTreeMap<String, (usize, usize, Vec<f64>)> = BTreeMap::new();
    for line in of(all, "death") {
        let place = line["place"].as_str().unwrap_or("?");
        let place = match line["while"].as_str() {
            Some("start") => format!("{place}, before the first step"),
            Some("regroup") => format!("{place}, while the others regroup"),
            _ => place.to_owned(),
        };
        let (count, other, seconds) = places.entry(place).or_default();
        *count += 1;
        *other += usize::from(line["same"] != true);
        seconds.extend(line["seconds"].as_f64());
    }
    let mut text = String::from("| place | deaths | other digests | seconds to the next new step: median, most |\n");
    text += "|---|---|---|---|\n";
    for (place, (count, other, seconds)) in places {
        text += &format!("| {place} | {count} | {other} | {} |\n", pair(&seconds, 2));
    }
    text
}

fn of<'a>(all: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    all.iter().filter(move |line| line["kind"] == kind)
}

fn others<'a>(lines: impl Iterator<Item = &'a Value>) -> (usize, usize) {
    lines.fold((0, 0), |(count, other), line| (count + 1, other + usize::from(line["same"] != true)))
}

fn numbers<'a>(lines: impl Iterator<Item = &'a Value>, field: &str) -> Vec<f64> {
    lines.filter_map(|line| line[field].as_f64()).collect()
}

fn pair(values: &[f64], digits: usize) -> String {
    median_and_most(values).map_or("-".into(), |(median, most)| format!("{median:.digits$}, {most:.digits$}"))
}

fn some(count: usize, text: String) -> Option<String> {
    (count > 0).then_some(text)
}

fn kills(all: &[Value]) -> Option<String> {
    let (count, other) = others(of(all, "death"));
    some(count, format!("{count} deaths, {other} other digests"))
}

fn coordinators(all: &[Value]) -> Option<String> {
    const PLACES: [&str; 5] =
        ["before-append", "after-append", "before-commit", "after-commit", "coordinator, any instant"];
    let deaths = || of(all, "death").filter(|line| PLACES.iter().any(|place| line["place"] == *place));
    let (count, other) = others(deaths());
    let seconds = numbers(deaths(), "seconds");
    some(
        count,
        format!("{count} deaths, {other} other results; next new step after {} s (median, most)", pair(&seconds, 2)),
    )
}

fn worlds(all: &[Value]) -> Option<String> {
    let (count, other) = others(of(all, "worlds"));
    let changes: usize = of(all, "worlds").filter_map(|line| line["worlds"].as_array()).map(|w| w.len() - 1).sum();
    let all_shared = of(all, "worlds").filter_map(|line| line["shared"].as_array()).flatten().filter_map(Value::as_str);
    let ways: BTreeSet<&str> = all_shared.collect();
    let ways = if ways.is_empty() { String::new() } else { format!(", shared in {} ways", ways.len()) };
    some(count, format!("{count} schedules with {changes} changes{ways}, {other} other digests"))
}

/// The digest is of the samples' order too.
fn samples(all: &[Value]) -> Option<String> {
    let mut runs: BTreeMap<String, bool> = BTreeMap::new();
    for line in of(all, "death").chain(of(all, "worlds")) {
        let run = format!("{} {} {} {}", line["at"], line["seed"], line["run"], line["kind"]);
        *runs.entry(run).or_insert(true) &= line["same"] == true;
    }
    let other = runs.values().filter(|same| !**same).count();
    some(runs.len(), format!("sample order of each of the runs above, {other} others; and in every simulated run"))
}

fn torn(all: &[Value]) -> Option<String> {
    let damages: f64 = numbers(of(all, "torn"), "damages").iter().sum();
    some(damages as usize, format!("{damages} damages, all named; none loaded"))
}

fn partitions(all: &[Value]) -> Option<String> {
    let (count, other) = others(of(all, "partition"));
    let mut ways: BTreeMap<&str, usize> = BTreeMap::new();
    of(all, "partition").filter_map(|line| line["how"].as_str()).for_each(|how| *ways.entry(how).or_default() += 1);
    let ways: Vec<String> = ways.iter().map(|(how, count)| format!("{how} {count}")).collect();
    some(count, format!("{count} ({}), {other} other digests", ways.join(", ")))
}

fn hangs(all: &[Value]) -> Option<String> {
    let found = numbers(of(all, "hang"), "found");
    let again = numbers(of(all, "hang"), "again");
    let (count, other) = others(of(all, "hang"));
    let (found, again) = (pair(&found, 2), pair(&again, 2));
    some(count, format!("{count} hangs: found after {found} s, next new step after {again} s; {other} other digests"))
}

/// By the steps between two snapshots; where a run also had checkpoints every few steps, all together.
fn replays(all: &[Value]) -> Option<String> {
    let mut told: BTreeMap<Option<u64>, Vec<f64>> = BTreeMap::new();
    for line in of(all, "replays").chain(of(all, "snapshot-replays")) {
        let steps = line["replays"].as_array().into_iter().flatten().filter_map(Value::as_f64);
        told.entry(line["every"].as_u64()).or_default().extend(steps);
    }
    told.retain(|_, steps| !steps.is_empty());
    let tell = |(every, steps): (&Option<u64>, &Vec<f64>)| {
        let how = every.map_or(String::new(), |every| format!(" with a snapshot every {every}"));
        format!("{} regroupings{how}, steps again: {} (median, most)", steps.len(), pair(steps, 0))
    };
    let text: Vec<String> = told.iter().map(tell).collect();
    some(told.len(), text.join("; "))
}

fn signals(all: &[Value]) -> Option<String> {
    let count: f64 = numbers(of(all, "signals"), "instants").iter().sum();
    let slowest = numbers(of(all, "signals"), "slowest").into_iter().fold(0.0, f64::max);
    some(count as usize, format!("{count} instants, no other digest, slowest end {slowest:.2} s"))
}

fn goodput(all: &[Value]) -> Option<String> {
    let last = |kind| of(all, kind).last();
    let goodput = last("goodput").map(|line| {
        let (minutes, kills) = (line["minutes"].as_f64().unwrap_or(0.0), &line["kills"]);
        format!("{:.1} % over {minutes:.0} min with {kills} kills", 100.0 * line["goodput"].as_f64().unwrap_or(0.0))
    });
    let cost = last("checkpoint-cost")
        .map(|line| format!("checkpoints cost {:.1} %", 100.0 * (line["ratio"].as_f64().unwrap_or(0.0) - 1.0)));
    let told: Vec<String> = goodput.into_iter().chain(cost).collect();
    some(told.len(), told.join("; "))
}

fn monitors(all: &[Value]) -> Option<String> {
    let line = of(all, "monitors").last()?;
    let number = |field: &str| line[field].as_f64().unwrap_or(f64::NAN);
    Some(format!(
        "{}: coordinator's CPU for a step {:+.1} %, its memory {:+.1} MiB",
        line["monitors"],
        100.0 * (number("cpu_with") / number("cpu_without") - 1.0),
        (number("bytes_with") - number("bytes_without")) / f64::from(1 << 20),
    ))
}

fn seeds(all: &[Value]) -> Option<String> {
    let count: f64 = numbers(of(all, "seeds"), "seeds").iter().sum();
    some(count as usize, format!("{count} seeds, no invariant broken"))
}

fn fuzzed(all: &[Value]) -> Option<String> {
    let mut minutes: BTreeMap<&str, f64> = BTreeMap::new();
    for line in of(all, "fuzz") {
        *minutes.entry(line["target"].as_str().unwrap_or("?")).or_default() +=
            line["seconds"].as_f64().unwrap_or(0.0) / 60.0;
    }
    let told: Vec<String> = minutes.iter().map(|(target, minutes)| format!("{target} {minutes:.0} min")).collect();
    some(told.len(), told.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_was_seen_is_counted_and_what_was_not_is_said() {
        let death = |place: &str, during: &str, seconds: f64, same: bool| json!({"kind": "death", "place": place, "while": during, "seconds": seconds, "same": same});
        let all = [
            death("load", "regroup", 1.0, true),
            death("load", "regroup", 3.0, true),
            death("before-append", "step", 0.5, false),
            json!({"kind": "replays", "replays": [0, 4, 2]}),
            json!({"kind": "snapshot-replays", "every": 5, "replays": [3, 6]}),
            json!({"kind": "monitors", "monitors": 1000, "cpu_with": 1.01, "cpu_without": 1.0,
                   "bytes_with": 3 << 20, "bytes_without": 1 << 20}),
        ];
        let text = tables(&all);
        for expected in [
            "| 3 deaths, 1 other digests |",
            "| 1 deaths, 1 other results; next new step after 0.50, 0.50 s",
            "| load, while the others regroup | 2 | 0 | 3.00, 3.00 |",
            "| 3 regroupings, steps again: 2, 4 (median, most); 2 regroupings with a snapshot every 5, steps again: 6, 6 (",
            "| 1000: coordinator's CPU for a step +1.0 %, its memory +2.0 MiB |",
            "| 16 | simulated runs, each twice with equal traces | nothing yet |",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
    }
}
