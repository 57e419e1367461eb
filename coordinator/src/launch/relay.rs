//! Passes the coordinator's events on: whole lines only, and each once. A coordinator that is started again is told which was the
//! last, and goes on after it.

use serde::Deserialize;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

/// Lines that may wait for whoever reads standard output, before the coordinator's own output does.
const AHEAD: usize = 65_536;
/// Before what could not be written is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// What of an event counts here.
#[derive(Deserialize)]
struct Numbered {
    sequence: u64,
}

pub(super) struct Relay {
    lines: SyncSender<Vec<u8>>,
    /// Ends with the coordinator; gives the newest event that it passed on whole.
    reading: Option<JoinHandle<u64>>,
    told: u64,
    /// Everything is written, or nobody reads any more.
    written: oneshot::Receiver<()>,
}

impl Relay {
    pub fn new(out: impl Write + Send + 'static) -> Self {
        let (lines, waiting) = sync_channel(AHEAD);
        let (done, written) = oneshot::channel();
        std::thread::spawn(move || {
            write(out, &waiting);
            // Fails only when nobody waits for it.
            done.send(()).ok();
        });
        Relay { lines, reading: None, told: 0, written }
    }

    /// Passes on what a coordinator writes.
    pub fn read(&mut self, from: impl Read + Send + 'static) {
        let lines = self.lines.clone();
        self.reading = Some(std::thread::spawn(move || read(from, &lines)));
    }

    /// The newest event that was passed on, once the coordinator has ended.
    pub fn told(&mut self) -> u64 {
        if let Some(reading) = self.reading.take() {
            self.told = self.told.max(reading.join().unwrap_or(0));
        }
        self.told
    }

    /// Nothing more comes; what is left to wait for is that it is written.
    pub fn close(mut self) -> oneshot::Receiver<()> {
        self.told();
        self.written
    }
}

/// A last line without an end is no event: the coordinator died in the middle of it.
fn read(from: impl Read, lines: &SyncSender<Vec<u8>>) -> u64 {
    let (mut from, mut told) = (BufReader::new(from), 0);
    loop {
        let mut line = Vec::new();
        match from.read_until(b'\n', &mut line) {
            Ok(_) if line.ends_with(b"\n") => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            _ => return told,
        }
        if let Ok(Numbered { sequence }) = serde_json::from_slice(&line) {
            told = told.max(sequence);
        }
        // Nobody reads any more: the coordinator hears it from its own pipe.
        if lines.send(line).is_err() {
            return told;
        }
    }
}

fn write(mut out: impl Write, lines: &Receiver<Vec<u8>>) {
    for line in lines {
        let mut rest = &line[..];
        while !rest.is_empty() {
            match out.write(rest) {
                Ok(written) if written > 0 => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return,
                // A full disk may have room again.
                _ => std::thread::sleep(PAUSE),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

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

    #[test]
    fn whole_lines_are_passed_on_and_the_newest_is_known() {
        let paper = Paper::default();
        let mut relay = Relay::new(paper.clone());
        assert_eq!(relay.told(), 0);
        relay.read(&b"{\"sequence\":4}\n{\"sequence\":5,\"event\":\"step\"}\n{\"sequ"[..]);
        assert_eq!(relay.told(), 5);
        relay.read(&b"{\"event\":\"tokens\"}\n"[..]);
        assert_eq!(relay.told(), 5);
        relay.close().blocking_recv().unwrap();
        let text = String::from_utf8(paper.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "{\"sequence\":4}\n{\"sequence\":5,\"event\":\"step\"}\n{\"event\":\"tokens\"}\n");
    }
}
