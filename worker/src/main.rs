//! `unisono-worker`: maps arguments to a session and its outcome to an exit code.

use clap::{Parser, Subcommand};
use prost::Message;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use unisono_proto::dial::Token;
use unisono_proto::v1::worker_message::Body;
use unisono_proto::v1::{Assign, Epoch, Failure, Join, Phase};
use unisono_worker::collective::tcp;
use unisono_worker::link::{self, entry, Link, Reporter};
use unisono_worker::memory::kernels;
use unisono_worker::model::Recompute;
use unisono_worker::snapshot::exchange::Exchange;
use unisono_worker::{fingerprint, lifeline, selftest, session, signals};

/// The user's input is at fault.
const BAD_INPUT: u8 = 2;
/// The run is at fault, or somebody else in it.
const RUN_FAILED: u8 = 3;
/// How long the compute thread may take to notice that the link ended.
const GRACE: Duration = Duration::from_secs(1);

/// How long it may take to come back from computing when it is to join again: then it hangs, and whoever started this
/// process may start another.
const HUNG: Duration = Duration::from_secs(120);
/// How long to wait at least for what the coordinator makes of a complaint.
const COMPLAINT: Duration = Duration::from_secs(10);
/// Generations that this process has left.
static ROUNDS: AtomicU64 = AtomicU64::new(0);

/// Computes micro-batches for a Unisono coordinator and owns a shard of the optimizer state.
#[derive(Parser)]
#[command(
    name = "unisono-worker",
    version,
    after_help = "Exit codes: 0 done, 2 bad input, 3 the run failed; 143, 130, 138 ended at once by SIGTERM, Ctrl-C, SIGUSR1.\nA first such signal asks the coordinator to save and stop the run."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what an assignment would need of this machine's memory: for `unisono check`.
    ///
    /// The assignment (unisono.v1.Assign) comes on standard input; the answer is one JSON object. Nothing is loaded.
    Plan {
        /// Workers that share this machine.
        #[arg(long, default_value_t = 1)]
        workers: usize,
    },
    /// Take part in the run of the coordinator at ADDR.
    ///
    /// The token comes from UNISONO_TOKEN or from the file that UNISONO_TOKEN_FILE names.
    #[command(after_help = "Example: UNISONO_TOKEN_FILE=worker.token unisono-worker join 10.0.0.1:7070")]
    Join {
        /// The coordinator, host:port.
        #[arg(value_name = "ADDR")]
        address: String,
        /// Address on which this worker listens for others, by default the one that leads to the coordinator; without a
        /// port, or with port 0, any free one.
        #[arg(long, value_name = "HOST[:PORT]")]
        listen: Option<String>,
        /// Address that other workers dial, where it is not the one listened on (a mapped port).
        #[arg(long, value_name = "HOST:PORT")]
        advertise: Option<String>,
    },
    /// Look at what a device really does: one JSON object per finding on standard output.
    ///
    /// Exits with 3 if something is not as it should be.
    #[command(after_help = "Example: unisono-worker selftest operations --device cuda")]
    Selftest {
        #[command(subcommand)]
        part: SelftestPart,
        /// cpu or cuda.
        #[arg(long, global = true, default_value = "cpu")]
        device: String,
    },
}

#[derive(Subcommand)]
enum SelftestPart {
    /// Every operation against fp64.
    Operations,
    /// Small random models against fp64, and twice for the same bits.
    Models,
    /// Models with what transformers made of them, as goldens/make.py writes it.
    Goldens { directory: PathBuf },
    /// Forward and backward passes of a model with random weights: tokens per second, and where the time goes.
    Speed {
        /// A directory with a config.json.
        #[arg(long)]
        model: PathBuf,
        /// Tokens of a micro-batch.
        #[arg(long, default_value_t = 4096)]
        tokens: usize,
        /// Tokens of each document in it.
        #[arg(long, default_value_t = 1024)]
        document: usize,
        /// Share of the tokens that have a target.
        #[arg(long, default_value_t = 1.0)]
        share: f64,
        #[arg(long, default_value_t = 5)]
        passes: usize,
        /// What the backward pass computes again: nothing, norms, up-projection or block.
        #[arg(long, default_value = "nothing")]
        recompute: String,
        /// Compute in fp32 instead of bf16.
        #[arg(long)]
        fp32: bool,
    },
}

