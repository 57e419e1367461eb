//! One JSON object per event on a line: the form for scripts. Names and fields are part of the command line's contract.

use super::state::RunState;
use super::View;
use serde_json::{json, Value};
use std::io::{self, Write};
use unisono_proto::v1::{event::Body, Event, Failure, Phase};

/// Writes every event as a line of JSON.
pub struct Json<W> {
    out: W,
}

impl<W: Write + Send> Json<W> {
    pub fn new(out: W) -> Self {
        Json { out }
    }
}

impl<W: Write + Send> View for Json<W> {
    fn show(&mut self, event: &Event, _: &RunState) -> io::Result<()> {
        let Some(value) = object(event) else { return Ok(()) };
        // One write per line: a reader on the pipe never sees half an object.
        self.out.write_all(format!("{value}\n").as_bytes())?;
        self.out.flush()
    }
}

/// The object of one event. Numbers keep all their bits: a float is written with the shortest digits that read back
/// as itself.
pub fn object(event: &Event) -> Option<Value> {
    Some(match event.body.as_ref()? {
        Body::Started(s) => json!({
            "event": "started", "run_dir": s.run_dir, "model": s.model, "parameters": s.parameters, "steps": s.steps,
            "train_rows": s.train_rows, "validation_rows": s.validation_rows, "test_rows": s.test_rows,
        }),
        Body::Step(s) => json!({
            "event": "step", "step": s.step, "loss": s.loss, "grad_norm": s.grad_norm, "lr": s.lr,
            "examples": s.examples, "tokens": s.tokens, "target_tokens": s.target_tokens, "seconds": s.seconds,
            "generation": s.generation, "rank_tokens": s.rank_tokens,
        }),
        Body::Eval(e) => json!({
            "event": "eval", "step": e.step, "split": e.split, "task": e.task, "loss": e.loss,
            "perplexity": e.perplexity, "token_accuracy": e.token_accuracy, "target_tokens": e.targets,
        }),
        Body::Memory(m) => json!({
            "event": "memory", "rank": m.rank, "planned_bytes": m.planned_bytes, "peak_bytes": m.peak_bytes,
            "optimizer_bytes": m.optimizer_bytes,
        }),
        Body::Checkpoint(c) => json!({
            "event": "checkpoint", "step": c.step, "path": c.path, "bytes": c.bytes, "seconds": c.seconds,
            "digest": c.digest,
        }),
        Body::Membership(m) => json!({
            "event": "membership", "generation": m.generation,
            "members": m.members.iter().map(|m| json!({"rank": m.rank, "host": m.host, "pid": m.pid})).collect::<Vec<_>>(),
        }),
        Body::Done(d) => json!({
            "event": "done", "steps": d.steps, "seconds": d.seconds, "tokens": d.tokens, "export": d.export,
            "digest": d.digest,
        }),
        Body::Failed(f) => failure(f),
    })
}

fn failure(f: &Failure) -> Value {
    json!({
        "event": "failed", "rank": f.rank, "host": f.host, "phase": phase(f.phase()), "step": f.step,
        "message": f.message, "bad_input": f.bad_input,
    })
}

/// A phase as people read it.
pub fn phase(phase: Phase) -> &'static str {
    match phase {
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

#[cfg(test)]
mod tests {
    use super::super::state::tests::{event, step};
    use super::*;

    #[test]
    fn a_step_has_the_fields_of_the_contract_in_order() {
        let value = object(&event(3, 1.0, step(7, 0.1 + 0.2, 0.5))).unwrap();
        assert_eq!(
            value.to_string(),
            r#"{"event":"step","step":7,"loss":0.30000000000000004,"grad_norm":1.25,"lr":0.001,"examples":8,"tokens":1000,"target_tokens":400,"seconds":0.5,"generation":1,"rank_tokens":[600,400]}"#
        );
    }

    #[test]
    fn floats_read_back_bit_for_bit() {
        for bits in [0x3FD5555555555555u64, 0x4008000000000001, 0x3F1A36E2EB1C432D] {
            let loss = f64::from_bits(bits);
            let text = object(&event(1, 1.0, step(1, loss, 0.5))).unwrap().to_string();
            let back: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(back["loss"].as_f64().unwrap().to_bits(), bits);
        }
    }

    #[test]
    fn a_failure_names_rank_phase_and_step() {
        let failed = Failure {
            rank: Some(1),
            host: "a".into(),
            phase: Phase::Reduce as i32,
            step: Some(4),
            message: "gone".into(),
            bad_input: false,
        };
        let value = object(&event(1, 1.0, Body::Failed(failed))).unwrap();
        assert_eq!((&value["rank"], &value["phase"], &value["step"]), (&json!(1), &json!("reduce"), &json!(4)));
    }
}
