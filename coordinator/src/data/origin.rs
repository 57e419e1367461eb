//! A data file that rows are read from again, one at a time, after its text stage.

use super::encode::Stop;
use super::render::{Rendered, Renderer};
use super::row::Row;
use super::Error;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use unisono_configs::run::Data;

/// A file and how its rows are rendered.
pub struct Origin {
    pub path: PathBuf,
    /// The file, or its rows written out.
    file: File,
    renderer: Renderer,
    /// What the rows call the columns.
    columns: BTreeMap<String, String>,
}

/// Where a row comes from, and what its text was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Index of its `[[data]]` table.
    pub task: u32,
    /// Index of its [`Origin`].
    pub file: u32,
    /// Position among all source rows of all tables.
    pub row: u64,
    pub line: u64,
    pub offset: u64,
    pub length: u32,
    /// Of the rendered text.
    pub key: u128,
}

impl Origin {
    /// `spool`: the rows, where they were written out.
    pub fn open(path: &Path, key: &str, spool: Option<File>, renderer: Renderer, data: &Data) -> Result<Self, Error> {
        let unreadable = |error| Error::Read { path: path.into(), key: key.into(), error };
        let file = spool.map_or_else(|| File::open(path).map_err(unreadable), Ok)?;
        Ok(Origin { path: path.into(), file, renderer, columns: data.columns.clone() })
    }

    /// Gives `work` the row as it was rendered in the text stage. Positioned reads, not a memory map: a file that is cut
    /// while a run reads it must not kill the run.
    pub fn with<T>(&self, source: &Source, work: impl FnOnce(&Rendered<'_>) -> Result<T, Stop>) -> Result<T, Stop> {
        let changed = || {
            let problem = format!(
                "line {} is no longer what it was when the run read it; put the file back as it was",
                source.line
            );
            Stop::All(Error::File { path: self.path.clone(), problem })
        };
        let mut bytes = vec![0; source.length as usize];
        self.file.read_exact_at(&mut bytes, source.offset).map_err(|_| changed())?;
        let mut row: Row<'_> = serde_json::from_slice(&bytes).map_err(|_| changed())?;
        row.rename(&self.columns);
        let rendered = self.renderer.render(&row).map_err(|_| changed())?;
        match rendered.key() == source.key {
            true => work(&rendered),
            false => Err(changed()),
        }
    }
}
