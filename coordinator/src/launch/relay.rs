//! Passes the coordinator's events on: whole lines only, and each once. A coordinator that is started again is told which was the
//! last, and goes on after it. Both ends have threads of their own: whoever reads standard output slowly, or not at all, holds
//! neither the run up nor the supervisor.

use serde::Deserialize;
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Bytes that may wait for whoever reads standard output, before the coordinator's own output does.
const AHEAD: usize = 16 << 20;
/// Before what could not be written is tried again: a full disk, or a terminal that others write to.
const PAUSE: Duration = Duration::from_secs(1);
const BUSY: Duration = Duration::from_millis(10);
/// Once the run is over: after this long without anything written, what waits will not be.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same where writing fails.
const TRIES: Duration = Duration::from_secs(10);

/// What of an event counts here.
#[derive(Deserialize)]
struct Numbered {
    sequence: u64,
}

pub(super) struct Relay {
    desk: Arc<Desk>,
    /// Everything is written, or nothing more can be.
    written: oneshot::Receiver<()>,
}

#[derive(Default)]
struct Desk {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

/// Lines on their way.
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Coordinators so far: what an earlier one wrote does not count any more.
    coordinator: u64,
    /// The newest of them may write more.
    reading: bool,
    /// The newest event that is here or further: whoever comes next goes on after it.
    told: u64,
    /// Nobody is started again.
    closing: bool,
    /// Nothing more is written.
    ended: bool,
    /// When something was written last, or began to wait.
    since: Instant,
}

impl Default for Waiting {
    fn default() -> Self {
        Waiting {
            lines: VecDeque::new(),
            bytes: 0,
            coordinator: 0,
            reading: false,
            told: 0,
            closing: false,
            ended: false,
            since: Instant::now(),
        }
    }
}

impl Relay {
    pub fn new(out: impl Write + Send + 'static) -> Self {
        let desk = Arc::new(Desk::default());
        let (done, written) = oneshot::channel();
        let writer = desk.clone();
        std::thread::spawn(move || {
            writer.write(out);
            writer.give_up();
            // Fails only when nobody waits for it.
            done.send(()).ok();
        });
        Relay { desk, written }
    }

    /// Passes on what a coordinator writes. What the one before wrote, and nobody has read, it tells again.
    pub fn read(&mut self, from: impl Read + Send + 'static) {
        let mut waiting = self.desk.lock();
        waiting.coordinator += 1;
        waiting.reading = true;
        let (number, desk) = (waiting.coordinator, self.desk.clone());
        drop(waiting);
        self.desk.changed.notify_all();
        std::thread::spawn(move || desk.read(number, from));
    }

    /// The newest event that was taken, written or not: whoever comes next goes on after it. The coordinator has ended: nothing more
    /// is taken of what is still in its pipe.
    pub fn told(&mut self) -> u64 {
        let mut waiting = self.desk.lock();
        waiting.coordinator += 1;
        waiting.reading = false;
        self.desk.changed.notify_all();
        waiting.told
    }

    /// When it is time to give up if something waits and nothing is written until then.
    pub fn patience_ends(&self) -> Option<Instant> {
        let waiting = self.desk.lock();
        (!waiting.lines.is_empty()).then(|| waiting.since + PATIENCE)
    }

    /// Nobody takes what waits; whoever writes more hears it from the pipe.
    pub fn give_up(&self) {
        self.desk.give_up();
    }

    /// Waits until all that was told is written, as long as somebody takes it. The number of events that nobody took, where that has
    /// not been said.
    pub async fn finish(&mut self) -> usize {
        {
            let mut waiting = self.desk.lock();
            waiting.closing = true;
            if waiting.lines.is_empty() {
                waiting.since = Instant::now();
            }
        }
        self.desk.changed.notify_all();
        loop {
            let end = self.desk.lock().since + PATIENCE;
            tokio::select! {
                // An error is an end too.
                _ = &mut self.written => break,
                () = tokio::time::sleep_until(end.into()) => if self.desk.lock().since + PATIENCE <= end { break },
            }
        }
        self.unwritten()
    }

