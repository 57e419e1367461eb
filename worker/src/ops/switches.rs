//! libtorch's switches that decide the bits on a GPU, which tch has no functions for: they are exported C++ functions.
#![allow(unsafe_code)]

use crate::library::Library;
use std::ffi::c_void;

/// Why the switches cannot be set.
#[derive(Debug, thiserror::Error)]
#[error("this libtorch has no switch {0}: Unisono needs libtorch 2.11.0")]
pub struct Missing(&'static str);

fn symbol(name: &'static str) -> Result<*mut c_void, Missing> {
    Library::process().symbol(name).ok_or(Missing(name))
}

fn context() -> Result<*mut c_void, Missing> {
    // SAFETY: `at::Context& at::globalContext()`, of libtorch 2.11: a reference is returned as a pointer.
    let get = unsafe {
        std::mem::transmute::<*mut c_void, extern "C" fn() -> *mut c_void>(symbol("_ZN2at13globalContextEv")?)
    };
    Ok(get())
}

/// `void at::Context::name(bool)`
fn set(name: &'static str, value: bool) -> Result<(), Missing> {
    // SAFETY: a method of one bool, of libtorch 2.11: it takes the object's address first.
    let call = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_void, bool)>(symbol(name)?) };
    call(context()?, value);
    Ok(())
}

/// `void at::Context::name(bool, bool)`
fn set_two(name: &'static str, first: bool, second: bool) -> Result<(), Missing> {
    // SAFETY: as above, of two bools.
    let call = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_void, bool, bool)>(symbol(name)?) };
    call(context()?, first, second);
    Ok(())
}

/// `bool at::Context::name() const`, or of another type of one byte.
fn get(name: &'static str) -> Result<u8, Missing> {
    // SAFETY: as above, without arguments, giving one byte.
    let call = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_void) -> u8>(symbol(name)?) };
    Ok(call(context()?))
}

/// Only algorithms whose result does not vary from run to run; no TF32; sums of bf16 products in fp32.
pub fn make_deterministic() -> Result<(), Missing> {
    // Operations without such an algorithm fail instead of warning.
    set_two("_ZN2at7Context26setDeterministicAlgorithmsEbb", true, false)?;
    // Else every fresh tensor would be filled first, so that reading it shows.
    set("_ZN2at7Context39setDeterministicFillUninitializedMemoryEb", false)?;
    set("_ZN2at7Context21setDeterministicCuDNNEb", true)?;
    set("_ZN2at7Context18setAllowTF32CuBLASEb", false)?;
    set("_ZN2at7Context17setAllowTF32CuDNNEb", false)?;
    // Split sums stay allowed: without them libtorch refuses every bf16 product outside of cuBLASLt. With a workspace of one
    // size on one stream cuBLAS repeats their bits.
    set_two("_ZN2at7Context27setAllowBF16ReductionCuBLASEbb", false, true)
}

/// The switches as libtorch has them, by name.
pub fn report() -> Result<Vec<(&'static str, u8)>, Missing> {
    let names = [
        ("deterministic_algorithms", "_ZNK2at7Context23deterministicAlgorithmsEv"),
        ("fill_uninitialized_memory", "_ZNK2at7Context36deterministicFillUninitializedMemoryEv"),
        ("deterministic_cudnn", "_ZNK2at7Context18deterministicCuDNNEv"),
        ("tf32", "_ZNK2at7Context15allowTF32CuBLASEv"),
        // 1: no reduced precision; sums may be split.
        ("bf16_reduction", "_ZNK2at7Context24allowBF16ReductionCuBLASEv"),
    ];
    names.into_iter().map(|(name, getter)| Ok((name, get(getter)?))).collect()
}

/// As [`report`] gives them after [`make_deterministic`].
pub const DETERMINISTIC: [(&str, u8); 5] = [
    ("deterministic_algorithms", 1),
    ("fill_uninitialized_memory", 0),
    ("deterministic_cudnn", 1),
    ("tf32", 0),
    ("bf16_reduction", 1),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_switches_are_taken() {
        let before = report().unwrap();
        assert_eq!(before[0], ("deterministic_algorithms", 0));
        make_deterministic().unwrap();
        assert_eq!(report().unwrap(), DETERMINISTIC);
        // Other tests of this process go on as they began.
        set_two("_ZN2at7Context26setDeterministicAlgorithmsEbb", false, false).unwrap();
        assert!(set("_ZN2at7Context14setSomethingElEb", true).is_err_and(|e| e.to_string().contains("libtorch 2.11")));
    }
}
