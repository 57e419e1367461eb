//! A worker that speaks the protocol without libtorch. It checks every batch it gets, and its "loss" is a function of
//! the batch alone, so that a test can say what a run must come to.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Interval;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming};
use unisono_configs::model::Layout;
use unisono_proto::dial::{dial, training, Token};
use unisono_proto::v1::coordinator_message::Body as Order;
use unisono_proto::v1::directive::Body as Task;
use unisono_proto::v1::worker_message::Body;
use unisono_proto::v1::{
    Assign, BatchKey, BatchRequest, CheckpointCopied, CheckpointFile, CheckpointReport, Continuation,
    CoordinatorMessage, Drained, Epoch, EvaluateReport, Failure, Fingerprint, GenerateReport, Halted, Heartbeat, Join,
    LossPart, MicroBatch, Phase, Ready, StepReport, Suite, TensorRange, WorkerMessage,
};
use unisono_proto::{get_u32s, put_u32s, NO_TARGET};

/// Requests for batches that are unanswered at most.
const CREDIT: usize = 4;

/// A worker and the ways in which it misbehaves.
#[derive(Clone)]
pub struct FakeWorker {
    pub address: String,
    pub token: Token,
    pub layout: Layout,
    pub fingerprint: Fingerprint,
    /// Its name among its peers, though it has nothing to tell them.
    pub listen: String,
    /// Leaves without a word in the middle of this step.
    pub dies_in: Option<u64>,
    /// Reports a failure in this step.
    pub fails_in: Option<u64>,
    /// How long it "computes" each step.
    pub pace: Duration,
    pub tally: Arc<Tally>,
}

/// What workers count together.
#[derive(Default)]
pub struct Tally {
    /// Looks at every training micro-batch.
    pub inspect: Option<Box<dyn Fn(&MicroBatch) + Send + Sync>>,
    /// Steps that were there when the one before was done, and those that were waited for.
    pub ahead: AtomicU64,
    pub waited: AtomicU64,
}

/// How a worker's life ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// After Finish. With the micro-batches computed.
    Drained {
        computed: BTreeSet<(u64, u32)>,
    },
    Aborted(Failure),
    /// Its generation is over, and it would join again.
    Regrouped,
    /// The coordinator said no, in these words.
    Refused(String),
    Died,
}

/// What the fake model makes of one micro-batch: "loss" sum, targets, first choices that hit.
pub fn judge(batch: &MicroBatch) -> LossPart {
    let tokens = get_u32s(&batch.tokens).expect("whole words");
    let targets = get_u32s(&batch.targets).expect("whole words");
    let starts = get_u32s(&batch.starts).expect("whole words");
    assert_eq!(tokens.len(), targets.len());
    assert_eq!(starts.first(), Some(&0));
    assert!(starts.windows(2).all(|w| w[0] < w[1]) && starts.last().is_some_and(|&s| (s as usize) < tokens.len()));
    let asked: Vec<(u32, u32)> = tokens.iter().copied().zip(targets).filter(|(_, t)| *t != NO_TARGET).collect();
    // Within a document the next token is the target; the last one's is not fed.
    for (index, &start) in starts.iter().enumerate() {
        let end = starts.get(index + 1).map_or(tokens.len(), |&s| s as usize);
        let (tokens, targets) = (&tokens[start as usize..end], get_u32s(&batch.targets).expect("whole words"));
        let targets = &targets[start as usize..end];
        assert!(targets.windows(1).zip(tokens.iter().skip(1)).all(|(t, next)| t[0] == NO_TARGET || t[0] == *next));
        assert_ne!(targets.last(), Some(&NO_TARGET), "a document ends with its completion");
    }
    let loss_sum = asked.iter().map(|(token, target)| 1.0 + f64::from(token * 7 + target) / 1000.0).sum();
    let key = batch.key.expect("a batch has a key");
    LossPart { micro_batch: key.micro_batch, loss_sum, targets: asked.len() as u64, correct: asked.len() as u64 / 2 }
}

/// The fake gradient norm of a step.
pub fn norm(step: u64) -> f64 {
    1.0 / (1.0 + step as f64)
}

struct Life {
    worker: FakeWorker,
    outbound: mpsc::Sender<WorkerMessage>,
    inbound: Streaming<CoordinatorMessage>,
    requests: mpsc::Sender<BatchRequest>,
    batches: Streaming<MicroBatch>,
    epoch: Option<Epoch>,
    begun: u64,
    assign: Assign,
    computed: BTreeSet<(u64, u32)>,
}

