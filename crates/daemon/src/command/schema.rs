//! Types that several commands share: how nodes are described, and sockets.

use blockmirror_qmp::schema::{
    Alternate, BOOL, Enum, INT, INT64, NULL, Object, SIZE, STR, Type, UINT32, UINT64, case, opt, req, value,
};

pub(crate) static BLOCKDEV_DRIVER: Enum = Enum::new(
    "BlockdevDriver",
    "What kind of node it is.",
    &[
        value("blkdebug", "fault injection, before another node"),
        value("copy-on-read", "copies up what is read, before another node"),
        value("file", "a regular file"),
        value("host_device", "a block device of the host"),
        value("nbd", "an export of an NBD server"),
        value("null-co", "nothing: reads are zeros or undefined, writes vanish"),
        value("qcow2", "an image in that format"),
        value("raw", "the bytes of another node"),
        value("throttle", "slows another node down"),
    ],
)
.differs("other drivers are not there");

static DISCARD: Enum = Enum::new(
    "BlockdevDiscardOptions",
    "What becomes of discards.",
    &[value("ignore", "nothing"), value("unmap", "they are passed on")],
);

static DETECT_ZEROES: Enum = Enum::new(
    "BlockdevDetectZeroesOptions",
    "Whether writes of zeros are looked for.",
    &[
        value("off", "no"),
        value("on", "yes: they become zeroing"),
        value("unmap", "yes, and they may give space back; needs `discard=unmap`"),
    ],
);

static CACHE: Object = Object::new(
    "BlockdevCacheOptions",
    "How the host's cache is used.",
    &[
        opt("direct", BOOL, "go past the host's page cache").default("false"),
        opt("no-flush", BOOL, "ignore flushes: fast, and unsafe if the host crashes").default("false"),
    ],
);

static LOCKING: Enum = Enum::new(
    "OnOffAuto",
    "Yes, no, or what serves.",
    &[value("auto", "what serves"), value("on", "yes"), value("off", "no")],
);

static AIO: Enum = Enum::new(
    "BlockdevAioOptions",
    "How requests are given to the host. Accepted and without effect: requests run on threads.",
    &[value("threads", "threads"), value("native", "Linux AIO"), value("io_uring", "io_uring")],
);

static FILE: Object = Object::new(
    "BlockdevOptionsFile",
    "A file or device of the host.",
    &[
        req("filename", STR, "path"),
        opt("pr-manager", STR, "refused"),
        opt("locking", Type::Enum(&LOCKING), "whether the image is locked against other users")
            .default("auto"),
        opt("aio", Type::Enum(&AIO), "without effect").default("threads"),
        opt("aio-max-batch", INT, "without effect"),
        opt("drop-cache", BOOL, "without effect"),
        opt("x-check-cache-dropped", BOOL, "without effect"),
    ],
);

/// A node that is there, or one to be opened.
pub(crate) static BLOCKDEV_REF: Alternate = Alternate::new(
    "BlockdevRef",
    "A node: its name, or what it is opened with.",
    &[Type::Object(&BLOCKDEV_OPTIONS), STR],
);

static BLOCKDEV_REF_OR_NULL: Alternate =
    Alternate::new("BlockdevRefOrNull", "A node, or none.", &[Type::Object(&BLOCKDEV_OPTIONS), STR, NULL]);

static RAW: Object = Object::new(
    "BlockdevOptionsRaw",
    "The bytes of another node.",
    &[
        req("file", Type::Alternate(&BLOCKDEV_REF), "the node"),
        opt("offset", SIZE, "the first byte that the disk has of it, which is a file then").default("0"),
        opt("size", SIZE, "how many bytes it has, a multiple of 512; all from `offset` on if not given"),
    ],
);

static ENCRYPT: Object = Object::new("BlockdevQcow2Encryption", "Refused.", &[req("format", STR, "refused")]);

static OVERLAP: Alternate = Alternate::new(
    "Qcow2OverlapChecks",
    "Accepted and without effect: all checks are always on. Flags one by one are not taken.",
    &[STR],
);

