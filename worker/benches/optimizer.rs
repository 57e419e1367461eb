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
use unisono_worker::optim::adamw::{update, Settings, Span};
use unisono_worker::optim::exact::ExactSum;
use unisono_worker::optim::norm;

fn main() {
    let millions = std::env::args().skip(1).find_map(|a| a.parse::<f64>().ok()).unwrap_or(16.0);
    let n = (millions * 1e6) as usize;
    tch::set_num_threads(1);
    println!("{millions} million elements");
    sums(n);
    optimizer(n);
    exchange(n);
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
    println!("{what:32} {:8.1} ms {:6.2} ns per element", least * 1e3, least / n as f64 * 1e9);
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
    report("norm", n, || {
        let partials = sums.bucket(0).chunks(unisono_configs::model::CHUNK).map(norm::partial);
        assert!(norm::norm(partials) > 0.0);
    });
}

fn optimizer(n: usize) {
    let settings = Settings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
    let scalars = settings.scalars(10, 1e-4, 0.5);
    let (sums, mut master) = (vec![1i64 << 30; n], vec![0.1f32; n]);
    let (mut m, mut v) = (vec![1e-3f32; n], vec![1e-6f32; n]);
    let mut narrow = vec![bf16::ZERO; n];
    report("AdamW, bf16 parameter", n, || {
        let (gradient, master, m, v) = (&sums[..], &mut master[..], &mut m[..], &mut v[..]);
        update(Span { gradient, master, m, v, parameter: &mut narrow }, &scalars);
    });
    let mut wide = vec![0f32; n];
    report("AdamW, fp32 parameter", n, || {
        let (gradient, master, m, v) = (&sums[..], &mut master[..], &mut m[..], &mut v[..]);
        update(Span { gradient, master, m, v, parameter: &mut wide }, &scalars);
    });
}

/// Two ranks on loopback, a thread each.
fn exchange(n: usize) {
    let listeners: Vec<_> = (0..2).map(|_| listen("127.0.0.1").expect("loopback")).collect();
    let addresses: Vec<_> = listeners.iter().map(|(_, address)| address.clone()).collect();
    let owners: Vec<Range<usize>> = vec![0..n / 2, n / 2..n];
    std::thread::scope(|scope| {
        for (rank, (listener, _)) in listeners.into_iter().enumerate() {
            let timeout = Duration::from_secs(60);
            let addresses = addresses.clone();
            let membership = Membership { rank, addresses, key: [1; 32], term: 1, generation: 1, timeout };
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
                    println!("{:32} {:8.1} ms", "reduce-scatter, 2 ranks", least(&reduces));
                    println!("{:32} {:8.1} ms", "all-gather in bf16, 2 ranks", least(&gathers));
                }
            });
        }
    });
}
