//! TLS: an authority made at run time, and the certificates it signs.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

/// A certificate authority of a test cluster.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key, both PEM.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// Its private key (PKCS 8).
    pub key: String,
}

/// How a server speaks TLS.
#[derive(Debug, Clone)]
pub struct Tls {
    /// The server's own certificate.
    pub identity: Identity,
    /// PEM of the authority whose client certificates count as credentials; a client without one may
    /// still come with a token.
    pub client_authority: Option<String>,
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

impl Authority {
    /// A new authority; no two trust each other.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new(name: &str) -> io::Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().map_err(failed)?;
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, key).map_err(failed)? })
    }

    /// Its certificate, as `ca.crt` holds it.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for a server at these addresses.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn server(&self, addresses: &[IpAddr]) -> io::Result<Identity> {
        let names: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        self.sign(names, "kube-apiserver", ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A certificate for a client of this name.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn client(&self, name: &str) -> io::Result<Identity> {
        self.sign(Vec::new(), name, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn sign(&self, names: Vec<String>, common: &str, usage: ExtendedKeyUsagePurpose) -> io::Result<Identity> {
        let mut params = CertificateParams::new(names).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, common);
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().map_err(failed)?;
        let signed = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(Identity { certificate: signed.pem(), key: key.serialize_pem() })
    }
}

impl Tls {
    pub(crate) fn acceptor(&self) -> io::Result<TlsAcceptor> {
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(failed)?;
        let builder = match &self.client_authority {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let mut roots = RootCertStore::empty();
                for der in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                    roots.add(der.map_err(failed)?).map_err(failed)?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .allow_unauthenticated()
                    .build()
                    .map_err(failed)?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let chain = CertificateDer::pem_slice_iter(self.identity.certificate.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed)?;
        let key = PrivateKeyDer::from_pem_slice(self.identity.key.as_bytes()).map_err(failed)?;
        let config = builder.with_single_cert(chain, key).map_err(failed)?;
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}
