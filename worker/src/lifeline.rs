//! No orphans: a worker ends when the process that started it does, whatever the compute thread is doing.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;

/// Names a file descriptor that reads end of file once the parent is gone.
const VARIABLE: &str = "UNISONO_LIFELINE_FD";

/// Ends the process at once with `code`, without running destructors: other threads may be inside libtorch.
pub fn leave(code: i32) -> ! {
    // SAFETY: _exit takes no pointers and does not return.
    unsafe { libc::_exit(code) }
}

/// Whether a supervisor holds the other end of a lifeline.
pub fn is_supervised() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Watches the lifeline from a thread of its own, if the environment names one.
pub fn watch(code: i32) -> Result<(), String> {
    let Ok(fd) = std::env::var(VARIABLE) else { return Ok(()) };
    // Opening the descriptor anew leaves the inherited one alone and refuses a number that is none.
    let open = fd
        .parse::<u32>()
        .map_err(|e| e.to_string())
        .and_then(|fd| File::open(format!("/proc/self/fd/{fd}")).map_err(|e| e.to_string()));
    let mut pipe =
        open.map_err(|problem| format!("{VARIABLE}={fd}: {problem}; it must be an open pipe's descriptor"))?;
    std::thread::Builder::new()
        .name("lifeline".into())
        .spawn(move || {
            let mut byte = [0];
            loop {
                match pipe.read(&mut byte) {
                    Ok(0) => leave(code),
                    Err(e) if e.kind() != std::io::ErrorKind::Interrupted => leave(code),
                    _ => {}
                }
            }
        })
        .map(drop)
        .map_err(|e| format!("no thread for the lifeline ({e})"))
}

/// Medium buffers come from and go back to the heap instead of the kernel: a step allocates the same sizes again and
/// again, and fresh pages cost more than the arithmetic on them. Large ones go back to the kernel: they are kept where it
/// pays, and would leave holes that nothing else fits.
pub fn keep_heap() {
    // SAFETY: mallopt only sets numbers inside the allocator; it is called before other threads exist.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
