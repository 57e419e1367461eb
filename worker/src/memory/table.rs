//! A memory plan to be shown: what it is for, line by line, and whether it fits.

use super::{Available, Error, Plan};
use serde::Serialize;

/// One purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Item {
    pub name: &'static str,
    pub bytes: u64,
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
    /// Of one worker, as is the total.
    pub items: Vec<Item>,
    pub total_bytes: u64,
    /// The cheapest change that would fit, where this does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Table {
    /// Of what [`super::Demand::plan`] answered. Other errors than that it does not fit come back.
    pub fn of(answer: Result<Plan, Error>, available: &Available, workers: usize) -> Result<Self, Error> {
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
            total_bytes: plan.total(),
            items: plan.items().into(),
            remedy,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::order::Choice;
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
            choice: Choice { stage: Stage::Two, wave: 3, recompute: Recompute::UpProjection },
        }
    }

    #[test]
    fn every_byte_has_a_line_and_what_does_not_fit_a_remedy() {
        let available = Available { bytes: 5000, source: "the machine".into() };
        let table = Table::of(Ok(plan()), &available, 1).unwrap();
        assert_eq!((table.total_bytes, table.items.iter().map(|item| item.bytes).sum::<u64>()), (4095, 4095));
        assert!(table.fits && table.remedy.is_none());
        let plan = Box::new(plan());
        let refused = Error::TooLittle { plan, workers: 2, available: available.clone(), remedy: "use less".into() };
        let table = Table::of(Err(refused), &available, 2).unwrap();
        assert_eq!((table.zero_stage, table.together), (2, 3));
        assert_eq!((table.fits, table.recompute, table.remedy.as_deref()), (false, "up-projection", Some("use less")));
        assert!(Table::of(Err(Error::Beyond), &available, 1).is_err());
    }
}
