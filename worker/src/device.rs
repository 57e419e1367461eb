//! What a worker computes on. The CUDA part of libtorch is opened on demand, so one binary serves machines with and without
//! GPUs, and a machine without one needs none of its libraries.

use crate::library::Library;
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
    Library::open("libtorch_cuda.so").map(drop).map_err(Error::NoLibrary)
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
