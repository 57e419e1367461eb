//! What exchanges, and state that lies on the host, need of CUDA's driver: streams of their own, events between them and the
//! one that computes, memory through which what lies on the host goes, and locked memory of the host.
#![allow(unsafe_code)]

use super::library::Problem;
use crate::library::{functions, Library};
use crate::ops::kernels;
use cudarc::driver::sys::{CUcontext, CUevent, CUstream};
use std::ffi::{c_char, c_int, c_uint, CStr};
use std::ops::Range;

type Code = c_uint;
const SUCCESS: Code = 0;
const NOT_READY: Code = 600;
/// Runs beside the default stream, on which libtorch computes, instead of in turn with it.
const NON_BLOCKING: c_uint = 1;
const WITHOUT_TIMING: c_uint = 2;
/// What the driver locks memory of the host in.
const PAGE: usize = 4096;

functions! {
    /// What of the driver is used.
    Functions {
        device = "cuDeviceGet": fn(*mut c_int, c_int) -> Code;
        retain = "cuDevicePrimaryCtxRetain": fn(*mut CUcontext, c_int) -> Code;
        set_current = "cuCtxSetCurrent": fn(CUcontext) -> Code;
        stream_create = "cuStreamCreate": fn(*mut CUstream, c_uint) -> Code;
        stream_destroy = "cuStreamDestroy_v2": fn(CUstream) -> Code;
        stream_wait = "cuStreamWaitEvent": fn(CUstream, CUevent, c_uint) -> Code;
        event_create = "cuEventCreate": fn(*mut CUevent, c_uint) -> Code;
        event_destroy = "cuEventDestroy_v2": fn(CUevent) -> Code;
        event_record = "cuEventRecord": fn(CUevent, CUstream) -> Code;
        event_query = "cuEventQuery": fn(CUevent) -> Code;
        event_wait = "cuEventSynchronize": fn(CUevent) -> Code;
        allocate = "cuMemAlloc_v2": fn(*mut u64, usize) -> Code;
        free = "cuMemFree_v2": fn(u64) -> Code;
        copy_in = "cuMemcpyHtoDAsync_v2": fn(u64, *const u8, usize, CUstream) -> Code;
        copy_out = "cuMemcpyDtoHAsync_v2": fn(*mut u8, u64, usize, CUstream) -> Code;
        lock = "cuMemHostRegister_v2": fn(*mut u8, usize, c_uint) -> Code;
        unlock = "cuMemHostUnregister": fn(*mut u8) -> Code;
        describe = "cuGetErrorString": fn(Code, *mut *const c_char) -> Code;
    }
}

/// An address in the device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    pub fn plus(self, bytes: usize) -> Self {
        Address(self.0 + bytes as u64)
    }
}

/// The driver, and the context of one GPU, which libtorch uses too.
#[derive(Clone, Copy)]
pub struct Gpu {
    driver: Functions,
    context: CUcontext,
    index: usize,
    /// The stream on which this thread computes.
    computing: Computing,
}

pub(super) type Computing = fn(usize) -> Result<CUstream, String>;

