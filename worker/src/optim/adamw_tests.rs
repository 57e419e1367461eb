//! AdamW against torch's formula in fp64, each form of the state against the others, and stochastic rounding's mean.

use super::*;
use crate::optim::exact::UNIT;
use crate::optim::noise::GROUP;
use crate::optim::state::round_all;
use tch::{Kind, Tensor};

const N: usize = 1000;

fn settings() -> Settings {
    Settings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 0.0, form: Form::Whole, seed: 0 }
}

fn numbers(seed: usize, scale: f64) -> Vec<f64> {
    (0..N).map(|i| ((seed * N + i) as f64 * 0.7310).sin() * scale * (1.0 + (i % 7) as f64)).collect()
}

fn sums(seed: usize) -> Vec<i64> {
    numbers(seed, 1e-3).iter().map(|g| (g / UNIT).round_ties_even() as i64).collect()
}

fn start() -> Vec<f32> {
    numbers(99, 0.02).iter().map(|&x| x as f32).collect()
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

/// Masters after some steps of 1e-3, of which `gradient` gives the gradients.
fn exact(steps: u64, start: &[f32], gradient: impl Fn(u64) -> Vec<f64>) -> Vec<f64> {
    let mut master = Tensor::from_slice(start).to_kind(Kind::Double);
    let (mut m, mut v) = (master.zeros_like(), master.zeros_like());
    for step in 1..=steps {
        oracle(&mut master, &mut m, &mut v, &Tensor::from_slice(&gradient(step)), step as i32, 1e-3);
    }
    Vec::try_from(&master).unwrap()
}

/// Masters and moments after twenty steps.
fn whole() -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (mut master, mut m, mut v) = (start(), vec![0f32; N], vec![0f32; N]);
    for step in 1..=20 {
        update_whole(&sums(step as usize), &mut master, &mut m, &mut v, &settings().scalars(step, 1e-3, 1.0));
    }
    (master, m, v)
}

#[test]
fn twenty_steps_follow_torch_s_formula_in_fp64() {
    let (master, ..) = whole();
    let exact = exact(20, &start(), |step| numbers(step as usize, 1e-3));
    for (i, (&x, &e)) in master.iter().zip(&exact).enumerate() {
        // Each of 20 updates rounds twice to within half an ulp of the parameter, and moves it by 1e-3 at most.
        let ulp = f64::from(f32::EPSILON) * e.abs().max(1e-3);
        assert!((f64::from(x) - e).abs() < 20.0 * ulp, "element {i}: {x} against {e}");
    }
}

#[test]
fn a_split_master_is_the_whole_one() {
    let (mut low, mut m, mut v) = (vec![0u16; N], vec![0f32; N], vec![0f32; N]);
    let mut parameter = vec![bf16::ZERO; N];
    for (i, x) in start().into_iter().enumerate() {
        (parameter[i], low[i]) = split(x);
    }
    for step in 1..=20 {
        let scalars = settings().scalars(step, 1e-3, 1.0);
        update_split(&sums(step as usize), &mut parameter, &mut low, &mut m, &mut v, &scalars);
    }
    let masters: Vec<f32> = parameter.iter().zip(&low).map(|(p, low)| join(*p, *low)).collect();
    assert_eq!((masters.clone(), m, v), whole());
    let mut rounded = vec![bf16::ZERO; N];
    round_all(&masters, &mut rounded);
    assert_eq!(rounded, parameter);
}

/// One update, element by element.
fn twin(gradient: &[f32], state: &(Vec<f32>, Vec<f32>, Vec<f32>), s: &Scalars) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (mut master, mut m, mut v) = state.clone();
    for i in 0..gradient.len() {
        (master[i], m[i], v[i]) = advance(s, gradient[i], master[i], m[i], v[i]);
    }
    (master, m, v)
}

#[test]
fn instruction_sets_and_forms_of_the_gradient_agree_and_clipping_scales_it() {
    fn run<G: Reduced>(gradient: &[G], clip: f64) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (mut p, mut m, mut v) = (vec![0.5f32; N], vec![0.01f32; N], vec![0.02f32; N]);
        update_whole(gradient, &mut p, &mut m, &mut v, &settings().scalars(7, 1e-2, clip));
        (p, m, v)
    }
    let rounded: Vec<f32> = sums(3).iter().map(|q| q.gradient()).collect();
    let before = (vec![0.5f32; N], vec![0.01f32; N], vec![0.02f32; N]);
    assert_eq!(twin(&rounded, &before, &settings().scalars(7, 1e-2, 0.3)), run(&sums(3), 0.3));
    assert_eq!(run(&sums(3), 0.3), run(&rounded, 0.3));
    let quarter: Vec<i64> = sums(3).iter().map(|q| q - q % 4).collect();
    let divided: Vec<i64> = quarter.iter().map(|q| q / 4).collect();
    assert_eq!(run(&quarter, 0.25), run(&divided, 1.0));
}

