//! What is settled before a worker loads anything: what the coordinator asks for, what fits, and what all ranks agree on.

use super::{link, prospect, Error};
use crate::collective::Collective;
use crate::engine::{self, Engine};
use crate::memory::{Demand, Plan};
use crate::model::{Fault, Recompute};
use crate::optim::reduction::Stage;
use crate::optim::state::Form;
use tch::Kind;
use unisono_proto::v1::{self as wire, Assign};

/// How the state is kept beside parameters of a kind.
pub(super) fn form(asked: wire::OptimizerState, compute: Kind) -> Result<Form, Error> {
    match (asked, compute) {
        (wire::OptimizerState::Fp32, Kind::Float) => Ok(Form::Whole),
        (wire::OptimizerState::Fp32, _) => Ok(Form::Split),
        (wire::OptimizerState::Bf16, Kind::BFloat16) => Ok(Form::Narrow),
        (wire::OptimizerState::Bf16, _) => {
            let sentence = "train.optimizer_state = \"bf16\" needs model.compute = \"bf16\"";
            Err(Error::Unsupported(sentence.into()))
        }
    }
}

/// The level that the coordinator asks for; none: what fits.
pub(super) fn recompute(asked: wire::Recompute) -> Option<Recompute> {
    match asked {
        wire::Recompute::Auto => None,
        wire::Recompute::Nothing => Some(Recompute::Nothing),
        wire::Recompute::Norms => Some(Recompute::Norms),
        wire::Recompute::UpProjection => Some(Recompute::UpProjection),
        wire::Recompute::Block => Some(Recompute::Block),
    }
}

/// The stage that the coordinator asks for; none: what fits.
pub(super) fn stage(asked: u32) -> Result<Option<Stage>, Error> {
    match asked {
        0 => Ok(None),
        1 => Ok(Some(Stage::One)),
        2 => Ok(Some(Stage::Two)),
        3 => Ok(Some(Stage::Three)),
        stage => Err(link::Error::Protocol(format!("assigned ZeRO stage {stage}")).into()),
    }
}

/// Plans as `plan` does, and again as whoever has least memory must: all ranks run a step in the same way.
pub(super) fn agree(
    peers: &mut dyn Collective,
    mut demand: Demand<'_>,
    plan: impl Fn(&Demand<'_>) -> Result<Plan, Error>,
) -> Result<Plan, Error> {
    let own = plan(&demand)?;
    let mine = [own.choice.stage as u8 as u32, own.choice.wave as u32].map(u32::to_le_bytes).concat();
    let all = peers.all_gather_bytes(&mine)?;
    let said = |at: usize| {
        let numbers = all.iter().map(move |bytes| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes));
        numbers.collect::<Option<Vec<u32>>>().ok_or_else(|| Error::Unsupported("a peer sent no plan".into()))
    };
    let (stages, waves) = (said(0)?, said(4)?);
    let most = stages.iter().copied().max().unwrap_or(0);
    // Whoever planned another stage said nothing of its wave in this one.
    let least = stages.iter().zip(waves).filter(|(stage, _)| **stage == most).map(|(_, wave)| wave).min();
    demand.range.stage = stage(most)?;
    demand.range.wave = least.map(|wave| wave as usize);
    match (demand.range.stage, demand.range.wave) == (Some(own.choice.stage), Some(own.choice.wave)) {
        true => Ok(own),
        false => plan(&demand),
    }
}

/// Really runs the largest micro-batch of the plan, with a target everywhere and beside the memory of those that go with
/// it, and forgets its gradients: what does not fit fails here and not in the middle of the night.
pub(super) fn try_worst(assign: &Assign, engine: &mut Engine, plan: &Plan) -> Result<(), engine::Error> {
    let batch = prospect::extremes(assign).batch(engine.model.spec().vocab);
    let Some(batch) = batch else { return Ok(()) };
    let failed = |source| engine::Error::Micro(Fault { index: 0, source });
    let alone =
        engine.model.dry_run(std::slice::from_ref(&batch), plan.choice.recompute, assign.trains).map_err(failed)?;
    let beside = std::hint::black_box(vec![1u8; (plan.activations as usize).saturating_sub(alone)]);
    // Others' parameters may be absent here, and gradients without them of any size: they are all zero times as large.
    engine.rehearse(vec![batch], assign.trains, 0.0)?;
    drop(beside);
    Ok(())
}
