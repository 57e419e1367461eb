//! The state in a checkpoint's files, whoever wrote how much of it: verified, then read tensor by tensor.
//!
//! Nothing is held in memory but the files' headers, so that a model of any size is digested and exported anywhere.

use super::commit::is_plain;
use super::manifest::{Dtype, Kind, Manifest, Tensor, MANIFEST};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes read at once.
const BLOCK: usize = 1 << 20;
/// A header above this is damage, not a header (safetensors' own limit).
const MAX_HEADER: u64 = 100 << 20;

/// Why a checkpoint's files cannot be used. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Manifest(#[from] super::manifest::Error),
    #[error("{path}: cannot be read ({source}); use another checkpoint of the run")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {problem}; the file is damaged, use another checkpoint of the run")]
    Damaged { path: PathBuf, problem: String },
    #[error("{path}: {tensor} {problem}; the checkpoint is damaged, use another one of the run")]
    Tiling { path: PathBuf, tensor: String, problem: String },
    #[error("cannot be written: {0}")]
    Sink(io::Error),
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

    pub fn name(self) -> &'static str {
        match self {
            Part::Master => "master",
            Part::M => "m",
            Part::V => "v",
        }
    }
}

/// Where a range of a parameter lies: the file, and the first byte of each part in it.
#[derive(Debug)]
struct Place {
    begin: u64,
    end: u64,
    file: usize,
    dtype: Dtype,
    offsets: [u64; 3],
}

/// An open checkpoint. Every file had the size and the hash of the manifest when it was opened.
#[derive(Debug)]
pub struct State {
    pub manifest: Manifest,
    files: Vec<(PathBuf, File)>,
    /// Of each parameter, ascending and without gaps.
    places: BTreeMap<String, Vec<Place>>,
    /// The file with the committed rows, their first byte and their bytes.
    samples: Option<(usize, u64, u64)>,
}