impl SelftestPart {
    fn part(self) -> Result<selftest::Part, String> {
        Ok(match self {
            SelftestPart::Operations => selftest::Part::Operations,
            SelftestPart::Models => selftest::Part::Models,
            SelftestPart::Goldens { directory } => selftest::Part::Goldens(directory),
            SelftestPart::Speed { model, tokens, document, share, passes, recompute, fp32 } => {
                let recompute = match recompute.as_str() {
                    "nothing" => Recompute::Nothing,
                    "norms" => Recompute::Norms,
                    "up-projection" => Recompute::UpProjection,
                    "block" => Recompute::Block,
                    other => {
                        let levels = "nothing, norms, up-projection or block";
                        return Err(format!("--recompute {other} is no level: give {levels}"));
                    }
                };
                if tokens == 0 || document == 0 || !(0.0..=1.0).contains(&share) || share == 0.0 {
                    return Err("--tokens and --document must be positive, and --share above 0 and at most 1".into());
                }
                let compute = if fp32 { tch::Kind::Float } else { tch::Kind::BFloat16 };
                let recompute = Some(recompute);
                selftest::Part::Speed(selftest::Load { model, compute, tokens, document, share, passes, recompute })
            }
        })
    }
}

#[allow(clippy::print_stdout)]
fn look_at(part: SelftestPart, device: &str) -> ExitCode {
    let part = match part.part() {
        Ok(part) => part,
        Err(problem) => return complain(&problem, BAD_INPUT),
    };
    match selftest::run(device, &part, &mut |finding| println!("{finding}")) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(RUN_FAILED),
        Err(error) => complain(&error, BAD_INPUT),
    }
}