static QCOW2: Object = Object::new(
    "BlockdevOptionsQcow2",
    "An image.",
    &[
        req("file", Type::Alternate(&BLOCKDEV_REF), "the node that the image lies in"),
        opt("backing", Type::Alternate(&BLOCKDEV_REF_OR_NULL), "its backing file; null for none")
            .default("the one that the image names, if the daemon may open it"),
        opt("data-file", Type::Alternate(&BLOCKDEV_REF), "its data file")
            .default("the one that the image names"),
        opt("lazy-refcounts", BOOL, "without effect"),
        opt("pass-discard-request", BOOL, "without effect: discards of freed clusters are passed on"),
        opt("pass-discard-snapshot", BOOL, "without effect"),
        opt("pass-discard-other", BOOL, "without effect"),
        opt("discard-no-unref", BOOL, "without effect"),
        opt("overlap-check", Type::Alternate(&OVERLAP), "without effect"),
        opt("cache-size", INT, "bytes of metadata that are kept in memory").default("32 MiB"),
        opt("l2-cache-size", INT, "the same, where `cache-size` is not given"),
        opt("l2-cache-entry-size", INT, "without effect"),
        opt("refcount-cache-size", INT, "without effect"),
        opt("cache-clean-interval", INT, "without effect"),
        opt("encrypt", Type::Object(&ENCRYPT), "refused"),
    ],
);

static SOCKET_TYPE: Enum = Enum::new(
    "SocketAddressType",
    "What kind of socket.",
    &[
        value("inet", "TCP"),
        value("unix", "a path"),
        value("vsock", "refused"),
        value("fd", "an inherited socket"),
    ],
);

static INET: Object = Object::new(
    "InetSocketAddress",
    "A TCP address.",
    &[
        req("host", STR, "name or address"),
        req("port", STR, "number"),
        opt("numeric", BOOL, "without effect"),
        opt("to", UINT32, "refused"),
        opt("ipv4", BOOL, "without effect"),
        opt("ipv6", BOOL, "without effect"),
        opt("keep-alive", BOOL, "without effect"),
        opt("mptcp", BOOL, "without effect"),
    ],
);

static UNIX: Object =
    Object::new("UnixSocketAddress", "A socket in the file system.", &[req("path", STR, "path")])
        .differs("there are no `abstract` names, and nothing is `tight`");

static FD: Object = Object::new(
    "FdSocketAddress",
    "A socket that listens, opened by the parent process of the daemon; for `--nbd-server` on the command line only.",
    &[req("str", STR, "its number, or the name that systemd gave it (`FileDescriptorName=`)")],
)
.differs("clients cannot pass descriptors, so there are no names of theirs");

/// A socket's address.
pub(crate) static SOCKET_ADDRESS: Object = Object::union(
    "SocketAddress",
    "Where a socket is.",
    &[req("type", Type::Enum(&SOCKET_TYPE), "what kind")],
    "type",
    &[case("inet", &INET), case("unix", &UNIX), case("fd", &FD)],
);

static INET_WRAPPER: Object = Object::new(
    "InetSocketAddressWrapper",
    "A TCP address.",
    &[req("data", Type::Object(&INET), "the address")],
);
static UNIX_WRAPPER: Object =
    Object::new("UnixSocketAddressWrapper", "A path.", &[req("data", Type::Object(&UNIX), "the path")]);
static FD_WRAPPER: Object =
    Object::new("FdSocketAddressWrapper", "A socket.", &[req("data", Type::Object(&FD), "the socket")]);

/// The same, as `nbd-server-start` spells it.
pub(crate) static SOCKET_ADDRESS_LEGACY: Object = Object::union(
    "SocketAddressLegacy",
    "Where a socket is.",
    &[req("type", Type::Enum(&SOCKET_TYPE), "what kind")],
    "type",
    &[case("inet", &INET_WRAPPER), case("unix", &UNIX_WRAPPER), case("fd", &FD_WRAPPER)],
);

static NBD: Object = Object::new(
    "BlockdevOptionsNbd",
    "An export of an NBD server.",
    &[
        req("server", Type::Object(&SOCKET_ADDRESS), "where the server is"),
        opt("export", STR, "which of its exports").default("the one without a name"),
        opt("tls-creds", STR, "id of TLS credentials for the client's end"),
        opt("tls-hostname", STR, "name that the server's certificate has to have").default("the host"),
        opt("x-dirty-bitmap", STR, "refused"),
        opt("reconnect-delay", UINT32, "seconds that requests wait for a lost server to come back")
            .default("0"),
        opt("open-timeout", UINT32, "seconds that opening tries again and again").default("0"),
    ],
);

static NULL_CO: Object = Object::new(
    "BlockdevOptionsNull",
    "Nothing.",
    &[
        opt("size", INT, "length in bytes").default("1 GiB"),
        opt("latency-ns", UINT64, "how long each request takes").default("0"),
        opt("read-zeroes", BOOL, "whether reads give zeros").default("false"),
    ],
);