impl State {
    /// Opens the checkpoint in `directory`.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        Self::verify(directory, Manifest::read(directory)?)
    }

    /// Opens what is to become the checkpoint in `directory`.
    pub fn verify(directory: &Path, manifest: Manifest) -> Result<Self, Error> {
        let mut state = State { files: Vec::new(), places: BTreeMap::new(), samples: None, manifest };
        let dtypes: BTreeMap<&str, Dtype> =
            state.manifest.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype)).collect();
        for entry in &state.manifest.files {
            if !is_plain(&entry.name) {
                let problem = format!("names a file {:?} outside of the checkpoint", entry.name);
                return Err(Error::Damaged { path: directory.join(MANIFEST), problem });
            }
            let path = directory.join(&entry.name);
            let file = File::open(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
            check_hash(&path, &file, entry.bytes, &entry.blake3)?;
            let header = Header::read(&path, &file)?;
            let index = state.files.len();
            match entry.kind {
                Kind::Samples => {
                    let (offset, bytes) = header.find(&path, "samples", "U64", None)?;
                    state.samples = Some((index, offset, bytes));
                }
                Kind::State => {
                    for range in &entry.ranges {
                        let count = range.end.checked_sub(range.begin).ok_or_else(|| Error::Tiling {
                            path: path.clone(),
                            tensor: range.tensor.clone(),
                            problem: format!("has a range that ends before it begins, {}..{}", range.begin, range.end),
                        })?;
                        // What is of no tensor of the manifest is refused by its name below.
                        let dtype = dtypes.get(range.tensor.as_str()).copied().unwrap_or_default();
                        let mut offsets = [0; 3];
                        for (offset, part) in offsets.iter_mut().zip(Part::ALL) {
                            *offset = header.find(&path, &range.key(part.name()), dtype.name(), Some(count))?.0;
                        }
                        let place = Place { begin: range.begin, end: range.end, file: index, dtype, offsets };
                        state.places.entry(range.tensor.clone()).or_default().push(place);
                    }
                }
            }
            state.files.push((path, file));
        }
        state.check_tiling(directory)?;
        Ok(state)
    }

    /// Every parameter is covered once, and nothing else is there.
    fn check_tiling(&mut self, directory: &Path) -> Result<(), Error> {
        let fail = |tensor: &str, problem: String| {
            Err(Error::Tiling { path: directory.into(), tensor: tensor.into(), problem })
        };
        for tensor in &self.manifest.tensors {
            let places = self.places.entry(tensor.name.clone()).or_default();
            places.sort_by_key(|p| (p.begin, p.end));
            let mut next = 0;
            for place in places.iter() {
                if place.begin != next {
                    let what = if place.begin > next { "is missing" } else { "has twice" };
                    return fail(
                        &tensor.name,
                        format!("{what} elements {}..{}", next.min(place.begin), next.max(place.begin)),
                    );
                }
                next = place.end;
            }
            if next != elements(tensor) {
                return fail(&tensor.name, format!("has {next} elements instead of {}", elements(tensor)));
            }
        }
        if let Some(name) = self.places.keys().find(|name| !self.manifest.tensors.iter().any(|t| t.name == **name)) {
            return fail(name, "is not a tensor of the manifest".into());
        }
        Ok(())
    }

    /// Gives the whole of one part of a parameter to `sink`, row-major, little-endian and of the type
    /// that the manifest says, in blocks of whole elements.
    pub fn read(&self, tensor: &str, part: Part, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), Error> {
        for place in self.places.get(tensor).into_iter().flatten() {
            let offset = place.offsets[part as usize];
            self.copy(place.file, offset, (place.end - place.begin) * place.dtype.width(), sink)?;
        }
        Ok(())
    }

    /// Gives the committed rows to `sink`, U64 little-endian, in the order in which they were trained on.
    pub fn read_samples(&self, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), Error> {
        match self.samples {
            Some((file, offset, bytes)) => self.copy(file, offset, bytes, sink),
            None => Ok(()),
        }
    }

    fn copy(
        &self,
        file: usize,
        mut offset: u64,
        mut left: u64,
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), Error> {
        let (path, file) = &self.files[file];
        let mut block = vec![0; BLOCK];
        while left > 0 {
            let take = left.min(BLOCK as u64) as usize;
            file.read_exact_at(&mut block[..take], offset)
                .map_err(|source| Error::Read { path: path.clone(), source })?;
            sink(&block[..take]).map_err(Error::Sink)?;
            offset += take as u64;
            left -= take as u64;
        }
        Ok(())
    }
}

pub fn elements(tensor: &Tensor) -> u64 {
    tensor.shape.iter().fold(1u64, |elements, n| elements.saturating_mul(*n as u64))
}

/// The file has the size and the hash that the manifest gives.
fn check_hash(path: &Path, file: &File, bytes: u64, blake3: &str) -> Result<(), Error> {
    let read = |source| Error::Read { path: path.into(), source };
    let found = file.metadata().map_err(read)?.len();
    let damaged = |problem| Err(Error::Damaged { path: path.into(), problem });
    if found != bytes {
        return damaged(format!("has {found} bytes, the manifest says {bytes}"));
    }
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; BLOCK];
    let mut offset = 0;
    while offset < bytes {
        let take = (bytes - offset).min(BLOCK as u64) as usize;
        file.read_exact_at(&mut block[..take], offset).map_err(read)?;
        hasher.update(&block[..take]);
        offset += take as u64;
    }
    let hash = hasher.finalize().to_hex();
    match hash.as_str() == blake3 {
        true => Ok(()),
        false => damaged("does not have the hash that the manifest gives".into()),
    }
}

/// The header of a safetensors file of `bytes` bytes: how many of its tensors lie within it. What others wrote, as bytes:
/// a door for fuzzing.
pub fn tensors_within(header: &[u8], bytes: u64) -> Result<usize, Error> {
    let path = Path::new("state.safetensors");
    let header = Header::parse(path, header, bytes)?;
    let within =
        |name: &&String| ["F32", "BF16", "U64"].iter().any(|dtype| header.find(path, name, dtype, None).is_ok());
    Ok(header.tensors.keys().filter(within).count())
}

