//! How a worker or a viewer reaches the coordinator: over a connection that proves whose it is before any secret leaves.
//!
//! The coordinator makes a CA and a certificate at each start and presents both. A token carries the hash of the CA
//! certificate, so whoever holds one recognizes the coordinator without any other file, on any address.

pub use crate::token::{Claims, Role, Token, PASS};
use crate::v1::{monitor_client::MonitorClient, training_client::TrainingClient};
use crate::MAX_MESSAGE_BYTES;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{ring, CryptoProvider};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
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
    let verifier = AuthorityVerifier { authority: token.authority(), provider: provider.clone() };
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

    #[tokio::test]
    async fn a_refused_connection_and_a_bad_address_are_told_apart() {
        let token = Token::generate(Role::Monitor, b"certificate");
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        assert!(matches!(dial(&closed, &token).await, Err(Error::Connect { .. })));
        assert!(matches!(dial("nowhere", &token).await, Err(Error::Address { .. })));
    }
}
