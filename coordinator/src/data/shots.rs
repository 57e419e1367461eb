//! Examples before a prompt: rows of the same task's training split, drawn for each row by seed.

use super::detect::Kind;
use super::files::files;
use super::jinja::Draw;
use super::lines::map_lines;
use super::problem::{Problem, Remedy};
use super::row::Row;
use super::split::{split, Part};
use super::Error;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use unisono_configs::run::{Data, Held, RunConfig};

/// Rows that examples are drawn from; a larger training split is represented by as many of its rows, chosen by seed.
const POOL: usize = 4096;

/// What rendering a table draws at random from.
#[derive(Clone)]
pub struct Draws {
    pub seed: u64,
    pub shots: Option<Arc<Shots>>,
}

/// The rows that examples are drawn from, each with what it is split by.
pub struct Shots {
    rows: Vec<(u128, Row<'static>)>,
    count: usize,
}

impl Draws {
    /// Of one table. Where it wants examples, its files are read for their split and once more for the examples.
    pub fn of(config: &RunConfig, data: &Data) -> Result<Self, Error> {
        let seed = config.train.seed;
        let shots = match data.few_shot {
            0 => None,
            count => Some(Arc::new(Shots { rows: pool(config, data)?, count })),
        };
        Ok(Draws { seed, shots })
    }
}

impl Shots {
    /// Gives examples to `take` until it has taken as many as the table wants: never a row of the same `source`.
    pub fn draw(
        &self,
        row: &Row<'_>,
        source: u128,
        seed: u64,
        mut take: impl FnMut(&Row<'_>) -> bool,
    ) -> Result<(), Problem> {
        let mut draw = Draw::new(&[&seed.to_le_bytes(), &row.hash().to_le_bytes(), b"few-shot examples"]);
        let mut left: Vec<u32> = (0..self.rows.len() as u32).collect();
        let mut used = vec![source];
        while used.len() <= self.count && !left.is_empty() {
            let (origin, example) = &self.rows[left.swap_remove(draw.below(left.len())) as usize];
            if !used.contains(origin) && take(example) {
                used.push(*origin);
            }
        }
        match used.len() > self.count {
            true => Ok(()),
            false => Err(Problem::new(
                format!(
                    "only {} other training rows can be examples, data.few_shot asks for {}",
                    used.len() - 1,
                    self.count
                ),
                Remedy::FewShot,
            )),
        }
    }
}

/// Training rows of the table. Rows that cannot be read are passed over: reading the table names them.
fn pool(config: &RunConfig, data: &Data) -> Result<Vec<(u128, Row<'static>)>, Error> {
    let sources = |path: &Path, key: &str| each(data, path, key, |kind, row| kind.source(data, &row).ok());
    let hashes: Vec<u128> = sources(&data.path, "data.path")?;
    let share = |held: &Option<Held>, default: f64| match held {
        None => default,
        Some(Held::Share(share)) => *share,
        Some(Held::File(_)) => 0.0,
    };
    let validation = share(&data.validation, config.split.validation);
    let parts = split(&hashes, validation, share(&data.test, config.split.test));
    let mut held_out = HashSet::new();
    for (held, key) in [(&data.validation, "data.validation"), (&data.test, "data.test")] {
        if let Some(Held::File(path)) = held {
            held_out.extend(sources(path, key)?);
        }
    }
    // Which rows represent a large split: those whose hash, keyed by the seed, is smallest.
    let rank = |source: u128| {
        let mut hasher = blake3::Hasher::new_derive_key("unisono 1 rows that examples are drawn from");
        hasher.update(&config.train.seed.to_le_bytes()).update(&source.to_le_bytes());
        *hasher.finalize().as_bytes()
    };
    let trained = hashes.iter().zip(parts).filter(|(hash, part)| *part == Part::Train && !held_out.contains(hash));
    let mut ranked: Vec<([u8; 32], u128)> = trained.map(|(hash, _)| (rank(*hash), *hash)).collect();
    ranked.sort_unstable();
    ranked.dedup();
    ranked.truncate(POOL);
    let chosen: HashSet<u128> = ranked.into_iter().map(|(_, hash)| hash).collect();
    let found = each(data, &data.path, "data.path", |kind, row| {
        let source = kind.source(data, &row).ok().filter(|source| chosen.contains(source))?;
        Some((source, row.into_owned()))
    })?;
    // Of rows that share a source, the first.
    let mut seen = HashSet::new();
    Ok(found.into_iter().filter(|(source, _)| seen.insert(*source)).collect())
}

/// What `work` makes of the rows of `path`, in their order.
fn each<T: Send>(
    data: &Data,
    path: &Path,
    key: &str,
    work: impl Fn(Kind, Row<'_>) -> Option<T> + Sync,
) -> Result<Vec<T>, Error> {
    let mut all = Vec::new();
    for file in files(path, key)? {
        let kind = Kind::of_file(data, &file, key)?;
        let found = map_lines(&file, key, &(), |_, text| {
            let mut row: Row<'_> = serde_json::from_str(std::str::from_utf8(text).ok()?).ok()?;
            row.rename(&data.columns);
            work(kind, row)
        })?
        .results;
        all.extend(found.into_iter().flatten());
    }
    Ok(all)
}
