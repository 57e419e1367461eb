//! What of the training state lies in host memory where a worker computes on a GPU. Parameters and activations are always on
//! the GPU; of the rest it takes what fits. No choice changes a bit.

/// What was left on the host: each more than the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Offload {
    Nothing,
    /// What parameters lack of their masters.
    Masters,
    /// AdamW's moments.
    Moments,
    /// Both.
    State,
    /// Sums of gradients too, and the host updates: all there is without a GPU.
    All,
}

impl Offload {
    pub const EVERY: [Offload; 5] =
        [Offload::Nothing, Offload::Masters, Offload::Moments, Offload::State, Offload::All];

    /// A value of cluster.offload.
    pub fn key(self) -> &'static str {
        match self {
            Offload::Nothing => "nothing",
            Offload::Masters => "masters",
            Offload::Moments => "moments",
            Offload::State => "state",
            Offload::All => "all",
        }
    }

    /// Whether sums are on the GPU.
    pub fn leaves_sums(self) -> bool {
        self != Offload::All
    }

    pub fn leaves_masters(self) -> bool {
        matches!(self, Offload::Nothing | Offload::Moments)
    }

    pub fn leaves_moments(self) -> bool {
        matches!(self, Offload::Nothing | Offload::Masters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_is_left_on_the_host_from_one_to_the_next() {
        let left = Offload::EVERY.map(|o| [o.leaves_masters(), o.leaves_moments(), o.leaves_sums()].map(u32::from));
        // Bytes on the GPU: 2 of masters, 8 of moments and of sums each.
        let bytes = left.map(|[masters, moments, sums]| 2 * masters + 8 * moments + 8 * sums);
        assert_eq!(bytes, [18, 16, 10, 8, 0]);
    }
}
