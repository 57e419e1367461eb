//! The signals that ask a worker to end: it asks the coordinator to save first, and goes on until it is told to leave.

use std::sync::mpsc;
use tokio::signal::unix::{signal, SignalKind};

/// What people call it.
fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "Ctrl-C",
        libc::SIGUSR1 => "SIGUSR1",
        _ => "SIGTERM",
    }
}

/// Calls `heed` with every signal's number and name, from a thread of its own, from now on. A supervised worker leaves
/// Ctrl-C, which the terminal sends to all, to its supervisor.
pub fn watch(supervised: bool, heed: impl Fn(i32, &'static str) + Send + 'static) -> Result<(), String> {
    let (ready, listening) = mpsc::channel();
    let watch = async move {
        let all = || {
            let terminate = signal(SignalKind::terminate())?;
            let user = signal(SignalKind::user_defined1())?;
            let interrupt = if supervised { None } else { Some(signal(SignalKind::interrupt())?) };
            Ok::<_, std::io::Error>((terminate, user, interrupt))
        };
        let (mut terminate, mut user, mut interrupt) = match all() {
            Ok(all) => all,
            Err(error) => return drop(ready.send(Err(error))),
        };
        // Fails only where the caller has panicked.
        let _ = ready.send(Ok(()));
        loop {
            let interrupted = async {
                match &mut interrupt {
                    Some(interrupt) => interrupt.recv().await,
                    None => std::future::pending().await,
                }
            };
            let number = tokio::select! {
                _ = terminate.recv() => libc::SIGTERM,
                _ = user.recv() => libc::SIGUSR1,
                _ = interrupted => libc::SIGINT,
            };
            heed(number, name(number));
        }
    };
    let failed = |error: std::io::Error| format!("signals cannot be caught ({error})");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
    let thread = std::thread::Builder::new().name("signals".into());
    thread.spawn(move || runtime.block_on(watch)).map_err(failed)?;
    match listening.recv() {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => Err("signals cannot be caught".into()),
    }
}
