//! Committing a checkpoint: the ranks' files are checked to tile every parameter exactly, the committed rows are written
//! beside them, and the manifest is created if it is absent. Nothing is ever renamed over.

use super::disk::Disk;
use super::manifest::{self, Cursor, Dtype, File, Kind, Manifest, Parent, Range, Tensor, Writer, MANIFEST, VERSION};
use crate::run::event::PendingCheckpoint;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use unisono_configs::model::{Layout, TensorSlot};
use unisono_proto::v1::CheckpointFile;

/// Why a checkpoint is not committed. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("rank {rank} wrote {name}, which is not a plain file name of its own; run the unisono-worker that belongs to this coordinator")]
    Name { rank: usize, name: String },
    #[error("{path}: has {found} bytes on this machine where rank {rank} wrote {bytes}; the run directory must be one and the same for coordinator and workers")]
    Size { path: PathBuf, rank: usize, bytes: u64, found: String },
    #[error("the files of the checkpoint after step {step} do not tile {tensor}: {problem}; run the unisono-worker that belongs to this coordinator")]
    Tiling { step: u64, tensor: String, problem: String },
    #[error("{path}: cannot be written ({source}); check the space left on the disk")]
    Write { path: PathBuf, source: io::Error },
    #[error("{path}: exists already; another coordinator wrote this checkpoint, so end one of them")]
    Exists { path: PathBuf },
}

/// What the manifest says besides the ranks' files.
pub struct Facts<'a> {
    pub disk: &'a dyn Disk,
    pub run_dir: &'a Path,
    pub cursor: Cursor,
    /// Hash of the configuration.
    pub config: &'a str,
    pub layout: &'a Layout,
    /// Of masters and moments.
    pub dtype: Dtype,
    /// Source rows of all committed steps, in training order.
    pub samples: &'a [u64],
}

/// The manifest of what the ranks wrote, once that tiles every parameter; writes the committed rows beside it. It commits
/// nothing: see [`create`].
pub fn draft(pending: &PendingCheckpoint, facts: &Facts<'_>) -> Result<Manifest, Error> {
    let directory = manifest::directory(facts.run_dir, pending.step);
    let mut files = state_files(pending, &directory)?;
    check_tiling(pending.step, &files, facts.layout)?;
    files.push(write_samples(facts.disk, &directory, pending, facts.samples)?);
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let tensor = |slot: &TensorSlot| {
        let (name, shape) = (slot.name.clone(), slot.shape.clone());
        Tensor { name, shape, dtype: facts.dtype }
    };
    Ok(Manifest {
        version: VERSION,
        step: pending.step,
        cursor: facts.cursor,
        writer: Writer {
            term: pending.term,
            generation: pending.generation,
            attempt: pending.attempt,
            workers: pending.files.len() as u32,
        },
        config: facts.config.into(),
        parent: parent(facts.run_dir, pending.step),
        tensors: facts.layout.tensors().map(|(_, slot)| tensor(slot)).collect(),
        files,
        hash: String::new(),
    })
}

/// Creates the directory of the checkpoint after `step`.
pub fn prepare(disk: &dyn Disk, run_dir: &Path, step: u64) -> Result<PathBuf, Error> {
    let directory = manifest::directory(run_dir, step);
    let write = || {
        disk.make_directories(&directory)?;
        disk.sync_directory(&run_dir.join("checkpoints"))?;
        disk.sync_directory(run_dir)
    };
    write().map_err(|source| Error::Write { path: directory.clone(), source })?;
    Ok(directory)
}

/// Deletes files that ranks wrote towards the checkpoint after `step`, as far as that is possible.
pub fn discard(disk: &dyn Disk, run_dir: &Path, step: u64, files: &[Vec<CheckpointFile>]) {
    let directory = manifest::directory(run_dir, step);
    // However the attempt failed: what a manifest names stays.
    if directory.join(MANIFEST).exists() {
        tracing::warn!(path = %directory.display(), "files of a failed save stay behind beside a checkpoint");
        return;
    }
    for file in files.iter().flatten().filter(|file| is_plain(&file.name)) {
        let path = directory.join(&file.name);
        if let Err(error) = disk.remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "a file of a failed save stays behind");
        }
    }
}

