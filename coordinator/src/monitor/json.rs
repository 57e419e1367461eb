//! One JSON object per event on a line: the form for scripts. Names and fields are part of the command line's contract.

use super::state::RunState;
use super::View;
use serde_json::Value;
use std::io::{self, Write};
use unisono_proto::v1::Event;

/// Writes every event as a line of JSON.
pub struct Json<W> {
    out: W,
    /// What could not be written yet.
    rest: Vec<u8>,
}

impl<W: Write + Send> Json<W> {
    /// `out` must not keep anything back: a reader never sees half an object for long, and nothing is written twice.
    pub fn new(out: W) -> Self {
        Json { out, rest: Vec::new() }
    }
}

impl<W: Write + Send> View for Json<W> {
    fn show(&mut self, event: &Event, _: &RunState) -> io::Result<()> {
        let object = event.to_json();
        if object.is_empty() {
            return Ok(());
        }
        self.rest.extend(format!("{}\n", Value::Object(object)).as_bytes());
        self.catch_up()
    }

    fn catch_up(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.out.write(&self.rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.rest.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::{event, step};
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

    /// Takes a few bytes at a time, and has no room every other time.
    struct Full(Sink, u32);

    impl Write for Full {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.1 += 1;
            match self.1 % 2 {
                0 => Err(io::ErrorKind::StorageFull.into()),
                _ => self.0.write(&data[..data.len().min(9)]).map(|_| data.len().min(9)),
            }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_cannot_be_written_at_once_is_written_later_and_once() {
        let sink = Sink::default();
        let mut display = Display::new(vec![Box::new(Json::new(Full(sink.clone(), 0)))]);
        (1..=3).for_each(|number| display.observe(&event(number, 1.5, step(number, 1.0, 0.5))));
        while !display.catch_up() {}
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        let steps: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(steps.iter().map(|s| s["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn every_event_is_a_line_and_floats_read_back_bit_for_bit() {
        let sink = Sink::default();
        let mut display = Display::new(vec![Box::new(Json::new(sink.clone()))]);
        let bits = [0x3FD5555555555555u64, 0x4008000000000001, 0x3F1A36E2EB1C432D];
        for (index, bits) in bits.iter().enumerate() {
            let number = index as u64 + 1;
            display.observe(&event(number, 1.5, step(number, f64::from_bits(*bits), 0.5)));
        }
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 3);
        for (line, bits) in lines.iter().zip(bits) {
            assert_eq!(line["event"], "step");
            assert_eq!(line["loss"].as_f64().unwrap().to_bits(), bits);
            for field in ["step", "grad_norm", "lr", "examples", "tokens", "target_tokens", "seconds", "generation"] {
                assert!(line[field].is_number(), "{field} in {line}");
            }
        }
    }
}
