//! The kernels on a processor, for tests: the same source as C++, compiled once and kept in the user's cache. Every thread
//! of a block is a fiber (emulator.h), so that barriers and shuffles do what they do on a GPU, a thousand times slower.
#![allow(unsafe_code)]

use super::{names, source, Argument, Grid};
use crate::library::{self, Library};
use std::cell::Cell;
use std::ffi::{c_char, c_void, CStr, CString};
use std::fmt::Write;
use std::sync::OnceLock;

thread_local! {
    static UNDER_WAY: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, this thread runs the kernels on tensors of the host wherever a GPU would run them.
pub struct Emulated(());

impl Emulated {
    /// Fails where no C++ compiler is to be had.
    pub fn begin() -> Result<Self, String> {
        entry()?;
        UNDER_WAY.set(true);
        Ok(Emulated(()))
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        UNDER_WAY.set(false);
    }
}

pub fn is_under_way() -> bool {
    UNDER_WAY.get()
}

/// Runs a kernel by name; gives a sentence of static life, or null.
type Entry =
    unsafe extern "C" fn(*const c_char, *const c_char, *const i32, i32, usize, *const *const c_void) -> *const c_char;

fn entry() -> Result<Entry, String> {
    static ENTRY: OnceLock<Result<Entry, String>> = OnceLock::new();
    ENTRY
        .get_or_init(|| {
            let library = Library::open(library::compiled(&program(), "emulator")?)?;
            let address = library.symbol("unisono_emulate").ok_or("the emulator lacks its entry")?;
            // SAFETY: `program` writes that function with these types.
            Ok(unsafe { std::mem::transmute::<*mut c_void, Entry>(address) })
        })
        .clone()
}

/// The kernels with what runs them, as one C++ file.
fn program() -> String {
    let mut text = concat!(include_str!("emulator.h"), "\n").to_owned();
    text.push_str(&source());
    text.push_str(
        "\nextern \"C\" const char *unisono_emulate(const char *name, const char *codes, const int *grid, int threads, \
         size_t shared, void **arguments) {\n  if (shared > 65536) return \"a block shares too much\";\n",
    );
    for name in names() {
        let call = format!("emulator::launch({name}, codes, grid, threads, arguments)");
        let _ = writeln!(text, "  if (!strcmp(name, \"{name}\")) return {call};");
    }
    text.push_str("  return \"there is no such kernel\";\n}\n");
    text
}

pub(super) fn launch(name: &str, grid: Grid, arguments: &[Argument]) -> Result<(), String> {
    let entry = entry()?;
    let name = CString::new(name).map_err(|e| e.to_string())?;
    let codes = CString::new(arguments.iter().map(|a| a.code()).collect::<Vec<_>>()).map_err(|e| e.to_string())?;
    let values: Vec<u64> = arguments.iter().map(|a| a.bits()).collect();
    let pointers: Vec<*const c_void> = values.iter().map(|v| std::ptr::from_ref(v).cast()).collect();
    let number = |n: usize| i32::try_from(n).map_err(|_| "more blocks than a GPU counts".to_owned());
    let (shape, threads) = ([number(grid.x)?, number(grid.y)?], number(grid.threads)?);
    // SAFETY: the entry compares number and types of the arguments with those of the kernel before it reads them; pointers
    // are of tensors of the host that the caller holds meanwhile.
    let problem =
        unsafe { entry(name.as_ptr(), codes.as_ptr(), shape.as_ptr(), threads, grid.shared, pointers.as_ptr()) };
    if problem.is_null() {
        return Ok(());
    }
    // SAFETY: not null, so a sentence of static life.
    Err(unsafe { CStr::from_ptr(problem) }.to_string_lossy().into_owned())
}