/// What a safetensors file says it holds.
struct Header {
    tensors: serde_json::Map<String, serde_json::Value>,
    /// First byte after the header, and the file's size.
    data: u64,
    bytes: u64,
}

impl Header {
    fn read(path: &Path, file: &File) -> Result<Self, Error> {
        let damaged = |problem: String| Error::Damaged { path: path.into(), problem };
        let read = |source| Error::Read { path: path.into(), source };
        let bytes = file.metadata().map_err(read)?.len();
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).map_err(read)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER || length + 8 > bytes {
            return Err(damaged(format!("claims a header of {length} bytes")));
        }
        let mut text = vec![0; length as usize];
        file.read_exact_at(&mut text, 8).map_err(read)?;
        Self::parse(path, &text, bytes)
    }

    /// `text` is the header of a file of `bytes` bytes.
    fn parse(path: &Path, text: &[u8], bytes: u64) -> Result<Self, Error> {
        let tensors = serde_json::from_slice(text).map_err(|error| Error::Damaged {
            path: path.into(),
            problem: format!("its header is not JSON ({error})"),
        })?;
        Ok(Header { tensors, data: 8 + text.len() as u64, bytes })
    }

    /// First byte and bytes of a tensor of type `dtype` with `count` elements, where a count is given.
    fn find(&self, path: &Path, name: &str, dtype: &str, count: Option<u64>) -> Result<(u64, u64), Error> {
        let damaged = |problem: String| Error::Damaged { path: path.into(), problem };
        let entry = self.tensors.get(name).ok_or_else(|| damaged(format!("has no tensor {name}")))?;
        if entry["dtype"].as_str() != Some(dtype) {
            return Err(damaged(format!("{name} is {} instead of {dtype}", entry["dtype"])));
        }
        let offset = |index: usize| entry["data_offsets"][index].as_u64();
        let (Some(begin), Some(end)) = (offset(0), offset(1)) else {
            return Err(damaged(format!("{name} has no data_offsets")));
        };
        let width = match dtype {
            "U64" => 8,
            "BF16" => 2,
            _ => 4,
        };
        let fits = begin <= end && end.checked_add(self.data).is_some_and(|end| end <= self.bytes);
        let size = end.wrapping_sub(begin);
        if !fits || size % width != 0 || count.is_some_and(|count| count.checked_mul(width) != Some(size)) {
            return Err(damaged(format!("{name} has data_offsets {begin}..{end}, which cannot be")));
        }
        Ok((self.data + begin, size))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::manifest::{self, Cursor, Range, Writer, MANIFEST, VERSION};
    use super::*;

    /// A synthetic checkpoint: three tensors, dealt over `shards` files at odd places.
    pub(crate) fn write(directory: &Path, shards: usize) {
        write_as(directory, shards, Dtype::F32);
    }

    /// The same with masters and moments of a type.
    pub(crate) fn write_as(directory: &Path, shards: usize, dtype: Dtype) {
        std::fs::create_dir_all(directory).unwrap();
        let tensors = [
            ("model.embed_tokens.weight", vec![7, 5]),
            ("model.norm.weight", vec![5]),
            ("model.layers.0.mlp.up_proj.weight", vec![11, 5]),
        ]
        .map(|(name, shape)| Tensor { name: name.into(), shape, dtype });
        let mut files = Vec::new();
        for shard in 0..shards {
            let (mut ranges, mut list) = (Vec::new(), Vec::new());
            for (index, tensor) in tensors.iter().enumerate() {
                let n = elements(tensor);
                let cut = |s: usize| (n * s as u64).div_ceil(shards as u64);
                let range = Range { tensor: tensor.name.clone(), begin: cut(shard), end: cut(shard + 1) };
                for (p, part) in Part::ALL.iter().enumerate() {
                    let value = |i: u64| ((index * 3 + p) as f32 + 0.25) * (i as f32 - 3.5);
                    let values = (range.begin..range.end).map(value);
                    let data: Vec<u8> = match dtype {
                        Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
                        Dtype::Bf16 => values.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
                    };
                    list.push((range.key(part.name()), dtype.name(), data));
                }
                ranges.push(range);
            }
            let name = format!("state-{shard}.safetensors");
            files.push(file(directory, &name, Kind::State, &list, ranges));
        }
        let samples: Vec<u8> = [5u64, 3, 9, 1 << 40].iter().flat_map(|s| s.to_le_bytes()).collect();
        files.push(file(
            directory,
            "samples.safetensors",
            Kind::Samples,
            &[("samples".into(), "U64", samples)],
            vec![],
        ));
        let manifest = Manifest {
            version: VERSION,
            step: 2,
            cursor: Cursor { step: 2, epoch: 1, position: 4 },
            writer: Writer { term: 1, generation: 1, attempt: 1, workers: shards as u32 },
            config: String::new(),
            parent: None,
            tensors: tensors.to_vec(),
            files,
            hash: String::new(),
        };
        std::fs::write(directory.join(MANIFEST), manifest.to_json()).unwrap();
    }

    fn file(
        directory: &Path,
        name: &str,
        kind: Kind,
        tensors: &[(String, &str, Vec<u8>)],
        ranges: Vec<Range>,
    ) -> manifest::File {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (key, dtype, bytes) in tensors {
            let (begin, end) = (data.len(), data.len() + bytes.len());
            let count = bytes.len()
                / if *dtype == "U64" {
                    8
                } else if *dtype == "BF16" {
                    2
                } else {
                    4
                };
            header.insert(
                key.clone(),
                serde_json::json!({"dtype": dtype, "shape": [count], "data_offsets": [begin, end]}),
            );
            data.extend(bytes);
        }
        let mut text = serde_json::to_vec(&header).unwrap();
        text.resize(text.len().next_multiple_of(8), b' ');
        let whole = [&(text.len() as u64).to_le_bytes()[..], &text, &data].concat();
        std::fs::write(directory.join(name), &whole).unwrap();
        let blake3 = blake3::hash(&whole).to_hex().to_string();
        manifest::File { name: name.into(), kind, bytes: whole.len() as u64, blake3, ranges }
    }

    fn edit(directory: &Path, edit: impl FnOnce(&mut Manifest)) {
        let mut manifest = Manifest::read(directory).unwrap();
        edit(&mut manifest);
        std::fs::write(directory.join(MANIFEST), manifest.to_json()).unwrap();
    }

    #[test]
    fn a_flipped_bit_and_a_cut_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 2);
        State::open(dir.path()).unwrap();
        let path = dir.path().join("state-1.safetensors");
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bad).unwrap();
        assert!(State::open(dir.path()).unwrap_err().to_string().contains("hash"));
        std::fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert!(State::open(dir.path()).unwrap_err().to_string().contains("bytes"));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(State::open(dir.path()), Err(Error::Read { .. })));
    }

    #[test]
    fn gaps_and_overlaps_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 3);
        edit(dir.path(), |m| m.files[1].ranges.clear());
        assert!(State::open(dir.path()).unwrap_err().to_string().contains("is missing elements"));
        write(dir.path(), 3);
        edit(dir.path(), |m| {
            let again = m.files[0].ranges[0].clone();
            m.files[0].ranges.push(again);
        });
        assert!(State::open(dir.path()).unwrap_err().to_string().contains("has twice"));
        write(dir.path(), 1);
        edit(dir.path(), |m| m.tensors[0].shape[0] += 1);
        assert!(State::open(dir.path()).unwrap_err().to_string().contains("instead of 40"));
        write(dir.path(), 1);
        edit(dir.path(), |m| {
            m.tensors.pop();
        });
        assert!(State::open(dir.path()).unwrap_err().to_string().contains("not a tensor of the manifest"));
    }
}
