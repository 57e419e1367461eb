//! Shared libraries that are opened on demand: parts of libtorch and of CUDA that a machine without a GPU lacks.
#![allow(unsafe_code)]

use std::ffi::{c_void, CStr, CString};
use std::path::{Path, PathBuf};

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
        let name = CString::new(name.as_ref().as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
        // SAFETY: the name ends in zero; loading runs initialisers that these libraries mean to be run at any time.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
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
