//! Typed slices over the memory of contiguous CPU tensors: the only place where fused host loops touch tensor memory.
#![allow(unsafe_code)]

use half::bf16;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

mod sealed {
    pub trait Sealed {}
}

/// A Rust type with the memory representation of a tensor kind.
pub trait Element: Copy + Send + Sync + sealed::Sealed + 'static {
    const KIND: Kind;
}

macro_rules! element {
    ($($type:ty => $kind:ident),*) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const KIND: Kind = Kind::$kind;
        }
    )*};
}
element!(f32 => Float, f64 => Double, bf16 => BFloat16, i64 => Int64, i32 => Int, i16 => Int16, u16 => Int16);

fn check<T: Element>(tensor: &Tensor) {
    assert_eq!(tensor.kind(), T::KIND, "element kind of a host view");
    assert_eq!(tensor.device(), Device::Cpu, "device of a host view");
    assert!(tensor.is_contiguous(), "a host view needs a contiguous tensor");
}

/// The elements of a contiguous CPU tensor of kind `T`.
///
/// # Panics
/// If kind, device or contiguity do not fit.
pub fn elements<T: Element>(tensor: &Tensor) -> &[T] {
    check::<T>(tensor);
    // SAFETY: `check` holds, so the storage has numel() elements of T from data_ptr on, alive as long as `tensor` is
    // borrowed; nobody writes to it through `elements_mut` during that time by that function's contract.
    unsafe { slice(tensor.data_ptr() as *const T, tensor.numel()) }
}

/// The elements of a contiguous CPU tensor of kind `T`, for writing.
///
/// Tensors are handles: a second handle to the same storage must not be read or written while the slice is alive.
///
/// # Panics
/// If kind, device or contiguity do not fit.
pub fn elements_mut<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    check::<T>(tensor);
    let length = tensor.numel();
    if length == 0 {
        return &mut [];
    }
    // SAFETY: as in `elements`; the exclusive borrow of the handle stands for the storage, see the contract above.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr() as *mut T, length) }
}

/// Elements of a flat tensor, wherever it is.
pub fn part(tensor: &Tensor, range: &Range<usize>) -> Tensor {
    tensor.narrow(0, range.start as i64, range.len() as i64)
}

/// Copies `values` to a tensor of as many elements of their kind, on any device. They may be changed afterwards.
pub fn write<T: Element>(values: &[T], to: &Tensor) {
    assert_eq!((to.kind(), to.numel()), (T::KIND, values.len()), "as many of a kind");
    if !values.is_empty() {
        // SAFETY: the tensor is over `values`, which are only read, and is gone before they may change: the copy is waited for.
        let from = unsafe { over(values.as_ptr(), values.len()) };
        to.shallow_clone().copy_(&from);
    }
}

/// Copies a tensor, of any device, to as many `values` of its kind.
pub fn read<T: Element>(from: &Tensor, values: &mut [T]) {
    assert_eq!((from.kind(), from.numel()), (T::KIND, values.len()), "as many of a kind");
    if !values.is_empty() {
        // SAFETY: the tensor is over `values`, which are borrowed exclusively, and is gone before they are read: the copy is
        // waited for.
        let mut to = unsafe { over(values.as_mut_ptr(), values.len()) };
        to.copy_(from);
    }
}

unsafe fn over<T: Element>(pointer: *const T, length: usize) -> Tensor {
    // SAFETY: the caller vouches for `length` elements that outlive the tensor, and for who writes to them.
    unsafe { Tensor::from_blob(pointer.cast(), &[length as i64], &[1], T::KIND, Device::Cpu) }
}

unsafe fn slice<'a, T>(pointer: *const T, length: usize) -> &'a [T] {
    if length == 0 {
        return &[];
    }
    // SAFETY: the caller vouches for `length` elements; the pointer of a non-empty storage is not null and aligned.
    unsafe { std::slice::from_raw_parts(pointer, length) }
}

/// The bytes of plain numbers, for writing.
pub fn bytes_of_mut<T: Element>(elements: &mut [T]) -> &mut [u8] {
    let length = size_of_val(elements);
    // SAFETY: `Element` types are plain numbers without padding for which every bit pattern is a value; bytes need no
    // alignment; the result borrows `elements` exclusively.
    unsafe { std::slice::from_raw_parts_mut(elements.as_mut_ptr().cast(), length) }
}

/// The numbers that lie in `bytes`, which begin where one may and end with a whole one.
pub fn numbers<T: Element>(bytes: &[u8]) -> &[T] {
    let length = whole::<T>(bytes);
    // SAFETY: as many as `whole` has counted, aligned; every bit pattern is a number, and `bytes` stays borrowed.
    unsafe { slice(bytes.as_ptr().cast(), length) }
}

/// The same, for writing.
pub fn numbers_mut<T: Element>(bytes: &mut [u8]) -> &mut [T] {
    let length = whole::<T>(bytes);
    // SAFETY: as in `numbers`; `bytes` stays borrowed exclusively.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), length) }
}

fn whole<T: Element>(bytes: &[u8]) -> usize {
    assert!((bytes.as_ptr() as usize).is_multiple_of(align_of::<T>()), "numbers begin where they may");
    assert!(bytes.len().is_multiple_of(size_of::<T>()), "whole numbers of bytes");
    bytes.len() / size_of::<T>()
}
