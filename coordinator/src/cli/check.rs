//! `check`: what the gate finds in the data and what the run would need, without training.

use super::config::{workers, ConfigArgs};
use super::screen::Reading;
use super::{memory, planned, print, Error, Result};
use crate::data::gate::{self, Finding, Severity};
use crate::data::{prepare, view, Extent};
use crate::monitor::plain::grouped;
use serde_json::{json, Value};
use std::sync::Arc;
use unisono_configs::run::RunConfig;

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
    /// One JSON object per line: a "task" for each table, its "finding"s, then "plan", "memory" and "verdict",
    /// which has "ok" and what is wrong as "error"
    #[arg(long)]
    json: bool,
}

impl Args {
    /// All of it for a script.
    pub fn told(config: ConfigArgs) -> Self {
        Args { config, strict: false, workers_here: None, json: true }
    }
}

pub fn check(args: Args) -> Result<()> {
    let json = args.json;
    match look(args) {
        Err(Error::BadInput(sentence)) if json => {
            print(&line("verdict", &json!({"ok": false, "error": sentence}))?);
            Err(Error::BadInput(sentence))
        }
        // What is refused has its verdict already.
        ended => ended?,
    }
}

/// `Ok(Err)`: all was looked at, and something is refused.
fn look(args: Args) -> Result<Result<()>> {
    let (config, spec) = args.config.load()?;
    let count = workers(&config);
    if args.workers_here.is_some_and(|here| !(1..=count).contains(&here)) {
        return Err(Error::BadInput(format!("--workers-here must be from 1 to {count}, the number of workers")));
    }
    let mut dataset = prepare(&config, Extent::All, &Reading::default()).map_err(Error::bad_input)?;
    let mut findings = std::mem::take(&mut dataset.findings);
    if args.strict {
        findings = findings.into_iter().map(Finding::stricter).collect();
    }
    let reports = dataset.reports();
    let glance = planned::glance(Arc::new(dataset), &config, &spec)?;
    let memory = memory::foresee(&config, &spec, &glance.work, args.workers_here)?;
    let too_large = memory.as_ref().ok().and_then(memory::Memory::refusal);
    let refused = refuse(&findings).and_then(|()| too_large.map_or(Ok(()), |sentence| Err(Error::BadInput(sentence))));
    if args.json {
        for report in &reports {
            print(&line("task", report)?);
        }
        for finding in &findings {
            print(&line("finding", finding)?);
        }
        for warning in planned::warnings(&config, glance.steps) {
            print(&line("warning", &json!({"message": warning}))?);
        }
        let totals = &glance.totals;
        print(&line(
            "plan",
            &json!({"steps": glance.steps, "exact": glance.exact, "examples": totals.examples, "tokens": totals.tokens,
                "target_tokens": totals.target_tokens}),
        )?);
        match &memory {
            Ok(memory) => print(&line("memory", memory)?),
            Err(unplanned) => print(&line("memory", unplanned)?),
        }
        print(&line("verdict", &verdict(&findings, &refused))?);
    } else {
        print(&view::table(&reports));
        print(&gate::show(&findings));
        if let Some(plan) = glance.work.plan() {
            print(&format!(
                "plan: {}; micro-batches of up to {} tokens\n",
                glance.show(),
                grouped(u64::from(plan.worst().tokens))
            ));
        }
        warn(&config, glance.steps);
        print(&memory.as_ref().map_or_else(memory::Unplanned::show, memory::Memory::show));
        if findings.is_empty() {
            print("the gate has nothing to say against this data\n");
        }
    }
    Ok(refused)
}

/// Says on standard error what trains to no end.
pub fn warn(config: &RunConfig, steps: u64) {
    planned::warnings(config, steps).iter().for_each(|warning| eprintln!("warning: {warning}"));
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

fn verdict(findings: &[Finding], refused: &Result<()>) -> Value {
    let error = match refused {
        Err(Error::BadInput(sentence)) => Some(sentence),
        _ => None,
    };
    let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
    json!({
        "ok": refused.is_ok(), "error": error, "refused": count(Severity::Error), "warnings": count(Severity::Warning), "notes": count(Severity::Note),
    })
}

fn line(event: &str, fields: &impl serde::Serialize) -> Result<String> {
    let mut line = serde_json::Map::from_iter([("event".to_owned(), event.into())]);
    if let Value::Object(fields) = serde_json::to_value(fields).map_err(Error::failed)? {
        line.extend(fields);
    }
    Ok(format!("{}\n", Value::Object(line)))
}
