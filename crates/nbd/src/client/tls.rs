//! TLS credentials of a client: whom it trusts, and who it says it is.
//!
//! The files are those of QEMU's `tls-creds-x509` and of libnbd: in one directory `ca-cert.pem`, and if the
//! server asks who is there `client-cert.pem` and `client-key.pem`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, Error as TlsError,
    RootCertStore, SignatureScheme,
};

use super::error::ClientError;
use crate::tls_error::words;

/// Where systems keep the authorities that they trust.
const SYSTEM_AUTHORITIES: [&str; 2] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// What a client needs to set up TLS.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct TlsOptions {
    /// A directory with `ca-cert.pem`, and perhaps `client-cert.pem` and `client-key.pem`. Without one the
    /// system's authorities are trusted and the client has no certificate.
    pub directory: Option<PathBuf>,
    /// The name that the server's certificate must have. Without one it is the host's; a Unix domain socket
    /// has none.
    pub server_name: Option<String>,
    /// Accepts any server. The connection is encrypted, but the peer is not authenticated.
    pub accept_any_server: bool,
}

/// Loaded credentials, for any number of connections.
#[derive(Clone)]
pub(crate) struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files. `host` is the name of the server if the options do not say another.
    pub(crate) fn load(options: &TlsOptions, host: Option<&str>) -> Result<Self, ClientError> {
        let provider = Arc::new(ring::default_provider());
        let name = match options.server_name.as_deref().or(host) {
            Some(name) => ServerName::try_from(name.to_owned())
                .map_err(|_| ClientError::Tls(format!("\"{name}\" is not the name of a server")))?,
            // The name is only looked at if the certificate is.
            None if options.accept_any_server => ServerName::from(std::net::Ipv4Addr::LOCALHOST),
            None => {
                return Err(ClientError::Tls(
                    "which name the server's certificate must have is not known (tls-hostname)".into(),
                ));
            }
        };
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| ClientError::Tls(e.to_string()))?;
        let builder = if options.accept_any_server {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer(provider)))
        } else {
            builder.with_root_certificates(authorities(options.directory.as_deref())?)
        };
        let own = options.directory.as_deref().map(own_certificate).transpose()?.flatten();
        let config = match own {
            None => builder.with_no_client_auth(),
            Some((shown, chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|e| ClientError::Tls(format!("{}: {}", shown.display(), words(&e))))?,
        };
        Ok(Self { config: Arc::new(config), name })
    }

    /// The state of a new connection.
    pub(crate) fn connection(&self) -> Result<ClientConnection, ClientError> {
        ClientConnection::new(Arc::clone(&self.config), self.name.clone())
            .map_err(|e| ClientError::Tls(e.to_string()))
    }
}

fn authorities(directory: Option<&Path>) -> Result<RootCertStore, ClientError> {
    let file = match directory {
        Some(directory) => directory.join("ca-cert.pem"),
        None => SYSTEM_AUTHORITIES
            .iter()
            .map(PathBuf::from)
            .find(|path| path.exists())
            .ok_or_else(|| ClientError::Tls("this system trusts no authority; give a directory".into()))?,
    };
    let mut store = RootCertStore::empty();
    for certificate in certificates(&file)? {
        match store.add(certificate) {
            Ok(()) => {}
            // One odd certificate among a system's many does no harm; it is just not trusted.
            Err(_) if directory.is_none() => {}
            Err(e) => return Err(ClientError::Tls(format!("{}: {e}", file.display()))),
        }
    }
    if store.is_empty() {
        return Err(ClientError::Tls(format!("{}: it holds no certificate", file.display())));
    }
    Ok(store)
}

/// The file of the certificate, what it holds, and its key.
type Own = (PathBuf, Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The client's certificate and key, if they are there.
fn own_certificate(directory: &Path) -> Result<Option<Own>, ClientError> {
    let (certificate, key) = (directory.join("client-cert.pem"), directory.join("client-key.pem"));
    if !certificate.exists() && !key.exists() {
        return Ok(None);
    }
    let chain = certificates(&certificate)?;
    let key = PrivateKeyDer::from_pem_file(&key)
        .map_err(|e| ClientError::Tls(format!("{}: {e}", key.display())))?;
    Ok(Some((certificate, chain, key)))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, ClientError> {
    CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|e| ClientError::Tls(format!("{}: {e}", file.display())))
}

/// What went wrong, if an error of a stream is one of TLS.
pub(crate) fn cause(error: &std::io::Error) -> Option<ClientError> {
    let error = error.get_ref()?.downcast_ref::<TlsError>()?;
    Some(ClientError::Tls(match error {
        TlsError::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the server's certificate is not from an authority that is trusted".into()
        }
        other => words(other),
    }))
}

/// Believes every certificate; still wants the server to have the key that belongs to it.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
