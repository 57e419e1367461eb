//! How a worker or a viewer reaches the coordinator: the token that names the coordinator's CA, and the connection that
//! proves it before any secret leaves.
//!
//! The coordinator makes a CA and a certificate at each start and presents both. A token carries the hash of the CA
//! certificate, so whoever holds one recognizes the coordinator without any other file, on any address.

use crate::v1::{monitor_client::MonitorClient, training_client::TrainingClient};
use crate::MAX_MESSAGE_BYTES;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{ring, CryptoProvider};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint, Uri};

/// The name in the coordinator's certificate, whatever its address.
pub const SERVER_NAME: &str = "unisono-coordinator";

/// Seconds after which a connection that does not come about is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Between the pings of a viewer, and bytes that may be on their way to it.
const VIEWER_PING: Duration = Duration::from_secs(20);
const VIEWER_WINDOW: u32 = (1 << 16) - 1;

/// Why the coordinator cannot be reached. Each is one sentence for a person.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("neither UNISONO_TOKEN nor UNISONO_TOKEN_FILE is set; set one of them to the token, or the file with the token, that the coordinator wrote into its run directory's control.json")]
    NoToken,
    #[error("{path}: cannot be read ({problem}); UNISONO_TOKEN_FILE must name the file with the token")]
    TokenFile { path: PathBuf, problem: String },
    #[error("the token {problem}; a token reads unisono1.<worker|monitor|operator>.<64 hexadecimal digits>.<claims, if any>.<64 hexadecimal digits>, copy it whole from the file that it came in, or from the run directory's control.json")]
    Token { problem: &'static str },
    #[error("\"{address}\" is not an address; give host:port, for example 127.0.0.1:7070")]
    Address { address: String },
    #[error("{address}: no connection to the coordinator ({problem}); check that it runs and listens on this address")]
    Connect { address: String, problem: String },
    #[error("{address}: no answer within {seconds} s; check the address and that no firewall stands between")]
    Timeout { address: String, seconds: u64 },
    #[error("{address}: this is not the coordinator that the token is for (its CA certificate has another hash), so nothing secret was sent; take the token from the control.json of the run that listens there")]
    WrongAuthority { address: String },
    #[error("{address}: the TLS handshake failed ({problem}); check that the address is a Unisono coordinator's")]
    Tls { address: String, problem: String },
}

impl Error {
    /// Whether the coordinator may only not be there yet, or not any more for a moment.
    pub fn may_pass(&self) -> bool {
        matches!(self, Error::Connect { .. } | Error::Timeout { .. } | Error::Tls { .. })
    }
}

/// What the holder of a token may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Takes part in a run.
    Worker,
    /// Looks on.
    Monitor,
    /// Looks on and commands.
    Operator,
}

impl Role {
    pub const ALL: [Role; 3] = [Role::Worker, Role::Monitor, Role::Operator];

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Role::Worker => "worker",
            Role::Monitor => "monitor",
            Role::Operator => "operator",
        }
    }
}

/// What a token says of itself, under the coordinator's seal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claims {
    pub id: u64,
    /// Seconds since the Unix epoch; `None`: it ends with the run. Such a one is a pass, which a worker is given when it is let in.
    pub ends: Option<u64>,
    /// Processes that it lets in, each of which gets a pass; `None`: any number.
    pub uses: Option<u32>,
}

impl Claims {
    fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let [id, ends, uses] = parts[..] else { return None };
        // One spelling for each, so that none can be told from another by it.
        let claims = Claims {
            id: u64::from_str_radix(id, 16).ok()?,
            ends: Some(ends.parse().ok()?).filter(|&ends| ends > 0),
            uses: Some(uses.parse().ok()?).filter(|&uses| uses > 0),
        };
        (claims.to_string() == text).then_some(claims)
    }
}

impl fmt::Display for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}-{}", self.id, self.ends.unwrap_or(0), self.uses.unwrap_or(0))
    }
}

/// A role's secret, bound to one coordinator by the hash of its CA certificate. With claims it is made to be carried to other
/// machines, and its secret is the coordinator's seal on them.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    role: Role,
    authority: blake3::Hash,
    claims: Option<Claims>,
    secret: [u8; 32],
}

