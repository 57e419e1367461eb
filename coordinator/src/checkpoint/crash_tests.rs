//! The machine crashes after every single operation on the disk, and of what was not synced by then, some is there and some
//! is not: what is found afterwards is always one whole checkpoint, the old or the new one.

use super::commit::{create, draft, prepare, retain, Facts};
use super::disk::{Disk, Local};
use super::manifest::{self, Cursor, Dtype};
use super::newest::newest;
use super::state::{Part, State};
use crate::run::event::PendingCheckpoint;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use unisono_configs::model::{Bucket, Layout, TensorSlot};
use unisono_proto::v1::{CheckpointFile, TensorRange};

/// One operation, on paths within the run's directory.
#[derive(Debug, Clone)]
enum Done {
    MakeDirectory(PathBuf),
    /// The number of the file, which its names share.
    Create(PathBuf, usize),
    Write(usize, Vec<u8>),
    SyncFile(usize),
    SyncDirectory(PathBuf),
    Link(PathBuf, usize),
    Unlink(PathBuf),
    RemoveDirectory(PathBuf),
}

/// The real file system, with every operation written down.
#[derive(Debug)]
struct Recorder {
    root: PathBuf,
    files: RefCell<BTreeMap<PathBuf, usize>>,
    done: RefCell<Vec<Done>>,
}

impl Recorder {
    fn new(root: &Path) -> Self {
        Recorder { root: root.into(), files: RefCell::default(), done: RefCell::default() }
    }

    fn within(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).unwrap().into()
    }

    fn note(&self, done: Done) -> io::Result<()> {
        self.done.borrow_mut().push(done);
        Ok(())
    }

    fn file(&self, path: &Path) -> usize {
        self.files.borrow()[path]
    }
}

impl Disk for Recorder {
    fn make_directories(&self, path: &Path) -> io::Result<()> {
        let missing: Vec<_> = path.ancestors().take_while(|p| !p.exists()).map(Path::to_path_buf).collect();
        Local.make_directories(path)?;
        missing.iter().rev().try_for_each(|p| self.note(Done::MakeDirectory(self.within(p))))
    }

    fn create(&self, path: &Path) -> io::Result<()> {
        Local.create(path)?;
        let number = self.done.borrow().len();
        self.files.borrow_mut().insert(path.into(), number);
        self.note(Done::Create(self.within(path), number))
    }

    fn write(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        Local.write(path, content)?;
        self.note(Done::Write(self.file(path), content.into()))
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        Local.sync_file(path)?;
        self.note(Done::SyncFile(self.file(path)))
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        Local.sync_directory(path)?;
        self.note(Done::SyncDirectory(self.within(path)))
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        Local.link(from, to)?;
        let number = self.file(from);
        self.files.borrow_mut().insert(to.into(), number);
        self.note(Done::Link(self.within(to), number))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Local.rename(from, to)?;
        let number = self.file(from);
        self.files.borrow_mut().insert(to.into(), number);
        // As two operations of which a crash may keep one: more than a journal would do to us.
        self.note(Done::Link(self.within(to), number))?;
        self.note(Done::Unlink(self.within(from)))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        Local.remove_file(path)?;
        self.note(Done::Unlink(self.within(path)))
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        Local.remove_directory(path)?;
        self.note(Done::RemoveDirectory(self.within(path)))
    }
}

/// What the disk holds after a crash.
#[derive(Default)]
struct Disc {
    directories: Vec<PathBuf>,
    names: BTreeMap<PathBuf, usize>,
    contents: BTreeMap<usize, Vec<u8>>,
}

impl Disc {
    fn apply(&mut self, done: &Done) {
        match done {
            Done::MakeDirectory(path) => self.directories.push(path.clone()),
            Done::Create(path, file) | Done::Link(path, file) => drop(self.names.insert(path.clone(), *file)),
            Done::Unlink(path) => drop(self.names.remove(path)),
            Done::RemoveDirectory(path) => {
                self.directories.retain(|p| p != path);
                self.names.retain(|name, _| !name.starts_with(path));
            }
            Done::Write(..) | Done::SyncFile(_) | Done::SyncDirectory(_) => {}
        }
    }

