//! A file of rows, a few megabytes at a time: JSONL, one JSON list, or Parquet. Rows are worked on in parallel and come back in
//! order.

use super::{parquet, Error, Progress};
use rayon::prelude::*;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes read at once.
const BLOCK: usize = 8 << 20;
/// A longer line is refused: the file is hardly JSONL.
const LONGEST: usize = 256 << 20;

/// Where a row begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// From 1.
    pub line: u64,
    /// Bytes before it in the file.
    pub offset: u64,
}

/// What [`map_lines`] returns.
#[derive(Debug)]
pub struct Mapped<T> {
    pub results: Vec<T>,
    /// Where [`At::offset`] counts in another file than that which was named: the rows, written out.
    pub spool: Option<File>,
}

/// Calls `work(place, row)` for every row of `path` and returns the results in order: for every line that is not blank,
/// for every element where the file is one JSON list, or for every row of a Parquet file. `key` is the configuration key that named the file.
pub fn map_lines<T: Send>(
    path: &Path,
    key: &str,
    progress: &dyn Progress,
    work: impl Fn(At, &[u8]) -> T + Sync,
) -> Result<Mapped<T>, Error> {
    let read_error = |error| Error::Read { path: path.into(), key: key.into(), error };
    let mut file = File::open(path).map_err(read_error)?;
    let bytes = file.metadata().map_err(read_error)?.len();
    progress.begin(&path.display().to_string(), bytes);
    let mut results = Vec::new();
    let mut buffer: Vec<u8> = Vec::new();
    let mut line = 1u64;
    // Bytes of the file before the buffer's first.
    let mut before = 0u64;
    let mut ended = false;
    while !ended {
        let kept = buffer.len();
        let read = file.by_ref().take(BLOCK as u64).read_to_end(&mut buffer).map_err(read_error)?;
        ended = read == 0;
        if line == 1 && kept == 0 {
            check_beginning(path, &buffer)?;
            if buffer.starts_with(parquet::MAGIC) {
                return parquet::map_rows(path, file, progress, work);
            }
            if buffer.starts_with(b"\xEF\xBB\xBF") {
                buffer.drain(..3);
                before = 3;
            }
            if is_list(&buffer) {
                file.read_to_end(&mut buffer).map_err(read_error)?;
                let rows = elements(&buffer).map_err(|problem| Error::File { path: path.into(), problem })?;
                let at = |line, text: &[u8]| At { line, offset: before + within(&buffer, text) };
                results
                    .par_extend(rows.into_par_iter().with_min_len(32).map(|(line, text)| work(at(line, text), text)));
                progress.advance(bytes);
                return Ok(Mapped { results, spool: None });
            }
        }
        let end = if ended { buffer.len() } else { buffer.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1) };
        if buffer.len() - end > LONGEST {
            return Err(Error::File {
                path: path.into(),
                problem: format!("line {line} is longer than {} MiB; write one JSON object per line", LONGEST >> 20),
            });
        }
        let mut lines: Vec<(At, &[u8])> = Vec::new();
        // The last line may lack its end.
        let cut = (!buffer[..end].is_empty() && !buffer[..end].ends_with(b"\n")).then_some(end);
        let mut begin = 0;
        for close in memchr::memchr_iter(b'\n', &buffer[..end]).chain(cut) {
            let text = buffer[begin..close].trim_ascii();
            begin = (close + 1).min(end);
            if !text.is_empty() {
                lines.push((At { line, offset: before + within(&buffer, text) }, text));
            }
            line += 1;
        }
        results.par_extend(lines.into_par_iter().with_min_len(32).map(|(at, text)| work(at, text)));
        buffer.drain(..end);
        before += end as u64;
        progress.advance(read as u64);
    }
    Ok(Mapped { results, spool: None })
}

/// Bytes of `whole` before its part `part`.
fn within(whole: &[u8], part: &[u8]) -> u64 {
    (part.as_ptr().addr() - whole.as_ptr().addr()) as u64
}

/// What `work` makes of the first rows of `path`, at most `count`, with their lines.
pub fn first_rows<T>(path: &Path, key: &str, count: usize, work: impl Fn(&[u8]) -> T) -> Result<Vec<(u64, T)>, Error> {
    let read_error = |error| Error::Read { path: path.into(), key: key.into(), error };
    let mut bytes = Vec::new();
    let mut file = File::open(path).map_err(read_error)?;
    file.by_ref().take(BLOCK as u64).read_to_end(&mut bytes).map_err(read_error)?;
    if bytes.starts_with(parquet::MAGIC) {
        return parquet::first_rows(path, file, count, work);
    }
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes);
    if is_list(bytes) {
        let rows = scan(bytes).map(|(rows, _)| rows).unwrap_or_default();
        return Ok(rows.into_iter().take(count).map(|(line, text)| (line, work(text))).collect());
    }
    let lines = bytes.split(|&b| b == b'\n').enumerate().map(|(at, text)| (at as u64 + 1, text.trim_ascii()));
    Ok(lines.filter(|(_, text)| !text.is_empty()).take(count).map(|(line, text)| (line, work(text))).collect())
}

