//! Writes the own shard of the optimizer state: one safetensors file in global coordinates, so that any number of workers
//! can read what any number wrote. The file is on disk when this says so: flushed and synced, and its directory too.

pub mod saver;

use crate::memory::Bytes;
use crate::optim::shard::Shard;
use crate::optim::state::{Form, Held};
use crate::restore::Part;
use rustix::fs::{fallocate, statvfs, FallocateFlags};
use rustix::io::Errno;
use serde_json::{json, Map, Value};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use unisono_configs::model::Layout;
use unisono_proto::v1::{CheckpointFile, Epoch, TensorRange};

/// Why a shard could not be written. Nothing refers to a file that failed: the next attempt writes another.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: the checkpoint cannot be written ({source}); make room, or check that every worker may write to the run directory")]
    Write { path: PathBuf, source: io::Error },
    #[error("{path}: the checkpoint needs {} here with what the ledger needs, and {} are left; make room, or lower checkpoint.keep", Bytes(*.needed + SPARE), Bytes(*.left))]
    NoRoom { path: PathBuf, needed: u64, left: u64 },
}

/// Bytes that a save leaves on the disk, so that the ledger goes on.
const SPARE: u64 = 8 << 20;
/// Elements written at once.
const BLOCK: usize = 1 << 16;

/// One worker's shard, wherever it lies.
#[derive(Debug, Clone)]
pub struct Source<'a> {
    pub layout: &'a Layout,
    pub shard: &'a Shard,
    pub form: Form,
    /// Of each bucket.
    pub held: Vec<Held<'a>>,
}

impl Source<'_> {
    /// Bytes of everything: what a file of it holds beside its header.
    pub fn bytes(&self) -> u64 {
        (self.form.saved_width() * self.shard.elements()) as u64
    }
}

/// Writes masters and moments of the own shard into `dir`, which exists. Tensors are named
/// `<parameter>/<master|m|v>/<begin>-<end>`: F32 or BF16 `[end - begin]`, elements of the parameter in row-major order. What a
/// failed attempt has written is deleted.
pub fn write(
    dir: &Path,
    source: &Source<'_>,
    epoch: &Epoch,
    attempt: u32,
    given_up: &AtomicBool,
) -> Result<CheckpointFile, Error> {
    let (rank, world) = (source.shard.rank, source.shard.world);
    let name = format!("shard-{rank}of{world}-{}-{}-{attempt}.safetensors", epoch.term, epoch.generation);
    let path = dir.join(&name);
    // Never over an existing file: a name belongs to one attempt.
    let created = OpenOptions::new().write(true).create_new(true).open(&path);
    let file = created.map_err(|source| Error::Write { path: path.clone(), source })?;
    let written = reserve(dir, &file, source).and_then(|()| {
        let written =
            write_file(file, source, given_up).map_err(|source| Error::Write { path: path.clone(), source })?;
        // A new file's name is durable once its directory is.
        let synced = File::open(dir).and_then(|d| d.sync_all());
        synced.map_err(|source| Error::Write { path: dir.into(), source })?;
        Ok(written)
    });
    let (bytes, hash) = written.inspect_err(|_| {
        // Half a file only takes up the room that the next attempt needs. Whether it goes changes nothing.
        std::fs::remove_file(&path).ok();
    })?;
    let ranges = source.shard.pieces(source.layout).map(|piece| TensorRange {
        tensor: piece.tensor.name.clone(),
        begin: piece.of_tensor.start as u64,
        end: piece.of_tensor.end as u64,
    });
    let blake3 = hash.as_bytes().to_vec().into();
    Ok(CheckpointFile { name, bytes, blake3, ranges: ranges.collect() })
}

/// Takes the room that the file needs, so that a full disk is known before anything is written.
fn reserve(dir: &Path, file: &File, source: &Source<'_>) -> Result<(), Error> {
    let needed = 8 + header(source).len() as u64 + source.bytes();
    let no_room = |left| Error::NoRoom { path: dir.into(), needed, left };
    let left = || statvfs(dir).map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize)).ok();
    let before = left();
    if let Some(left) = before.filter(|&left| left < needed + SPARE) {
        return Err(no_room(left));
    }
    match fallocate(file, FallocateFlags::empty(), 0, needed) {
        // Others may have taken room meanwhile.
        Ok(()) if left().is_some_and(|left| left < SPARE) => Err(no_room(before.unwrap_or(0))),
        Ok(()) => Ok(()),
        Err(Errno::NOSPC | Errno::DQUOT) => Err(no_room(before.unwrap_or(0))),
        // A file system that cannot reserve; or one whose fault the writing will name.
        Err(_) => Ok(()),
    }
}

