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
    for group in groups() {
        if let Some(bytes) = group.left().filter(|&bytes| bytes < least.bytes) {
            least = Available { bytes, source: "the memory limit of its control group".into() };
        }
    }
    least
}

/// A control group that counts memory, by the files that tell.
struct Group {
    limit: PathBuf,
    used: PathBuf,
    statistics: PathBuf,
}

impl Group {
    /// Absent where it has no limit.
    fn left(&self) -> Option<u64> {
        let read = |path: &Path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let (limit, used) = (read(&self.limit)?, read(&self.used)?);
        let cached = std::fs::read_to_string(&self.statistics).map_or(0, |text| reclaimable(&text));
        Some(limit.saturating_sub(used.saturating_sub(cached)))
    }
}

/// Bytes that a group is charged with and that the kernel takes back before it refuses more: files in its cache that nobody
/// has mapped (a group that has read a data set or written a checkpoint is full of them), and caches of the kernel's own.
/// `statistics` is its memory.stat; version 1 has the sums over groups within it under names of their own.
fn reclaimable(statistics: &str) -> u64 {
    let number = |key: &str| {
        let line = statistics.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line.and_then(|number| number.trim().parse::<u64>().ok())
    };
    let either = |first: &str, second: &str| number(first).or_else(|| number(second)).unwrap_or(0);
    let files = either("total_inactive_file", "inactive_file") + either("total_active_file", "active_file");
    let mapped = either("total_mapped_file", "file_mapped");
    files.saturating_sub(mapped) + number("slab_reclaimable").unwrap_or(0)
}

/// This process's control group and all around it, version 2 and 1.
fn groups() -> Vec<Group> {
    let membership = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut groups = Vec::new();
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
            let (limit, used) = (group.join(limit), group.join(used));
            groups.push(Group { limit, used, statistics: group.join("memory.stat") });
        }
    }
    groups
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
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
    fn what_the_kernel_takes_back_is_left() {
        let second = "anon 900\nfile 700\nfile_mapped 100\ninactive_file 400\nactive_file 300\nslab_reclaimable 50\n";
        let first = "inactive_file 1\nactive_file 1\nmapped_file 1\ntotal_mapped_file 100\ntotal_inactive_file 400\ntotal_active_file 300\n";
        assert_eq!((reclaimable(second), reclaimable(first), reclaimable("")), (650, 600, 0));
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let statistics = file("stat", second);
        let group = |limit: &str| Group {
            limit: file("limit", limit),
            used: file("used", "1700\n"),
            statistics: statistics.clone(),
        };
        assert_eq!(group("2000\n").left(), Some(950));
        assert_eq!(group("max\n").left(), None);
        assert_eq!(group("1000\n").left(), Some(0));
        assert_eq!(Group { statistics: dir.path().join("none"), ..group("2000\n") }.left(), Some(300));
    }

    #[test]
    fn something_is_available() {
        let available = available();
        assert!(available.bytes > 1 << 20 && available.bytes < u64::MAX, "{available:?}");
    }
}
