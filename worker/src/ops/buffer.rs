//! Scratch and saved tensors that are used again from one micro-batch to the next: the system hands out and takes back
//! megabytes page by page, which costs more than most loops over them.

use super::operation::operation;
use super::phantom;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// A flat tensor. Its kind and size are kept beside it, because asking a tensor costs more than all else here.
struct Flat {
    tensor: Tensor,
    kind: Kind,
    elements: usize,
}

/// Free memory, to be taken and given back. Clones share it.
#[derive(Clone)]
pub struct Pool {
    device: Device,
    /// No memory stands behind what is taken.
    phantom: bool,
    free: Arc<Mutex<Vec<Flat>>>,
    /// Bytes of all that was ever made: memory is never given back to the system.
    made: Arc<AtomicUsize>,
}

/// A contiguous tensor of undefined content whose memory goes back to its pool when dropped.
pub struct Buffer {
    tensor: Tensor,
    flat: Option<Flat>,
    pool: Pool,
}

impl Pool {
    pub fn new(device: Device) -> Self {
        Pool { device, phantom: false, free: Arc::default(), made: Arc::default() }
    }

    /// Counts what would be taken.
    pub fn phantom() -> Self {
        Pool { phantom: true, ..Pool::new(Device::Cpu) }
    }

    /// Undefined content.
    pub fn take(&self, kind: Kind, shape: &[usize]) -> Buffer {
        let elements = shape.iter().product::<usize>();
        let flat = self.smallest(kind, elements).unwrap_or_else(|| {
            let tensor = match self.phantom {
                true => phantom::flat(kind, elements).expect("a model that can be loaded fits an address space"),
                false => Tensor::empty([elements as i64], (kind, self.device)),
            };
            self.made.fetch_add(elements * kind.elt_size_in_bytes(), Ordering::Relaxed);
            Flat { tensor, kind, elements }
        });
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis] as i64;
        }
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        let tensor = flat.tensor.as_strided(shape, strides, 0);
        Buffer { tensor, flat: Some(flat), pool: self.clone() }
    }

    pub fn take_zero(&self, kind: Kind, shape: &[usize]) -> Buffer {
        let mut buffer = self.take(kind, shape);
        operation("zeros", || drop(buffer.zero_()));
        buffer
    }

    /// The smallest free tensor of at least `elements`, unless all are far too large.
    fn smallest(&self, kind: Kind, elements: usize) -> Option<Flat> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |f: &Flat| f.kind == kind && f.elements >= elements && f.elements <= 4 * elements + 1024;
        let fitting = free.iter().enumerate().filter(|(_, f)| fits(f));
        let (index, _) = fitting.min_by_key(|(_, f)| f.elements)?;
        Some(free.swap_remove(index))
    }

    /// Bytes of all that is free or taken.
    pub fn bytes(&self) -> usize {
        self.made.load(Ordering::Relaxed)
    }

    /// Bytes that lie free at the moment.
    pub fn free_bytes(&self) -> usize {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.iter().map(|f| f.elements * f.kind.elt_size_in_bytes()).sum()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(flat) = self.flat.take() {
            self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(flat);
        }
    }
}

impl Deref for Buffer {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Tensor {
        &mut self.tensor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_and_fits_other_shapes() {
        let pool = Pool::new(Device::Cpu);
        let first = pool.take(Kind::Float, &[8, 16]);
        let address = first.data_ptr();
        drop(first);
        assert_eq!(pool.free_bytes(), 512);
        assert_ne!(pool.take(Kind::BFloat16, &[4]).data_ptr(), address);
        let second = pool.take_zero(Kind::Float, &[2, 5, 7]);
        assert_eq!((second.data_ptr(), pool.free_bytes()), (address, 8));
        assert_eq!(second.size(), [2, 5, 7]);
        assert!(second.is_contiguous());
        assert_ne!(pool.take(Kind::Float, &[4]).data_ptr(), address);
    }
}
