//! The stand-in for NCCL and the driver, and what tests tell it.
#![allow(unsafe_code)]

use super::{library, Gpu, Libraries};
use crate::library::{compiled, functions, Library};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tch::Device;

functions! {
    Controls {
        fault = "stand_in_fault": fn(i32) -> ();
        hold = "stand_in_hold": fn(i32) -> ();
        alive = "stand_in_alive": fn() -> i32;
        polls = "stand_in_polls": fn() -> i32;
    }
}

/// What the calls of a thread run into from now on.
#[derive(Clone, Copy)]
pub enum Fault {
    None = 0,
    /// A kernel never ends.
    Hangs = 1,
    /// A kernel never ends, and the communicator says why.
    BreaksLater = 2,
    /// The call itself fails.
    Refuses = 3,
    /// The others are never met.
    NeverReady = 4,
}

/// Streams and the like are counted over all ranks, and one who holds up holds up all, so tests follow one another.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy)]
pub struct StandIn {
    controls: Controls,
    library: Library,
}

impl StandIn {
    pub fn open() -> Self {
        let path = compiled(include_str!("stand_in.cpp"), "stand-in").expect("a C++ compiler");
        let library = Library::open_apart(path).expect("the stand-in opens");
        StandIn { controls: Controls::of(library).expect("whole"), library }
    }

    /// As if `device` were a GPU.
    pub fn libraries(&self, device: Device) -> Libraries {
        let nccl = library::Nccl::of(self.library).expect("a version that will do");
        Libraries { nccl, gpu: self.gpu(), device }
    }

    /// The driver alone.
    pub fn gpu(&self) -> Gpu {
        Gpu::of(self.library, 0, |_| Ok(std::ptr::null_mut())).expect("a context")
    }

    pub fn fault(&self, fault: Fault) {
        // SAFETY: sets a number of this thread's.
        unsafe { (self.controls.fault)(fault as i32) }
    }

    /// Holds up what computes.
    pub fn hold(&self, holds: bool) {
        // SAFETY: sets a number.
        unsafe { (self.controls.hold)(i32::from(holds)) }
    }

    /// Streams, events, allocations and communicators that nobody has ended.
    pub fn alive(&self) -> i32 {
        // SAFETY: reads a number.
        unsafe { (self.controls.alive)() }
    }

    /// How often NCCL had to be asked again.
    pub fn polls(&self) -> i32 {
        // SAFETY: reads a number.
        unsafe { (self.controls.polls)() }
    }
}
