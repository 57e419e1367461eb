//! Which form of an operation runs: a fused loop over fp32 or bf16 on the host, or ATen calls, on any device and for any
//! kind. The ATen form is the oracle of the loop, and what a device without a kernel of its own falls back to.

use std::cell::Cell;
use tch::{Device, Kind, Tensor};

/// One way to compute an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Loops over `f32`.
    Single,
    /// Loops over `bf16`.
    Brain,
    Aten,
}

thread_local! {
    static ATEN_ONLY: Cell<bool> = const { Cell::new(false) };
}

impl Form {
    /// The form for operands like `tensor`.
    pub fn of(tensor: &Tensor) -> Form {
        match tensor.kind() {
            _ if AtenOnly::is_under_way() || tensor.device() != Device::Cpu => Form::Aten,
            Kind::Float => Form::Single,
            Kind::BFloat16 => Form::Brain,
            _ => Form::Aten,
        }
    }
}

/// While it lives, this thread computes by ATen calls alone, as on a device without loops: for tests.
pub struct AtenOnly(());

impl AtenOnly {
    pub fn begin() -> Self {
        ATEN_ONLY.set(true);
        AtenOnly(())
    }

    pub fn is_under_way() -> bool {
        ATEN_ONLY.get()
    }
}

impl Drop for AtenOnly {
    fn drop(&mut self) {
        ATEN_ONLY.set(false);
    }
}

/// The kind to compute in where operands are of the compute kind: at least fp32.
pub fn wide(kind: Kind) -> Kind {
    match kind {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    }
}

/// Indices for ATen, on the device of `beside`: `[numbers]` i64.
pub fn indices(numbers: impl IntoIterator<Item = i64>, beside: &Tensor) -> Tensor {
    let numbers = Tensor::from_slice(&numbers.into_iter().collect::<Vec<_>>());
    numbers.to_device_(beside.device(), Kind::Int64, true, false)
}

/// The same for kernels: `[numbers]` i32. Nothing waits for the device.
pub fn small_integers(numbers: impl IntoIterator<Item = i32>, beside: &Tensor) -> Tensor {
    let numbers = Tensor::from_slice(&numbers.into_iter().collect::<Vec<_>>());
    numbers.to_device_(beside.device(), Kind::Int, true, false)
}