fn write_file(file: File, source: &Source<'_>, given_up: &AtomicBool) -> io::Result<(u64, blake3::Hash)> {
    let inner = BufWriter::with_capacity(1 << 20, file);
    let mut out = Hashing { inner, hasher: blake3::Hasher::new(), bytes: 0, given_up };
    write_to(&mut out, source)?;
    let Hashing { inner, hasher, bytes, .. } = out;
    let file = inner.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    Ok((bytes, hasher.finalize()))
}

/// Appends to `out` what the file would hold.
pub fn encode(source: &Source<'_>, out: &mut Vec<u8>) {
    // What grows by doubling is copied again and again, and may be too large to be kept.
    out.reserve_exact(8 + header(source).len() + source.bytes() as usize);
    write_to(out, source).expect("writing to memory does not fail");
}

fn write_to(out: &mut impl Write, source: &Source<'_>) -> io::Result<()> {
    let header = header(source);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut scratch = Vec::new();
    for piece in source.shard.pieces(source.layout) {
        for part in Part::ALL {
            for begin in piece.of_shard.clone().step_by(BLOCK) {
                scratch.clear();
                let block = begin..piece.of_shard.end.min(begin + BLOCK);
                source.held[piece.bucket].append(part, block, &mut scratch);
                out.write_all(&scratch)?;
            }
        }
    }
    Ok(())
}

/// The safetensors header, padded with spaces so that the data starts at a multiple of 8 bytes.
fn header(source: &Source<'_>) -> Vec<u8> {
    let mut entries: Map<String, Value> = Map::new();
    let mut offset = 0;
    let width = source.form.saved_width() / Part::ALL.len();
    for piece in source.shard.pieces(source.layout) {
        let (begin, end) = (piece.of_tensor.start, piece.of_tensor.end);
        for part in Part::ALL {
            let next = offset + width * (end - begin);
            let entry = json!({"dtype": source.form.dtype(), "shape": [end - begin], "data_offsets": [offset, next]});
            entries.insert(format!("{}/{}/{begin}-{end}", piece.tensor.name, part.name()), entry);
            offset = next;
        }
    }
    let mut header = Value::Object(entries).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}

struct Hashing<'a> {
    inner: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
    /// Nobody needs the file any more.
    given_up: &'a AtomicBool,
}

/// Bytes after which a file is brought to its disk: the last time, which nobody can interrupt, is as short as all others.
const SYNCED: u64 = 64 << 20;

