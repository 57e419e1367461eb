//! What the exact sum promises: no bit depends on order or partition, nothing is lost, bad numbers are refused.

use super::*;
use proptest::prelude::*;
use unisono_configs::model::layout::{Bucket, TensorSlot};

fn layout(elements: usize) -> Arc<Layout> {
    let tensors = vec![TensorSlot { name: "w".into(), shape: vec![elements], offset: 0 }];
    Arc::new(Layout { buckets: vec![Bucket { name: "block.0".into(), tensors, elements }] })
}

/// Leaves of widely different magnitudes, below the bound for 16 leaves.
fn leaf(length: usize) -> impl Strategy<Value = Vec<f32>> {
    let element = (-1.0f32..1.0, -40i32..11).prop_map(|(x, e)| x * (e as f32).exp2());
    prop::collection::vec(element, length)
}

fn leaves() -> impl Strategy<Value = (Vec<Vec<f32>>, Vec<usize>, Vec<usize>)> {
    (1usize..70, 1usize..9).prop_flat_map(|(length, count)| {
        let order = Just((0..count).collect::<Vec<_>>()).prop_shuffle();
        let owners = prop::collection::vec(0usize..4, count);
        (prop::collection::vec(leaf(length), count), order, owners)
    })
}

fn sum<'a>(length: usize, leaves: impl Iterator<Item = &'a Vec<f32>>) -> Vec<i64> {
    let mut sums = ExactSum::new(layout(length), 16);
    for leaf in leaves {
        sums.dense(0, 0, &Tensor::from_slice(leaf)).unwrap();
    }
    sums.settle();
    sums.bucket(0).to_vec()
}

proptest! {
    #[test]
    #[cfg(not(feature = "float-sum"))]
    fn neither_order_nor_partition_changes_a_bit((leaves, order, owners) in leaves()) {
        let length = leaves[0].len();
        let whole = sum(length, leaves.iter());
        let shuffled = sum(length, order.iter().map(|&i| &leaves[i]));
        prop_assert_eq!(&whole, &shuffled);
        let mut merged = vec![0i64; length];
        for worker in (0..4).rev() {
            let part = sum(length, order.iter().filter(|&&i| owners[i] == worker).map(|&i| &leaves[i]));
            merged.iter_mut().zip(part).for_each(|(a, b)| *a += b);
        }
        prop_assert_eq!(&whole, &merged);
    }

    #[test]
    #[cfg(not(feature = "float-sum"))]
    fn the_error_is_at_most_half_a_unit_for_each_leaf((leaves, _, _) in leaves()) {
        let sums = sum(leaves[0].len(), leaves.iter());
        for (i, &q) in sums.iter().enumerate() {
            let (mut whole, mut rest) = (0i128, 0f64);
            for leaf in &leaves {
                let units = f64::from(leaf[i]) / UNIT;
                whole += units.trunc() as i128;
                rest += units.fract();
            }
            let error = (i128::from(q) - whole) as f64 - rest;
            prop_assert!(error.abs() <= 0.5 * leaves.len() as f64 + 1e-9, "{error}");
        }
    }
}

/// The property above is not free: the same sums in fp32 do depend on the partition.
#[test]
fn a_float_sum_would_depend_on_the_partition() {
    let leaves: Vec<Vec<f32>> =
        (0..8).map(|k| (0..64).map(|i| ((i * 8 + k) as f32 * 0.37).sin() * 1e-3).collect()).collect();
    let add =
        |part: &[Vec<f32>]| part.iter().fold(vec![0f32; 64], |s, l| s.iter().zip(l).map(|(a, b)| a + b).collect());
    let (left, right) = (add(&leaves[..4]), add(&leaves[4..]));
    let halves: Vec<f32> = left.iter().zip(&right).map(|(a, b)| a + b).collect();
    assert_ne!(add(&leaves), halves);
}

