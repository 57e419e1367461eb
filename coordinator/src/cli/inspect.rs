//! `inspect`: what the model will see and be asked for.

use super::config::ConfigArgs;
use super::{print, Error, Result};
use crate::data::{prepare, view, Example, Extent, TextTokenizer};
use std::io::IsTerminal;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono inspect recipe.toml --rows 3
  unisono inspect --model models/tiny --data rows.jsonl
  unisono inspect recipe.toml --json | head")]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Rows to show of each task
    #[arg(long, value_name = "N", default_value_t = 2)]
    rows: usize,
    /// Rows of which part
    #[arg(long, value_enum, default_value_t = Part::Train)]
    part: Part,
    /// One JSON object per line: a "task" for each table, then a "row" for each row
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Part {
    Train,
    Validation,
    Test,
}

/// Counts per task, then rows: the prompt dim, completion tokens in alternating colours, or in ⟦ ⟧ where the output is
/// no terminal.
pub fn inspect(args: Args) -> Result<()> {
    let (config, spec) = args.config.load()?;
    let dataset = prepare(&config, Extent::All, &()).map_err(Error::bad_input)?;
    let tokenizer = TextTokenizer::read(&config.model.path, spec.vocab).map_err(Error::bad_input)?;
    let of = |task: usize| -> Result<Vec<Example>> {
        let held_out = match args.part {
            Part::Train => {
                let rows = (0..dataset.train_rows() as u32).filter(|&row| dataset.task_of(row) == task);
                let found = rows.map(|row| dataset.example(row)).filter_map(std::result::Result::transpose);
                return found.take(args.rows).collect::<std::result::Result<_, _>>().map_err(Error::bad_input);
            }
            Part::Validation => &dataset.validation,
            Part::Test => &dataset.test,
        };
        Ok(held_out.iter().filter(|e| e.task as usize == task).take(args.rows).cloned().collect())
    };
    if args.json {
        for report in &dataset.reports() {
            let mut line = serde_json::json!({"event": "task"});
            let fields = serde_json::to_value(report).map_err(Error::failed)?;
            line.as_object_mut().into_iter().for_each(|o| o.extend(fields.as_object().cloned().unwrap_or_default()));
            print(&format!("{line}\n"));
        }
    } else {
        print(&view::table(&dataset.reports()));
    }
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    for (index, task) in dataset.tasks.iter().enumerate() {
        for example in &of(index)? {
            print(&match args.json {
                true => format!("{}\n", view::row_json(example, task, &tokenizer)),
                false => format!("\n{}", view::row(example, task, &tokenizer, colour)),
            });
        }
    }
    Ok(())
}
