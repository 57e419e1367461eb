//! The loop that owns the machine, the gRPC services around it and the ledger.

mod accept;
mod access;
mod audience;
mod commit;
pub mod control;
mod filesystem;
pub mod identity;
pub mod ledger;
mod pages;
pub mod setup;
mod steering;
mod training;
mod viewing;
pub mod work;

pub use setup::{Conclude, Error, Observer, Resumption, Setup};
pub use work::Work;

use crate::checkpoint::manifest::Dtype;
use crate::data::Notice;
use crate::run::event::Outcome;
use crate::run::machine::{Machine, Rows, Settings};
use crate::run::program::Program;
use crate::run::snapshots::{Snapshotting, Timeline};
use crate::run::spike;
use access::Access;
use audience::{Audience, Stage};
use commit::{Archive, Committer};
use control::{Control, CONTROL};
use ledger::Ledger;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};
use steering::{Alarm, Command, Handle, Steering};
use tokio::sync::oneshot;
use tonic::service::interceptor::InterceptedService;
use training::TrainingService;
use unisono_configs::model::Layout;
use unisono_configs::run::{
    Compute, Count, Device, Offload, OptimizerState, Recompute, RunConfig, Transport, ZeroStage,
};
use unisono_proto::dial::Role;
use unisono_proto::v1::training_server::TrainingServer;
use unisono_proto::v1::{self as wire, Assign, ModelSource, Optimizer, RunStarted};
use unisono_proto::MAX_MESSAGE_BYTES;
use viewing::{Shelf, ViewingService};

/// After the run's end, streams that are still open get this long to close.
const LINGER: Duration = Duration::from_secs(3);

