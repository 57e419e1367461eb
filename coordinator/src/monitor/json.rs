//! One JSON object per event on a line: the form for scripts. Names and fields are part of the command line's contract.

use super::state::RunState;
use super::View;
use serde_json::Value;
use std::io::{self, Write};
use unisono_proto::v1::Event;

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
        let object = event.to_json();
        if object.is_empty() {
            return Ok(());
        }
        // One write per line: a reader on the pipe never sees half an object.
        self.out.write_all(format!("{}\n", Value::Object(object)).as_bytes())?;
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
