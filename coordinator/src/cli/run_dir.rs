//! Where a run lives: `runs/<name>-<nnn>`, or the directory of `--run-dir`.

use super::{Error, Result};
use crate::serve::ledger::{Reader, LEDGER};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use unisono_configs::run::RunConfig;

/// Name of the resolved configuration within a run's directory.
pub const CONFIG: &str = "config.toml";

/// Makes the run's directory. One that exists is refused: it belongs to another run. So is one that is not `free`, because
/// elsewhere its name stands for another run; without a wanted one, the next number is taken then.
pub fn create(wanted: Option<&Path>, name: &str, free: &dyn Fn(&Path) -> Result<bool>) -> Result<PathBuf> {
    match wanted {
        Some(path) => match make(path) {
            Ok(()) => match free(path).inspect_err(|_| withdraw(path))? {
                true => Ok(path.into()),
                false => {
                    withdraw(path);
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    Err(Error::BadInput(format!("checkpoint.copy_to holds the copies of another run called {name}; choose another --run-dir or another place for copies")))
                }
            },
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(exists(path)),
            Err(error) => Err(cannot(path, &error)),
        },
        None => numbered(Path::new("runs"), name, free),
    }
}

/// Says no to a directory that is there already.
pub fn refuse_existing(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Ok(_) => Err(exists(path)),
        Err(_) => Ok(()),
    }
}

/// Whether the directory is there and no run has begun in it: its ledger says nothing.
pub fn is_unborn(path: &Path) -> bool {
    let ledger = path.join(LEDGER);
    let is_silent =
        || Reader::open(&ledger).and_then(|reader| reader.after(0, 1)).is_ok_and(|events| events.is_empty());
    path.is_dir() && (!ledger.exists() || is_silent())
}

/// Removes the directory of a run that was refused when its workers looked at the model, before it had a checkpoint.
pub fn withdraw(run_dir: &Path) {
    let has_checkpoints = fs::read_dir(run_dir.join("checkpoints")).is_ok_and(|mut entries| entries.next().is_some());
    if !has_checkpoints {
        // What cannot be removed is named by the next run that wants its place.
        let _ = fs::remove_dir_all(run_dir);
    }
}

fn exists(path: &Path) -> Error {
    let resume = match path.join(LEDGER).is_file() {
        true => format!("go on with --resume {}, ", path.display()),
        false => String::new(),
    };
    Error::BadInput(format!("{} exists; {resume}choose another --run-dir, or remove it", path.display()))
}

/// The first free number. Creating a directory is atomic, so two runs that start at once get two numbers.
fn numbered(runs: &Path, name: &str, free: &dyn Fn(&Path) -> Result<bool>) -> Result<PathBuf> {
    for number in 1.. {
        let path = runs.join(format!("{name}-{number:03}"));
        match make(&path) {
            Ok(()) if free(&path).inspect_err(|_| withdraw(&path))? => return Ok(path),
            Ok(()) => withdraw(&path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(cannot(&path, &error)),
        }
    }
    Err(Error::failed("no number is left for a run"))
}

fn make(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent)?;
    }
    fs::create_dir(path)
}

fn cannot(path: &Path, error: &io::Error) -> Error {
    Error::BadInput(format!("{}: cannot be created ({error}); choose a --run-dir that you may write", path.display()))
}

/// The run called `name` with the highest number that has recorded its configuration and opened its ledger.
pub fn newest(runs: &Path, name: &str) -> Option<PathBuf> {
    let number = |entry: fs::DirEntry| -> Option<(u64, PathBuf)> {
        let number = entry.file_name().to_str()?.strip_prefix(name)?.strip_prefix('-')?.parse().ok()?;
        let begun = entry.path().join(CONFIG).is_file() && entry.path().join(LEDGER).is_file();
        begun.then(|| (number, entry.path()))
    };
    fs::read_dir(runs).ok()?.flatten().filter_map(number).max().map(|(_, path)| path)
}

/// Records the resolved configuration, whole or not at all.
pub fn record(run_dir: &Path, config: &RunConfig) -> Result<()> {
    let (path, partial) = (run_dir.join(CONFIG), run_dir.join(format!(".{CONFIG}.{}", std::process::id())));
    let write = || {
        let mut file = fs::File::create(&partial)?;
        io::Write::write_all(&mut file, config.to_toml().as_bytes())?;
        file.sync_all()?;
        fs::rename(&partial, &path)
    };
    write().map_err(|error| cannot(&path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_up_and_an_existing_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let always = |_: &Path| Ok(true);
        assert!(numbered(dir.path(), "a", &always).unwrap().ends_with("a-001"));
        assert!(numbered(dir.path(), "a", &always).unwrap().ends_with("a-002"));
        assert!(numbered(dir.path(), "b", &always).unwrap().ends_with("b-001"));
        assert!(newest(dir.path(), "a").is_none(), "nothing is recorded");
        for run in ["a-001", "a-002", "a-x", "b-007", "a-003"] {
            fs::create_dir_all(dir.path().join(run)).unwrap();
            fs::write(dir.path().join(run).join(CONFIG), "").unwrap();
            if run != "a-003" {
                fs::write(dir.path().join(run).join(LEDGER), "").unwrap();
            }
        }
        assert!(newest(dir.path(), "a").unwrap().ends_with("a-002"));
        let path = dir.path().join("deep/own");
        create(Some(&path), "a", &always).unwrap();
        match create(Some(&path), "a", &always) {
            Err(Error::BadInput(sentence)) => assert!(sentence.contains("choose another --run-dir"), "{sentence}"),
            other => panic!("{other:?}"),
        }
    }
}
