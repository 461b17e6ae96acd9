//! Types that several commands share: how nodes are described, and sockets.

use std::path::PathBuf;

use blockmirror_qmp::QmpError;
use blockmirror_qmp::schema::{Alternate, Enum, EnumValue, Member, NULL, Object, STR, Type, Variant, value};
use serde_json::{Map, Value};

use crate::Reply;
use crate::arguments::{Argument, Arguments, arguments, choice, variant};
use crate::driver::{DRIVER_COUNT, DRIVER_TABLE, DriverEntry, driver_named};
use crate::export::SocketAddress;

/// The names of the drivers.
static DRIVER_NAMES: [EnumValue; DRIVER_COUNT] = {
    let mut names = [value("", ""); DRIVER_COUNT];
    let mut at = 0;
    while at < DRIVER_COUNT {
        names[at] = value(DRIVER_TABLE[at].name(), DRIVER_TABLE[at].doc);
        at += 1;
    }
    names
};

static BLOCKDEV_DRIVER: Enum = Enum::new("BlockdevDriver", "What kind of node it is.", &DRIVER_NAMES)
    .differs("other drivers are not there");

/// A driver, by its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DriverName(pub(crate) &'static DriverEntry);

impl DriverName {
    /// The name.
    pub(crate) fn name(self) -> &'static str {
        self.0.name()
    }
}

impl Argument for DriverName {
    // Names and options of the drivers are put together from constants that contain nodes.
    const TYPE: Type = Type::Later(|| Type::Enum(&BLOCKDEV_DRIVER));

    fn read(value: &Value) -> Option<Self> {
        driver_named(value.as_str()?).map(Self)
    }
}

choice! {
    pub(crate) enum Discard("BlockdevDiscardOptions", "What becomes of discards.") {
        Ignore = "ignore", "nothing";
        Unmap = "unmap", "they are passed on";
    }
}

choice! {
    pub(crate) enum DetectZeroes("BlockdevDetectZeroesOptions", "Whether writes of zeros are looked for.") {
        Off = "off", "no";
        On = "on", "yes: they become zeroing";
        Unmap = "unmap", "yes, and they may give space back; needs `discard=unmap`";
    }
}

arguments! {
    pub(crate) struct Cache("BlockdevCacheOptions", "How the host's cache is used.") {
        direct: Option<bool> = "direct", "go past the host's page cache" [default "false"];
        no_flush: Option<bool> = "no-flush", "ignore flushes: fast, and unsafe if the host crashes"
            [default "false"];
    }
}

arguments! {
    /// The options that all drivers have.
    pub(crate) struct CommonOptions {
        driver: DriverName = "driver", "what kind of node" [reopen];
        node_name: Option<String> = "node-name", "its name, of at most 31 letters, digits, `-`, `.` and `_`"
            [default "one that starts with `#block`", reopen];
        discard: Option<Discard> = "discard", "what becomes of discards" [default "ignore", reopen];
        cache: Option<Cache> = "cache", "how the host's cache is used" [reopen];
        active: Option<bool> = "active", "refused if false" [default "true"];
        read_only: Option<bool> = "read-only", "whether writes are refused"
            [default "false; what stands above decides for a file", reopen];
        auto_read_only: Option<bool> = "auto-read-only", "whether what cannot be written is opened for \
         reading"
            [default "false", reopen];
        force_share: Option<bool> = "force-share", "whether others may write the image meanwhile; needs \
         `read-only`"
            [default "false"];
        detect_zeroes: Option<DetectZeroes> = "detect-zeroes", "whether writes of zeros are looked for"
            [default "off", reopen];
    }
}

/// The options of each driver.
static DRIVER_OPTIONS: [Variant; DRIVER_COUNT] = {
    let mut options = [DRIVER_TABLE[0].variant(); DRIVER_COUNT];
    let mut at = 0;
    while at < DRIVER_COUNT {
        options[at] = DRIVER_TABLE[at].variant();
        at += 1;
    }
    options
};

/// A node to be opened.
pub(crate) static BLOCKDEV_OPTIONS: Object = Object::union(
    "BlockdevOptions",
    "A node to be opened.",
    CommonOptions::MEMBERS,
    "driver",
    &DRIVER_OPTIONS,
);

/// All options of a node, which its driver reads.
#[derive(Clone, Debug)]
pub(crate) struct NodeOptions(pub(crate) Map<String, Value>);

impl Argument for NodeOptions {
    const TYPE: Type = Type::Later(|| Type::Object(&BLOCKDEV_OPTIONS));

    fn read(value: &Value) -> Option<Self> {
        value.as_object().cloned().map(Self)
    }
}

impl Arguments for NodeOptions {
    const MEMBERS: &'static [Member] = CommonOptions::MEMBERS;
    const CHANGEABLE: &'static [(&'static str, bool)] = CommonOptions::CHANGEABLE;

    fn parse(members: &Map<String, Value>) -> Reply<Self> {
        Ok(Self(members.clone()))
    }
}

/// A node that is there, or one to be opened.
#[derive(Clone, Debug)]
pub(crate) enum NodeRef {
    Name(String),
    Options(Map<String, Value>),
}

impl Argument for NodeRef {
    const TYPE: Type = {
        static BLOCKDEV_REF: Alternate = Alternate::new(
            "BlockdevRef",
            "A node: its name, or what it is opened with.",
            &[NodeOptions::TYPE, STR],
        );
        Type::Later(|| Type::Alternate(&BLOCKDEV_REF))
    };

    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::String(name) => Some(Self::Name(name.clone())),
            Value::Object(options) => Some(Self::Options(options.clone())),
            _ => None,
        }
    }
}

/// A node, or none.
#[derive(Clone, Debug)]
pub(crate) struct NodeRefOrNull(pub(crate) Option<NodeRef>);

impl Argument for NodeRefOrNull {
    const TYPE: Type = {
        static BLOCKDEV_REF_OR_NULL: Alternate =
            Alternate::new("BlockdevRefOrNull", "A node, or none.", &[NodeOptions::TYPE, STR, NULL]);
        Type::Later(|| Type::Alternate(&BLOCKDEV_REF_OR_NULL))
    };

    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Null => Some(Self(None)),
            value => NodeRef::read(value).map(|node| Self(Some(node))),
        }
    }
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

/// A socket's address.
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
