//! The demo's last screen.

use super::corpus::TEXT;
use super::score::{exact, majority, Answer};
use super::{questions, Story};
use crate::monitor::plain::{bytes, clock, grouped, significant};
use crate::monitor::state::RunState;
use serde_json::{json, Value};
use std::fmt::Write;

/// From this share of right answers on, a task counts as learned.
const LEARNED: f64 = 0.9;

/// Everything that there is to see, as text.
pub fn screen(story: &Story) -> String {
    let mut out = String::new();
    table(&mut out, story);
    let _ = writeln!(
        out,
        "\nplain text  perplexity {} before, {} after fine-tuning",
        perplexity(&story.pretrained),
        perplexity(&story.several)
    );
    samples(&mut out, story);
    digests(&mut out, story);
    out.push('\n');
    costs(&mut out, &story.several);
    costs(&mut out, &story.one);
    let directory = story.directory.display();
    let tuned = format!("{directory}/tuned-{}", workers(&story.several));
    let _ = write!(
        out,
        "\nall of it   {} in {directory}\n\nNext:\n  unisono generate {tuned} --prompt $'Please reverse the word BAKO.\\n'\n  unisono train --model YOUR-MODEL --data YOUR-ROWS.jsonl\n",
        clock(story.seconds)
    );
    out
}

/// The same for a script.
pub fn object(story: &Story) -> Value {
    let (mut at, mut tasks) = (0, Vec::new());
    for (task, known, unseen) in questions(&story.corpus) {
        let middle = at + known.len();
        let end = middle + unseen.len();
        let of = |answers: &[Answer], from: usize, to: usize| answers.get(from..to).unwrap_or_default().to_vec();
        tasks.push(json!({
            "task": task,
            "majority": majority(known),
            "before": exact(known, &of(&story.before, at, middle)),
            "after": exact(known, &of(&story.after, at, middle)),
            "unseen": exact(unseen, &of(&story.after, middle, end)),
        }));
        at = end;
    }
    json!({
        "event": "demo", "directory": story.directory, "seconds": story.seconds, "tasks": tasks,
        "workers": workers(&story.several), "digest": digest(&story.several), "digest_of_one": digest(&story.one),
        "one_result": is_one_result(story),
    })
}

fn table(out: &mut String, story: &Story) {
    let _ = writeln!(out, "{:<10} {:>9} {:>9} {:>9} {:>9}", "task", "majority", "before", "after", "unseen");
    let (mut at, mut learned, mut tasks) = (0, 0, 0);
    for (task, known, unseen) in questions(&story.corpus) {
        let middle = at + known.len();
        let end = middle + unseen.len();
        let before = exact(known, story.before.get(at..middle).unwrap_or_default());
        let after = exact(known, story.after.get(at..middle).unwrap_or_default());
        let new = exact(unseen, story.after.get(middle..end).unwrap_or_default());
        let percent = |share: f64| format!("{:.1}%", 100.0 * share);
        let _ = writeln!(
            out,
            "{task:<10} {:>9} {:>9} {:>9} {:>9}",
            percent(majority(known)),
            percent(before),
            percent(after),
            percent(new)
        );
        learned += usize::from(after >= LEARNED);
        tasks += 1;
        at = end;
    }
    let _ = writeln!(
        out,
        "\nExact match on arguments that were never trained on; unseen: in a template that was never trained on either.\n{learned} of {tasks} tasks reach {:.0}%.",
        100.0 * LEARNED
    );
}

/// Perplexity of the plain text that was held out.
fn perplexity(run: &RunState) -> String {
    let eval = run.evals.get(&("test".to_string(), TEXT.to_string()));
    eval.map_or_else(|| "unknown".into(), |e| significant(e.perplexity))
}

/// One answer each of three tasks, in the template that was never trained on.
fn samples(out: &mut String, story: &Story) {
    let mut at = 0;
    for (task, known, unseen) in questions(&story.corpus) {
        let first = at + known.len();
        at = first + unseen.len();
        let (Some(row), Some(answer)) = (unseen.first(), story.after.get(first)) else { continue };
        if ["reverse", "next", "language"].contains(&task) {
            let mark = if answer.is_right(row) { "right" } else { "wrong" };
            let _ = writeln!(out, "\n  {}\n  -> {} ({mark})", row.prompt.trim_end(), answer.completion.trim_end());
        }
    }
}

