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
    /// Bytes of all that is free or taken.
    made: Arc<AtomicUsize>,
    /// Beyond these bytes what lies free and does not fit is given back to the system before more is made.
    limit: Arc<AtomicUsize>,
}

/// A contiguous tensor of undefined content whose memory goes back to its pool when dropped.
pub struct Buffer {
    tensor: Tensor,
    flat: Option<Flat>,
    pool: Pool,
}

impl Pool {
    pub fn new(device: Device) -> Self {
        Pool {
            device,
            phantom: false,
            free: Arc::default(),
            made: Arc::default(),
            limit: Arc::new(AtomicUsize::new(usize::MAX)),
        }
    }

    /// Counts what would be taken.
    pub fn phantom() -> Self {
        Pool { phantom: true, ..Pool::new(Device::Cpu) }
    }

    /// Undefined content.
    pub fn take(&self, kind: Kind, shape: &[usize]) -> Buffer {
        let elements = shape.iter().product::<usize>();
        let flat = self.smallest(kind, elements).unwrap_or_else(|| {
            self.make_room(elements * kind.elt_size_in_bytes());
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

    /// A place for a tensor that an operation makes itself: see [`Buffer::adopt`]. Only a phantom pool has it made before.
    pub fn expect(&self, kind: Kind, shape: &[usize]) -> Buffer {
        match self.phantom {
            true => self.take(kind, shape),
            false => Buffer { tensor: Tensor::new(), flat: None, pool: self.clone() },
        }
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

    /// Lets the pool grow beyond `bytes` only for what is taken at one time. Buffers of other shapes than the planned ones may
    /// not fit each other's places, and the pool would grow with every new shape.
    pub fn limit(&self, bytes: usize) {
        self.limit.store(bytes, Ordering::Relaxed);
    }

    /// Gives the largest free tensors back until `bytes` more stay within the limit.
    fn make_room(&self, bytes: usize) {
        let most = self.limit.load(Ordering::Relaxed).saturating_sub(bytes);
        if self.bytes() <= most {
            return;
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.sort_by_key(|f| f.elements * f.kind.elt_size_in_bytes());
        while self.bytes() > most {
            let Some(largest) = free.pop() else { return };
            self.made.fetch_sub(largest.elements * largest.kind.elt_size_in_bytes(), Ordering::Relaxed);
        }
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

impl Buffer {
    /// Becomes a tensor that came from elsewhere, and goes back there.
    pub fn adopt(&mut self, tensor: Tensor) {
        self.tensor = tensor;
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
    fn beyond_its_limit_a_pool_gives_back_what_does_not_fit() {
        let pool = Pool::new(Device::Cpu);
        let (small, large) = (pool.take(Kind::Float, &[100]), pool.take(Kind::Float, &[10_000]));
        pool.limit(pool.bytes());
        drop((small, large));
        let kept = pool.take(Kind::BFloat16, &[18_000]);
        assert_eq!(pool.bytes(), 400 + 36_000, "the large one made room");
        // What is taken at one time is never refused.
        let more = pool.take(Kind::BFloat16, &[18_000]);
        assert_eq!(pool.bytes(), 72_000);
        drop((kept, more));
    }

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
