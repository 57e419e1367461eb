//! What happens to the machine, what it wants done about it, and why it says no.

use std::sync::Arc;
use unisono_proto::v1::{
    event::Body, Assign, CheckpointCommitted, CheckpointFile, CoordinatorMessage, Epoch, Evaluated, Failure,
    Fingerprint, Join, RunStopped, WorkerMessage,
};

/// One worker's `Attend` stream. Grows with every stream; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Connection(pub u64);

/// Something that happened. `now`, which comes with every event, is in seconds since the Unix epoch and never goes back.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The first message of a stream.
    Joined { from: Connection, join: Join },
    /// Something that people should know, and that changes nothing.
    Warned { kind: &'static str, step: u64, message: String },
    /// Any later message.
    Message { from: Connection, message: WorkerMessage },
    /// The stream is over; `reason` completes the sentence "its connection ...".
    Ended { from: Connection, reason: String },
    /// [`Effect::MakeCheckpoint`] could not be carried out.
    CheckpointUnprepared { attempt: u32, problem: String },
    /// [`Effect::CommitCheckpoint`] was carried out, or why not.
    CheckpointCommitted { attempt: u32, result: Result<CheckpointCommitted, NotCommitted> },
    /// [`Effect::Conclude`] was carried out, or why not.
    Concluded { result: Result<Conclusion, String> },
    /// The rows of the steps up to `steps` are tokenized, so that these steps can be dealt.
    Prepared { steps: u64 },
    /// A row of `step` makes it impossible to go on; a sentence that names it and the remedy.
    Unprepared { step: u64, message: String },
    /// Somebody wants the run to save and stop; completes the sentence "the run was stopped by ...".
    Interrupt { by: String },
    /// Somebody wants the run to end now; a sentence that says who.
    Stop { reason: String },
    /// Time passed. Comes several times a second.
    Tick,
}

/// Why a checkpoint was not committed: one sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotCommitted {
    pub message: String,
    /// Another attempt would end alike.
    pub fatal: bool,
}

/// What a finished run leaves behind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conclusion {
    /// Directory with the exported model; empty: nothing was exported.
    pub export: String,
    /// Digest of the last checkpoint, hexadecimal; empty: not computed.
    pub digest: String,
}

/// Something to be done. Effects are carried out in order, and only after every `Append` of the same batch is durable.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// A new entry of the ledger.
    Append(Body),
    Send {
        to: Connection,
        message: CoordinatorMessage,
    },
    /// Send `assign` with these `peers`, of which all ranks are told.
    Assign {
        to: Connection,
        epoch: Epoch,
        assign: Box<Assign>,
        peers: Arc<[String]>,
    },
    /// Nothing more is sent on this stream.
    Close {
        to: Connection,
    },
    /// Create the directory that the checkpoint after `step` is written into, before anything further is sent.
    MakeCheckpoint {
        step: u64,
        attempt: u32,
    },
    /// Delete what an attempt that failed has written.
    DiscardCheckpoint {
        step: u64,
        files: Vec<Vec<CheckpointFile>>,
    },
    /// Every rank's files are on disk: check them and write the manifest, then answer with
    /// [`Event::CheckpointCommitted`]. Training goes on meanwhile.
    CommitCheckpoint(PendingCheckpoint),
    /// Delete checkpoints that are older than those to be kept, but not the one after step `spare`, which is being loaded.
    Prune {
        spare: Option<u64>,
    },
    /// All work is done: write what the run leaves behind, then answer with [`Event::Concluded`].
    Conclude {
        step: u64,
    },
    /// The run is over.
    Done(Outcome),
}

/// A checkpoint whose files are written and whose manifest is not.
#[derive(Debug, Clone, PartialEq)]
pub struct PendingCheckpoint {
    pub step: u64,
    pub attempt: u32,
    pub term: u64,
    pub generation: u64,
    /// Each rank's files, in rank order.
    pub files: Vec<Vec<CheckpointFile>>,
    /// When the directive was sent.
    pub since: f64,
}

/// How the run ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// Committed steps.
    pub steps: u64,
    /// Trained on in this run, padding excluded.
    pub tokens: u64,
    /// From Go to the end.
    pub seconds: f64,
    pub conclusion: Conclusion,
    /// Every evaluation, in order.
    pub evaluations: Vec<Evaluated>,
    /// For each prompt its continuation, where the run continued prompts.
    pub continuations: Vec<Continuation>,
    /// Why the run failed; absent if it did not.
    pub failure: Option<Failure>,
    /// Where it was stopped before its end; absent if it was not.
    pub stopped: Option<RunStopped>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Continuation {
    /// Without the token that ended it.
    pub tokens: Vec<u32>,
    /// False when it ran into the limit of new tokens.
    pub ended: bool,
}

/// Why an event changes nothing. Each is one sentence for a person.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("the run is over; start a new one")]
    Over,
    #[error("the numerics of this worker on {host} differ from those of the workers that joined before: {differences}; run the same unisono-worker and libtorch on the same kind of processor and GPU everywhere, so that results do not depend on who computes them")]
    Fingerprint { host: String, differences: String },
    #[error("the worker on {host} did not say on which host:port it accepts its peers; use the unisono-worker that belongs to this coordinator")]
    Listen { host: String },
    #[error("this stream belongs to no worker of the run; join again")]
    Stranger,
    #[error("a message of term {term}, generation {generation} came in term {current_term}, generation {current_generation}, and was dropped")]
    Stale { term: u64, generation: u64, current_term: u64, current_generation: u64 },
    #[error("nobody waits for this answer; it was dropped")]
    Unasked,
}

/// Names what differs, with both values; empty when nothing does.
pub(super) fn differences(theirs: &Fingerprint, ours: &Fingerprint) -> String {
    let fields = [
        ("device", &theirs.device, &ours.device),
        ("instruction set", &theirs.instruction_set, &ours.instruction_set),
        ("libtorch", &theirs.libtorch, &ours.libtorch),
        ("binary", &theirs.binary, &ours.binary),
        ("GPU", &theirs.gpu, &ours.gpu),
    ];
    let differing = fields.iter().filter(|(_, a, b)| a != b);
    let told: Vec<String> = differing.map(|(name, a, b)| format!("{name} \"{a}\" against \"{b}\"")).collect();
    told.join(", ")
}
