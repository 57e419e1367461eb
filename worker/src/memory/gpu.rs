//! What a worker needs of its GPU's memory.

use super::order::Choice;
use super::{lending, Bytes, Demand};
use crate::optim::away::PIECE;
use crate::optim::reduction::Stage;
use std::fmt;

/// By purpose, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OnGpu {
    /// Beyond what is taken when the device is opened: cuBLAS and its workspaces, kernels as they are loaded, what the allocator
    /// rounds up.
    pub program: u64,
    pub parameters: u64,
    pub sums: u64,
    pub gradient: u64,
    pub masters: u64,
    pub moments: u64,
    /// Where pieces of what lies on the host come to be updated.
    pub staging: u64,
    pub activations: u64,
    pub communication: u64,
}

/// Nobody has measured it yet.
const PROGRAM: u64 = 3 << 29;
/// NCCL's channels, and what is staged through the device where sums lie on the host.
const COMMUNICATION: u64 = 1 << 29;

impl OnGpu {
    pub fn total(&self) -> u64 {
        let OnGpu { program, parameters, sums, gradient, masters, moments, staging, activations, communication } = self;
        program + parameters + sums + gradient + masters + moments + staging + activations + communication
    }
}

impl fmt::Display for OnGpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "parameters {}, gradient sums {}, gradient {}, optimizer {}, activations {}",
            Bytes(self.parameters),
            Bytes(self.sums),
            Bytes(self.gradient),
            Bytes(self.masters + self.moments + self.staging),
            Bytes(self.activations)
        )
    }
}

impl Demand<'_> {
    /// What of parameters, sums and gradient of `all`, and of the state, is on the GPU; activations are not known yet.
    pub(super) fn on_gpu(&self, choice: Choice, all: OnGpu) -> OnGpu {
        let (offload, form) = (choice.offload, self.form);
        let communication = if self.range.world > 1 { COMMUNICATION } else { 0 };
        // Sharded parameters are the host's where the host updates them.
        let lots = || lending::lots(self.sketch.layout(), 2).iter().map(|(_, elements)| elements).sum::<usize>();
        let lent = (lots() * self.sketch.compute().elt_size_in_bytes()) as u64;
        if !offload.leaves_sums() || !self.trains {
            let parameters = if choice.stage == Stage::Three { lent } else { all.parameters };
            return OnGpu { program: PROGRAM, parameters, communication, ..OnGpu::default() };
        }
        let of = |leaves: bool, width: usize, elements: usize| if leaves { (width * elements) as u64 } else { 0 };
        let (masters, moments) = (offload.leaves_masters(), offload.leaves_moments());
        let layout = self.sketch.layout();
        let longest = layout.buckets.iter().map(|bucket| bucket.elements).max().unwrap_or(0).min(PIECE);
        // One piece is updated while the next one comes.
        let staging = 2 * (of(!masters, form.master_width(), longest) + of(!moments, form.moments_width(), longest));
        let (masters, moments) =
            (of(masters, form.master_width(), self.owned), of(moments, form.moments_width(), self.owned));
        OnGpu { program: PROGRAM, masters, moments, staging, communication, ..all }
    }
}
