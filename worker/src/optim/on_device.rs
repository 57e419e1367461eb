//! The exact sum, the norm and AdamW where sums and state lie on a GPU: the same bits as the loops of the host, so where
//! they lie decides nothing.

use super::adamw::Scalars;
use super::noise::{Noise, BLOCK};
use super::state::Form;
use crate::ops::form::small_integers;
use crate::ops::kernels::{blocks, pack, striding, word, Argument, Kernels};
use tch::{Kind, Tensor};
use unisono_configs::model::CHUNK;

/// Adds a leaf, fp32 or bf16, to its `sums`, or sets them to it where it is their first. `peak` `[1]` i32 rises to the bits
/// of the largest magnitude.
pub fn add_leaf(sums: &Tensor, leaf: &Tensor, first: bool, peak: &Tensor) {
    let count = leaf.numel();
    assert_eq!(sums.numel(), count, "a leaf covers exactly its sums");
    assert!(flat([sums, leaf]), "sums and leaf lie in one piece each");
    let together = pack(2, count, &[sums, leaf]);
    let name = format!("add_leaf_{}_{together}", word(leaf.kind()));
    let (length, first) = ((count as i64).into(), usize::from(first).into());
    kernels(sums).launch(&name, striding(count / together), &[sums.into(), leaf.into(), length, first, peak.into()]);
}

/// Adds rows, fp32 `[rows.len(), width]`, to the rows `at` of a matrix of sums; no row comes twice.
pub fn add_rows(sums: &Tensor, at: &[u32], leaf: &Tensor, peak: &Tensor) {
    assert_eq!(leaf.kind(), Kind::Float, "rows come in fp32");
    assert!(flat([sums, leaf]), "sums and rows lie in one piece each");
    let width = leaf.numel() / at.len().max(1);
    let rows = small_integers(at.iter().map(|&row| row as i32), sums);
    let arguments = [sums.into(), leaf.into(), (&rows).into(), width.into(), peak.into()];
    kernels(sums).launch("add_leaf_rows", blocks(at.len(), 256), &arguments);
}

/// Adds as many sums to `sums`.
pub fn add(sums: &Tensor, more: &Tensor) {
    assert_eq!((sums.kind(), sums.numel()), (more.kind(), more.numel()), "sums for sums");
    assert!(flat([sums, more]), "sums lie in one piece each");
    kernels(sums).launch("add_sums", striding(sums.numel()), &[sums.into(), more.into(), (sums.numel() as i64).into()]);
}

/// Rounds the sums of a step to gradients: fp32 or bf16, as many.
pub fn round(sums: &Tensor, gradients: &Tensor) {
    assert_eq!(sums.numel(), gradients.numel(), "a gradient for each sum");
    assert!(flat([sums, gradients]), "sums and gradients lie in one piece each");
    let arguments = [sums.into(), gradients.into(), (sums.numel() as i64).into()];
    kernels(sums).launch(&format!("round_sums_{}", word(gradients.kind())), striding(sums.numel()), &arguments);
}

/// Sums of squares of each chunk of gradients, sums or rounded, as a state of `form` uses them: fp64.
pub fn partials(gradients: &Tensor, form: Form) -> Tensor {
    assert!(flat([gradients]), "gradients lie in one piece");
    let chunks = gradients.numel().div_ceil(CHUNK);
    let partials = Tensor::empty([chunks as i64], (Kind::Double, gradients.device()));
    let arguments = [gradients.into(), (gradients.numel() as i64).into(), (&partials).into()];
    let rounding = if (form, gradients.kind()) == (Form::Narrow, Kind::Int64) { "_narrow" } else { "" };
    let name = format!("squares_of_chunks_{}{rounding}", reduced(gradients));
    kernels(gradients).launch(&name, blocks(chunks.div_ceil(16), 256), &arguments);
    partials
}