fn main() -> ExitCode {
    // Before libtorch's first operation: it keeps a compiled kernel for each shape, bounded by the first two; large
    // tensors lie on huge pages where the system has them, which halves the cost of running over all sums.
    // On a GPU, products whose result does not depend on what ran before need workspaces of one size.
    let fixed = [("THP_MEM_ALLOC_ENABLE", "1"), ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")];
    let fixed = fixed.map(|(variable, value)| (variable, value.to_owned()));
    for (variable, value) in kernels::environment().into_iter().chain(fixed) {
        if std::env::var_os(variable).is_none() {
            std::env::set_var(variable, value);
        }
    }
    lifeline::keep_heap();
    let filter = tracing_subscriber::EnvFilter::try_from_env("UNISONO_LOG").unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let (address, listen, advertise) = match Arguments::parse().command {
        Command::Join { address, listen, advertise } => (address, listen, advertise),
        Command::Selftest { part, device } => return look_at(part, &device),
        Command::Plan { workers } => return plan(workers),
    };
    if let Err(problem) = lifeline::watch(i32::from(RUN_FAILED)) {
        return complain(&problem, BAD_INPUT);
    }
    if let Err(problem) = signals::watch(lifeline::is_supervised(), heed) {
        return complain(&problem, RUN_FAILED);
    }
    std::panic::set_hook(Box::new(|info| {
        let panic = PANIC.lock();
        if let Ok(mut panic) = panic {
            *panic = Some(info.to_string().replace('\n', " "));
        }
    }));
    join(&address, listen, advertise)
}

/// The way to the coordinator, once there is one.
static COORDINATOR: Mutex<Option<Reporter>> = Mutex::new(None);

/// The newest one.
fn coordinator() -> std::sync::MutexGuard<'static, Option<Reporter>> {
    COORDINATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A first signal asks the coordinator to save and stop. Whoever sends a second one does not want to wait; except that a
/// supervisor's workers hear signals that were sent to all, and it knows better how many those were.
fn heed(signal: i32, name: &str) {
    static ASKED: AtomicBool = AtomicBool::new(false);
    let again = ASKED.swap(true, Ordering::SeqCst);
    let supervised = lifeline::is_supervised();
    match again {
        true if supervised => {}
        false if coordinator().as_ref().is_some_and(|coordinator| coordinator.depart(name)) => {
            if !supervised {
                eprintln!(
                    "unisono-worker: {name}: the run is asked to save and stop; once more ends this worker at once"
                );
            }
        }
        _ => lifeline::leave(128 + signal),
    }
}

/// What the last panic said.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Answers what an assignment would need; 0 also where it does not fit, as the answer says.
fn plan(workers: usize) -> ExitCode {
    let mut bytes = Vec::new();
    let assign = std::io::stdin().read_to_end(&mut bytes).map_err(|error| error.to_string());
    let assign = assign.and_then(|_| Assign::decode(&bytes[..]).map_err(|error| error.to_string()));
    let assign = match assign {
        Ok(assign) => assign,
        Err(problem) => return complain(&format!("standard input is no assignment ({problem})"), BAD_INPUT),
    };
    match session::prospect::foresee(&assign, workers) {
        Ok(table) => {
            let text = serde_json::to_string(&table).expect("strings and numbers serialize");
            match writeln!(std::io::stdout(), "{text}") {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => complain(&format!("the answer cannot be written ({error})"), RUN_FAILED),
            }
        }
        Err(error) => complain(&error, if error.bad_input() { BAD_INPUT } else { RUN_FAILED }),
    }
}

fn join(address: &str, listen: Option<String>, advertise: Option<String>) -> ExitCode {
    let token = match Token::from_environment() {
        Ok(token) => token,
        Err(e) => return complain(&e, BAD_INPUT),
    };
    let place = entry::place(&host_name());
    let mut token = place.as_deref().and_then(|place| entry::kept(place, &token)).unwrap_or(token);
    let host = match listen.map_or_else(|| local_address(address), Ok) {
        Ok(host) => host,
        Err(problem) => return complain(&problem, BAD_INPUT),
    };
    let (listener, listen) = match tcp::listen(&host) {
        Ok((listener, address)) => (listener, advertise.clone().unwrap_or(address)),
        Err(e) => return complain(&e, BAD_INPUT),
    };
    if let Some(problem) = nowhere(&listen) {
        return complain(&problem, BAD_INPUT);
    }
    let exchange = match Exchange::open(tcp::host_and_port(&host).0) {
        Ok(exchange) => exchange,
        Err(e) => return complain(&e, BAD_INPUT),
    };
    let fingerprint = match fingerprint::fingerprint() {
        Ok(fingerprint) => fingerprint,
        Err(e) => return complain(&format!("this program's own file cannot be read ({e})"), RUN_FAILED),
    };
    let snapshots = reachable(&exchange.address, advertise.as_deref());
    let (host, pid) = (host_name(), std::process::id());
    let mut join = Join { listen, host, pid, fingerprint: Some(fingerprint), snapshots, ..Join::default() };
    let held = exchange.store.clone();
    let mut standing = session::Standing::new(listener);
    standing.snapshots = Some(exchange);
    let mut known = None;
    let mut link = match reach(address, &token, &join, known, standing.patience) {
        Ok(link) => link,
        Err(e) => return complain(&e, code(&e)),
    };
    loop {
        *coordinator() = Some(link.reporter());
        if let Some(place) = &place {
            link.keep_pass(place.clone());
        }
        match take_part(&link, &mut standing) {
            Some(code) => {
                link.close();
                return code;
            }
            None => (known, join.again) = (link.known(), true),
        }
        ROUNDS.fetch_add(1, Ordering::SeqCst);
        token = link.pass().unwrap_or(token);
        link.close();
        join.held = held.held();
        link = match reach(address, &token, &join, known, standing.patience) {
            Ok(link) => link,
            Err(e) => return complain(&e, code(&e)),
        };
    }
}

/// One generation, or as much of it as there is. `None`: this worker joins again.
fn take_part(link: &Link, standing: &mut session::Standing) -> Option<ExitCode> {
    let outcome = catch_unwind(AssertUnwindSafe(|| session::run(link, standing)));
    match outcome {
        Ok(Ok(())) => return Some(ExitCode::SUCCESS),
        Ok(Err(error))
            if (error.recoverable() || standing.quarantines && error.micro_batch().is_some())
                && link.ended().is_none() =>
        {
            tracing::info!(%error, "this generation is over for this worker");
            // Nobody may be listening any more; then the link ends too.
            let _ = link.report(Body::Failure(failure(link, &error.to_string(), &error)));
            // The coordinator waits a little whether somebody else was lost before it ends the generation.
            link.wait_for_end(standing.patience.max(COMPLAINT));
        }
        Ok(Err(error)) if link.ended().is_none() => {
            return Some(fail(link, failure(link, &error.to_string(), &error)));
        }
        Err(_) => {
            let said = PANIC.lock().ok().and_then(|mut p| p.take()).unwrap_or_default();
            let message = format!("an internal error, please report it: {said}");
            return Some(fail(link, Failure { message, ..place(link) }));
        }
        Ok(Err(_)) => {}
    }
    // When the link ended first, whatever failed since is a consequence.
    match link.ended() {
        Some(error) if error.rejoins() => {
            tracing::info!(%error, "joining again");
            None
        }
        Some(error @ link::Error::Dismissed) => {
            complain(error, 0);
            Some(ExitCode::SUCCESS)
        }
        Some(error) => Some(complain(&at(link.rank(), None, None, error), code(error))),
        None => Some(complain(&at(link.rank(), None, None, &"the coordinator does not answer"), RUN_FAILED)),
    }
}

/// A new link to the coordinator, which may be on its way: it may have to read much before it listens. A supervisor knows
/// whether one will come, and ends this process where none does; without one, patience has an end.
fn reach(
    address: &str,
    token: &Token,
    join: &Join,
    known: Option<Epoch>,
    patience: Duration,
) -> Result<Link, link::Error> {
    let begun = Instant::now();
    let (mut pause, mut silent) = (Duration::from_millis(20), true);
    let round = ROUNDS.load(Ordering::SeqCst);
    loop {
        match Link::open(address, token.clone(), join.clone(), known, move |error, rank| leave_soon(round, error, rank))
        {
            Err(link::Error::Dial(error))
                if error.may_pass() && (lifeline::is_supervised() || begun.elapsed() < patience) =>
            {
                if std::mem::take(&mut silent) && !lifeline::is_supervised() {
                    eprintln!("unisono-worker: {error}; trying for {} s", patience.as_secs());
                }
                tracing::info!(%error, "no coordinator yet");
                std::thread::sleep(pause);
                pause = (2 * pause).min(Duration::from_secs(1));
            }
            outcome => return outcome,
        }
    }
}

/// Where this worker is, for a failure to come.
fn place(link: &Link) -> Failure {
    let (phase, step) = (link.progress().phase() as i32, link.progress().step());
    Failure { rank: link.rank(), host: host_name(), phase, step, ..Failure::default() }
}

fn failure(link: &Link, message: &str, error: &session::Error) -> Failure {
    let (bad_input, recoverable, micro_batch) = (error.bad_input(), error.recoverable(), error.micro_batch());
    let (snapshot, norm) = (matches!(error, session::Error::Snapshot(_)), error.is_norm());
    let here = place(link);
    let rank = error.culprit().or(here.rank);
    Failure { rank, message: message.into(), bad_input, recoverable, micro_batch, snapshot, norm, ..here }
}

/// Tells the user and the coordinator why this worker cannot go on.
fn fail(link: &Link, failure: Failure) -> ExitCode {
    let bad_input = failure.bad_input;
    let place = at(link.rank(), Some(failure.phase()), failure.step, &failure.message);
    // Nobody may be listening any more; the user reads it here in any case.
    let _ = link.fail(failure);
    complain(&place, if bad_input { BAD_INPUT } else { RUN_FAILED })
}

fn at(rank: Option<u32>, phase: Option<Phase>, step: Option<u64>, message: &dyn std::fmt::Display) -> String {
    let rank = rank.map_or("a worker without rank".to_owned(), |rank| format!("rank {rank}"));
    let phase = phase
        .map_or(String::new(), |p| format!(", {}", p.as_str_name().trim_start_matches("PHASE_").to_ascii_lowercase()));
    let step = step.map_or(String::new(), |step| format!(", step {step}"));
    format!("{rank} on {}{phase}{step}: {message}", host_name())
}

fn code(error: &link::Error) -> u8 {
    match error {
        link::Error::Aborted(failure) if failure.bad_input => BAD_INPUT,
        link::Error::Refused(_) => BAD_INPUT,
        link::Error::Dismissed => 0,
        link::Error::Dial(error) if !error.may_pass() => BAD_INPUT,
        _ => RUN_FAILED,
    }
}

/// Called from the link's thread when it ends: the compute thread usually notices by itself; if it computes for longer,
/// the process ends under it, unless it is to join again.
/// `round` is that of the link: the compute thread may have joined the next one before this is called.
fn leave_soon(round: u64, error: &link::Error, rank: Option<u32>) {
    let (code, sentence, rejoins) = (code(error), error.to_string(), error.rejoins());
    std::thread::spawn(move || {
        std::thread::sleep(if rejoins { HUNG } else { GRACE });
        if rejoins && ROUNDS.load(Ordering::SeqCst) != round {
            return;
        }
        complain(&at(rank, None, None, &sentence), code);
        lifeline::leave(i32::from(code));
    });
}

fn complain(message: &dyn std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("unisono-worker: {message}");
    ExitCode::from(code)
}

/// Why peers cannot use an address that they are told.
fn nowhere(address: &str) -> Option<String> {
    let (host, _) = tcp::host_and_port(address);
    let unspecified = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_unspecified());
    unspecified.then(|| {
        format!(
            "peers cannot reach a worker at {address}: add --advertise with this host's name or address and the port"
        )
    })
}

/// Where peers reach the port of `bound`: on the host that they are told, if they are told another.
fn reachable(bound: &str, advertise: Option<&str>) -> String {
    match (advertise.map(|address| tcp::host_and_port(address).0), tcp::host_and_port(bound).1) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        _ => bound.to_owned(),
    }
}

/// The local address towards the coordinator. Nothing is sent.
fn local_address(coordinator: &str) -> Result<String, String> {
    let find = || {
        use std::net::ToSocketAddrs;
        let target = coordinator.to_socket_addrs()?.next().ok_or(std::io::ErrorKind::NotFound)?;
        let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect(target)?;
        Ok::<_, std::io::Error>(socket.local_addr()?.ip().to_string())
    };
    find().map_err(|e| format!("\"{coordinator}\" does not lead to a coordinator ({e}); give host:port"))
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()).unwrap_or_default()
}
