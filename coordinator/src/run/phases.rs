//! The phases of a run, and the only ways from one to the next.

/// Where a run is. Transitions:
///
/// ```text
/// Gathering --(enough workers joined, or after a loss nobody else came: ranks are assigned)--> Loading
/// Loading   --(every rank is ready: go)------------------------------------------------------> Running
/// Loading, Running --(a rank lost, silent or cut off from a peer: the generation is over)----> Gathering
/// Running   --(every rank drained, last checkpoint committed, what the run leaves behind
///              is written)-------------------------------------------------------------------> Finished
/// any of the three --(too many losses at one place; a rank that fails whoever computes;
///                     results that contradict each other; a checkpoint that cannot be
///                     committed; a stop)-----------------------------------------------------> Failed
/// any of the three --(somebody asks to stop; what was trained is saved, or the grace for it is
///                     over)------------------------------------------------------------------> Stopped
/// ```
///
/// `Finished`, `Failed` and `Stopped` are final: no directive leaves the machine in them and every event is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for workers, at the start or after a loss. One that leaves again is forgotten.
    Gathering,
    /// Every worker has a rank, loads the model and runs the worst micro-batch once.
    Loading,
    /// Directives are under way.
    Running,
    Finished,
    Failed,
    /// Ended early on somebody's wish.
    Stopped,
}

impl Phase {
    /// Nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Phase::Finished | Phase::Failed | Phase::Stopped)
    }
}