impl FakeWorker {
    pub fn new(address: &str, token: Token, layout: Layout) -> Self {
        static COUNT: AtomicU16 = AtomicU16::new(1);
        let listen = format!("127.0.0.1:{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let fingerprint = Fingerprint { device: "cpu".into(), libtorch: "none".into(), ..Default::default() };
        let (address, pace, tally) = (address.into(), Duration::ZERO, Arc::default());
        FakeWorker { address, token, layout, fingerprint, listen, dies_in: None, fails_in: None, pace, tally }
    }

    /// Joins again whenever its generation is over, until the run is.
    pub async fn live_on(self) -> End {
        loop {
            match self.clone().live().await {
                End::Regrouped => {}
                end => return end,
            }
        }
    }

    /// Lives from Join to the end, or to that of its generation.
    pub async fn live(self) -> End {
        let channel = dial(&self.address, &self.token).await.expect("the coordinator is there");
        let data = dial(&self.address, &self.token).await.expect("the coordinator is there");
        let (outbound, messages) = mpsc::channel(64);
        let join = Join {
            listen: self.listen.clone(),
            host: "fake".into(),
            pid: std::process::id(),
            fingerprint: Some(self.fingerprint.clone()),
            ..Join::default()
        };
        outbound.send(WorkerMessage { epoch: None, body: Some(Body::Join(join)) }).await.expect("open");
        let mut request = Request::new(ReceiverStream::new(messages));
        self.token.authorize(&mut request);
        let inbound = training(channel).attend(request).await.expect("attend").into_inner();
        let (requests, asked) = mpsc::channel(CREDIT);
        let mut request = Request::new(ReceiverStream::new(asked));
        self.token.authorize(&mut request);
        let batches = training(data).batches(request).await.expect("batches").into_inner();
        let (epoch, begun, assign, computed) = (None, 0, Assign::default(), BTreeSet::new());
        Life { worker: self, outbound, inbound, requests, batches, epoch, begun, assign, computed }.live().await
    }
}

impl Life {
    async fn live(mut self) -> End {
        let mut beat = tokio::time::interval(Duration::from_millis(250));
        // Since the directive before was done: whether the next one was there already.
        let mut waits = None;
        loop {
            let message = tokio::select! {
                biased;
                message = self.inbound.message() => message,
                _ = std::future::ready(()), if waits == Some(false) => {
                    waits = Some(true);
                    continue;
                }
                _ = beat.tick() => {
                    self.say(Body::Heartbeat(Heartbeat::default())).await;
                    continue;
                }
            };
            let CoordinatorMessage { epoch, body } = match message {
                Ok(Some(message)) => message,
                Ok(None) => return End::Drained { computed: self.computed },
                Err(status) => return End::Refused(status.message().into()),
            };
            match body.expect("a message has a body") {
                Order::Assign(assign) => {
                    (self.epoch, self.assign) = (epoch, assign);
                    self.say(Body::Ready(Ready::default())).await;
                }
                Order::Go(_) | Order::Acknowledge(_) | Order::Proceed(_) | Order::Retain(_) | Order::Forget(_) => {}
                // A directive is carried out before the next message is read.
                Order::Halt(_) => self.say(Body::Halted(Halted { begun: self.begun })).await,
                Order::Abort(abort) if abort.regroup => return End::Regrouped,
                Order::Abort(abort) => return End::Aborted(abort.failure.expect("an abort says why")),
                Order::Directive(directive) => {
                    let id = directive.id;
                    self.begun = id;
                    match (waits, &directive.body) {
                        (Some(true), Some(Task::Step(_))) => self.worker.tally.waited.fetch_add(1, Ordering::Relaxed),
                        (Some(false), Some(Task::Step(_))) => self.worker.tally.ahead.fetch_add(1, Ordering::Relaxed),
                        _ => 0,
                    };
                    match directive.body.expect("a directive has a body") {
                        Task::Step(step) => {
                            self.say(Body::Heartbeat(Heartbeat {
                                phase: Phase::Forward.into(),
                                step: Some(step.step),
                                ..Heartbeat::default()
                            }))
                            .await;
                            if self.worker.dies_in == Some(step.step) {
                                // What was said before reaches the coordinator first.
                                tokio::time::sleep(Duration::from_millis(200)).await;
                                return End::Died;
                            }
                            if self.worker.fails_in == Some(step.step) {
                                let message = "the device is out of memory".into();
                                let failure = Failure { phase: Phase::Forward.into(), message, ..Default::default() };
                                self.say(Body::Failure(failure)).await;
                                continue;
                            }
                            let parts = self.parts(Suite::Train, step.step, &step.micro_batches).await;
                            self.compute(&mut beat).await;
                            let grad_norm = norm(step.step);
                            self.say(Body::Step(StepReport {
                                step: step.step,
                                parts,
                                grad_norm,
                                ..Default::default()
                            }))
                            .await;
                        }
                        Task::Evaluate(evaluate) => {
                            let parts = self.parts(evaluate.suite(), 0, &evaluate.micro_batches).await;
                            self.say(Body::Evaluate(EvaluateReport { id, parts })).await;
                        }
                        Task::Checkpoint(checkpoint) => {
                            let (step, attempt) = (checkpoint.step, checkpoint.attempt);
                            self.say(Body::Copied(CheckpointCopied { step, attempt })).await;
                            let files = vec![self.save(Path::new(&checkpoint.path), step)];
                            let problem = String::new();
                            self.say(Body::Checkpoint(CheckpointReport { step, files, attempt, problem })).await;
                        }
                        Task::Generate(generate) => {
                            let continuations =
                                self.continuations(&generate.micro_batches, generate.max_new_tokens).await;
                            self.say(Body::Generate(GenerateReport { id, continuations })).await;
                        }
                        Task::Finish(_) => self.say(Body::Drained(Drained {})).await,
                    }
                    waits = Some(false);
                }
            }
        }
    }