impl Write for Hashing<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("the workers regrouped"));
        }
        let written = self.inner.write(buffer)?;
        self.hasher.update(&buffer[..written]);
        let before = self.bytes;
        self.bytes += written as u64;
        if before / SYNCED != self.bytes / SYNCED {
            self.inner.get_ref().sync_data()?;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ops::view;
    use crate::optim::adamw::Settings;
    use crate::optim::reduction::Adding;
    use crate::optim::{state, Optimizer};
    use safetensors::SafeTensors;
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use tch::{Kind, Tensor};
    use unisono_configs::model::{Bucket, Layout, TensorSlot};

    fn layout() -> Arc<Layout> {
        let slot = |name: &str, shape: &[usize], offset| TensorSlot { name: name.into(), shape: shape.into(), offset };
        let tensors = vec![slot("norm", &[100], 0), slot("matrix", &[1000, 200], 100)];
        Arc::new(Layout { buckets: vec![Bucket { name: "block.0".into(), tensors, elements: 200_100 }] })
    }

    /// A rank's shard of a model whose master `i` is `i` and a fraction, with moments beside it.
    pub(crate) fn shard(rank: usize, world: usize, form: Form) -> (Optimizer, Vec<Tensor>) {
        let settings =
            Settings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, max_grad_norm: 0.0, form, seed: 0 };
        let mut optimizer = Optimizer::new(layout(), rank, world, settings, Adding::in_place(1));
        let number = |name: &str, part: Part, i: usize| {
            let x = i as f32 + if name == "norm" { 0.5 } else { 0.25 } + 0.125 * part as usize as f32;
            if form == Form::Narrow {
                state::round(x).to_f32()
            } else {
                x
            }
        };
        let fill = |name: &str, part: Part, range: std::ops::Range<usize>, to: &mut [f32]| -> Result<(), ()> {
            to.iter_mut().zip(range).for_each(|(x, i)| *x = number(name, part, i));
            Ok(())
        };
        optimizer.load_state(fill).unwrap();
        let masters = layout().buckets[0].tensors.clone();
        let masters = masters.iter().flat_map(|t| (0..t.elements()).map(|i| number(&t.name, Part::Master, i)));
        let masters: Vec<f32> = masters.collect();
        let mut parameters = Tensor::zeros([masters.len() as i64], (Kind::BFloat16, tch::Device::Cpu));
        match form {
            Form::Whole => parameters = Tensor::from_slice(&masters),
            _ => state::round_all(&masters, view::elements_mut(&mut parameters)),
        }
        (optimizer, vec![parameters])
    }

    /// Writes a rank's shard as the first attempt.
    pub(crate) fn write_shard(dir: &Path, rank: usize, world: usize, form: Form, epoch: &Epoch) -> CheckpointFile {
        let (optimizer, parameters) = shard(rank, world, form);
        write(dir, &optimizer.source(&parameters), epoch, 1, &AtomicBool::new(false)).unwrap()
    }

    #[test]
    fn the_files_of_all_ranks_hold_every_element_once() {
        let dir = tempfile::tempdir().unwrap();
        let epoch = Epoch { term: 2, generation: 3 };
        let mut masters: BTreeMap<String, Vec<Option<f32>>> =
            [("norm".to_owned(), vec![None; 100]), ("matrix".to_owned(), vec![None; 200_000])].into();
        for rank in 0..3 {
            let report = write_shard(dir.path(), rank, 3, Form::Split, &epoch);
            assert_eq!(report.name, format!("shard-{rank}of3-2-3-1.safetensors"));
            let data = std::fs::read(dir.path().join(&report.name)).unwrap();
            assert_eq!(data.len() as u64, report.bytes);
            assert_eq!(blake3::hash(&data).as_bytes()[..], report.blake3[..]);
            let file = SafeTensors::deserialize(&data).unwrap();
            assert_eq!(file.len(), 3 * report.ranges.len());
            for range in &report.ranges {
                let read = |field: &str| {
                    let name = format!("{}/{field}/{}-{}", range.tensor, range.begin, range.end);
                    let bytes = file.tensor(&name).unwrap().data().to_vec();
                    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<_>>()
                };
                let own = read("master");
                assert!(read("m").iter().zip(&own).all(|(m, x)| *m == x + 0.125));
                assert!(read("v").iter().zip(&own).all(|(v, x)| *v == x + 0.25));
                let whole = masters.get_mut(&range.tensor).unwrap();
                for (i, x) in (range.begin..range.end).zip(own) {
                    assert_eq!(whole[i as usize].replace(x), None, "element {i} occurs once");
                }
            }
        }
        for (name, values) in &masters {
            let fraction = if name == "norm" { 0.5 } else { 0.25 };
            assert!(values.iter().enumerate().all(|(i, x)| *x == Some(i as f32 + fraction)), "{name}");
        }
    }

    #[test]
    fn what_nobody_needs_any_more_is_not_written_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let (optimizer, parameters) = shard(0, 1, Form::Whole);
        let epoch = Epoch { term: 1, generation: 1 };
        let given_up = AtomicBool::new(true);
        let error = write(dir.path(), &optimizer.source(&parameters), &epoch, 1, &given_up).unwrap_err().to_string();
        assert!(error.contains("regrouped"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "half a file is not left behind");
    }

    #[test]
    fn a_name_is_never_written_twice_and_a_missing_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let epoch = Epoch { term: 1, generation: 1 };
        let (optimizer, parameters) = shard(0, 1, Form::Whole);
        let source = optimizer.source(&parameters);
        let wanted = AtomicBool::new(false);
        write(dir.path(), &source, &epoch, 1, &wanted).unwrap();
        let again = write(dir.path(), &source, &epoch, 1, &wanted).unwrap_err().to_string();
        assert!(again.contains("shard-0of1-1-1-1.safetensors"), "{again}");
        write(dir.path(), &source, &epoch, 2, &wanted).unwrap();
        assert!(write(&dir.path().join("gone"), &source, &epoch, 1, &wanted).is_err());
    }
}