// SAFETY: the context is kept for good and may be any thread's current one; functions belong to nobody.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    pub fn open(index: usize) -> Result<Self, Problem> {
        Self::of(Library::open("libcuda.so.1").map_err(Problem)?, index, kernels::stream)
    }

    pub(super) fn of(library: Library, index: usize, computing: Computing) -> Result<Self, Problem> {
        let driver = Functions::of(library).map_err(Problem)?;
        let (mut device, mut gpu) = (0, Gpu { driver, context: std::ptr::null_mut(), index, computing });
        // SAFETY: each writes one number or handle, of this frame; the context is never given back.
        unsafe {
            gpu.check((driver.device)(&mut device, index as c_int))?;
            let code = (driver.retain)(&mut gpu.context, device);
            gpu.check(code)?;
        }
        Ok(gpu)
    }

    fn check(&self, code: Code) -> Result<(), Problem> {
        if code == SUCCESS {
            return Ok(());
        }
        let mut words = std::ptr::null();
        // SAFETY: writes one pointer, of this frame, to a string that lives on; not where it refuses.
        let known = unsafe { (self.driver.describe)(code, &mut words) == SUCCESS } && !words.is_null();
        // SAFETY: looked at above.
        let words = known.then(|| unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned());
        Err(Problem(format!("CUDA: {}", words.unwrap_or_else(|| format!("error {code}")))))
    }

    /// Makes this the GPU that this thread talks to.
    fn enter(&self) -> Result<(), Problem> {
        // SAFETY: a live context.
        self.check(unsafe { (self.driver.set_current)(self.context) })
    }

    fn mark(&self, stream: CUstream) -> Result<Event, Problem> {
        self.enter()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: writes one handle, of this frame.
        self.check(unsafe { (self.driver.event_create)(&mut event, WITHOUT_TIMING) })?;
        let event = Event { gpu: *self, event };
        // SAFETY: both are alive.
        self.check(unsafe { (self.driver.event_record)(event.event, stream) })?;
        Ok(event)
    }

    /// All that libtorch was asked for on this thread so far.
    pub fn mark_computing(&self) -> Result<Event, Problem> {
        self.mark((self.computing)(self.index).map_err(Problem)?)
    }

    /// What libtorch is asked for on this thread from now on comes after `event`.
    pub fn computing_follows(&self, event: &Event) -> Result<(), Problem> {
        self.enter()?;
        let computing = (self.computing)(self.index).map_err(Problem)?;
        // SAFETY: both are alive.
        self.check(unsafe { (self.driver.stream_wait)(computing, event.event, 0) })
    }
}

/// A place in a stream.
pub struct Event {
    gpu: Gpu,
    event: CUevent,
}

// SAFETY: an event belongs to no thread.
unsafe impl Send for Event {}

impl Event {
    /// Whether the device has come by.
    pub fn passed(&self) -> Result<bool, Problem> {
        // SAFETY: the event is alive.
        match unsafe { (self.gpu.driver.event_query)(self.event) } {
            NOT_READY => Ok(false),
            code => self.gpu.check(code).map(|()| true),
        }
    }

