//! Where to listen.

use blockmirror_nbd::server::{Listener, ServerError};
use blockmirror_qmp::QmpError;

use crate::Reply;
use crate::errors::qmp_error;
use crate::schema::SocketAddress;

/// Listens there, for a client who asks for it.
pub(crate) fn listener(address: &SocketAddress) -> Reply<Listener> {
    match address {
        SocketAddress::Unix(path) => Listener::unix(path).map_err(|error| match &error {
            ServerError::Listen { cause, .. } if cause.kind() == std::io::ErrorKind::NotFound => {
                let path = path.display();
                QmpError::generic(format!("Failed to bind socket to {path}: No such file or directory"))
            }
            _ => qmp_error(error),
        }),
        SocketAddress::Inet { host, port } => Listener::tcp(host, *port).map_err(qmp_error),
        // What a client calls by a number may be any file of ours.
        SocketAddress::Fd(_) => Err(QmpError::generic("Inherited sockets are for the command line")),
    }
}