/// Whether a file that begins so is one JSON list of objects, rather than lines of which the first is a list.
fn is_list(bytes: &[u8]) -> bool {
    match bytes.trim_ascii_start().strip_prefix(b"[") {
        Some(rest) => matches!(rest.trim_ascii_start().first(), None | Some(b'{' | b']')),
        None => false,
    }
}

/// The elements of a JSON list with the line that each begins on. What is inside of them is not looked at, so that a
/// malformed element is refused as a malformed row is.
fn elements(bytes: &[u8]) -> Result<Vec<(u64, &[u8])>, String> {
    match scan(bytes)? {
        (rows, None) => Ok(rows),
        (_, Some(line)) => Err(format!(
            "the list does not end (what is open begins on line {line}); the file is cut off, or a bracket or quote is missing"
        )),
    }
}

/// Elements with their lines, and where the list has no end, the line of what is open.
type Scanned<'b> = (Vec<(u64, &'b [u8])>, Option<u64>);

fn scan(bytes: &[u8]) -> Result<Scanned<'_>, String> {
    let (mut line, mut depth, mut quoted, mut escaped) = (1u64, 0usize, false, false);
    let mut begin: Option<(u64, usize)> = None;
    let mut rows = Vec::new();
    for (at, &byte) in bytes.iter().enumerate() {
        line += u64::from(byte == b'\n');
        if depth == 0 && !rows.is_empty() && byte == b'{' {
            return Err(format!("line {line}: text follows the list; write one list, or one object per line"));
        }
        if quoted {
            (quoted, escaped) = (escaped || byte != b'"', !escaped && byte == b'\\');
            continue;
        }
        let blank = byte.is_ascii_whitespace();
        if depth == 1 && begin.is_none() && !blank && !matches!(byte, b',' | b']') {
            begin = Some((line, at));
        }
        match byte {
            b'"' => quoted = true,
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => (),
        }
        let ends = (depth == 1 && byte == b',') || (depth == 0 && byte == b']');
        if let (true, Some((number, from))) = (ends, begin) {
            rows.push((number, bytes[from..at].trim_ascii()));
            begin = None;
        }
    }
    let open = (begin.is_some() || depth > 0).then(|| begin.map_or(line, |(number, _)| number));
    Ok((rows, open))
}

/// Names the formats that are not JSON but look like a data file.
fn check_beginning(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let problem = if bytes.starts_with(b"version https://git-lfs") {
        "is a Git LFS pointer, not the data; run git lfs pull"
    } else if bytes.starts_with(&[0x1f, 0x8b]) || bytes.starts_with(b"\x28\xB5\x2F\xFD") {
        "is compressed, which is not supported yet; decompress it first"
    } else if bytes.starts_with(b"\xFF\xFE") || bytes.starts_with(b"\xFE\xFF") {
        "is UTF-16; save it as UTF-8"
    } else if is_foreign(path, bytes) {
        "is not JSON; only .jsonl, .json and .parquet files are read: convert it"
    } else {
        return Ok(());
    };
    Err(Error::File { path: path.into(), problem: problem.into() })
}

/// Whether neither name nor beginning is that of JSON or Parquet: a table of commas, a spreadsheet, a text.
fn is_foreign(path: &Path, bytes: &[u8]) -> bool {
    let known = ["jsonl", "json", "ndjson", "parquet"];
    let named = path.extension().is_some_and(|own| known.iter().any(|known| own.eq_ignore_ascii_case(known)));
    let text = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes).trim_ascii_start();
    !named && !text.is_empty() && !matches!(text[0], b'{' | b'[') && !text.starts_with(parquet::MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_falls_into_its_elements_with_their_lines() {
        let text = b" [\n {\"a\": \"],\\\\\\\"{\"},\n\n{\"b\": [1, {}]} , 3]\n";
        let rows: Vec<(u64, &str)> =
            elements(text).unwrap().into_iter().map(|(n, t)| (n, std::str::from_utf8(t).unwrap())).collect();
        assert_eq!(rows, [(2, "{\"a\": \"],\\\\\\\"{\"}"), (4, "{\"b\": [1, {}]}"), (4, "3")]);
        assert_eq!(elements(b"[]").unwrap(), []);
        assert!(elements(b"[{\"a\": 1},\n{\"b\"").unwrap_err().contains("begins on line 2"));
        assert!(elements(b"[{}]\n{}").unwrap_err().contains("line 2: text follows"));
        let foreign = |name: &str, bytes: &[u8]| check_beginning(Path::new(name), bytes).is_err();
        assert!(foreign("a.csv", b"q,a\n1,2\n") && foreign("a.jsonl", b"\xFF\xFE{\0") && foreign("a", b"PK\x03\x04"));
        assert!(
            !foreign("a.csv", b" {\"q\": 1}")
                && !foreign("a.jsonl", b"q")
                && !foreign("a", b"\xEF\xBB\xBF[")
                && !foreign("a", b"")
        );
        assert!(is_list(b" [\n{") && is_list(b"[]") && !is_list(b"[1]\n") && !is_list(b"{"));
    }
}