/// Deletes all but the newest `keep` checkpoints and that after step `spare`, the manifest first, so that no half of one is
/// ever taken for whole; and what saves that were never committed have left of earlier steps.
pub fn retain(disk: &dyn Disk, run_dir: &Path, keep: usize, spare: Option<u64>) -> Result<(), Error> {
    let found = manifest::list(run_dir);
    let old = found.iter().take(found.len().saturating_sub(keep.max(1)));
    for (_, directory) in old.filter(|(step, _)| Some(*step) != spare) {
        let remove = || {
            disk.remove_file(&directory.join(MANIFEST))?;
            disk.sync_directory(directory)?;
            disk.remove_all(directory)
        };
        remove().map_err(|source| Error::Write { path: directory.clone(), source })?;
    }
    let Some((newest, _)) = found.last() else { return Ok(()) };
    for (_, directory) in manifest::directories(run_dir).into_iter().filter(|(step, _)| step < newest) {
        // One that was set aside is kept for whoever wants to know what happened to it.
        let names = fs::read_dir(&directory).into_iter().flatten().flatten().map(|entry| entry.file_name());
        if names.into_iter().any(|name| name.to_string_lossy().starts_with(MANIFEST)) {
            continue;
        }
        disk.remove_all(&directory).map_err(|source| Error::Write { path: directory, source })?;
    }
    Ok(())
}

/// Whether a checkpoint's file may be named so: it lies in the checkpoint's own directory.
pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.contains('/') && !name.starts_with('.') && name != MANIFEST
}

fn state_files(pending: &PendingCheckpoint, directory: &Path) -> Result<Vec<File>, Error> {
    let (mut files, mut names) = (Vec::new(), BTreeSet::new());
    for (rank, written) in pending.files.iter().enumerate() {
        for file in written {
            let name = &file.name;
            let Ok(hash) = <[u8; 32]>::try_from(&file.blake3[..]) else {
                return Err(Error::Name { rank, name: name.clone() });
            };
            if !is_plain(name) || !names.insert(name.clone()) {
                return Err(Error::Name { rank, name: name.clone() });
            }
            let path = directory.join(name);
            let found = fs::metadata(&path).map(|m| m.len());
            if found.as_ref().ok() != Some(&file.bytes) {
                let found = found.map_or("no".into(), |n| n.to_string());
                return Err(Error::Size { path, rank, bytes: file.bytes, found });
            }
            let range =
                |r: &unisono_proto::v1::TensorRange| Range { tensor: r.tensor.clone(), begin: r.begin, end: r.end };
            files.push(File {
                name: name.clone(),
                kind: Kind::State,
                bytes: file.bytes,
                blake3: blake3::Hash::from_bytes(hash).to_hex().to_string(),
                ranges: file.ranges.iter().map(range).collect(),
            });
        }
    }
    Ok(files)
}

/// Every element of every parameter exactly once.
fn check_tiling(step: u64, files: &[File], layout: &Layout) -> Result<(), Error> {
    let mut ranges: BTreeMap<&str, Vec<(u64, u64)>> = BTreeMap::new();
    for range in files.iter().flat_map(|f| &f.ranges) {
        ranges.entry(&range.tensor).or_default().push((range.begin, range.end));
    }
    let fail = |tensor: &str, problem: String| Err(Error::Tiling { step, tensor: tensor.into(), problem });
    for (_, slot) in layout.tensors() {
        let mut parts = ranges.remove(slot.name.as_str()).unwrap_or_default();
        parts.sort_unstable();
        let mut next = 0;
        for (begin, end) in parts {
            if begin != next || end <= begin {
                return fail(&slot.name, format!("elements {next} follow, but a range goes from {begin} to {end}"));
            }
            next = end;
        }
        if next != slot.elements() as u64 {
            return fail(&slot.name, format!("{next} elements of {} are there", slot.elements()));
        }
    }
    match ranges.keys().next() {
        Some(name) => fail(name, "the model has no such parameter".into()),
        None => Ok(()),
    }
}

