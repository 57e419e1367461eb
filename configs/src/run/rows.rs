//! `[mix]` and `[tokens]`: how tasks share an epoch, and how rows become tokens.

use super::section::Section;
use super::Error;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How tasks share an epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mix {
    /// How often each task occurs.
    pub by: Mixing,
    /// With "proportional" and "temperature": rows of a task that count at most; 0: all. FLAN has 3000.
    pub cap: u64,
    /// With "temperature": 1 is proportional, a large number equal.
    pub temperature: f64,
    /// What is shared out. Shares hold within 0.1 % in every epoch of 1,000 rows or more.
    pub unit: Unit,
    /// Examples of an epoch; 0: as many as rows count. Small tasks repeat, row by row in an order of their own; of large
    /// ones every epoch brings other rows until all have come.
    pub examples: u64,
}

impl Default for Mix {
    fn default() -> Self {
        Mix { by: Mixing::All, cap: 0, temperature: 1.0, unit: Unit::Examples, examples: 0 }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mixing {
    /// Every row once in an epoch.
    #[default]
    All,
    /// By the number of its rows, up to mix.cap.
    Proportional,
    /// By that number to the power of 1 / mix.temperature.
    Temperature,
    /// By data.weight.
    Weights,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    #[default]
    Examples,
    /// Tokens that the model is asked for; all rows are tokenized before training.
    CompletionTokens,
}

/// How rows become tokens. Nothing here changes the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tokens {
    /// Training text of more MiB is tokenized while training goes on, ahead of it; less, before a worker starts, so that
    /// bad rows and memory needs are known exactly from the start.
    pub ahead_above_mib: f64,
    /// Directory where tokens are kept for later runs; absent: unisono/tokens in the user's cache directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Most GiB that are kept there: what was not used for longest is removed when a run starts. 0: nothing is kept.
    pub cache_gib: f64,
}

impl Default for Tokens {
    fn default() -> Self {
        Tokens { ahead_above_mib: 16.0, cache: None, cache_gib: 20.0 }
    }
}

pub(super) fn mix(s: &Section<'_>) -> Result<Mix, Error> {
    let d = Mix::default();
    let by = [
        ("all", Mixing::All),
        ("proportional", Mixing::Proportional),
        ("temperature", Mixing::Temperature),
        ("weights", Mixing::Weights),
    ];
    Ok(Mix {
        by: s.choice("by", d.by, &by)?,
        cap: s.whole("cap", d.cap, 0)?,
        temperature: s.real("temperature", d.temperature, |x| x > 0.0, "a number above 0")?,
        unit: s.choice(
            "unit",
            d.unit,
            &[("examples", Unit::Examples), ("completion-tokens", Unit::CompletionTokens)],
        )?,
        examples: s.whole("examples", d.examples, 0)?,
    })
}

pub(super) fn tokens(s: &Section<'_>) -> Result<Tokens, Error> {
    let d = Tokens::default();
    let size = "a number of at least 0";
    Ok(Tokens {
        ahead_above_mib: s.real("ahead_above_mib", d.ahead_above_mib, |x| x >= 0.0, size)?,
        cache: s.path("cache")?,
        cache_gib: s.real("cache_gib", d.cache_gib, |x| x >= 0.0, size)?,
    })
}