/// Where the coordinator puts the pass of a worker that it lets in.
pub const PASS: &str = "unisono-pass";

impl Token {
    /// A new secret for `role` at the coordinator whose CA certificate is `authority` (DER).
    pub fn generate(role: Role, authority: &[u8]) -> Self {
        let mut secret = [0; 32];
        ring::default_provider().secure_random.fill(&mut secret).expect("the system has a source of randomness");
        Token { role, authority: blake3::hash(authority), claims: None, secret }
    }

    /// One with `claims`, which whoever has `key` recognizes.
    pub fn seal(key: &[u8; 32], role: Role, authority: &[u8], claims: Claims) -> Self {
        let secret = *seal(key, role, &claims).as_bytes();
        Token { role, authority: blake3::hash(authority), claims: Some(claims), secret }
    }

    /// What a call's `authorization` value claims, if it was sealed with `key`. Takes the same time for every seal.
    pub fn open(key: &[u8; 32], authorization: &[u8]) -> Option<(Role, Claims)> {
        let text = std::str::from_utf8(authorization).ok()?.strip_prefix("Bearer ")?;
        let parts: Vec<&str> = text.split('.').collect();
        let [role, claims, secret] = parts[..] else { return None };
        let (role, claims) = (Role::parse(role)?, Claims::parse(claims)?);
        (blake3::Hash::from_hex(secret).ok()? == seal(key, role, &claims)).then_some((role, claims))
    }

    /// The pass that the coordinator answered the first call with this token with.
    pub fn pass(&self, answer: &tonic::metadata::MetadataMap) -> Option<Self> {
        let text = answer.get(PASS)?.to_str().ok()?;
        let pass = Self::parse(text).ok()?;
        (pass.authority == self.authority && pass.role == self.role).then_some(pass)
    }

    pub fn claims(&self) -> Option<Claims> {
        self.claims
    }

    /// Whether it is for the same coordinator and role.
    pub fn stands_for(&self, other: &Self) -> bool {
        self.role == other.role && self.authority == other.authority
    }

    pub fn parse(text: &str) -> Result<Self, Error> {
        let fail = |problem| Error::Token { problem };
        let parts: Vec<&str> = text.trim().split('.').collect();
        let (version, role, authority, claims, secret) = match parts[..] {
            [version, role, authority, secret] => (version, role, authority, None, secret),
            [version, role, authority, claims, secret] => (version, role, authority, Some(claims), secret),
            _ => return Err(fail("does not have four or five parts separated by dots")),
        };
        if version != "unisono1" {
            return Err(fail("does not start with \"unisono1.\""));
        }
        let role = Role::parse(role).ok_or(fail("names an unknown role"))?;
        let claims = claims.map(|claims| Claims::parse(claims).ok_or(fail("has damaged claims"))).transpose()?;
        let authority = blake3::Hash::from_hex(authority).map_err(|_| fail("has a damaged certificate hash"))?;
        let secret = blake3::Hash::from_hex(secret).map_err(|_| fail("has a damaged secret"))?;
        Ok(Token { role, authority, claims, secret: *secret.as_bytes() })
    }

    /// From `UNISONO_TOKEN`, else from the file that `UNISONO_TOKEN_FILE` names. Never an argument: those are public.
    pub fn from_environment() -> Result<Self, Error> {
        if let Ok(text) = std::env::var("UNISONO_TOKEN") {
            return Self::parse(&text);
        }
        let path = PathBuf::from(std::env::var_os("UNISONO_TOKEN_FILE").ok_or(Error::NoToken)?);
        let text = std::fs::read_to_string(&path)
            .map_err(|source| Error::TokenFile { path: path.clone(), problem: source.to_string() })?;
        Self::parse(&text)
    }

    /// The whole token, secret included: only for a 0600 file or a child's environment.
    pub fn reveal(&self) -> String {
        let claims = self.claims.map(|claims| format!("{claims}.")).unwrap_or_default();
        format!("unisono1.{}.{}.{claims}{}", self.role.name(), self.authority.to_hex(), self.secret_hex())
    }

    pub fn role(&self) -> Role {
        self.role
    }

    /// Whether a call's `authorization` value presents this token's secret. Takes the same time for every value.
    pub fn admits(&self, authorization: &[u8]) -> bool {
        blake3::hash(authorization) == blake3::hash(self.bearer().as_bytes())
    }

