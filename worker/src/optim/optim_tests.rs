//! Reduce, norm, update and gather over real sockets: any number of workers, any share of the leaves, the same bits.

use super::*;
use crate::collective::tcp::tests::mesh;
use crate::model::Leaves;
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

const SETTINGS: Settings = Settings { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 0.05 };

fn value(seed: usize, i: usize) -> f32 {
    let x = (i as u32).wrapping_mul(2_654_435_761).wrapping_add((seed as u32).wrapping_mul(40_503_777));
    (x as f32 / u32::MAX as f32 - 0.5) * 0.01
}

/// Final masters, first moments, parameters (as fp32) and norms of a run of 3 steps with 6 leaves each.
fn train(world: usize, kind: Kind) -> (Vec<f32>, Vec<f32>, Vec<Tensor>, Vec<f64>) {
    let ranks: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            mesh(world).into_iter().map(|mut peers| scope.spawn(move || worker(&mut peers, kind))).collect();
        threads.into_iter().map(|t| t.join().expect("worker")).collect()
    });
    let (_, parameters, norms) = &ranks[0];
    for (optimizer, other, n) in &ranks {
        assert_eq!(norms, n);
        for (a, b) in parameters.iter().zip(other) {
            assert_eq!(a, b);
        }
        assert_eq!(optimizer.bytes(), 12 * optimizer.shard().elements() as u64);
    }
    let whole = |field: fn(&State) -> &Vec<f32>| {
        (0..2).flat_map(|b| ranks.iter().flat_map(move |(o, _, _)| field(o.state(b)).clone())).collect()
    };
    let widened = parameters.iter().map(|p| p.to_kind(Kind::Float)).collect();
    (whole(|s| &s.master), whole(|s| &s.m), widened, norms.clone())
}

fn worker(peers: &mut dyn Collective, kind: Kind) -> (Optimizer, Vec<Tensor>, Vec<f64>) {
    let layout = layout();
    let mut optimizer = Optimizer::new(layout.clone(), peers.rank(), peers.world(), SETTINGS, 6);
    let load = |_: &str, range: Range<usize>, to: &mut [f32]| {
        to.iter_mut().zip(range).for_each(|(x, i)| *x = value(7, i) * 10.0);
        Ok::<(), ()>(())
    };
    optimizer.load_masters(load).unwrap();
    let mut parameters: Vec<_> =
        layout.buckets.iter().map(|b| Tensor::zeros([b.elements as i64], (kind, tch::Device::Cpu))).collect();
    let mut norms = vec![];
    for step in 1..=3 {
        for leaf in (0..6).filter(|leaf| leaf % peers.world() == peers.rank()) {
            for (b, bucket) in layout.buckets.iter().enumerate() {
                let values: Vec<f32> = (0..bucket.elements).map(|i| value(leaf + 10 * step, i + b)).collect();
                optimizer.sums.dense(b, 0, &Tensor::from_slice(&values)).unwrap();
            }
        }
        optimizer.reduce(peers).unwrap();
        let norm = optimizer.norm(peers).unwrap();
        optimizer.update(step as u64, 1e-3, norm, &mut parameters);
        optimizer.gather(peers, &mut parameters).unwrap();
        norms.push(norm);
    }
    (optimizer, parameters, norms)
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn any_number_of_workers_gives_the_same_bits() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let alone = train(1, kind);
        assert!(alone.3.iter().all(|n| *n > SETTINGS.max_grad_norm), "clipping is at work: {:?}", alone.3);
        for world in [2, 3, 5] {
            assert!(train(world, kind) == alone, "{world} workers, {kind:?}");
        }
    }
}

#[test]
fn the_norm_is_the_gradient_s_and_decay_spares_vectors() {
    let (_, _, _, norms) = train(1, Kind::Float);
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
    let mut optimizer = Optimizer::new(layout.clone(), 0, 1, SETTINGS, 1);
    optimizer
        .load_masters(|_, _, to| -> Result<(), ()> {
            to.fill(1.0);
            Ok(())
        })
        .unwrap();
    let mut parameters: Vec<_> =
        layout.buckets.iter().map(|b| Tensor::zeros([b.elements as i64], (Kind::Float, tch::Device::Cpu))).collect();
    optimizer.sums.settle();
    optimizer.update(1, 0.5, 0.0, &mut parameters);
    let block = &optimizer.state(1).master;
    assert_eq!(block[0], 1.0);
    assert_eq!(block[40], 0.95);
    assert_eq!(block[40 + 75_000], 1.0);
}
