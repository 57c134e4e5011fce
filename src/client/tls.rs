//! [`Tls`]: the certificates that a client trusts, and the client's own certificate.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

/// The TLS settings of a client. The verification of certificates cannot be turned off. Two values are equal if they were made
/// from the same certificates and keys.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    fingerprint: u64,
}

impl PartialEq for Tls {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

/// The default trusts no certificate, so it is suitable for plain HTTP only.
impl Default for Tls {
    fn default() -> Self {
        Self::trusting(RootCertStore::empty())
    }
}

/// A certificate chain and its private key.
pub(crate) type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Tls {
    /// Returns settings that trust the certificates that the system trusts.
    ///
    /// # Errors
    /// When the system has no trusted certificates. The error is a sentence that tells the user what to do.
    pub fn system() -> Result<Self, String> {
        Ok(Self::trusting(system_roots()?))
    }

    fn trusting(roots: RootCertStore) -> Self {
        let fingerprint = fingerprint(&roots, None);
        Self { config: Arc::new(builder(roots).with_no_client_auth()), fingerprint }
    }

    /// Returns settings that trust `roots`, and present `identity` to a server that asks for a client certificate.
    ///
    /// # Errors
    /// When the key does not belong to the certificate.
    pub(crate) fn new(roots: RootCertStore, identity: Option<Identity>) -> Result<Self, String> {
        let Some(identity) = identity else { return Ok(Self::trusting(roots)) };
        let fingerprint = fingerprint(&roots, Some(&identity));
        let (chain, key) = identity;
        let config = builder(roots).with_client_auth_cert(chain, key).map_err(|error| error.to_string())?;
        Ok(Self { config: Arc::new(config), fingerprint })
    }

    /// Returns the configuration for connections that offer these ALPN protocols.
    pub(super) fn speaking(&self, protocols: &[&str]) -> ClientConfig {
        let mut config = ClientConfig::clone(&self.config);
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        config
    }
}

fn fingerprint(roots: &RootCertStore, identity: Option<&Identity>) -> u64 {
    let mut hasher = DefaultHasher::new();
    for root in &roots.roots {
        (root.subject.as_ref(), root.subject_public_key_info.as_ref()).hash(&mut hasher);
    }
    identity.map(|(chain, key)| (chain, key.secret_der())).hash(&mut hasher);
    hasher.finish()
}

fn builder(roots: RootCertStore) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    #[expect(clippy::expect_used, reason = "the versions are the provider's own, so it has them")]
    versions.expect("ring speaks the default versions of TLS").with_root_certificates(roots)
}

/// Returns the certificates that the system trusts.
pub(crate) fn system_roots() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    match added {
        0 => Err("this system has no trusted certificates; install ca-certificates, or name a file with --tls-ca, \
                 ZIZQ_TLS_CA, or ca in the file's [tls]"
            .to_owned()),
        _ => Ok(roots),
    }
}

/// Returns the certificates of a PEM file, as trusted roots.
pub(crate) fn roots_from_pem(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|error| format!("holds a certificate that cannot be used: {error}"))?;
    }
    Ok(roots)
}

/// Returns the certificates of a PEM file, in the order of the file.
pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err("holds no certificate in PEM".to_owned()),
        Err(error) => Err(format!("is not PEM: {error}")),
    }
}

/// Returns the first private key of a PEM file.
pub(crate) fn private_key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| format!("holds no private key in PEM: {error}"))
}
