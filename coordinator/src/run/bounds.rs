//! What the configuration permits, whatever the rows: the limits of every dealing.

use super::plan::{Error, Size, Worst, MAX_TOKENS};
use unisono_configs::run::Train;

/// Checks the limits that every dealing needs; returns the cap on tokens.
pub(super) fn limits(train: &Train) -> Result<u32, Error> {
    let value = |key, value: usize, demand: &str| Error::Value { key, value: value.to_string(), demand: demand.into() };
    if train.global_batch_size == 0 {
        return Err(value("global_batch_size", 0, "at least 1"));
    }
    if train.micro_batches == 0 {
        return Err(value("micro_batches", 0, "at least 1"));
    }
    let max = train.max_tokens_per_micro_batch;
    if max == 0 || max > MAX_TOKENS {
        return Err(value("max_tokens_per_micro_batch", max, &format!("between 1 and {MAX_TOKENS}")));
    }
    Ok(max as u32)
}

/// Refuses rows that are longer than a micro-batch may be.
pub(super) fn fits<'a>(
    suite: &'static str,
    sizes: impl IntoIterator<Item = &'a Size>,
    max: usize,
) -> Result<(), Error> {
    match sizes.into_iter().enumerate().find(|(_, size)| size.tokens as usize > max) {
        Some((row, size)) => Err(Error::TooLong { suite, row, tokens: size.tokens, max }),
        None => Ok(()),
    }
}

/// The largest that any step can bring.
pub(super) fn permitted(train: &Train) -> Worst {
    let max = train.max_tokens_per_micro_batch.max(1);
    let document = train.max_length.saturating_sub(1).clamp(1, max);
    let batch = train.global_batch_size;
    let total = batch.saturating_mul(document);
    // A bin is opened beyond the first ones only where a document fits in none: then all but the newest hold more than
    // max - document tokens.
    let opened = total / (max - document + 1) + 1;
    let micro_batches = train.micro_batches.max(total.div_ceil(max)).max(opened).min(batch.max(1));
    Worst {
        tokens: max.min(total) as u32,
        document: document as u32,
        micro_batches: u32::try_from(micro_batches).unwrap_or(u32::MAX),
        // Any number is permitted; one micro-batch has seldom twice as many as the others.
        documents: u32::try_from((2 * batch).div_ceil(train.micro_batches.max(1)).min(max)).unwrap_or(u32::MAX),
        positions: 0,
    }
}

/// The largest that any step can bring from which any rows have been left out, and tokens of its largest micro-batch, of the
/// second largest, and so on: dealt again, the rest may lie otherwise. No row has more than `longest` tokens, no step more than `largest`
/// with all of its rows, and none more than `micro_batches`.
pub(super) fn dealt_again(train: &Train, micro_batches: u32, longest: u32, largest: u64) -> (Worst, Vec<u32>) {
    let max = train.max_tokens_per_micro_batch.max(1) as u64;
    // A step of which nothing is left takes one row of another.
    let total = largest.max(longest.into());
    // So many are at least as large as this one.
    let sizes: Vec<u32> = (1..=u64::from(micro_batches)).map(|place| max.min(total / place) as u32).collect();
    let worst = Worst {
        tokens: sizes.first().copied().unwrap_or(0),
        document: longest,
        // Of as many micro-batches as are asked for, none is empty.
        documents: u32::try_from(train.global_batch_size.saturating_sub(train.micro_batches.max(1) - 1))
            .unwrap_or(u32::MAX)
            .max(1),
        ..Worst::default()
    };
    (worst, sizes)
}
