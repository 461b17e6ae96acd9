//! TLS over a socket that does not block, and the credentials for it.
//!
//! The session and its socket are used under one short lock, by the present reader or writer; workers hand
//! their replies over by the connection's queue and never wait here.

use std::io::{self, IoSlice, Read, Write};
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use super::ServerError;
use super::socket::Socket;
use crate::tls_error::words;

/// Plain bytes that a session takes before they are encrypted and sent.
const SEND_LIMIT: usize = 256 << 10;

/// Whether and how a server speaks TLS.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum TlsPolicy {
    /// Not at all.
    #[default]
    Off,
    /// With clients that ask for it.
    Allow(Arc<ServerConfig>),
    /// With every client; others get no answer but that.
    Require(Arc<ServerConfig>),
}

impl TlsPolicy {
    pub(crate) fn config(&self) -> Option<&Arc<ServerConfig>> {
        match self {
            Self::Off => None,
            Self::Allow(config) | Self::Require(config) => Some(config),
        }
    }

    pub(crate) fn is_required(&self) -> bool {
        matches!(self, Self::Require(_))
    }
}

/// Credentials from a folder laid out as QEMU's `tls-creds-x509` objects want it: `server-cert.pem` and
/// `server-key.pem`, and with `verify_peer` also `ca-cert.pem` and, if it is there, `ca-crl.pem`: then only
/// clients with a certificate of that authority get in.
///
/// # Errors
/// [`ServerError::Credentials`] with the file that cannot be read or used.
pub fn x509_credentials(folder: &Path, verify_peer: bool) -> Result<Arc<ServerConfig>, ServerError> {
    let bad = |file: &str, why: &dyn std::fmt::Display| ServerError::Credentials {
        reason: format!("{}: {why}", folder.join(file).display()),
    };
    let certs = |file: &str| -> Result<Vec<CertificateDer<'static>>, ServerError> {
        let found: Vec<_> = CertificateDer::pem_file_iter(folder.join(file))
            .and_then(Iterator::collect)
            .map_err(|e| bad(file, &e))?;
        if found.is_empty() { Err(bad(file, &"holds no certificate")) } else { Ok(found) }
    };
    let chain = certs("server-cert.pem")?;
    let key =
        PrivateKeyDer::from_pem_file(folder.join("server-key.pem")).map_err(|e| bad("server-key.pem", &e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| bad("server-cert.pem", &e))?;
    let builder = if verify_peer {
        let mut roots = RootCertStore::empty();
        for cert in certs("ca-cert.pem")? {
            roots.add(cert).map_err(|e| bad("ca-cert.pem", &e))?;
        }
        let mut crls = Vec::new();
        if folder.join("ca-crl.pem").exists() {
            crls = CertificateRevocationListDer::pem_file_iter(folder.join("ca-crl.pem"))
                .and_then(Iterator::collect)
                .map_err(|e| bad("ca-crl.pem", &e))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .with_crls(crls)
            .build()
            .map_err(|e| bad("ca-cert.pem", &e))?;
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let config = builder.with_single_cert(chain, key).map_err(|e| bad("server-cert.pem", &words(&e)))?;
    Ok(Arc::new(config))
}

/// The session of one connection.
pub(crate) struct TlsSession(Mutex<ServerConnection>);

impl TlsSession {
    pub(crate) fn new(config: &Arc<ServerConfig>) -> Result<Self, rustls::Error> {
        let mut session = ServerConnection::new(Arc::clone(config))?;
        session.set_buffer_limit(Some(SEND_LIMIT));
        Ok(Self(Mutex::new(session)))
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        self.0.lock().is_handshaking()
    }

    /// One step of the handshake: receives what has arrived and sends what is due. True if it waits to write.
    pub(crate) fn turn(&self, socket: &Socket) -> io::Result<bool> {
        let mut session = self.0.lock();
        match flush(&mut session, socket) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            other => other?,
        }
        if session.is_handshaking() {
            take(&mut session, socket)?;
        }
        match flush(&mut session, socket) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(true),
            other => other.map(|()| false),
        }
    }

    pub(crate) fn recv(&self, socket: &Socket, buf: &mut [u8]) -> io::Result<usize> {
        let mut session = self.0.lock();
        loop {
            match session.reader().read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // A peer that closes without saying so has gone all the same: requests have lengths of their
                // own.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
            take(&mut session, socket)?;
            // Answers of the session itself (key updates, alerts); what does not go out now goes with the
            // next reply.
            match flush(&mut session, socket) {
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                _ => {}
            }
        }
    }

    pub(crate) fn send(&self, socket: &Socket, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut session = self.0.lock();
        let taken = session.writer().write_vectored(parts)?;
        match flush(&mut session, socket) {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e),
            Err(e) if taken == 0 => Err(e),
            _ if taken == 0 => Ok(session.writer().write_vectored(parts)?),
            _ => Ok(taken),
        }
    }

    /// Says that nothing more comes, as far as there is room to say so.
    pub(crate) fn close(&self, socket: &Socket) {
        let mut session = self.0.lock();
        session.send_close_notify();
        let _ = flush(&mut session, socket);
    }

    pub(crate) fn flush(&self, socket: &Socket) -> io::Result<()> {
        flush(&mut self.0.lock(), socket)
    }
}

/// Takes encrypted bytes in and decrypts them.
fn take(session: &mut ServerConnection, socket: &Socket) -> io::Result<()> {
    if session.read_tls(&mut SocketIo(socket))? == 0 {
        return if session.is_handshaking() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) };
    }
    if let Err(e) = session.process_new_packets() {
        // The alert that tells the peer why; it is too late for anything else.
        let _ = session.write_tls(&mut SocketIo(socket));
        return Err(io::Error::new(io::ErrorKind::InvalidData, e));
    }
    Ok(())
}

fn flush(session: &mut ServerConnection, socket: &Socket) -> io::Result<()> {
    while session.wants_write() {
        session.write_tls(&mut SocketIo(socket))?;
    }
    Ok(())
}

/// A socket in the words of `std::io`.
struct SocketIo<'a>(&'a Socket);

impl Read for SocketIo<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.recv(buf)
    }
}

impl Write for SocketIo<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.send(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.send(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
