//! What a worker is let in with: a token that ends, and from then on the pass that it was given for it, which it keeps beside
//! the token's file for whoever is started in its place on this host.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use tokio::sync::watch;
use tonic::metadata::MetadataMap;
use tonic::Request;
use unisono_proto::dial::Token;

/// What calls of one link are authorized by; by nothing in tests.
pub(super) struct Entry {
    token: Option<Token>,
    /// None until it is let in.
    inside: watch::Sender<Option<Token>>,
}

impl Entry {
    pub fn new(token: Option<Token>) -> Self {
        // Only a token that ends is exchanged for a pass.
        let at_once = token.clone().filter(|token| !token.ends());
        Entry { token, inside: watch::Sender::new(at_once) }
    }

    /// A call that asks to be let in.
    pub fn ask<T>(&self, message: T) -> Request<T> {
        authorized(message, self.token.as_ref())
    }

    /// The coordinator has answered so.
    pub fn admitted(&self, answer: &MetadataMap) {
        // Looked at apart: who looks holds it, and setting it would wait.
        let outside = self.inside.borrow().is_none();
        if let (Some(token), true) = (&self.token, outside) {
            self.inside.send_replace(Some(token.pass(answer).unwrap_or_else(|| token.clone())));
        }
    }

    /// A call of somebody who was let in; waits until this worker was.
    pub async fn inside<T>(&self, message: T) -> Request<T> {
        if self.token.is_none() {
            return authorized(message, None);
        }
        let mut inside = self.inside.subscribe();
        // The sender lives as long as this does.
        let pass = inside.wait_for(Option::is_some).await.ok().and_then(|pass| pass.clone());
        authorized(message, pass.as_ref())
    }

    pub fn pass(&self) -> Option<Token> {
        self.inside.borrow().clone()
    }

    /// The pass that the token was exchanged for, as soon as it was; `None` where it is none of those.
    pub async fn granted(&self) -> Option<Token> {
        let token = self.token.as_ref().filter(|token| token.ends())?;
        let mut inside = self.inside.subscribe();
        let pass = inside.wait_for(Option::is_some).await.ok()?.clone();
        pass.filter(|pass| pass != token)
    }
}

fn authorized<T>(message: T, token: Option<&Token>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(token) = token {
        token.authorize(&mut request);
    }
    request
}

/// Where a pass for `host` lies: beside the file that `UNISONO_TOKEN_FILE` names, if the token came from there.
pub fn place(host: &str) -> Option<PathBuf> {
    let file = std::env::var_os("UNISONO_TOKEN_FILE").filter(|_| std::env::var_os("UNISONO_TOKEN").is_none())?;
    let mut path = file;
    path.push(format!(".pass-{}", host.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '.', "_")));
    Some(path.into())
}

/// The pass that was kept at `path`, if it leads where `token` does.
pub fn kept(path: &Path, token: &Token) -> Option<Token> {
    let pass = Token::parse(&std::fs::read_to_string(path).ok()?).ok()?;
    pass.stands_for(token).then_some(pass)
}

/// Keeps a pass: whole or not at all, for its owner only. A directory that cannot be written is no fault: the token does.
pub fn keep(path: &Path, pass: &Token) {
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}", std::process::id()));
    let partial = PathBuf::from(partial);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        writeln!(file, "{}", pass.reveal())?;
        std::fs::rename(&partial, path)
    };
    if let Err(error) = write() {
        tracing::info!(path = %path.display(), %error, "the pass is not kept");
        let _ = std::fs::remove_file(&partial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use unisono_proto::dial::{Claims, Role, PASS};

    fn token(authority: &[u8], ends: Option<u64>) -> Token {
        Token::seal(&[1; 32], Role::Worker, authority, Claims { id: 9, ends, uses: ends.map(|_| 1) })
    }

    fn sent<T>(request: &Request<T>, token: &Token) -> bool {
        token.admits(request.metadata().get("authorization").unwrap().as_bytes())
    }

    #[tokio::test]
    async fn who_comes_with_a_token_goes_on_with_the_pass() {
        let (token, pass) = (token(b"run", Some(5)), token(b"run", None));
        let entry = Entry::new(Some(token.clone()));
        assert!(sent(&entry.ask(()), &token) && entry.pass().is_none());
        let waits = tokio::time::timeout(std::time::Duration::from_millis(20), entry.inside(())).await;
        assert!(waits.is_err(), "nothing is asked for before it is let in");
        let mut answer = MetadataMap::new();
        answer.insert(PASS, pass.reveal().parse().unwrap());
        entry.admitted(&answer);
        assert!(sent(&entry.inside(()).await, &pass) && entry.pass() == Some(pass.clone()));
        let again = Entry::new(Some(pass.clone()));
        again.admitted(&MetadataMap::new());
        assert!(sent(&again.ask(()), &pass) && sent(&again.inside(()).await, &pass));
    }

    #[test]
    fn a_pass_is_kept_for_the_same_run_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("worker.token.pass-host");
        assert_eq!(kept(&path, &token(b"run", Some(5))), None);
        let pass = token(b"run", None);
        keep(&path, &pass);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(kept(&path, &token(b"run", Some(5))), Some(pass));
        assert_eq!(kept(&path, &token(b"another", Some(5))), None);
        keep(&dir.path().join("none/pass"), &token(b"run", None));
    }
}
