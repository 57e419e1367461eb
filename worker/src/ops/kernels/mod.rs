//! Kernels of our own for GPUs: one program of CUDA C++, compiled by NVRTC for the GPU at hand when a worker starts, and
//! kept in the user's cache. Tests
//! run the very same text, through the very same launches, on a processor: see [`emulator`].
//!
//! The launch of a kernel stands beside the operation that it computes.

mod cache;
mod cuda;
pub mod emulator;
pub mod nvrtc;

use super::form::AtenOnly;
use tch::{Device, Kind, Tensor};

pub use cuda::{is_loaded, load, stream, Error};

/// The program, in the order in which its parts stand.
const SOURCES: [&str; 8] = [
    include_str!("prelude.cu"),
    include_str!("norm.cu"),
    include_str!("columns.cu"),
    include_str!("swiglu.cu"),
    include_str!("classifier.cu"),
    include_str!("heads.cu"),
    include_str!("rows.cu"),
    include_str!("optimizer.cu"),
];

/// Every kernel, by what a name is made of: `{}` stands for each of the words.
const NAMES: [(&str, &[&str]); 18] = [
    ("norm_forward_{}", &["float_1", "float_4", "bf16_1", "bf16_4"]),
    ("norm_backward_{}", &["float_1", "float_4", "bf16_1", "bf16_4"]),
    ("sum_slab_{}", &["float", "bf16"]),
    ("sum_slabs", &[""]),
    ("swiglu_forward_{}", &["float_1", "float_4", "bf16_1", "bf16_8"]),
    ("swiglu_backward_{}", &["float_1", "float_4", "bf16_1", "bf16_8"]),
    ("classify_{}", &["float", "bf16"]),
    ("split_heads_{}", &["float_1", "float_2", "float_4", "bf16_1", "bf16_2", "bf16_4"]),
    ("join_heads_float_float_{}", &["1", "2", "4"]),
    ("join_heads_bf16_{}", &["float_1", "float_2", "float_4", "bf16_1", "bf16_2", "bf16_4"]),
    ("look_up_{}", &["float", "bf16"]),
    ("sum_by_id", &[""]),
    ("add_leaf_{}", &["float_1", "float_2", "bf16_1", "bf16_2"]),
    ("add_leaf_rows", &[""]),
    ("round_sums_{}", &["float", "bf16"]),
    ("add_sums", &[""]),
    ("squares_of_chunks_{}", &["i64", "i64_narrow", "float", "bf16"]),
    ("adamw_{}", &["whole_i64", "whole_float", "split_i64", "split_float", "narrow_i64", "narrow_bf16"]),
];

/// Bytes that a block may share without asking.
const SHARED: usize = 48 << 10;

/// The whole program.
pub fn source() -> String {
    SOURCES.concat()
}

/// The names of all kernels.
pub fn names() -> impl Iterator<Item = String> {
    NAMES.iter().flat_map(|(name, words)| words.iter().map(|word| name.replace("{}", word)))
}

/// Where kernels run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    Emulated,
    /// The GPU of this number.
    Cuda(usize),
}

/// What a kernel is given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument {
    Pointer(u64),
    Int(i32),
    Long(i64),
    Single(f32),
    Double(f64),
}

/// How many threads run a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    pub x: usize,
    pub y: usize,
    /// Of each block: whole warps.
    pub threads: usize,
    /// Bytes that each block shares besides what it declares.
    pub shared: usize,
}

/// Blocks of so many threads.
pub fn blocks(x: usize, threads: usize) -> Grid {
    Grid { x, y: 1, threads, shared: 0 }
}

/// Enough blocks for a loop over `work` packs, but no more than keep any GPU busy.
pub fn striding(work: usize) -> Grid {
    blocks(work.div_ceil(256).clamp(1, 4096), 256)
}

impl Grid {
    pub fn times(self, y: usize) -> Self {
        Grid { y, ..self }
    }

