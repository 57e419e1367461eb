//! Which files a path names: itself, those of a directory, or those that a glob matches, in the order of their names.

use super::Error;
use std::path::{Component, Path, PathBuf};

/// What a directory's data files are called.
const ENDINGS: [&str; 3] = ["jsonl", "json", "parquet"];

/// The files of `path`, which `key` of the configuration named; a file that does not exist is found out by who opens it.
pub fn files(path: &Path, key: &str) -> Result<Vec<PathBuf>, Error> {
    let refuse = |problem: String| Error::File { path: path.into(), problem };
    let unreadable = |at: &Path, error| Error::Read { path: at.into(), key: key.into(), error };
    if path.is_dir() {
        let is_data =
            |p: &PathBuf| p.is_file() && p.extension().is_some_and(|e| ENDINGS.iter().any(|known| e == *known));
        let found: Vec<PathBuf> =
            entries(path).map_err(|error| unreadable(path, error))?.into_iter().filter(is_data).collect();
        return match found.is_empty() {
            true if std::fs::read_dir(path).is_ok_and(|mut all| all.next().is_none()) => Err(refuse(format!(
                "the directory is empty; put .jsonl, .json or .parquet files there, or correct {key}"
            ))),
            true => Err(refuse(
                "the directory holds no .jsonl, .json or .parquet file, and those below it are not searched; name the files by a glob"
                    .into(),
            )),
            false => Ok(found),
        };
    }
    if path.exists() || !path.to_string_lossy().contains(['*', '?']) {
        return Ok(vec![path.into()]);
    }
    let mut found = vec![PathBuf::new()];
    for component in path.components() {
        let name = component.as_os_str().to_string_lossy();
        found = match component {
            Component::Normal(_) if name.contains(['*', '?']) => {
                let mut next = Vec::new();
                for at in found.iter().filter(|at| at.is_dir()) {
                    let all = entries(at).map_err(|error| unreadable(at, error))?;
                    let fits = |p: &PathBuf| {
                        let own = p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                        matches(name.as_bytes(), own.as_bytes()) && !own.starts_with('.')
                    };
                    next.extend(all.into_iter().filter(fits));
                }
                next
            }
            _ => found.into_iter().map(|at| at.join(component)).filter(|at| at.exists()).collect(),
        };
    }
    found.retain(|at| at.is_file());
    match found.is_empty() {
        true => Err(refuse(format!("no file matches; set {key} to an existing file, a directory, or another glob"))),
        false => Ok(found),
    }
}

fn entries(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut all = std::fs::read_dir(directory)?.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>()?;
    all.sort();
    Ok(all)
}

/// `*` stands for any characters, `?` for one (a byte of it).
pub fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|at| matches(rest, &text[at..])),
        Some((b'?', rest)) => !text.is_empty() && matches(rest, &text[1..]),
        Some((byte, rest)) => text.first() == Some(byte) && matches(rest, &text[1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_and_globs_name_files_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b/x2.jsonl", "b/x1.json", "a/x3.jsonl", "a/notes.txt", "a/.hidden.jsonl"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let of = |name: &str| -> Vec<String> {
            let found = files(&dir.path().join(name), "data.path").unwrap();
            found.iter().map(|p| p.strip_prefix(dir.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(of("b"), ["b/x1.json", "b/x2.jsonl"]);
        assert_eq!(of("*/x?.json*"), ["a/x3.jsonl", "b/x1.json", "b/x2.jsonl"]);
        assert_eq!(of("absent.jsonl"), ["absent.jsonl"]);
        assert!(files(&dir.path().join("*.jsonl"), "data.path").unwrap_err().to_string().contains("no file matches"));
    }
}
