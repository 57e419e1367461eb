//! AdamW (Loshchilov & Hutter 2019), element-wise: the fp32 arithmetic of `torch.optim.AdamW`'s single-tensor form, in
//! one pass over gradient, master, moments and parameter.

use super::exact::Reduced;
use crate::ops::kernels::Argument;
use crate::ops::simd::vectorised;
use half::bf16;

/// What stays the same over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// The gradient is scaled to at most this norm; 0 means no clipping.
    pub max_grad_norm: f64,
}

/// One update's scalars, computed in fp64 and rounded once, as torch rounds its Python floats.
#[derive(Debug, Clone, Copy)]
pub struct Scalars {
    clip: f32,
    decay: f32,
    lerp1: f32,
    beta2: f32,
    lerp2: f32,
    root_correction2: f32,
    eps: f32,
    negative_step_size: f32,
}

impl Settings {
    /// Scalars of update number `step` (from 1) with gradients multiplied by `clip`.
    pub fn scalars(&self, step: u64, learning_rate: f64, clip: f64) -> Scalars {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        Scalars {
            clip: clip as f32,
            decay: (1.0 - learning_rate * self.weight_decay) as f32,
            lerp1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            lerp2: (1.0 - self.beta2) as f32,
            root_correction2: correction(self.beta2).sqrt() as f32,
            eps: self.eps as f32,
            negative_step_size: -(learning_rate / correction(self.beta1)) as f32,
        }
    }
}

impl Scalars {
    /// As the kernel takes them.
    pub(super) fn arguments(&self) -> [Argument; 8] {
        let s = self;
        [s.clip, s.decay, s.lerp1, s.beta2, s.lerp2, s.root_correction2, s.eps, s.negative_step_size].map(Into::into)
    }

    /// The same update without weight decay.
    pub fn without_decay(mut self) -> Self {
        self.decay = 1.0;
        self
    }
}

/// How a parameter is stored for computing.
pub trait Parameter: Copy {
    fn from_master(master: f32) -> Self;
}

impl Parameter for f32 {
    #[inline(always)]
    fn from_master(master: f32) -> f32 {
        master
    }
}

impl Parameter for bf16 {
    /// Round to nearest, ties to even; a NaN stays one.
    #[inline(always)]
    fn from_master(master: f32) -> bf16 {
        let bits = master.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if master.is_nan() { quiet } else { rounded } as u16)
    }
}

/// The elements of one update: slices of equal length.
pub struct Span<'a, G, P> {
    /// Before clipping.
    pub gradient: &'a [G],
    pub master: &'a mut [f32],
    pub m: &'a mut [f32],
    pub v: &'a mut [f32],
    pub parameter: &'a mut [P],
}

/// Applies one update to `span`.
pub fn update<G: Reduced, P: Parameter>(span: Span<'_, G, P>, scalars: &Scalars) {
    let Span { gradient, master, m, v, parameter } = span;
    update_slices(gradient, master, m, v, parameter, scalars);
}

vectorised! {
    fn update_slices<G: Reduced, P: Parameter>(
        gradient: &[G], master: &mut [f32], m: &mut [f32], v: &mut [f32], parameter: &mut [P], scalars: &Scalars,
    ) {
        update_plain(gradient, master, m, v, parameter, scalars);
    }
}