/// A safetensors file with the one U64 tensor `samples`.
fn write_samples(
    disk: &dyn Disk,
    directory: &Path,
    pending: &PendingCheckpoint,
    samples: &[u64],
) -> Result<File, Error> {
    let name = format!("samples-{}-{}.safetensors", pending.term, pending.attempt);
    let bytes = samples.len() * 8;
    let mut header =
        format!(r#"{{"samples":{{"dtype":"U64","shape":[{}],"data_offsets":[0,{bytes}]}}}}"#, samples.len());
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    let mut content = Vec::with_capacity(8 + header.len() + bytes);
    content.extend((header.len() as u64).to_le_bytes());
    content.extend(header.as_bytes());
    content.extend(samples.iter().flat_map(|s| s.to_le_bytes()));
    let path = directory.join(&name);
    disk.write_new(&path, &content).map_err(|source| Error::Write { path, source })?;
    let blake3 = blake3::hash(&content).to_hex().to_string();
    Ok(File { name, kind: Kind::Samples, bytes: content.len() as u64, blake3, ranges: Vec::new() })
}

fn parent(run_dir: &Path, step: u64) -> Option<Parent> {
    let before = manifest::list(run_dir).into_iter().rfind(|(s, _)| *s < step)?;
    let bytes = fs::read(before.1.join(MANIFEST)).ok()?;
    Some(Parent { step: before.0, blake3: blake3::hash(&bytes).to_hex().to_string() })
}

/// The commit: the whole manifest appears under its name at once, and only where there was none. When this returns, the
/// checkpoint is on the disk.
pub fn create(disk: &dyn Disk, directory: &Path, manifest: &Manifest) -> Result<(), Error> {
    let Writer { term, attempt, .. } = manifest.writer;
    let (path, draft) = (directory.join(MANIFEST), directory.join(format!(".{MANIFEST}.{term}-{attempt}")));
    let content = manifest.to_json();
    let fail = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists { path: path.clone() },
        _ => Error::Write { path: path.clone(), source },
    };
    // What the manifest names is on the disk before the manifest is.
    disk.sync_directory(directory).map_err(fail)?;
    disk.write_new(&draft, &content).map_err(fail)?;
    let linked = disk.link(&draft, &path);
    if let Err(error) = disk.remove_file(&draft) {
        // It is not named by anything.
        tracing::warn!(path = %draft.display(), %error, "a draft stays behind");
    }
    match linked {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(fail(error)),
        // A file system without hard links: a torn manifest does not parse, so it is never taken for one.
        Err(_) => disk.write_new(&path, &content).map_err(fail)?,
    }
    disk.sync_directory(directory).map_err(|error| {
        // Nobody knows whether it is there after a crash, so nobody may hear that it is: neither now nor then.
        let taken_back = disk.remove_file(&path).and_then(|()| disk.sync_directory(directory));
        if let Err(error) = taken_back {
            tracing::warn!(path = %path.display(), %error, "a manifest that may not be durable stays behind");
        }
        fail(error)
    })
}

#[cfg(test)]
mod tests {
    use super::super::disk::Local;
    use super::*;
    use unisono_configs::model::{Bucket, TensorSlot};
    use unisono_proto::v1::TensorRange;

    fn layout() -> Layout {
        let slot = |name: &str, elements, offset| TensorSlot { name: name.into(), shape: vec![elements], offset };
        let tensors = vec![slot("a", 6, 0), slot("b", 4, 6)];
        Layout { buckets: vec![Bucket { name: "embedding".into(), tensors, elements: 10 }] }
    }

    /// One rank holds `a[0:4]`, the other the rest.
    fn pending(run_dir: &Path, step: u64) -> PendingCheckpoint {
        let directory = prepare(&Local, run_dir, step).unwrap();
        let range = |tensor: &str, begin, end| TensorRange { tensor: tensor.into(), begin, end };
        let file = |name: &str, ranges: Vec<TensorRange>| {
            fs::write(directory.join(name), name).unwrap();
            let blake3 = blake3::hash(name.as_bytes()).as_bytes().to_vec().into();
            vec![CheckpointFile { name: name.into(), bytes: name.len() as u64, blake3, ranges }]
        };
        let files = vec![
            file("rank-0.safetensors", vec![range("a", 0, 4)]),
            file("rank-1.safetensors", vec![range("b", 0, 4), range("a", 4, 6)]),
        ];
        PendingCheckpoint { step, attempt: 1, term: 1, generation: 1, files, since: 0.0 }
    }

    fn try_commit(run_dir: &Path, pending: &PendingCheckpoint) -> Result<Manifest, Error> {
        let cursor = Cursor { step: pending.step, epoch: 0, position: 2 };
        let manifest = draft(
            pending,
            &Facts {
                disk: &Local,
                run_dir,
                cursor,
                config: "c",
                layout: &layout(),
                dtype: Dtype::F32,
                samples: &[5, 3],
            },
        )?;
        create(&Local, &manifest::directory(run_dir, pending.step), &manifest)?;
        Ok(manifest)
    }

    fn read(directory: &Path) -> Manifest {
        Manifest { hash: String::new(), ..Manifest::read(directory).unwrap() }
    }