    pub fn sharing(self, floats: usize) -> Self {
        Grid { shared: 4 * floats, ..self }
    }
}

/// Whether a block can share so many floats beside what kernels declare.
pub fn can_share(floats: usize) -> bool {
    4 * floats + 1024 <= SHARED
}

impl Kernels {
    /// The kernels for operands like `tensor`, if there are any.
    pub fn on(tensor: &Tensor) -> Option<Kernels> {
        let kind = matches!(tensor.kind(), Kind::Float | Kind::BFloat16 | Kind::Int64);
        match tensor.device() {
            _ if !kind || AtenOnly::is_under_way() => None,
            Device::Cpu => emulator::is_under_way().then_some(Kernels::Emulated),
            Device::Cuda(index) => cuda::is_loaded(index).then_some(Kernels::Cuda(index)),
            _ => None,
        }
    }

    /// Runs the kernel `name`, behind all that this thread has asked of the device before.
    ///
    /// # Panics
    /// If the device refuses: nothing that was asked of it since can be trusted then.
    pub fn launch(self, name: &str, grid: Grid, arguments: &[Argument]) {
        if grid.x == 0 || grid.y == 0 {
            return;
        }
        let outcome = match self {
            Kernels::Emulated => emulator::launch(name, grid, arguments),
            Kernels::Cuda(index) => cuda::launch(index, name, grid, arguments),
        };
        if let Err(problem) = outcome {
            panic!("the kernel {name} cannot run: {problem}");
        }
    }
}

/// The name of a kind in the names of kernels.
pub fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "float",
        Kind::BFloat16 => "bf16",
        other => unreachable!("kernels are for fp32 and bf16, not {other:?}"),
    }
}

/// How many neighbours are read at once: `most`, or one where rows of `width` or an address do not allow it. Addresses are
/// multiples of the width of rows from the begin of an allocation, so it follows from shapes alone.
pub fn pack(most: usize, width: usize, tensors: &[&Tensor]) -> usize {
    let aligned = |t: &&Tensor| (t.data_ptr() as usize).is_multiple_of(most * t.kind().elt_size_in_bytes());
    match width.is_multiple_of(most) && tensors.iter().all(aligned) {
        true => most,
        false => 1,
    }
}

impl From<&Tensor> for Argument {
    fn from(tensor: &Tensor) -> Self {
        Argument::Pointer(tensor.data_ptr() as u64)
    }
}

impl From<Option<&Tensor>> for Argument {
    fn from(tensor: Option<&Tensor>) -> Self {
        Argument::Pointer(tensor.map_or(0, |t| t.data_ptr() as u64))
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Argument::Single(value)
    }
}

impl From<f64> for Argument {
    fn from(value: f64) -> Self {
        Argument::Double(value)
    }
}

impl From<i64> for Argument {
    fn from(value: i64) -> Self {
        Argument::Long(value)
    }
}

/// A kernel counts rows and columns in 32 bits; elements in 64.
impl From<usize> for Argument {
    fn from(value: usize) -> Self {
        Argument::Int(i32::try_from(value).expect("rows and columns fit 31 bits"))
    }
}

impl Argument {
    /// As the emulator names its type.
    fn code(self) -> u8 {
        match self {
            Argument::Pointer(_) => b'p',
            Argument::Int(_) => b'i',
            Argument::Long(_) => b'l',
            Argument::Single(_) => b'f',
            Argument::Double(_) => b'd',
        }
    }

    /// Its bytes, low end first, as a launch reads them.
    fn bits(self) -> u64 {
        match self {
            Argument::Pointer(address) => address,
            Argument::Int(value) => u64::from(value as u32),
            Argument::Long(value) => value as u64,
            Argument::Single(value) => u64::from(value.to_bits()),
            Argument::Double(value) => value.to_bits(),
        }
    }
}

#[cfg(test)]
#[path = "kernels_tests.rs"]
mod tests;
