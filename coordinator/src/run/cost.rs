//! What a document costs to compute, for balance alone: multiply-adds of its forward pass. Exact integers, so that
//! dealing never depends on rounding.

use unisono_configs::model::spec::ModelSpec;

/// Multiply-adds per token, per pair of tokens and per target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CostModel {
    /// Matrix products of all blocks, per token.
    pub token: u64,
    /// Scores and weighted values of all blocks, causal, per token squared.
    pub pair: u64,
    /// The head, which sees completion tokens only.
    pub target: u64,
}

impl CostModel {
    pub fn of(spec: &ModelSpec) -> Self {
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let block = 2 * spec.hidden * q + 2 * spec.hidden * kv + 3 * spec.hidden * spec.intermediate;
        CostModel {
            token: (spec.layers * block) as u64,
            // Half of the square is masked; scores and values are one product each.
            pair: (spec.layers * q) as u64,
            target: (spec.vocab * spec.hidden) as u64,
        }
    }

    /// Cost of one document; never 0, so that dealing leaves no bin empty.
    pub fn document(&self, tokens: u32, targets: u32) -> u64 {
        let (tokens, targets) = (u64::from(tokens), u64::from(targets));
        (tokens * self.token + tokens * tokens * self.pair + targets * self.target).max(1)
    }
}
