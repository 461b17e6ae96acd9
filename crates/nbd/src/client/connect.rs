//! Connecting: from options to a connection that is ready for requests. Socket, TLS and handshake share one
//! deadline.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use blockmirror_block::cancel::POLL_INTERVAL;

use super::connection::ClientConnection;
use super::error::ClientError;
use super::handshake::{Handshake, HandshakeRequest, NegotiatedExport};
use super::link::Link;
use super::options::ClientOptions;
use super::socket::{ClientSocket, Timed};
#[cfg(feature = "tls")]
use super::tls::{self, Tls};
use crate::proto::BASE_ALLOCATION;

/// Makes connections to one export.
#[derive(Debug)]
pub(crate) struct Connector {
    options: ClientOptions,
    #[cfg(feature = "tls")]
    tls: Option<Tls>,
}

/// Cancels a connection attempt.
pub(crate) trait CancelToken {
    /// Whether the attempt was cancelled.
    fn is_cancelled(&self) -> bool;
    /// Registers the socket of the attempt: shutting it down ends the handshake.
    fn register(&self, socket: &Arc<ClientSocket>);
}

impl Connector {
    /// Reads the credentials, if any are needed.
    pub(crate) fn new(options: ClientOptions) -> Result<Self, ClientError> {
        #[cfg(feature = "tls")]
        let tls = if options.uri.tls {
            Some(Tls::load(&options.tls, options.uri.certificate_name())?)
        } else {
            None
        };
        #[cfg(not(feature = "tls"))]
        if options.uri.tls {
            return Err(ClientError::Tls("this program was built without it".into()));
        }
        Ok(Self {
            options,
            #[cfg(feature = "tls")]
            tls,
        })
    }

    pub(crate) fn options(&self) -> &ClientOptions {
        &self.options
    }

    /// Makes a connection that will belong to `epoch`.
    pub(crate) fn connect(
        &self,
        cancel: &dyn CancelToken,
        epoch: u64,
    ) -> Result<ClientConnection, ClientError> {
        let limit = self.options.handshake_timeout;
        let deadline = Instant::now() + limit;
        let named = |error: io::Error| match error.kind() {
            io::ErrorKind::TimedOut if Instant::now() >= deadline => ClientError::TimedOut(limit),
            _ if cancel.is_cancelled() => ClientError::Cancelled,
            _ => ClientError::Connect(Arc::new(error)),
        };
        let address = &self.options.uri.address;
        let socket =
            ClientSocket::connect(address, deadline, self.options.peer_timeout, &|| cancel.is_cancelled())
                .map(Arc::new)
                .map_err(named)?;
        cancel.register(&socket);
        let ready = self.shake_hands(&socket, deadline).and_then(|(link, negotiated)| {
            let io_timeout = self.options.io_timeout;
            socket.set_timeout(POLL_INTERVAL).map_err(ClientError::lost)?;
            Ok(ClientConnection::new(link, negotiated, epoch, io_timeout))
        });
        ready.map_err(|error| match error {
            _ if cancel.is_cancelled() => ClientError::Cancelled,
            ClientError::Lost(error) => match error.kind() {
                io::ErrorKind::TimedOut => ClientError::TimedOut(limit),
                _ => ClientError::Lost(error),
            },
            other => other,
        })
    }

    fn wanted(&self) -> HandshakeRequest<'_> {
        let context = self.options.context.as_deref();
        HandshakeRequest {
            export: &self.options.uri.export,
            context: context.unwrap_or(BASE_ALLOCATION),
            allocation_depth: self.options.allocation_depth && context.is_none(),
        }
    }

    fn shake_hands(
        &self,
        socket: &Arc<ClientSocket>,
        deadline: Instant,
    ) -> Result<(Link, NegotiatedExport), ClientError> {
        let mut plain = Timed { socket, deadline };
        let mut handshake = Handshake::new(&mut plain);
        let flags = handshake.greet()?;
        #[cfg(feature = "tls")]
        {
            let Some(tls) = &self.tls else {
                let negotiated = handshake.choose(flags, self.wanted())?;
                return Ok((Link::new(Arc::clone(socket), None), negotiated));
            };
            handshake.start_tls(flags)?;
            let mut state = tls.connection()?;
            let unwrapped = |error: io::Error| tls::cause(&error).unwrap_or_else(|| ClientError::lost(error));
            while state.is_handshaking() {
                state.complete_io(&mut plain).map_err(unwrapped)?;
            }
            let negotiated = Handshake::new(&mut rustls::Stream::new(&mut state, &mut plain))
                .choose(flags, self.wanted())
                .map_err(|error| match &error {
                    ClientError::Lost(io) => tls::cause(io).unwrap_or(error),
                    _ => error,
                })?;
            Ok((Link::new(Arc::clone(socket), Some(state)), negotiated))
        }
        #[cfg(not(feature = "tls"))]
        {
            let negotiated = handshake.choose(flags, self.wanted())?;
            Ok((Link::new(Arc::clone(socket)), negotiated))
        }
    }
}
