//! NCCL's functions and one communicator, asked without ever waiting: what takes time says so, and is asked again.
#![allow(unsafe_code)]

use super::id::{Id, BYTES};
use super::stream::Address;
use crate::library::{self, functions, Library};
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use std::ffi::{c_char, c_int, c_uint, CStr};
use std::path::PathBuf;

/// A result as NCCL numbers it: a newer NCCL may have more than a header knows.
type Code = c_uint;
const SUCCESS: Code = 0;
const IN_PROGRESS: Code = 7;
/// NCCL 2.28, which torch 2.11.0 brings.
const OLDEST: c_int = 22_800;

functions! {
    /// What of NCCL is used.
    Functions {
        version = "ncclGetVersion": fn(*mut c_int) -> Code;
        unique_id = "ncclGetUniqueId": fn(*mut ncclUniqueId) -> Code;
        init = "ncclCommInitRankConfig": fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> Code;
        state = "ncclCommGetAsyncError": fn(ncclComm_t, *mut Code) -> Code;
        finalize = "ncclCommFinalize": fn(ncclComm_t) -> Code;
        destroy = "ncclCommDestroy": fn(ncclComm_t) -> Code;
        abort = "ncclCommAbort": fn(ncclComm_t) -> Code;
        group_start = "ncclGroupStart": fn() -> Code;
        group_end = "ncclGroupEnd": fn() -> Code;
        reduce = "ncclReduce": fn(*const u8, *mut u8, usize, ncclDataType_t, ncclRedOp_t, c_int, ncclComm_t, cudaStream_t) -> Code;
        broadcast = "ncclBroadcast": fn(*const u8, *mut u8, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> Code;
        describe = "ncclGetErrorString": fn(Code) -> *const c_char;
        last = "ncclGetLastError": fn(ncclComm_t) -> *const c_char;
    }
}

/// What NCCL or the driver refuses, in its own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Problem(pub String);

/// NCCL, opened.
#[derive(Clone, Copy)]
pub struct Nccl(Functions);

impl Nccl {
    /// The one that came with libtorch, else whatever the loader finds.
    pub fn open() -> Result<Self, String> {
        let mut problem = String::new();
        for dir in library::beside_libtorch("nccl").into_iter().chain([PathBuf::new()]) {
            match Library::open(dir.join("libnccl.so.2")) {
                Ok(library) => return Self::of(library),
                Err(e) => problem = e,
            }
        }
        Err(problem)
    }

    pub(super) fn of(library: Library) -> Result<Self, String> {
        let functions = Functions::of(library)?;
        let mut version = 0;
        // SAFETY: writes one number, of this frame.
        let code = unsafe { (functions.version)(&mut version) };
        match (code, version) {
            (SUCCESS, OLDEST..) => Ok(Nccl(functions)),
            _ => Err(format!("it is {}, and 2.28 or newer is needed", shown(version))),
        }
    }

    /// A fresh id, of which this process waits for the others.
    pub fn unique_id(&self) -> Result<Id, Problem> {
        let mut id = ncclUniqueId { internal: [0; BYTES] };
        // SAFETY: writes one id, of this frame.
        let code = unsafe { (self.0.unique_id)(&mut id) };
        self.check(code, std::ptr::null_mut()).map(|_| Id::new(id.internal.map(|c| c as u8)))
    }

    /// Begins to meet the others; [`Communicator::ready`] says when that is done.
    pub fn communicator(&self, world: usize, rank: usize, id: &Id) -> Result<Communicator, Problem> {
        let mut handle = std::ptr::null_mut();
        let id = ncclUniqueId { internal: id.bytes().map(|byte| byte as c_char) };
        let mut config = without_waiting();
        // SAFETY: handle and configuration are of this frame, and the latter is what NCCL's own initializer makes.
        let code = unsafe { (self.0.init)(&mut handle, world as c_int, id, rank as c_int, &mut config) };
        match self.check(code, handle) {
            Ok(_) => Ok(Communicator { nccl: *self, handle }),
            Err(problem) => {
                if !handle.is_null() {
                    // SAFETY: made above, ended only here.
                    unsafe { (self.0.abort)(handle) };
                }
                Err(problem)
            }
        }
    }

    /// Whether it is done; under way if not.
    fn check(&self, code: Code, handle: ncclComm_t) -> Result<bool, Problem> {
        match code {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => {
                // SAFETY: both give strings that live on, or null; the handle is alive or null.
                let (kind, last) = unsafe { (words((self.0.describe)(code)), words((self.0.last)(handle))) };
                Err(Problem(if last.is_empty() { kind } else { format!("{kind}: {}", last.trim()) }))
            }
        }
    }
}

/// As `NCCL_CONFIG_INITIALIZER` of 2.28 has it, with `blocking = 0`.
fn without_waiting() -> ncclConfig_t {
    const UNDEFINED: c_int = c_int::MIN;
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: OLDEST as c_uint,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

fn shown(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

fn words(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not null, so NCCL's own string, which ends in zero.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// One rank's end of a communicator. NCCL allows one thread at a time to use it.
pub struct Communicator {
    nccl: Nccl,
    handle: ncclComm_t,
}

// SAFETY: NCCL ties a communicator to no thread; `&mut self` keeps threads from using it at once.
unsafe impl Send for Communicator {}

/// One operation of a group, on memory of the device that stays until the stream has passed it.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    /// Adds up everybody's `count` i64 numbers at `at`, to those of `root`.
    Reduce { at: Address, count: usize, root: usize },
    /// Copies `bytes` of `root` to everybody, at `at` of each.
    Broadcast { at: Address, bytes: usize, root: usize },
}

impl Communicator {
    /// Whether all that was asked of it has been taken on; nothing else may be asked before.
    pub fn ready(&self) -> Result<bool, Problem> {
        let mut state = SUCCESS;
        // SAFETY: the handle is alive, the number is of this frame.
        let code = unsafe { (self.nccl.0.state)(self.handle, &mut state) };
        self.check(code)?;
        self.check(state)
    }

    /// Asks for all `parts` as one, on `stream`; [`Communicator::ready`] says when they are there.
    pub fn group(&mut self, parts: &[Part], stream: cudaStream_t) -> Result<(), Problem> {
        // SAFETY: a group is begun and ended on this thread, whatever comes between. Addresses are of memory that the caller
        // keeps until the stream has passed, of that length at least.
        let (asked, ended) = unsafe {
            self.check((self.nccl.0.group_start)())?;
            let asked = parts.iter().try_for_each(|part| self.check(self.ask(part, stream)).map(drop));
            (asked, (self.nccl.0.group_end)())
        };
        asked?;
        self.check(ended).map(drop)
    }

    /// # Safety
    /// The part's memory is the device's, and stays until the stream has passed.
    unsafe fn ask(&self, part: &Part, stream: cudaStream_t) -> Code {
        let (functions, handle) = (&self.nccl.0, self.handle);
        match *part {
            Part::Reduce { at: Address(at), count, root } => {
                let (at, sum, kind) = (at as *mut u8, ncclRedOp_t::ncclSum, ncclDataType_t::ncclInt64);
                // SAFETY: the caller's promise; in place at the root, and others are only read.
                unsafe { (functions.reduce)(at, at, count, kind, sum, root as c_int, handle, stream) }
            }
            Part::Broadcast { at: Address(at), bytes, root } => {
                let (at, kind) = (at as *mut u8, ncclDataType_t::ncclUint8);
                // SAFETY: the caller's promise; in place.
                unsafe { (functions.broadcast)(at, at, bytes, kind, root as c_int, handle, stream) }
            }
        }
    }

    /// Begins an orderly end; [`Communicator::ready`] says when what was asked for has left.
    pub fn finalize(&mut self) -> Result<(), Problem> {
        // SAFETY: the handle is alive.
        self.check(unsafe { (self.nccl.0.finalize)(self.handle) }).map(drop)
    }

    /// After [`Communicator::finalize`].
    pub fn destroy(self) {
        // SAFETY: the handle is alive, and nobody has it after this.
        unsafe { (self.nccl.0.destroy)(self.handle) };
    }

    /// Ends it at once, and what runs of it on the device; never waits for a peer.
    pub fn abort(self) {
        // SAFETY: as above.
        unsafe { (self.nccl.0.abort)(self.handle) };
    }

    fn check(&self, code: Code) -> Result<bool, Problem> {
        self.nccl.check(code, self.handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_reads_as_people_write_it() {
        assert_eq!(shown(22_809), "2.28.9");
        assert_eq!(size_of::<ncclConfig_t>(), 80, "as the header of 2.28 lays it out");
    }
}
