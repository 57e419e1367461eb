//! A worker's life: joining -> loading -> training -> draining, one struct per state; `run` returns the next.

mod choice;
mod images;
pub mod prospect;

use crate::checkpoint::saver::Saver;
use crate::collective::courier::Courier;
use crate::collective::tcp::{Membership, Mesh};
use crate::collective::{self, Collective};
use crate::device;
use crate::engine::{self, Engine};
use crate::link::{self, Link};
use crate::memory::order::Choice;
use crate::memory::{self, Available};
use crate::model::weights::{self, Weights};
use crate::model::{self, Model};
use crate::optim::adamw::Settings;
use crate::optim::reduction::{Adding, Stage};
use crate::optim::state::Form;
use crate::optim::Optimizer;
use crate::restore::{self, Part, Saved};
use crate::snapshot::exchange::{self, Circle, Exchange};
use crate::snapshot::keeper::{Keeper, Means};
use crate::train::{self, Trainer};
use choice::{agree, transport, try_worst};
use prospect::Prospect;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;
use unisono_configs::model::spec;
use unisono_proto::v1::worker_message::Body;
use unisono_proto::v1::{directive, Assign, Epoch, Phase, Ready, Transport};

/// Why a worker's life ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Link(#[from] link::Error),
    #[error(transparent)]
    Collective(#[from] collective::Error),
    #[error(transparent)]
    Spec(#[from] spec::Error),
    #[error(transparent)]
    Weights(#[from] weights::Error),
    #[error("{path}: {source}", path = path.display())]
    Model { path: PathBuf, source: model::Error },
    #[error(transparent)]
    Restore(#[from] restore::Error),
    #[error(transparent)]
    Snapshot(#[from] exchange::Error),
    #[error(transparent)]
    Device(#[from] device::Error),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Train(#[from] train::Error),
    #[error("{0}")]
    Unsupported(String),
}

impl Error {
    /// Whether the same work may succeed in another generation: a peer was lost, not this worker.
    pub fn recoverable(&self) -> bool {
        match self {
            Error::Collective(error) | Error::Train(train::Error::Collective(error)) => !error.is_lasting(),
            Error::Snapshot(_) => true,
            _ => false,
        }
    }

    /// Another rank, where that is the one at fault.
    pub fn culprit(&self) -> Option<u32> {
        match self {
            Error::Snapshot(error) => error.culprit(),
            Error::Collective(error) | Error::Train(train::Error::Collective(error)) => error.culprit(),
            _ => None,
        }
    }

    /// The micro-batch that gave a bad number.
    pub fn micro_batch(&self) -> Option<u32> {
        match self {
            Error::Train(error) => error.micro_batch(),
            _ => None,
        }
    }

    /// Whether the gradient norm is no finite number.
    pub fn is_norm(&self) -> bool {
        matches!(self, Error::Train(train::Error::BadNorm { .. }))
    }

    /// Whether the user's input is at fault rather than the run.
    pub fn bad_input(&self) -> bool {
        match self {
            Error::Spec(_)
            | Error::Weights(_)
            | Error::Model { .. }
            | Error::Memory(_)
            | Error::Device(_)
            | Error::Unsupported(_) => true,
            Error::Link(link::Error::Aborted(failure)) => failure.bad_input,
            Error::Link(link::Error::Refused(_) | link::Error::Dial(_)) => true,
            Error::Collective(error) => error.bad_input(),
            Error::Link(_) | Error::Restore(_) | Error::Snapshot(_) | Error::Train(_) => false,
        }
    }
}

/// What a worker keeps from one generation to the next.
pub struct Standing {
    /// Peers call here.
    pub listener: TcpListener,
    /// Snapshots outlive generations; absent: none are kept.
    pub snapshots: Option<Exchange>,
    /// As it was before this process, and any worker that joined with it, loaded anything.
    available: Available,
    baseline: u64,
    /// How many processes share that; 0 before the first assignment.
    sharing: usize,
    /// Bad numbers of a step end its generation and not the run.
    pub quarantines: bool,
    /// How long to wait for a coordinator that is lost: as it said last.
    pub patience: Duration,
}

/// As long as no coordinator has said anything else.
const PATIENCE: Duration = Duration::from_secs(60);

impl Standing {
    pub fn new(listener: TcpListener) -> Self {
        let (available, baseline) = (memory::available(), memory::resident());
        Standing { listener, snapshots: None, available, baseline, sharing: 0, quarantines: false, patience: PATIENCE }
    }
}

/// Runs a worker from joining to the end, or to the end of its generation.
pub fn run(link: &Link, standing: &mut Standing) -> Result<(), Error> {
    Joining::new(link, standing).run()?.run()?.run()?.run()
}

/// Has asked to take part.
pub struct Joining<'l> {
    link: &'l Link,
    standing: &'l mut Standing,
}

impl<'l> Joining<'l> {
    pub fn new(link: &'l Link, standing: &'l mut Standing) -> Self {
        link.progress().enter(Phase::Join);
        Joining { link, standing }
    }

    pub fn run(self) -> Result<Loading<'l>, Error> {
        let (assign, epoch) = self.link.assignment()?;
        tracing::info!(rank = assign.rank, world = assign.world, ?epoch, "assigned");
        let Joining { link, standing } = self;
        if standing.sharing == 0 {
            standing.sharing = assign.fresh.max(1) as usize;
        }
        standing.quarantines = assign.quarantines;
        if assign.rejoin_timeout > 0.0 && assign.rejoin_timeout.is_finite() {
            standing.patience = Duration::from_secs_f64(assign.rejoin_timeout);
        }
        Ok(Loading { link, standing, assign, epoch })
    }
}

/// Knows its rank: meets its peers, loads the model and tries the worst micro-batch.
pub struct Loading<'l> {
    link: &'l Link,
    standing: &'l Standing,
    assign: Assign,
    epoch: Epoch,
}

impl<'l> Loading<'l> {
    pub fn run(self) -> Result<Training<'l>, Error> {
        let Loading { link, standing, assign, epoch } = &self;
        link.progress().enter(Phase::Load);
        let membership = self.membership()?;
        let circle = Circle::new(&membership.key, epoch.term, epoch.generation, membership.rank, membership.timeout);
        if let Some(exchange) = &standing.snapshots {
            exchange.enter(circle.clone());
        }
        // Everybody is assigned at the same moment, so peers are met before loading makes some later than others.
        let mesh = Mesh::meet(&standing.listener, &membership, link.stopper())?;
        let prospect = Prospect::of(assign)?;
        let device = device::open(&assign.device, place_on_host(&assign.peers, assign.rank as usize))?;
        let peers = transport(assign.transport(), mesh, &membership, device)?;
        // From here on the coordinator judges who is waited for too long.
        let mut courier = Courier::heard(peers, link.stopper(), link.progress());
        use_threads(assign.threads);
        let snapshots = assign.neighbour.is_some() && standing.snapshots.is_some();
        let (rank, world) = (assign.rank as usize, assign.world as usize);
        let plan = {
            // Of those who share it, the ones who start with this worker have not taken theirs yet.
            let sharing = sharing(&assign.peers, assign.rank as usize).min(standing.sharing.max(1));
            let gpu = device::free(device)?.map(|bytes| bytes / sharing as u64);
            let sketch = prospect.sketch(gpu.is_some())?;
            let baseline = standing.baseline;
            let demand = prospect.demand(assign, &sketch, baseline, snapshots, self.image_bytes(), gpu)?;
            agree(&mut courier, demand, |demand| Ok(demand.plan(&standing.available, standing.sharing)?))?
        };
        let Prospect { path, spec, layout, compute, form, owned } = prospect;
        tracing::info!(planned_bytes = plan.total(), "{plan}");
        if let Some(source) = &assign.snapshot {
            let needed = plan.loading(self.image_bytes());
            let left = standing.available.bytes / standing.sharing.max(1) as u64;
            if needed > left {
                return Err(exchange::Error::NoRoom { step: source.step, needed, left }.into());
            }
        }
        let behind = plan.copy > 0;
        if assign.trains && owned > 0 && !behind {
            tracing::warn!("there is no memory for a copy of the optimizer's state: training waits while it is saved");
        }

        let weights = Weights::open(&path)?;
        weights.check(&layout)?;
        let tied = spec.tied;
        let failed = |source| match source {
            // It names the file itself.
            model::Error::Weights(error) => Error::Weights(error),
            source => Error::Model { path: path.clone(), source },
        };
        let held = assign.snapshot.as_ref();
        if let Some(exchange) = &standing.snapshots {
            // The neighbour's shard may be a few chunks larger than the own.
            let budget = plan.snapshots + plan.snapshots / 8 + (16 << 20);
            exchange.store.begin(held.map(|s| s.step), link.verdicts(), if plan.snapshots > 0 { budget } else { 0 });
        }
        let saved = match (held, &assign.resume) {
            (Some(source), _) => Some(Saved::over(&self.gather_images(source, &circle)?)?),
            (None, Some(resume)) => Some(Saved::open(Path::new(&resume.path), resume.step)?),
            (None, None) => None,
        };
        let Choice { stage, wave, recompute, offload } = plan.choice;
        let mut model = match stage {
            Stage::One | Stage::Two => Model::new(spec, compute, device),
            Stage::Three => Model::sharded(spec, compute, device, &layout.shard_elements(rank, world)),
        };
        match &saved {
            None => model
                .fill(|name, range, out| {
                    link.progress().mark();
                    weights.read_f32(name, range, out).map_err(model::Error::from)
                })
                .map_err(failed)?,
            Some(saved) => {
                let filled = model.fill(|name, range, out| {
                    link.progress().mark();
                    let read = match held {
                        // Peers have the rest.
                        Some(_) => saved.read_masters_here(name, range, out),
                        None => saved.read(name, Part::Master, range, out),
                    };
                    read.map_err(Filling::from)
                });
                filled.map_err(|error| error.named(&path))?;
            }
        };
        model.set_plan(recompute, plan.activations_there() as usize);
        let mut optimizer = None;
        if assign.trains {
            // A tied embedding receives two leaves from each micro-batch.
            let leaves = assign.micro_batches as usize * if tied { 2 } else { 1 };
            let away = device != tch::Device::Cpu && offload.leaves_sums();
            let adding = Adding { stage, leaves, one_wave: wave >= prospect::micro_batches(assign), away };
            let mut new = Optimizer::new(model.layout().clone(), rank, world, self.settings(form), adding);
            match &saved {
                None => new.load_masters(|name, range, out| {
                    link.progress().mark();
                    weights.read_f32(name, range, out)
                })?,
                Some(saved) => new.load_state(|name, part, range, out| {
                    link.progress().mark();
                    saved.read(name, part, range, out)
                })?,
            }
            if away {
                new.move_to(device, offload).map_err(|error| failed(error.into()))?;
                model.live_on_device().map_err(failed)?;
            }
            optimizer = Some(new);
        }
        drop((weights, saved));
        let forget = || {
            if let Some(exchange) = &standing.snapshots {
                exchange.store.begin(None, link.verdicts(), 0);
            }
        };
        if held.is_some() {
            // Once everyone has loaded, nobody asks for an image any more.
            courier.send(|peers: &mut dyn Collective| peers.all_gather_bytes(&[])).wait()?;
            if plan.snapshots == 0 {
                forget();
            }
        }
        let mut engine = Engine::new(model, optimizer, courier);
        let stuck = |error| match error {
            engine::Error::Micro(fault) => failed(fault.source),
            error => Error::Train(train::Error::of(error, &[])),
        };
        if held.is_some() {
            engine.spread();
            engine.settle().map_err(stuck)?;
        }
        try_worst(assign, &mut engine, &plan).map_err(stuck)?;

        let link = *link;
        let new_saver =
            |o: &Optimizer| Saver::new(&o.source(&engine.model), o.layout().clone(), behind, link.reporter(), *epoch);
        let saver = engine.optimizer.as_ref().map(new_saver);
        let here = held.map(|s| s.step).or(assign.resume.as_ref().map(|r| r.step)).unwrap_or(0);
        let (planned_bytes, gpu_planned_bytes) = (plan.total(), plan.gpu.total());
        let mut trainer =
            Trainer { link, engine, saver, snapshots: None, wave, planned_bytes, gpu_planned_bytes, here };
        link.report(Body::Ready(Ready { memory: Some(trainer.memory()), snapshots: plan.snapshots > 0 }))?;
        let every = link.go()?.snapshot_every;
        if let (Some(exchange), Some(neighbour), 1.., Some(optimizer)) =
            (&standing.snapshots, &assign.neighbour, every, &trainer.engine.optimizer)
        {
            let (store, neighbour, reporter) = (exchange.store.clone(), neighbour.clone(), link.reporter());
            let mut keeper = Keeper::new(Means { store, every, neighbour, circle, reporter, epoch: *epoch });
            let first = held.and_then(|source| source.images.first()?.held.as_ref());
            if let Some((name, _)) = first.and_then(exchange::identify) {
                // Whoever was lost held a part of it: it is in two places again, cut for those who are here now.
                keeper.take(name.step, name.timeline, &optimizer.source(&trainer.engine.model));
            }
            trainer.snapshots = Some(keeper);
        } else {
            forget();
        }
        Ok(Training { trainer })
    }

    fn membership(&self) -> Result<Membership, Error> {
        let Assign { rank, world, peers, peer_key, peer_timeout, .. } = &self.assign;
        let malformed = |what: &str| link::Error::Protocol(format!("sent {what}"));
        let key = peer_key[..].try_into().map_err(|_| malformed("a peer key that is not 32 bytes long"))?;
        if peers.len() != *world as usize || rank >= world {
            return Err(malformed("an assignment with another number of peers than workers").into());
        }
        if !(peer_timeout.is_finite() && *peer_timeout > 0.0) {
            return Err(Error::Unsupported("cluster.peer_timeout must be a positive number of seconds".into()));
        }
        Ok(Membership {
            rank: *rank as usize,
            addresses: peers.clone(),
            key,
            term: self.epoch.term,
            generation: self.epoch.generation,
            timeout: Duration::from_secs_f64(*peer_timeout),
            lends: self.assign.transport() != Transport::Tcp,
        })
    }

    fn settings(&self, form: Form) -> Settings {
        let optimizer = self.assign.optimizer.unwrap_or_default();
        Settings {
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            eps: optimizer.eps,
            weight_decay: optimizer.weight_decay,
            max_grad_norm: optimizer.max_grad_norm,
            form,
            seed: optimizer.seed,
        }
    }
}

/// Why parameters could not be filled from a checkpoint.
enum Filling {
    Model(model::Error),
    Restore(restore::Error),
}

impl From<model::Error> for Filling {
    fn from(error: model::Error) -> Self {
        Filling::Model(error)
    }
}

impl From<restore::Error> for Filling {
    fn from(error: restore::Error) -> Self {
        Filling::Restore(error)
    }
}

impl Filling {
    fn named(self, path: &Path) -> Error {
        match self {
            Filling::Model(source) => Error::Model { path: path.into(), source },
            Filling::Restore(error) => Error::Restore(error),
        }
    }
}

/// How many workers of a lower rank share `rank`'s machine.
fn place_on_host(addresses: &[String], rank: usize) -> usize {
    neighbours(&addresses[..=rank], rank) - 1
}

/// How many workers share the GPU of `rank`, itself included.
fn sharing(addresses: &[String], rank: usize) -> usize {
    neighbours(addresses, rank).div_ceil((tch::Cuda::device_count() as usize).max(1))
}

/// How many of the workers share `rank`'s machine, itself included.
fn neighbours(addresses: &[String], rank: usize) -> usize {
    let host = |address: &String| address.rsplit_once(':').map(|(host, _)| host.to_owned());
    addresses.iter().filter(|a| host(a) == host(&addresses[rank])).count()
}

/// Sets the threads within an operation. Threads between operations cannot be set twice in a process, and one is right.
fn use_threads(threads: u32) {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| tch::set_num_interop_threads(1));
    tch::set_num_threads(threads.max(1) as i32);
}

