//! From options to a connection that is ready for requests: socket, TLS, handshake, all before one deadline.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::connection::Connection;
use super::error::ClientError;
use super::handshake::{Dialog, Negotiated, Wanted};
use super::link::Link;
use super::options::ClientOptions;
use super::socket::{Socket, Timed};
#[cfg(feature = "tls")]
use super::tls::{self, Tls};

/// Makes connections to one export.
#[derive(Debug)]
pub(crate) struct Connector {
    options: ClientOptions,
    #[cfg(feature = "tls")]
    tls: Option<Tls>,
}

/// A caller that may cancel a connection that is being made.
pub(crate) trait Patron {
    /// Whether it was given up.
    fn given_up(&self) -> bool;
    /// The socket that the handshake will use: shutting it down ends that.
    fn connected(&self, socket: &Arc<Socket>);
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
    pub(crate) fn connect(&self, patron: &dyn Patron, epoch: u64) -> Result<Connection, ClientError> {
        let limit = self.options.handshake_timeout;
        let deadline = Instant::now() + limit;
        let named = |error: io::Error| match error.kind() {
            io::ErrorKind::TimedOut if Instant::now() >= deadline => ClientError::TimedOut(limit),
            _ if patron.given_up() => ClientError::Cancelled,
            _ => ClientError::Connect(Arc::new(error)),
        };
        let address = &self.options.uri.address;
        let socket = Socket::connect(address, deadline, self.options.peer_timeout, &|| patron.given_up())
            .map(Arc::new)
            .map_err(named)?;
        patron.connected(&socket);
        let ready = self.shake_hands(&socket, deadline).and_then(|(link, negotiated)| {
            let io_timeout = self.options.io_timeout;
            socket.set_timeout(io_timeout).map_err(ClientError::lost)?;
            Ok(Connection::new(link, negotiated, epoch, io_timeout))
        });
        ready.map_err(|error| match error {
            _ if patron.given_up() => ClientError::Cancelled,
            ClientError::Lost(error) => match error.kind() {
                io::ErrorKind::TimedOut => ClientError::TimedOut(limit),
                _ => ClientError::Lost(error),
            },
            other => other,
        })
    }

    fn wanted(&self) -> Wanted<'_> {
        Wanted { export: &self.options.uri.export, allocation_depth: self.options.allocation_depth }
    }

    fn shake_hands(
        &self,
        socket: &Arc<Socket>,
        deadline: Instant,
    ) -> Result<(Link, Negotiated), ClientError> {
        let mut plain = Timed { socket, deadline };
        let mut dialog = Dialog::new(&mut plain);
        let flags = dialog.greet()?;
        #[cfg(feature = "tls")]
        {
            let Some(tls) = &self.tls else {
                let negotiated = dialog.choose(flags, self.wanted())?;
                return Ok((Link::new(Arc::clone(socket), None), negotiated));
            };
            dialog.start_tls(flags)?;
            let mut state = tls.connection()?;
            let unwrapped = |error: io::Error| tls::cause(&error).unwrap_or_else(|| ClientError::lost(error));
            while state.is_handshaking() {
                state.complete_io(&mut plain).map_err(unwrapped)?;
            }
            let negotiated = Dialog::new(&mut rustls::Stream::new(&mut state, &mut plain))
                .choose(flags, self.wanted())
                .map_err(|error| match &error {
                    ClientError::Lost(io) => tls::cause(io).unwrap_or(error),
                    _ => error,
                })?;
            Ok((Link::new(Arc::clone(socket), Some(state)), negotiated))
        }
        #[cfg(not(feature = "tls"))]
        {
            let negotiated = dialog.choose(flags, self.wanted())?;
            Ok((Link::new(Arc::clone(socket)), negotiated))
        }
    }
}
