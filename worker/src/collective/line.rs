//! The connection to one peer within an exchange, and the words that go over it. It notes whom it waits for and that bytes
//! move, however few.

use super::pulse::{Pulse, Way};
use std::io::{self, Read, Write};
use std::net::TcpStream;

/// Handed to the system at one time: what moves is noted in between.
const MOUTHFUL: usize = 1 << 20;

#[derive(Clone, Copy)]
pub struct Line<'m> {
    pub stream: &'m TcpStream,
    pub peer: usize,
    pub pulse: &'m Pulse,
}

impl Read for Line<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let mut stream = self.stream;
        self.pulse.with(self.peer, Way::Here, || stream.read(to))
    }
}

impl Write for Line<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let mut stream = self.stream;
        self.pulse.with(self.peer, Way::There, || stream.write(&from[..from.len().min(MOUTHFUL)]))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a transfer failed.
pub enum Fault {
    Io(io::Error),
    Protocol {
        expected: String,
        found: String,
    },
    /// Memory that could be read before.
    Unreadable(io::Error),
}

impl Fault {
    pub fn width(found: usize) -> Self {
        Fault::Protocol { expected: "a width of a sum".into(), found: format!("{found} bytes") }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Fault::Io(error)
    }
}

/// Opens every transfer, so that workers out of step notice.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(u8)]
pub enum Tag {
    Sums = 1,
    Parameters = 2,
    Bytes = 3,
}

pub fn header(tag: Tag, length: usize) -> [u8; 9] {
    let mut header = [tag as u8; 9];
    header[1..].copy_from_slice(&(length as u64).to_le_bytes());
    header
}

impl Line<'_> {
    /// The length of what comes, which should be a `tag`.
    pub fn read_header(&mut self, tag: Tag) -> Result<usize, Fault> {
        let mut header = [0; 9];
        self.read_exact(&mut header)?;
        if header[0] != tag as u8 {
            let (expected, found) = (format!("{tag:?}"), format!("message type {}", header[0]));
            return Err(Fault::Protocol { expected, found });
        }
        Ok(u64::from_le_bytes(header[1..].try_into().expect("8 bytes")) as usize)
    }

    pub fn expect_header(&mut self, tag: Tag, length: usize) -> Result<(), Fault> {
        let found = self.read_header(tag)?;
        if found != length {
            return Err(Fault::Protocol { expected: format!("{length} of {tag:?}"), found: found.to_string() });
        }
        Ok(())
    }
}
