//! Whole sessions on a small model against a coordinator that follows a script: any number of workers, one result.

use super::*;
use crate::collective::tcp;
use crate::link::fake::{Attendant, Fake};
use crate::model::Batch;
use safetensors::tensor::{serialize_to_file, Dtype, TensorView};
use safetensors::SafeTensors;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use unisono_configs::model::Layout;
use unisono_configs::model::ModelSpec;
use unisono_proto::v1::coordinator_message::Body as Told;
use unisono_proto::v1::{
    BatchKey, Checkpoint, Compute, Evaluate, EvaluateReport, Finish, Generate, GenerateReport, Go, Join, MemoryReport,
    ModelSource, Optimizer as OptimizerSettings, Step, Suite,
};
use unisono_proto::NO_TARGET;

const MICRO_BATCHES: u32 = 4;
const STEPS: u64 = 3;

fn noise(seed: u64, i: u64) -> f32 {
    let x = (seed * 1_000_003 + i).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((x >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 2.0
}

/// A model directory with random weights; `change` may spoil its config.
fn model_directory(dir: &Path, change: impl Fn(&mut serde_json::Value)) {
    let mut config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 384, "hidden_size": 256,
        "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 512,
        "tie_word_embeddings": true, "torch_dtype": "float32"
    });
    let spec = ModelSpec::from_json(&config, Path::new("config.json")).unwrap();
    let layout = Layout::new(&spec);
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = (0..)
        .zip(layout.tensors())
        .map(|(seed, (_, slot))| {
            let scale = if slot.decays() { 0.06 } else { 0.1 };
            let center = if slot.decays() { 0.0 } else { 1.0 };
            let values = (0..slot.elements() as u64).map(|i| center + scale * noise(seed, i));
            (slot.name.clone(), slot.shape.clone(), values.flat_map(f32::to_le_bytes).collect())
        })
        .collect();
    let views =
        data.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    change(&mut config);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// Rows that can be learnt: each document counts upwards.
fn batch(key: &BatchKey) -> Batch {
    let first = (key.step * 31 + u64::from(key.micro_batch) * 7) as u32;
    let tokens: Vec<u32> = (0..50).map(|i| (first + i) % 384).collect();
    if key.suite == Suite::Generate as i32 {
        return Batch { tokens: tokens[..9].to_vec(), targets: vec![], starts: vec![0, 4] };
    }
    let targets = (0..50).map(|i| if i % 25 < 10 { NO_TARGET } else { (first + i + 1) % 384 }).collect();
    Batch { tokens, targets, starts: vec![0, 25] }
}

/// All micro-batches over the ranks in turn: with three workers the last pass leaves two idle.
fn share(rank: u32, world: u32) -> Vec<u32> {
    (rank..MICRO_BATCHES).step_by(world as usize).collect()
}

fn assignment(model: &Path, compute: Compute, joins: &[Join], rank: u32, zero_stage: u32) -> Assign {
    Assign {
        rank,
        world: joins.len() as u32,
        peers: joins.iter().map(|join| join.listen.clone()).collect(),
        peer_key: vec![9; 32].into(),
        model: Some(ModelSource { path: model.to_str().unwrap().into(), compute: compute as i32 }),
        optimizer: Some(OptimizerSettings {
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.1,
            max_grad_norm: 1.0,
            ..OptimizerSettings::default()
        }),
        threads: 1,
        device: "cpu".into(),
        worst_tokens: 50,
        worst_document: 25,
        micro_batches: MICRO_BATCHES,
        zero_stage,
        peer_timeout: 30.0,
        trains: true,
        ..Default::default()
    }
}

/// What a run left: bits of losses and norms, evaluations before and after, continuations, masters by tensor.
#[derive(Debug, PartialEq)]
struct Outcome {
    losses: Vec<u64>,
    norms: Vec<u64>,
    evaluations: Vec<Vec<(u32, u64, u64, u64)>>,
    continuations: Vec<(u32, u32, Vec<u8>, bool)>,
    masters: BTreeMap<String, Vec<u8>>,
}

struct Run {
    outcome: Outcome,
    memory: Vec<MemoryReport>,
}

/// Trains with `world` workers, each on a thread of its own.
fn run(model: &Path, compute: Compute, world: u32, zero_stage: u32) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(batch);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..world)
            .map(|_| {
                let (listener, listen) = tcp::listen("127.0.0.1").unwrap();
                let link = fake.link(Join { listen, ..Default::default() }, |_, _| {});
                scope.spawn(move || super::run(&link, &mut Standing::new(listener)))
            })
            .collect();
        let (attendants, joins): (Vec<_>, Vec<_>) = (0..world).map(|_| fake.welcome()).unzip();
        let memory = prepare(&attendants, &joins, |rank| assignment(model, compute, &joins, rank, zero_stage));
        let outcome = conduct(&attendants, dir.path(), world);
        drop(attendants);
        workers.into_iter().for_each(|worker| worker.join().unwrap().unwrap());
        Run { outcome, memory }
    })
}

