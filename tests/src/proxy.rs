//! A network that fails on request: a TCP proxy whose connections can be held, in one direction or both, and cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// What becomes of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// They flow.
    Open,
    /// They wait, and new connections with them; nobody is told.
    Held,
    /// Those of the callers wait.
    HeldForth,
    /// Those for the callers wait.
    HeldBack,
    /// Connections close, and new ones are closed at once.
    Cut,
}

impl Flow {
    pub const ALL_FAULTS: [Flow; 4] = [Flow::Held, Flow::HeldForth, Flow::HeldBack, Flow::Cut];

    pub fn name(self) -> &'static str {
        match self {
            Flow::Open => "open",
            Flow::Held => "held",
            Flow::HeldForth => "held one way, forth",
            Flow::HeldBack => "held one way, back",
            Flow::Cut => "cut",
        }
    }

    fn lets(self, forth: bool) -> bool {
        match self {
            Flow::Open | Flow::Cut => true,
            Flow::Held => false,
            Flow::HeldForth => !forth,
            Flow::HeldBack => forth,
        }
    }
}

struct Valve {
    flow: Mutex<Flow>,
    changed: Condvar,
    over: AtomicBool,
    /// Connections that came.
    calls: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

/// Stands between callers and one listener; gone when dropped.
pub struct Proxy {
    address: String,
    valve: Arc<Valve>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Proxy {
    /// In front of `target`, on a port of its own.
    pub fn new(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port is free");
        let address = listener.local_addr().expect("a bound socket has an address").to_string();
        let valve = Arc::new(Valve {
            flow: Mutex::new(Flow::Open),
            changed: Condvar::new(),
            over: AtomicBool::new(false),
            calls: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let (target, kept) = (target.to_owned(), valve.clone());
        std::thread::spawn(move || {
            for caller in listener.incoming().map_while(Result::ok) {
                if kept.over.load(Ordering::SeqCst) {
                    return;
                }
                kept.calls.fetch_add(1, Ordering::SeqCst);
                let (target, valve) = (target.clone(), kept.clone());
                std::thread::spawn(move || join(&target, caller, &valve));
            }
        });
        Proxy { address, valve }
    }

    /// Where callers find it, host:port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// How many connections have come.
    pub fn calls(&self) -> u64 {
        self.valve.calls.load(Ordering::SeqCst)
    }

    /// From now on.
    pub fn set(&self, flow: Flow) {
        *lock(&self.valve.flow) = flow;
        if flow == Flow::Cut {
            for stream in lock(&self.valve.open).drain(..) {
                // Fails where the other side was faster.
                stream.shutdown(Shutdown::Both).ok();
            }
        }
        self.valve.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.valve.over.store(true, Ordering::SeqCst);
        self.set(Flow::Cut);
        // Wakes the listener up.
        TcpStream::connect(&self.address).ok();
    }
}

/// One caller's connection.
fn join(target: &str, caller: TcpStream, valve: &Arc<Valve>) {
    valve.wait(true);
    if *lock(&valve.flow) == Flow::Cut {
        return;
    }
    let Ok(called) = TcpStream::connect(target) else { return };
    for stream in [&caller, &called] {
        // Only latency is lost where the system refuses.
        stream.set_nodelay(true).ok();
        lock(&valve.open).extend(stream.try_clone());
    }
    let (Ok(back_from), Ok(back_to)) = (called.try_clone(), caller.try_clone()) else { return };
    let other = valve.clone();
    std::thread::spawn(move || pump(back_from, back_to, &other, false));
    pump(caller, called, valve, true);
}

fn pump(mut from: TcpStream, mut to: TcpStream, valve: &Valve, forth: bool) {
    let mut block = vec![0; 1 << 16];
    while let Ok(count @ 1..) = from.read(&mut block) {
        valve.wait(forth);
        if to.write_all(&block[..count]).is_err() {
            break;
        }
    }
    valve.wait(forth);
    // The other direction may still have something to say; where the connection is broken, it notices too.
    to.shutdown(Shutdown::Write).ok();
}

impl Valve {
    /// Until bytes of this direction may pass.
    fn wait(&self, forth: bool) {
        let mut flow = lock(&self.flow);
        while !flow.lets(forth) {
            let waited = self.changed.wait_timeout(flow, Duration::from_millis(100));
            flow = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers every byte with the next one.
    fn echo() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("free");
        let address = listener.local_addr().expect("bound").to_string();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                std::thread::spawn(move || {
                    let mut byte = [0];
                    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&[byte[0] + 1]).is_ok() {}
                });
            }
        });
        address
    }

    fn asks(stream: &mut TcpStream, byte: u8) -> Option<u8> {
        let mut answer = [0];
        stream.write_all(&[byte]).ok()?;
        stream.read_exact(&mut answer).ok().map(|()| answer[0])
    }

    #[test]
    fn bytes_wait_while_they_are_held_and_end_when_cut() {
        let proxy = Proxy::new(&echo());
        let mut stream = TcpStream::connect(proxy.address()).expect("open");
        stream.set_read_timeout(Some(Duration::from_millis(300))).expect("settable");
        assert_eq!(asks(&mut stream, 1), Some(2));
        for flow in [Flow::Held, Flow::HeldForth, Flow::HeldBack] {
            proxy.set(flow);
            assert_eq!(asks(&mut stream, 3), None, "{flow:?}");
            proxy.set(Flow::Open);
            let mut late = [0];
            stream.read_exact(&mut late).expect("what was held arrives");
            assert_eq!(late, [4], "{flow:?}");
        }
        proxy.set(Flow::Cut);
        assert_eq!(asks(&mut stream, 5), None);
        let mut refused = TcpStream::connect(proxy.address()).expect("accepted, and closed");
        assert_eq!(asks(&mut refused, 5), None);
        proxy.set(Flow::Open);
        let mut again = TcpStream::connect(proxy.address()).expect("open");
        assert_eq!(asks(&mut again, 7), Some(8));
        assert_eq!(proxy.calls(), 3);
    }
}
