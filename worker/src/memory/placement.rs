//! What of the training state lies on a GPU, beside the parameters and activations that must: whatever fits, in the order of
//! what it saves. No choice changes a bit.

/// Where sums of gradients, masters and moments are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Placement {
    /// All on the host.
    Host,
    /// Leaves are added on the GPU; the sums come to the host once a step.
    Sums,
    /// The state lives there too, and the update moves nothing.
    State,
}

impl Placement {
    /// What fits into `left` bytes of the GPU. Where `state` is none the GPU cannot update it.
    pub fn within(left: u64, sums: u64, state: Option<u64>) -> Self {
        match state {
            Some(state) if sums + state <= left => Placement::State,
            _ if sums <= left => Placement::Sums,
            _ => Placement::Host,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_saves_most_comes_first_where_it_fits() {
        assert_eq!(Placement::within(18, 8, Some(10)), Placement::State);
        assert_eq!(Placement::within(17, 8, Some(10)), Placement::Sums);
        assert_eq!(Placement::within(1 << 40, 8, None), Placement::Sums);
        assert_eq!(Placement::within(7, 8, Some(0)), Placement::Host);
    }
}