fn prepare(attendants: &[Attendant], joins: &[Join], assign: impl Fn(u32) -> Assign) -> Vec<MemoryReport> {
    (0..joins.len() as u32).zip(attendants).for_each(|(rank, a)| a.tell(1, Told::Assign(assign(rank))));
    let ready = attendants.iter().map(|attendant| match attendant.hear() {
        Some(Body::Ready(ready)) => ready.memory.unwrap(),
        other => panic!("Ready, not {other:?}"),
    });
    let memory = ready.collect();
    attendants.iter().for_each(|attendant| attendant.tell(1, Told::Go(Go::default())));
    memory
}

fn conduct(attendants: &[Attendant], dir: &Path, world: u32) -> Outcome {
    let passes = MICRO_BATCHES.div_ceil(world);
    let path = dir.to_str().unwrap().to_owned();
    for (rank, attendant) in (0..).zip(attendants) {
        let micro_batches = share(rank, world);
        let step = |step| {
            let (target_tokens, micro_batches) = (30 * u64::from(MICRO_BATCHES), micro_batches.clone());
            directive::Body::Step(Step {
                step,
                learning_rate: 3e-3,
                target_tokens,
                micro_batches,
                passes,
                ..Step::default()
            })
        };
        let evaluate = || {
            let (suite, micro_batches) = (Suite::Validation as i32, micro_batches.clone());
            directive::Body::Evaluate(Evaluate { suite, micro_batches, passes })
        };
        let (micro_batches, end_tokens) = (micro_batches.clone(), vec![]);
        let mut directives = vec![evaluate()];
        directives.extend((1..=STEPS).map(step));
        directives.extend([
            evaluate(),
            directive::Body::Generate(Generate { micro_batches, passes, max_new_tokens: 3, end_tokens }),
            directive::Body::Checkpoint(Checkpoint { step: STEPS, path: path.clone(), attempt: 1 }),
            directive::Body::Finish(Finish {}),
        ]);
        (1..).zip(directives).for_each(|(id, body)| attendant.direct(id, body));
    }
    let mut outcome =
        Outcome { losses: vec![], norms: vec![], evaluations: vec![], continuations: vec![], masters: BTreeMap::new() };
    // Said while a save was still being written.
    let mut ahead: Vec<VecDeque<Body>> = attendants.iter().map(|_| VecDeque::new()).collect();
    loop {
        let next = ahead.iter_mut().zip(attendants);
        let reports: Vec<_> =
            next.map(|(ahead, a)| ahead.pop_front().or_else(|| a.hear()).expect("a report")).collect();
        match &reports[0] {
            Body::Step(first) => {
                let steps = reports.iter().map(|r| if let Body::Step(s) = r { s } else { panic!("{r:?}") });
                assert!(steps
                    .clone()
                    .all(|s| s.step == first.step && s.grad_norm.to_bits() == first.grad_norm.to_bits()));
                let mut parts: Vec<_> = steps.flat_map(|s| &s.parts).collect();
                parts.sort_by_key(|part| part.micro_batch);
                assert_eq!(parts.len(), MICRO_BATCHES as usize);
                outcome.losses.push(parts.iter().map(|p| p.loss_sum).sum::<f64>().to_bits());
                outcome.norms.push(first.grad_norm.to_bits());
            }
            Body::Evaluate(_) => outcome.evaluations.push(evaluations(&reports)),
            Body::Generate(_) => outcome.continuations = continuations(&reports),
            Body::Copied(_) => {
                for (ahead, attendant) in ahead.iter_mut().zip(attendants) {
                    let said = std::iter::from_fn(|| attendant.hear());
                    ahead.extend(said.take_while(|report| !matches!(report, Body::Checkpoint(_))));
                }
                read_masters(dir, &mut outcome.masters);
            }
            Body::Drained(_) => return outcome,
            other => panic!("{other:?}"),
        }
    }
}

fn evaluations(reports: &[Body]) -> Vec<(u32, u64, u64, u64)> {
    let parts = |report: &Body| match report {
        Body::Evaluate(EvaluateReport { parts, .. }) => parts.clone(),
        other => panic!("{other:?}"),
    };
    let parts = reports.iter().flat_map(parts);
    let mut all: Vec<_> = parts.map(|p| (p.micro_batch, p.loss_sum.to_bits(), p.targets, p.correct)).collect();
    all.sort();
    all
}

fn continuations(reports: &[Body]) -> Vec<(u32, u32, Vec<u8>, bool)> {
    let all = |report: &Body| match report {
        Body::Generate(GenerateReport { continuations, .. }) => continuations.clone(),
        other => panic!("{other:?}"),
    };
    let all = reports.iter().flat_map(all).map(|c| (c.micro_batch, c.document, c.tokens.to_vec(), c.ended));
    let mut all: Vec<_> = all.collect();
    all.sort();
    all
}

