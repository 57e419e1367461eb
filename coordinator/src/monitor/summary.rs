//! The last screen of a run, and the one screen of `status`.

use super::plain::{bytes, clock, grouped, rows, significant};
use super::state::RunState;
use std::fmt::Write;
use unisono_proto::v1::Evaluated;

/// What a finished run leaves to know, as lines of text. Says nothing that no event told.
pub fn summary(state: &RunState) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<12}{value}");
    };
    if let (Some(first), Some(last)) = (&state.first_step, &state.last_step) {
        row("loss", format!("{:.4} -> {:.4} over {} steps", first.loss, last.loss, last.step));
    }
    if let Some(rate) = state.tokens_per_second() {
        let total: u64 = state.rank_tokens.iter().sum();
        let shares: Vec<String> = state
            .rank_tokens
            .iter()
            .filter(|_| total > 0)
            .map(|tokens| format!("{:.0}%", 100.0 * *tokens as f64 / total as f64))
            .collect();
        let spread =
            if shares.len() > 1 { format!(" ({} of the tokens by rank)", shares.join(" / ")) } else { String::new() };
        row("speed", format!("{} tokens/s{spread}", grouped(rate.round() as u64)));
    }
    for (index, memory) in state.memory.values().enumerate() {
        let gpu = memory.gpu.map_or_else(String::new, |gpu| {
            format!("; of its GPU {} planned, {} peak", bytes(gpu.planned_bytes), bytes(gpu.peak_bytes))
        });
        let text = format!(
            "rank {}: {} planned, {} peak, {} of it optimizer state{gpu}",
            memory.rank,
            bytes(memory.planned_bytes),
            bytes(memory.peak_bytes),
            bytes(memory.optimizer_bytes)
        );
        row(if index == 0 { "memory" } else { "" }, text);
    }
    for (index, quarantined) in state.quarantined.iter().enumerate() {
        row(if index == 0 { "left out" } else { "" }, rows(quarantined));
    }
    if let Some(done) = &state.done {
        row("time", clock(done.seconds));
        row("digest", done.digest.clone());
    }
    out += &evaluations(state);
    out
}

/// A table of the newest evaluations: a row per split and task, the mean over all tasks last.
pub fn evaluations(state: &RunState) -> String {
    let mut out = String::new();
    let mut rows: Vec<&Evaluated> = state.evals.values().collect();
    if rows.is_empty() {
        return out;
    }
    // One task is the same as all tasks together.
    let tasks = rows.iter().filter(|e| !e.task.is_empty()).map(|e| &e.task).collect::<std::collections::BTreeSet<_>>();
    let single = tasks.len() == 1;
    rows.retain(|e| !(single && e.task.is_empty()));
    rows.sort_by_key(|e| (e.split != "validation", e.split.clone(), e.task.is_empty(), e.task.clone()));
    let name = |e: &Evaluated| if e.task.is_empty() { "all".to_string() } else { e.task.clone() };
    let width = rows.iter().map(|e| name(e).len()).max().unwrap_or(0).max(4);
    let _ = writeln!(
        out,
        "\n{:<12}{:<width$} {:>10} {:>12} {:>10} {:>9}",
        "split", "task", "loss", "perplexity", "accuracy", "targets"
    );
    for e in rows {
        let _ = writeln!(
            out,
            "{:<12}{:<width$} {:>10.4} {:>12} {:>9.1}% {:>9}",
            e.split,
            name(e),
            e.loss,
            significant(e.perplexity),
            e.token_accuracy * 100.0,
            grouped(e.targets)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::{event, started, step};
    use super::*;
    use unisono_proto::v1::{event::Body, GpuMemory, Memory, RunDone};

    fn eval(split: &str, task: &str, loss: f64) -> Body {
        Body::Eval(Evaluated {
            step: 2,
            split: split.into(),
            task: task.into(),
            loss,
            perplexity: loss.exp(),
            token_accuracy: 0.5,
            targets: 1200,
        })
    }

    #[test]
    fn the_last_screen_says_what_the_events_told() {
        let mut state = RunState::default();
        let bodies = [
            started(2),
            Body::Memory(Memory {
                rank: 0,
                planned_bytes: 3 << 20,
                peak_bytes: 2 << 20,
                optimizer_bytes: 1 << 20,
                zero_stage: 1,
                gpu: None,
            }),
            Body::Memory(Memory {
                rank: 1,
                gpu: Some(GpuMemory { planned_bytes: 5 << 30, peak_bytes: 4 << 30 }),
                ..Memory::default()
            }),
            step(1, 5.0, 1.0),
            step(2, 4.0, 0.5),
            eval("validation", "", 2.0),
            eval("validation", "copy", 1.0),
            eval("validation", "add", 3.0),
            Body::Done(RunDone { steps: 2, seconds: 61.0, tokens: 2000, export: "e".into(), digest: "abc".into() }),
        ];
        for (index, body) in bodies.into_iter().enumerate() {
            state.apply(&event(index as u64 + 1, index as f64, body));
        }
        let text = summary(&state);
        assert!(text.contains("5.0000 -> 4.0000 over 2 steps"), "{text}");
        assert!(text.contains("2,000 tokens/s (60% / 40% of the tokens by rank)"), "{text}");
        assert!(text.contains("rank 0: 3.0 MiB planned, 2.0 MiB peak, 1.0 MiB of it optimizer state\n"), "{text}");
        assert!(text.contains("; of its GPU 5.0 GiB planned, 4.0 GiB peak\n"), "{text}");
        let order: Vec<usize> =
            ["add", "copy", "all"].iter().map(|t| text.find(&format!("validation  {t}")).unwrap()).collect();
        assert!(order.is_sorted(), "{text}");
    }

    #[test]
    fn a_single_task_is_shown_once() {
        let mut state = RunState::default();
        state.apply(&event(1, 0.0, eval("test", "", 2.0)));
        state.apply(&event(2, 0.0, eval("test", "gsm8k", 2.0)));
        let table = evaluations(&state);
        assert!(table.contains("gsm8k") && !table.contains("all"), "{table}");
    }
}
