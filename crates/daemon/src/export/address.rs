//! Where to listen: `SocketAddress` in both of its spellings, with the members beside `type` or inside
//! `data`.

use std::path::PathBuf;

use blockmirror_nbd::server::{Listener, ServerError};
use blockmirror_qmp::{Args, QmpError};
use serde_json::Value;

use crate::Reply;
use crate::driver::qmp_error;

/// A socket's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SocketAddress {
    Unix(PathBuf),
    Inet { host: String, port: u16 },
    Fd(String),
}

/// Reads an address that has passed the schema.
pub(crate) fn socket_address(value: &Value) -> Reply<SocketAddress> {
    let outer = Args::new(value.as_object().cloned().unwrap_or_default());
    let kind = outer.str("type")?.to_owned();
    let args = match outer.get("data").and_then(Value::as_object) {
        Some(data) => Args::new(data.clone()),
        None => outer,
    };
    match kind.as_str() {
        "unix" => Ok(SocketAddress::Unix(PathBuf::from(args.str("path")?))),
        "inet" => {
            let port = args.str("port")?;
            let host = args.str("host")?.to_owned();
            let port = port.parse().map_err(|_| {
                let why = "Servname not supported for ai_socktype";
                QmpError::generic(format!("address resolution failed for {host}:{port}: {why}"))
            })?;
            Ok(SocketAddress::Inet { host, port })
        }
        "fd" => Ok(SocketAddress::Fd(args.str("str")?.to_owned())),
        other => Err(QmpError::generic(format!("Sockets of type '{other}' are not supported"))),
    }
}

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
