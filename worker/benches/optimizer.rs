//! What a step costs beside the model, per element on one core: `cargo bench -p unisono-worker --bench optimizer`.
//! Elements can be given in millions: `-- 47`.
#![allow(clippy::print_stdout)]

use half::bf16;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Bucket, Layout, TensorSlot};
use unisono_worker::collective::tcp::{listen, Membership, Mesh, Stopper};
use unisono_worker::collective::Collective;
use unisono_worker::model::Leaves;
use unisono_worker::optim::adamw::{update_narrow, update_split, update_whole, Settings};
use unisono_worker::optim::exact::{ExactSum, Exactly};
use unisono_worker::optim::noise::Noise;
use unisono_worker::optim::norm;
use unisono_worker::optim::state::{round_all, Form};

fn main() {
    let millions = std::env::args().skip(1).find_map(|a| a.parse::<f64>().ok()).unwrap_or(16.0);
    let n = (millions * 1e6) as usize;
    tch::set_num_threads(1);
    println!("{millions} million elements");
    sums(n);
    optimizer(n);
    exchange(n, false);
    exchange(n, true);
}

/// Gradients of a usual size: below 2e-4.
fn gradient(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) as f32 / u32::MAX as f32 - 0.5) * 4e-4).collect()
}

fn report(what: &str, n: usize, mut work: impl FnMut()) {
    work();
    let times = (0..5).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    });
    let least = times.fold(f64::INFINITY, f64::min);
    println!("{what:38} {:8.1} ms {:6.2} ns per element", least * 1e3, least / n as f64 * 1e9);
}

fn sums(n: usize) {
    let tensors = vec![TensorSlot { name: "w".into(), shape: vec![n], offset: 0 }];
    let layout = Arc::new(Layout { buckets: vec![Bucket { name: "block.0".into(), tensors, elements: n }] });
    let mut sums = ExactSum::new(layout, 8);
    let wide = Tensor::from_slice(&gradient(n));
    let narrow = wide.to_kind(Kind::BFloat16);
    report("first fp32 leaf", n, || {
        sums.clear();
        sums.dense(0, 0, &wide).expect("small values");
    });
    report("add an fp32 leaf", n, || sums.dense(0, 0, &wide).expect("small values"));
    report("add a bf16 leaf", n, || sums.dense(0, 0, &narrow).expect("small values"));
    report("add four bf16 leaves together", n, || sums.together(0, 0, &[&narrow; 4]).expect("small values"));
    report("norm", n, || {
        let partials = sums.bucket(0).chunks(unisono_configs::model::CHUNK).map(|chunk| norm::partial(chunk, Exactly));
        assert!(norm::norm(partials) > 0.0);
    });
}

fn optimizer(n: usize) {
    let (form, seed) = (Form::Whole, 0);
    let settings = Settings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0, form, seed };
    let scalars = settings.scalars(10, 1e-4, 0.5);
    let sums = vec![1i64 << 30; n];
    let (mut m, mut v) = (vec![1e-3f32; n], vec![1e-6f32; n]);
    let mut narrow = vec![bf16::ONE; n];
    let mut wide = vec![0.1f32; n];
    report("AdamW, fp32 parameter", n, || update_whole(&sums, &mut wide, &mut m, &mut v, &scalars));
    // What it would cost to keep whole masters beside bf16 parameters.
    report("AdamW, fp32 master, bf16 copy", n, || {
        for begin in (0..n).step_by(1 << 10) {
            let at = begin..n.min(begin + (1 << 10));
            update_whole(&sums[at.clone()], &mut wide[at.clone()], &mut m[at.clone()], &mut v[at.clone()], &scalars);
            round_all(&wide[at.clone()], &mut narrow[at]);
        }
    });
    drop(wide);
    let mut low = vec![0u16; n];
    report("AdamW, bf16 parameter", n, || update_split(&sums, &mut narrow, &mut low, &mut m, &mut v, &scalars));
    drop((low, m, v));
    let (mut m, mut v) = (vec![bf16::from_f32(1e-3); n], vec![bf16::from_f32(1e-6); n]);
    let noise = Noise { seed: 1, step: 10, bucket: 0 };
    report("AdamW, bf16 state", n, || update_narrow(&sums, &mut narrow, &mut m, &mut v, &scalars, &noise, 0));
    let gradient = vec![bf16::from_f32(1e-4); n];
    report("AdamW, bf16 state and gradient", n, || {
        update_narrow(&gradient, &mut narrow, &mut m, &mut v, &scalars, &noise, 0);
    });
    let gradient = vec![1e-4f32; n];
    let (mut m, mut v) = (vec![1e-3f32; n], vec![1e-6f32; n]);
    let mut low = vec![0u16; n];
    report("AdamW, bf16 parameter, fp32 gradient", n, || {
        update_split(&gradient, &mut narrow, &mut low, &mut m, &mut v, &scalars);
    });
}

/// Two ranks on loopback, a thread each; where it `lends`, they read from memory.
fn exchange(n: usize, lends: bool) {
    let listeners: Vec<_> = (0..2).map(|_| listen("127.0.0.1").expect("loopback")).collect();
    let addresses: Vec<_> = listeners.iter().map(|(_, address)| address.clone()).collect();
    let owners: Vec<Range<usize>> = vec![0..n / 2, n / 2..n];
    std::thread::scope(|scope| {
        for (rank, (listener, _)) in listeners.into_iter().enumerate() {
            let timeout = Duration::from_secs(60);
            let addresses = addresses.clone();
            let membership = Membership { rank, addresses, key: [1; 32], term: 1, generation: 1, timeout, lends };
            let owners = &owners;
            scope.spawn(move || {
                let mut mesh = Mesh::meet(&listener, &membership, &Stopper::default()).expect("two ranks meet");
                let values: Vec<i64> = gradient(n).iter().map(|g| (g * (1u64 << 48) as f32) as i64).collect();
                let (mut reduces, mut gathers) = (vec![], vec![]);
                let mut parameters = Tensor::zeros([n as i64], (Kind::BFloat16, Device::Cpu));
                for _ in 0..5 {
                    let mut sums = values.clone();
                    mesh.all_gather_bytes(b"ready").expect("both are there");
                    let start = Instant::now();
                    mesh.reduce_scatter(&mut sums, owners).expect("both reduce");
                    reduces.push(start.elapsed().as_secs_f64());
                    let start = Instant::now();
                    mesh.all_gather(&mut parameters, owners).expect("both gather");
                    gathers.push(start.elapsed().as_secs_f64());
                }
                let least = |times: &[f64]| times.iter().copied().fold(f64::INFINITY, f64::min) * 1e3;
                if rank == 0 {
                    let way = if lends { "from memory" } else { "over TCP" };
                    println!("{:38} {:8.1} ms", format!("reduce-scatter, 2 ranks, {way}"), least(&reduces));
                    println!("{:38} {:8.1} ms", format!("all-gather in bf16, 2 ranks, {way}"), least(&gathers));
                }
            });
        }
    });
}