static THROTTLE: Object = Object::new(
    "BlockdevOptionsThrottle",
    "Slows another node down.",
    &[
        req("throttle-group", STR, "id of the group whose limits hold"),
        req("file", Type::Alternate(&BLOCKDEV_REF), "the node"),
    ],
);

static COPY_ON_READ: Object = Object::new(
    "BlockdevOptionsCor",
    "Copies up what is read.",
    &[req("file", Type::Alternate(&BLOCKDEV_REF), "the node"), opt("bottom", STR, "refused")],
);

static INJECT_ERROR: Object = Object::new(
    "BlkdebugInjectErrorOptions",
    "Fails a request.",
    &[
        req("event", STR, "what arms it, by QEMU's names"),
        opt("state", INT, "in which state").default("any"),
        opt("iotype", STR, "which requests fail").default("all but block-status"),
        opt("errno", INT, "the error").default("5"),
        opt("sector", INT64, "only requests that touch this sector of 512 bytes"),
        opt("once", BOOL, "only one request").default("false"),
        opt("immediately", BOOL, "without effect: failures are immediate").default("false"),
    ],
);

static SET_STATE: Object = Object::new(
    "BlkdebugSetStateOptions",
    "Changes the state.",
    &[
        req("event", STR, "at what"),
        opt("state", INT, "in which state").default("any"),
        req("new_state", INT, "the state afterwards"),
    ],
);

static PERMISSION: Enum = Enum::new(
    "BlockPermission",
    "What a user of a node may do with it.",
    &[
        value("consistent-read", "read what was written"),
        value("write", "write"),
        value("write-unchanged", "write what is read there already"),
        value("resize", "make it longer or shorter"),
    ],
);

static BLKDEBUG: Object = Object::new(
    "BlockdevOptionsBlkdebug",
    "Fault injection.",
    &[
        req("image", Type::Alternate(&BLOCKDEV_REF), "the node"),
        opt("config", STR, "a file of rules"),
        opt("align", INT, "alignment that is asked of requests"),
        opt("max-transfer", SIZE, "largest request"),
        opt("opt-write-zero", SIZE, "alignment of zeroing"),
        opt("max-write-zero", SIZE, "longest zeroing"),
        opt("opt-discard", SIZE, "alignment of discards"),
        opt("max-discard", SIZE, "longest discard"),
        opt("inject-error", Type::Array(&Type::Object(&INJECT_ERROR)), "rules that fail requests"),
        opt("set-state", Type::Array(&Type::Object(&SET_STATE)), "rules that change the state"),
        opt(
            "take-child-perms",
            Type::Array(&Type::Enum(&PERMISSION)),
            "what it needs of the node besides what its users do",
        ),
        opt(
            "unshare-child-perms",
            Type::Array(&Type::Enum(&PERMISSION)),
            "what no other user of the node may do",
        ),
    ],
)
.differs("the node makes its events itself, at each request; those of metadata are known and never happen");

/// A node to be opened.
pub(crate) static BLOCKDEV_OPTIONS: Object = Object::union(
    "BlockdevOptions",
    "A node to be opened.",
    &[
        req("driver", Type::Enum(&BLOCKDEV_DRIVER), "what kind of node"),
        opt("node-name", STR, "its name, of at most 31 letters, digits, `-`, `.` and `_`")
            .default("one that starts with `#block`"),
        opt("discard", Type::Enum(&DISCARD), "what becomes of discards").default("ignore"),
        opt("cache", Type::Object(&CACHE), "how the host's cache is used"),
        opt("active", BOOL, "refused if false").default("true"),
        opt("read-only", BOOL, "whether writes are refused")
            .default("false; what stands above decides for a file"),
        opt("auto-read-only", BOOL, "whether what cannot be written is opened for reading").default("false"),
        opt("force-share", BOOL, "whether others may write the image meanwhile; needs `read-only`")
            .default("false"),
        opt("detect-zeroes", Type::Enum(&DETECT_ZEROES), "whether writes of zeros are looked for")
            .default("off"),
    ],
    "driver",
    &[
        case("blkdebug", &BLKDEBUG),
        case("copy-on-read", &COPY_ON_READ),
        case("file", &FILE),
        case("host_device", &FILE),
        case("nbd", &NBD),
        case("null-co", &NULL_CO),
        case("qcow2", &QCOW2),
        case("raw", &RAW),
        case("throttle", &THROTTLE),
    ],
);
