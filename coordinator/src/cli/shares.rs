//! What a run's rows cost to tokenize, how its tasks share it, and how full and even its batches are: told before and after
//! a run, to people and scripts.

use crate::data::{planned_shares, Dataset, Effort};
use crate::monitor::plain::grouped;
use crate::run::composition::Composition;
use serde_json::json;
use unisono_configs::run::{RunConfig, Unit};

/// The rows that were tokenized and those that an earlier run had left in the cache.
pub fn tokenized(effort: &Effort) -> String {
    let Effort { tokenized, cached, unknown, .. } = *effort;
    let rest = match unknown {
        0 => String::new(),
        n => format!(", {} not needed", grouped(n)),
    };
    format!("{} rows tokenized, {} from the cache{rest}", grouped(tokenized), grouped(cached))
}

pub fn tokenized_json(effort: &Effort) -> String {
    let Effort { tokenized, cached, unknown, written } = *effort;
    json!({"event": "tokens", "tokenized": tokenized, "cached": cached, "unknown": unknown, "written": written})
        .to_string()
}

/// Each task's part of some steps, where there are several.
pub fn shares(dataset: &Dataset, config: &RunConfig, composition: &Composition) -> String {
    if dataset.tasks.len() < 2 {
        return String::new();
    }
    let planned = planned_shares(dataset, config);
    let unit = match config.mix.unit {
        Unit::Examples => "examples",
        Unit::CompletionTokens => "completion tokens",
    };
    let mut out = String::new();
    for (task, (name, (part, (examples, targets)))) in
        dataset.tasks.iter().zip(composition.parts.iter().zip(composition.shares())).enumerate()
    {
        let wanted = match planned.as_ref().and_then(|shares| shares.get(task)) {
            Some(share) => format!(" (planned {:.2} % of {unit})", share * 100.0),
            None => String::new(),
        };
        out += &format!(
            "share {name}: {} examples, {:.2} %; {} completion tokens, {:.2} %{wanted}\n",
            grouped(part.examples),
            examples * 100.0,
            grouped(part.targets),
            targets * 100.0
        );
    }
    out
}

/// How full micro-batches are and how evenly ranks are loaded.
pub fn batches(composition: &Composition) -> String {
    format!(
        "micro-batches {:.1} % full, the dearest rank of a step costs {:.2} times the mean",
        composition.fill * 100.0,
        composition.imbalance
    )
}

pub fn batches_json(dataset: &Dataset, config: &RunConfig, composition: &Composition) -> String {
    let planned = planned_shares(dataset, config);
    let tasks: Vec<_> = dataset
        .tasks
        .iter()
        .zip(composition.parts.iter().zip(composition.shares()))
        .enumerate()
        .map(|(task, (name, (part, (examples, targets))))| {
            json!({
                "task": name,
                "examples": part.examples,
                "completion_tokens": part.targets,
                "share_of_examples": examples,
                "share_of_completion_tokens": targets,
                "planned": planned.as_ref().and_then(|shares| shares.get(task)),
            })
        })
        .collect();
    json!({"event": "batches", "fill": composition.fill, "imbalance": composition.imbalance, "tasks": tasks})
        .to_string()
}
