//! Rows that say which they are, so that whoever gets one can tell that it is whole, in its place, and seen once an epoch.

use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use unisono::data::Example;
use unisono_proto::v1::MicroBatch;
use unisono_proto::{get_u32s, NO_TARGET};

/// Token ids of the rows.
pub const VOCABULARY: u32 = 4096;

/// Tokens that spell a row's number.
const DIGITS: usize = 2;

/// Tokens of a prompt, at least; longer ones follow from the row.
const PROMPT: u64 = 40;

/// Training row `row`: about 100 tokens, the first of which spell its number.
pub fn row(row: u64) -> Example {
    let length = 86 + row * 7 % 41;
    let tokens = (0..length).map(|at| token(row, at as usize)).collect();
    Example { task: 0, row, tokens, prompt: (PROMPT + row % 13) as u32, gaps: Box::default() }
}

fn token(row: u64, at: usize) -> u32 {
    match at {
        0 => (row % u64::from(VOCABULARY)) as u32,
        1 => (row / u64::from(VOCABULARY)) as u32,
        _ => ((row * 2_654_435_761 + at as u64 * 40_503) >> 7) as u32 % VOCABULARY,
    }
}

/// Has seen so many rows, tokens and faults.
#[derive(Default)]
pub struct Inspector {
    seen: Vec<AtomicU8>,
    pub tokens: AtomicU64,
    pub faults: AtomicU64,
}

impl Inspector {
    pub fn new(rows: usize) -> Self {
        Inspector { seen: (0..rows).map(|_| AtomicU8::new(0)).collect(), ..Inspector::default() }
    }

    /// Compares every token and target of a micro-batch with the rows that it claims to hold.
    pub fn inspect(&self, batch: &MicroBatch) {
        let words = |bytes: &[u8]| get_u32s(bytes).unwrap_or_default();
        let (tokens, targets, starts) = (words(&batch.tokens), words(&batch.targets), words(&batch.starts));
        self.tokens.fetch_add(tokens.len() as u64, Ordering::Relaxed);
        for (index, &start) in starts.iter().enumerate() {
            let end = starts.get(index + 1).map_or(tokens.len(), |&next| next as usize);
            let whole = self.document(&tokens[start as usize..end], &targets[start as usize..end]);
            self.faults.fetch_add(u64::from(!whole), Ordering::Relaxed);
        }
    }

    fn document(&self, tokens: &[u32], targets: &[u32]) -> bool {
        if tokens.len() < DIGITS {
            return false;
        }
        let number = u64::from(tokens[0]) + u64::from(tokens[1]) * u64::from(VOCABULARY);
        let Some(seen) = self.seen.get(number as usize) else { return false };
        seen.fetch_add(1, Ordering::Relaxed);
        let row = row(number);
        let target = |at: usize| if at + 1 < row.prompt as usize { NO_TARGET } else { row.tokens[at + 1] };
        row.tokens.len() == tokens.len() + 1
            && tokens == &row.tokens[..tokens.len()]
            && targets.iter().enumerate().all(|(at, &t)| t == target(at))
    }

    /// Rows that were not seen exactly `times`.
    pub fn uneven(&self, times: u8) -> usize {
        self.seen.iter().filter(|seen| seen.load(Ordering::Relaxed) != times).count()
    }
}
