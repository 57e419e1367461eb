//! What is planned, what is refused, and with which words.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use unisono_configs::model::{ModelSpec, CHUNK};

fn sketch() -> Model {
    sketch_in(tch::Kind::BFloat16)
}

fn sketch_in(kind: tch::Kind) -> Model {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 512, "rope_theta": 10000.0
    });
    let spec = ModelSpec::from_json(&config, std::path::Path::new("config.json")).unwrap();
    Model::sketch(spec, kind).unwrap()
}

fn demand(sketch: &Model) -> Demand<'_> {
    let (stage, wave, recompute) = (Some(Stage::One), None, Some(Recompute::Nothing));
    let (offload, gpu, tokens, state) = (None, false, 8 * 4096, (2, 8));
    let range = Range { stage, wave, recompute, offload, micro_batches: 8, tokens, world: 2, gpu, state };
    let (owned, form, trains, copies, snapshots, images) = (100_000, Form::Split, true, false, false, 0);
    let positions = 0;
    let (extremes, baseline) = (Extremes { tokens: 4096, document: 256, documents: 16 }, 1000);
    Demand {
        sketch,
        owned,
        form,
        extremes,
        sizes: &[],
        trains,
        range,
        copies,
        snapshots,
        positions,
        images,
        baseline,
        gpu: None,
    }
}

fn at(recompute: Recompute) -> Choice {
    Choice { stage: Stage::One, wave: 1, recompute, offload: Offload::All }
}

