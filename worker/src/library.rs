//! Shared libraries that are opened on demand: parts of libtorch and of CUDA that a machine without a GPU lacks.
#![allow(unsafe_code)]

use std::ffi::{c_void, CStr, CString};
use std::path::{Path, PathBuf};
use std::process::Command;

/// An opened library; it stays open for the life of the process.
#[derive(Clone, Copy)]
pub struct Library(*mut c_void);

// SAFETY: a handle of dlopen may be used from any thread, and it is never closed.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Opens `name`, a path or what the loader searches, so that libraries opened later find its symbols.
    pub fn open(name: impl AsRef<Path>) -> Result<Library, String> {
        Self::load(name.as_ref(), libc::RTLD_GLOBAL)
    }

    /// Opens `name` for those alone who ask this handle: its symbols stand in nobody's way.
    pub fn open_apart(name: impl AsRef<Path>) -> Result<Library, String> {
        Self::load(name.as_ref(), libc::RTLD_LOCAL)
    }

    fn load(name: &Path, visibility: i32) -> Result<Library, String> {
        let name = CString::new(name.as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
        // SAFETY: the name ends in zero; loading runs initialisers that these libraries mean to be run at any time.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | visibility) };
        if handle.is_null() {
            return Err(problem());
        }
        Ok(Library(handle))
    }

    /// All that this process has loaded so that others may see it.
    pub fn process() -> Library {
        Library(libc::RTLD_DEFAULT)
    }

    /// The address of a symbol, if it is there.
    pub fn symbol(self, name: &str) -> Option<*mut c_void> {
        let name = CString::new(name).ok()?;
        // SAFETY: the handle is open for good, the name ends in zero.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    }
}

/// A table of C functions, which `of` finds in a library by their names.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        struct $table { $($field: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl $table {
            fn of(library: $crate::library::Library) -> Result<Self, String> {
                $(
                    let $field = library.symbol($symbol).ok_or_else(|| format!("it lacks {}", $symbol))?;
                    // SAFETY: the library's public header declares the function of this name with these types.
                    let $field = unsafe {
                        std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn($($argument),*) -> $result>($field)
                    };
                )*
                Ok($table { $($field,)* })
            }
        }
    };
}
pub(crate) use functions;

/// What the loader says of its last failure on this thread.
fn problem() -> String {
    // SAFETY: after a failure dlerror gives a string of its own that lives until the next call on this thread, or null.
    let words = unsafe { libc::dlerror() };
    if words.is_null() {
        return "the loader gives no reason".into();
    }
    // SAFETY: not null, so it is such a string.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
}

/// Where a library whose file name starts with `name` was loaded from.
pub fn loaded_from(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let fits = |path: &&Path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name));
    paths.into_iter().find(fits).map(Path::to_path_buf)
}

/// Directories in which NVIDIA's libraries lie that belong to this libtorch: those that pip installs beside torch.
pub fn beside_libtorch(package: &str) -> Vec<PathBuf> {
    let Some(torch) = loaded_from("libtorch_cpu.so") else { return Vec::new() };
    let Some(site) = torch.ancestors().nth(3) else { return Vec::new() };
    let mut found = vec![site.join("nvidia").join(package).join("lib")];
    found.extend(torch.parent().map(Path::to_path_buf));
    found
}

/// A shared library from C++ text, compiled once and kept in the user's cache: for tests, which run on a processor what a GPU
/// would. Fails where no compiler is to be had.
pub fn compiled(text: &str, name: &str) -> Result<PathBuf, String> {
    let hash = blake3::hash(text.as_bytes()).to_hex();
    let dir = cache().ok_or("HOME is not set: there is no place for compiled tests")?.join(name);
    let library = dir.join(format!("{}.so", &hash[..16]));
    if library.exists() {
        return Ok(library);
    }
    let failed = |e: std::io::Error| format!("{}: {e}", dir.display());
    std::fs::create_dir_all(&dir).map_err(failed)?;
    let part = |extension| dir.join(format!("{}.{extension}", std::process::id()));
    let (code, made) = (part("cpp"), part("so"));
    std::fs::write(&code, text).map_err(failed)?;
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-w", "-o"];
    let output = Command::new(&compiler).args(options).arg(&made).arg(&code).output();
    let output = output.map_err(|e| format!("{}: {e}", compiler.display()))?;
    let _ = std::fs::remove_file(&code);
    if !output.status.success() {
        return Err(format!("{name} does not compile as C++: {}", String::from_utf8_lossy(&output.stderr)));
    }
    // Several tests may build it at once: each its own, and any of them will do.
    std::fs::rename(&made, &library).map_err(failed)?;
    Ok(library)
}

/// The user's cache directory for what this program makes itself.
pub fn cache() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    cache.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache"))).map(|cache| cache.join("unisono"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_or_said_to_be_missing() {
        assert!(Library::open("libno-such-thing.so.7").err().is_some_and(|e| e.contains("libno-such-thing.so.7")));
        assert!(Library::process().symbol("no_such_symbol_anywhere").is_none());
        assert!(Library::process().symbol("torch_call_dispatcher").is_some(), "libtorch is loaded");
        // The linker keeps libtorch loaded, so its place is known.
        let torch = loaded_from("libtorch_cpu.so").expect("libtorch is loaded");
        assert!(beside_libtorch("cu13").contains(&torch.parent().expect("a directory").to_path_buf()));
    }
}