    #[test]
    fn a_manifest_is_created_once_and_lists_everything() {
        let dir = tempfile::tempdir().unwrap();
        let first = try_commit(dir.path(), &pending(dir.path(), 2)).unwrap();
        assert_eq!(first.files.len(), 3);
        let directory = manifest::directory(dir.path(), 2);
        assert_eq!(read(&directory), first);
        let names: BTreeSet<_> = fs::read_dir(&directory).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 4, "{names:?}");
        let samples = fs::read(directory.join("samples-1-1.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&samples).unwrap();
        assert_eq!(tensors.tensor("samples").unwrap().data(), [5u64, 3].map(u64::to_le_bytes).concat());
        let again = PendingCheckpoint { attempt: 2, ..pending(dir.path(), 2) };
        assert!(matches!(try_commit(dir.path(), &again), Err(Error::Exists { .. })));
        assert_eq!(read(&directory), first);
        let second = try_commit(dir.path(), &pending(dir.path(), 4)).unwrap();
        assert_eq!(second.parent.unwrap().step, 2);
        try_commit(dir.path(), &pending(dir.path(), 6)).unwrap();
        retain(&Local, dir.path(), 1, Some(2)).unwrap();
        let kept = || manifest::list(dir.path()).into_iter().map(|(step, _)| step).collect::<Vec<_>>();
        assert_eq!(kept(), [2, 6], "one that is being loaded stays");
        try_commit(dir.path(), &pending(dir.path(), 8)).unwrap();
        retain(&Local, dir.path(), 2, None).unwrap();
        assert_eq!(kept(), [6, 8]);
    }

    /// Says no to some operations.
    #[derive(Debug)]
    struct Failing {
        /// Syncs of a directory before one fails.
        syncs: std::cell::Cell<u32>,
        keeps_drafts: bool,
    }

    impl Disk for Failing {
        fn make_directories(&self, path: &Path) -> io::Result<()> {
            Local.make_directories(path)
        }
        fn create(&self, path: &Path) -> io::Result<()> {
            Local.create(path)
        }
        fn write(&self, path: &Path, content: &[u8]) -> io::Result<()> {
            Local.write(path, content)
        }
        fn sync_file(&self, path: &Path) -> io::Result<()> {
            Local.sync_file(path)
        }
        fn sync_directory(&self, path: &Path) -> io::Result<()> {
            let left = self.syncs.get();
            self.syncs.set(left.wrapping_sub(1));
            match left {
                0 => Err(io::ErrorKind::StorageFull.into()),
                _ => Local.sync_directory(path),
            }
        }
        fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
            Local.link(from, to)
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            Local.rename(from, to)
        }
        fn remove_file(&self, path: &Path) -> io::Result<()> {
            let draft = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            match draft && self.keeps_drafts {
                true => Err(io::ErrorKind::PermissionDenied.into()),
                false => Local.remove_file(path),
            }
        }
        fn remove_directory(&self, path: &Path) -> io::Result<()> {
            Local.remove_directory(path)
        }
    }

    /// What a manifest names is there, and where nobody heard of a checkpoint there is none.
    #[test]
    fn an_error_in_the_middle_of_a_commit_tears_nothing() {
        for (syncs, keeps_drafts, commits) in [(9, true, true), (0, false, false), (1, false, false)] {
            let dir = tempfile::tempdir().unwrap();
            let pending = pending(dir.path(), 2);
            let cursor = Cursor { step: 2, epoch: 0, position: 2 };
            let (run_dir, layout) = (dir.path(), layout());
            let (disk, config, samples) = (&Local, "c", &[5, 3]);
            let facts = Facts { disk, run_dir, cursor, config, layout: &layout, dtype: Dtype::F32, samples };
            let draft = draft(&pending, &facts).unwrap();
            let directory = manifest::directory(run_dir, 2);
            let disk = Failing { syncs: std::cell::Cell::new(syncs), keeps_drafts };
            let created = create(&disk, &directory, &draft);
            assert_eq!(created.is_ok(), commits, "{created:?}");
            assert_eq!(manifest::list(run_dir).len(), usize::from(commits));
            discard(&Local, run_dir, 2, &pending.files);
            let there = pending.files.iter().flatten().all(|file| directory.join(&file.name).exists());
            assert_eq!(there, commits, "files go with their attempt, and stay with their manifest");
        }
    }

    #[test]
    fn ranges_that_do_not_tile_commit_nothing() {
        type Change = fn(&mut PendingCheckpoint);
        let changes: [(Change, &str); 6] = [
            (|p| p.files[0][0].ranges[0].end = 3, "do not tile a"),
            (|p| p.files[0][0].ranges[0].end = 5, "do not tile a"),
            (|p| p.files[1][0].ranges[0].end = 3, "3 elements of 4"),
            (|p| p.files[1][0].ranges[0].tensor = "c".into(), "do not tile b"),
            (|p| p.files[0][0].bytes = 1, "one and the same"),
            (|p| p.files[0][0].name = "../x".into(), "plain file name"),
        ];
        for (change, sentence) in changes {
            let dir = tempfile::tempdir().unwrap();
            let mut pending = pending(dir.path(), 2);
            change(&mut pending);
            let told = try_commit(dir.path(), &pending).unwrap_err().to_string();
            assert!(told.contains(sentence), "{told}");
            assert!(manifest::list(dir.path()).is_empty());
        }
    }
}
