//! The raw bytes of a contiguous CPU tensor, as they go over the wire.
#![allow(unsafe_code)]

use crate::ops::view::{self, Element};
use half::bf16;
use tch::{Kind, Tensor};

/// All bytes of a flat fp32 or bf16 tensor and the bytes per element. Workers of one run share their byte order: the
/// fingerprint's instruction set sees to it.
///
/// # Panics
/// If the tensor is neither, not contiguous or not on the CPU.
pub fn bytes_mut(tensor: &mut Tensor) -> (&mut [u8], usize) {
    match tensor.kind() {
        Kind::Float => (cast(view::elements_mut::<f32>(tensor)), 4),
        Kind::BFloat16 => (cast(view::elements_mut::<bf16>(tensor)), 2),
        kind => unreachable!("parameters are fp32 or bf16, not {kind:?}"),
    }
}

fn cast<T: Element>(elements: &mut [T]) -> &mut [u8] {
    let length = size_of_val(elements);
    // SAFETY: `Element` types are plain numbers without padding for which every bit pattern is a value; bytes need no
    // alignment; the result borrows `elements` exclusively.
    unsafe { std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast(), length) }
}
