//! Who the coordinator is: a CA, a certificate and a token for each role. Made at the first start and kept in the run
//! directory, for its owner only, until the run is over: a coordinator that was killed comes back as the same one.

use super::control::Tokens;
use super::setup::Error;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use unisono_proto::dial::{Claims, Role, Token, SERVER_NAME};

/// Name of the file within a run's directory.
pub const IDENTITY: &str = "identity.json";

pub struct Identity {
    /// CA certificate, PEM: tokens carry its hash.
    pub authority: String,
    pub tokens: Tokens,
    /// What tokens that are carried to other machines are sealed with.
    pub seal: Seal,
    pub server: Arc<rustls::ServerConfig>,
}

/// Makes and recognizes tokens that end. Shows no secret.
#[derive(Clone)]
pub struct Seal {
    key: [u8; 32],
    authority: Vec<u8>,
}

/// How many processes a token lets in, and for how long.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    pub hours: f64,
    pub uses: Option<u32>,
}

impl Seal {
    /// A token for somebody elsewhere.
    pub fn invite(&self, role: Role, terms: Terms) -> Token {
        let ends = now().saturating_add((terms.hours * 3600.0).ceil() as u64).max(1);
        Token::seal(&self.key, role, &self.authority, Claims { id: fresh(), ends: Some(ends), uses: terms.uses })
    }

    /// For a worker that was let in: nothing else is asked of it until the run is over.
    pub fn pass(&self) -> Token {
        Token::seal(&self.key, Role::Worker, &self.authority, Claims { id: fresh(), ends: None, uses: None })
    }

    /// What a call's `authorization` value claims, if it was made here.
    pub fn open(&self, authorization: &[u8]) -> Option<(Role, Claims)> {
        Token::open(&self.key, authorization)
    }
}

/// Seconds since the Unix epoch.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn fresh() -> u64 {
    u64::from_le_bytes(random())
}

/// Secret bytes.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    ring::default_provider().secure_random.fill(&mut bytes).expect("the system has a source of randomness");
    bytes
}

/// What is kept. All PEM.
#[derive(Serialize, Deserialize)]
struct Kept {
    authority: String,
    certificate: String,
    key: String,
    tokens: Tokens,
    /// 64 hexadecimal digits.
    seal: String,
}

impl Identity {
    /// The run's identity; a new one where there is none, or where it cannot be read whole.
    pub fn of(run_dir: &Path) -> Result<Self, Error> {
        let path = run_dir.join(IDENTITY);
        let kept = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Kept>(&text).ok());
        if let Some(identity) = kept.and_then(|kept| kept.identity().ok()) {
            return Ok(identity);
        }
        let failed = |error: Box<dyn std::error::Error>| Error::Certificate(error.to_string());
        let kept = make().map_err(failed)?;
        write(&path, &kept).map_err(|error| Error::File { path, problem: error.to_string() })?;
        kept.identity().map_err(failed)
    }

    /// The seal of the run in `run_dir`, while it is served.
    pub fn seal_of(run_dir: &Path) -> Result<Seal, Error> {
        let path = run_dir.join(IDENTITY);
        let unread = |problem: String| Error::File { path: path.clone(), problem };
        let text = fs::read(&path).map_err(|error| {
            unread(format!(
                "cannot be read ({error}); no coordinator runs in this run directory, or it belongs to another user"
            ))
        })?;
        let kept: Kept = serde_json::from_slice(&text).map_err(|error| unread(format!("damaged ({error})")))?;
        Ok(kept.identity().map_err(|error| unread(format!("damaged ({error})")))?.seal)
    }

    pub fn tokens(&self) -> Result<Vec<Token>, Error> {
        let Tokens { worker, monitor, operator } = &self.tokens;
        let parse = |text: &String| Token::parse(text).map_err(|error| Error::Certificate(error.to_string()));
        [worker, monitor, operator].into_iter().map(parse).collect()
    }
}

/// The run is over: nobody comes back.
pub fn forget(run_dir: &Path) {
    // Without it the next start makes another; left behind, it opens nothing.
    fs::remove_file(run_dir.join(IDENTITY)).ok();
}

impl Kept {
    fn identity(self) -> Result<Identity, Box<dyn std::error::Error>> {
        let chain = [&self.certificate, &self.authority].map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()));
        let [certificate, authority] = chain;
        let authority = authority?;
        let der = authority.to_vec();
        let private = PrivateKeyDer::from_pem_slice(self.key.as_bytes())?;
        let mut server = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![certificate?, authority], private)?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        let key = *blake3::Hash::from_hex(self.seal.as_bytes())?.as_bytes();
        let seal = Seal { key, authority: der };
        let identity = Identity { authority: self.authority, tokens: self.tokens, seal, server: Arc::new(server) };
        identity.tokens()?;
        Ok(identity)
    }
}

fn make() -> Result<Kept, Box<dyn std::error::Error>> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.distinguished_name.push(DnType::CommonName, "unisono run authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(vec![SERVER_NAME.to_string()])?;
    leaf.distinguished_name.push(DnType::CommonName, SERVER_NAME);
    let leaf = leaf.signed_by(&key, &authority)?;
    let token = |role| Token::generate(role, authority.der()).reveal();
    let tokens = Tokens { worker: token(Role::Worker), monitor: token(Role::Monitor), operator: token(Role::Operator) };
    let seal = blake3::Hash::from_bytes(random()).to_hex().to_string();
    Ok(Kept { authority: authority.pem(), certificate: leaf.pem(), key: key.serialize_pem(), tokens, seal })
}

/// Whole or not at all, readable by its owner only.
fn write(path: &Path, kept: &Kept) -> std::io::Result<()> {
    let partial = path.with_extension(format!("json.{}", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
    file.write_all(&serde_json::to_vec(kept)?)?;
    file.sync_all()?;
    fs::rename(&partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_is_the_same_until_the_run_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::of(dir.path()).unwrap();
        let path = dir.path().join(IDENTITY);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let again = Identity::of(dir.path()).unwrap();
        assert_eq!((&again.authority, &again.tokens.worker), (&first.authority, &first.tokens.worker));
        // What somebody was invited with before holds after.
        let invited = Identity::seal_of(dir.path()).unwrap().invite(Role::Monitor, Terms { hours: 1.0, uses: None });
        let mut request = tonic::Request::new(());
        invited.authorize(&mut request);
        let sent = request.metadata().get("authorization").unwrap().as_bytes();
        let (role, claims) = again.seal.open(sent).unwrap();
        assert_eq!((role, claims.uses), (Role::Monitor, None));
        assert!((now() + 3590..=now() + 3600).contains(&claims.ends.unwrap()));
        fs::write(&path, &fs::read(&path).unwrap()[..100]).unwrap();
        let other = Identity::of(dir.path()).unwrap();
        assert_ne!(other.tokens.worker, first.tokens.worker);
        forget(dir.path());
        assert!(Identity::seal_of(dir.path()).is_err_and(|error| error.to_string().contains("no coordinator runs")));
        assert_ne!(Identity::of(dir.path()).unwrap().tokens.worker, other.tokens.worker);
    }
}
