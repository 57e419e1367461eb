//! A memory plan to be shown: what it is for, line by line, and whether it fits.

use super::{Available, Error, Plan};
use serde::Serialize;

/// One purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Item {
    pub name: &'static str,
    /// Of the host.
    pub bytes: u64,
    /// Of the worker's GPU.
    pub gpu_bytes: u64,
    /// What that is.
    pub what: &'static str,
}

/// A plan as others read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Table {
    pub fits: bool,
    /// On this machine.
    pub workers: usize,
    /// For all of them.
    pub available_bytes: u64,
    /// Who leaves so much.
    pub available_source: String,
    /// A value of cluster.zero_stage.
    pub zero_stage: u32,
    /// Micro-batches that go through the model together.
    pub together: usize,
    /// What the backward pass computes again: a value of cluster.recompute.
    pub recompute: &'static str,
    /// What of the training state lies on the host beside a GPU: a value of cluster.offload; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offload: Option<&'static str>,
    /// What the GPU has free for each worker; absent where it is not known here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_available_bytes: Option<u64>,
    /// Of one worker, as is the total.
    pub items: Vec<Item>,
    pub total_bytes: u64,
    pub gpu_total_bytes: u64,
    /// The cheapest change that would fit, where this does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Table {
    /// Of what [`super::Demand::plan`] answered. Other errors than that it does not fit come back.
    pub fn of(
        answer: Result<Plan, Error>,
        available: &Available,
        workers: usize,
        gpu: Option<u64>,
    ) -> Result<Self, Error> {
        let (plan, remedy) = match answer {
            Ok(plan) => (plan, None),
            Err(Error::TooLittle { plan, remedy, .. }) => (*plan, Some(remedy)),
            Err(other) => return Err(other),
        };
        Ok(Table {
            fits: remedy.is_none(),
            workers,
            available_bytes: available.bytes,
            available_source: available.source.clone(),
            zero_stage: plan.choice.stage as u32,
            together: plan.choice.wave,
            recompute: plan.choice.recompute.key(),
            offload: gpu.map(|_| plan.choice.offload.key()),
            gpu_available_bytes: gpu.filter(|&bytes| bytes < u64::MAX),
            total_bytes: plan.total(),
            gpu_total_bytes: plan.gpu.total(),
            items: plan.items().into(),
            remedy,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::gpu::OnGpu;
    use crate::memory::order::Choice;
    use crate::memory::placement::Offload;
    use crate::model::Recompute;
    use crate::optim::reduction::Stage;

    fn plan() -> Plan {
        Plan {
            baseline: 1,
            parameters: 2,
            sums: 4,
            gradient: 256,
            masters: 8,
            moments: 16,
            copy: 32,
            snapshots: 64,
            activations: 128,
            cache: 512,
            communication: 1024,
            kernels: 2048,
            gpu: OnGpu {
                program: 1,
                parameters: 2,
                sums: 4,
                gradient: 8,
                masters: 16,
                moments: 32,
                staging: 64,
                activations: 128,
                communication: 256,
            },
            choice: Choice { stage: Stage::Two, wave: 3, recompute: Recompute::UpProjection, offload: Offload::State },
        }
    }

    #[test]
    fn every_byte_has_a_line_and_what_does_not_fit_a_remedy() {
        let available = Available { bytes: 5000, source: "the machine".into() };
        let table = Table::of(Ok(plan()), &available, 1, Some(600)).unwrap();
        assert_eq!((table.gpu_total_bytes, table.items.iter().map(|item| item.gpu_bytes).sum::<u64>()), (511, 511));
        assert_eq!((table.gpu_available_bytes, table.offload), (Some(600), Some("state")));
        assert_eq!((table.total_bytes, table.items.iter().map(|item| item.bytes).sum::<u64>()), (4095, 4095));
        assert!(table.fits && table.remedy.is_none());
        let plan = Box::new(plan());
        let refused =
            Error::TooLittle { plan, workers: 2, available: available.clone(), gpu: None, remedy: "use less".into() };
        let table = Table::of(Err(refused), &available, 2, None).unwrap();
        assert_eq!((table.zero_stage, table.together), (2, 3));
        assert_eq!((table.fits, table.recompute, table.remedy.as_deref()), (false, "up-projection", Some("use less")));
        assert!(Table::of(Err(Error::Beyond), &available, 1, None).is_err());
    }
}
