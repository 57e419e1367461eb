//! Who the coordinator is: a CA and a certificate, new at every start, kept in memory only.

use super::setup::Error;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;
use unisono_proto::dial::SERVER_NAME;

pub struct Identity {
    /// CA certificate: what tokens carry the hash of.
    pub authority: CertificateDer<'static>,
    /// The same, PEM.
    pub pem: String,
    pub server: Arc<rustls::ServerConfig>,
}

impl Identity {
    pub fn generate() -> Result<Self, Error> {
        make().map_err(|error| Error::Certificate(error.to_string()))
    }
}

fn make() -> Result<Identity, Box<dyn std::error::Error>> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.distinguished_name.push(DnType::CommonName, "unisono run authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(vec![SERVER_NAME.to_string()])?;
    leaf.distinguished_name.push(DnType::CommonName, SERVER_NAME);
    let leaf = leaf.signed_by(&key, &authority)?;
    let chain = vec![leaf.der().clone(), authority.der().clone()];
    let private = PrivateKeyDer::try_from(key.serialize_der())?;
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, private)?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Identity { authority: authority.der().clone(), pem: authority.pem(), server: Arc::new(server) })
}
