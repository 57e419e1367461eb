//! Tensors with a size and no memory, for dry runs: models may be planned that no memory would hold.
#![allow(unsafe_code)]

use std::sync::OnceLock;
use tch::{Device, Kind, Tensor};

/// Address space that no page will ever stand behind: 16 TiB, or what the system allows.
fn reservation() -> (usize, usize) {
    static RESERVATION: OnceLock<(usize, usize)> = OnceLock::new();
    *RESERVATION.get_or_init(|| {
        for bits in (30..=44).rev() {
            let bytes = 1usize << bits;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: a fresh anonymous mapping at an address of the kernel's choice; it is never unmapped.
            let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
            if base != libc::MAP_FAILED {
                return (base as usize, bytes);
            }
        }
        (0, 0)
    })
}

/// A contiguous tensor `[elements]` on the host that must not be read or written: doing so ends the process. None where it
/// would be larger than any address space.
pub fn flat(kind: Kind, elements: usize) -> Option<Tensor> {
    let (base, bytes) = reservation();
    if elements.checked_mul(kind.elt_size_in_bytes())? > bytes {
        return None;
    }
    // SAFETY: the range lies within the reservation, which lives as long as the process; all phantoms share it, and nobody
    // reads or writes any of them: it is mapped without access.
    Some(unsafe { Tensor::from_blob(base as *const u8, &[elements as i64], &[1], kind, Device::Cpu) })
}