#[inline(always)]
fn update_plain<G: Reduced, P: Parameter>(
    gradient: &[G],
    master: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    parameter: &mut [P],
    scalars: &Scalars,
) {
    let n = gradient.len();
    let (master, m, v, parameter) = (&mut master[..n], &mut m[..n], &mut v[..n], &mut parameter[..n]);
    let s = *scalars;
    for i in 0..n {
        let gradient = gradient[i].gradient() * s.clip;
        let first = m[i] + s.lerp1 * (gradient - m[i]);
        let second = v[i] * s.beta2 + s.lerp2 * gradient * gradient;
        let denominator = second.sqrt() / s.root_correction2 + s.eps;
        let next = master[i] * s.decay + s.negative_step_size * first / denominator;
        m[i] = first;
        v[i] = second;
        master[i] = next;
        parameter[i] = P::from_master(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::exact::UNIT;
    use tch::{Kind, Tensor};

    const N: usize = 1000;

    fn settings() -> Settings {
        Settings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 0.0 }
    }

    fn numbers(seed: usize, scale: f64) -> Vec<f64> {
        (0..N).map(|i| ((seed * N + i) as f64 * 0.7310).sin() * scale * (1.0 + (i % 7) as f64)).collect()
    }

    /// torch's own formula in fp64 on tch tensors.
    fn oracle(master: &mut Tensor, m: &mut Tensor, v: &mut Tensor, gradient: &Tensor, step: i32, lr: f64) {
        let c = settings();
        *master = &*master * (1.0 - lr * c.weight_decay);
        *m = m.lerp(gradient, 1.0 - c.beta1);
        *v = &*v * c.beta2 + gradient * gradient * (1.0 - c.beta2);
        let denominator = v.sqrt() / (1.0 - c.beta2.powi(step)).sqrt() + c.eps;
        *master = &*master - m.g_div(&denominator) * (lr / (1.0 - c.beta1.powi(step)));
    }

    fn run<P: Parameter + Default>(steps: u64) -> (Vec<f32>, Vec<P>, Tensor) {
        let start: Vec<f32> = numbers(99, 0.02).iter().map(|&x| x as f32).collect();
        let (mut master, mut m, mut v) = (start.clone(), vec![0f32; N], vec![0f32; N]);
        let mut parameter = vec![P::default(); N];
        let mut exact = Tensor::from_slice(&start).to_kind(Kind::Double);
        let (mut exact_m, mut exact_v) = (exact.zeros_like(), exact.zeros_like());
        for step in 1..=steps {
            let gradient = numbers(step as usize, 1e-3);
            let sums: Vec<i64> = gradient.iter().map(|g| (g / UNIT).round_ties_even() as i64).collect();
            let span = Span { gradient: &sums, master: &mut master, m: &mut m, v: &mut v, parameter: &mut parameter };
            update(span, &settings().scalars(step, 1e-3, 1.0));
            oracle(&mut exact, &mut exact_m, &mut exact_v, &Tensor::from_slice(&gradient), step as i32, 1e-3);
        }
        (master, parameter, exact)
    }

    #[test]
    fn twenty_steps_follow_torch_s_formula_in_fp64() {
        let (master, parameter, exact) = run::<f32>(20);
        assert_eq!(master, parameter);
        let exact = Vec::<f64>::try_from(&exact).unwrap();
        for (i, (&x, &e)) in master.iter().zip(&exact).enumerate() {
            // Each of 20 updates rounds twice to within half an ulp of the parameter, and moves it by 1e-3 at most.
            let ulp = f64::from(f32::EPSILON) * e.abs().max(1e-3);
            assert!((f64::from(x) - e).abs() < 20.0 * ulp, "element {i}: {x} against {e}");
        }
    }

    #[test]
    fn the_bf16_parameter_is_the_rounded_master() {
        let (master, parameter, _) = run::<bf16>(3);
        for (x, p) in master.iter().zip(&parameter) {
            assert_eq!(bf16::from_f32(*x).to_bits(), p.to_bits());
        }
        for special in [f32::NAN, f32::INFINITY, -0.0, 1.0039063, 1.0117188, f32::MAX] {
            let (ours, theirs) = (bf16::from_master(special), bf16::from_f32(special));
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{special}");
        }
    }

    #[test]
    fn instruction_sets_and_forms_of_the_gradient_agree_and_clipping_scales_it() {
        let sums: Vec<i64> = numbers(3, 1e-3).iter().map(|g| (g / UNIT) as i64).collect();
        let quarter: Vec<i64> = sums.iter().map(|q| q - q % 4).collect();
        fn run<G: Reduced>(gradient: &[G], clip: f64, plain: bool) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
            let mut p = vec![0.5f32; N];
            let (mut master, mut m, mut v) = (vec![0.5f32; N], vec![0.01f32; N], vec![0.02f32; N]);
            let scalars = settings().scalars(7, 1e-2, clip);
            if plain {
                update_plain(gradient, &mut master, &mut m, &mut v, &mut p, &scalars);
            } else {
                update(Span { gradient, master: &mut master, m: &mut m, v: &mut v, parameter: &mut p }, &scalars);
            }
            (master, m, v)
        }
        assert_eq!(run(&sums, 1.0, true), run(&sums, 1.0, false));
        let rounded: Vec<f32> = sums.iter().map(|q| q.gradient()).collect();
        assert_eq!(run(&sums, 0.3, false), run(&rounded, 0.3, false));
        let divided: Vec<i64> = quarter.iter().map(|q| q / 4).collect();
        assert_eq!(run(&quarter, 0.25, false), run(&divided, 1.0, false));
    }
}
