//! A timeline of the first steps, where one is asked for: Chrome's trace format, as `ui.perfetto.dev` opens it. Each worker
//! of a machine appends to the same file after every step, one event a line; the format needs no closing bracket.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Names the file.
const FILE: &str = "UNISONO_TRACE";
/// How many steps of a worker are recorded: a few hundred bytes for each bucket of each.
const STEPS: u64 = 10;

/// Spans that wait for the end of a step.
const MOST: usize = 1 << 16;

/// Who is busy.
#[derive(Debug, Clone, Copy)]
pub enum Track {
    Compute = 1,
    Communication = 2,
}

struct Span {
    track: Track,
    name: String,
    begin: Instant,
    end: Instant,
}

struct Recorder {
    path: PathBuf,
    spans: Mutex<Vec<Span>>,
    /// Steps recorded so far.
    steps: AtomicU64,
    /// The same moment on both clocks.
    zero: (Instant, f64),
}

fn recorder() -> Option<&'static Recorder> {
    static RECORDER: OnceLock<Option<Recorder>> = OnceLock::new();
    let recorder = RECORDER.get_or_init(|| {
        let path = std::env::var_os(FILE)?.into();
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64() * 1e6);
        let zero = (Instant::now(), since);
        Some(Recorder { path, spans: Mutex::default(), steps: AtomicU64::new(0), zero })
    });
    recorder.as_ref().filter(|recorder| recorder.steps.load(Ordering::Relaxed) < STEPS)
}

/// Records from now until the result is dropped, if anything is recorded.
pub fn span(track: Track, name: impl FnOnce() -> String) -> Option<Open> {
    recorder().map(|recorder| Open { recorder, track, name: name(), begin: Instant::now() })
}

/// Something under way.
#[must_use]
pub struct Open {
    recorder: &'static Recorder,
    track: Track,
    name: String,
    begin: Instant,
}

impl Drop for Open {
    fn drop(&mut self) {
        let (track, name) = (self.track, std::mem::take(&mut self.name));
        let span = Span { track, name, begin: self.begin, end: Instant::now() };
        let mut spans = self.recorder.spans.lock().unwrap_or_else(PoisonError::into_inner);
        // Where no step ever ends, as in an evaluation, nobody comes to write them.
        if spans.len() < MOST {
            spans.push(span);
        }
    }
}

/// Writes what was recorded. A file that cannot be written is said once and costs nothing else.
pub fn end_step(rank: usize, step: u64) {
    let Some(recorder) = recorder() else { return };
    let spans = std::mem::take(&mut *recorder.spans.lock().unwrap_or_else(PoisonError::into_inner));
    let mut text = String::new();
    if recorder.steps.fetch_add(1, Ordering::Relaxed) == 0 {
        let named = |what: &str, track: usize, name: &str| {
            let args = serde_json::json!({ "name": name });
            serde_json::json!({ "name": what, "ph": "M", "pid": rank, "tid": track, "args": args }).to_string() + ",\n"
        };
        text += &named("process_name", 0, &format!("rank {rank}"));
        text += &named("thread_name", Track::Compute as usize, "compute");
        text += &named("thread_name", Track::Communication as usize, "communication");
    }
    spans.iter().for_each(|span| text += &(line(span, recorder.zero, rank, step) + ",\n"));
    // One write to a file that is only appended to, so that workers' lines do not mix.
    let written = OpenOptions::new().append(true).create(true).open(&recorder.path);
    if let Err(error) = written.and_then(|mut file| file.write_all(text.as_bytes())) {
        recorder.steps.store(STEPS, Ordering::Relaxed);
        tracing::warn!(path = %recorder.path.display(), %error, "the trace cannot be written");
    }
}

fn line(span: &Span, zero: (Instant, f64), rank: usize, step: u64) -> String {
    let begin = zero.1 + span.begin.saturating_duration_since(zero.0).as_secs_f64() * 1e6;
    let duration = span.end.duration_since(span.begin).as_secs_f64() * 1e6;
    serde_json::json!({
        "name": span.name, "ph": "X", "pid": rank, "tid": span.track as usize, "ts": begin, "dur": duration,
        "args": { "step": step }
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_span_is_one_line_that_a_viewer_understands() {
        let begin = Instant::now();
        let end = begin + Duration::from_millis(3);
        let span = Span { track: Track::Communication, name: "reduce \"block.3\"".into(), begin, end };
        let line = line(&span, (begin, 5e6), 2, 7);
        assert!(!line.contains('\n'));
        let event: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&event["ph"], &event["pid"], &event["tid"]), (&"X".into(), &2.into(), &2.into()));
        assert_eq!((event["ts"].as_f64(), event["dur"].as_f64()), (Some(5e6), Some(3e3)));
        assert_eq!((&event["name"], &event["args"]["step"]), (&"reduce \"block.3\"".into(), &7.into()));
    }
}
