//! Machine code of the kernels, kept in the user's cache: compiling takes seconds, for each worker of each run.

use super::nvrtc;
use crate::library;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Machine code of `source` for an architecture: as it was kept, or compiled now.
pub fn compiled(source: &str, architecture: &str) -> Result<Vec<u8>, nvrtc::Error> {
    let dir = library::cache().map(|cache| cache.join("kernels"));
    within(dir.as_deref(), source, architecture, nvrtc::compile)
}

fn within(
    dir: Option<&Path>,
    source: &str,
    architecture: &str,
    compile: impl FnOnce(&str, &str) -> Result<Vec<u8>, nvrtc::Error>,
) -> Result<Vec<u8>, nvrtc::Error> {
    let place = dir.map(|dir| dir.join(name(source, architecture)));
    if let Some(code) = place.as_deref().and_then(read) {
        return Ok(code);
    }
    let code = compile(source, architecture)?;
    if let Some(place) = &place {
        // The next worker compiles again: nothing else is lost.
        if let Err(error) = write(place, &code) {
            tracing::debug!(place = %place.display(), %error, "compiled kernels are not kept");
        }
    }
    Ok(code)
}

/// A file's name: whatever decides its content is in it.
fn name(source: &str, architecture: &str) -> PathBuf {
    // Another compiler's code has other bits.
    let compiler = format!("NVRTC 13.0 {}", nvrtc::OPTIONS.join(" "));
    let mut hasher = blake3::Hasher::new();
    for part in [&compiler, architecture, source] {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    format!("{architecture}-{}.cubin", &hasher.finalize().to_hex()[..32]).into()
}

/// The code of a file that begins with its hash; none where that is wrong, or there is none.
fn read(place: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(place).ok()?;
    let (hash, code) = bytes.split_first_chunk::<{ blake3::OUT_LEN }>()?;
    if blake3::hash(code) != *hash {
        tracing::warn!(place = %place.display(), "kept kernels are damaged: they are compiled again");
        return None;
    }
    Some(code.to_vec())
}

/// Whole or not at all, also where several workers write it at once.
fn write(place: &Path, code: &[u8]) -> std::io::Result<()> {
    let dir = place.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir)?;
    let part = place.with_extension(format!("{}.part", std::process::id()));
    let written = std::fs::File::create(&part).and_then(|mut file| {
        file.write_all(blake3::hash(code).as_bytes())?;
        file.write_all(code)?;
        file.sync_all()
    });
    let kept = written.and_then(|()| std::fs::rename(&part, place));
    if kept.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    kept
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn what_was_compiled_is_kept_until_it_is_damaged_or_something_else_is_asked_for() {
        let (dir, compilations) = (tempfile::tempdir().unwrap(), Cell::new(0));
        let dir = dir.path().join("not/there/yet");
        let ask = |source: &str, architecture: &str| {
            let compile = |source: &str, architecture: &str| {
                compilations.set(compilations.get() + 1);
                Ok(format!("{source} for {architecture}").into_bytes())
            };
            let code = within(Some(&dir), source, architecture, compile).unwrap();
            assert_eq!(code, format!("{source} for {architecture}").as_bytes());
            compilations.get()
        };
        assert_eq!((ask("a", "sm_90"), ask("a", "sm_90")), (1, 1));
        assert_eq!((ask("a", "sm_80"), ask("b", "sm_90"), ask("a", "sm_90")), (2, 3, 3));
        let place = dir.join(name("a", "sm_90"));
        let whole = std::fs::read(&place).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for (number, damaged) in (4..).zip([&flipped[..], &whole[..whole.len() - 1], &whole[..7], &[]]) {
            std::fs::write(&place, damaged).unwrap();
            assert_eq!((ask("a", "sm_90"), ask("a", "sm_90")), (number, number));
        }
        let left: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.len() == 3 && left.iter().all(|path| path.extension().unwrap() == "cubin"), "{left:?}");
    }

    #[test]
    fn where_nothing_can_be_kept_it_is_compiled() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let compile = |_: &str, _: &str| Ok(vec![1]);
        for dir in [None, Some(file.path())] {
            assert_eq!(within(dir, "a", "sm_90", compile).unwrap(), [1]);
        }
        let fails = |_: &str, _: &str| Err(nvrtc::Error::Failed("so".into()));
        let dir = tempfile::tempdir().unwrap();
        assert!(within(Some(dir.path()), "a", "sm_90", fails).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