/// The elements of one update, equally many of each.
pub struct Span<'a> {
    /// Sums, or rounded from them, before clipping.
    pub gradient: &'a Tensor,
    /// fp32, which are the masters; or bf16: their upper halves, or all there is.
    pub parameter: &'a Tensor,
    /// i16: the lower halves of the masters beside bf16 parameters.
    pub low: Option<&'a Tensor>,
    /// fp32, or bf16 beside bf16 parameters without masters.
    pub m: &'a Tensor,
    pub v: &'a Tensor,
    /// The first one's place in its bucket.
    pub first: usize,
}

/// Applies one update; only a state without masters is rounded at random, by `noise`.
pub fn update(span: &Span<'_>, scalars: &Scalars, noise: &Noise) {
    let count = span.gradient.numel();
    let tensors = [Some(span.gradient), Some(span.parameter), span.low, Some(span.m), Some(span.v)];
    let tensors = tensors.into_iter().flatten();
    assert!(tensors.clone().all(|t| t.numel() == count), "one update of equally many elements");
    assert!(flat(tensors.clone()), "each lies in one piece");
    let form = match (span.parameter.kind(), span.low.is_some(), span.m.kind()) {
        (Kind::Float, false, Kind::Float) => "whole",
        (Kind::BFloat16, true, Kind::Float) => "split",
        (Kind::BFloat16, false, Kind::BFloat16) => "narrow",
        other => unreachable!("no state is kept as {other:?}"),
    };
    let mut arguments: Vec<_> = tensors.map(Into::into).collect();
    arguments.push((count as i64).into());
    let mut work = count;
    if form == "narrow" {
        let Noise { seed, step, bucket } = *noise;
        arguments.extend([span.first as i64, seed as i64, step as i64].map(Argument::from));
        arguments.push(bucket.into());
        // A thread serves two elements.
        work = count.div_ceil(2) + BLOCK;
    }
    arguments.extend(scalars.arguments());
    kernels(span.gradient).launch(&format!("adamw_{form}_{}", reduced(span.gradient)), striding(work), &arguments);
}

fn kernels(beside: &Tensor) -> Kernels {
    Kernels::on(beside).expect("sums and state are on a device only where it has kernels")
}

/// Kernels go over memory from its begin.
fn flat<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    tensors.into_iter().all(Tensor::is_contiguous)
}

