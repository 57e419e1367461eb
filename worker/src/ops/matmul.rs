//! Matrix products into tensors that are there already.

use tch::{TchError, Tensor};

/// `out = a @ b` for matrices.
pub fn product(a: &Tensor, b: &Tensor, out: &Tensor) -> Result<(), TchError> {
    a.f_mm_out(out, b).map(drop)
}

/// `out[i] = a[i] @ b[i]`.
pub fn products(a: &Tensor, b: &Tensor, out: &Tensor) -> Result<(), TchError> {
    a.f_bmm_out(out, b).map(drop)
}
