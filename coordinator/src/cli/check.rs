//! `check`: what the gate finds in the data and what the run would need, without training.

use super::config::ConfigArgs;
use super::screen::Reading;
use super::{memory, print, Error, Result};
use crate::data::gate::{self, Finding, Severity};
use crate::data::{prepare, view, Extent};
use crate::monitor::plain::grouped;
use crate::serve::work::Work;
use serde_json::{json, Value};
use std::sync::Arc;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono check recipe.toml
  unisono check recipe.toml --strict && unisono train recipe.toml
  unisono check recipe.toml --workers-here 8    # of 64, the others on machines like this
  unisono check recipe.toml --json | jq 'select(.event == \"finding\") | .kind'

Findings are explained in docs/data.md; each can be set to \"off\", \"warn\" or \"refuse\" in [gate].

The memory is that of one worker on this machine, in the worst step of this very plan: the worker's program says it.

Exit codes: 0 nothing is refused, 2 bad input, a finding that is refused, or too little memory (with what would fit).")]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Refuse what the configuration only warns of
    #[arg(long)]
    strict: bool,
    /// How many of the workers share this machine, or one like it [default: all]
    #[arg(long, value_name = "N")]
    workers_here: Option<usize>,
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
    let memory = memory::foresee(&config, &spec, &work, args.workers_here)?;
    if args.json {
        for report in &reports {
            print(&line("task", report)?);
        }
        for finding in &findings {
            print(&line("finding", finding)?);
        }
        match &memory {
            Ok(memory) => print(&line("memory", memory)?),
            Err(unplanned) => print(&line("memory", unplanned)?),
        }
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
        print(&memory.as_ref().map_or_else(memory::Unplanned::show, memory::Memory::show));
        if findings.is_empty() {
            print("the gate has nothing to say against this data\n");
        }
    }
    refuse(&findings)?;
    match memory.ok().and_then(|memory| memory.refusal()) {
        Some(sentence) => Err(Error::BadInput(sentence)),
        None => Ok(()),
    }
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
