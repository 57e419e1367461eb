//! Tokens per second of processor time of `Model::forward_backward` on one thread, beside the machine's matrix product rate in the same
//! sitting, and where the time goes.
//!
//!     cargo run --release -p unisono-worker --example forward_backward -- MODEL_DIR [float|bf16] [repeats] [documents] [sum]
//!
//! `sum` adds the leaves up exactly, as training does.

use tch::{Device, Kind, Tensor};
use unisono_configs::model::ModelSpec;
use unisono_proto::NO_TARGET;
use unisono_worker::model::{Batch, Model, Nowhere};
use unisono_worker::ops::operation;
use unisono_worker::optim::exact::ExactSum;

/// Documents of about 190 tokens, of which the last 55 % are targets.
fn batch(vocab: usize, documents: usize) -> Batch {
    let (mut tokens, mut targets, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    for (document, length) in [187u32, 171, 203, 192].into_iter().cycle().take(documents).enumerate() {
        starts.push(tokens.len() as u32);
        let id = |i: u32| (i * 7919 + document as u32 * 104_729) % vocab as u32;
        tokens.extend((0..length).map(id));
        targets
            .extend((0..length).map(|i| if i > length * 45 / 100 && i + 1 < length { id(i + 1) } else { NO_TARGET }));
    }
    Batch { tokens, targets, starts }
}

/// FLOP/s of products like the model's.
fn product_rate(compute: Kind) -> f64 {
    let (a, b) =
        (Tensor::randn([768, 576], (Kind::Float, Device::Cpu)), Tensor::randn([576, 1536], (Kind::Float, Device::Cpu)));
    let (a, b) = (a.to_kind(compute), b.to_kind(compute));
    let once = || drop(a.mm(&b));
    once();
    let mut best = 0.0f64;
    for _ in 0..10 {
        let begin = operation::thread_time();
        (0..10).for_each(|_| once());
        best = best.max(10.0 * 2.0 * 768.0 * 576.0 * 1536.0 / (operation::thread_time() - begin).as_secs_f64());
    }
    best
}

#[allow(clippy::print_stdout)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().ok_or("usage: forward_backward MODEL_DIR [float|bf16] [repeats] [documents] [sum]")?;
    let compute = if arguments.next().as_deref() == Some("float") { Kind::Float } else { Kind::BFloat16 };
    let repeats: usize = arguments.next().map_or(Ok(10), |n| n.parse())?;
    let documents: usize = arguments.next().map_or(Ok(4), |n| n.parse())?;
    let sums = arguments.next().as_deref() == Some("sum");
    tch::set_num_threads(1);
    let spec = ModelSpec::read(dir.as_ref())?;
    let model = Model::load(dir.as_ref(), spec.clone(), compute, Device::Cpu)?;
    let batch = batch(spec.vocab, documents);
    let tokens = batch.tokens.len() as f64;
    println!("matrix products: {:.0} GFLOP/s", product_rate(compute) / 1e9);
    let mut exact = sums.then(|| ExactSum::new(model.layout().clone(), 1 << 10));
    let mut run = || match &mut exact {
        Some(exact) => model.forward_backward(&batch, 1e-3, exact),
        None => model.forward_backward(&batch, 1e-3, &mut Nowhere),
    };
    for _ in 0..2 {
        run()?;
    }
    operation::start();
    let mut times = Vec::new();
    for _ in 0..repeats {
        let begin = operation::thread_time();
        run()?;
        times.push((operation::thread_time() - begin).as_secs_f64());
    }
    let table = operation::stop();
    times.sort_by(f64::total_cmp);
    println!("matrix products: {:.0} GFLOP/s", product_rate(compute) / 1e9);
    println!("tokens/s: best {:.0}, median {:.0}", tokens / times[0], tokens / times[repeats / 2]);
    let total: f64 = times.iter().sum();
    let mut listed = 0.0;
    for (name, time, calls) in &table {
        let share = time.as_secs_f64() / total;
        listed += share;
        println!(
            "{name:>20} {:8.2} ms {:5.1} % {:5} calls",
            time.as_secs_f64() * 1e3 / repeats as f64,
            share * 100.0,
            calls / repeats as u64
        );
    }
    println!(
        "{:>20} {:8.2} ms {:5.1} %",
        "other",
        (1.0 - listed) * total * 1e3 / repeats as f64,
        (1.0 - listed) * 100.0
    );
    Ok(())
}
