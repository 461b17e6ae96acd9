//! `nbd`: an export of an NBD server.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_nbd::{ClientError, ClientOptions, ClientStorage, NbdAddress, NbdUri, TlsOptions};
use blockmirror_qmp::QmpError;

use super::Driver;
use crate::Reply;
use crate::arguments::arguments;
use crate::driver::{Found, Opened, Opening};
use crate::errors::{qmp_error, refuse, system_text};
use crate::graph::Kind;
use crate::schema::{SocketAddress, SocketArg};

arguments! {
    pub(super) struct NbdArgs("BlockdevOptionsNbd", "An export of an NBD server.") {
        server: Option<SocketArg> = "server", "where the server is" [required];
        export: Option<String> = "export", "which of its exports" [default "the one without a name"];
        tls_creds: Option<String> = "tls-creds", "id of TLS credentials for the client's end";
        tls_hostname: Option<String> = "tls-hostname", "name that the server's certificate has to have"
            [default "the host"];
        x_dirty_bitmap: Option<String> = "x-dirty-bitmap", "refused";
        reconnect_delay: Option<u32> = "reconnect-delay", "seconds that requests wait for a lost server to \
         come back"
            [default "0"];
        open_timeout: Option<u32> = "open-timeout", "seconds that opening tries again and \
         again" [default "0"];
        io_timeout: Option<u32> = "io-timeout", "seconds that the server may take for one request before \
         the connection counts as lost; 0 for no limit"
            [default "0", ours];
    }
}

/// An export of an NBD server.
pub(super) struct Nbd;

impl Driver for Nbd {
    const NAME: &'static str = "nbd";
    const DOC: &'static str = "an export of an NBD server";
    type Options = NbdArgs;

    fn kind(_: bool) -> Kind {
        Kind::Protocol
    }

    fn open(opening: &mut Opening<'_>, options: NbdArgs) -> Reply<Opened> {
        refuse(options.x_dirty_bitmap.is_some(), "nbd", "x-dirty-bitmap")?;
        let name = options.export.as_deref().unwrap_or_default();
        // A command that takes the name of an image was given its URI; else the schema has seen to a server.
        let (mut uri, address) = match (opening.found.take(), &options.server) {
            (Some(Found::Export(uri)), _) => (uri, None),
            (_, Some(server)) => match server.address()? {
                SocketAddress::Unix(path) => {
                    let address = path.display().to_string();
                    (NbdUri::unix(path, name), Some(address))
                }
                SocketAddress::Inet { host, port } => {
                    let address = format!("{host}:{port}");
                    (NbdUri::tcp(host, port, name), Some(address))
                }
                SocketAddress::Fd(_) => {
                    return Err(QmpError::generic("Sockets of type 'fd' are not supported"));
                }
            },
            _ => return Err(QmpError::generic("Parameter 'server' is missing")),
        };
        uri.tls |= options.tls_creds.is_some();
        let filename = uri.to_string();
        let address = address.unwrap_or_else(|| filename.clone());
        // A lost connection is made anew from another directory: a daemon in the background works in `/`.
        if let NbdAddress::Unix(path) = &mut uri.address
            && !path.as_os_str().as_encoded_bytes().starts_with(b"\0")
            && let Ok(absolute) = std::path::absolute(&*path)
        {
            *path = absolute;
        }
        let seconds = |given: Option<u32>| Duration::from_secs(given.unwrap_or(0).into());
        let mut client = ClientOptions::new(uri)
            .writable(!opening.common.read_only)
            .reconnect_delay(seconds(options.reconnect_delay))
            .open_timeout(seconds(options.open_timeout))
            .io_timeout(Some(seconds(options.io_timeout)));
        if let Some(id) = &options.tls_creds {
            let creds = opening.context.objects.tls_creds(id, false)?;
            let mut tls = TlsOptions::default();
            tls.directory = Some(creds.dir);
            tls.accept_any_server = !creds.verify_peer;
            tls.server_name = options.tls_hostname;
            client = client.tls(tls);
        }
        let client = Arc::new(client.open().map_err(|error| {
            let why = error.cause().and_then(|cause| cause.downcast_ref());
            match why {
                Some(ClientError::Connect(why)) => {
                    QmpError::generic(format!("Failed to connect to '{address}': {}", system_text(why)))
                }
                _ => qmp_error(error),
            }
        })?);
        // For formats; users of the disk have the client itself, which can flush again after a lost
        // connection.
        let storage = Arc::new(ClientStorage::new(Arc::clone(&client)));
        Ok(Opened { storage: Some(storage), ..Opened::leaf(client, filename) })
    }
}
