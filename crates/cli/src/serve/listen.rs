//! Where `serve` listens: a Unix socket, a TCP port, or the sockets that a service manager has opened.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use blockmirror_nbd::server::Listener;
use blockmirror_nbd::{NbdAddress, NbdUri};

use crate::args::ServeArgs;
use crate::failure::{Failure, Outcome};

/// Only the user who runs the server connects.
const SOCKET_MODE: u32 = 0o600;

/// A place to listen at.
#[derive(Debug)]
pub(super) enum Place {
    Unix(PathBuf),
    Tcp(SocketAddr),
    Inherited(Listener),
}

/// Where `args` ask to listen. Refuses to serve the network without TLS, unless that is asked for.
pub(super) fn places(args: &ServeArgs) -> Outcome<Vec<Place>> {
    if let Some(port) = args.port {
        return Ok(vec![Place::Tcp(tcp(args, port)?)]);
    }
    if let Some(path) = &args.socket {
        return Ok(vec![Place::Unix(path.clone())]);
    }
    let inherited = Listener::inherited()?;
    for address in inherited.iter().filter_map(Listener::tcp_address) {
        check_network(args, address, "a socket of the service manager")?;
    }
    Ok(match inherited.is_empty() {
        true => vec![Place::Unix(default_socket())],
        false => inherited.into_iter().map(Place::Inherited).collect(),
    })
}

fn tcp(args: &ServeArgs, port: u16) -> Outcome<SocketAddr> {
    let host = &args.bind;
    let found = (host.as_str(), port).to_socket_addrs();
    let found = found.map_err(|error| Failure::failed(format_args!("--bind {host}: {error}")))?;
    let addresses: Vec<_> = found.collect();
    let Some(address) = addresses.first() else {
        return Err(Failure::failed(format_args!("--bind {host}: it has no address")));
    };
    check_network(args, *address, &format!("--bind {host}"))?;
    Ok(*address)
}

/// Refuses an address that other hosts reach, which `what` gives, without TLS.
fn check_network(args: &ServeArgs, address: SocketAddr, what: &str) -> Outcome<()> {
    if address.ip().is_loopback() || args.tls_certificates.is_some() || args.no_tls {
        return Ok(());
    }
    Err(Failure::usage(format_args!(
        "{what}: other hosts reach it; --tls-certificates encrypts, --no-tls serves without"
    )))
}

/// A socket in the directory of the user's session.
fn default_socket() -> PathBuf {
    let session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let folder = session.filter(|path| path.is_absolute() && path.is_dir());
    folder.unwrap_or_else(std::env::temp_dir).join(format!("blockmirror-{}.sock", std::process::id()))
}

impl Place {
    pub(super) fn open(self) -> Outcome<Listener> {
        Ok(match self {
            Self::Unix(path) => Listener::unix_with_mode(path, SOCKET_MODE)?,
            Self::Tcp(address) => Listener::tcp(&address.ip().to_string(), address.port())?,
            Self::Inherited(listener) => listener,
        })
    }
}

/// The URI of the export `name` at `listener`.
pub(super) fn uri(listener: &Listener, name: &str, args: &ServeArgs) -> String {
    let address = match (listener.tcp_address(), listener.unix_path()) {
        (Some(address), _) => NbdAddress::Tcp { host: address.ip().to_string(), port: address.port() },
        (None, path) => {
            let path = path.unwrap_or_default();
            NbdAddress::Unix(std::path::absolute(&path).unwrap_or(path))
        }
    };
    let mut uri = NbdUri::new(address, name);
    uri.tls = args.tls_certificates.is_some();
    uri.to_string()
}
