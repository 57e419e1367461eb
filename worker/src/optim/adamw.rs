//! AdamW (Loshchilov & Hutter 2019), element-wise: the fp32 arithmetic of `torch.optim.AdamW`'s single-tensor form, in
//! one pass over gradient, parameter and state.

use super::exact::{Nearest, Reduced, Rounding};
use super::noise::{self, Bits, Noise, BLOCK};
use super::state::{join, split, Form};
use crate::ops::kernels::Argument;
use crate::ops::simd::{vectorised, Narrow};
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
    /// How the state is kept.
    pub form: Form,
    /// Of stochastic rounding.
    pub seed: u64,
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

/// A parameter's master and moments after one update, from those before it.
#[inline(always)]
fn advance(s: &Scalars, gradient: f32, master: f32, m: f32, v: f32) -> (f32, f32, f32) {
    let gradient = gradient * s.clip;
    let first = m + s.lerp1 * (gradient - m);
    let second = v * s.beta2 + s.lerp2 * gradient * gradient;
    let denominator = second.sqrt() / s.root_correction2 + s.eps;
    (master * s.decay + s.negative_step_size * first / denominator, first, second)
}

vectorised! {
    /// Applies one update where the parameters are the masters. All slices are of equal length; gradients are not clipped
    /// yet.
    pub fn update_whole<G: Reduced>(gradient: &[G], parameter: &mut [f32], m: &mut [f32], v: &mut [f32], s: &Scalars) {
        let n = gradient.len();
        let (parameter, m, v) = (&mut parameter[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            (parameter[i], m[i], v[i]) = advance(s, gradient[i].gradient(), parameter[i], m[i], v[i]);
        }
    }
}

vectorised! {
    /// Applies one update where the masters are parameters and their lower halves.
    pub fn update_split<G: Reduced>(
        gradient: &[G], parameter: &mut [bf16], low: &mut [u16], m: &mut [f32], v: &mut [f32], s: &Scalars,
    ) {
        let n = gradient.len();
        let (parameter, low, m, v) = (&mut parameter[..n], &mut low[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            let master = join(parameter[i], low[i]);
            let (master, first, second) = advance(s, gradient[i].gradient(), master, m[i], v[i]);
            (parameter[i], low[i]) = split(master);
            (m[i], v[i]) = (first, second);
        }
    }
}

vectorised! {
    /// Applies one update where parameters and moments are bf16 and there are no masters: gradients are rounded to nearest,
    /// what is written stochastically. The slices begin with element `first` of the bucket.
    pub fn update_narrow<G: Reduced>(
        gradient: &[G], parameter: &mut [bf16], m: &mut [bf16], v: &mut [bf16], s: &Scalars, noise: &Noise, first: usize,
    ) {
        let n = gradient.len();
        let (parameter, m, v) = (&mut parameter[..n], &mut m[..n], &mut v[..n]);
        let (mut bits, mut gradients, mut begin) = (Bits::default(), [0f32; BLOCK], 0);
        while begin < n {
            let end = n.min((first + begin) / BLOCK * BLOCK + BLOCK - first);
            let at = noise.fill(&(first + begin..first + end), &mut bits);
            let (ones, twos) = (&bits.first[at..at + end - begin], &bits.second[at..at + end - begin]);
            // Apart from what follows: widths from 8 bytes to 2 in one loop fit no register.
            let gradients = &mut gradients[..end - begin];
            gradients.iter_mut().zip(&gradient[begin..end]).for_each(|(to, g)| *to = Nearest.round(g.gradient()));
            let parameter = &mut parameter[begin..end];
            let (m, v) = (&mut m[begin..end], &mut v[begin..end]);
            for i in 0..end - begin {
                let (master, first, second) = advance(s, gradients[i], parameter[i].load(), m[i].load(), v[i].load());
                parameter[i] = noise::round(master, ones[i]);
                m[i] = noise::round(first, ones[i] >> 16);
                v[i] = noise::round(second, twos[i]);
            }
            begin = end;
        }
    }
}

#[cfg(test)]
#[path = "adamw_tests.rs"]
mod tests;
