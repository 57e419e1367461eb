//! The token stage: rows become tokens when they are asked for, once for all runs that share the cache. What is known of
//! a row only grows, and is a pure function of its text: who asks, and when, changes nothing.

use super::cache::{Cache, Entry, Measure, Place};
use super::encode::{Encoder, Stop};
use super::gate::{self, Finding, TokenFlaws};
use super::origin::{Origin, Source};
use super::problem::Problem;
use super::{Error, Example};
use crate::run::plan::Size;
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, RwLock};

/// The row is not tokenized yet.
const UNKNOWN: u64 = 0;
/// The row cannot be trained on.
const LEFT_OUT: u64 = 1;
/// Set in every known size.
const KNOWN: u64 = 2;

/// Rows by number, and what is known of them.
pub struct Store {
    encoder: Encoder,
    origins: Vec<Origin>,
    sources: Vec<Source>,
    /// [`UNKNOWN`], [`LEFT_OUT`], or [`KNOWN`] with 31 bits of tokens and 31 bits of targets.
    fates: Vec<AtomicU64>,
    /// The gate's bits.
    flaws: Vec<AtomicU8>,
    places: RwLock<Vec<Option<Place>>>,
    measures: Mutex<Vec<Tally>>,
    cache: Option<Cache>,
    /// Somebody was told that the cache fails.
    warned: AtomicBool,
    tokenized: AtomicU64,
    cached: AtomicU64,
    unknown: AtomicU64,
}

/// What the known rows of one task add up to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub rows: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub longest: usize,
    pub truncated: u64,
    /// Rows whose tokens cannot be trained on.
    pub left_out: u64,
}

/// What tokenizing has cost so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Effort {
    /// Rows that were tokenized, each once.
    pub tokenized: u64,
    /// Rows whose tokens an earlier run had left in the cache.
    pub cached: u64,
    /// Rows of which nothing is known yet.
    pub unknown: u64,
    /// Bytes that were added to the cache.
    pub written: u64,
}

impl Store {
    /// `tasks`: how many there are. Takes from `cache` what it has.
    pub fn new(
        encoder: Encoder,
        origins: Vec<Origin>,
        sources: Vec<Source>,
        tasks: usize,
        cache: Option<Cache>,
    ) -> Self {
        let count = sources.len();
        let mut fates = Vec::with_capacity(count);
        fates.resize_with(count, || AtomicU64::new(UNKNOWN));
        let mut flaws = Vec::with_capacity(count);
        flaws.resize_with(count, || AtomicU8::new(0));
        let this = Store {
            flaws,
            encoder,
            origins,
            sources,
            fates,
            places: RwLock::new(vec![None; count]),
            measures: Mutex::new(vec![Tally::default(); tasks]),
            cache,
            warned: AtomicBool::new(false),
            tokenized: AtomicU64::new(0),
            cached: AtomicU64::new(0),
            unknown: AtomicU64::new(count as u64),
        };
        this.recall();
        this
    }

    /// Looks the rows up in the cache.
    fn recall(&self) {
        let Some(cache) = &self.cache else { return };
        let mut wanted: Vec<(u128, u32)> = Vec::new();
        let mut met = vec![false; self.count()];
        let mut found: Vec<(u32, Measure, Place)> = Vec::new();
        cache.scan(|key, measure, place| {
            // Built when there is something to compare with.
            if wanted.is_empty() {
                wanted = (0..).zip(&self.sources).map(|(row, source)| (source.key, row)).collect();
                wanted.par_sort_unstable();
            }
            let first = wanted.partition_point(|&(other, _)| other < key);
            let rows = wanted[first..].iter().take_while(|&&(other, _)| other == key);
            let new: Vec<u32> = rows.map(|&(_, row)| row).filter(|&row| !met[row as usize]).collect();
            for &row in &new {
                met[row as usize] = true;
                found.push((row, measure, place));
            }
            !new.is_empty()
        });
        self.cached.store(found.len() as u64, Ordering::Relaxed);
        found.into_iter().for_each(|(row, measure, place)| self.know(row, Some((measure, Some(place)))));
    }

    pub fn source(&self, row: u32) -> &Source {
        &self.sources[row as usize]
    }

    pub fn count(&self) -> usize {
        self.sources.len()
    }

    pub fn place_of(&self, row: u32) -> String {
        let source = self.source(row);
        format!("{}:{}", self.origins[source.file as usize].path.display(), source.line)
    }

    /// Bytes of the texts of rows of which nothing is known.
    pub fn unknown_bytes(&self) -> u64 {
        let sources = self.sources.iter().zip(&self.fates);
        sources.filter(|(_, f)| f.load(Ordering::Relaxed) == UNKNOWN).map(|(s, _)| u64::from(s.length)).sum()
    }

    pub fn all_known(&self) -> bool {
        self.unknown.load(Ordering::Acquire) == 0
    }

    pub fn is_known(&self, row: u32) -> bool {
        self.fates[row as usize].load(Ordering::Acquire) != UNKNOWN
    }

    pub fn is_left_out(&self, row: u32) -> bool {
        self.fates[row as usize].load(Ordering::Acquire) == LEFT_OUT
    }

    pub fn effort(&self) -> Effort {
        Effort {
            tokenized: self.tokenized.load(Ordering::Relaxed),
            cached: self.cached.load(Ordering::Relaxed),
            unknown: self.unknown.load(Ordering::Relaxed),
            written: self.cache.as_ref().map_or(0, Cache::written),
        }
    }

    /// By task.
    pub fn tallies(&self) -> Vec<Tally> {
        self.tally().clone()
    }

