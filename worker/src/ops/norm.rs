//! Root-mean-square norm (Zhang and Sennrich 2019) together with the residual addition before it.
//!
//! Shapes: `T` rows, `H` columns. The residual stream, statistics and weight gradients are wide (fp32, or fp64 in
//! tests); what a matrix product reads or wrote is of the compute kind.

use super::form::Form;
use super::kernels::{blocks, can_share, pack, word, Kernels};
use super::rows::{sum_slabs, SLAB};
use super::simd::{dot, vectorised, Narrow, LANES};
use super::view::{elements, elements_mut};
use half::bf16;
use tch::{Kind, Tensor};

/// What is added to the residual before the norm: the output of a matrix product `[T, H]` and its bias `[H]`.
#[derive(Clone, Copy)]
pub struct Addend<'a> {
    pub output: &'a Tensor,
    pub bias: Option<&'a Tensor>,
}

/// What the forward pass writes.
pub struct Normed<'a> {
    /// `input + addend`: wide `[T, H]`; none where there is no addend.
    pub residual: Option<&'a mut Tensor>,
    /// 1 / root of the mean square: wide `[T]`.
    pub rstd: &'a mut Tensor,
    /// `residual * rstd * weight`: `[T, H]` of the compute kind.
    pub output: &'a mut Tensor,
}

/// Adds `addend` to the wide `input` `[T, H]` and norms the sum by `weight` `[H]`.
pub fn forward(input: &Tensor, addend: Option<Addend<'_>>, weight: &Tensor, eps: f64, out: Normed<'_>) {
    if let Some(kernels) = Kernels::on(weight).filter(|_| can_share(weight.numel())) {
        return forward_kernel(kernels, input, addend, weight, eps, out);
    }
    match Form::of(weight) {
        Form::Single => forward_fast::<f32>(input, addend, weight, eps, out),
        Form::Brain => forward_fast::<bf16>(input, addend, weight, eps, out),
        Form::Aten => forward_slow(input, addend, weight, eps, out),
    }
}

fn forward_fast<C: Narrow>(input: &Tensor, addend: Option<Addend<'_>>, weight: &Tensor, eps: f64, out: Normed<'_>) {
    let zeros = vec![C::default(); weight.numel()];
    let (rstd, output) = (elements_mut(out.rstd), elements_mut(out.output));
    let weight = elements::<C>(weight);
    match (addend, out.residual) {
        (Some(add), Some(residual)) => {
            let bias = add.bias.map_or(zeros.as_slice(), elements::<C>);
            let (input, add, residual) = (elements(input), elements::<C>(add.output), elements_mut(residual));
            add_and_norm_rows(input, add, bias, residual, weight, eps as f32, rstd, output);
        }
        (None, None) => norm_rows(elements(input), weight, eps as f32, rstd, output),
        _ => unreachable!("an addend has a residual to be written to"),
    }
}

vectorised! {
    fn add_and_norm_rows<C: Narrow>(
        input: &[f32],
        add: &[C],
        bias: &[C],
        residual: &mut [f32],
        weight: &[C],
        eps: f32,
        rstd: &mut [f32],
        output: &mut [C],
    ) {
        let width = bias.len();
        let inputs = input.chunks_exact(width).zip(add.chunks_exact(width));
        let outputs = residual.chunks_exact_mut(width).zip(output.chunks_exact_mut(width)).zip(rstd);
        for ((input, add), ((residual, out), rstd)) in inputs.zip(outputs) {
            for (((r, x), a), b) in residual.iter_mut().zip(input).zip(add).zip(bias) {
                *r = x + (a.load() + b.load());
            }
            *rstd = norm_row(residual, weight, eps, out);
        }
    }
}

vectorised! {
    fn norm_rows<C: Narrow>(residual: &[f32], weight: &[C], eps: f32, rstd: &mut [f32], output: &mut [C]) {
        let width = weight.len();
        let rows = residual.chunks_exact(width).zip(output.chunks_exact_mut(width)).zip(rstd);
        for ((x, out), rstd) in rows {
            *rstd = norm_row(x, weight, eps, out);
        }
    }
}

