//! Reads a checkpoint back: any range of any parameter's master and moments, whoever wrote how much of it. What the files
//! hold is named in the manifest; that they are whole, the coordinator has verified before it assigns them.

use crate::snapshot::Image;
use half::bf16;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MANIFEST: &str = "MANIFEST.json";
/// Elements read at once.
const BLOCK: usize = 1 << 16;
/// A header above this is damage, not a header (safetensors' own limit).
const MAX_HEADER: u64 = 100 << 20;

/// Why a checkpoint cannot be read. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: the checkpoint cannot be read ({source}); the run directory must be one and the same for coordinator and workers")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {problem}; the checkpoint is damaged, resume the run again")]
    Damaged { path: PathBuf, problem: String },
    #[error(
        "{path}: elements {begin}..{end} of \"{tensor}\" are missing; the checkpoint is damaged, resume the run again"
    )]
    Missing { path: PathBuf, tensor: String, begin: usize, end: usize },
    #[error("{path}: is of step {found} where step {expected} was assigned; resume the run again")]
    Step { path: PathBuf, found: u64, expected: u64 },
}

/// One of the three tensors that describe a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Master,
    M,
    V,
}

impl Part {
    pub const ALL: [Part; 3] = [Part::Master, Part::M, Part::V];

    /// What it is called in files and in sentences.
    pub fn name(self) -> &'static str {
        match self {
            Part::Master => "master",
            Part::M => "m",
            Part::V => "v",
        }
    }
}

#[derive(Deserialize)]
struct Manifest {
    step: u64,
    files: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    name: String,
    kind: String,
    #[serde(default)]
    ranges: Vec<Held>,
}

#[derive(Clone, Deserialize)]
struct Held {
    tensor: String,
    begin: usize,
    end: usize,
}

/// What the names in an image's header say that it holds.
fn ranges(header: &serde_json::Value) -> Vec<Held> {
    let named = |key: &String| {
        let (tensor, range) = key.rsplit_once("/master/")?;
        let (begin, end) = range.split_once('-')?;
        Some(Held { tensor: tensor.to_owned(), begin: begin.parse().ok()?, end: end.parse().ok()? })
    };
    header.as_object().into_iter().flat_map(|entries| entries.keys()).filter_map(named).collect()
}

/// Where a range of a parameter lies: the file, and the first byte and the type of each part in it.
struct Place {
    elements: Range<usize>,
    file: usize,
    parts: [(u64, Type); 3],
}

/// A type of numbers in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    F32,
    Bf16,
}

impl Type {
    fn named(dtype: &serde_json::Value) -> Option<Self> {
        match dtype.as_str()? {
            "F32" => Some(Type::F32),
            "BF16" => Some(Type::Bf16),
            _ => None,
        }
    }

    fn width(self) -> usize {
        match self {
            Type::F32 => 4,
            Type::Bf16 => 2,
        }
    }
}

/// What a file holds, wherever it is.
enum Content {
    File(File),
    Memory(Arc<Image>),
}

impl Content {
    fn len(&self) -> io::Result<u64> {
        match self {
            Content::File(file) => Ok(file.metadata()?.len()),
            Content::Memory(image) => Ok(image.bytes.len() as u64),
        }
    }

    fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Content::File(file) => file.read_exact_at(out, offset),
            Content::Memory(image) => {
                let from = usize::try_from(offset).ok().and_then(|offset| image.bytes.get(offset..));
                let from = from.and_then(|rest| rest.get(..out.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
                out.copy_from_slice(from);
                Ok(())
            }
        }
    }
}

/// An open checkpoint, or the images of one in memory. Only headers are read at once.
pub struct Saved {
    directory: PathBuf,
    files: Vec<(PathBuf, Content)>,
    places: BTreeMap<String, Vec<Place>>,
}

