//! What to change where a plan does not fit: the cheapest change that really would.

use super::order::Range;
use super::{Bytes, Demand, Extremes, Limits, Plan, MOST_TOKENS, QUANTUM};
use crate::model;
use crate::optim::state::Form;

/// For `workers` on this machine that have `each` so much, where the smallest plan is `least`. Leaving more on the host costs
/// speed and no bit, computing again a little speed and no bit, sharding too; shorter micro-batches change how rows are packed, fewer workers cost time, a
/// narrower state precision, shorter rows data, another model everything.
pub(super) fn remedy(demand: &Demand<'_>, each: Limits, workers: usize, least: &Plan) -> Result<String, model::Error> {
    let fits = |demand: &Demand<'_>, each: Limits| Ok::<_, model::Error>(each.hold(&demand.best(each)?));
    let other = || match least.gpu.total() > each.gpu {
        true => format!("use a smaller model or a GPU with {} free", Bytes(least.gpu.total())),
        false => format!("use a smaller model or a machine with {} of memory", Bytes(least.total() * workers as u64)),
    };
    if !demand.trains {
        return Ok(match demand.positions {
            0 => other(),
            _ => format!("generate fewer tokens (--max-new-tokens), or {}", other()),
        });
    }
    let less = Demand { range: Range { offload: None, ..demand.range }, ..*demand };
    if demand.range.gpu && demand.range.offload.is_some() && fits(&less, each)? {
        return Ok("set cluster.offload = \"auto\"".into());
    }
    let range = Range { recompute: None, offload: None, ..demand.range };
    let less = Demand { range, ..*demand };
    if demand.range.recompute.is_some() && fits(&less, each)? {
        return Ok("set cluster.recompute = \"auto\"".into());
    }
    let less = Demand { range: Range { stage: None, ..range }, ..*demand };
    if demand.range.stage.is_some() && fits(&less, each)? {
        return Ok("set cluster.zero_stage = \"auto\"".into());
    }
    let shortest = shorter(&less, each)?;
    if shortest > 0 && shortest >= demand.extremes.document {
        return Ok(format!("set train.max_tokens_per_micro_batch = {shortest}"));
    }
    for remaining in (1..workers).rev() {
        let world = demand.range.world.saturating_sub(workers - remaining).max(1);
        let layout = demand.sketch.layout();
        let shard = |rank| layout.shard_elements(rank, world).iter().map(|own| own.len()).sum();
        let owned = (0..world).map(shard).max().unwrap_or(0);
        let fewer = Demand { owned, range: Range { world, ..less.range }, ..less };
        if fits(&fewer, Limits { host: each.host * workers as u64 / remaining as u64, ..each })? {
            return Ok(format!("use fewer workers on this machine (cluster.workers = {remaining})"));
        }
    }
    if demand.form == Form::Split && fits(&Demand { form: Form::Narrow, ..less }, each)? {
        return Ok("set train.optimizer_state = \"bf16\"".into());
    }
    if shortest > 0 {
        return Ok(format!("set train.max_length and train.max_tokens_per_micro_batch to {shortest}"));
    }
    Ok(other())
}

/// The most tokens that a micro-batch may have to fit; 0: none fits.
fn shorter(demand: &Demand<'_>, each: Limits) -> Result<usize, model::Error> {
    let (mut fitting, mut beyond) = (0, demand.extremes.tokens.min(MOST_TOKENS).div_ceil(QUANTUM));
    while beyond - fitting > 1 {
        let middle = fitting.midpoint(beyond);
        let tokens = middle * QUANTUM;
        let document = demand.extremes.document.min(tokens);
        let shorter = Demand { extremes: Extremes { tokens, document, ..demand.extremes }, ..*demand };
        match each.hold(&shorter.best(each)?) {
            true => fitting = middle,
            false => beyond = middle,
        }
    }
    Ok(fitting * QUANTUM)
}
