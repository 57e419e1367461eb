//! What the kernel says about memory: of this process, of its control group and of the machine.

use std::path::{Path, PathBuf};

/// Memory that may still be used, and who says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    pub bytes: u64,
    pub source: String,
}

/// Resident bytes of this process now; 0 where the kernel does not say.
pub fn resident() -> u64 {
    status("VmRSS:")
}

/// The most that was resident at any time.
pub fn peak() -> u64 {
    status("VmHWM:")
}

fn status(key: &str) -> u64 {
    kilobytes(Path::new("/proc/self/status"), key).unwrap_or(0)
}

/// Reads a line such as `VmRSS:   123 kB`.
fn kilobytes(path: &Path, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

/// The least of what the machine and every enclosing control group leave. Unknown limits do not limit.
pub fn available() -> Available {
    let machine = kilobytes(Path::new("/proc/meminfo"), "MemAvailable:").unwrap_or(u64::MAX);
    let mut least = Available { bytes: machine, source: "the machine".into() };
    for (limit, used) in groups() {
        let read = |path: &Path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        if let (Some(limit), Some(used)) = (read(&limit), read(&used)) {
            let bytes = limit.saturating_sub(used);
            if bytes < least.bytes {
                least = Available { bytes, source: "the memory limit of its control group".into() };
            }
        }
    }
    least
}

/// Files with the limit and the use of this process's control group and all around it, version 2 and 1.
fn groups() -> Vec<(PathBuf, PathBuf)> {
    let membership = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut files = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, limit, used) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
            c if c.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            let group = Path::new(root).join(group);
            files.push((group.join(limit), group.join(used)));
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_follows_an_allocation() {
        let before = resident();
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = resident();
        assert!(after >= before + (60 << 20), "{before} then {after}");
        assert!(peak() >= after - (1 << 20));
        drop(block);
    }

    #[test]
    fn something_is_available() {
        let available = available();
        assert!(available.bytes > 1 << 20 && available.bytes < u64::MAX, "{available:?}");
    }
}