#[inline(always)]
fn norm_row<C: Narrow>(x: &[f32], weight: &[C], eps: f32, out: &mut [C]) -> f32 {
    let rstd = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = C::store(x * rstd * w.load());
    }
    rstd
}

fn forward_kernel(
    kernels: Kernels,
    input: &Tensor,
    addend: Option<Addend<'_>>,
    weight: &Tensor,
    eps: f64,
    out: Normed<'_>,
) {
    let (rows, width) = (out.rstd.numel(), weight.numel());
    let (add, bias) = (addend.map(|a| a.output), addend.and_then(|a| a.bias));
    let residual = out.residual.map(|r| &*r);
    let read: Vec<&Tensor> =
        [Some(input), Some(weight), Some(&*out.output), add, residual].into_iter().flatten().collect();
    let together = pack(4, width, &read);
    let name = format!("norm_forward_{}_{together}", word(weight.kind()));
    kernels.launch(
        &name,
        blocks(rows, 256).sharing(width),
        &[
            input.into(),
            add.into(),
            bias.into(),
            weight.into(),
            (eps as f32).into(),
            residual.into(),
            (&*out.rstd).into(),
            (&*out.output).into(),
            width.into(),
        ],
    );
}

/// As [`forward`], in ATen calls of any kind.
pub fn forward_slow(input: &Tensor, addend: Option<Addend<'_>>, weight: &Tensor, eps: f64, out: Normed<'_>) {
    let wide = input.kind();
    let mut sum = input.shallow_clone();
    if let Some(add) = addend {
        sum = input + add.output.to_kind(wide);
        if let Some(bias) = add.bias {
            sum += bias.to_kind(wide);
        }
    }
    if let Some(residual) = out.residual {
        residual.copy_(&sum);
    }
    let rstd = (sum.square().mean_dim([-1i64].as_slice(), true, wide) + eps).rsqrt();
    out.output.copy_(&(&sum * &rstd * weight.to_kind(wide)));
    out.rstd.copy_(&rstd.squeeze_dim(-1));
}

/// What the backward pass reads: the forward pass's residual `[T, H]`, its `rstd` `[T]` and weight `[H]`.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    pub residual: &'a Tensor,
    pub rstd: &'a Tensor,
    pub weight: &'a Tensor,
}

/// Adds the norm's part to the wide gradient of the residual `[T, H]`, writes that sum rounded to the compute kind to
/// `rounded`, and writes the weight's gradient: wide `[H]`, rows added from first to last.
pub fn backward(
    grad_output: &Tensor,
    saved: Saved<'_>,
    grad_residual: &mut Tensor,
    rounded: &mut Tensor,
    grad_weight: &mut Tensor,
) {
    if let Some(kernels) = Kernels::on(saved.weight).filter(|_| can_share(saved.weight.numel())) {
        return backward_kernel(kernels, grad_output, saved, grad_residual, rounded, grad_weight);
    }
    match Form::of(saved.weight) {
        Form::Single => backward_fast::<f32>(grad_output, saved, grad_residual, rounded, grad_weight),
        Form::Brain => backward_fast::<bf16>(grad_output, saved, grad_residual, rounded, grad_weight),
        Form::Aten => backward_slow(grad_output, saved, grad_residual, rounded, grad_weight),
    }
}

fn backward_fast<C: Narrow>(
    grad_output: &Tensor,
    saved: Saved<'_>,
    grad_residual: &mut Tensor,
    rounded: &mut Tensor,
    grad_weight: &mut Tensor,
) {
    backward_rows(
        elements::<C>(grad_output),
        elements(saved.residual),
        elements(saved.rstd),
        elements::<C>(saved.weight),
        elements_mut(grad_residual),
        elements_mut(rounded),
        elements_mut(grad_weight),
    );
}