    /// Adds the secret to a call.
    pub fn authorize<T>(&self, request: &mut tonic::Request<T>) {
        let mut value: tonic::metadata::MetadataValue<_> = self.bearer().parse().expect("names and numbers are ASCII");
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
    }

    fn bearer(&self) -> String {
        match self.claims {
            Some(claims) => format!("Bearer {}.{claims}.{}", self.role.name(), self.secret_hex()),
            None => format!("Bearer {}", self.secret_hex()),
        }
    }

    fn secret_hex(&self) -> String {
        blake3::Hash::from_bytes(self.secret).to_hex().to_string()
    }
}

fn seal(key: &[u8; 32], role: Role, claims: &Claims) -> blake3::Hash {
    blake3::keyed_hash(key, format!("unisono1.{}.{claims}", role.name()).as_bytes())
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}, authority {}, secret withheld)", self.role.name(), &self.authority.to_hex()[..8])
    }
}

/// Connects to the coordinator at `address` (host:port) and proves that it is the token's. The connection speaks TLS 1.3
/// and stays alive by HTTP/2 pings. Calls still need [`Token::authorize`]; wrap the channel in [`training`] or
/// [`monitor`], which set the message limits.
pub async fn dial(address: &str, token: &Token) -> Result<Channel, Error> {
    dial_with(address, token, |endpoint| endpoint).await
}

/// The same, with `settings` of the caller's.
pub async fn dial_with(
    address: &str,
    token: &Token,
    settings: impl FnOnce(Endpoint) -> Endpoint,
) -> Result<Channel, Error> {
    let wrong = || Error::Address { address: address.into() };
    let port = address.rsplit_once(':').ok_or_else(wrong)?.1;
    port.parse::<u16>().map_err(|_| wrong())?;
    let uri: Uri = format!("http://{address}").parse().map_err(|_| wrong())?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client_config(token)));
    // Tonic wraps a connector's error beyond recognition; the first one is kept here as it was.
    let failure = Arc::new(Mutex::new(None));
    let slot = failure.clone();
    let target = address.to_string();
    let service = tower::service_fn(move |_: Uri| {
        let (connector, target, slot) = (connector.clone(), target.clone(), slot.clone());
        async move {
            let stream = connect(&connector, &target).await;
            stream.map(hyper_util::rt::TokioIo::new).inspect_err(|error| {
                *slot.lock().expect("nobody panics while holding it") = Some(error.clone());
            })
        }
    });
    let endpoint = Endpoint::from(uri).keep_alive_timeout(Duration::from_secs(20)).keep_alive_while_idle(true);
    let endpoint = match token.role() {
        Role::Worker => endpoint.http2_keep_alive_interval(Duration::from_secs(5)),
        // There may be a thousand of these. Of what is sent ahead of their reading, the coordinator may keep a part.
        Role::Monitor | Role::Operator => endpoint
            .http2_keep_alive_interval(VIEWER_PING)
            .initial_stream_window_size(VIEWER_WINDOW)
            .initial_connection_window_size(VIEWER_WINDOW),
    };
    settings(endpoint).connect_with_connector(service).await.map_err(|error| {
        let recorded = failure.lock().expect("nobody panics while holding it").take();
        recorded.unwrap_or_else(|| Error::Connect { address: address.into(), problem: error.to_string() })
    })
}

