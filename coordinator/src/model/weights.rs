//! Random weights as a safetensors file: a pure function of layout, type and seed.

use super::normal::quantile;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use unisono_configs::model::{Layout, TensorSlot};

/// Elements that one thread draws at a time.
const BLOCK: usize = 1 << 16;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    Fp32,
    Bf16,
}

impl Dtype {
    pub(super) fn bytes(self) -> usize {
        match self {
            Dtype::Fp32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}

/// Writes `path`, whole or not at all, and returns its size in bytes. `deviation` is the matrices' standard deviation.
pub(super) fn write(path: &Path, layout: &Layout, dtype: Dtype, deviation: f64, seed: u64) -> std::io::Result<u64> {
    let header = header(layout, dtype);
    let unfinished = path.with_extension("unfinished");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&unfinished)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for (stream, (_, slot)) in layout.tensors().enumerate() {
        let elements = slot.elements();
        let blocks = elements.div_ceil(BLOCK);
        // A few blocks at a time: the file may be far larger than memory.
        for group in (0..blocks).collect::<Vec<_>>().chunks(64) {
            let drawn: Vec<Vec<u8>> = group
                .par_iter()
                .map(|&block| {
                    draw(
                        slot,
                        dtype,
                        deviation,
                        seed,
                        stream as u64,
                        block * BLOCK..((block + 1) * BLOCK).min(elements),
                    )
                })
                .collect();
            drawn.iter().try_for_each(|bytes| file.write_all(bytes))?;
        }
    }
    let file = file.into_inner().map_err(|error| error.into_error())?;
    file.sync_all()?;
    let size = file.metadata()?.len();
    std::fs::rename(&unfinished, path)?;
    Ok(size)
}

/// The JSON header, padded with spaces to a multiple of eight bytes.
fn header(layout: &Layout, dtype: Dtype) -> String {
    let mut map = serde_json::Map::new();
    // transformers refuses a file that does not say so.
    map.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let name = match dtype {
        Dtype::Fp32 => "F32",
        Dtype::Bf16 => "BF16",
    };
    let mut at = 0;
    for (_, slot) in layout.tensors() {
        let end = at + slot.elements() * dtype.bytes();
        map.insert(
            slot.name.clone(),
            serde_json::json!({"dtype": name, "shape": slot.shape, "data_offsets": [at, end]}),
        );
        at = end;
    }
    let mut text = serde_json::Value::Object(map).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    text
}

/// Elements `range` of one tensor: norms 1, biases 0, matrices normal. Each element takes two words of the tensor's own
/// stream at its own place, so that it depends neither on the threads nor on its neighbours.
fn draw(
    slot: &TensorSlot,
    dtype: Dtype,
    deviation: f64,
    seed: u64,
    stream: u64,
    range: std::ops::Range<usize>,
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(range.len() * dtype.bytes());
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    generator.set_word_pos(range.start as u128 * 2);
    for _ in range {
        let value = match slot {
            slot if slot.name.ends_with(".bias") => 0.0,
            slot if slot.shape.len() == 1 => 1.0,
            // The centre of one of 2^52 equal parts of (0, 1).
            _ => (deviation * quantile(((generator.next_u64() >> 12) as f64 + 0.5) / (1u64 << 52) as f64)) as f32,
        };
        match dtype {
            Dtype::Fp32 => bytes.extend_from_slice(&value.to_le_bytes()),
            Dtype::Bf16 => bytes.extend_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
        }
    }
    bytes
}
