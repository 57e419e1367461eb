//! What a worker computes on. The CUDA part of libtorch is opened on demand, so one binary serves machines with and without
//! GPUs, and a machine without one needs none of its libraries.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use tch::{Cuda, Device};

/// Why a device cannot be used. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cluster.device = \"{0}\" is no device that this worker knows; set \"cpu\" or \"cuda\"")]
    Unknown(String),
    #[error("cluster.device = \"cuda\", but the CUDA part of libtorch cannot be opened ({0}); install torch 2.11.0 with CUDA and set LIBTORCH to it, or set cluster.device = \"cpu\"")]
    NoLibrary(String),
    #[error("cluster.device = \"cuda\", but CUDA finds no usable GPU; see that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES does not hide it, or set cluster.device = \"cpu\"")]
    NoGpu,
}

/// The device `name` for the worker that is number `local` (from 0) on its machine.
pub fn open(name: &str, local: usize) -> Result<Device, Error> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "cuda" => {
            load_cuda()?;
            match Cuda::device_count() {
                count if count > 0 && Cuda::is_available() => {
                    if local as i64 >= count {
                        tracing::warn!(local, count, "workers share a GPU");
                    }
                    Ok(Device::Cuda(local % count as usize))
                }
                _ => Err(Error::NoGpu),
            }
        }
        other => Err(Error::Unknown(other.to_owned())),
    }
}

/// Registers libtorch's CUDA backend, which happens as its library is loaded.
fn load_cuda() -> Result<(), Error> {
    let name = CString::new("libtorch_cuda.so").expect("no zero within");
    // SAFETY: the name ends in zero; loading runs the library's initialisers, which libtorch means to be run at any time
    // before CUDA's first use. The handle is kept for the life of the process.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: after a failure dlerror gives a string of its own that lives until the next call on this thread, or null.
    let problem = unsafe {
        let words = libc::dlerror();
        if words.is_null() {
            String::new()
        } else {
            CStr::from_ptr(words).to_string_lossy().into_owned()
        }
    };
    Err(Error::NoLibrary(problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_one_sentence_with_a_remedy() {
        assert_eq!(open("cpu", 3).unwrap(), Device::Cpu);
        assert!(open("tpu", 0).unwrap_err().to_string().contains("cluster.device = \"tpu\""));
        if let Err(error) = open("cuda", 0) {
            assert!(error.to_string().contains("set cluster.device = \"cpu\""), "{error}");
        }
    }
}
