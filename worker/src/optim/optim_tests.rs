//! Reduce, norm, update and gather over real sockets: any number of workers, any share of the leaves, the same bits.

use super::*;
use crate::collective::courier::Courier;
use crate::collective::nccl::stand_in::{self, Fault, StandIn};
use crate::collective::tcp::tests::mesh;
use crate::collective::tcp::{Mesh, Stopper};
use crate::collective::Collective;
use crate::model::Leaves;
use crate::ops::kernels::emulator::Emulated;
use crate::optim::reduction::{Stage, Turn};
use crate::optim::state::Form;
use unisono_configs::model::{Bucket, TensorSlot};

/// Two buckets; the first spans three chunks and mixes a matrix with a norm's weight.
fn layout() -> Arc<Layout> {
    let bucket = |name: &str, shapes: &[&[usize]]| {
        let mut bucket = Bucket { name: name.into(), tensors: vec![], elements: 0 };
        for (i, shape) in shapes.iter().enumerate() {
            let slot = TensorSlot { name: format!("{name}.{i}"), shape: shape.to_vec(), offset: bucket.elements };
            bucket.elements += slot.elements();
            bucket.tensors.push(slot);
        }
        bucket
    };
    let buckets = vec![bucket("embedding", &[&[700, 200]]), bucket("block.0", &[&[40], &[300, 250], &[99]])];
    Arc::new(Layout { buckets })
}

const SETTINGS: Settings =
    Settings { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 0.05, form: Form::Whole, seed: 0 };

fn value(seed: usize, i: usize) -> f32 {
    let x = (i as u32).wrapping_mul(2_654_435_761).wrapping_add((seed as u32).wrapping_mul(40_503_777));
    (x as f32 / u32::MAX as f32 - 0.5) * 0.01
}

/// Final masters and moments as they are saved, parameters (as fp32) and norms of a run of 3 steps with 6 leaves each.
fn train(world: usize, form: Form, adding: Adding) -> (Vec<Vec<u8>>, Vec<Tensor>, Vec<f64>) {
    train_where(world, form, adding, Offload::All, None)
}

/// What stands in for a driver, and what it runs into as state is to come and go.
type Driver = Option<(StandIn, Fault)>;

/// The same with sums and state on a device, as far as the emulator is one.
fn train_where(
    world: usize,
    form: Form,
    adding: Adding,
    offload: Offload,
    driver: Driver,
) -> (Vec<Vec<u8>>, Vec<Tensor>, Vec<f64>) {
    let ranks: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = mesh(world)
            .into_iter()
            .map(|peers| scope.spawn(move || worker(peers, form, adding, offload, driver)))
            .collect();
        threads.into_iter().map(|t| t.join().expect("worker")).collect()
    });
    let (_, parameters, norms) = &ranks[0];
    for (optimizer, other, n) in &ranks {
        assert_eq!(norms, n);
        for (a, b) in parameters.iter().zip(other) {
            assert_eq!(a, b);
        }
        assert_eq!(optimizer.bytes(), (form.width() * optimizer.shard().elements()) as u64);
    }
    let saved = |part: Part| {
        let mut bytes = vec![];
        for b in 0..2 {
            for (optimizer, parameters, _) in &ranks {
                let source = optimizer.source(parameters);
                source.held[b].append(part, 0..optimizer.shard().own(b).len(), &mut bytes);
            }
        }
        bytes
    };
    let widened = parameters.iter().map(|p| p.to_kind(Kind::Float)).collect();
    (Part::ALL.map(saved).to_vec(), widened, norms.clone())
}

/// Parameters of `form`, rounded from what `master` gives for an element of a tensor, and an optimizer that has these
/// masters.
fn begin(
    (rank, world): (usize, usize),
    form: Form,
    adding: Adding,
    master: impl Fn(usize) -> f32,
) -> (Optimizer, Vec<Tensor>) {
    let (layout, kind) = (layout(), if form == Form::Whole { Kind::Float } else { Kind::BFloat16 });
    let mut optimizer = Optimizer::new(layout.clone(), rank, world, Settings { form, ..SETTINGS }, adding);
    let load = |_: &str, range: Range<usize>, to: &mut [f32]| {
        to.iter_mut().zip(range).for_each(|(x, i)| *x = master(i));
        Ok::<(), ()>(())
    };
    optimizer.load_masters(load).unwrap();
    let flat = |bucket: &Bucket| {
        let masters: Vec<f32> = bucket.tensors.iter().flat_map(|slot| (0..slot.elements()).map(&master)).collect();
        let mut parameters = Tensor::zeros([bucket.elements as i64], (kind, tch::Device::Cpu));
        match form {
            Form::Whole => view::elements_mut(&mut parameters).copy_from_slice(&masters),
            _ => state::round_all(&masters, view::elements_mut(&mut parameters)),
        }
        parameters
    };
    (optimizer, layout.buckets.iter().map(flat).collect())
}

