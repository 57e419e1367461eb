//! However gradients and parameters are sharded, however many micro-batches go together and whoever computes them: one
//! result, to the bit.

use super::*;
use crate::collective::tcp::tests::mesh;
use crate::memory::placement::Offload;
use crate::model::Recompute;
use crate::ops::kernels::emulator::Emulated;
use crate::optim::adamw::Settings;
use crate::optim::reduction::{Adding, Stage};
use crate::optim::state::Form;
use crate::restore::Part;
use std::path::Path;
use tch::{Device, Kind};
use unisono_configs::model::{Layout, ModelSpec};
use unisono_proto::NO_TARGET;

const MICRO_BATCHES: usize = 5;
const STEPS: u64 = 2;

fn spec(tied: bool) -> ModelSpec {
    let config = serde_json::json!({
        "model_type": "llama", "vocab_size": 700, "hidden_size": 128, "intermediate_size": 192,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": tied,
        "mlp_bias": true
    });
    ModelSpec::from_json(&config, Path::new("config.json")).unwrap()
}

/// A number in -1..1 for an element.
fn noise(name: &str, i: usize) -> f32 {
    let seed = name.bytes().fold(i as u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

fn batch(index: usize) -> Batch {
    let (length, vocab) = (20 + 11 * index as u32, 700);
    let token = |i: u32| (i * 37 + 101 * index as u32) % vocab;
    let targets = |i: u32| if i.is_multiple_of(3) || i + 1 == length { NO_TARGET } else { token(i + 1) };
    Batch { tokens: (0..length).map(token).collect(), targets: (0..length).map(targets).collect(), starts: vec![0, 9] }
}

/// How a run is carried out.
#[derive(Debug, Clone, Copy)]
struct Way {
    world: usize,
    stage: Stage,
    wave: usize,
    recompute: Recompute,
    form: Form,
    /// What a device leaves on the host; none: there is none.
    offload: Option<Offload>,
}

impl Way {
    fn here(world: usize, stage: Stage, wave: usize, recompute: Recompute) -> Self {
        Way { world, stage, wave, recompute, form: Form::Split, offload: None }
    }
}

/// Bits of losses and norms, and masters and moments by (bucket, rank, part).
type Outcome = (Vec<u64>, Vec<Vec<u8>>);

fn engine(peers: crate::collective::tcp::Mesh, tied: bool, way: Way) -> Engine {
    let (spec, stopper) = (spec(tied), peers.stopper().clone());
    let courier = Courier::new(Box::new(peers), &stopper);
    let (rank, world, layout) = (courier.rank(), courier.world(), Layout::new(&spec));
    let mut model = match way.stage {
        Stage::Three if world > 1 => {
            Model::sharded(spec, Kind::BFloat16, Device::Cpu, &layout.shard_elements(rank, world))
        }
        _ => Model::new(spec, Kind::BFloat16, Device::Cpu),
    };
    let scale = |name: &str| if name.contains("norm") { 0.3 } else { 0.08 };
    let read = |name: &str, range: Range<usize>, to: &mut [f32]| -> Result<(), crate::model::Error> {
        to.iter_mut().zip(range).for_each(|(x, i)| *x = noise(name, i) * scale(name));
        Ok(())
    };
    model.fill(read).unwrap();
    model.set_plan(way.recompute, usize::MAX);
    let settings =
        Settings { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0, form: way.form, seed: 5 };
    let offload = way.offload.filter(|offload| offload.leaves_sums());
    let (leaves, away) = (2 * MICRO_BATCHES, offload.is_some());
    let adding = Adding { stage: way.stage, leaves, one_wave: way.wave >= MICRO_BATCHES, away };
    let mut optimizer = Optimizer::new(model.layout().clone(), rank, world, settings, adding);
    optimizer.load_masters(read).unwrap();
    if let Some(offload) = offload {
        // The same memory, but the one is the device's and the other the host's.
        model.pretend_another_device();
        model.live_on_device().unwrap();
        optimizer.move_to(Device::Cpu, offload).unwrap();
    }
    Engine::new(model, Some(optimizer), courier)
}

/// Micro-batches of a rank: uneven shares, and the last of three ranks has none.
fn share(rank: usize, world: usize) -> Vec<usize> {
    (0..MICRO_BATCHES).filter(|m| [0, 0, 1, 0, 1][*m] % world == rank).collect()
}

fn work(peers: crate::collective::tcp::Mesh, tied: bool, way: Way) -> (Vec<(usize, u64)>, Vec<Vec<Vec<u8>>>) {
    let _emulated = way.offload.map(|_| Emulated::begin().unwrap());
    let mut engine = engine(peers, tied, way);
    let (rank, world) = (engine.courier.rank(), way.world);
    let own = share(rank, world);
    let passes = (0..world).map(|rank| share(rank, world).len()).max().unwrap();
    let waves = passes.div_ceil(way.wave);
    let mut numbers = Vec::new();
    engine.rehearse(vec![batch(4)], true, 0.01).unwrap();
    for step in 1..=STEPS {
        for wave in 0..waves {
            let turn = Turn { first: wave == 0, last: wave + 1 == waves };
            let of_wave: Vec<_> = own.iter().skip(wave * way.wave).take(way.wave).copied().collect();
            let losses = engine.add(of_wave.iter().map(|&m| batch(m)).collect(), turn, 0.01).unwrap();
            numbers.extend(of_wave.iter().zip(losses).map(|(&m, loss)| (m, loss.read().sum.to_bits())));
        }
        engine.judge().unwrap();
        let norm = engine.norm().unwrap();
        numbers.push((1000, norm.to_bits()));
        engine.update(step, 1e-3, norm);
        for wave in 0..waves {
            let of_wave: Vec<_> = own.iter().skip(wave * way.wave).take(way.wave).copied().collect();
            let losses = engine.evaluate(of_wave.iter().map(|&m| batch(m)).collect()).unwrap();
            numbers.extend(of_wave.iter().zip(losses).map(|(&m, loss)| (100 + m, loss.sum.to_bits())));
        }
    }
    let came = engine.assemble().unwrap();
    let logits = engine.model.logits(&batch(0), &[3]).unwrap();
    numbers.push((2000, f64::try_from(logits.get(0).get(5)).unwrap().to_bits()));
    engine.disassemble(came);
    engine.settle().unwrap();
    let optimizer = engine.optimizer.as_ref().unwrap();
    let source = optimizer.source(&engine.model);
    let saved = |bucket: usize| {
        let mut bytes = Vec::new();
        for part in Part::ALL {
            source.held[bucket].append(part, 0..optimizer.shard().own(bucket).len(), &mut bytes);
        }
        bytes
    };
    let own = (0..optimizer.shard().buckets()).map(|bucket| vec![saved(bucket)]).collect();
    (numbers, own)
}

fn run(tied: bool, way: Way) -> Outcome {
    let ranks: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            mesh(way.world).into_iter().map(|peers| scope.spawn(move || work(peers, tied, way))).collect();
        threads.into_iter().map(|t| t.join().expect("worker")).collect()
    });
    let mut numbers: Vec<(usize, u64)> = ranks.iter().flat_map(|(numbers, _)| numbers.clone()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    // Master, m and v of a rank lie one after another; put the ranks' together part by part.
    let width = way.form.saved_width() / Part::ALL.len();
    let buckets = ranks[0].1.len();
    let saved = (0..buckets).map(|bucket| {
        let mut whole = vec![Vec::new(); 3];
        for (_, own) in &ranks {
            let bytes = &own[bucket][0];
            let elements = bytes.len() / way.form.saved_width();
            bytes
                .chunks(width * elements.max(1))
                .zip(&mut whole)
                .for_each(|(part, whole)| whole.extend_from_slice(part));
        }
        whole.concat()
    });
    (numbers.into_iter().map(|(_, bits)| bits).collect(), saved.collect())
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn no_stage_wave_level_or_share_changes_a_bit() {
    for tied in [true, false] {
        let nothing = Recompute::Nothing;
        let alone = run(tied, Way::here(1, Stage::One, 1, nothing));
        for (world, stage, wave, recompute) in [
            (1, Stage::One, 2, nothing),
            (1, Stage::Two, 5, nothing),
            (1, Stage::Two, 2, Recompute::Norms),
            (2, Stage::One, 1, Recompute::UpProjection),
            (2, Stage::Two, 5, nothing),
            (2, Stage::Two, 1, Recompute::Block),
            (2, Stage::Three, 5, Recompute::Block),
            (2, Stage::Three, 2, nothing),
            (3, Stage::One, 1, nothing),
            (3, Stage::Two, 2, nothing),
            (3, Stage::Three, 1, Recompute::UpProjection),
            (3, Stage::Three, 5, nothing),
        ] {
            let way = Way::here(world, stage, wave, recompute);
            assert!(run(tied, way) == alone, "tied: {tied}, {way:?}");
        }
    }
}

/// A device's kernels run on this processor, those of the model too: whatever lies where, the result is that of a host which
/// adds and updates.
#[cfg(not(feature = "float-sum"))]
fn of_any_place(form: Form, ways: &[(usize, Stage, usize, Offload)]) {
    let on_host = Way { form, offload: Some(Offload::All), ..Way::here(1, Stage::One, 1, Recompute::Nothing) };
    let expected = run(true, on_host);
    for &(world, stage, wave, offload) in ways {
        let way = Way { world, stage, wave, offload: Some(offload), ..on_host };
        assert!(run(true, way) == expected, "{way:?}");
    }
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn no_place_of_sums_and_state_changes_a_bit() {
    of_any_place(Form::Split, &[(2, Stage::One, 2, Offload::Moments), (2, Stage::Three, 2, Offload::State)]);
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn no_place_of_sums_and_a_narrow_state_changes_a_bit() {
    of_any_place(Form::Narrow, &[(1, Stage::Two, 2, Offload::State), (2, Stage::Three, 5, Offload::Nothing)]);
}

/// A device is asked once for all waves of a step which leaves were bad.
#[test]
fn a_bad_number_of_any_wave_is_that_of_its_micro_batch() {
    let _emulated = Emulated::begin().unwrap();
    let (nothing, offload) = (Recompute::Nothing, Some(Offload::Nothing));
    for stage in [Stage::One, Stage::Two] {
        let way = Way { offload, ..Way::here(1, stage, 2, nothing) };
        let mut engine = engine(mesh(1).remove(0), true, way);
        let mut step = |scales: [f64; 3]| {
            for (wave, scale) in scales.into_iter().enumerate() {
                let turn = Turn { first: wave == 0, last: wave == 2 };
                let batches = [2 * wave, 2 * wave + 1].into_iter().filter(|m| *m < MICRO_BATCHES);
                let owed = engine.add(batches.map(batch).collect(), turn, scale).unwrap();
                assert!(owed.iter().all(|loss| !loss.is_known()), "nobody has waited");
            }
            let judged = engine.judge();
            engine.optimizer.as_mut().unwrap().reduction.abandon().unwrap();
            judged.map_err(|error| match error {
                Error::Micro(Fault { index, source: model::Error::BadNumber(_) }) => index,
                other => panic!("{other}"),
            })
        };
        assert_eq!(step([0.01, 1e30, 1e30]), Err(2));
        assert_eq!(step([0.01, 0.01, 1e30]), Err(4));
        assert_eq!(step([0.01; 3]), Ok(()), "a step begins anew");
    }
}
