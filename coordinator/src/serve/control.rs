//! `control.json`: how to reach a running coordinator. Only its owner may read it, for it holds every role's secret.

use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use unisono_proto::dial::{Role, Token};

/// Name of the file within a run's directory.
pub const CONTROL: &str = "control.json";

/// The address of a coordinator and what it takes to talk to it. Its `Debug` shows no secret.
#[derive(Clone, Serialize, Deserialize)]
pub struct Control {
    /// host:port.
    pub address: String,
    /// Process id of the coordinator on its host.
    pub pid: u32,
    /// Which start of the coordinator this is.
    pub term: u64,
    /// CA certificate, PEM: for tools that take one. A token alone suffices.
    pub ca: String,
    pub tokens: Tokens,
}

/// Tokens by role, as text.
#[derive(Clone, Serialize, Deserialize)]
pub struct Tokens {
    pub worker: String,
    pub monitor: String,
    pub operator: String,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Control { address, pid, term, .. } = self;
        write!(f, "Control {{ address: {address:?}, pid: {pid}, term: {term}, secrets withheld }}")
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "{path}: cannot be read ({source}); no coordinator runs in this run directory, or it belongs to another user"
    )]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: damaged ({source}); start the run's coordinator again")]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{path}: cannot be written ({source}); check the run directory's permissions and the space left")]
    Write { path: PathBuf, source: std::io::Error },
}

impl Control {
    pub fn read(run_dir: &Path) -> Result<Self, Error> {
        let path = run_dir.join(CONTROL);
        let text = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        serde_json::from_slice(&text).map_err(|source| Error::Json { path, source })
    }

    /// Writes the file whole or not at all, readable by its owner only.
    pub fn write(&self, run_dir: &Path) -> Result<(), Error> {
        let (path, partial) = (run_dir.join(CONTROL), run_dir.join(format!(".{CONTROL}.{}", std::process::id())));
        let text = serde_json::to_vec_pretty(self).expect("strings and numbers serialize");
        let write = || {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
            file.write_all(&text)?;
            file.write_all(b"\n")?;
            std::fs::rename(&partial, &path)
        };
        write().map_err(|source| Error::Write { path: path.clone(), source })
    }

    /// The token for `role`.
    pub fn token(&self, role: Role) -> Result<Token, unisono_proto::dial::Error> {
        Token::parse(match role {
            Role::Worker => &self.tokens.worker,
            Role::Monitor => &self.tokens.monitor,
            Role::Operator => &self.tokens.operator,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_the_owner_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let text = |role| Token::generate(role, b"certificate").reveal();
        let tokens =
            Tokens { worker: text(Role::Worker), monitor: text(Role::Monitor), operator: text(Role::Operator) };
        let control = Control { address: "127.0.0.1:1".into(), pid: 1, term: 1, ca: String::new(), tokens };
        assert!(Control::read(dir.path()).unwrap_err().to_string().contains("no coordinator runs"));
        control.write(dir.path()).unwrap();
        control.write(dir.path()).unwrap();
        let mode = std::fs::metadata(dir.path().join(CONTROL)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let read = Control::read(dir.path()).unwrap();
        assert_eq!(read.token(Role::Monitor).unwrap().role(), Role::Monitor);
        assert!(!format!("{read:?}").contains(&read.tokens.worker));
    }
}
