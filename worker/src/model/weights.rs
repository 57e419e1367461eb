//! The weights of a Hugging Face model directory: `model.safetensors`, or the shards that `model.safetensors.index.json`
//! names. Elements come out as fp32, whatever the file holds, and are read where they are asked for: what was mapped would
//! count as this process's memory.
#![allow(unsafe_code)]

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use unisono_configs::model::Layout;

const ONE_FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Why weights cannot be read. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{dir}: holds neither {ONE_FILE} nor {INDEX}; model.path must be a Hugging Face model directory with safetensors weights")]
    NoWeights { dir: PathBuf },
    #[error(
        "{path}: cannot be read ({source}); check that the file exists and may be read, or download the model again"
    )]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a valid index of safetensors files ({source}); download the model again")]
    Index { path: PathBuf, source: serde_json::Error },
    #[error("{path}: weight_map names \"{file}\", which is not a plain file name; download the model again")]
    Shard { path: PathBuf, file: String },
    #[error("{path}: not a whole safetensors file ({source}); download the model again")]
    Header { path: PathBuf, source: SafeTensorError },
    #[error("{path}: tensor \"{name}\" is in two files of this model; download the model again")]
    Twice { path: PathBuf, name: String },
    #[error("{dir}: tensor \"{name}\" is missing from the weights, and config.json needs it; config and weights must come from the same model")]
    Missing { dir: PathBuf, name: String },
    #[error("{path}: tensor \"{name}\" has shape {found:?}, and config.json makes it {expected:?}; config and weights must come from the same model")]
    Shape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{path}: tensor \"{name}\" is {found}; weights must be F32, BF16 or F16")]
    Kind { path: PathBuf, name: String, found: String },
    #[error(
        "{path}: tensor \"{name}\" has a value that is not finite (element {at} is {value}); download the model again"
    )]
    NotFinite { path: PathBuf, name: String, at: usize, value: f32 },
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
struct Entry {
    file: usize,
    kind: Dtype,
    shape: Vec<usize>,
    /// Byte range within the file.
    bytes: Range<usize>,
}

/// Elements read at once.
const BLOCK: usize = 1 << 16;

/// All tensors of a model directory.
pub struct Weights {
    dir: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Entry>,
}

