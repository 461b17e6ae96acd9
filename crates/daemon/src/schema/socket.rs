//! Addresses of sockets, as clients and the command line write them.

use std::path::PathBuf;

use blockmirror_qmp::QmpError;
use blockmirror_qmp::schema::{Object, Type};
use serde_json::{Map, Value};

use crate::Reply;
use crate::arguments::{Argument, Arguments, arguments, choice, variant};

/// A socket's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SocketAddress {
    Unix(PathBuf),
    Inet { host: String, port: u16 },
    Fd(String),
}

choice! {
    enum SocketType("SocketAddressType", "What kind of socket.") {
        Inet = "inet", "TCP";
        Unix = "unix", "a path";
        Vsock = "vsock", "refused";
        Fd = "fd", "an inherited socket";
    }
}

arguments! {
    struct Inet("InetSocketAddress", "A TCP address.") {
        host: String = "host", "name or address";
        port: String = "port", "number";
        _numeric: Option<bool> = "numeric", "without effect";
        _to: Option<u32> = "to", "refused";
        _ipv4: Option<bool> = "ipv4", "without effect";
        _ipv6: Option<bool> = "ipv6", "without effect";
        _keep_alive: Option<bool> = "keep-alive", "without effect";
        _mptcp: Option<bool> = "mptcp", "without effect";
    }
}

arguments! {
    struct Unix("UnixSocketAddress", "A socket in the file system.", differs "there are no `abstract` \
     names, and nothing is `tight`") {
        path: String = "path", "path";
    }
}

arguments! {
    struct Fd(
        "FdSocketAddress",
        "A socket that listens, opened by the parent process of the daemon; for `--nbd-server` on the \
         command line only.",
        differs "clients cannot pass descriptors, so there are no names of theirs"
    ) {
        str: String = "str", "its number, or the name that systemd gave it (`FileDescriptorName=`)";
    }
}

arguments! {
    struct AnySocket {
        kind: SocketType = "type", "what kind";
    }
}

static SOCKET_ADDRESS: Object = Object::union(
    "SocketAddress",
    "Where a socket is.",
    AnySocket::MEMBERS,
    "type",
    &[variant::<Inet>("inet"), variant::<Unix>("unix"), variant::<Fd>("fd")],
);

/// The same, as a client writes it.
#[derive(Clone, Debug)]
pub(crate) enum SocketArg {
    Inet { host: String, port: String },
    Unix(String),
    Vsock,
    Fd(String),
}

impl SocketArg {
    fn of(kind: SocketType, members: &Map<String, Value>) -> Option<Self> {
        Some(match kind {
            SocketType::Inet => {
                let Inet { host, port, .. } = Inet::parse(members).ok()?;
                Self::Inet { host, port }
            }
            SocketType::Unix => Self::Unix(Unix::parse(members).ok()?.path),
            SocketType::Vsock => Self::Vsock,
            SocketType::Fd => Self::Fd(Fd::parse(members).ok()?.str),
        })
    }

    /// The address.
    ///
    /// # Errors
    /// It is of a kind that is not supported, or its port is no number.
    pub(crate) fn address(&self) -> Reply<SocketAddress> {
        match self {
            Self::Unix(path) => Ok(SocketAddress::Unix(PathBuf::from(path))),
            Self::Inet { host, port } => {
                let number = port.parse().map_err(|_| {
                    let why = "Servname not supported for ai_socktype";
                    QmpError::generic(format!("address resolution failed for {host}:{port}: {why}"))
                })?;
                Ok(SocketAddress::Inet { host: host.clone(), port: number })
            }
            Self::Fd(name) => Ok(SocketAddress::Fd(name.clone())),
            Self::Vsock => Err(QmpError::generic("Sockets of type 'vsock' are not supported")),
        }
    }
}

impl Argument for SocketArg {
    const TYPE: Type = Type::Object(&SOCKET_ADDRESS);

    fn read(value: &Value) -> Option<Self> {
        let members = value.as_object()?;
        Self::of(AnySocket::parse(members).ok()?.kind, members)
    }
}

arguments! {
    struct InetWrapper("InetSocketAddressWrapper", "A TCP address.") {
        data: Inet = "data", "the address";
    }
}

arguments! {
    struct UnixWrapper("UnixSocketAddressWrapper", "A path.") {
        data: Unix = "data", "the path";
    }
}

arguments! {
    struct FdWrapper("FdSocketAddressWrapper", "A socket.") {
        data: Fd = "data", "the socket";
    }
}

static SOCKET_ADDRESS_LEGACY: Object = Object::union(
    "SocketAddressLegacy",
    "Where a socket is.",
    AnySocket::MEMBERS,
    "type",
    &[variant::<InetWrapper>("inet"), variant::<UnixWrapper>("unix"), variant::<FdWrapper>("fd")],
);

/// The same, as `nbd-server-start` spells it.
#[derive(Clone, Debug)]
pub(crate) struct SocketAddressLegacy(pub(crate) SocketArg);

impl Argument for SocketAddressLegacy {
    const TYPE: Type = Type::Object(&SOCKET_ADDRESS_LEGACY);

    fn read(value: &Value) -> Option<Self> {
        let members = value.as_object()?;
        let socket = match AnySocket::parse(members).ok()?.kind {
            SocketType::Inet => {
                let Inet { host, port, .. } = InetWrapper::parse(members).ok()?.data;
                SocketArg::Inet { host, port }
            }
            SocketType::Unix => SocketArg::Unix(UnixWrapper::parse(members).ok()?.data.path),
            SocketType::Vsock => SocketArg::Vsock,
            SocketType::Fd => SocketArg::Fd(FdWrapper::parse(members).ok()?.data.str),
        };
        Some(Self(socket))
    }
}
