//! Operations of ATen that tch has no function for, called by name through libtorch's C interface.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_void, CString};
use tch::Tensor;

/// A value of an operation's schema.
#[derive(Clone, Copy)]
pub enum Value<'a> {
    Tensor(&'a Tensor),
    /// `Tensor?`
    MaybeTensor(Option<&'a Tensor>),
    /// `SymInt` or `int`
    Int(i64),
    MaybeInt(Option<i64>),
    Float(f64),
    MaybeFloat(Option<f64>),
    Bool(bool),
}

/// Why an operation gave nothing.
#[derive(Debug, thiserror::Error)]
#[error("libtorch refuses {name} (what it says is on standard error)")]
pub struct Refused {
    name: String,
}

extern "C" {
    fn torch_call_dispatcher(name: *const c_char, overload: *const c_char, stack: *mut u64, version: u64) -> i32;
    fn aoti_torch_new_tensor_handle(original: *mut c_void, copy: *mut *mut c_void) -> i32;
    /// C++'s `operator new(size_t)`: what the callee frees with `delete`.
    fn _Znwm(bytes: usize) -> *mut c_void;
}

/// The version of the interface for which this was written: libtorch 2.11.
const VERSION: u64 = (2 << 56) | (11 << 48);

/// Calls `aten::name.overload` with all values of its schema in order; `results` is how many tensors it gives. Both must be
/// those of the schema: libtorch does not count them.
pub(super) fn call(name: &str, overload: &str, values: &[Value<'_>], results: usize) -> Result<Vec<Tensor>, Refused> {
    let refused = || Refused { name: name.to_owned() };
    let mut stack = Vec::with_capacity(values.len().max(results));
    for value in values {
        stack.push(encode(*value).ok_or_else(refused)?);
    }
    stack.resize(values.len().max(results), 0);
    let text = |text: &str| CString::new(text).map_err(|_| refused());
    let (qualified, overload) = (text(&format!("aten::{name}"))?, text(overload)?);
    // SAFETY: the stack has a place for every value and every result; the callee takes the values over.
    let code = unsafe { torch_call_dispatcher(qualified.as_ptr(), overload.as_ptr(), stack.as_mut_ptr(), VERSION) };
    if code != 0 {
        return Err(refused());
    }
    // SAFETY: after success the first places hold handles of the results, which are ours; a handle is what tch calls a
    // C_tensor: a pointer to an at::Tensor on the heap.
    Ok(stack.iter().take(results).map(|&handle| unsafe { Tensor::from_ptr(handle as *mut _) }).collect())
}

fn handle(tensor: &Tensor) -> Option<u64> {
    let mut copy = std::ptr::null_mut();
    // SAFETY: the tensor is alive; its pointer is an AtenTensorHandle. The copy is a handle of its own.
    let code = unsafe { aoti_torch_new_tensor_handle(tensor.as_ptr() as *mut c_void, &mut copy) };
    (code == 0).then_some(copy as u64)
}

/// An optional value is a pointer to it on C++'s heap, or null.
fn boxed(value: Option<u64>) -> u64 {
    let Some(value) = value else { return 0 };
    // SAFETY: eight bytes for eight bytes; the callee deletes them.
    unsafe {
        let place = _Znwm(size_of::<u64>()).cast::<u64>();
        place.write(value);
        place as u64
    }
}

fn encode(value: Value<'_>) -> Option<u64> {
    Some(match value {
        Value::Tensor(tensor) => handle(tensor)?,
        Value::MaybeTensor(None) => 0,
        Value::MaybeTensor(Some(tensor)) => boxed(Some(handle(tensor)?)),
        Value::Int(value) => value as u64,
        Value::MaybeInt(value) => boxed(value.map(|v| v as u64)),
        Value::Float(value) => value.to_bits(),
        Value::MaybeFloat(value) => boxed(value.map(f64::to_bits)),
        Value::Bool(value) => u64::from(value),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn an_operation_is_called_by_name_and_gives_what_tch_gives() {
        let (a, b) = (Tensor::from_slice(&[1f32, 2.0]), Tensor::from_slice(&[10f32, 20.0]));
        assert!(call("no_such_operation", "", &[], 1).is_err_and(|e| e.to_string().contains("no_such_operation")));
        let joined = call("atan2", "", &[Value::Tensor(&a), Value::Tensor(&b)], 1).unwrap();
        assert_eq!(joined[0], a.atan2(&b));
        let options = [Value::Tensor(&a), Value::MaybeTensor(Some(&b)), Value::MaybeTensor(None)];
        assert_eq!(call("clamp", "Tensor", &options, 1).unwrap()[0], a.clamp_min_tensor(&b));
    }

    /// Handles are neither leaked nor freed twice: memory stays where it is over many calls.
    #[test]
    fn nothing_is_leaked() {
        let a = Tensor::zeros([1 << 18], (Kind::Float, Device::Cpu));
        let most = Tensor::from(1.0f32);
        let options = [Value::Tensor(&a), Value::MaybeTensor(Some(&most)), Value::MaybeTensor(None)];
        let run = |n| (0..n).for_each(|_| drop(call("clamp", "Tensor", &options, 1).unwrap()));
        run(50);
        let before = crate::memory::resident();
        run(2000);
        // Other tests of this process take some meanwhile.
        assert!(crate::memory::resident() < before + (1 << 30), "2,000 results of 1 MiB were given back");
    }
}