/// Leaves come in one wave, or in three.
fn worker(
    peers: Mesh,
    form: Form,
    adding: Adding,
    offload: Offload,
    driver: Driver,
) -> (Optimizer, Vec<Tensor>, Vec<f64>) {
    let (layout, stopper) = (layout(), peers.stopper().clone());
    let mut courier = Courier::new(Box::new(peers), &stopper);
    let (rank, world) = (courier.rank(), courier.world());
    let adding = Adding { away: offload.leaves_sums(), ..adding };
    let (mut optimizer, mut parameters) = begin((rank, world), form, adding, |i| value(7, i) * 10.0);
    let _emulated = adding.away.then(|| Emulated::begin().expect("a C++ compiler"));
    match driver {
        _ if !adding.away => {}
        None => optimizer.move_to(Device::Cpu, offload).unwrap(),
        Some((stand_in, fault)) => {
            stand_in.fault(fault);
            let route = Route { gpu: Some(stand_in.gpu()), piece: 30_000 };
            optimizer.move_by(Device::Cpu, route, offload).unwrap();
        }
    }
    let waves = if adding.one_wave { 1 } else { 3 };
    let mut norms = vec![];
    for step in 1..=3 {
        for wave in 0..waves {
            let turn = Turn { first: wave == 0, last: wave + 1 == waves };
            for (b, bucket) in layout.buckets.iter().enumerate().rev() {
                optimizer.reduction.open(b).unwrap();
                for leaf in (0..6).filter(|leaf| leaf % world == rank && leaf % waves == wave) {
                    let values: Vec<f32> = (0..bucket.elements).map(|i| value(leaf + 10 * step, i + b)).collect();
                    optimizer.reduction.dense(b, 0, &Tensor::from_slice(&values)).unwrap();
                }
                optimizer.reduction.finish(b, turn, &mut courier);
            }
        }
        let norm = optimizer.reduction.norm(&mut courier).unwrap();
        let update = optimizer.plan(step as u64, 1e-3, norm);
        for (b, parameter) in parameters.iter_mut().enumerate() {
            let mut only: Vec<_> = (0..layout.buckets.len()).map(|_| parameter.shallow_clone()).collect();
            optimizer.update(b, &update, &mut only);
            let (mut tensor, shard) = (parameter.shallow_clone(), optimizer.shard().clone());
            courier.send(move |c: &mut dyn Collective| c.all_gather(&mut tensor, shard.owners(b))).wait().unwrap();
        }
        norms.push(norm);
    }
    optimizer.bring_home();
    (optimizer, parameters, norms)
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn any_number_of_workers_gives_the_same_bits() {
    for form in [Form::Whole, Form::Split, Form::Narrow] {
        let alone = train(1, form, Adding::in_place(6));
        assert!(alone.2.iter().all(|n| *n > SETTINGS.max_grad_norm), "clipping is at work: {:?}", alone.2);
        for (stage, one_wave) in [(Stage::One, false), (Stage::Two, false), (Stage::Two, true)] {
            for world in [1, 2, 3, 5] {
                let adding = Adding { stage, leaves: 6, one_wave, away: false };
                assert!(train(world, form, adding) == alone, "{world} workers, {form:?}, {adding:?}");
            }
        }
    }
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn a_state_that_lives_on_a_device_has_the_same_bits() {
    for form in [Form::Whole, Form::Split, Form::Narrow] {
        let alone = train(1, form, Adding::in_place(6));
        for (world, stage, one_wave, offload) in [
            (1, Stage::One, false, Offload::Nothing),
            (2, Stage::One, false, Offload::State),
            (1, Stage::Two, true, Offload::Masters),
            (2, Stage::Two, true, Offload::Nothing),
            (2, Stage::Two, false, Offload::Moments),
        ] {
            let adding = Adding { stage, leaves: 6, one_wave, away: true };
            assert!(
                train_where(world, form, adding, offload, None) == alone,
                "{world} workers, {form:?}, {adding:?}, {offload:?}"
            );
        }
    }
}

/// Pieces come and go on streams of their own: whoever does not wait for them sees other bits.
#[test]
#[cfg(not(feature = "float-sum"))]
fn a_state_that_comes_and_goes_beside_updates_has_the_same_bits() {
    let _turn = stand_in::turn();
    let stand_in = StandIn::open();
    let before = stand_in.alive();
    for form in [Form::Whole, Form::Split, Form::Narrow] {
        let alone = train(1, form, Adding::in_place(6));
        for (world, offload) in [(1, Offload::State), (2, Offload::Moments), (1, Offload::Masters)] {
            for fault in [Fault::None, Fault::Refuses] {
                let adding = Adding { stage: Stage::Two, leaves: 6, one_wave: true, away: true };
                let moved = train_where(world, form, adding, offload, Some((stand_in, fault)));
                assert!(moved == alone, "{world} workers, {form:?}, {offload:?}");
                assert_eq!(stand_in.alive(), before, "streams, events and locks are given back");
            }
        }
    }
}

/// One part of a state, in pieces of 1000, and the two stagings.
fn bus(stand_in: StandIn, m: &mut pages::Pages<f32>) -> (bus::Bus, [Tensor; 2]) {
    let staged = [0, 1].map(|_| Tensor::zeros([1000], (Kind::Float, Device::Cpu)));
    let sets = [0, 1].map(|set: usize| [None, Some(staged[set].shallow_clone()), None]);
    let order = (0..m.len() / 1000).map(|piece| (0, 1000 * piece..1000 * (piece + 1))).collect();
    let home = vec![[None, Some((m.as_mut_ptr().cast(), 4 * m.len())), None]];
    (bus::Bus::new(stand_in.gpu(), order, sets, home).unwrap(), staged)
}

#[test]
fn nothing_goes_home_before_it_is_updated() {
    let _turn = stand_in::turn();
    let (stand_in, mut m) = (StandIn::open(), pages::Pages::zero(5000));
    let (mut bus, staged) = bus(stand_in, &mut m);
    let come = bus.come(0, &(0..1000), 1).unwrap();
    stand_in.hold(true);
    bus.leave(come).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    // What computes is not done yet, so this is in time.
    let _ = staged[come.staging].shallow_clone().fill_(1.0);
    stand_in.hold(false);
    bus.wait().unwrap();
    assert!(m[..1000].iter().all(|x| *x == 1.0) && m[1000..].iter().all(|x| *x == 0.0));
}

#[test]
fn what_goes_home_is_there_before_it_comes_again() {
    let _turn = stand_in::turn();
    let mut m = pages::Pages::zero(1000);
    let (mut bus, staged) = bus(StandIn::open(), &mut m);
    for step in 1..=4 {
        let come = bus.come(0, &(0..1000), step).unwrap();
        let now = &staged[come.staging];
        assert_eq!(now.double_value(&[999]), (step - 1) as f64);
        let _ = now.shallow_clone().fill_(step as f64);
        bus.leave(come).unwrap();
    }
}

#[test]
fn the_norm_is_the_gradient_s_and_decay_spares_vectors() {
    let (_, _, norms) = train(1, Form::Whole, Adding::in_place(6));
    let layout = layout();
    let square = |step: usize, b: usize, i: usize| {
        (0..6).map(|leaf| f64::from(value(leaf + 10 * step, i + b))).sum::<f64>().powi(2)
    };
    for (step, norm) in norms.iter().enumerate() {
        let elements = layout.buckets.iter().enumerate().flat_map(|(b, k)| (0..k.elements).map(move |i| (b, i)));
        let expected = elements.map(|(b, i)| square(step + 1, b, i)).sum::<f64>().sqrt();
        assert!((norm / expected - 1.0).abs() < 1e-6, "{norm} against {expected}");
    }
    // Without gradient only decay moves a master, and only a matrix's.
    let (mut optimizer, mut parameters) = begin((0, 1), Form::Whole, Adding::in_place(1), |_| 1.0);
    let mut courier = Courier::new(Box::new(mesh(1).remove(0)), &Stopper::default());
    (0..2).for_each(|bucket| optimizer.reduction.finish(bucket, Turn::ONLY, &mut courier));
    assert_eq!(optimizer.reduction.norm(&mut courier).unwrap(), 0.0);
    let update = optimizer.plan(1, 0.5, 0.0);
    (0..2).for_each(|bucket| optimizer.update(bucket, &update, &mut parameters));
    let block: &[f32] = view::elements(&parameters[1]);
    assert_eq!(block[0], 1.0);
    assert_eq!(block[40], 0.95);
    assert_eq!(block[40 + 75_000], 1.0);
}