/// Masters and moments of all files, put together by element.
fn read_masters(dir: &Path, masters: &mut BTreeMap<String, Vec<u8>>) {
    for file in std::fs::read_dir(dir).unwrap() {
        let data = std::fs::read(file.unwrap().path()).unwrap();
        for (name, view) in SafeTensors::deserialize(&data).unwrap().iter() {
            let (tensor, range) = name.rsplit_once('/').unwrap();
            let (begin, end) = range.split_once('-').unwrap();
            let (begin, end): (usize, usize) = (begin.parse().unwrap(), end.parse().unwrap());
            let whole = masters.entry(tensor.into()).or_default();
            whole.resize(whole.len().max(4 * end), 0);
            whole[4 * begin..4 * end].copy_from_slice(view.data());
        }
    }
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn any_number_of_workers_gives_one_result() {
    let dir = tempfile::tempdir().unwrap();
    model_directory(dir.path(), |_| {});
    let spec = ModelSpec::read(dir.path()).unwrap();
    let parameters = Layout::new(&spec).parameters() as u64;
    for compute in [Compute::Fp32, Compute::Bf16] {
        let alone = run(dir.path(), compute, 1, 1);
        let loss = |evaluation: &Vec<(u32, u64, u64, u64)>| evaluation.iter().map(|e| f64::from_bits(e.1)).sum::<f64>();
        let [before, after] = &alone.outcome.evaluations[..] else { panic!("two evaluations") };
        assert!(loss(after) < 0.9 * loss(before), "{} then {}", loss(before), loss(after));
        assert_eq!(alone.outcome.continuations.len(), 2 * MICRO_BATCHES as usize);
        assert_eq!(alone.outcome.norms.len(), STEPS as usize);
        for (world, zero_stage) in [(2, 0), (3, 1), (1, 2), (2, 2), (3, 2), (1, 3), (2, 3), (3, 3)] {
            let several = run(dir.path(), compute, world, zero_stage);
            assert!(several.outcome == alone.outcome, "{world} workers, ZeRO-{zero_stage}, {compute:?}");
            let bytes: Vec<_> = several.memory.iter().map(|m| m.optimizer_bytes).collect();
            // Of the fp32 master, bf16 parameters lack two bytes, fp32 parameters none.
            let width = if compute == Compute::Bf16 { 10 } else { 8 };
            assert_eq!(bytes.iter().sum::<u64>(), width * parameters);
            let share = width * parameters / u64::from(world);
            assert!(bytes.iter().all(|b| b.abs_diff(share) <= width * 65_536), "{bytes:?}");
        }
    }
}

/// Runs one worker until it gives up; returns its error.
fn refusal(change: impl Fn(&mut Assign), spoil: impl Fn(&Path)) -> Error {
    let dir = tempfile::tempdir().unwrap();
    model_directory(dir.path(), |_| {});
    spoil(dir.path());
    let fake = Fake::start(batch);
    let (listener, listen) = tcp::listen("127.0.0.1").unwrap();
    let link = fake.link(Join { listen, ..Default::default() }, |_, _| {});
    let (attendant, join) = fake.welcome();
    let mut assign = assignment(dir.path(), Compute::Fp32, &[join], 0, 0);
    change(&mut assign);
    attendant.tell(1, Told::Assign(assign));
    super::run(&link, &mut Standing::new(listener)).unwrap_err()
}

#[test]
fn bad_input_is_one_sentence_that_names_it() {
    let keep = |_: &mut Assign| {};
    type Spoil = fn(&Path);
    let spoiled: [(&str, Spoil); 4] = [
        ("config.json", |dir| std::fs::remove_file(dir.join("config.json")).unwrap()),
        ("gelu", |dir| model_directory(dir, |config| config["hidden_act"] = "gelu".into())),
        ("model.embed_tokens.weight", |dir| model_directory(dir, |config| config["vocab_size"] = 400.into())),
        ("model.safetensors", |dir| std::fs::write(dir.join("model.safetensors"), b"not a header").unwrap()),
    ];
    for (named, spoil) in spoiled {
        let error = refusal(keep, spoil);
        assert!(error.bad_input() && error.to_string().contains(named), "{error}");
    }
    let error = refusal(|assign| assign.device = "cuda".into(), |_| {});
    assert!(error.bad_input() && error.to_string().contains("cluster.device"), "{error}");
    let error = refusal(|assign| assign.worst_tokens = 1 << 29, |_| {});
    assert!(matches!(error, Error::Memory(_)) && error.bad_input(), "{error}");
    assert!(error.to_string().contains("max_tokens_per_micro_batch"), "{error}");
}

#[test]
fn weights_that_are_not_numbers_are_found_before_the_first_step() {
    let spoil = |dir: &Path| {
        let path = dir.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
    };
    let error = refusal(|_| {}, spoil);
    assert!(error.bad_input() && matches!(error, Error::Weights(_)), "{error}");
    assert!(error.to_string().contains("has a value that is not finite"), "{error}");
}

#[test]
fn neighbours_share_a_host() {
    let addresses = ["10.0.0.1:5", "10.0.0.2:5", "10.0.0.1:6", "[::1]:7"].map(String::from);
    assert_eq!([0, 1, 2, 3].map(|rank| neighbours(&addresses, rank)), [2, 1, 2, 1]);
}
