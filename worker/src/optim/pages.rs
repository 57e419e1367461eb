//! Numbers in whole pages of their own, which a GPU's driver may lock without touching anybody else's.

use crate::ops::view::{self, Element};
use memmap2::MmapMut;
use std::alloc::{handle_alloc_error, Layout};
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

pub struct Pages<T> {
    memory: MmapMut,
    length: usize,
    numbers: PhantomData<T>,
}

impl<T: Element> Pages<T> {
    /// All bits zero. Its pages exist already: memory that a run will need is taken before its first step, not found missing
    /// in it.
    pub fn zero(length: usize) -> Self {
        let bytes = length * size_of::<T>();
        let mapped = MmapMut::map_anon(bytes.max(1));
        // As where a vector finds no memory.
        let no_memory = |_| handle_alloc_error(Layout::array::<T>(length).unwrap_or(Layout::new::<T>()));
        let mut memory = mapped.unwrap_or_else(no_memory);
        memory.fill(0);
        Pages { memory, length, numbers: PhantomData }
    }
}

impl<T: Element> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        view::numbers(&self.memory[..self.length * size_of::<T>()])
    }
}

impl<T: Element> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        view::numbers_mut(&mut self.memory[..self.length * size_of::<T>()])
    }
}

impl<T: Element> Clone for Pages<T> {
    fn clone(&self) -> Self {
        let mut copy = Pages::zero(self.length);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: Element + PartialEq> PartialEq for Pages<T> {
    fn eq(&self, other: &Self) -> bool {
        self[..] == other[..]
    }
}

impl<T> fmt::Debug for Pages<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} numbers", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn numbers_begin_at_a_page_and_are_as_many_as_asked_for() {
        for length in [0, 1, 4095, 10_000] {
            let mut wide = Pages::<f32>::zero(length);
            assert!(wide.len() == length && wide.iter().all(|x| x.to_bits() == 0));
            assert!(wide.is_empty() || (wide.as_ptr() as usize).is_multiple_of(4096));
            wide.fill(1.5);
            assert!(wide.clone() == wide && wide.clone()[..] == vec![1.5; length][..]);
        }
        let mut narrow = Pages::<bf16>::zero(3);
        narrow[1] = bf16::ONE;
        assert!(narrow[..] == [bf16::ZERO, bf16::ONE, bf16::ZERO] && narrow != Pages::zero(3));
    }
}