    /// After a crash that follows the operations `done`. `luck` decides about everything that was not synced.
    fn after(done: &[Done], mut luck: impl FnMut(u64) -> u64) -> Self {
        let mut disc = Disc::default();
        let parent = |path: &Path| path.parent().map(Path::to_path_buf);
        for (index, operation) in done.iter().enumerate() {
            let synced = |directory: Option<PathBuf>| {
                done[index..]
                    .iter()
                    .any(|later| matches!(later, Done::SyncDirectory(d) if Some(d) == directory.as_ref()))
            };
            match operation {
                Done::MakeDirectory(path) | Done::RemoveDirectory(path) | Done::Unlink(path) => {
                    if synced(parent(path)) || luck(2) == 1 {
                        disc.apply(operation);
                    }
                }
                Done::Create(path, _) | Done::Link(path, _) => {
                    if synced(parent(path)) || luck(2) == 1 {
                        disc.apply(operation);
                    }
                }
                Done::Write(file, content) => {
                    let synced = done[index..].iter().any(|later| matches!(later, Done::SyncFile(f) if f == file));
                    let kept = match synced {
                        true => content.len(),
                        false => luck(content.len() as u64 + 1) as usize,
                    };
                    let to = disc.contents.entry(*file).or_default();
                    to.extend(&content[..kept]);
                    // A file may be as long as it should and hold nothing.
                    if !synced && luck(2) == 1 {
                        to.resize(to.len() + content.len() - kept, 0);
                    }
                }
                Done::SyncFile(_) | Done::SyncDirectory(_) => {}
            }
        }
        disc
    }

    fn write(&self, root: &Path) {
        for directory in &self.directories {
            std::fs::create_dir_all(root.join(directory)).unwrap();
        }
        for (name, file) in &self.names {
            let path = root.join(name);
            // A name in a directory that is lost is lost with it.
            if path.parent().unwrap().is_dir() {
                std::fs::write(path, self.contents.get(file).map_or(&[][..], Vec::as_slice)).unwrap();
            }
        }
    }
}

fn layout() -> Layout {
    let slot = |name: &str, elements, offset| TensorSlot { name: name.into(), shape: vec![elements], offset };
    let tensors = vec![slot("a", 6, 0), slot("b", 4, 6)];
    Layout { buckets: vec![Bucket { name: "embedding".into(), tensors, elements: 10 }] }
}

/// What a rank writes: every value is the step's number.
fn shard(disk: &dyn Disk, directory: &Path, name: &str, step: u64, ranges: &[(&str, u64, u64)]) -> CheckpointFile {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (tensor, begin, end) in ranges {
        for part in Part::ALL {
            let (from, bytes) = (data.len(), (step as f32).to_le_bytes().repeat((end - begin) as usize));
            data.extend(bytes);
            let key = format!("{tensor}/{}/{begin}-{end}", part.name());
            let entry = serde_json::json!({"dtype": "F32", "shape": [end - begin], "data_offsets": [from, data.len()]});
            header.insert(key, entry);
        }
    }
    let text = serde_json::to_vec(&header).unwrap();
    let whole = [&(text.len() as u64).to_le_bytes()[..], &text, &data].concat();
    disk.write_new(&directory.join(name), &whole).unwrap();
    disk.sync_directory(directory).unwrap();
    let range = |&(tensor, begin, end): &(&str, u64, u64)| TensorRange { tensor: tensor.into(), begin, end };
    CheckpointFile {
        name: name.into(),
        bytes: whole.len() as u64,
        blake3: blake3::hash(&whole).as_bytes().to_vec().into(),
        ranges: ranges.iter().map(range).collect(),
    }
}