    pub fn unwritten(&self) -> usize {
        self.desk.lock().lines.len()
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_up(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// A last line without an end is no event: the coordinator died in the middle of it.
    fn read(&self, number: u64, from: impl Read) {
        let mut from = BufReader::new(from);
        loop {
            let mut line = Vec::new();
            match from.read_until(b'\n', &mut line) {
                Ok(_) if line.ends_with(b"\n") => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                _ => break,
            }
            if !self.take(number, line) {
                break;
            }
        }
        let mut waiting = self.lock();
        if waiting.coordinator == number {
            waiting.reading = false;
            self.changed.notify_all();
        }
    }

    /// Takes a line of coordinator `number` as soon as there is room; false where nobody wants it any more.
    fn take(&self, number: u64, line: Vec<u8>) -> bool {
        let sequence = serde_json::from_slice(&line).ok().map(|Numbered { sequence }| sequence);
        let full = |waiting: &mut Waiting| {
            let wanted = waiting.coordinator == number && !waiting.ended;
            wanted && waiting.bytes > 0 && waiting.bytes + line.len() > AHEAD
        };
        let mut waiting = self.changed.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        if waiting.coordinator != number || waiting.ended {
            return false;
        }
        if waiting.lines.is_empty() {
            waiting.since = Instant::now();
        }
        waiting.told = waiting.told.max(sequence.unwrap_or(0));
        waiting.bytes += line.len();
        waiting.lines.push_back(line);
        self.changed.notify_all();
        true
    }

    /// Writes what comes until nothing more can come, or can be written. A line stays until it is written whole.
    fn write(&self, mut out: impl Write) {
        loop {
            let idle = |w: &mut Waiting| w.lines.is_empty() && !w.ended && (w.reading || !w.closing);
            let mut waiting = self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
            if waiting.ended {
                return;
            }
            let Some(line) = waiting.lines.front_mut().map(std::mem::take) else { return };
            drop(waiting);
            let outcome = self.write_line(&mut out, &line);
            let mut waiting = self.lock();
            if let Err(error) = outcome {
                if error.kind() != io::ErrorKind::BrokenPipe {
                    eprintln!(
                        "unisono: standard output cannot be written ({error}): it gets no more events; the run is as it was, and its ledger has them all"
                    );
                }
                waiting.lines.clear();
                return;
            }
            waiting.lines.pop_front();
            waiting.bytes -= line.len();
            self.changed.notify_all();
        }
    }

    fn write_line(&self, out: &mut impl Write, line: &[u8]) -> io::Result<()> {
        let mut rest = line;
        while !rest.is_empty() {
            let error = match out.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    rest = &rest[written..];
                    self.lock().since = Instant::now();
                    continue;
                }
                Err(error) => error,
            };
            let pause = match error.kind() {
                io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock => BUSY,
                // There may be room again.
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => PAUSE,
                _ => return Err(error),
            };
            let waiting = self.lock();
            let hopeless = waiting.closing && pause == PAUSE && waiting.since.elapsed() > TRIES;
            if waiting.ended || hopeless {
                return Err(error);
            }
            // What changes is that somebody gives up.
            drop(self.changed.wait_timeout(waiting, pause));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::sync::mpsc;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            let part = data.len().min(7);
            self.0.lock().unwrap().extend(&data[..part]);
            Ok(part)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Takes nothing until it is told to, and then fails where it is told how.
    struct Stuck(mpsc::Receiver<Option<io::ErrorKind>>, Paper);

    impl Write for Stuck {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            match self.0.recv() {
                Ok(Some(kind)) => Err(kind.into()),
                _ => self.1.write(data),
            }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A coordinator's pipe that says when it is let go.
    struct Pipe<R>(R, mpsc::Sender<()>);

    impl<R: Read> Read for Pipe<R> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl<R> Drop for Pipe<R> {
        fn drop(&mut self) {
            self.1.send(()).ok();
        }
    }

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    fn written(paper: &Paper) -> String {
        String::from_utf8(paper.0.lock().unwrap().clone()).unwrap()
    }

    fn wait_until(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline, "it never came to that");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn whole_lines_are_passed_on_and_the_newest_is_known() {
        let paper = Paper::default();
        let mut relay = Relay::new(paper.clone());
        assert_eq!(relay.told(), 0);
        relay.read(&b"{\"sequence\":4}\n{\"sequence\":5,\"event\":\"step\"}\n{\"sequ"[..]);
        wait_until(|| !relay.desk.lock().reading);
        assert_eq!(relay.told(), 5);
        relay.read(&b"{\"event\":\"tokens\"}\n"[..]);
        assert_eq!(block_on(relay.finish()), 0);
        assert_eq!(relay.told(), 5);
        assert_eq!(written(&paper), "{\"sequence\":4}\n{\"sequence\":5,\"event\":\"step\"}\n{\"event\":\"tokens\"}\n");
    }

    #[test]
    fn nobody_waits_for_a_reader_that_reads_nothing_and_every_event_comes_once() {
        let (paper, (go, gate)) = (Paper::default(), mpsc::channel());
        let mut relay = Relay::new(Stuck(gate, paper.clone()));
        let fill = "x".repeat(1 << 20);
        let tell = move |from: u64| -> String {
            (from..40).map(|sequence| format!("{{\"sequence\":{sequence},\"fill\":\"{fill}\"}}\n")).collect()
        };
        relay.read(io::Cursor::new(tell(1)));
        wait_until(|| relay.desk.lock().bytes + (1 << 20) + 40 > AHEAD);
        let begun = Instant::now();
        let told = relay.told();
        assert!(begun.elapsed() < Duration::from_secs(1) && (2..39).contains(&told), "{told}");
        relay.read(io::Cursor::new(tell(told + 1)));
        drop(go);
        assert_eq!(block_on(relay.finish()), 0);
        let text = written(&paper);
        let sequences: Vec<u64> =
            text.lines().map(|line| serde_json::from_str::<Numbered>(line).unwrap().sequence).collect();
        assert_eq!(sequences, (1..40).collect::<Vec<_>>());
    }

    #[test]
    fn an_error_that_lasts_ends_the_relay_and_one_that_passes_does_not() {
        let (paper, (go, gate)) = (Paper::default(), mpsc::channel());
        let mut relay = Relay::new(Stuck(gate, paper.clone()));
        let (let_go, gone) = mpsc::channel();
        relay.read(Pipe(io::Cursor::new("{\"sequence\":1}\n".repeat(3)), let_go.clone()));
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Interrupted, io::ErrorKind::WouldBlock] {
            go.send(Some(kind)).unwrap();
        }
        // Seven bytes at a time.
        (0..3).for_each(|_| go.send(None).unwrap());
        wait_until(|| written(&paper) == "{\"sequence\":1}\n");
        gone.recv().unwrap();
        // It writes on and on, and hears from its own pipe that nobody listens.
        go.send(Some(io::ErrorKind::Other)).unwrap();
        relay.read(Pipe(io::repeat(b'\n'), let_go));
        gone.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(block_on(relay.finish()), 0, "it has been said");
    }

    #[test]
    fn who_gives_up_waits_no_longer() {
        let (go, gate) = mpsc::channel::<Option<io::ErrorKind>>();
        let mut relay = Relay::new(Stuck(gate, Paper::default()));
        let (let_go, gone) = mpsc::channel();
        let lines = format!("{}\n", "x".repeat(4095)).repeat(AHEAD / 4096 + 2);
        relay.read(Pipe(io::Cursor::new(lines), let_go));
        wait_until(|| relay.desk.lock().bytes == AHEAD);
        let ends = relay.patience_ends().unwrap();
        assert!(ends > Instant::now() && ends <= Instant::now() + PATIENCE);
        relay.give_up();
        gone.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(relay.unwritten() == AHEAD / 4096);
        drop(go);
    }
}
