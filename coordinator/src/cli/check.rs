//! `check`: what the gate finds in the data and what the run would need, without training.

use super::config::{workers, ConfigArgs};
use super::screen::Reading;
use super::{print, Error, Result};
use crate::data::gate::{self, Finding, Severity};
use crate::data::{prepare, view, Extent};
use crate::monitor::plain::grouped;
use crate::serve::work::Work;
use serde_json::{json, Value};
use std::sync::Arc;
use unisono_configs::model::{Layout, ModelSpec};
use unisono_configs::run::{Compute, OptimizerState, RunConfig};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono check recipe.toml
  unisono check recipe.toml --strict && unisono train recipe.toml
  unisono check recipe.toml --json | jq 'select(.event == \"finding\") | .kind'

Findings are explained in docs/data.md; each can be set to \"off\", \"warn\" or \"refuse\" in [gate].

Exit codes: 0 nothing is refused, 2 bad input or a finding that is refused.")]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Refuse what the configuration only warns of
    #[arg(long)]
    strict: bool,
    /// One JSON object per line: a "task" for each table, its "finding"s, then "memory" and "verdict"
    #[arg(long)]
    json: bool,
}

pub fn check(args: Args) -> Result<()> {
    let (config, spec) = args.config.load()?;
    let mut dataset = prepare(&config, Extent::All, &Reading::default()).map_err(Error::bad_input)?;
    let mut findings = std::mem::take(&mut dataset.findings);
    if args.strict {
        findings = findings.into_iter().map(Finding::stricter).collect();
    }
    let reports = dataset.reports();
    let work = Work::train(Arc::new(dataset), &config, &spec).map_err(Error::bad_input)?;
    let memory = Memory::new(&config, &spec);
    if args.json {
        for report in &reports {
            print(&line("task", report)?);
        }
        for finding in &findings {
            print(&line("finding", finding)?);
        }
        print(&line("memory", &memory)?);
        print(&line("verdict", &verdict(&findings))?);
    } else {
        print(&view::table(&reports));
        print(&gate::show(&findings));
        if let Some(plan) = work.plan() {
            let (totals, worst) = (plan.totals().unwrap_or_default(), plan.worst());
            print(&format!(
                "plan: {} steps over {} examples, {} tokens, {} of them targets; micro-batches of up to {} tokens\n",
                grouped(plan.steps()),
                grouped(totals.examples),
                grouped(totals.tokens),
                grouped(totals.target_tokens),
                grouped(u64::from(worst.tokens))
            ));
        }
        print(&memory.show());
        if findings.is_empty() {
            print("the gate has nothing to say against this data\n");
        }
    }
    refuse(&findings)
}

/// What the gate says before a run: refusals and warnings; notes are counted only.
pub fn show(findings: &[Finding]) -> String {
    let (notes, rest): (Vec<Finding>, Vec<Finding>) =
        findings.iter().cloned().partition(|f| f.severity == Severity::Note);
    let mut out = gate::show(&rest);
    if !notes.is_empty() {
        let what =
            if notes.len() == 1 { "1 note of the gate is" } else { &format!("{} notes of the gate are", notes.len()) };
        out += &format!("{what} not shown; unisono check shows all\n");
    }
    out
}

/// Ends a run of which the gate refuses something.
pub fn refuse(findings: &[Finding]) -> Result<()> {
    let refused: Vec<&Finding> = findings.iter().filter(|f| f.severity == Severity::Error).collect();
    let Some(first) = refused.first() else { return Ok(()) };
    let more = match refused.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    Err(Error::BadInput(format!(
        "the gate refuses this data: {} in task \"{}\"{more}, as said above; change the data, or set gate.{} = \"warn\"",
        first.kind.id(),
        first.task,
        first.kind.key()
    )))
}

fn verdict(findings: &[Finding]) -> Value {
    let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
    json!({
        "refused": count(Severity::Error), "warnings": count(Severity::Warning), "notes": count(Severity::Note),
    })
}

fn line(event: &str, fields: &impl serde::Serialize) -> Result<String> {
    let mut line = serde_json::Map::from_iter([("event".to_owned(), event.into())]);
    if let Value::Object(fields) = serde_json::to_value(fields).map_err(Error::failed)? {
        line.extend(fields);
    }
    Ok(format!("{}\n", Value::Object(line)))
}

/// What each worker holds whatever the batch: known before anything is started. What a micro-batch needs beside it, the
/// worker plans and tries before the first step.
#[derive(Debug, serde::Serialize)]
struct Memory {
    workers: usize,
    parameters: usize,
    parameter_bytes: usize,
    /// Integer accumulators of the exact sum, all at a time: ZeRO-2 and 3 hold less.
    sum_bytes: usize,
    /// What the largest shard keeps beside its parameters: what a bf16 parameter lacks of its fp32 master, and both moments.
    optimizer_bytes: usize,
}

impl Memory {
    fn new(config: &RunConfig, spec: &ModelSpec) -> Self {
        let (layout, workers) = (Layout::new(spec), workers(config));
        let parameters = layout.parameters();
        let width = if config.model.compute == Compute::Bf16 { 2 } else { 4 };
        let owned = |rank| layout.shard_elements(rank, workers).iter().map(|range| range.len()).sum::<usize>();
        let largest = (0..workers).map(owned).max().unwrap_or(0);
        let kept = match (config.train.optimizer_state, config.model.compute) {
            (OptimizerState::Bf16, _) => 2 * 2,
            (OptimizerState::Fp32, Compute::Bf16) => 2 + 2 * 4,
            // The parameter is its own master.
            (OptimizerState::Fp32, _) => 2 * 4,
        };
        Memory {
            workers,
            parameters,
            parameter_bytes: width * parameters,
            sum_bytes: 8 * parameters,
            optimizer_bytes: kept * largest,
        }
    }

    fn show(&self) -> String {
        let megabytes = |bytes: usize| format!("{:.1} MB", bytes as f64 / 1e6);
        format!(
            "memory: {} parameters; each of {} workers holds parameters {}, gradient sums {} (less with \
             ZeRO-2 and 3), optimizer {}, and what a micro-batch needs\n",
            grouped(self.parameters as u64),
            self.workers,
            megabytes(self.parameter_bytes),
            megabytes(self.sum_bytes),
            megabytes(self.optimizer_bytes)
        )
    }
}
