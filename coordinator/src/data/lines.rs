//! A JSONL file, a few megabytes at a time: its lines are worked on in parallel and come back in order.

use super::{Error, Progress};
use rayon::prelude::*;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes read at once.
const BLOCK: usize = 8 << 20;
/// A longer line is refused: the file is hardly JSONL.
const LONGEST: usize = 256 << 20;

/// Calls `work(line number from 1, line)` for every line of `path` that is not blank and returns the results in order.
/// `key` is the configuration key that named the file.
pub fn map_lines<T: Send>(
    path: &Path,
    key: &str,
    progress: &dyn Progress,
    work: impl Fn(u64, &[u8]) -> T + Sync,
) -> Result<Vec<T>, Error> {
    let read_error = |error| Error::Read { path: path.into(), key: key.into(), error };
    let mut file = File::open(path).map_err(read_error)?;
    let bytes = file.metadata().map_err(read_error)?.len();
    progress.begin(&path.display().to_string(), bytes);
    let mut results = Vec::new();
    let mut buffer: Vec<u8> = Vec::new();
    let mut line = 1u64;
    let mut ended = false;
    while !ended {
        let kept = buffer.len();
        let read = file.by_ref().take(BLOCK as u64).read_to_end(&mut buffer).map_err(read_error)?;
        ended = read == 0;
        if line == 1 && kept == 0 {
            check_beginning(path, &buffer)?;
            if buffer.starts_with(b"\xEF\xBB\xBF") {
                buffer.drain(..3);
            }
        }
        let end = if ended { buffer.len() } else { buffer.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1) };
        if buffer.len() - end > LONGEST {
            return Err(Error::File {
                path: path.into(),
                problem: format!("line {line} is longer than {} MiB; write one JSON object per line", LONGEST >> 20),
            });
        }
        let mut lines: Vec<(u64, &[u8])> = Vec::new();
        for text in buffer[..end].split_inclusive(|&b| b == b'\n') {
            let text = text.trim_ascii();
            if !text.is_empty() {
                lines.push((line, text));
            }
            line += 1;
        }
        results.par_extend(lines.into_par_iter().with_min_len(32).map(|(number, text)| work(number, text)));
        buffer.drain(..end);
        progress.advance(read as u64);
    }
    Ok(results)
}

/// Names the formats that are not JSONL but look like a data file.
fn check_beginning(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let problem = if bytes.starts_with(b"version https://git-lfs") {
        "is a Git LFS pointer, not the data; run git lfs pull"
    } else if bytes.starts_with(&[0x1f, 0x8b]) || bytes.starts_with(b"\x28\xB5\x2F\xFD") {
        "is compressed, which is not supported yet; decompress it first"
    } else if bytes.starts_with(b"PAR1") {
        "is a Parquet file, which is not supported yet; write one JSON object per line, for example with to_json(..., lines=True)"
    } else if bytes.trim_ascii_start().starts_with(b"[") {
        "is one JSON list, which is not supported yet; write one object per line, for example with jq -c '.[]'"
    } else {
        return Ok(());
    };
    Err(Error::File { path: path.into(), problem: problem.into() })
}