    /// The size of `row`; `None` where it is left out. Tokenizes it where nobody has.
    pub fn size(&self, row: u32) -> Result<Option<Size>, Error> {
        if !self.is_known(row) {
            self.resolve(&[row])?;
        }
        let fate = self.fates[row as usize].load(Ordering::Acquire);
        let part = |shift: u32| (fate >> shift) as u32 & ((1 << 31) - 1);
        let task = self.sources[row as usize].task;
        Ok((fate != LEFT_OUT).then(|| Size { tokens: part(33) - 1, targets: part(2), task }))
    }

    /// Tokenizes those of `rows` of which nothing is known, on the rayon pool that it is called from, and keeps them.
    pub fn resolve(&self, rows: &[u32]) -> Result<(), Error> {
        let mut unknown: Vec<u32> = rows.iter().copied().filter(|&row| !self.is_known(row)).collect();
        unknown.sort_unstable();
        unknown.dedup();
        let encoded: Vec<_> = unknown.into_par_iter().with_min_len(8).map(|row| (row, self.encode(row))).collect();
        let mut good: Vec<(u32, Entry, Measure)> = Vec::with_capacity(encoded.len());
        let mut bad = Vec::new();
        for (row, outcome) in encoded {
            match outcome {
                Ok((entry, measure)) => good.push((row, entry, measure)),
                Err(Stop::Row(_)) => bad.push(row),
                Err(Stop::All(error)) => return Err(error),
            }
        }
        let mut places = Vec::new();
        if let Some(cache) = self.cache.as_ref().filter(|_| !good.is_empty()) {
            let entries = good.iter().map(|(row, entry, measure)| (self.source(*row).key, *measure, entry));
            places = cache.append(entries).unwrap_or_else(|error| {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "{}: tokens cannot be kept ({error}); the run goes on without; free space there, or set tokens.cache",
                        cache.directory().display()
                    );
                }
                Vec::new()
            });
        }
        self.tokenized.fetch_add((good.len() + bad.len()) as u64, Ordering::Relaxed);
        for (index, (row, _, measure)) in good.into_iter().enumerate() {
            self.know(row, Some((measure, places.get(index).copied())));
        }
        bad.into_iter().for_each(|row| self.know(row, None));
        Ok(())
    }

    /// Notes what became of a row; `None`: it is left out.
    pub fn know(&self, row: u32, found: Option<(Measure, Option<Place>)>) {
        let fate = match &found {
            None => LEFT_OUT,
            Some((measure, place)) => {
                if place.is_some() {
                    self.places.write().unwrap_or_else(|poisoned| poisoned.into_inner())[row as usize] = *place;
                }
                self.flaws[row as usize].store(measure.flaws, Ordering::Relaxed);
                u64::from(measure.tokens) << 33 | u64::from(measure.targets) << 2 | KNOWN
            }
        };
        let slot = &self.fates[row as usize];
        if slot.compare_exchange(UNKNOWN, fate, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        let mut tallies = self.tally();
        let tally = &mut tallies[self.sources[row as usize].task as usize];
        match found {
            None => tally.left_out += 1,
            Some((measure, _)) => {
                tally.rows += 1;
                tally.prompt_tokens += u64::from(measure.unasked);
                tally.completion_tokens += u64::from(measure.tokens - measure.unasked);
                tally.longest = tally.longest.max(measure.tokens as usize);
                tally.truncated += u64::from(measure.truncated);
            }
        }
        self.unknown.fetch_sub(1, Ordering::AcqRel);
    }

    /// The row's tokens; `None` where it is left out.
    pub fn example(&self, row: u32) -> Result<Option<Example>, Error> {
        let Some(size) = self.size(row)? else { return Ok(None) };
        let place = self.places.read().unwrap_or_else(|poisoned| poisoned.into_inner())[row as usize];
        let measure =
            Measure { tokens: size.tokens + 1, targets: size.targets, unasked: 0, truncated: false, flaws: 0 };
        let kept = place.and_then(|place| self.cache.as_ref()?.read(place, measure));
        let entry = match kept.map_or_else(|| self.encode(row).map(|(entry, _)| entry), Ok) {
            Ok(entry) => entry,
            Err(Stop::All(error)) => return Err(error),
            // Its size is known, so it could be trained on: the same text has the same tokens.
            Err(Stop::Row(_)) => return Ok(None),
        };
        let Source { task, row, .. } = *self.source(row);
        Ok(Some(Example { task, row, tokens: entry.tokens, prompt: entry.prompt, gaps: entry.gaps }))
    }

    /// What the gate says of the tokens of the rows that are known, the gravest first. `names` are the tasks'.
    pub fn findings(&self, names: &[String]) -> Vec<Finding> {
        let mut tokens = gate::Tokens::default();
        for name in names {
            tokens.task(name);
        }
        let mut rows: Vec<u32> = (0..self.count() as u32).collect();
        rows.retain(|&row| self.is_known(row) && !self.is_left_out(row));
        rows.sort_by_key(|&row| self.source(row).row);
        for row in rows {
            let flaws = TokenFlaws::from_bits(self.flaws[row as usize].load(Ordering::Relaxed));
            tokens.row(self.source(row).task, flaws, || self.place_of(row));
        }
        self.encoder.gate.judge_tokens(&tokens)
    }

    /// Why `row` is left out.
    pub fn problem(&self, row: u32) -> Result<Problem, Error> {
        match self.encode(row) {
            Ok(_) => Ok("cannot be trained on".into()),
            Err(Stop::Row(problem)) => Ok(problem),
            Err(Stop::All(error)) => Err(error),
        }
    }

    fn encode(&self, row: u32) -> Result<(Entry, Measure), Stop> {
        let source = self.source(row);
        self.origins[source.file as usize].with(source, |rendered| self.encoder.encode(rendered))
    }

    fn tally(&self) -> MutexGuard<'_, Vec<Tally>> {
        self.measures.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