    /// Takes its time, and beats meanwhile.
    async fn compute(&mut self, beat: &mut Interval) {
        if self.worker.pace.is_zero() {
            return;
        }
        let done = tokio::time::Instant::now() + self.worker.pace;
        while tokio::time::timeout_at(done, beat.tick()).await.is_ok() {
            self.say(Body::Heartbeat(Heartbeat::default())).await;
        }
    }

    async fn say(&mut self, body: Body) {
        // Fails only after the end.
        self.outbound.send(WorkerMessage { epoch: self.epoch, body: Some(body) }).await.ok();
    }

    async fn batch(&mut self, suite: Suite, step: u64, micro_batch: u32) -> MicroBatch {
        let key = BatchKey { suite: suite.into(), step, micro_batch };
        self.requests.send(BatchRequest { key: Some(key) }).await.expect("open");
        let batch = self.batches.message().await.expect("a batch").expect("a batch");
        assert_eq!(batch.key, Some(key));
        assert!(batch.tokens.len() / 4 <= self.assign.worst_tokens as usize);
        batch
    }

    async fn parts(&mut self, suite: Suite, step: u64, share: &[u32]) -> Vec<LossPart> {
        let mut parts = Vec::new();
        for &micro_batch in share {
            let batch = self.batch(suite, step, micro_batch).await;
            parts.push(judge(&batch));
            if suite == Suite::Train {
                assert!(self.computed.insert((step, micro_batch)));
                self.worker.tally.inspect.iter().for_each(|inspect| inspect(&batch));
            }
        }
        parts
    }

    /// Continues each prompt with its own length, repeated.
    async fn continuations(&mut self, share: &[u32], max_new_tokens: u32) -> Vec<Continuation> {
        let mut all = Vec::new();
        for &micro_batch in share {
            let batch = self.batch(Suite::Generate, 0, micro_batch).await;
            assert!(batch.targets.is_empty());
            let starts = get_u32s(&batch.starts).expect("whole words");
            for (document, &start) in (0..).zip(&starts) {
                let end = starts.get(document as usize + 1).copied().unwrap_or(batch.tokens.len() as u32 / 4);
                let mut tokens = Vec::new();
                put_u32s(&mut tokens, &vec![end - start; max_new_tokens as usize]);
                all.push(Continuation { micro_batch, document, tokens: tokens.into(), ended: false });
            }
        }
        all
    }

    /// Writes the own shard: masters, m and v are functions of step and place.
    fn save(&self, directory: &Path, step: u64) -> CheckpointFile {
        let (rank, world) = (self.assign.rank as usize, self.assign.world as usize);
        let mut ranges = Vec::new();
        for (bucket, shard) in self.worker.layout.buckets.iter().zip(self.worker.layout.shard_elements(rank, world)) {
            for slot in &bucket.tensors {
                let (begin, end) = (slot.range().start.max(shard.start), slot.range().end.min(shard.end));
                if begin < end {
                    let (begin, end) = ((begin - slot.offset) as u64, (end - slot.offset) as u64);
                    ranges.push(TensorRange { tensor: slot.name.clone(), begin, end });
                }
            }
        }
        let mut tensors: Vec<(String, Vec<u8>, usize)> = Vec::new();
        for range in &ranges {
            for (scale, part) in [(1.0, "master"), (0.5, "m"), (0.25, "v")] {
                let value = |at: u64| (step as f32 + at as f32 * 1e-3) * scale;
                let bytes = (range.begin..range.end).flat_map(|at| value(at).to_le_bytes()).collect();
                let name = format!("{}/{part}/{}-{}", range.tensor, range.begin, range.end);
                tensors.push((name, bytes, (range.end - range.begin) as usize));
            }
        }
        let views = tensors.iter().map(|(name, bytes, count)| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![*count], bytes);
            (name.clone(), view.expect("sizes agree"))
        });
        let content = safetensors::serialize(views, None).expect("serializable");
        let name = format!("shard-{rank}-of-{world}.safetensors");
        std::fs::write(directory.join(&name), &content).expect("the coordinator made the directory");
        let blake3 = blake3::hash(&content).as_bytes().to_vec().into();
        CheckpointFile { name, bytes: content.len() as u64, blake3, ranges }
    }
}