/// Any level may be chosen.
fn free(demand: Demand<'_>) -> Demand<'_> {
    Demand { range: Range { recompute: None, ..demand.range }, ..demand }
}

fn left(bytes: u64) -> Available {
    Available { bytes, source: "the cgroup".into() }
}

#[test]
fn a_plan_that_fits_passes_and_one_byte_less_does_not() {
    let sketch = sketch();
    let demand = demand(&sketch);
    let plan = demand.at(at(Recompute::Nothing)).unwrap();
    for workers in [1, 2] {
        let total = plan.total() * workers;
        assert_eq!(demand.plan(&left(total), workers as usize).unwrap(), plan);
        assert!(demand.plan(&left(total - 1), workers as usize).is_err());
    }
    // The copy is made where there is room, and is no reason to refuse or to compute anything again.
    let copies = Demand { copies: true, ..demand };
    let copy = |bytes| copies.plan(&left(bytes), 1).unwrap().copy;
    let whole = plan.total() + 1_200_000;
    assert_eq!((copy(whole - 1), copy(whole)), (0, 1_200_000));
    // So are snapshots, after that.
    let held = Demand { snapshots: true, ..copies };
    let snapshots = |bytes| held.plan(&left(bytes), 1).unwrap().snapshots;
    let all = 4 * 1_200_000 + SNAPSHOT_HEADERS;
    assert_eq!((snapshots(whole + all - 1), snapshots(whole + all)), (0, all));
    // Where the state comes from snapshots of another cut, these stay until the new ones are whole.
    let shard = 1_200_000;
    let loaded = Demand { images: 3 * shard, ..held };
    let snapshots = |bytes| loaded.plan(&left(bytes), 1).unwrap().snapshots;
    assert_eq!((snapshots(whole + all), snapshots(whole + all + shard)), (0, all + shard));
    assert_eq!(plan.loading(7), plan.total() - plan.activations + 7);
    let parameters = sketch.layout().parameters() as u64;
    assert_eq!(
        (plan.parameters, plan.sums, plan.masters, plan.moments),
        (2 * parameters, 8 * parameters, 200_000, 800_000)
    );
    let idle = Demand { trains: false, ..demand }.plan(&left(1 << 40), 1).unwrap();
    assert_eq!((idle.sums, idle.masters, idle.moments), (0, 0, 0));
    assert!(idle.activations < plan.activations);
}

#[test]
fn more_is_sharded_and_fewer_go_together_before_a_run_is_refused() {
    let sketch = sketch();
    let fixed = demand(&sketch);
    let any = Demand { range: Range { stage: None, recompute: None, ..fixed.range }, ..fixed };
    let parameters = sketch.layout().parameters() as u64;
    let mut bytes = u64::MAX / 4;
    let mut seen = Vec::new();
    // Ever less memory, until nothing fits.
    while let Ok(plan) = any.plan(&left(bytes), 1) {
        let Choice { stage, wave, .. } = plan.choice;
        let (sums, present) = if stage == Stage::One { (8, 2) } else { (0, if stage == Stage::Two { 2 } else { 0 }) };
        assert!(plan.sums >= sums * parameters && plan.parameters >= present * parameters, "{plan}");
        let kept = match (stage, wave) {
            (Stage::One, _) => 0,
            (_, 8) => 4 * 100_000,
            _ => 8 * 100_000,
        };
        assert_eq!(plan.gradient, kept);
        seen.push(plan.choice);
        bytes = plan.total() - 1;
    }
    assert_eq!(seen.last().unwrap().recompute, Recompute::Block);
    assert!(seen.iter().any(|c| c.stage == Stage::Two) && seen.last().unwrap().stage == Stage::Three, "{seen:?}");
    let remedy = fixed.plan(&left(bytes + 1), 1).unwrap_err().to_string();
    assert!(remedy.contains("set cluster.recompute") || remedy.contains("set cluster.zero_stage"), "{remedy}");
}

#[test]
fn what_does_not_fit_is_computed_again() {
    let sketch = sketch();
    let demand = free(demand(&sketch));
    for level in Recompute::ALL {
        let exact = demand.at(at(level)).unwrap();
        assert_eq!(demand.plan(&left(exact.total()), 1).unwrap(), exact);
    }
    assert!(demand.plan(&left(demand.at(at(Recompute::Block)).unwrap().total() - 1), 1).is_err());
}

#[test]
fn the_remedy_is_enough_and_the_cheapest() {
    let sketch = sketch();
    let fixed = demand(&sketch);
    let sentence = |demand: &Demand<'_>, bytes, workers| demand.plan(&left(bytes), workers).unwrap_err().to_string();
    let less = fixed.at(at(Recompute::UpProjection)).unwrap().total();
    assert!(sentence(&fixed, less, 1).contains("set cluster.recompute = \"auto\""));
    let demand = free(fixed);
    let total = |tokens: usize| {
        let document = demand.extremes.document.min(tokens);
        let extremes = Extremes { tokens, document, ..demand.extremes };
        Demand { extremes, ..demand }.at(at(Recompute::Block)).unwrap().total()
    };
    assert!(sentence(&demand, total(1024), 1).contains("set train.max_tokens_per_micro_batch = 1024"));
    assert!(sentence(&demand, 2 * total(1024), 2).contains("set train.max_tokens_per_micro_batch = 1024"));
    assert!(sentence(&demand, total(128), 1).contains("train.max_length and train.max_tokens_per_micro_batch to 128"));
    // In fp32 no kernels are compiled, and what a worker needs whatever the tokens counts for more.
    let wide = sketch_in(tch::Kind::Float);
    let few = |tokens| Extremes { tokens, document: tokens, documents: 1 };
    let two = Demand { sketch: &wide, form: Form::Whole, extremes: few(256), ..demand };
    let least = Demand { extremes: few(64), ..two }.at(at(Recompute::Block)).unwrap().total();
    assert!(sentence(&two, 2 * (least * 9 / 10), 2).contains("cluster.workers = 1"));
    assert!(sentence(&demand, 2_000, 1).contains("smaller model"));
}

/// Lengths of the documents of a batch.
fn lengths(batch: &Batch) -> Vec<usize> {
    let ends = batch.starts[1..].iter().map(|&start| start as usize).chain([batch.tokens.len()]);
    ends.zip(&batch.starts).map(|(end, &start)| end - start as usize).collect()
}

proptest! {
    #[test]
    fn no_batch_is_larger_than_the_extreme_one(batches in vec(vec(1usize..300, 1..30), 1..4)) {
        let sum = |lengths: &Vec<usize>| lengths.iter().sum();
        let extremes = Extremes {
            tokens: batches.iter().map(sum).max().unwrap(),
            document: *batches.iter().flatten().max().unwrap(),
            documents: batches.iter().map(Vec::len).max().unwrap(),
        };
        let batch = extremes.batch(10).unwrap();
        let found = lengths(&batch);
        prop_assert_eq!((batch.tokens.len(), found.iter().max()), (extremes.tokens, Some(&extremes.document)));
        prop_assert_eq!(batch.targets.iter().filter(|t| **t == NO_TARGET).count(), found.len());
        let padded = |lengths: &[usize]| lengths.iter().map(|l| l.next_multiple_of(LENGTH)).sum::<usize>();
        for lengths in &batches {
            prop_assert!(padded(lengths) <= padded(&found) + 2 * LENGTH, "{lengths:?} {found:?}");
        }
    }
}

#[test]
fn the_extreme_batch_is_packed_full() {
    let batch = Extremes { tokens: 10, document: 4, documents: 0 }.batch(7).unwrap();
    assert_eq!(batch.tokens, [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]);
    assert_eq!(batch.starts, [0, 4, 8]);
    let n = NO_TARGET;
    assert_eq!(batch.targets, [1, 2, 3, n, 5, 6, 0, n, 2, n]);
    assert_eq!(Extremes { tokens: 0, document: 0, documents: 0 }.batch(7), None);
    assert_eq!(lengths(&Extremes { tokens: 100, document: 40, documents: 5 }.batch(7).unwrap()), [40, 40, 18, 1, 1]);
}

#[test]
fn bytes_read_well() {
    let shown: Vec<_> = [999, 2_400_000, 5_210_000_000].map(|b| Bytes(b).to_string()).into();
    assert_eq!(shown, ["999 B", "2 MB", "5.21 GB"]);
}

/// Shapes that people know.
fn known(
    layers: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv: usize,
    vocab: usize,
    tied: bool,
) -> Model {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": tied
    });
    let spec = ModelSpec::from_json(&config, std::path::Path::new("config.json")).unwrap();
    Model::sketch(spec, tch::Kind::BFloat16).unwrap().as_on_gpu()
}

