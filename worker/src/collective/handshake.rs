//! Peers prove to each other that they belong to the same run and generation: a mutual challenge and response with
//! BLAKE3 keyed by the generation's secret, over term, generation and both ranks. The data that follows is in clear.

use std::io::{self, Read, Write};

const MAGIC: &[u8; 8] = b"unisono1";
const HELLO: usize = 8 + 8 + 8 + 4 + 4 + 32;
const GRANTED: u8 = b'+';

/// What both ends must agree on.
#[derive(Clone)]
pub struct Secret {
    /// Fresh for each generation; never logged.
    pub key: [u8; 32],
    pub term: u64,
    pub generation: u64,
}

/// Why a handshake came to nothing.
#[derive(Debug)]
pub enum Failure {
    Io(io::Error),
    /// The other end is not whom we expect; a reason for a person.
    Refused(&'static str),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Io(error)
    }
}

impl Secret {
    fn proof(&self, side: &[u8], hello: &[u8; HELLO], nonce: &[u8; 32]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(side).update(hello).update(nonce);
        hasher.finalize()
    }

    fn hello(&self, from: usize, to: usize, nonce: [u8; 32]) -> [u8; HELLO] {
        let mut hello = [0; HELLO];
        hello[..8].copy_from_slice(MAGIC);
        hello[8..16].copy_from_slice(&self.term.to_le_bytes());
        hello[16..24].copy_from_slice(&self.generation.to_le_bytes());
        hello[24..28].copy_from_slice(&(from as u32).to_le_bytes());
        hello[28..32].copy_from_slice(&(to as u32).to_le_bytes());
        hello[32..].copy_from_slice(&nonce);
        hello
    }

    /// Introduces rank `from` to rank `to`, the end that accepted the connection.
    pub fn connect(&self, mut stream: impl Read + Write, from: usize, to: usize) -> Result<(), Failure> {
        let hello = self.hello(from, to, nonce()?);
        stream.write_all(&hello)?;
        let (mut theirs, mut proof) = ([0; 32], [0; 32]);
        stream.read_exact(&mut theirs)?;
        stream.read_exact(&mut proof)?;
        // Comparison of hashes takes constant time.
        if self.proof(b"accept", &hello, &theirs) != blake3::Hash::from_bytes(proof) {
            return Err(Failure::Refused("its key is not this generation's"));
        }
        stream.write_all(self.proof(b"connect", &hello, &theirs).as_bytes())?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        if answer[0] != GRANTED {
            return Err(Failure::Refused("it refused the connection"));
        }
        Ok(())
    }

    /// Hears who is calling rank `to`; returns the proven rank.
    pub fn accept(&self, mut stream: impl Read + Write, to: usize) -> Result<usize, Failure> {
        let mut hello = [0; HELLO];
        stream.read_exact(&mut hello)?;
        let from = u32::from_le_bytes(hello[24..28].try_into().expect("4 bytes")) as usize;
        let nonce_of_caller: [u8; 32] = hello[32..].try_into().expect("32 bytes");
        if hello != self.hello(from, to, nonce_of_caller) {
            return Err(Failure::Refused("it speaks another protocol, or for another term, generation or rank"));
        }
        let mine = nonce()?;
        stream.write_all(&mine)?;
        stream.write_all(self.proof(b"accept", &hello, &mine).as_bytes())?;
        let mut proof = [0; 32];
        stream.read_exact(&mut proof)?;
        if self.proof(b"connect", &hello, &mine) != blake3::Hash::from_bytes(proof) {
            return Err(Failure::Refused("its key is not this generation's"));
        }
        stream.write_all(&[GRANTED])?;
        Ok(from)
    }
}

/// Fresh random bytes from the kernel; they reach no result.
pub fn nonce() -> io::Result<[u8; 32]> {
    let mut nonce = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    Ok(nonce)
}
