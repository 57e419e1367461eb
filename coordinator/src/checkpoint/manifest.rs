//! `MANIFEST.json`: what a checkpoint consists of. The checkpoint exists when this file does.
//!
//! A state file is safetensors. For each range of a parameter tensor that it holds there are three tensors of
//! `end - begin` elements (F32, or what the manifest says of the parameter), named `<parameter>/<part>/<begin>-<end>`, the part being master, m or v: the master weights and
//! AdamW's moments, row-major, `begin` and `end` counting elements of the whole parameter. Ranges of all state files
//! tile every parameter exactly. The one samples file holds the U64 tensor `samples`: the training rows of all committed
//! steps, in the order in which they were trained on.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Name of the manifest within a checkpoint's directory.
pub const MANIFEST: &str = "MANIFEST.json";

/// Version of this format.
pub const VERSION: u32 = 2;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub version: u32,
    /// Committed steps.
    pub step: u64,
    pub cursor: Cursor,
    /// Who wrote it; says nothing about the state.
    pub writer: Writer,
    /// Model, data, split and train tables of the resolved config: BLAKE3, hexadecimal.
    pub config: String,
    /// The checkpoint before this one in the same run; absent for the first.
    pub parent: Option<Parent>,
    /// Every parameter, in the model's order.
    pub tensors: Vec<Tensor>,
    /// Sorted by name.
    pub files: Vec<File>,
    /// BLAKE3 of this manifest as compact JSON with an empty hash, hexadecimal: a flipped bit never reads as another state.
    pub hash: String,
}

/// Where the run stands: what is trained on next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Committed steps.
    pub step: u64,
    /// Epoch (from 0) and place within it of the next example.
    pub epoch: u64,
    pub position: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writer {
    pub term: u64,
    pub generation: u64,
    pub attempt: u32,
    pub workers: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    pub step: u64,
    /// BLAKE3 of the parent's manifest, hexadecimal.
    pub blake3: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    /// Hugging Face name.
    pub name: String,
    pub shape: Vec<usize>,
    /// Of its master and moments.
    #[serde(default, skip_serializing_if = "Dtype::is_f32")]
    pub dtype: Dtype,
}

/// A type of numbers, as safetensors calls it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dtype {
    #[default]
    F32,
    #[serde(rename = "BF16")]
    Bf16,
}

impl Dtype {
    fn is_f32(&self) -> bool {
        *self == Dtype::F32
    }

    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::Bf16 => "BF16",
        }
    }

    /// Bytes.
    pub fn width(self) -> u64 {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Masters and moments.
    State,
    /// Committed training rows.
    Samples,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Name within the checkpoint's directory.
    pub name: String,
    pub kind: Kind,
    pub bytes: u64,
    /// BLAKE3 of the file, hexadecimal.
    pub blake3: String,
    /// What a state file holds; empty for samples.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<Range>,
}

/// Consecutive elements of one parameter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Range {
    pub tensor: String,
    pub begin: u64,
    pub end: u64,
}

impl Range {
    /// Name of one of the range's tensors in its file; `part` is `master`, `m` or `v`.
    pub fn key(&self, part: &str) -> String {
        format!("{}/{part}/{}-{}", self.tensor, self.begin, self.end)
    }
}

/// Why a checkpoint cannot be used. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: cannot be read ({source}); name a checkpoint's directory, one with a {MANIFEST}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a checkpoint's manifest ({source}); use another checkpoint of the run")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error(
        "{path}: does not have the hash that it gives itself, so it is damaged; use another checkpoint of the run"
    )]
    Hash { path: PathBuf },
    #[error("{path}: format version {found} is unknown to this build, which reads version {VERSION}; use the build that wrote it")]
    Version { path: PathBuf, found: u32 },
}

impl Manifest {
    /// The file's content. Fills in the hash.
    pub fn to_json(&self) -> Vec<u8> {
        let whole = Manifest { hash: self.content_hash(), ..self.clone() };
        let mut content = serde_json::to_vec_pretty(&whole).expect("strings and numbers serialize");
        content.push(b'\n');
        content
    }

