//! TLS of the MQTT listener: certificate and key from PEM files, one provider for the whole product.
//!
//! Not here: client certificates (not taken yet). Tests: `tests/it/mqtt.rs`.

use std::{path::Path, sync::Arc};

use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio_rustls::TlsAcceptor;

/// Why TLS cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `tls_listen` without the files it needs.
    #[error("mqtt.tls_listen needs mqtt.tls_cert and mqtt.tls_key")]
    Missing,
    /// A file that is not there or no PEM.
    #[error("{path}: {why}")]
    File {
        /// Which.
        path: String,
        /// Why.
        why: rustls_pki_types::pem::Error,
    },
    /// Certificate and key that do not serve.
    #[error("mqtt.tls_cert and mqtt.tls_key: {0}")]
    Refused(#[from] rustls::Error),
}

/// What accepts TLS connections with these files.
///
/// # Errors
/// [`Error`] when the files are missing, unreadable or do not fit together.
pub fn acceptor(cert: Option<&Path>, key: Option<&Path>) -> Result<TlsAcceptor, Error> {
    let (Some(cert), Some(key)) = (cert, key) else { return Err(Error::Missing) };
    let file = |path: &Path| {
        let path = path.display().to_string();
        move |why| Error::File { path, why }
    };
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect).map_err(file(cert))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(file(key))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
