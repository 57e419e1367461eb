//! The phases of a run, and the only ways from one to the next.

/// Where a run is. Transitions:
///
/// ```text
/// Gathering --(the last worker joined: ranks are assigned)--> Loading
/// Loading   --(every rank is ready: go)-----------------------> Running
/// Running   --(every rank drained, last checkpoint committed,
///              what the run leaves behind is written)---------> Finished
/// any of the three --(a rank lost, silent or failed; results that contradict each other;
///                     a checkpoint that cannot be committed; a stop)--> Failed
/// ```
///
/// `Finished` and `Failed` are final: no directive leaves the machine in them and every event is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for workers. One that leaves again is forgotten.
    Gathering,
    /// Every worker has a rank, loads the model and runs the worst micro-batch once.
    Loading,
    /// Directives are under way.
    Running,
    Finished,
    Failed,
}

impl Phase {
    /// Nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Phase::Finished | Phase::Failed)
    }
}
