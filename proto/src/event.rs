//! Ledger entries as JSON objects: what `--json` prints and what the ledger's `body` column holds.

use crate::v1::{event::Body, Event, Phase};
use serde_json::{Map, Value};

impl Body {
    /// The word that names this kind of entry: the `event` field of its JSON, the `kind` column of the ledger.
    pub fn kind(&self) -> &'static str {
        match self {
            Body::Started(_) => "started",
            Body::Step(_) => "step",
            Body::Eval(_) => "eval",
            Body::Memory(_) => "memory",
            Body::Checkpoint(_) => "checkpoint",
            Body::Membership(_) => "membership",
            Body::Done(_) => "done",
            Body::Failed(_) => "failed",
            Body::Lost(_) => "lost",
            Body::Warning(_) => "warning",
            Body::Stopped(_) => "stopped",
            Body::Quarantined(_) => "quarantined",
        }
    }

    /// `{"event": kind, ...}` with the message's fields. A number that is not finite becomes null.
    pub fn to_json(&self) -> Map<String, Value> {
        let fields = match self {
            Body::Started(message) => serde_json::to_value(message),
            Body::Step(message) => serde_json::to_value(message),
            Body::Eval(message) => serde_json::to_value(message),
            Body::Memory(message) => serde_json::to_value(message),
            Body::Checkpoint(message) => serde_json::to_value(message),
            Body::Membership(message) => serde_json::to_value(message),
            Body::Done(message) => serde_json::to_value(message),
            Body::Failed(message) => serde_json::to_value(message),
            Body::Lost(message) => serde_json::to_value(message),
            Body::Warning(message) => serde_json::to_value(message),
            Body::Stopped(message) => serde_json::to_value(message),
            Body::Quarantined(message) => serde_json::to_value(message),
        };
        let mut object = Map::new();
        object.insert("event".into(), self.kind().into());
        if let Ok(Value::Object(fields)) = fields {
            object.extend(fields);
        }
        object
    }
}

impl Event {
    /// The body's JSON with `sequence` and `time`; empty for a body that this build does not know.
    pub fn to_json(&self) -> Map<String, Value> {
        let Some(body) = &self.body else { return Map::new() };
        let mut object = body.to_json();
        object.insert("sequence".into(), self.sequence.into());
        object.insert("time".into(), self.time.into());
        object
    }
}

impl Phase {
    /// The phase as a word: "forward", "reduce", ...; "unknown" where it was not told.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Unspecified => "unknown",
            Phase::Join => "join",
            Phase::Load => "load",
            Phase::Forward => "forward",
            Phase::Reduce => "reduce",
            Phase::Update => "update",
            Phase::Gather => "gather",
            Phase::Evaluate => "evaluate",
            Phase::Checkpoint => "checkpoint",
            Phase::Generate => "generate",
            Phase::Drain => "drain",
        }
    }
}

/// Writes a phase as its word.
pub(crate) fn phase<S: serde::Serializer>(phase: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(Phase::try_from(*phase).unwrap_or_default().word())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{Failure, GpuMemory, Memory, StepCommitted};

    #[test]
    fn entries_read_as_objects() {
        let step = Body::Step(StepCommitted { step: 1, loss: 0.1 + 0.2, ..Default::default() });
        let event = Event { sequence: 7, time: 1.5, body: Some(step) };
        let text = serde_json::to_string(&event.to_json()).unwrap();
        assert!(text.starts_with(r#"{"event":"step","step":1,"loss":0.30000000000000004,"#), "{text}");
        assert!(text.ends_with(r#""sequence":7,"time":1.5}"#), "{text}");
        let failed = Body::Failed(Failure { phase: Phase::Reduce.into(), rank: Some(1), ..Default::default() });
        assert_eq!(failed.to_json()["phase"], "reduce");
        assert_eq!(failed.to_json()["rank"], 1);
        let memory = |gpu| Body::Memory(Memory { gpu, ..Default::default() }).to_json();
        assert!(!memory(None).contains_key("gpu"), "nothing is said of what is not there");
        assert_eq!(memory(Some(GpuMemory { planned_bytes: 2, peak_bytes: 1 }))["gpu"]["peak_bytes"], 1);
    }
}
