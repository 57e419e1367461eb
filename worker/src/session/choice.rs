//! What is settled before a worker loads anything: what the coordinator asks for, what fits, and what all ranks agree on.

use super::{link, prospect, Error};
use crate::collective::courier::Courier;
use crate::collective::nccl::{self, Nccl};
use crate::collective::tcp::{Membership, Mesh};
use crate::collective::Collective;
use crate::device;
use crate::engine::{self, Engine};
use crate::memory::placement::Offload;
use crate::memory::{Demand, Plan};
use crate::model::{Fault, Recompute};
use crate::optim::reduction::Stage;
use crate::optim::state::Form;
use tch::{Device, Kind, Tensor};
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

/// What the coordinator asks to be left on the host; none: what must.
pub(super) fn offload(asked: wire::Offload) -> Option<Offload> {
    match asked {
        wire::Offload::Auto => None,
        wire::Offload::Nothing => Some(Offload::Nothing),
        wire::Offload::Masters => Some(Offload::Masters),
        wire::Offload::Moments => Some(Offload::Moments),
        wire::Offload::State => Some(Offload::State),
        wire::Offload::All => Some(Offload::All),
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

/// What this generation's exchanges go over, once the ranks have met.
pub(super) fn transport(
    asked: wire::Transport,
    mut mesh: Mesh,
    membership: &Membership,
    device: Device,
) -> Result<Box<dyn Collective + Send>, Error> {
    if mesh.world() == 1 || asked == wire::Transport::Tcp || (asked, device) == (wire::Transport::Auto, Device::Cpu) {
        return Ok(Box::new(mesh));
    }
    if device == Device::Cpu {
        let sentence = "cluster.transport = \"nccl\" needs cluster.device = \"cuda\"";
        return Err(Error::Unsupported(sentence.into()));
    }
    let all = mesh.all_gather_bytes(&device::identity(device)?)?;
    match (shared(&all), asked) {
        (Some((first, second)), wire::Transport::Auto) => {
            tracing::warn!(first, second, "these ranks share a GPU: sums and parameters travel over TCP");
            return Ok(Box::new(mesh));
        }
        // Whoever names hosts apart lets NCCL take them for such.
        (Some((first, second)), _) if std::env::var_os("NCCL_HOSTID").is_none() => {
            let sentence = format!(
                "cluster.transport = \"nccl\", but ranks {first} and {second} share a GPU, which NCCL refuses: use as many \
                 workers as GPUs, or set cluster.transport = \"auto\""
            );
            return Err(Error::Unsupported(sentence));
        }
        _ => {}
    }
    let nccl = Nccl::meet(mesh, membership, &nccl::Libraries::open(device)?)?;
    tracing::info!(rank = membership.rank, "exchanges go over NCCL");
    Ok(Box::new(nccl))
}

/// The first two ranks of one GPU.
fn shared(gpus: &[Vec<u8>]) -> Option<(usize, usize)> {
    let first = |second: usize| gpus[..second].iter().position(|gpu| *gpu == gpus[second]);
    (0..gpus.len()).find_map(|second| Some((first(second)?, second)))
}

/// Plans as `plan` does, and again as whoever has least memory must: all ranks run a step in the same way.
pub(super) fn agree(
    courier: &mut Courier,
    mut demand: Demand<'_>,
    plan: impl Fn(&Demand<'_>) -> Result<Plan, Error>,
) -> Result<Plan, Error> {
    let own = plan(&demand)?;
    let mine = [own.choice.stage as u8 as u32, own.choice.wave as u32].map(u32::to_le_bytes).concat();
    let all = courier.send(move |peers: &mut dyn Collective| peers.all_gather_bytes(&mine)).wait()?;
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
    let room = (plan.activations_there() as usize).saturating_sub(alone) as i64;
    let beside = Tensor::f_full([room], 1, (Kind::Uint8, engine.model.device()));
    let beside = beside.map_err(|error| failed(error.into()))?;
    // Others' parameters may be absent here, and gradients without them of any size: they are all zero times as large.
    engine.rehearse(vec![batch], assign.trains, 0.0)?;
    drop(beside);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_share_a_gpu_are_named() {
        let of = |gpus: &[u8]| shared(&gpus.iter().map(|gpu| vec![*gpu; 16]).collect::<Vec<_>>());
        assert_eq!((of(&[1, 2, 3]), of(&[1, 2, 3, 2, 1]), of(&[4])), (None, Some((1, 3)), None));
    }
}
