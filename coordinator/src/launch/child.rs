//! What ties processes together: inherited descriptors, the lifeline, and the parent's death.
//!
//! Every descriptor of this program closes on exec. A child inherits exactly those that [`bind`] names, so no worker
//! ever holds the writing end of a lifeline, which would keep the others alive.

#![allow(unsafe_code)]

use super::LIFELINE_FD;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes the child of `command` inherit the descriptors `keep`, die with this thread (spawn from the main thread), and
/// leave Ctrl-C to its parent: the terminal sends it to every process of the group, but only the supervisor decides.
pub fn bind(command: &mut Command, keep: Vec<RawFd>) {
    let parent = std::process::id();
    let prepare = move || {
        for fd in &keep {
            // SAFETY: fcntl on a descriptor number that the parent holds open across the fork; no memory is touched.
            if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: prctl, getppid and signal with constants; async-signal-safe and without pointers.
        unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == -1 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the line above.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            libc::signal(libc::SIGINT, libc::SIG_IGN);
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and calls async-signal-safe functions only; it allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// Takes over the descriptor whose number the environment names, and clears the name so that no child believes in it.
/// `None` where the variable is absent or names no open descriptor. Call it at most once per variable, from the main
/// thread, before others start.
pub fn inherited(variable: &str) -> Option<OwnedFd> {
    let fd: RawFd = std::env::var(variable).ok()?.parse().ok().filter(|fd| *fd > 2)?;
    std::env::remove_var(variable);
    // SAFETY: fcntl touches no memory; it fails with EBADF where the number names nothing.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return None;
    }
    // SAFETY: the descriptor is open (fcntl succeeded), and whoever set the variable made it for this process alone.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ends this process when the lifeline named in the environment does. Without one, nothing happens.
pub fn hold_lifeline() {
    let Some(fd) = inherited(LIFELINE_FD) else { return };
    std::thread::spawn(move || {
        let mut pipe = File::from(fd);
        // Nobody ever writes: a read returns at the end only.
        while matches!(pipe.read(&mut [0; 16]), Ok(n) if n > 0) {}
        // SAFETY: _exit ends the process at once; destructors of a run whose supervisor is gone would only delay it.
        unsafe { libc::_exit(3) }
    });
}

/// Sends `signal` to a child that has not been waited for; such a child's pid cannot have been reused.
pub fn send(child: &std::process::Child, signal: i32) {
    // SAFETY: kill takes two integers.
    unsafe { libc::kill(child.id() as i32, signal) };
}
