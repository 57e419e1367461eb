//! Where checkpoints touch the disk: every operation that changes it, one by one, so that a test can let the machine
//! crash between any two.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// What a file system is asked to do. What an operation has done is durable only once a `sync` says so.
pub trait Disk: Debug {
    fn make_directories(&self, path: &Path) -> io::Result<()>;
    /// An empty file under a name that did not exist.
    fn create(&self, path: &Path) -> io::Result<()>;
    /// Appends to a file that this made.
    fn write(&self, path: &Path, content: &[u8]) -> io::Result<()>;
    fn sync_file(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_directory(&self, path: &Path) -> io::Result<()>;
    /// A second name, which did not exist.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Of an empty directory.
    fn remove_directory(&self, path: &Path) -> io::Result<()>;

    /// A new file that is whole on the disk; only its name is not. What fails is deleted.
    fn write_new(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        self.create(path)?;
        let written = self.write(path, content).and_then(|()| self.sync_file(path));
        if written.is_err() {
            // Half a file only takes up space.
            self.remove_file(path).ok();
        }
        written
    }

    /// A directory and the files in it.
    fn remove_all(&self, path: &Path) -> io::Result<()> {
        for entry in fs::read_dir(path)? {
            self.remove_file(&entry?.path())?;
        }
        self.remove_directory(path)
    }
}

/// The file system of this machine.
#[derive(Debug, Clone, Copy)]
pub struct Local;

impl Disk for Local {
    fn make_directories(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn create(&self, path: &Path) -> io::Result<()> {
        OpenOptions::new().write(true).create_new(true).open(path).map(drop)
    }

    fn write(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        OpenOptions::new().append(true).open(path)?.write_all(content)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_directory(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }
}
