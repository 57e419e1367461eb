//! NVRTC, NVIDIA's compiler as a library: from CUDA C++ to machine code, on any machine, with a GPU or without.
#![allow(unsafe_code)]

use crate::library::{self, Library};
use cudarc::nvrtc::{result, sys};
use std::ffi::{c_char, CStr, CString};
use std::path::PathBuf;
use std::sync::OnceLock;

/// Why there is no machine code.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("NVRTC 13 cannot be opened ({0}); install torch 2.11.0 with CUDA, or nvidia-cuda-nvrtc 13.0.88 beside it")]
    Missing(String),
    #[error("the kernels do not compile for {architecture}: {log}")]
    Compile { architecture: String, log: String },
    #[error("NVRTC fails: {0}")]
    Failed(String),
}

/// Where a directory with NVRTC may be named, for installations that have it elsewhere.
const VARIABLE: &str = "UNISONO_NVRTC";

/// Opens NVRTC once. It opens its builtins by name, so they come first.
fn open() -> Result<(), Error> {
    static OPENED: OnceLock<Result<(), Error>> = OnceLock::new();
    OPENED
        .get_or_init(|| {
            let named = std::env::var_os(VARIABLE).map(PathBuf::from);
            let mut problem = String::new();
            for dir in named.into_iter().chain(library::beside_libtorch("cu13")).chain([PathBuf::new()]) {
                // Without them what needs no builtin still compiles; the failure of the others is said then.
                let _ = Library::open(dir.join("libnvrtc-builtins.so.13.0"));
                match Library::open(dir.join("libnvrtc.so.13")) {
                    Ok(_) => return Ok(()),
                    Err(e) => problem = e,
                }
            }
            Err(Error::Missing(problem))
        })
        .clone()?;
    // SAFETY: looks for a library by name, which was opened above.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Missing("libnvrtc.so.13 is opened, but not found again".into()));
    }
    // Looking by name may find another one first, whose code would have other bits.
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is open, and the numbers are this frame's.
    match unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result() {
        Ok(()) if (major, minor) == (13, 0) => Ok(()),
        _ => Err(Error::Missing(format!(
            "another NVRTC, {major}.{minor}, is found before it; take its directory out of LD_LIBRARY_PATH"
        ))),
    }
}

/// A program, to be destroyed in the end.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by create_program, destroyed only here.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// What decides the code besides source and architecture.
pub const OPTIONS: [&str; 2] = ["--fmad=false", "--std=c++17"];

/// Machine code of `source` for an architecture, such as "sm_90". Nothing is fused but what the source fuses, so that the
/// optimizer's arithmetic is the host's.
pub fn compile(source: &str, architecture: &str) -> Result<Vec<u8>, Error> {
    open()?;
    let failed = |e: result::NvrtcError| Error::Failed(e.to_string());
    let source = CString::new(source).map_err(|e| Error::Failed(e.to_string()))?;
    let program = Program(result::create_program(&source, Some(c"kernels.cu")).map_err(failed)?);
    let target = format!("--gpu-architecture={architecture}");
    let options = [target.as_str(), OPTIONS[0], OPTIONS[1]];
    // SAFETY: the program is alive.
    if unsafe { result::compile_program(program.0, &options) }.is_err() {
        return Err(Error::Compile { architecture: architecture.into(), log: log(&program) });
    }
    let mut size = 0;
    // SAFETY: the program is alive and compiled; the size is this frame's.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) }.result().map_err(failed)?;
    let mut code = vec![0u8; size];
    // SAFETY: NVRTC writes `size` bytes, which the vector has.
    unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast::<c_char>()) }.result().map_err(failed)?;
    Ok(code)
}

fn log(program: &Program) -> String {
    // SAFETY: the program is alive.
    let Ok(log) = (unsafe { result::get_program_log(program.0) }) else { return "NVRTC gives no reason".into() };
    let bytes: Vec<u8> = log.iter().map(|c| *c as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(|_| String::new(), |text| text.to_string_lossy().trim().to_owned())
}

/// Where `scripts/nvrtc` puts NVRTC on machines that have it only to compile for others.
pub fn cached() -> Option<PathBuf> {
    let dir = library::cache()?.join("nvrtc-13.0.88/nvidia/cu13/lib");
    dir.is_dir().then_some(dir)
}