/// Serves a run until it is over. `interrupt` makes it save and stop; its output says who asked. `stop` ends it at once; its
/// output says why, as a sentence.
pub async fn serve(
    setup: Setup,
    interrupt: impl Future<Output = String>,
    stop: impl Future<Output = String>,
) -> Result<Outcome, Error> {
    let workers = check(&setup)?;
    let file =
        |path: &std::path::Path, error: std::io::Error| Error::File { path: path.into(), problem: error.to_string() };
    let run_dir = setup.run_dir.canonicalize().map_err(|error| file(&setup.run_dir, error))?;
    let (ledger, mut recorded) = match setup.resume {
        Some(Resumption { ledger, recorded }) => (ledger, recorded),
        None => (Ledger::open(&run_dir)?, Default::default()),
    };
    let (term, reader) = (ledger.term(), ledger.reader()?);
    let identity = identity::Identity::of(&run_dir)?;
    let tokens = Arc::new(identity.tokens()?);
    setup.listener.set_nonblocking(true).map_err(Error::Socket)?;
    let address = match setup.advertise {
        Some(address) => address,
        None => setup.listener.local_addr().map_err(Error::Socket)?.to_string(),
    };
    let listener = tokio::net::TcpListener::from_std(setup.listener).map_err(Error::Socket)?;

    let layout = Layout::new(&setup.spec);
    let program = setup.work.program().clone();
    recorded.follow(&program);
    let mut settings = Settings {
        run_dir: run_dir.clone(),
        term,
        world: workers,
        assignment: setup.config.cluster.assignment,
        seed: setup.config.train.seed,
        assign: assignment(&setup.config, &program)?,
        peer_secret: identity::random(),
        started: started(&setup.config, &run_dir, &layout, &setup.work),
        recorded,
        tasks: setup.work.tasks(),
        lease: setup.config.cluster.lease,
        restarts: setup.config.cluster.restarts,
        spike: spike::Rule { window: setup.config.train.spike_window, mads: setup.config.train.spike_mads },
        rows: Rows({
            let work = setup.work.clone();
            Arc::new(move |key| work.name_rows(key))
        }),
        grace: setup.config.checkpoint.grace,
        hang_after: setup.config.cluster.hang_after,
        snapshots: Snapshotting {
            every: setup.config.checkpoint.snapshot_every,
            layout: Arc::new(layout.clone()),
            timelines: vec![(timeline(&setup.config, program.steps()), u64::MAX)],
        },
        on_spike: setup.config.train.on_spike,
        on_bad_numbers: setup.config.train.on_bad_numbers,
    };
    let (commands, queue) = std::sync::mpsc::channel();
    let handle = Handle::new(commands);
    let courier = commit::courier(&setup.config.checkpoint, &run_dir, &handle)?;
    for quarantined in settings.recorded.quarantined() {
        settings.snapshots.branch(quarantined.step, &quarantined.rows);
    }
    if let (Some(courier), step @ 1..) = (&courier, program.start()) {
        // The coordinator that saved it may have died before it was copied.
        if let Err(error) = courier.take(step) {
            handle.send(Command::Warn { kind: "copy", step, message: error.to_string() });
        }
    }
    let archive = Archive {
        run_dir: run_dir.clone(),
        config: fingerprint(&setup.config),
        layout,
        dtype: match setup.config.train.optimizer_state {
            OptimizerState::Fp32 => Dtype::F32,
            OptimizerState::Bf16 => Dtype::Bf16,
        },
        work: setup.work.clone(),
        keep: setup.config.checkpoint.keep,
        courier: courier.clone(),
    };
    let audience = Audience::new(ledger.sequence(), setup.viewer_patience);
    let committer = Committer::spawn(archive, handle.clone(), setup.conclude).map_err(Error::Socket)?;
    let machine = Machine::new(settings, program);
    let observer = setup.observer.clone();
    let stage = Stage(audience.clone());
    let steering = Steering::new(machine, ledger, run_dir.clone(), setup.observer, stage, committer, handle.clone());
    // Goes down with the thread that tells.
    let preparing = Alarm { handle: handle.clone(), thread: "tokenizes rows" };
    let prepared = Arc::new(AtomicU64::new(setup.work.program().prepared()));
    let newly = prepared.clone();
    let tell = move |notice| {
        if let Notice::Prepared { steps } = notice {
            newly.fetch_max(steps, Ordering::Relaxed);
        }
        preparing.handle.send(notice_command(notice))
    };
    // Held to the end of the run; dropping it ends its thread.
    let _ahead = setup.work.ahead(tell).map_err(Error::Socket)?;
    let (ended, mut end) = oneshot::channel();
    let thread = std::thread::Builder::new().name("steering".into());
    // Fails only when `serve` itself was dropped.
    thread.spawn(move || ended.send(steering.run(queue)).ok()).map_err(Error::Socket)?;

    let control = Control { address, pid: std::process::id(), term, ca: identity.authority, tokens: identity.tokens };
    let (incoming, accepting) = accept::accept(listener, identity.server);
    let training = TrainingServer::new(TrainingService {
        handle: handle.clone(),
        work: setup.work,
        prepared,
        seal: identity.seal.clone(),
    })
    .max_decoding_message_size(MAX_MESSAGE_BYTES)
    .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let ushering = tokio::spawn(audience.clone().usher());
    let viewing = ViewingService::new(handle.clone(), audience, Shelf::new(reader));
    let (close, closing) = oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .max_concurrent_streams(Some(64))
        .add_service(InterceptedService::new(
            training,
            Access::new(tokens.clone(), identity.seal.clone(), &[Role::Worker]),
        ))
        .add_service(InterceptedService::new(
            viewing,
            Access::new(tokens, identity.seal, &[Role::Monitor, Role::Operator]),
        ))
        .serve_with_incoming_shutdown(incoming, async move { drop(closing.await) });
    let mut server = tokio::spawn(server);
    control.write(&run_dir)?;
    observer.listening(&control);

    let lost = || Error::Loop("it panicked".into());
    let (mut interrupt, mut stop) = (std::pin::pin!(interrupt), std::pin::pin!(stop));
    let (mut interrupted, mut stopped) = (None, false);
    let outcome = loop {
        tokio::select! {
            outcome = &mut end => break outcome.map_err(|_| lost()),
            by = &mut interrupt, if interrupted.is_none() => {
                interrupted = Some(Instant::now());
                handle.send(Command::Interrupt { by });
            }
            reason = &mut stop, if !stopped => {
                stopped = true;
                handle.send(Command::Stop { reason });
            }
        }
    };
    if let Some(courier) = courier {
        // What was saved last is worth most elsewhere where this machine is about to go away.
        let grace = Duration::from_secs_f64(setup.config.checkpoint.grace);
        let copying = move || match interrupted {
            Some(since) => courier.wait(grace.saturating_sub(since.elapsed())),
            None => courier.finish(),
        };
        let copied = tokio::task::spawn_blocking(copying).await;
        if !copied.unwrap_or(false) {
            tracing::warn!(
                "the newest checkpoint was not copied to checkpoint.copy_to in time; it is in the run directory"
            );
        }
    }
    forget(&run_dir);
    accepting.abort();
    drop(close);
    if tokio::time::timeout(LINGER, &mut server).await.is_err() {
        server.abort();
    }
    ushering.abort();
    outcome?
}

/// The run is over: the address and the secrets lead nowhere any more.
pub fn forget(run_dir: &std::path::Path) {
    std::fs::remove_file(run_dir.join(CONTROL)).ok();
    identity::forget(run_dir);
}

/// The number of workers, if the configuration is one that can be served.
fn check(setup: &Setup) -> Result<u32, Error> {
    let Count::Exactly(workers) = setup.config.cluster.workers else {
        return Err(Error::Unresolved { key: "cluster.workers" });
    };
    let micro_batches = setup.config.train.micro_batches;
    if workers > micro_batches && setup.work.plan().is_some() {
        return Err(Error::TooManyWorkers { workers, micro_batches });
    }
    u32::try_from(workers.max(1)).map_err(|_| Error::TooManyWorkers { workers, micro_batches })
}