/// bf16 parameters and moments from 0.5, 0.01 and 0.02 after one update.
fn narrow(gradient: &[i64], noise: Noise, first: usize, s: &Scalars) -> [Vec<bf16>; 3] {
    let of = |x: f32| vec![bf16::from_f32(x); gradient.len()];
    let (mut p, mut m, mut v) = (of(0.5), of(0.01), of(0.02));
    update_narrow(gradient, &mut p, &mut m, &mut v, s, &noise, first);
    [p, m, v]
}

#[test]
fn a_narrow_update_is_the_wide_one_rounded_by_each_element_s_own_bits() {
    let (s, noise) = (settings().scalars(7, 1e-2, 0.3), Noise { seed: 3, step: 7, bucket: 1 });
    let gradient = sums(3);
    let nearest: Vec<f32> = gradient.iter().map(|q| bf16::from_f32(q.gradient()).to_f32()).collect();
    let of = |x: f32| vec![bf16::from_f32(x).to_f32(); N];
    let (p, m, v) = twin(&nearest, &(of(0.5), of(0.01), of(0.02)), &s);
    let first = 5 * BLOCK - 77;
    let found = narrow(&gradient, noise, first, &s);
    for i in 0..N {
        // Of each element alone, from a group that begins with it or before it.
        let (mut bits, at) = (Bits::default(), first + i);
        let place = noise.fill(&(at..at + 1), &mut bits);
        assert!(place < GROUP);
        let (one, two) = (bits.first[place], bits.second[place]);
        let rounded = [noise::round(p[i], one), noise::round(m[i], one >> 16), noise::round(v[i], two)];
        assert_eq!([found[0][i], found[1][i], found[2][i]], rounded, "element {i}");
    }
    // Any cut of the range gives the same: shards begin where they like.
    for cut in [1, 31, 77, 78, 500] {
        let (head, tail) = gradient.split_at(cut);
        let (mut a, b) = (narrow(head, noise, first, &s), narrow(tail, noise, first + cut, &s));
        a.iter_mut().zip(b).for_each(|(a, b)| a.extend(b));
        assert_eq!(a, found, "cut after {cut}");
    }
}

/// Each number that is written is right in the mean: over many seeds one update is that of fp64, and twenty stay near.
#[test]
fn the_mean_over_seeds_is_that_of_fp64() {
    let gradient = |step: u64| -> Vec<f64> {
        let rounded = sums(step as usize).into_iter().map(|q| bf16::from_f32(q.gradient()).to_f64());
        rounded.collect()
    };
    let begin: Vec<bf16> = start().into_iter().map(bf16::from_f32).collect();
    let wide: Vec<f32> = begin.iter().map(|p| p.to_f32()).collect();
    for (steps, seeds) in [(1u64, 2000u64), (20, 400)] {
        let expected = exact(steps, &wide, gradient);
        let mut mean = vec![0f64; N];
        for seed in 0..seeds {
            let (mut p, mut m, mut v) = (begin.clone(), vec![bf16::ZERO; N], vec![bf16::ZERO; N]);
            for step in 1..=steps {
                let scalars = settings().scalars(step, 1e-3, 1.0);
                let noise = Noise { seed, step, bucket: 0 };
                update_narrow(&sums(step as usize), &mut p, &mut m, &mut v, &scalars, &noise, 0);
            }
            mean.iter_mut().zip(&p).for_each(|(mean, p)| *mean += p.to_f64() / seeds as f64);
        }
        let mut z = vec![];
        for (i, (found, exact)) in mean.iter().zip(&expected).enumerate() {
            // Rounding strays by at most one unit in bf16's last place each step; as a random walk by half of that.
            let unit = f64::from(bf16::from_f32(wide[i]).to_f32().abs().max(1e-3)) / 128.0;
            let deviation = 0.5 * unit * (steps as f64).sqrt() / (seeds as f64).sqrt();
            z.push((found - exact) / deviation);
            assert!(z[i].abs() < 6.0, "{steps} steps: element {i} is {found} in the mean, {exact} exactly");
        }
        let bias = z.iter().sum::<f64>() / N as f64;
        assert!(bias.abs() < 0.2, "{steps} steps: all are off by {bias} deviations");
    }
    // Rounding to nearest instead is what this is for: it would lose the moments' slow changes.
    let stuck = bf16::from_f32(bf16::from_f32(0.02).to_f32() * 0.999);
    assert_eq!(stuck, bf16::from_f32(0.02));
}
