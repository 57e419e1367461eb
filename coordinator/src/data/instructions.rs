//! The instruction set as text: every row as prompt and completion, with its task and its split, before any token.

use super::detect::Kind;
use super::files::files;
use super::lines::map_lines;
use super::problem::Problem;
use super::render::{Rendered, Renderer};
use super::row::Row;
use super::shots::Draws;
use super::split::{split, Part};
use super::table::refusal;
use super::{Error, Progress};
use std::path::Path;
use unisono_configs::run::{Data, Held, OnBadRow, RunConfig};

/// One row as it is trained on. Reading it again as prompt-completion gives the same tokens.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Instruction {
    pub prompt: String,
    pub completion: String,
    pub task: String,
    /// `train`, `validation` or `test`.
    pub split: &'static str,
    /// Position among all source rows of all tables.
    pub row: u64,
}

/// What became of the rows of one call of [`render`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    pub rendered: u64,
    pub dropped: u64,
}

/// A row's text, or its line and what is wrong with it.
type Outcome = Result<(u128, String, String), (u64, Problem)>;

/// Gives every row of every table to `take`, in their order, until that says no. Rows that cannot be rendered follow
/// `data.on_bad_row`; what only tokens show is not looked for.
pub fn render(
    config: &RunConfig,
    progress: &dyn Progress,
    take: &mut dyn FnMut(Instruction) -> bool,
) -> Result<Count, Error> {
    let (mut count, mut before) = (Count::default(), 0);
    for data in &config.data {
        let task = data.task();
        let table = Table { data, task: &task, model: &config.model.path, draws: Draws::of(config, data)?, progress };
        let share = |held: &Option<Held>, default: f64| match held {
            None => default,
            Some(Held::Share(share)) => *share,
            Some(Held::File(_)) => 0.0,
        };
        let (validation, test) =
            (share(&data.validation, config.split.validation), share(&data.test, config.split.test));
        let outcomes = table.read(&data.path, "data.path")?;
        let hashes: Vec<u128> = outcomes.iter().flatten().map(|(hash, ..)| *hash).collect();
        let mut parts = split(&hashes, validation, test).into_iter();
        let mut held = vec![(outcomes, None)];
        for (file, key, part) in
            [(&data.validation, "data.validation", Part::Validation), (&data.test, "data.test", Part::Test)]
        {
            if let Some(Held::File(path)) = file {
                held.push((table.read(path, key)?, Some(part)));
            }
        }
        for (outcomes, fixed) in held {
            let rows = outcomes.len() as u64;
            for (index, outcome) in outcomes.into_iter().enumerate() {
                let Ok((_, prompt, completion)) = outcome else {
                    count.dropped += 1;
                    continue;
                };
                let split = match fixed.or_else(|| parts.next()) {
                    Some(Part::Validation) => "validation",
                    Some(Part::Test) => "test",
                    _ => "train",
                };
                let row = before + index as u64;
                if !take(Instruction { prompt, completion, task: task.clone(), split, row }) {
                    return Ok(count);
                }
                count.rendered += 1;
            }
            before += rows;
        }
    }
    Ok(count)
}

struct Table<'a> {
    data: &'a Data,
    task: &'a str,
    model: &'a Path,
    draws: Draws,
    progress: &'a dyn Progress,
}

impl Table<'_> {
    /// The rows of `path`; the first bad one refuses it, unless they are to be dropped.
    fn read(&self, path: &Path, key: &str) -> Result<Vec<Outcome>, Error> {
        let mut all = Vec::new();
        for file in files(path, key)? {
            let kind = Kind::of_file(self.data, &file, key)?;
            let renderer = Renderer::new(self.data, self.task, kind, self.model, &self.draws)?;
            let found = map_lines(&file, key, self.progress, |at, text| self.row(at.line, text, &renderer))?.results;
            let bad = found.iter().filter_map(|outcome| outcome.as_ref().err()).count() as u64;
            let first = found.iter().find_map(|outcome| outcome.as_ref().err());
            if let Some((line, problem)) = first {
                let place = format!("{}:{line}", file.display());
                if self.data.on_bad_row == OnBadRow::Refuse {
                    let bad: Vec<u64> =
                        found.iter().flat_map(|row| row.as_ref().err()).map(|(line, _)| *line).collect();
                    return Err(refusal(place, problem.clone().of(self.data), &bad, found.len() as u64));
                }
                let (rows, allowed) = (found.len() as u64, self.data.max_dropped);
                if bad as f64 > allowed * rows as f64 {
                    let first = format!("{place}: {problem}");
                    return Err(Error::TooManyDropped { path: file, dropped: bad, rows, allowed, first });
                }
            }
            all.extend(found);
        }
        Ok(all)
    }

    fn row(&self, line: u64, text: &[u8], renderer: &Renderer) -> Outcome {
        let bad = |problem: Problem| (line, problem);
        let text =
            std::str::from_utf8(text).map_err(|_| bad("the line is not UTF-8; save the file as UTF-8".into()))?;
        let mut row: Row<'_> =
            serde_json::from_str(text).map_err(|error| bad(format!("malformed JSON: {error}").into()))?;
        row.rename(&self.data.columns);
        let hash = renderer.source(&row).map_err(bad)?;
        match renderer.render(&row).map_err(bad)? {
            Rendered::Pair { completion, .. } if completion.trim().is_empty() => {
                Err(bad("the completion is empty".into()))
            }
            Rendered::Pair { prompt, completion } => Ok((hash, prompt.into_owned(), completion.into_owned())),
            Rendered::Chat { .. } => {
                Err(bad("the row is a conversation, which the model's chat template renders; unisono inspect shows it"
                    .into()))
            }
        }
    }
}