/// A whole save, as workers and coordinator make it.
fn save(disk: &dyn Disk, run_dir: &Path, step: u64) {
    let directory = prepare(disk, run_dir, step).unwrap();
    let files = vec![
        vec![shard(disk, &directory, "rank-0.safetensors", step, &[("a", 0, 4)])],
        vec![shard(disk, &directory, "rank-1.safetensors", step, &[("b", 0, 4), ("a", 4, 6)])],
    ];
    let pending = PendingCheckpoint { step, attempt: 1, term: 1, generation: 1, files, since: 0.0 };
    let cursor = Cursor { step, epoch: 0, position: step };
    let (layout, samples) = (layout(), vec![step; step as usize]);
    let facts = Facts { disk, run_dir, cursor, config: "c", layout: &layout, dtype: Dtype::F32, samples: &samples };
    let manifest = draft(&pending, &facts).unwrap();
    let state = State::verify(&directory, manifest).unwrap();
    create(disk, &directory, &state.manifest).unwrap();
    retain(disk, run_dir, 1, None).unwrap();
}

/// The step whose state is found, after it was read whole.
fn found(run_dir: &Path) -> Option<u64> {
    let (state, _) = newest(&Local, run_dir, 9, &layout()).unwrap();
    let state = state?;
    let step = state.manifest.step;
    for (tensor, part) in ["a", "b"].into_iter().flat_map(|t| Part::ALL.map(|p| (t, p))) {
        let mut values = Vec::new();
        state
            .read(tensor, part, &mut |block| {
                values.extend_from_slice(block);
                Ok(())
            })
            .unwrap();
        let expected = (step as f32).to_le_bytes().repeat(if tensor == "a" { 6 } else { 4 });
        assert_eq!(values, expected, "{tensor} is of step {step} and of no other");
    }
    let mut samples = Vec::new();
    state
        .read_samples(&mut |block| {
            samples.extend_from_slice(block);
            Ok(())
        })
        .unwrap();
    assert_eq!(samples, step.to_le_bytes().repeat(step as usize));
    Some(step)
}

/// A sequence without state of the machine: the same seed, the same luck.
fn lucky(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

#[test]
fn after_a_crash_at_any_operation_one_whole_checkpoint_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().canonicalize().unwrap();
    let disk = Recorder::new(&run_dir);
    save(&disk, &run_dir, 2);
    let first = disk.done.borrow().len();
    save(&disk, &run_dir, 4);
    let second = disk.done.borrow().len();
    save(&disk, &run_dir, 6);
    let done = disk.done.into_inner();
    assert_eq!(manifest::list(&run_dir).len(), 1, "older ones are deleted");
    let mut crashes = BTreeMap::new();
    for end in 0..=done.len() {
        for seed in 0..24 {
            // Nothing but what was synced; everything; and anything between.
            let luck = |seed: u64| -> Box<dyn FnMut(u64) -> u64> {
                match seed {
                    0 => Box::new(|_| 0),
                    1 => Box::new(|below| below - 1),
                    seed => Box::new(lucky(seed * 10_007 + end as u64)),
                }
            };
            let crashed = tempfile::tempdir().unwrap();
            Disc::after(&done[..end], luck(seed)).write(crashed.path());
            let step = found(crashed.path());
            // A save that has returned is never lost.
            let least = [(done.len(), 6), (second, 4), (first, 2)].into_iter().find(|(at, _)| end >= *at);
            assert!(
                step >= least.map(|(_, step)| step),
                "{step:?} is left after operation {end} of {}, seed {seed}",
                done.len()
            );
            *crashes.entry(step).or_insert(0u32) += 1;
        }
    }
    // Each of them was found at some time, and before the first there was none.
    assert_eq!(crashes.keys().copied().collect::<Vec<_>>(), [None, Some(2), Some(4), Some(6)], "{crashes:?}");
}