vectorised! {
    fn backward_rows<C: Narrow>(
        grad_output: &[C],
        residual: &[f32],
        rstd: &[f32],
        weight: &[C],
        grad_residual: &mut [f32],
        rounded: &mut [C],
        grad_weight: &mut [f32],
    ) {
        let width = weight.len();
        grad_weight.fill(0.0);
        let inputs = grad_output.chunks_exact(width).zip(residual.chunks_exact(width)).zip(rstd);
        let outputs = grad_residual.chunks_exact_mut(width).zip(rounded.chunks_exact_mut(width));
        for (((dy, x), &rstd), (dx, rounded)) in inputs.zip(outputs) {
            let along = product(dy, x, weight) * rstd / width as f32;
            for ((((dy, x), w), dw), (dx, out)) in
                dy.iter().zip(x).zip(weight).zip(&mut *grad_weight).zip(dx.iter_mut().zip(rounded))
            {
                let (dy, unit) = (dy.load(), x * rstd);
                *dw += dy * unit;
                *dx += rstd * (dy * w.load() - unit * along);
                *out = C::store(*dx);
            }
        }
    }
}

/// The sum of `a * b * c` over three equally long rows.
#[inline(always)]
pub(super) fn product<A: Narrow, C: Narrow>(a: &[A], b: &[f32], c: &[C]) -> f32 {
    let (((a, a_tail), (b, b_tail)), (c, c_tail)) =
        ((a.as_chunks::<LANES>(), b.as_chunks::<LANES>()), c.as_chunks::<LANES>());
    let mut lanes = [0.0f32; LANES];
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for l in 0..LANES {
            lanes[l] = (a[l].load() * c[l].load()).mul_add(b[l], lanes[l]);
        }
    }
    for (l, ((a, b), c)) in a_tail.iter().zip(b_tail).zip(c_tail).enumerate() {
        lanes[l] = (a.load() * c.load()).mul_add(*b, lanes[l]);
    }
    super::simd::fold(lanes)
}

/// Weight gradients of slabs of rows, then their sum.
fn backward_kernel(
    kernels: Kernels,
    grad_output: &Tensor,
    saved: Saved<'_>,
    grad_residual: &mut Tensor,
    rounded: &mut Tensor,
    grad_weight: &mut Tensor,
) {
    let (rows, width) = (saved.rstd.numel(), saved.weight.numel());
    let slabs = rows.div_ceil(SLAB);
    let partial = Tensor::empty([slabs as i64, width as i64], (Kind::Float, saved.residual.device()));
    let together = pack(4, width, &[grad_output, saved.residual, saved.weight, grad_residual, rounded]);
    let name = format!("norm_backward_{}_{together}", word(saved.weight.kind()));
    kernels.launch(
        &name,
        blocks(slabs, 256).sharing(width),
        &[
            grad_output.into(),
            saved.residual.into(),
            saved.rstd.into(),
            saved.weight.into(),
            (&*grad_residual).into(),
            (&*rounded).into(),
            (&partial).into(),
            rows.into(),
            width.into(),
            SLAB.into(),
        ],
    );
    sum_slabs(kernels, &partial, grad_weight);
}

/// As [`backward`], in ATen calls of any kind.
pub fn backward_slow(
    grad_output: &Tensor,
    saved: Saved<'_>,
    grad_residual: &mut Tensor,
    rounded: &mut Tensor,
    grad_weight: &mut Tensor,
) {
    let wide = saved.residual.kind();
    let (dy, rstd) = (grad_output.to_kind(wide), saved.rstd.unsqueeze(-1));
    let unit = saved.residual * &rstd;
    grad_weight.copy_(&(&dy * &unit).sum_dim_intlist([0i64].as_slice(), false, wide));
    let scaled = dy * saved.weight.to_kind(wide);
    let along = (&scaled * &unit).mean_dim([-1i64].as_slice(), true, wide);
    *grad_residual += (scaled - unit * along) * rstd;
    rounded.copy_(grad_residual);
}
