//! Which file system a directory lies on: SQLite's write-ahead log needs shared memory and locks that network file
//! systems do not give.

use std::path::Path;

/// Kinds, as the kernel names them, on which other hosts may write too.
const NETWORK: &[&str] = &[
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse.glusterfs",
    "fuse.s3fs",
    "fuse.sshfs",
    "glusterfs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "ocfs2",
    "orangefs",
    "pvfs2",
    "smb3",
    "smbfs",
    "vboxsf",
    "wekafs",
];

/// The kind of network file system that holds `directory`; `None` where it is local or cannot be told.
pub fn network(directory: &Path) -> Option<String> {
    let directory = directory.canonicalize().ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    kind(&mounts, &directory).filter(|kind| NETWORK.contains(&kind.as_str()))
}

/// Kind of the innermost mount above `directory`. The last mount on a point hides those before it.
fn kind(mounts: &str, directory: &Path) -> Option<String> {
    let mut found: Option<(usize, String)> = None;
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let (Some(point), Some(kind)) = (before.split(' ').nth(4), after.split(' ').next()) else { continue };
        // The kernel writes blanks as \040.
        let point = point.replace("\\040", " ");
        if directory.starts_with(&point) && found.as_ref().is_none_or(|(length, _)| point.len() >= *length) {
            found = Some((point.len(), kind.into()));
        }
    }
    found.map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_counts() {
        let mounts = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                      40 22 0:30 / /home rw shared:1 - nfs4 server:/home rw\n\
                      41 40 8:2 / /home/me/fast\\040disk rw - xfs /dev/sdb rw\n";
        let told = |path: &str| kind(mounts, Path::new(path)).unwrap();
        assert_eq!(told("/var/runs"), "ext4");
        assert_eq!(told("/home/me/runs"), "nfs4");
        assert_eq!(told("/home/me/fast disk/runs"), "xfs");
        assert_eq!(told("/homes"), "ext4");
        assert!(network(&std::env::temp_dir()).is_none());
    }
}