/// The build feature `float-sum` must break the law that the default build keeps.
#[test]
#[cfg(feature = "float-sum")]
fn the_negative_control_depends_on_the_partition() {
    let leaves: Vec<Vec<f32>> =
        (0..8).map(|k| (0..64).map(|i| ((i * 8 + k) as f32 * 0.37).sin() * 1e-3).collect()).collect();
    let (left, right) = (sum(64, leaves[..4].iter()), sum(64, leaves[4..].iter()));
    let halves: Vec<i64> = left.iter().zip(&right).map(|(a, b)| a + b).collect();
    assert_ne!(sum(64, leaves.iter()), halves);
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn ties_round_to_even() {
    let half = (UNIT / 2.0) as f32;
    assert_eq!(sum(4, [vec![half, 3.0 * half, 5.0 * half, -half]].iter()), [0, 2, 2, 0]);
}

#[test]
fn a_value_at_the_bound_or_not_finite_is_refused_with_its_bucket() {
    let below = (bound(16) as f32).next_down();
    for (value, refused) in [
        (below, false),
        (-below, false),
        (bound(16) as f32, true),
        (-bound(16) as f32, true),
        (f32::NAN, true),
        (f32::INFINITY, true),
        (f32::NEG_INFINITY, true),
    ] {
        let mut leaf = vec![0f32; 40];
        leaf[37] = value;
        let tensors = [Tensor::from_slice(&leaf), Tensor::from_slice(&leaf).to_kind(Kind::Double)];
        for tensor in tensors {
            let outcome = ExactSum::new(layout(40), 16).dense(0, 0, &tensor);
            assert_eq!(outcome.is_err(), refused, "{value}");
            if let Err(bad) = outcome {
                assert_eq!(bad.bucket, "block.0");
                assert!(bad.value.is_nan() == value.is_nan() && (value.is_nan() || bad.value >= bound(16)));
            }
        }
    }
    let bad = Tensor::from_slice(&[f32::NAN; 3]).to_kind(Kind::BFloat16);
    assert!(ExactSum::new(layout(3), 1).dense(0, 0, &bad).is_err());
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn the_largest_allowed_leaves_do_not_overflow() {
    let value = (bound(16) as f32).next_down();
    let sums = sum(1, vec![vec![value]; 16].iter());
    assert_eq!(sums[0], 16 * (f64::from(value) / UNIT) as i64);
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn rows_are_added_where_they_belong() {
    let mut sums = ExactSum::new(layout(2 + 4 * 3), 4);
    let gradient = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]).view([2, 3]);
    sums.rows(0, 2, &[1, 3], &gradient).unwrap();
    sums.settle();
    let values: Vec<f64> = sums.bucket(0).iter().map(|&q| q as f64 * UNIT).collect();
    assert_eq!(values, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 4.0, 5.0, 6.0]);
    sums.clear();
    sums.settle();
    assert!(sums.bucket(0).iter().all(|&q| q == 0));
}

/// Two tensors in a bucket; leaves that cover one, both or parts, after a step that left its sums behind.
#[test]
#[cfg(not(feature = "float-sum"))]
fn the_first_leaf_of_a_step_replaces_what_the_last_step_left() {
    let slot = |name: &str, offset, n| TensorSlot { name: name.into(), shape: vec![n], offset };
    let tensors = vec![slot("a", 0, 3), slot("b", 3, 2)];
    let layout = Arc::new(Layout { buckets: vec![Bucket { name: "block.0".into(), tensors, elements: 5 }] });
    let ones = |n: usize, kind| Tensor::ones([n as i64], (kind, Device::Cpu));
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        for (leaves, expected) in [
            (vec![(0, 5)], [1, 1, 1, 1, 1]),
            (vec![(0, 3)], [1, 1, 1, 0, 0]),
            (vec![(3, 2), (3, 2)], [0, 0, 0, 2, 2]),
            (vec![(1, 1), (0, 3)], [1, 2, 1, 0, 0]),
            (vec![(2, 2)], [0, 0, 1, 1, 0]),
            (vec![], [0; 5]),
        ] {
            let mut sums = ExactSum::new(layout.clone(), 4);
            sums.dense(0, 0, &(ones(5, kind) * 7)).unwrap();
            sums.settle();
            sums.clear();
            leaves.iter().for_each(|&(offset, n)| sums.dense(0, offset, &ones(n, kind)).unwrap());
            sums.settle();
            let found: Vec<i64> = sums.bucket(0).iter().map(|q| q >> 48).collect();
            assert_eq!(found, expected, "{leaves:?} in {kind:?}");
        }
    }
}