fn digest(run: &RunState) -> &str {
    run.done.as_ref().map_or("", |done| done.digest.as_str())
}

/// Whether several workers and one came to the same state.
pub fn is_one_result(story: &Story) -> bool {
    !digest(&story.one).is_empty() && digest(&story.one) == digest(&story.several)
}

fn digests(out: &mut String, story: &Story) {
    let several = workers(&story.several);
    let _ = writeln!(out, "\ndigest      {several} workers {}", digest(&story.several));
    let _ = writeln!(out, "            1 worker  {}", digest(&story.one));
    let verdict =
        if is_one_result(story) { "the same, bit for bit" } else { "DIFFERENT: this is a defect, please report it" };
    let _ = writeln!(out, "            {verdict}");
}

/// Workers of a run.
fn workers(run: &RunState) -> usize {
    run.membership.as_ref().map_or(0, |m| m.members.len())
}

fn costs(out: &mut String, run: &RunState) {
    let count = workers(run);
    let plural = if count == 1 { "worker " } else { "workers" };
    let rate = run.tokens_per_second().map_or_else(String::new, |r| grouped(r.round() as u64));
    let time = run.done.as_ref().map_or_else(String::new, |d| clock(d.seconds));
    let planned = run.memory.values().map(|m| m.planned_bytes).max().unwrap_or(0);
    let peak = run.memory.values().map(|m| m.peak_bytes).max().unwrap_or(0);
    let gpu = run.memory.values().filter_map(|m| m.gpu).max_by_key(|gpu| gpu.peak_bytes);
    let gpu = gpu.map_or_else(String::new, |gpu| {
        format!("; of the GPU {} planned, {} peak", bytes(gpu.planned_bytes), bytes(gpu.peak_bytes))
    });
    let _ = writeln!(
        out,
        "{count} {plural}   {rate} tokens/s, {time}; memory per worker: {} planned, {} peak{gpu}",
        bytes(planned),
        bytes(peak)
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::corpus::{Corpus, Row};
    use crate::demo::score::Answer;
    use unisono_proto::v1::{event::Body, Event, RunDone};

    fn run(digest: &str) -> RunState {
        let done = RunDone { digest: digest.into(), ..Default::default() };
        let mut state = RunState::default();
        state.apply(&Event { sequence: 1, time: 0.0, body: Some(Body::Done(done)) });
        state
    }

    fn story(one: &str) -> Story {
        let corpus = Corpus::new(0);
        // Right on known templates, silent on the unseen ones.
        let right = |row: &Row| Answer { completion: row.completion.clone(), ended: true };
        let wrong = |_: &Row| Answer { completion: String::new(), ended: true };
        let asked = questions(&corpus);
        let after = asked.iter().flat_map(|(_, known, unseen)| known.iter().map(right).chain(unseen.iter().map(wrong)));
        let after: Vec<Answer> = after.collect();
        Story {
            directory: "runs/demo-001".into(),
            before: Vec::new(),
            after,
            pretrained: RunState::default(),
            several: run("d1"),
            one: run(one),
            seconds: 61.0,
            corpus,
        }
    }

    #[test]
    fn every_answer_is_held_against_its_own_question() {
        let text = screen(&story("d1"));
        let row = text.lines().find(|l| l.starts_with("reverse")).unwrap();
        let figures: Vec<&str> = row.split_whitespace().skip(2).collect();
        assert_eq!(figures, ["0.0%", "100.0%", "0.0%"], "{text}");
        assert!(text.contains("8 of 8 tasks reach 90%"), "{text}");
        assert!(text.contains("the same, bit for bit"), "{text}");
        let object = object(&story("d1"));
        let task = object["tasks"].as_array().unwrap().iter().find(|task| task["task"] == "reverse").unwrap();
        assert_eq!((&task["before"], &task["after"], &task["unseen"]), (&json!(0.0), &json!(1.0), &json!(0.0)));
        assert_eq!((&object["one_result"], &object["digest"]), (&json!(true), &json!("d1")));
    }

    #[test]
    fn two_results_are_called_a_defect() {
        let other = story("d2");
        assert!(!is_one_result(&other));
        assert!(screen(&other).contains("DIFFERENT"));
        // Two runs without a digest are no proof.
        let unknown = Story { several: run(""), ..story("") };
        assert!(!is_one_result(&unknown));
    }
}
