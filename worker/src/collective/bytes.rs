//! The raw bytes of a contiguous CPU tensor, as they go over the wire.

use crate::ops::view;
use half::bf16;
use tch::{Kind, Tensor};

/// All bytes of a flat fp32 or bf16 tensor and the bytes per element. Workers of one run share their byte order: the
/// fingerprint's instruction set sees to it.
///
/// # Panics
/// If the tensor is neither, not contiguous or not on the CPU.
pub fn bytes_mut(tensor: &mut Tensor) -> (&mut [u8], usize) {
    match tensor.kind() {
        Kind::Float => (view::bytes_of_mut(view::elements_mut::<f32>(tensor)), 4),
        Kind::BFloat16 => (view::bytes_of_mut(view::elements_mut::<bf16>(tensor)), 2),
        kind => unreachable!("parameters are fp32 or bf16, not {kind:?}"),
    }
}