/// Leaves of all kinds, dense and by rows, over two steps; then a bad one. Kernels run on this processor.
#[test]
#[cfg(not(feature = "float-sum"))]
fn sums_on_a_device_are_those_of_the_host() {
    let _emulated = crate::ops::kernels::emulator::Emulated::begin().unwrap();
    let slot = |name: &str, offset, n| TensorSlot { name: name.into(), shape: vec![n], offset };
    let tensors = vec![slot("a", 0, 30), slot("b", 30, 7), slot("c", 37, 4)];
    let layout = Arc::new(Layout { buckets: vec![Bucket { name: "block.0".into(), tensors, elements: 41 }] });
    let values = |n: i64| Tensor::arange(n, (Kind::Float, Device::Cpu)).sin() * 0.01;
    let step = |sums: &mut ExactSum, step: i64| {
        sums.dense(0, 0, &values(37).to_kind(Kind::BFloat16)).unwrap();
        sums.dense(0, 5, &(values(20) * step)).unwrap();
        sums.rows(0, 0, &[0, 2, 9], &(values(9).view([3, 3]) * 3.0)).unwrap();
        sums.check().unwrap();
        let totals = sums.close(0).unwrap();
        let found = view::elements::<i64>(&totals).to_vec();
        sums.open(0, totals);
        found
    };
    let (mut here, mut away) = (ExactSum::new(layout.clone(), 4), ExactSum::new(layout, 4));
    away.move_to(Device::Cpu, 4).unwrap();
    for number in 1..=2 {
        let expected = step(&mut here, number);
        assert_eq!(step(&mut away, number), expected);
        assert!(expected[..37].iter().any(|&q| q != 0) && expected[37..] == [0; 4]);
    }
    away.dense(0, 0, &Tensor::from_slice(&[1.0f32, f32::NAN])).unwrap();
    assert!(away.check().unwrap_err().1.value.is_nan());
    away.begin();
    away.check().unwrap();
    let large = Tensor::from_slice(&[bound(4) as f32; 3]).view([1, 3]);
    // The first of a wave that is bad is named, whoever comes first.
    away.come_from(&[2]);
    away.rows(0, 0, &[1], &large).unwrap();
    let (good, bad) = (Tensor::from_slice(&[1.0f32]), Tensor::from_slice(&[f32::INFINITY]));
    away.come_from(&[0, 1]);
    away.together(0, 3, &[&good, &bad]).unwrap();
    let (index, bad) = away.check().unwrap_err();
    assert_eq!((index, bad.bucket.as_str()), (1, "block.0"));
    // Those of later waves are counted on.
    away.begin();
    away.end_wave(2);
    away.come_from(&[1]);
    away.dense(0, 0, &Tensor::from_slice(&[f32::NAN])).unwrap();
    assert_eq!(away.check().unwrap_err().0, 3);
}

proptest! {
    /// Of each kind and any number, over two tensors of which the second is fresh.
    #[test]
    #[cfg(not(feature = "float-sum"))]
    fn leaves_added_together_are_leaves_added_one_by_one((leaves, cut) in leaves().prop_flat_map(|(leaves, ..)| {
        let length = leaves[0].len();
        (Just(leaves), 0..=length)
    })) {
        let length = leaves[0].len();
        let slot = |name: &str, offset, length| TensorSlot { name: name.into(), shape: vec![length], offset };
        let tensors = vec![slot("a", 0, cut), slot("b", cut, length - cut)];
        let layout = Arc::new(Layout { buckets: vec![Bucket { name: "block.0".into(), tensors, elements: length }] });
        for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
            let leaves: Vec<Tensor> = leaves.iter().map(|leaf| Tensor::from_slice(leaf).to_kind(kind)).collect();
            let (mut together, mut alone) = (ExactSum::new(layout.clone(), 16), ExactSum::new(layout.clone(), 16));
            let begun = Tensor::from_slice(&vec![1.0f32; cut]);
            for sums in [&mut together, &mut alone] {
                sums.dense(0, 0, &begun).unwrap();
            }
            together.together(0, 0, &leaves.iter().collect::<Vec<_>>()).unwrap();
            leaves.iter().for_each(|leaf| alone.dense(0, 0, leaf).unwrap());
            for sums in [&mut together, &mut alone] {
                sums.settle();
            }
            prop_assert_eq!(together.bucket(0), alone.bucket(0));
        }
    }
}

#[test]
#[cfg(not(feature = "float-sum"))]
fn of_leaves_added_together_the_bad_one_is_named() {
    for bad in 0..6 {
        let leaves: Vec<Tensor> =
            (0..6).map(|i| Tensor::from_slice(&[0.5f32, if i == bad { f32::NAN } else { -0.25 }, 0.0])).collect();
        let mut sums = ExactSum::new(layout(3), 16);
        let refused = sums.together(0, 0, &leaves.iter().collect::<Vec<_>>()).unwrap_err();
        assert_eq!(refused.0, bad);
    }
}
