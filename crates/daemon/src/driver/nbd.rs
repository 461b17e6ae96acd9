//! `nbd`: an export of an NBD server.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_nbd::{ClientError, ClientOptions, ClientStorage, NbdUri, TlsOptions};
use blockmirror_qmp::{Args, QmpError};
use serde_json::Value;

use super::{Opened, Opening, qmp_error, refuse, system_text};
use crate::Reply;
use crate::export::{SocketAddress, socket_address};

pub(super) fn open(opening: &Opening<'_>, args: &Args) -> Reply<Opened> {
    refuse(args, "nbd", &["x-dirty-bitmap"])?;
    let name = args.opt_str("export")?.unwrap_or_default();
    // A URI is for commands that take the name of an image; the schema does not have it.
    let mut uri = match args.opt_str("uri")? {
        Some(uri) => uri.parse().map_err(qmp_error)?,
        None => match socket_address(args.get("server").unwrap_or(&Value::Null))? {
            SocketAddress::Unix(path) => NbdUri::unix(path, name),
            SocketAddress::Inet { host, port } => NbdUri::tcp(host, port, name),
            SocketAddress::Fd(_) => return Err(QmpError::generic("Sockets of type 'fd' are not supported")),
        },
    };
    uri.tls |= args.has("tls-creds");
    let filename = uri.to_string();
    let address = address_of(args)?.unwrap_or_else(|| filename.clone());
    let seconds = |name: &str| Ok::<_, QmpError>(Duration::from_secs(args.opt_u64(name)?.unwrap_or(0)));
    let mut options = ClientOptions::new(uri)
        .writable(!opening.common.read_only)
        .reconnect_delay(seconds("reconnect-delay")?)
        .open_timeout(seconds("open-timeout")?);
    if let Some(id) = args.opt_str("tls-creds")? {
        let creds = opening.daemon.objects.tls_creds(id, false)?;
        let mut tls = TlsOptions::default();
        tls.directory = Some(creds.dir);
        tls.accept_any_server = !creds.verify_peer;
        tls.server_name = args.opt_str("tls-hostname")?.map(str::to_owned);
        options = options.tls(tls);
    }
    let client = Arc::new(options.open().map_err(|error| {
        let why = error.cause().and_then(|cause| cause.downcast_ref());
        match why {
            Some(ClientError::Connect(why)) => {
                QmpError::generic(format!("Failed to connect to '{address}': {}", system_text(why)))
            }
            _ => qmp_error(error),
        }
    })?);
    // For formats; users of the disk have the client itself, which can flush again after a lost connection.
    let storage = Arc::new(ClientStorage::new(Arc::clone(&client)));
    Ok(Opened { storage: Some(storage), ..Opened::leaf(client, filename) })
}

/// The server's address as QEMU tells it, where it is given in parts.
fn address_of(args: &Args) -> Reply<Option<String>> {
    let Some(server) = args.get("server") else { return Ok(None) };
    Ok(match socket_address(server)? {
        SocketAddress::Unix(path) => Some(path.display().to_string()),
        SocketAddress::Inet { host, port } => Some(format!("{host}:{port}")),
        SocketAddress::Fd(_) => None,
    })
}