/// Carries out directives until the last.
pub struct Training<'l> {
    trainer: Trainer<'l>,
}

impl<'l> Training<'l> {
    pub fn run(mut self) -> Result<Draining<'l>, Error> {
        let link = self.trainer.link;
        for due in 1.. {
            let directive = link.directive()?;
            if directive.id != due {
                let sentence = format!("sent directive {} where {due} was due", directive.id);
                return Err(link::Error::Protocol(sentence).into());
            }
            let keys = link::keys(&directive);
            let report = match directive.body {
                Some(directive::Body::Step(step)) => {
                    link.progress().set_step(Some(step.step));
                    let report = match step.probe {
                        true => self.trainer.probe(&step, &keys)?,
                        false => self.trainer.step(&step, &keys)?,
                    };
                    link.progress().set_step(None);
                    Body::Step(report)
                }
                Some(directive::Body::Evaluate(evaluate)) => {
                    Body::Evaluate(self.trainer.evaluate(&evaluate, directive.id, &keys)?)
                }
                Some(directive::Body::Generate(generate)) => {
                    Body::Generate(self.trainer.generate(directive.id, &generate, &keys)?)
                }
                Some(directive::Body::Checkpoint(checkpoint)) => Body::Copied(self.trainer.checkpoint(checkpoint)?),
                Some(directive::Body::Finish(_)) => break,
                None => {
                    return Err(link::Error::Protocol("sent a directive that this worker does not know".into()).into())
                }
            };
            link.report(report)?;
        }
        self.trainer.finish();
        Ok(Draining { link })
    }
}

/// Has carried out everything; memory and peers are given back.
pub struct Draining<'l> {
    link: &'l Link,
}

impl Draining<'_> {
    pub fn run(self) -> Result<(), Error> {
        self.link.progress().enter(Phase::Drain);
        Ok(self.link.drained()?)
    }
}

#[cfg(test)]
mod tests;