    /// The manifest in `content`, if it is one of this version and whole. `path` is for the error.
    pub fn parse(content: &[u8], path: &Path) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let path = || path.to_path_buf();
        let json = |source| Error::Json { path: path(), source };
        let version = |found| match found {
            VERSION => Ok(()),
            found => Err(Error::Version { path: path(), found }),
        };
        // Another version may have other fields; what has these and another hash is damaged, whatever its version says.
        let manifest: Manifest = match serde_json::from_slice(content) {
            Ok(manifest) => manifest,
            Err(error) => {
                version(serde_json::from_slice::<Versioned>(content).map_or(VERSION, |v| v.version))?;
                return Err(json(error));
            }
        };
        if manifest.hash != manifest.content_hash() || !content.ends_with(b"\n") {
            return Err(Error::Hash { path: path() });
        }
        version(manifest.version)?;
        Ok(manifest)
    }

    fn content_hash(&self) -> String {
        let bare = Manifest { hash: String::new(), ..self.clone() };
        blake3::hash(&serde_json::to_vec(&bare).expect("strings and numbers serialize")).to_hex().to_string()
    }

    /// Reads `directory/MANIFEST.json`. Says nothing about the files that it lists.
    pub fn read(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(MANIFEST);
        let bytes = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        Self::parse(&bytes, &path)
    }
}

/// Directory of the checkpoint after `step` within a run's directory.
pub fn directory(run_dir: &Path, step: u64) -> PathBuf {
    run_dir.join("checkpoints").join(format!("step-{step:08}"))
}

/// The run's checkpoints that have a manifest, oldest first.
pub fn list(run_dir: &Path) -> Vec<(u64, PathBuf)> {
    let mut found = directories(run_dir);
    found.retain(|(_, directory)| directory.join(MANIFEST).exists());
    found
}

/// The directories of the run's checkpoints, committed or not, in the order of steps.
pub fn directories(run_dir: &Path) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(run_dir.join("checkpoints")).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            Some((step, entry.path()))
        })
        .collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name() -> impl Strategy<Value = String> {
        "[a-z.\\-_0-9é\"\\\\ ]{1,12}"
    }

    fn file() -> impl Strategy<Value = File> {
        let range = (name(), any::<u64>(), any::<u64>()).prop_map(|(tensor, begin, end)| Range { tensor, begin, end });
        let kind = prop_oneof![Just(Kind::State), Just(Kind::Samples)];
        (name(), kind, any::<u64>(), name(), prop::collection::vec(range, 0..3))
            .prop_map(|(name, kind, bytes, blake3, ranges)| File { name, kind, bytes, blake3, ranges })
    }

    prop_compose! {
        fn manifest()(
            numbers in any::<[u64; 6]>(), attempt: u32, workers: u32, config in name(),
            parent in prop::option::of((any::<u64>(), name())),
            tensors in prop::collection::vec((name(), prop::collection::vec(any::<usize>(), 0..3), any::<bool>()), 0..3),
            files in prop::collection::vec(file(), 0..4),
        ) -> Manifest {
            let [step, at, epoch, position, term, generation] = numbers;
            Manifest {
                version: VERSION,
                step,
                cursor: Cursor { step: at, epoch, position },
                writer: Writer { term, generation, attempt, workers },
                config,
                parent: parent.map(|(step, blake3)| Parent { step, blake3 }),
                tensors: tensors
                    .into_iter()
                    .map(|(name, shape, narrow)| {
                        Tensor { name, shape, dtype: if narrow { Dtype::Bf16 } else { Dtype::F32 } }
                    })
                    .collect(),
                files,
                hash: String::new(),
            }
        }
    }

    proptest! {
        /// What is written reads back, and neither a part of it nor a changed bit ever reads as something else.
        #[test]
        fn a_manifest_reads_back_or_not_at_all(manifest in manifest(), at: prop::sample::Index, bit in 0u32..8) {
            let whole = manifest.to_json();
            let path = Path::new("MANIFEST.json");
            let read = Manifest::parse(&whole, path).unwrap();
            prop_assert_eq!(&Manifest { hash: String::new(), ..read }, &manifest);
            let end = at.index(whole.len() - 1);
            prop_assert!(Manifest::parse(&whole[..end], path).is_err(), "cut at {}", end);
            let mut flipped = whole.clone();
            let place = at.index(whole.len());
            flipped[place] ^= 1 << bit;
            if let Ok(read) = Manifest::parse(&flipped, path) {
                prop_assert_eq!(&Manifest { hash: String::new(), ..read }, &manifest, "bit {} of byte {}", bit, place);
            }
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Manifest::parse(&bytes, Path::new("MANIFEST.json")).is_err());
        }
    }
}
