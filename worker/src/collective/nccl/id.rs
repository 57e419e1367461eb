//! The id by which ranks find each other's communicator. Whoever has it can take part, so it is nobody else's: rank 0 makes
//! a fresh one for each generation and hands it round sealed with the generation's key, which came over TLS.

use std::fmt;

/// Bytes of an id.
pub const BYTES: usize = 128;
const PROOF: usize = blake3::OUT_LEN;

#[derive(Clone, PartialEq, Eq)]
pub struct Id([u8; BYTES]);

/// Nothing of it belongs into a log.
impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Id(..)")
    }
}

impl Id {
    pub fn new(bytes: [u8; BYTES]) -> Self {
        Id(bytes)
    }

    pub fn bytes(&self) -> &[u8; BYTES] {
        &self.0
    }

    /// As it goes over the wire. A generation has one id and one key, so the key stream is used once.
    pub fn seal(&self, key: &[u8; 32]) -> Vec<u8> {
        let mut sealed = Vec::from(masked(&self.0, key));
        let proof = proof(&sealed, key);
        sealed.extend_from_slice(proof.as_bytes());
        sealed
    }

    /// What was sealed with the same key; `None` for anything else.
    pub fn open(sealed: &[u8], key: &[u8; 32]) -> Option<Self> {
        let (masked_id, found) = sealed.split_at_checked(BYTES)?;
        let found: [u8; PROOF] = found.try_into().ok()?;
        // Comparison of hashes takes constant time.
        let genuine = proof(masked_id, key) == blake3::Hash::from_bytes(found);
        genuine.then(|| Id(masked(masked_id.try_into().expect("split at its length"), key)))
    }
}

fn keyed(purpose: &[u8], key: &[u8; 32]) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(purpose);
    hasher
}

fn masked(bytes: &[u8; BYTES], key: &[u8; 32]) -> [u8; BYTES] {
    let mut stream = [0; BYTES];
    keyed(b"nccl id: stream", key).finalize_xof().fill(&mut stream);
    std::array::from_fn(|i| bytes[i] ^ stream[i])
}

fn proof(masked: &[u8], key: &[u8; 32]) -> blake3::Hash {
    keyed(b"nccl id: proof", key).update(masked).finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_neither_logged_nor_sent_as_it_is() {
        let id = Id::new(std::array::from_fn(|i| 0xA0 ^ i as u8));
        let key = [7; 32];
        let sealed = id.seal(&key);
        assert_eq!(Id::open(&sealed, &key), Some(id.clone()));
        assert!(!sealed.windows(8).any(|part| id.bytes().windows(8).any(|own| own == part)));
        let shown = format!("{id:?} {:?}", Some(&id));
        assert_eq!(shown, "Id(..) Some(Id(..))");
    }

    #[test]
    fn what_was_changed_or_sealed_by_others_is_refused() {
        let (id, key) = (Id::new([3; BYTES]), [7; 32]);
        let sealed = id.seal(&key);
        assert_eq!(Id::open(&sealed, &[8; 32]), None);
        for at in [0, BYTES - 1, BYTES, sealed.len() - 1] {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(Id::open(&changed, &key), None);
        }
        assert!(Id::open(&sealed[..sealed.len() - 1], &key).is_none() && Id::open(&[], &key).is_none());
    }
}