impl Weights {
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let (one, index) = (dir.join(ONE_FILE), dir.join(INDEX));
        // A directory with both (a converted repository) is read as transformers reads it: the one file first.
        let names: BTreeSet<String> = if one.exists() {
            [ONE_FILE.to_owned()].into()
        } else if index.exists() {
            let text = std::fs::read_to_string(&index).map_err(|source| Error::Read { path: index.clone(), source })?;
            let parsed: Index =
                serde_json::from_str(&text).map_err(|source| Error::Index { path: index.clone(), source })?;
            parsed.weight_map.into_values().collect()
        } else {
            return Err(Error::NoWeights { dir: dir.into() });
        };
        let mut weights = Weights { dir: dir.into(), files: Vec::new(), tensors: BTreeMap::new() };
        for name in names {
            let plain = Path::new(&name).components().count() == 1 && Path::new(&name).file_name().is_some();
            if !plain {
                return Err(Error::Shard { path: index, file: name });
            }
            weights.add(dir.join(name))?;
        }
        Ok(weights)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), Error> {
        let file = File::open(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        // SAFETY: the mapping is read-only and lives for this function; that nobody truncates the file meanwhile is what every
        // reader of safetensors has to assume, and a torn file is refused by the header check below.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::Read { path: path.clone(), source })?;
        let (header, metadata): (usize, Metadata) =
            SafeTensors::read_metadata(&map).map_err(|source| Error::Header { path: path.clone(), source })?;
        let data = header + 8;
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
            let entry = Entry { file: self.files.len(), kind: info.dtype, shape: info.shape.clone(), bytes };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::Twice { path, name });
            }
        }
        self.files.push((path, file));
        Ok(())
    }

    fn entry(&self, name: &str) -> Result<&Entry, Error> {
        self.tensors.get(name).ok_or_else(|| Error::Missing { dir: self.dir.clone(), name: name.into() })
    }

    /// Shape of a tensor, if the files hold it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|e| e.shape.as_slice())
    }

    /// Every tensor of `layout` is there, in its shape and in a kind that can be read. Tensors beyond it are ignored (an
    /// untied copy of a tied head, old rotary tables).
    pub fn check(&self, layout: &Layout) -> Result<(), Error> {
        for (_, slot) in layout.tensors() {
            let entry = self.entry(&slot.name)?;
            let path = || self.files[entry.file].0.clone();
            if entry.shape != slot.shape {
                let (found, expected) = (entry.shape.clone(), slot.shape.clone());
                return Err(Error::Shape { path: path(), name: slot.name.clone(), found, expected });
            }
            if !matches!(entry.kind, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                return Err(Error::Kind { path: path(), name: slot.name.clone(), found: format!("{:?}", entry.kind) });
            }
        }
        Ok(())
    }

    /// Elements `range` of the flat tensor `name` as fp32; `out` has `range.len()` elements.
    ///
    /// # Panics
    /// If `range` reaches past the tensor (shapes are checked by [`Weights::check`]) or `out` has another length.
    pub fn read_f32(&self, name: &str, range: Range<usize>, out: &mut [f32]) -> Result<(), Error> {
        assert_eq!(range.len(), out.len(), "elements to read of {name}");
        let entry = self.entry(name)?;
        let (path, file) = &self.files[entry.file];
        let elements: usize = entry.shape.iter().product();
        assert!(range.end <= elements, "{name} has {elements} elements, not {range:?}");
        let width = match entry.kind {
            Dtype::F32 => 4,
            Dtype::BF16 | Dtype::F16 => 2,
            other => {
                let found = format!("{other:?}");
                return Err(Error::Kind { path: path.clone(), name: name.into(), found });
            }
        };
        let mut bytes = vec![0; width * BLOCK.min(out.len())];
        let mut offset = (entry.bytes.start + width * range.start) as u64;
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            let bytes = &mut bytes[..width * out.len()];
            file.read_exact_at(bytes, offset).map_err(|source| Error::Read { path: path.clone(), source })?;
            offset += bytes.len() as u64;
            let halves = bytes.as_chunks::<2>().0.iter();
            match entry.kind {
                Dtype::BF16 => out.iter_mut().zip(halves).for_each(|(o, b)| *o = bf16::from_le_bytes(*b).to_f32()),
                Dtype::F16 => out.iter_mut().zip(halves).for_each(|(o, b)| *o = f16::from_le_bytes(*b).to_f32()),
                _ => out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(o, b)| *o = f32::from_le_bytes(*b)),
            }
            // Training would find it, and blame the rows. Without an early end the compiler vectorizes the search.
            if out.iter().fold(false, |bad, value| bad | !value.is_finite()) {
                let at = out.iter().position(|value| !value.is_finite()).expect("there is one");
                let (value, at) = (out[at], range.start + block * BLOCK + at);
                return Err(Error::NotFinite { path: path.clone(), name: name.into(), at, value });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{serialize_to_file, TensorView};

    fn write(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
        let views: Vec<_> =
            tensors.iter().map(|(n, k, s, b)| (*n, TensorView::new(*k, s.clone(), b).unwrap())).collect();
        serialize_to_file(views, None, path).unwrap();
    }

    fn sentence(result: Result<Weights, Error>) -> String {
        result.err().expect("an error").to_string()
    }

    #[test]
    fn every_kind_reads_as_fp32_and_ranges_are_elements() {
        let dir = tempfile::tempdir().unwrap();
        let values = [1.0f32, -2.5, 0.15625, 384.0];
        let f32s = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let bf16s = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let f16s = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        write(
            &dir.path().join(ONE_FILE),
            &[
                ("a", Dtype::F32, vec![4], f32s),
                ("b", Dtype::BF16, vec![2, 2], bf16s),
                ("c", Dtype::F16, vec![4, 1], f16s),
            ],
        );
        let weights = Weights::open(dir.path()).unwrap();
        for name in ["a", "b", "c"] {
            let mut out = [0.0; 2];
            weights.read_f32(name, 1..3, &mut out).unwrap();
            assert_eq!(out, values[1..3], "{name}");
        }
        assert_eq!(weights.shape("b"), Some(&[2usize, 2][..]));
    }

    #[test]
    fn a_value_that_is_not_finite_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut values = vec![bf16::ONE; BLOCK + 9];
        values[BLOCK + 3] = bf16::NAN;
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        write(&dir.path().join(ONE_FILE), &[("a", Dtype::BF16, vec![BLOCK + 9], bytes)]);
        let weights = Weights::open(dir.path()).unwrap();
        let mut out = vec![0.0; BLOCK + 7];
        let sentence = weights.read_f32("a", 2..BLOCK + 9, &mut out).unwrap_err().to_string();
        let named = format!("model.safetensors: tensor \"a\" has a value that is not finite (element {}", BLOCK + 3);
        assert!(sentence.contains(&named) && sentence.contains("download"), "{sentence}");
        weights.read_f32("a", 0..BLOCK + 3, &mut out[..BLOCK + 3]).unwrap();
    }

    #[test]
    fn shards_are_found_by_the_index() {
        let dir = tempfile::tempdir().unwrap();
        for (file, name) in [("one.safetensors", "a"), ("two.safetensors", "b")] {
            write(&dir.path().join(file), &[(name, Dtype::F32, vec![1], 7.0f32.to_le_bytes().to_vec())]);
        }
        let index =
            r#"{"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
        std::fs::write(dir.path().join(INDEX), index).unwrap();
        let weights = Weights::open(dir.path()).unwrap();
        let mut out = [0.0];
        weights.read_f32("b", 0..1, &mut out).unwrap();
        assert_eq!(out, [7.0]);
        let outside = r#"{"weight_map": {"a": "../one.safetensors"}}"#;
        std::fs::write(dir.path().join(INDEX), outside).unwrap();
        assert!(sentence(Weights::open(dir.path())).contains("../one.safetensors"));
    }

    #[test]
    fn torn_and_missing_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(sentence(Weights::open(dir.path())).contains(ONE_FILE));
        let path = dir.path().join(ONE_FILE);
        write(&path, &[("a", Dtype::F32, vec![4], vec![0; 16])]);
        let whole = std::fs::read(&path).unwrap();
        for length in [0, 4, 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(sentence(Weights::open(dir.path())).contains("model.safetensors: "), "{length}");
        }
    }
}
