//! What a connection is read from and written to: a socket as it is, or TLS over one.
//!
//! Nothing here blocks. Used by the handshake, which waits itself, and then by connections, which are woken
//! by epoll.

use std::io::{self, IoSlice};

use super::socket::Socket;
#[cfg(feature = "tls")]
use super::tls::TlsSession;

/// A way to the client.
pub(crate) struct Transport {
    pub(crate) socket: std::sync::Arc<Socket>,
    #[cfg(feature = "tls")]
    tls: Option<Box<TlsSession>>,
}

impl Transport {
    pub(crate) fn plain(socket: std::sync::Arc<Socket>) -> Self {
        Self {
            socket,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// The same socket with TLS over it from here on.
    #[cfg(feature = "tls")]
    pub(crate) fn with_tls(self, session: TlsSession) -> Self {
        Self { socket: self.socket, tls: Some(Box::new(session)) }
    }

    /// Whether TLS is spoken.
    pub(crate) fn is_tls(&self) -> bool {
        #[cfg(feature = "tls")]
        if self.tls.is_some() {
            return true;
        }
        false
    }

    /// Receives what is there; [`io::ErrorKind::WouldBlock`] if nothing is, zero at the end.
    pub(crate) fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.recv(&self.socket, buf);
        }
        self.socket.recv(buf)
    }

    /// Takes as much of `parts` as there is room for; [`io::ErrorKind::WouldBlock`] if there is none.
    pub(crate) fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.send(&self.socket, parts);
        }
        self.socket.send(parts)
    }

    /// Sends what [`send`](Self::send) took and keeps; [`io::ErrorKind::WouldBlock`] if the socket takes no
    /// more.
    pub(crate) fn flush(&self) -> io::Result<()> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.flush(&self.socket);
        }
        Ok(())
    }

    /// Ends it, politely where there is a way to.
    pub(crate) fn close(&self) {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            tls.close(&self.socket);
        }
        self.socket.shutdown();
    }

    /// Whether a short receive has emptied the socket, so that epoll reports what comes next. Not so with
    /// TLS, which may hold bytes that have left the socket already.
    pub(crate) fn short_means_drained(&self) -> bool {
        !self.is_tls()
    }
}