fn reduced(gradient: &Tensor) -> &'static str {
    match gradient.kind() {
        Kind::Int64 => "i64",
        other => word(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::kernels::emulator::Emulated;
    use crate::ops::view::elements;
    use crate::optim::adamw::{self, Settings};
    use crate::optim::exact::{self, Exactly, Nearest, UNIT};
    use crate::optim::norm;
    use crate::optim::state::split as halves;
    use half::bf16;
    use tch::Device;

    fn emulated() -> Emulated {
        Emulated::begin().expect("a C++ compiler, as the bindings to libtorch need")
    }

    /// Values over many magnitudes, and the awkward ones.
    fn leaf(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut values: Vec<f32> = (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let sign = if state & 1 == 0 { 1.0 } else { -1.0 };
                sign * ((state >> 8) as f32 / (1 << 24) as f32) * 2f32.powi((state >> 3) as i32 % 40 - 30)
            })
            .collect();
        for (value, special) in
            values.iter_mut().zip([0.0, -0.0, 2f32.powi(-49), 3.0 * 2f32.powi(-49), -2f32.powi(-50)])
        {
            *value = special;
        }
        values
    }

    /// What the host's loops make of leaves that come one after another.
    fn host_sums(leaves: &[Vec<f32>]) -> Vec<i64> {
        let unit = |x: f32| (f64::from(x) / UNIT).round_ties_even() as i64;
        (0..leaves[0].len()).map(|i| leaves.iter().map(|leaf| unit(leaf[i])).sum()).collect()
    }

    #[test]
    fn sums_are_those_of_the_host() {
        let _emulated = emulated();
        for n in [1001, 1024] {
            let leaves = [leaf(n, 1), leaf(n, 2), leaf(n, 3)];
            let sums = Tensor::full([n as i64], 77, (Kind::Int64, Device::Cpu));
            let peak = Tensor::zeros([1], (Kind::Int, Device::Cpu));
            for (i, leaf) in leaves.iter().enumerate() {
                add_leaf(&sums, &Tensor::from_slice(leaf), i == 0, &peak);
            }
            assert_eq!(elements::<i64>(&sums), host_sums(&leaves));
            let most = leaves.iter().flatten().fold(0f32, |most, x| most.max(x.abs()));
            assert_eq!(elements::<i32>(&peak)[0] as u32, most.to_bits());
            let brain: Vec<bf16> = leaves[1].iter().map(|&x| bf16::from_f32(x)).collect();
            add_leaf(&sums, &Tensor::from_slice(&leaves[1]).to_kind(Kind::BFloat16), true, &peak);
            let wide: Vec<f32> = brain.iter().map(|x| x.to_f32()).collect();
            assert_eq!(elements::<i64>(&sums), host_sums(&[wide]));
        }
        let (sums, peak) =
            (Tensor::zeros([4], (Kind::Int64, Device::Cpu)), Tensor::zeros([1], (Kind::Int, Device::Cpu)));
        add_leaf(&sums, &Tensor::from_slice(&[1.0, f32::INFINITY, f32::NAN, 3e38]), true, &peak);
        assert_eq!(elements::<i64>(&sums), [1 << 48, 0, 0, 0], "what no integer holds counts as nothing");
        assert!(f32::from_bits(elements::<i32>(&peak)[0] as u32).is_nan());
    }

    #[test]
    fn rows_go_where_they_belong() {
        let _emulated = emulated();
        let (width, values) = (37, leaf(3 * 37, 5));
        let sums = Tensor::ones([10 * 37], (Kind::Int64, Device::Cpu));
        let peak = Tensor::zeros([1], (Kind::Int, Device::Cpu));
        add_rows(&sums, &[1, 4, 9], &Tensor::from_slice(&values), &peak);
        let mut expected = vec![1i64; 370];
        for (i, row) in [1, 4, 9].into_iter().enumerate() {
            let part = host_sums(&[values[i * width..(i + 1) * width].to_vec()]);
            expected[row * width..(row + 1) * width].iter_mut().zip(part).for_each(|(e, x)| *e += x);
        }
        assert_eq!(elements::<i64>(&sums), expected);
    }

    #[test]
    fn gradients_partials_and_updates_are_those_of_the_host_to_the_bit() {
        let _emulated = emulated();
        let n = CHUNK + 4321;
        let sums = host_sums(&[leaf(n, 7), leaf(n, 8)]);
        let on_device = Tensor::from_slice(&sums);
        let gradients = Tensor::zeros([n as i64], (Kind::Float, Device::Cpu));
        round(&on_device, &gradients);
        let mut rounded = vec![0f32; n];
        exact::round(&sums, &mut rounded);
        assert!(elements::<f32>(&gradients).iter().zip(&rounded).all(|(a, b)| a.to_bits() == b.to_bits()));
        let expected: Vec<f64> = sums.chunks(CHUNK).map(|chunk| norm::partial(chunk, Exactly)).collect();
        for gradient in [&on_device, &gradients] {
            assert_eq!(elements::<f64>(&partials(gradient, Form::Split)), expected);
        }
        let narrow = Tensor::zeros([n as i64], (Kind::BFloat16, Device::Cpu));
        round(&on_device, &narrow);
        let mut rounded = vec![bf16::ZERO; n];
        exact::round_narrow(&sums, &mut rounded);
        assert_eq!(elements::<bf16>(&narrow), rounded);
        let expected: Vec<f64> = sums.chunks(CHUNK).map(|chunk| norm::partial(chunk, Nearest)).collect();
        for gradient in [&on_device, &narrow] {
            assert_eq!(elements::<f64>(&partials(gradient, Form::Narrow)), expected);
        }
        let twice = Tensor::from_slice(&sums);
        add(&twice, &on_device);
        assert!(elements::<i64>(&twice).iter().zip(&sums).all(|(twice, once)| *twice == 2 * once));
        let (form, seed) = (Form::Split, 0);
        let settings =
            Settings { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0, form, seed };
        let scalars = settings.scalars(3, 1e-3, 0.7);
        for gradient in [&on_device, &gradients] {
            whole(&sums, gradient, &scalars);
            split(&sums, gradient, &scalars.without_decay());
        }
        for gradient in [&on_device, &narrow] {
            for begin in [0, 5, 16, 40, 65_549] {
                narrow_from(&sums, gradient, &scalars, begin);
            }
        }
    }

    const NOISE: Noise = Noise { seed: 0x1234_5678_9abc_def0, step: (3 << 32) + 7, bucket: 5 };

    /// Elements from `begin` of a bucket on, whose bits of noise begin anywhere in a group.
    fn narrow_from(sums: &[i64], gradient: &Tensor, scalars: &Scalars, begin: usize) {
        let (sums, count) = (&sums[begin..], (sums.len() - begin) as i64);
        let narrow = |values: Vec<f32>| -> Vec<bf16> { values[begin..].iter().map(|x| bf16::from_f32(*x)).collect() };
        let [mut parameter, mut m, mut v] = state(sums.len() + begin).map(narrow);
        let there = |values: &[bf16]| {
            let tensor = Tensor::zeros([count], (Kind::BFloat16, Device::Cpu));
            crate::ops::view::write(values, &tensor);
            tensor
        };
        let [on_device, first, second] = [&parameter, &m, &v].map(|values| there(values));
        adamw::update_narrow(sums, &mut parameter, &mut m, &mut v, scalars, &NOISE, begin);
        let gradient = &gradient.narrow(0, begin as i64, count);
        let span = Span { gradient, parameter: &on_device, low: None, m: &first, v: &second, first: begin };
        update(&span, scalars, &NOISE);
        let same = |tensor: &Tensor, expected: &[bf16]| {
            elements::<bf16>(tensor).iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits())
        };
        assert!(same(&on_device, &parameter) && same(&first, &m) && same(&second, &v), "from {begin}");
    }

    /// Masters and moments.
    fn state(n: usize) -> [Vec<f32>; 3] {
        [leaf(n, 9), leaf(n, 10), leaf(n, 11).into_iter().map(f32::abs).collect()]
    }

    fn same(found: &Tensor, expected: &[f32]) -> bool {
        elements::<f32>(found).iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits())
    }

    fn whole(sums: &[i64], gradient: &Tensor, scalars: &Scalars) {
        let [mut master, mut m, mut v] = state(sums.len());
        let on_device = [&master, &m, &v].map(|values| Tensor::from_slice(values));
        adamw::update_whole(sums, &mut master, &mut m, &mut v, scalars);
        let [parameter, first, second] = &on_device;
        update(&Span { gradient, parameter, low: None, m: first, v: second, first: 0 }, scalars, &NOISE);
        assert!(same(parameter, &master) && same(first, &m) && same(second, &v));
    }

    fn split(sums: &[i64], gradient: &Tensor, scalars: &Scalars) {
        let [master, mut m, mut v] = state(sums.len());
        let [first, second] = [&m, &v].map(|values| Tensor::from_slice(values));
        let (mut parameter, mut low): (Vec<bf16>, Vec<u16>) = master.iter().map(|x| halves(*x)).unzip();
        let signed = |low: &[u16]| -> Vec<i16> { low.iter().map(|low| *low as i16).collect() };
        let wide: Vec<f32> = parameter.iter().map(|p| p.to_f32()).collect();
        let on_device = Tensor::from_slice(&wide).to_kind(Kind::BFloat16);
        let lower = Tensor::from_slice(&signed(&low));
        adamw::update_split(sums, &mut parameter, &mut low, &mut m, &mut v, scalars);
        let span = Span { gradient, parameter: &on_device, low: Some(&lower), m: &first, v: &second, first: 0 };
        update(&span, scalars, &NOISE);
        assert!(same(&first, &m) && same(&second, &v));
        assert!(elements::<bf16>(&on_device).iter().zip(&parameter).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert_eq!(elements::<i16>(&lower), signed(&low));
    }
}