/// The worker-facing service over a channel, with the limits both ways.
pub fn training(channel: Channel) -> TrainingClient<Channel> {
    TrainingClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// The viewer-facing service over a channel, with the limits both ways.
pub fn monitor(channel: Channel) -> MonitorClient<Channel> {
    MonitorClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

type TlsStream = tokio_rustls::client::TlsStream<tokio::net::TcpStream>;

async fn connect(connector: &tokio_rustls::TlsConnector, address: &str) -> Result<TlsStream, Error> {
    let attempt = async {
        let tcp = tokio::net::TcpStream::connect(address)
            .await
            .map_err(|error| Error::Connect { address: address.into(), problem: error.to_string() })?;
        // Directives and reports are small and waited for.
        tcp.set_nodelay(true)
            .map_err(|error| Error::Connect { address: address.into(), problem: error.to_string() })?;
        let name = ServerName::try_from(SERVER_NAME).expect("a valid DNS name");
        connector.connect(name, tcp).await.map_err(|error| {
            let wrong = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()).is_some_and(|e| {
                matches!(e, rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
            });
            match wrong {
                true => Error::WrongAuthority { address: address.into() },
                false => Error::Tls { address: address.into(), problem: error.to_string() },
            }
        })
    };
    tokio::time::timeout(CONNECT_TIMEOUT, attempt)
        .await
        .unwrap_or_else(|_| Err(Error::Timeout { address: address.into(), seconds: CONNECT_TIMEOUT.as_secs() }))
}

fn client_config(token: &Token) -> rustls::ClientConfig {
    let provider = Arc::new(ring::default_provider());
    let verifier = AuthorityVerifier { authority: token.authority, provider: provider.clone() };
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring speaks TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// Accepts a server that presents the CA certificate with the known hash and a certificate that this CA signed.
#[derive(Debug)]
struct AuthorityVerifier {
    authority: blake3::Hash,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AuthorityVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|c| blake3::hash(c) == self.authority)
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_hides_its_secret() {
        let token = Token::generate(Role::Worker, b"certificate");
        let text = token.reveal();
        let parsed = Token::parse(&format!("{text}\n")).unwrap();
        assert_eq!(parsed, token);
        let secret = text.rsplit('.').next().unwrap();
        assert!(!format!("{token:?}").contains(secret));
        assert_ne!(Token::generate(Role::Worker, b"certificate"), token);
        let mut request = tonic::Request::new(());
        token.authorize(&mut request);
        assert!(!format!("{request:?}").contains(secret));
        let sent = request.metadata().get("authorization").unwrap();
        assert!(token.admits(sent.as_bytes()));
        assert!(!Token::generate(Role::Worker, b"certificate").admits(sent.as_bytes()));
    }

    #[test]
    fn what_a_token_claims_cannot_be_changed() {
        let key = [7; 32];
        let claims = Claims { id: 0xfeed, ends: Some(1_800_000_000), uses: Some(4) };
        let token = Token::seal(&key, Role::Worker, b"certificate", claims);
        assert_eq!(Token::parse(&token.reveal()).unwrap(), token);
        let bearer = token.bearer();
        assert_eq!(Token::open(&key, bearer.as_bytes()), Some((Role::Worker, claims)));
        assert_eq!(Token::open(&[8; 32], bearer.as_bytes()), None);
        let changes = [
            ("worker", "operator"),
            ("1800000000", "1900000000"),
            ("1800000000", "0"),
            ("-4", "-5"),
            ("-4", "-04"),
            ("000feed", "000feee"),
        ];
        for (from, to) in changes {
            let changed = bearer.replace(from, to);
            assert!(changed != bearer && Token::open(&key, changed.as_bytes()).is_none(), "{changed}");
        }
        let secret = token.reveal().rsplit('.').next().unwrap().to_owned();
        assert!(!token.admits(format!("Bearer {secret}").as_bytes()) && token.admits(bearer.as_bytes()));
        for claims in ["", "1-2", "000000000000feed-1-2-3", "feed-1-2", "000000000000feed--1", "000000000000feed-x-1"] {
            assert_eq!(Claims::parse(claims), None, "{claims}");
        }
    }

    #[test]
    fn damaged_tokens_are_refused_without_repeating_them() {
        let good = Token::generate(Role::Monitor, b"certificate").reveal();
        let bad = [
            "".into(),
            good.replace("unisono1", "unisono2"),
            good.replace("monitor", "king"),
            good[..good.len() - 1].into(),
        ];
        for text in bad {
            let message = Token::parse(&text).unwrap_err().to_string();
            assert!(message.contains("copy it whole"), "{message}");
            assert!(text.is_empty() || !message.contains(&text));
        }
    }

    #[tokio::test]
    async fn a_refused_connection_and_a_bad_address_are_told_apart() {
        let token = Token::generate(Role::Monitor, b"certificate");
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        assert!(matches!(dial(&closed, &token).await, Err(Error::Connect { .. })));
        assert!(matches!(dial("nowhere", &token).await, Err(Error::Address { .. })));
    }
}
