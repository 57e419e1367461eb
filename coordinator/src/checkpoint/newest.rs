//! The checkpoint that a run goes on from: the newest one that is whole. Those that are not are set aside.

use super::disk::Disk;
use super::manifest::{self, MANIFEST};
use super::state::{elements, Error as StateError, State};
use std::io;
use std::path::{Path, PathBuf};
use unisono_configs::model::Layout;

/// Why a run cannot go on from any checkpoint. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Version(super::manifest::Error),
    #[error("{path}: cannot be set aside ({source}); check the run directory's permissions")]
    SetAside { path: PathBuf, source: io::Error },
}

/// A checkpoint that no longer counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    pub step: u64,
    /// One sentence that names the file.
    pub reason: String,
}

/// The newest checkpoint whose files are all there, hash as the manifest says and hold every parameter of `layout`, and
/// what is wrong with those after it: their manifests are renamed, so that nobody takes them for checkpoints again. The
/// run's lock must be held.
pub fn newest(
    disk: &dyn Disk,
    run_dir: &Path,
    term: u64,
    layout: &Layout,
) -> Result<(Option<State>, Vec<Damaged>), Error> {
    let mut damaged = Vec::new();
    for (step, directory) in manifest::list(run_dir).into_iter().rev() {
        let reason = match State::open(&directory) {
            Ok(state) => match misfit(&state, step, layout) {
                None => return Ok((Some(state), damaged)),
                Some(what) => format!("{}: {what}", directory.join(MANIFEST).display()),
            },
            // Another build can read it: nothing is wrong with the checkpoint.
            Err(StateError::Manifest(error @ manifest::Error::Version { .. })) => return Err(Error::Version(error)),
            Err(error) => error.to_string(),
        };
        set_aside(disk, &directory, term)
            .map_err(|source| Error::SetAside { path: directory.join(MANIFEST), source })?;
        damaged.push(Damaged { step, reason });
    }
    Ok((None, damaged))
}

fn misfit(state: &State, step: u64, layout: &Layout) -> Option<String> {
    let manifest = &state.manifest;
    if manifest.step != step || manifest.cursor.step != step {
        return Some(format!("is of step {} in the directory of step {step}", manifest.step));
    }
    let expected: Vec<_> = layout.tensors().map(|(_, slot)| (slot.name.as_str(), slot.elements() as u64)).collect();
    let found: Vec<_> = manifest.tensors.iter().map(|t| (t.name.as_str(), elements(t))).collect();
    (found != expected).then(|| "its parameters are not those of the model".into())
}

fn set_aside(disk: &dyn Disk, directory: &Path, term: u64) -> io::Result<()> {
    disk.rename(&directory.join(MANIFEST), &directory.join(format!("{MANIFEST}.damaged-{term}")))?;
    disk.sync_directory(directory)
}

#[cfg(test)]
mod tests {
    use super::super::disk::Local;
    use super::super::state::tests::write;
    use super::*;
    use std::fs;
    use unisono_configs::model::{Bucket, TensorSlot};

    /// Checkpoints after steps 2, 4 and 6, and the layout of what is in them.
    fn run(run_dir: &Path) -> Layout {
        for step in [2, 4, 6] {
            let directory = manifest::directory(run_dir, step);
            write(&directory, 2);
            let mut manifest = manifest::Manifest::read(&directory).unwrap();
            (manifest.step, manifest.cursor.step) = (step, step);
            fs::write(directory.join(MANIFEST), manifest.to_json()).unwrap();
        }
        let tensors = manifest::Manifest::read(&manifest::directory(run_dir, 2)).unwrap().tensors;
        let slot = |t: &manifest::Tensor| TensorSlot { name: t.name.clone(), shape: t.shape.clone(), offset: 0 };
        let tensors: Vec<_> = tensors.iter().map(slot).collect();
        Layout { buckets: vec![Bucket { name: "all".into(), tensors, elements: 0 }] }
    }

    fn state_file(run_dir: &Path, step: u64) -> PathBuf {
        let directory = manifest::directory(run_dir, step);
        let manifest = manifest::Manifest::read(&directory).unwrap();
        let file = manifest.files.iter().find(|f| f.kind == manifest::Kind::State).unwrap();
        directory.join(&file.name)
    }

    #[test]
    fn the_newest_whole_checkpoint_is_taken_and_damaged_ones_never_count_again() {
        type Damage = fn(&Path);
        let damages: [(Damage, &str); 6] = [
            (|f| fs::write(f, &fs::read(f).unwrap()[..fs::read(f).unwrap().len() - 1]).unwrap(), "bytes"),
            (
                |f| {
                    let mut bytes = fs::read(f).unwrap();
                    *bytes.last_mut().unwrap() ^= 1;
                    fs::write(f, bytes).unwrap();
                },
                "hash",
            ),
            (|f| fs::remove_file(f).unwrap(), "cannot be read"),
            (|f| fs::write(f.with_file_name(MANIFEST), "{\"version\": 1,").unwrap(), "not a checkpoint's manifest"),
            (
                |f| {
                    let text = fs::read_to_string(f.with_file_name(MANIFEST)).unwrap();
                    fs::write(f.with_file_name(MANIFEST), text.replace("\"step\": 6", "\"step\": 5")).unwrap();
                },
                "hash that it gives itself",
            ),
            (
                |f| {
                    let directory = f.parent().unwrap();
                    let manifest = manifest::Manifest::read(directory).unwrap();
                    let other = manifest::Manifest { step: 5, ..manifest };
                    fs::write(directory.join(MANIFEST), other.to_json()).unwrap();
                },
                "step 5",
            ),
        ];
        for (damage, sentence) in damages {
            let dir = tempfile::tempdir().unwrap();
            let layout = run(dir.path());
            damage(&state_file(dir.path(), 6));
            let (found, damaged) = newest(&Local, dir.path(), 3, &layout).unwrap();
            assert_eq!(found.unwrap().manifest.step, 4, "{sentence}");
            assert_eq!(damaged.len(), 1);
            assert!(damaged[0].step == 6 && damaged[0].reason.contains(sentence), "{damaged:?}");
            assert_eq!(manifest::list(dir.path()).len(), 2);
            assert_eq!(newest(&Local, dir.path(), 4, &layout).unwrap().1, []);
        }
    }

    #[test]
    fn without_a_whole_checkpoint_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let layout = run(dir.path());
        for step in [2, 4, 6] {
            fs::write(state_file(dir.path(), step), "").unwrap();
        }
        let (found, damaged) = newest(&Local, dir.path(), 3, &layout).unwrap();
        assert!(found.is_none());
        assert_eq!(damaged.iter().map(|d| d.step).collect::<Vec<_>>(), [6, 4, 2]);
        let (found, damaged) = newest(&Local, Path::new("/nowhere"), 3, &layout).unwrap();
        assert!(found.is_none() && damaged.is_empty());
    }
}