impl Saved {
    /// Opens the checkpoint after `step` in `directory`.
    pub fn open(directory: &Path, step: u64) -> Result<Self, Error> {
        let path = directory.join(MANIFEST);
        let text = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| Error::Damaged { path: path.clone(), problem: format!("not a manifest ({error})") })?;
        if manifest.step != step {
            return Err(Error::Step { path, found: manifest.step, expected: step });
        }
        let mut saved = Saved { directory: directory.into(), files: Vec::new(), places: BTreeMap::new() };
        for listed in manifest.files.iter().filter(|file| file.kind == "state") {
            saved.add(listed)?;
        }
        Ok(saved)
    }

    fn add(&mut self, listed: &Listed) -> Result<(), Error> {
        let path = self.directory.join(&listed.name);
        let opened = File::open(&path).map(Content::File);
        let file = opened.map_err(|source| Error::Read { path: path.clone(), source })?;
        self.add_content(path, file, |_| listed.ranges.clone())
    }

    /// The part of the state that `images` hold.
    pub fn over(images: &[Arc<Image>]) -> Result<Self, Error> {
        let directory = PathBuf::from("a worker's memory");
        let mut saved = Saved { directory, files: Vec::new(), places: BTreeMap::new() };
        for image in images {
            let path = format!("snapshot after step {}, rank {}", image.name.step, image.name.rank);
            saved.add_content(path.into(), Content::Memory(image.clone()), ranges)?;
        }
        Ok(saved)
    }

    fn add_content(
        &mut self,
        path: PathBuf,
        file: Content,
        ranges: impl FnOnce(&serde_json::Value) -> Vec<Held>,
    ) -> Result<(), Error> {
        let damaged = |problem: String| Error::Damaged { path: path.clone(), problem };
        let read = |source| Error::Read { path: path.clone(), source };
        let size = file.len().map_err(read)?;
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).map_err(read)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER || length + 8 > size {
            return Err(damaged(format!("claims a header of {length} bytes")));
        }
        let mut text = vec![0; length as usize];
        file.read_exact_at(&mut text, 8).map_err(read)?;
        let header: serde_json::Value =
            serde_json::from_slice(&text).map_err(|error| damaged(format!("its header is not JSON ({error})")))?;
        for Held { tensor, begin, end } in ranges(&header) {
            let mut parts = [(0, Type::F32); 3];
            for (found, part) in parts.iter_mut().zip(Part::ALL) {
                let key = format!("{tensor}/{}/{begin}-{end}", part.name());
                let entry = &header[&key];
                let Some(kind) = Type::named(&entry["dtype"]) else {
                    return Err(damaged(format!("\"{key}\" is {} instead of F32 or BF16", entry["dtype"])));
                };
                let bytes = entry["data_offsets"][0].as_u64().zip(entry["data_offsets"][1].as_u64());
                let whole = |&(first, last): &(u64, u64)| {
                    let needed = end.checked_sub(begin).and_then(|elements| elements.checked_mul(kind.width()));
                    let there = last.checked_sub(first).filter(|_| last <= size - 8 - length);
                    needed.is_some_and(|needed| there == Some(needed as u64))
                };
                let Some((first, _)) = bytes.filter(whole) else {
                    return Err(damaged(format!("does not hold \"{key}\" whole")));
                };
                *found = (8 + length + first, kind);
            }
            let place = Place { elements: begin..end, file: self.files.len(), parts };
            self.places.entry(tensor).or_default().push(place);
        }
        self.files.push((path, file));
        Ok(())
    }

    /// The masters of `range` of the flat parameter `tensor`, with zeros where they are not here.
    pub fn read_masters_here(&self, tensor: &str, range: Range<usize>, out: &mut [f32]) -> Result<(), Error> {
        out.fill(0.0);
        self.fill(tensor, Part::Master, range, out).map(drop)
    }

    /// Elements `range` of one part of the flat parameter `tensor`; `out` has `range.len()` elements.
    pub fn read(&self, tensor: &str, part: Part, range: Range<usize>, out: &mut [f32]) -> Result<(), Error> {
        match self.fill(tensor, part, range, out)?.into_iter().next() {
            None => Ok(()),
            Some(Range { start: begin, end }) => {
                Err(Error::Missing { path: self.directory.clone(), tensor: tensor.to_owned(), begin, end })
            }
        }
    }

    /// Copies what is here of `range`, and returns what is not. Places may overlap: images of two cuts of one step hold the
    /// same elements, and each is copied once.
    fn fill(&self, tensor: &str, part: Part, range: Range<usize>, out: &mut [f32]) -> Result<Vec<Range<usize>>, Error> {
        let mut missing = if range.is_empty() { Vec::new() } else { vec![range.clone()] };
        for place in self.places.get(tensor).into_iter().flatten() {
            let mut left = Vec::new();
            for gap in missing {
                let (begin, end) = (place.elements.start.max(gap.start), place.elements.end.min(gap.end));
                if begin >= end {
                    left.push(gap);
                    continue;
                }
                let (first, kind) = place.parts[part as usize];
                let offset = first + (kind.width() * (begin - place.elements.start)) as u64;
                self.copy(place.file, offset, kind, &mut out[begin - range.start..end - range.start])?;
                left.extend([gap.start..begin, end..gap.end].into_iter().filter(|rest| !rest.is_empty()));
            }
            missing = left;
        }
        Ok(missing)
    }

    fn copy(&self, file: usize, mut offset: u64, kind: Type, out: &mut [f32]) -> Result<(), Error> {
        let (path, file) = &self.files[file];
        let mut bytes = vec![0; kind.width() * BLOCK.min(out.len())];
        for out in out.chunks_mut(BLOCK) {
            let bytes = &mut bytes[..kind.width() * out.len()];
            file.read_exact_at(bytes, offset).map_err(|source| Error::Read { path: path.clone(), source })?;
            offset += bytes.len() as u64;
            match kind {
                Type::F32 => {
                    out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
                }
                Type::Bf16 => {
                    out.iter_mut()
                        .zip(bytes.as_chunks::<2>().0)
                        .for_each(|(x, b)| *x = bf16::from_le_bytes(*b).to_f32());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tests::{shard, write_shard};
    use crate::optim::state::Form;
    use crate::snapshot::{Image, Name};
    use proptest::prelude::*;
    use std::sync::LazyLock;
    use unisono_proto::v1::Epoch;

    /// What `world` workers wrote as the checkpoint after step 7.
    fn written(dir: &Path, world: usize, form: Form) {
        let epoch = Epoch { term: 1, generation: 1 };
        let files: Vec<_> = (0..world).map(|rank| write_shard(dir, rank, world, form, &epoch)).collect();
        let listed = |file: &unisono_proto::v1::CheckpointFile| {
            let ranges: Vec<_> = file
                .ranges
                .iter()
                .map(|r| serde_json::json!({"tensor": r.tensor, "begin": r.begin, "end": r.end}))
                .collect();
            serde_json::json!({"name": file.name, "kind": "state", "ranges": ranges})
        };
        let files: Vec<_> = files.iter().map(listed).collect();
        let manifest = serde_json::json!({"step": 7, "files": files});
        std::fs::write(dir.join(MANIFEST), manifest.to_string()).unwrap();
    }

    #[test]
    fn any_number_of_workers_reads_what_any_number_wrote() {
        let forms = [Form::Whole, Form::Split, Form::Narrow].into_iter();
        let cases = forms.flat_map(|form| [(form, 1, 3), (form, 3, 1), (form, 3, 2), (form, 2, 5)]);
        for (form, writers, readers) in cases {
            let dir = tempfile::tempdir().unwrap();
            written(dir.path(), writers, form);
            let saved = Saved::open(dir.path(), 7).unwrap();
            for rank in 0..readers {
                let (expected, parameters) = shard(rank, readers, form);
                let (mut read, _) = shard(rank, readers, form);
                read.load_state(|_, _, _, out| {
                    out.fill(f32::NAN);
                    Ok::<_, Error>(())
                })
                .unwrap();
                read.load_state(|name, part, range, out| saved.read(name, part, range, out)).unwrap();
                let (read, expected) = (read.source(&parameters), expected.source(&parameters));
                for (read, expected) in read.held.iter().zip(&expected.held) {
                    assert_eq!(read.state, expected.state, "{form:?}: {writers} wrote, {rank} of {readers} read");
                }
                // What the parameters hold of the masters is read with them.
                let mut masters = vec![0.0; 200_000];
                saved.read("matrix", Part::Master, 0..200_000, &mut masters).unwrap();
                let whole = |i: usize| i as f32 + 0.25;
                let of_form = |x: f32| if form == Form::Narrow { crate::optim::state::round(x).to_f32() } else { x };
                assert!(masters.iter().enumerate().all(|(i, x)| *x == of_form(whole(i))));
            }
        }
    }

    #[test]
    fn another_step_a_torn_file_and_a_range_beyond_are_named() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path(), 2, Form::Split);
        let refused = |error: Option<Error>| error.expect("an error").to_string();
        assert!(refused(Saved::open(dir.path(), 8).err()).contains("step 7"));
        let saved = Saved::open(dir.path(), 7).unwrap();
        let beyond = saved.read("norm", Part::M, 90..110, &mut [0.0; 20]);
        assert!(refused(beyond.err()).contains("100..110"));
        let path = dir.path().join("shard-1of2-1-1-1.safetensors");
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 4]).unwrap();
        assert!(refused(Saved::open(dir.path(), 7).err()).contains("shard-1of2"));
    }

    /// Every rank's image of one step, cut for one to four workers.
    static CUTS: LazyLock<Vec<Arc<Image>>> = LazyLock::new(|| {
        let image = |rank: usize, world: usize| {
            let (optimizer, parameters) = shard(rank, world, Form::Split);
            let mut bytes = Vec::new();
            crate::checkpoint::encode(&optimizer.source(&parameters), &mut bytes);
            let name = Name { timeline: [0; 32], step: 7, rank: rank as u32, world: world as u32 };
            Arc::new(Image { name, hash: *blake3::hash(&bytes).as_bytes(), bytes })
        };
        (1..=4).flat_map(|world| (0..world).map(move |rank| image(rank, world))).collect()
    });

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Two losses before the next snapshot leave images of one step in several cuts, which overlap.
        #[test]
        fn whatever_cuts_of_one_step_are_held_each_element_is_read_once_and_none_is_made_up(
            chosen in prop::collection::vec(0usize..10, 1..7), begin in 0usize..200_000, length in 0usize..200_000,
            part in prop::sample::select(Part::ALL.to_vec()),
        ) {
            let images: Vec<_> = chosen.iter().map(|&i| CUTS[i].clone()).collect();
            let (saved, whole) = (Saved::over(&images).unwrap(), Saved::over(&CUTS[..1]).unwrap());
            let range = begin..(begin + length).min(200_000);
            let holds = |i: usize| saved.places.get("matrix").into_iter().flatten().any(|p| p.elements.contains(&i));
            let (mut expected, mut read) = (vec![0.0; range.len()], vec![f32::NAN; range.len()]);
            whole.read("matrix", part, range.clone(), &mut expected).unwrap();
            match saved.read("matrix", part, range.clone(), &mut read) {
                Ok(()) => prop_assert!(read == expected),
                Err(Error::Missing { begin, end, .. }) => {
                    prop_assert!(range.start <= begin && begin < end && end <= range.end);
                    prop_assert!(!holds(begin) && !holds(end - 1));
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
            if part == Part::Master {
                saved.read_masters_here("matrix", range.clone(), &mut read).unwrap();
                let here = |(i, x): (usize, &f32)| if holds(i + range.start) { *x } else { 0.0 };
                prop_assert!(read.iter().copied().eq(expected.iter().enumerate().map(here)));
            }
        }
    }

    #[test]
    fn four_then_three_then_two_workers_read_one_snapshot() {
        // What two of four and one of three held, which is more than all: 0 and 1 of 4, 1 and 2 of 3.
        let find = |rank, world| CUTS.iter().find(|i| (i.name.rank, i.name.world) == (rank, world)).unwrap().clone();
        let saved = Saved::over(&[find(0, 4), find(1, 4), find(1, 3), find(2, 3)]).unwrap();
        for rank in 0..2 {
            let (expected, parameters) = shard(rank, 2, Form::Split);
            let (mut read, _) = shard(rank, 2, Form::Split);
            read.load_state(|_, _, _, out| {
                out.fill(f32::NAN);
                Ok::<_, Error>(())
            })
            .unwrap();
            read.load_state(|name, part, range, out| saved.read(name, part, range, out)).unwrap();
            let (read, expected) = (read.source(&parameters), expected.source(&parameters));
            assert!(read.held.iter().zip(&expected.held).all(|(read, expected)| read.state == expected.state));
        }
    }
}
