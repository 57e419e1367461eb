//! Peers on the same machine read what they need out of each other's memory: one copy, where a socket packs and copies
//! twice. Linux lets a process of the same user do so (`process_vm_readv(2)`); where it does not, or in another container,
//! everything goes over the socket as between machines.
//!
//! Whoever lends memory holds a lease on it: a word in its own memory that names the loan and is cleared before the memory
//! is used for anything else. A reader looks at the word after it has read: as long as the loan stands there, everything
//! it read was what had been lent.

#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{fence, AtomicU64, Ordering};

/// The word that names the loan of this process, 0 where there is none.
#[derive(Debug)]
pub struct Lease {
    word: Box<AtomicU64>,
    next: AtomicU64,
}

/// Memory is lent until this is dropped.
pub struct Loan<'a>(&'a Lease, pub u64);

impl Lease {
    /// Loans are numbered from `first` on, a number that nobody guesses.
    pub fn new(first: u64) -> Self {
        Lease { word: Box::default(), next: AtomicU64::new(first) }
    }

    pub fn lend(&self) -> Loan<'_> {
        // 0 stands for no loan.
        let number = self.next.fetch_add(1, Ordering::Relaxed).max(1);
        self.word.store(number, Ordering::SeqCst);
        Loan(self, number)
    }

    /// Where the word is, for neighbours.
    pub fn address(&self) -> u64 {
        std::ptr::from_ref::<AtomicU64>(&self.word) as u64
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        self.0.word.store(0, Ordering::SeqCst);
        // Nothing that is written afterwards is seen before it.
        fence(Ordering::SeqCst);
    }
}

/// A process on this machine whose memory can be read.
#[derive(Debug, Clone, Copy)]
pub struct Neighbour {
    pub pid: u32,
    /// Address of its lease's word.
    pub lease: u64,
}

impl Neighbour {
    /// Reads from `address` on.
    pub fn read(&self, address: u64, to: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < to.len() {
            let rest = &mut to[done..];
            let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
            let remote = libc::iovec { iov_base: (address + done as u64) as *mut _, iov_len: rest.len() };
            // SAFETY: the kernel writes at most `iov_len` bytes into `rest`, which is borrowed exclusively, and into nothing
            // else of this process; it checks the other process's addresses, and fails where nothing is mapped.
            let read = unsafe { libc::process_vm_readv(self.pid as libc::pid_t, &local, 1, &remote, 1, 0) };
            match read {
                -1 => return Err(io::Error::last_os_error()),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => done += read as usize,
            }
        }
        Ok(())
    }

    /// Reads integer sums from `address` on.
    pub fn read_sums(&self, address: u64, to: &mut [i64]) -> io::Result<()> {
        let length = size_of_val(to);
        // SAFETY: every bit pattern is an i64, bytes need no alignment, and the result borrows `to` exclusively.
        self.read(address, unsafe { std::slice::from_raw_parts_mut(to.as_mut_ptr().cast(), length) })
    }

    /// Whether the loan still stands; then everything read before was lent.
    pub fn vouches_for(&self, loan: u64) -> io::Result<bool> {
        let mut word = [0; 8];
        self.read(self.lease, &mut word)?;
        Ok(u64::from_ne_bytes(word) == loan)
    }
}

/// Lets the processes that were started with this one read its memory where only parents may by default (the Yama security
/// module). Elsewhere it does nothing, nor
/// where the parent is gone: everybody's parent is the first process then.
pub fn admit_siblings() {
    let parent = rustix::process::getppid().filter(|parent| !parent.is_init());
    let Some(parent) = parent else { return };
    // SAFETY: `prctl` with this option only notes a number; on kernels that do not know it, it fails and changes nothing.
    unsafe {
        libc::prctl(libc::PR_SET_PTRACER, parent.as_raw_nonzero().get());
    }
}

/// What tells this machine, since it was started, from others.
pub fn machine() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).unwrap_or(0).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lent_can_be_read_as_long_as_the_loan_stands() {
        let lease = Lease::new(7);
        let neighbour = Neighbour { pid: std::process::id(), lease: lease.address() };
        let sums = vec![1i64, -2, i64::MIN];
        let mut read = vec![0; 3];
        let loan = lease.lend();
        neighbour.read_sums(sums.as_ptr() as u64, &mut read).unwrap();
        assert_eq!(read, sums);
        assert!(neighbour.vouches_for(loan.1).unwrap());
        let number = loan.1;
        drop(loan);
        assert!(!neighbour.vouches_for(number).unwrap());
        assert_ne!(lease.lend().1, number, "every loan has a number of its own");
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let neighbour = Neighbour { pid: std::process::id(), lease: 0 };
        assert!(neighbour.read(8, &mut [0; 8]).is_err());
        assert!(neighbour.vouches_for(1).is_err());
        let gone = Neighbour { pid: u32::MAX >> 1, lease: 0 };
        assert!(gone.read(8, &mut [0; 8]).is_err());
    }

    #[test]
    fn a_machine_knows_itself() {
        assert_eq!(machine(), machine());
        assert_ne!(machine(), [0; 16]);
    }
}