/// One worker on a GPU that has so much free, with 8 micro-batches of 8,192 tokens of documents of 1,024.
fn on_gpu(sketch: &Model, gpu: u64, form: Form) -> Demand<'_> {
    let (micro_batches, tokens) = (8, 8 * 8192);
    let state = (form.master_width(), form.moments_width());
    let demand = demand(sketch);
    Demand {
        owned: sketch.layout().parameters(),
        form,
        extremes: Extremes { tokens: 8192, document: 1024, documents: 8 },
        range: Range {
            stage: None,
            recompute: None,
            micro_batches,
            tokens,
            world: 1,
            gpu: true,
            state,
            ..demand.range
        },
        gpu: Some(gpu),
        ..demand
    }
}

const H200: u64 = 139 << 30;

/// For docs/gpu.md, with `--nocapture`.
fn tell(model: &str, plan: &Plan) {
    println!("{model}: {:.1} GB planned on the GPU; offload: {:?}", plan.gpu.total() as f64 / 1e9, plan.choice.offload);
}

#[test]
fn eight_billion_parameters_with_exact_state_fit_one_gpu() {
    let sketch = known(32, 4096, 14336, 32, 8, 128_256, false);
    let parameters = sketch.layout().parameters() as u64;
    assert!(parameters.abs_diff(8_030_261_248) < 32 * CHUNK as u64, "{parameters}");
    let plan = on_gpu(&sketch, H200, Form::Split).plan(&left(128 << 30), 1).unwrap();
    // Parameters and activations are on the GPU; the state is not, or not all of it: that would be 14 GB more than there is.
    assert_eq!((plan.gpu.parameters, plan.masters + plan.moments), (2 * parameters, 10 * parameters));
    assert!(plan.gpu.total() <= H200 && plan.gpu.activations > 1 << 30, "{plan}");
    assert!(plan.choice.offload.leaves_sums() && plan.choice.offload != Offload::Nothing, "{plan}");
    assert_eq!(plan.sums + plan.gradient, 0, "nothing is summed on the host");
    tell("Llama-3.1-8B", &plan);
    // With 8 bytes for each parameter in all there is room for everything, at the cost of computing more again.
    let narrow = on_gpu(&sketch, H200, Form::Narrow);
    let range = Range { offload: Some(Offload::Nothing), ..narrow.range };
    let narrow = Demand { range, ..narrow }.plan(&left(128 << 30), 1).unwrap();
    assert_eq!((narrow.gpu.moments, narrow.gpu.staging), (4 * parameters, 0), "{narrow}");
    // On a smaller GPU everything that may be left is left; then it is refused, with what would do.
    let error = on_gpu(&sketch, 16 << 30, Form::Split).plan(&left(1 << 40), 1).unwrap_err().to_string();
    assert!(error.contains("of each worker's GPU") && error.contains("GPU with"), "{error}");
    let asked = on_gpu(&sketch, H200, Form::Split);
    let asked =
        Demand { range: Range { offload: Some(Offload::Nothing), stage: Some(Stage::One), ..asked.range }, ..asked };
    let error = asked.plan(&left(128 << 30), 1).unwrap_err().to_string();
    assert!(error.ends_with("set cluster.offload = \"auto\""), "{error}");
}

#[test]
fn smaller_models_lie_on_the_gpu_with_all_they_have() {
    let half = ("Qwen2.5-0.5B", known(24, 896, 4864, 14, 2, 151_936, true), 80);
    let one = ("Qwen2.5-1.5B", known(28, 1536, 8960, 12, 2, 151_936, true), 130);
    for (name, sketch, most) in [half, one] {
        let plan = on_gpu(&sketch, H200, Form::Split).plan(&left(64 << 30), 1).unwrap();
        assert_eq!((plan.choice.offload, plan.choice.recompute), (Offload::Nothing, Recompute::Nothing), "{plan}");
        assert!(plan.gpu.total() < most << 30, "{plan}");
        let parameters = sketch.layout().parameters() as u64;
        assert_eq!((plan.gpu.masters, plan.gpu.moments), (2 * parameters, 8 * parameters));
        tell(name, &plan);
    }
}
