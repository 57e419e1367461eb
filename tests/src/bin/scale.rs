//! How a coordinator bears many workers: `scale [--pace SECONDS] [WORKERS]...` serves real TLS and gRPC to that many
//! workers that only check what they get and take SECONDS (1) for it, and prints what a step cost. Coordinator and workers
//! have one core each.

#![allow(clippy::print_stdout)]

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use unisono_proto::dial::Token;
use unisono_proto::v1::event::Body;
use unisono_tests::fake_worker::{End, FakeWorker, Tally};
use unisono_tests::processes::{usage, Usage};
use unisono_tests::scale::Inspector;
use unisono_tests::served::Served;

const STEPS: usize = 20;

/// Steps that are not counted: workers join and streams warm up.
const WARM: u64 = 4;

fn main() -> Result<()> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    if let [serve, workers] = words.as_slice() {
        if serve == "--serve" {
            return block_on(serve_workers(workers.parse()?));
        }
    }
    let mut pace = Duration::from_secs(1);
    if words.first().is_some_and(|word| word == "--pace") {
        pace = Duration::try_from_secs_f64(words.get(1).context("--pace SECONDS")?.parse()?)?;
        words.drain(..2);
    }
    let counts: Vec<usize> = words.iter().map(|w| w.parse().context("WORKERS is a number")).collect::<Result<_>>()?;
    let counts = if counts.is_empty() { vec![1, 10, 100, 1000] } else { counts };
    println!(
        "workers  steps  tokens/s   coordinator's CPU ms/step  us/step and worker  RSS MiB  ahead     verified rows"
    );
    for workers in counts {
        let told = block_on(drive(workers, pace))?;
        println!("{told}");
    }
    Ok(())
}

fn block_on<T>(future: impl std::future::Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(future)
}

fn here() -> Result<Usage> {
    usage(std::process::id()).context("/proc has this process")
}

/// The coordinator's side, in a process of its own: says where it is, then what its steps cost.
async fn serve_workers(workers: usize) -> Result<()> {
    let served = Served::wide(workers, STEPS);
    let serving = served.start("wide", served.training()).await;
    let token = serving.control.tokens.worker.clone();
    println!("{}", json!({"address": serving.control.address, "token": token}));
    std::io::stdout().flush()?;
    let (events, start) = (serving.events.clone(), Instant::now());
    let sampling = tokio::spawn(async move {
        let mut samples: Vec<(u64, f64, f64, u64)> = Vec::new();
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let (mut step, mut tokens) = (0, 0);
            for event in events.lock().expect("not poisoned").iter() {
                if let Some(Body::Step(committed)) = &event.body {
                    (step, tokens) = (committed.step, tokens + committed.tokens);
                }
            }
            if step > samples.last().map_or(0, |s| s.0) {
                samples.push((step, start.elapsed().as_secs_f64(), here()?.cpu, tokens));
            }
            if step == STEPS as u64 {
                return anyhow::Ok(samples);
            }
        }
    });
    let samples =
        tokio::time::timeout(Duration::from_secs(300), sampling).await.context("the run does not end")???;
    let first = samples.iter().find(|s| s.0 >= WARM).context("too few steps")?;
    let last = samples.last().context("no step")?;
    let (steps, seconds, cpu) = (last.0 - first.0, last.1 - first.1, last.2 - first.2);
    let (tokens, rss) = (last.3 - first.3, here()?.peak);
    let outcome = serving.outcome().await;
    if let Some(failure) = outcome.failure {
        bail!("the run failed: {}", failure.message);
    }
    println!("{}", json!({"steps": steps, "seconds": seconds, "cpu": cpu, "tokens": tokens, "rss": rss}));
    Ok(())
}

struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It may be over already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The workers' side.
async fn drive(workers: usize, pace: Duration) -> Result<String> {
    let exe = std::env::current_exe()?;
    let two = std::thread::available_parallelism()?.get() > 1;
    let mut command = if two { Command::new("taskset") } else { Command::new(&exe) };
    if two {
        command.args(["-c", "0"]).arg(&exe);
    }
    let child = command.args(["--serve", &workers.to_string()]).stdout(Stdio::piped()).spawn()?;
    let mut child = Guard(child);
    let mut lines = BufReader::new(child.0.stdout.take().context("piped")?).lines();
    let mut line = || -> Result<Value> { Ok(serde_json::from_str(&lines.next().context("it died")??)?) };
    let control = line()?;
    let text = |key: &str| control[key].as_str().map(str::to_owned).context("a string");
    let (address, token) = (text("address")?, Token::parse(&text("token")?)?);
    let rows = workers * STEPS * 10;
    let inspector = Arc::new(Inspector::new(rows));
    let looking = inspector.clone();
    let inspect = Box::new(move |batch: &_| looking.inspect(batch));
    let tally = Arc::new(Tally { inspect: Some(inspect), ..Tally::default() });
    let layout = Served::new(0, 1).layout();
    let mut lives = JoinSet::new();
    for _ in 0..workers {
        let mut worker = FakeWorker::new(&address, token.clone(), layout.clone());
        (worker.pace, worker.tally) = (pace, tally.clone());
        lives.spawn(worker.live());
    }
    while let Some(end) = lives.join_next().await {
        match end? {
            End::Drained { .. } => {}
            other => bail!("a worker ended otherwise: {other:?}"),
        }
    }
    let cost = line()?;
    let number = |key: &str| cost[key].as_f64().context("a number");
    let (steps, cpu) = (number("steps")?, number("cpu")?);
    let (rate, per_step) = (number("tokens")? / number("seconds")?, cpu / steps * 1e3);
    let (ahead, waited) = (tally.ahead.load(Relaxed), tally.waited.load(Relaxed));
    let share = ahead as f64 / (ahead + waited).max(1) as f64;
    let (faults, uneven) = (inspector.faults.load(Relaxed), inspector.uneven(1));
    if faults > 0 || uneven > 0 {
        bail!("{faults} rows were not what they should be, and {uneven} of {rows} did not come exactly once");
    }
    Ok(format!(
        "{workers:>7}  {steps:>5}  {rate:>9.0}  {per_step:>25.1}  {:>18.1}  {:>7.0}  {:>7.3} %  {rows} of {rows}",
        per_step * 1e3 / workers as f64,
        number("rss")? / 1048576.0,
        100.0 * share,
    ))
}