fn notice_command(notice: Notice) -> Command {
    match notice {
        Notice::Prepared { steps } => Command::Prepared { steps },
        Notice::Unprepared { step, message } => Command::Unprepared { step, message },
    }
}

/// What every rank is assigned alike.
pub fn assignment(config: &RunConfig, program: &Program) -> Result<Assign, Error> {
    let compute = match config.model.compute {
        Compute::Bf16 => wire::Compute::Bf16,
        Compute::Fp32 => wire::Compute::Fp32,
        Compute::Auto => return Err(Error::Unresolved { key: "model.compute" }),
    };
    let device = match config.cluster.device {
        Device::Cpu => "cpu",
        Device::Cuda => "cuda",
        Device::Auto => return Err(Error::Unresolved { key: "cluster.device" }),
    };
    let zero_stage = match config.cluster.zero_stage {
        ZeroStage::Stage(stage) => stage,
        // What fits is for the workers to know.
        ZeroStage::Auto => 0,
    };
    let recompute = match config.cluster.recompute {
        Recompute::Auto => wire::Recompute::Auto,
        Recompute::Nothing => wire::Recompute::Nothing,
        Recompute::Norms => wire::Recompute::Norms,
        Recompute::UpProjection => wire::Recompute::UpProjection,
        Recompute::Block => wire::Recompute::Block,
    };
    let offload = match config.cluster.offload {
        Offload::Auto => wire::Offload::Auto,
        Offload::Nothing => wire::Offload::Nothing,
        Offload::Masters => wire::Offload::Masters,
        Offload::Moments => wire::Offload::Moments,
        Offload::State => wire::Offload::State,
        Offload::All => wire::Offload::All,
    };
    let transport = match config.cluster.transport {
        Transport::Auto => wire::Transport::Auto,
        Transport::Tcp => wire::Transport::Tcp,
        Transport::Nccl => wire::Transport::Nccl,
    };
    let path = &config.model.path;
    let path = path.canonicalize().map_err(|error| Error::File { path: path.clone(), problem: error.to_string() })?;
    let (train, worst) = (&config.train, program.worst());
    Ok(Assign {
        model: Some(ModelSource { path: path.display().to_string(), compute: compute.into() }),
        optimizer: Some(Optimizer {
            beta1: train.betas[0],
            beta2: train.betas[1],
            eps: train.eps,
            weight_decay: train.weight_decay,
            max_grad_norm: train.max_grad_norm,
            state: match train.optimizer_state {
                OptimizerState::Fp32 => wire::OptimizerState::Fp32.into(),
                OptimizerState::Bf16 => wire::OptimizerState::Bf16.into(),
            },
            seed: train.seed,
        }),
        threads: config.cluster.threads_per_worker as u32,
        device: device.into(),
        worst_tokens: worst.tokens,
        worst_document: worst.document,
        micro_batches: worst.micro_batches.max(1),
        worst_documents: worst.documents,
        worst_positions: worst.positions,
        worst_sizes: match program {
            Program::Train(training) => training.plan.sizes().to_vec(),
            _ => Vec::new(),
        },
        zero_stage,
        recompute: recompute.into(),
        offload: offload.into(),
        transport: transport.into(),
        // A spike before the step of a bad number may be the cause.
        quarantines: train.may_leave_out(),
        peer_timeout: config.cluster.peer_timeout,
        trains: matches!(program, Program::Train(_)),
        heartbeat: config.cluster.heartbeat,
        rejoin_timeout: config.cluster.rejoin_timeout,
        ..Assign::default()
    })
}

fn started(config: &RunConfig, run_dir: &std::path::Path, layout: &Layout, work: &Work) -> RunStarted {
    let [train_rows, validation_rows, test_rows] = work.rows();
    RunStarted {
        run_dir: run_dir.display().to_string(),
        model: config.model.path.display().to_string(),
        parameters: layout.parameters() as u64,
        steps: work.program().steps(),
        train_rows,
        validation_rows,
        test_rows,
    }
}

/// Hash of everything in the configuration that reaches the result.
fn fingerprint(config: &RunConfig) -> String {
    let parts = (&config.model, &config.data, &config.split, &config.mix, &config.train);
    let text = serde_json::to_vec(&parts).expect("a configuration serializes");
    blake3::hash(&text).to_hex().to_string()
}

/// What decides the state after a step.
fn timeline(config: &RunConfig, steps: u64) -> Timeline {
    let mut hasher = blake3::Hasher::new_derive_key("unisono 1 timeline");
    hasher.update(fingerprint(config).as_bytes()).update(&steps.to_le_bytes());
    *hasher.finalize().as_bytes()
}
