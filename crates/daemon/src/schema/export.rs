//! What the NBD server is started with, and the bitmaps that exports and commands name.

use blockmirror_qmp::schema::{Alternate, STR, Type};
use serde_json::Value;

use super::SocketAddressLegacy;
use crate::arguments::{Argument, arguments};

arguments! {
    /// The arguments of `nbd-server-start`.
    pub(crate) struct NbdServerArgs {
        addr: SocketAddressLegacy = "addr", "where it listens";
        handshake_max_seconds: Option<u32> = "handshake-max-seconds", "how long a client may take to \
         negotiate"
            [default "10"];
        tls_creds: Option<String> = "tls-creds", "id of TLS credentials for the server's end" [default "no \
         TLS"];
        tls_authz: Option<String> = "tls-authz", "refused";
        max_connections: Option<u32> = "max-connections", "connections at the same time; 0 is no limit"
            [default "100"];
    }
}

arguments! {
    /// The arguments of the commands about one bitmap.
    pub(crate) struct OneBitmap("BlockDirtyBitmap", "A bitmap of a node.") {
        node: String = "node", "the node";
        name: String = "name", "the bitmap";
    }
}

/// A bitmap of the node that is spoken of, or of another.
#[derive(Clone, Debug)]
pub(crate) struct BitmapRef {
    /// The node, if it is named.
    pub(crate) node: Option<String>,
    pub(crate) name: String,
}

impl Argument for BitmapRef {
    const TYPE: Type = {
        static BITMAP_OR_STR: Alternate = Alternate::new(
            "BlockDirtyBitmapOrStr",
            "A bitmap: its name, or with the node that it belongs to.",
            &[STR, OneBitmap::TYPE],
        );
        Type::Alternate(&BITMAP_OR_STR)
    };

    fn read(value: &Value) -> Option<Self> {
        if let Some(name) = String::read(value) {
            return Some(Self { node: None, name });
        }
        let OneBitmap { node, name } = OneBitmap::read(value)?;
        Some(Self { node: Some(node), name })
    }
}
