//! The digest of a run: one number that is equal when and only when two runs came to the same state.
//!
//! BLAKE3 over, for every parameter in bytewise order of its Hugging Face name: the name, a zero byte, then master
//! weights, first and second moments (F32, or BF16 where the run keeps them so; little-endian, row-major, unpadded); then the cursor (step, epoch, position)
//! and the committed rows in training order, each u64 little-endian. Neither the number of workers nor the files that
//! they wrote, neither generation nor time enters. `scripts/digest.py` computes the same from the same files.

use crate::checkpoint::state::{Error, Part, State};
use std::path::Path;

/// The digest of the checkpoint in `directory`, hexadecimal. Every file's own hash is verified on the way.
pub fn digest(directory: &Path) -> Result<String, Error> {
    of(&State::open(directory)?)
}

/// The digest of an open checkpoint, hexadecimal.
pub fn of(state: &State) -> Result<String, Error> {
    let mut hasher = blake3::Hasher::new();
    let mut names: Vec<&str> = state.manifest.tensors.iter().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    for name in names {
        hasher.update(name.as_bytes());
        hasher.update(&[0]);
        for part in Part::ALL {
            state.read(name, part, &mut |block| {
                hasher.update(block);
                Ok(())
            })?;
        }
    }
    let cursor = state.manifest.cursor;
    for number in [cursor.step, cursor.epoch, cursor.position] {
        hasher.update(&number.to_le_bytes());
    }
    state.read_samples(&mut |block| {
        hasher.update(block);
        Ok(())
    })?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::manifest::{Dtype, Manifest, MANIFEST};
    use crate::checkpoint::state::tests::{write, write_as};
    use std::process::Command;

    #[test]
    fn how_the_state_is_dealt_over_files_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let digests = [1, 2, 3, 4, 8].map(|shards| {
            let directory = dir.path().join(shards.to_string());
            write(&directory, shards);
            digest(&directory).unwrap()
        });
        assert!(digests.iter().all(|d| *d == digests[0]), "{digests:?}");
    }

    #[test]
    fn the_cursor_matters() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 2);
        let before = digest(dir.path()).unwrap();
        let mut manifest = Manifest::read(dir.path()).unwrap();
        manifest.cursor.position += 1;
        std::fs::write(dir.path().join(MANIFEST), manifest.to_json()).unwrap();
        assert_ne!(digest(dir.path()).unwrap(), before);
    }

    #[test]
    fn an_independent_script_agrees() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            the_script_agrees_on(dtype);
        }
    }

    fn the_script_agrees_on(dtype: Dtype) {
        let dir = tempfile::tempdir().unwrap();
        write_as(dir.path(), 3, dtype);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/digest.py");
        let run = |extra: &[&str]| {
            let out = Command::new("python3").arg(script).arg(dir.path()).args(extra).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            String::from_utf8(out.stdout).unwrap().trim().to_string()
        };
        let expected = digest(dir.path()).unwrap();
        assert_eq!(run(&[]), expected);
        assert_eq!(run(&["--pure"]), expected);
    }
}