    /// Waits until the device has come by: only where nothing before it waits for a peer.
    pub fn wait(&self) -> Result<(), Problem> {
        self.gpu.enter()?;
        // SAFETY: the event is alive.
        self.gpu.check(unsafe { (self.gpu.driver.event_wait)(self.event) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: alive, and of nobody else's use. Where it has not passed yet the driver keeps it until then.
        unsafe { (self.gpu.driver.event_destroy)(self.event) };
    }
}

/// A stream beside the one that computes.
pub struct Stream {
    gpu: Gpu,
    stream: CUstream,
}

// SAFETY: a stream belongs to no thread.
unsafe impl Send for Stream {}

impl Stream {
    pub fn new(gpu: Gpu) -> Result<Self, Problem> {
        gpu.enter()?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle, of this frame.
        gpu.check(unsafe { (gpu.driver.stream_create)(&mut stream, NON_BLOCKING) })?;
        Ok(Stream { gpu, stream })
    }

    pub fn gpu(&self) -> Gpu {
        self.gpu
    }

    /// As NCCL takes it.
    pub fn handle(&self) -> cudarc::nccl::sys::cudaStream_t {
        self.stream.cast()
    }

    /// Makes its GPU the one that this thread talks to.
    pub fn enter(&self) -> Result<(), Problem> {
        self.gpu.enter()
    }

    /// All that it was asked for so far.
    pub fn mark(&self) -> Result<Event, Problem> {
        self.gpu.mark(self.stream)
    }

    /// What it is asked for from now on comes after `event`.
    pub fn follow(&self, event: &Event) -> Result<(), Problem> {
        self.gpu.enter()?;
        // SAFETY: both are alive.
        self.gpu.check(unsafe { (self.gpu.driver.stream_wait)(self.stream, event.event, 0) })
    }

    /// Only while nothing on this stream waits for a peer: the driver may wait for what is before it.
    pub fn copy_in(&self, to: Address, from: &[u8]) -> Result<(), Problem> {
        // SAFETY: pageable memory is read before this returns; `to` is of memory that is as long, by [`Staging`].
        self.gpu.check(unsafe { (self.gpu.driver.copy_in)(to.0, from.as_ptr(), from.len(), self.stream) })
    }

    /// As [`Stream::copy_in`]; `to` may be read once an event after it has passed.
    pub fn copy_out(&self, to: &mut [u8], from: Address) -> Result<(), Problem> {
        // SAFETY: pageable memory is written before this returns; `from` is of memory that is as long, by [`Staging`].
        self.gpu.check(unsafe { (self.gpu.driver.copy_out)(to.as_mut_ptr(), from.0, to.len(), self.stream) })
    }
}

impl Stream {
    /// Asks for `bytes` of locked memory to be copied to the device.
    ///
    /// # Safety
    /// `to` is of as many bytes, which live until an event after this has passed. Meanwhile nobody uses them, nor writes to
    /// those of `from`, which stays locked.
    pub unsafe fn bring(&self, to: Address, from: &Locked, bytes: Range<usize>) -> Result<(), Problem> {
        assert!(bytes.start <= bytes.end && bytes.end <= from.bytes, "within what is locked");
        self.gpu.enter()?;
        // SAFETY: within the locked pages; the caller vouches for the rest.
        let code = unsafe { (self.gpu.driver.copy_in)(to.0, from.at.add(bytes.start), bytes.len(), self.stream) };
        self.gpu.check(code)
    }

    /// Asks for as many bytes as `bytes` of locked memory to be copied there from the device.
    ///
    /// # Safety
    /// As of [`Stream::bring`], the other way round.
    pub unsafe fn take(&self, to: &Locked, bytes: Range<usize>, from: Address) -> Result<(), Problem> {
        assert!(bytes.start <= bytes.end && bytes.end <= to.bytes, "within what is locked");
        self.gpu.enter()?;
        // SAFETY: as above.
        let code = unsafe { (self.gpu.driver.copy_out)(to.at.add(bytes.start), from.0, bytes.len(), self.stream) };
        self.gpu.check(code)
    }
}

/// Pages of the host that stay in memory, so that the device reads and writes them by itself.
pub struct Locked {
    gpu: Gpu,
    at: *mut u8,
    bytes: usize,
}

// SAFETY: an address; whoever makes one vouches for what is there.
unsafe impl Send for Locked {}

impl Locked {
    /// # Safety
    /// `bytes` from `at`, the begin of a page, are memory in pages that hold nothing else, which live where they are until this
    /// is dropped.
    pub unsafe fn new(gpu: Gpu, at: *mut u8, bytes: usize) -> Result<Self, Problem> {
        gpu.enter()?;
        // SAFETY: the caller vouches for all of the last page too.
        gpu.check(unsafe { (gpu.driver.lock)(at, bytes.next_multiple_of(PAGE), 0) })?;
        Ok(Locked { gpu, at, bytes })
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // A GPU that cannot be entered has lost its locks too.
        if self.gpu.enter().is_ok() {
            // SAFETY: locked above, unlocked only here.
            unsafe { (self.gpu.driver.unlock)(self.at) };
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: alive, and of nobody else's use; what it still has to do is done without it.
        unsafe { (self.gpu.driver.stream_destroy)(self.stream) };
    }
}

/// Memory of the device.
pub struct Staging {
    gpu: Gpu,
    pub at: Address,
}

impl Staging {
    pub fn new(gpu: Gpu, bytes: usize) -> Result<Self, Problem> {
        gpu.enter()?;
        let mut at = 0;
        // SAFETY: writes one address, of this frame.
        gpu.check(unsafe { (gpu.driver.allocate)(&mut at, bytes) })?;
        Ok(Staging { gpu, at: Address(at) })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: allocated above, freed only here; the driver waits for what uses it.
        unsafe { (self.gpu.driver.free)(self.at.0) };
    }
}
