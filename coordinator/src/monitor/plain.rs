//! One line per event: the form for logs and terminals without cursor control.

use super::state::RunState;
use super::View;
use std::io::{self, Write};
use unisono_proto::v1::{event::Body, Evaluated, Event, Failure, Quarantined, StepCommitted};

/// Writes lines; steps at most every `pace` seconds of the run's own time.
pub struct Plain<W> {
    out: W,
    pace: f64,
    last_step_time: Option<f64>,
    failure: bool,
}

impl<W: Write + Send> Plain<W> {
    /// With a `pace` of 0 every step gets its line. The first and the last step always do.
    pub fn new(out: W, pace: f64) -> Self {
        Plain { out, pace, last_step_time: None, failure: true }
    }

    /// For a program that says a failure's sentence itself.
    pub fn without_failure(self) -> Self {
        Plain { failure: false, ..self }
    }

    /// Rate limiting goes by the events' time, not by the clock: a replayed run reads like the live one did.
    fn due(&mut self, event: &Event, step: &StepCommitted, state: &RunState) -> bool {
        let due = step.step == 1
            || step.step == state.steps()
            || self.last_step_time.is_none_or(|last| event.time - last >= self.pace);
        if due {
            self.last_step_time = Some(event.time);
        }
        due
    }
}

impl<W: Write + Send> View for Plain<W> {
    fn show(&mut self, event: &Event, state: &RunState) -> io::Result<()> {
        if let Some(Body::Step(step)) = &event.body {
            if !self.due(event, step, state) {
                return Ok(());
            }
        }
        match line(event, state) {
            Some(_) if !self.failure && matches!(event.body, Some(Body::Failed(_) | Body::Stopped(_))) => Ok(()),
            Some(line) => {
                self.out.write_all(format!("{line}\n").as_bytes())?;
                self.out.flush()
            }
            None => Ok(()),
        }
    }
}

/// The line of one event; `None` where there is nothing to say.
pub fn line(event: &Event, state: &RunState) -> Option<String> {
    Some(match event.body.as_ref()? {
        Body::Started(s) => format!(
            "run {}: {} with {} parameters, {} steps over {} rows ({} validation, {} test)",
            s.run_dir,
            s.model,
            grouped(s.parameters),
            s.steps,
            grouped(s.train_rows),
            grouped(s.validation_rows),
            grouped(s.test_rows),
        ),
        Body::Step(s) => {
            let mut line = format!(
                "step {}/{} loss {:.4} norm {} lr {}",
                s.step,
                state.steps(),
                s.loss,
                significant(s.grad_norm),
                significant(s.lr)
            );
            if let Some(rate) = state.recent_tokens_per_second() {
                line += &format!(" {} tok/s", grouped(rate.round() as u64));
            }
            if let Some(eta) = state.eta_seconds() {
                line += &format!(" ETA {}", clock(eta));
            }
            line
        }
        // One task is all tasks together.
        Body::Eval(e) if e.task.is_empty() && state.tasks(&e.split) == 1 => return None,
        Body::Eval(e) => eval(e),
        Body::Memory(m) => format!(
            "memory rank {} planned {} peak {} optimizer {} zero {}{}",
            m.rank,
            bytes(m.planned_bytes),
            bytes(m.peak_bytes),
            bytes(m.optimizer_bytes),
            m.zero_stage,
            m.gpu.map_or_else(String::new, |gpu| {
                format!(" gpu planned {} peak {}", bytes(gpu.planned_bytes), bytes(gpu.peak_bytes))
            })
        ),
        Body::Checkpoint(c) => {
            format!(
                "checkpoint step {} {} in {:.1} s digest {} at {}",
                c.step,
                bytes(c.bytes),
                c.seconds,
                short(&c.digest),
                c.path
            )
        }
        Body::Membership(m) => {
            let members: Vec<String> =
                m.members.iter().map(|m| format!("rank {} on {} (pid {})", m.rank, m.host, m.pid)).collect();
            format!("membership {}: {}", m.generation, members.join(", "))
        }
        Body::Lost(l) => {
            let who = l.failure.as_ref().map(failure).unwrap_or_default();
            let from = match l.resume_step {
                0 => "from the beginning".to_owned(),
                step => format!("after step {step}"),
            };
            format!("lost {who}; the run goes on {from}")
        }
        Body::Done(d) => {
            let mut line = format!("done {} steps in {} digest {}", d.steps, clock(d.seconds), d.digest);
            if !d.export.is_empty() {
                line += &format!(" exported to {}", d.export);
            }
            line
        }
        Body::Failed(f) => format!("failed {}", failure(f)),
        Body::Warning(w) => format!("warning {}", w.message),
        Body::Stopped(s) => format!("stopped {}", s.message),
        Body::Quarantined(q) => format!("quarantined {}: {}", rows(q), q.message),
    })
}

/// Rows that are named before the rest are counted.
const NAMED: usize = 8;

/// Which rows are left out from when on; the ledger has all their names.
pub fn rows(q: &Quarantined) -> String {
    let named = q.names.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = match q.names.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("from step {} on, {} rows: {named}{more}", q.step, q.rows.len())
}

