//! `[cluster]`: who computes, what is sharded over whom, and how long to wait for whom.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cluster {
    /// "auto": one per GPU; one per core on a CPU, at most train.micro_batches.
    pub workers: Count,
    /// Intra-op threads of each worker; decides the bits on a CPU.
    pub threads_per_worker: usize,
    /// What workers compute on.
    pub device: Device,
    /// What is sharded over the workers (ZeRO): 1, the optimizer's state; 2, gradients too, and micro-batches go through the
    /// layers together; 3, parameters too, gathered block by block. "auto": the one expected to be fastest.
    pub zero_stage: ZeroStage,
    /// What the backward pass computes again to save memory; "auto": the least that fits. Same bits.
    pub recompute: Recompute,
    /// What of the training state lies in host memory where workers compute on GPUs, which update it piece by piece; "auto":
    /// the least that fits. Same bits. On a processor it has no meaning.
    pub offload: Offload,
    /// Which worker computes which micro-batch. Same bits.
    pub assignment: Assignment,
    /// What sums and parameters travel over from worker to worker. Same bits.
    pub transport: Transport,
    /// Seconds for which nothing may move between the workers while none of them computes; then the one that all wait for is
    /// named and replaced. Who waits for a peer that computes is patient for as long as that takes (cluster.hang_after). Also
    /// the seconds within which workers must have met.
    pub peer_timeout: f64,
    /// Seconds between a worker's signs of life, which come from a thread that never computes.
    pub heartbeat: f64,
    /// Seconds without a sign of life after which a worker is lost: a stopped process, a dead machine. At least twice
    /// cluster.heartbeat; more for a network or a machine that stalls.
    pub lease: f64,
    /// Seconds that a worker may compute without progress while its signs of life go on, if that is also ten times what the
    /// phase takes as a rule: it is named and replaced. Phases of which nothing is known yet have an hour.
    pub hang_after: f64,
    /// Seconds that a run waits for somebody in a lost worker's place; then it goes on with fewer. A worker tries as long
    /// to reach a coordinator that it has lost.
    pub rejoin_timeout: f64,
    /// Losses of workers in a row, without anything new in between, that a run survives; 0: the first lost worker ends it.
    pub restarts: u32,
    /// Hours for which a token that is carried to other machines (worker.token) lets somebody in; who was let in stays.
    pub token_hours: f64,
    /// Processes that worker.token lets in; "auto": two for each worker, so that each may be replaced once by one that has
    /// lost its pass.
    pub token_uses: Count,
}

impl Default for Cluster {
    fn default() -> Self {
        Cluster {
            workers: Count::Auto,
            threads_per_worker: 1,
            device: Device::Auto,
            zero_stage: ZeroStage::Auto,
            recompute: Recompute::Auto,
            offload: Offload::Auto,
            assignment: Assignment::Balanced,
            transport: Transport::Auto,
            peer_timeout: 60.0,
            heartbeat: 0.25,
            lease: 1.5,
            hang_after: 5.0,
            rejoin_timeout: 60.0,
            restarts: 3,
            token_hours: 24.0,
            token_uses: Count::Auto,
        }
    }
}

/// "auto" or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    Auto,
    Exactly(usize),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The processor, until GPUs have proved themselves.
    #[default]
    Auto,
    Cpu,
    Cuda,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// NCCL between GPUs that have a worker each; else memory between workers on one machine, where Linux allows it, and TCP.
    #[default]
    Auto,
    /// Sockets, on one machine too.
    Tcp,
    /// From GPU to GPU; needs cluster.device = "cuda".
    Nccl,
}

/// "auto" or a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroStage {
    Auto,
    Stage(u32),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// The least that fits the worker's memory.
    #[default]
    Auto,
    Nothing,
    /// The outputs of norms and of the MLP's activation.
    Norms,
    /// Gate and up too: one matrix product of four.
    UpProjection,
    /// All but the residual stream before each block.
    Block,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Offload {
    /// The least that fits the GPU's memory.
    #[default]
    Auto,
    /// All of it lies on the GPU.
    Nothing,
    /// What the parameters lack of their masters.
    Masters,
    /// AdamW's moments.
    Moments,
    /// Both.
    State,
    /// Sums of gradients too: processors add them, and update.
    All,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Assignment {
    /// By cost.
    #[default]
    Balanced,
    /// At random by seed, to see that it does not matter.
    Shuffled,
}

/// Serializes `Auto` as "auto" and the rest as a number.
macro_rules! auto_or_number {
    ($type:ident, $variant:ident, $number:ty) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self {
                    $type::Auto => serializer.serialize_str("auto"),
                    $type::$variant(n) => serializer.serialize_u64(*n as u64),
                }
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                #[derive(Deserialize)]
                #[serde(untagged)]
                enum Raw {
                    Number($number),
                    Word(String),
                }
                match Raw::deserialize(deserializer)? {
                    Raw::Number(n) => Ok($type::$variant(n)),
                    Raw::Word(w) if w == "auto" => Ok($type::Auto),
                    Raw::Word(w) => Err(serde::de::Error::custom(format!("\"{w}\" is neither \"auto\" nor a number"))),
                }
            }
        }
    };
}

auto_or_number!(Count, Exactly, usize);
auto_or_number!(ZeroStage, Stage, u32);