fn eval(e: &Evaluated) -> String {
    let task = if e.task.is_empty() { String::new() } else { format!(" {}", e.task) };
    format!(
        "{}{task} at step {} loss {:.4} perplexity {} accuracy {:.1}%",
        e.split,
        e.step,
        e.loss,
        significant(e.perplexity),
        e.token_accuracy * 100.0
    )
}

/// Who, where and when in front of what happened, unless the message says so itself.
pub fn failure(f: &Failure) -> String {
    let mut place = Vec::new();
    if let Some(rank) = f.rank {
        let named = format!("rank {rank}");
        if !f.message.contains(&named) {
            place.push(if f.host.is_empty() { named } else { format!("{named} on {}", f.host) });
        }
    }
    let named = format!("phase {}", f.phase().word());
    if f.phase != 0 && !f.message.contains(&named) {
        place.push(named);
    }
    if let Some(step) = f.step {
        if !f.message.contains(&format!("step {step}")) {
            place.push(format!("step {step}"));
        }
    }
    match place.is_empty() {
        true => f.message.clone(),
        false => format!("{}: {}", place.join(", "), f.message),
    }
}

/// 1234567 -> "1,234,567".
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Seconds as m:ss or h:mm:ss.
pub fn clock(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, m, s) => format!("{m}:{s:02}"),
        (h, m, s) => format!("{h}:{m:02}:{s:02}"),
    }
}

/// Bytes in the largest unit that keeps them above 1.
pub fn bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", units[unit]),
    }
}

/// Three or so significant digits: 1e-3, 0.0123, 1.23, 123.
pub fn significant(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    let magnitude = value.abs().log10().floor() as i32;
    match magnitude {
        -2..=5 => {
            let text = format!("{value:.*}", (2 - magnitude).max(0) as usize);
            match text.contains('.') {
                true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
                false => text,
            }
        }
        _ => {
            let text = format!("{value:.2e}");
            let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let mantissa = match mantissa.contains('.') {
                true => mantissa.trim_end_matches('0').trim_end_matches('.'),
                false => mantissa,
            };
            format!("{mantissa}e{exponent}")
        }
    }
}

/// The first digits of a digest: enough to see whether two are one.
fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::{event, started, step};
    use super::super::Display;
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn shown(pace: f64, events: &[Event]) -> Vec<String> {
        let sink = Sink::default();
        let mut display = Display::new(vec![Box::new(Plain::new(sink.clone(), pace))]);
        events.iter().for_each(|e| display.observe(e));
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_step_reads_like_this() {
        let lines = shown(
            0.0,
            &[event(1, 0.0, started(200)), event(2, 1.0, step(11, 3.3, 0.8)), event(3, 2.0, step(12, 3.21449, 0.8))],
        );
        assert_eq!(
            lines[0],
            "run runs/tiny-001: models/tiny with 1,234,567 parameters, 200 steps over 90 rows (5 validation, 5 test)"
        );
        assert_eq!(lines[2], "step 12/200 loss 3.2145 norm 1.25 lr 1e-3 1,250 tok/s ETA 2:30");
    }

    #[test]
    fn steps_are_paced_and_the_first_and_last_always_shown() {
        let mut events = vec![event(1, 0.0, started(100))];
        events.extend((1..=100u64).map(|n| event(n + 1, n as f64 * 0.1, step(n, 1.0, 0.1))));
        let lines = shown(1.0, &events);
        assert!(lines[1].starts_with("step 1/100"), "{lines:?}");
        assert!(lines.last().unwrap().starts_with("step 100/100"), "{lines:?}");
        assert!((10..15).contains(&lines.len()), "{}", lines.len());
        assert_eq!(shown(0.0, &events).len(), 101);
    }

    #[test]
    fn numbers_read_like_a_person_writes_them() {
        let cases = [
            (1e-3, "1e-3"),
            (2e-5, "2e-5"),
            (0.0123456, "0.0123"),
            (1.25, "1.25"),
            (123.4, "123"),
            (5e6, "5e6"),
            (100.0, "100"),
            (0.0, "0"),
        ];
        for (value, text) in cases {
            assert_eq!(significant(value), text);
        }
        assert_eq!((grouped(0), grouped(999), grouped(1_000)), ("0".into(), "999".into(), "1,000".into()));
        assert_eq!((clock(42.4), clock(3_661.0)), ("0:42".into(), "1:01:01".into()));
        assert_eq!((bytes(512), bytes(1_610_612_736)), ("512 B".into(), "1.5 GiB".into()));
    }

    #[test]
    fn a_failure_is_placed_once() {
        let mut f = Failure {
            rank: Some(1),
            host: "node".into(),
            phase: 4,
            step: Some(9),
            message: "was killed".into(),
            ..Failure::default()
        };
        assert_eq!(failure(&f), "rank 1 on node, phase reduce, step 9: was killed");
        f.message = "rank 1 was killed in phase reduce of step 9".into();
        assert_eq!(failure(&f), f.message);
    }
}
