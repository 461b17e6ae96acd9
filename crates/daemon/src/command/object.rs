//! `object-add`, `object-del`, and what assigns nodes to I/O threads.

use blockmirror_qmp::schema::{
    Alternate, BOOL, Command, Enum, INT, Member, NULL, Object, STR, Type, case, opt, req, value,
};
use serde_json::Value;

use super::Commands;

static OBJECT_TYPE: Enum = Enum::new(
    "ObjectType",
    "What kind of object.",
    &[
        value("iothread", "an I/O thread; without effect"),
        value("secret", "bytes that are not to be seen"),
        value("throttle-group", "limits that throttle nodes share"),
        value("tls-creds-x509", "certificates for TLS"),
    ],
)
.differs("other objects are not there; `tls-creds-psk` is not because the TLS library has no external pre-shared keys");

/// The limits of one kind, with `-max` and `-max-length`.
macro_rules! limit {
    ($prefix:literal, $name:literal, $doc:literal) => {
        [
            opt(concat!($prefix, $name), INT, $doc).default("0: no limit"),
            opt(concat!($prefix, $name, "-max"), INT, "the same while a burst lasts").default("0: no bursts"),
            opt(concat!($prefix, $name, "-max-length"), INT, "seconds that a burst may last").default("1"),
        ]
    };
}

macro_rules! limits {
    ($prefix:literal $(, $first:expr)?) => {{
        let [a, b, c] = limit!($prefix, "iops-total", "requests per second");
        let [d, e, f] = limit!($prefix, "iops-read", "reads per second");
        let [g, h, i] = limit!($prefix, "iops-write", "writes per second");
        let [j, k, l] = limit!($prefix, "bps-total", "bytes per second");
        let [m, n, o] = limit!($prefix, "bps-read", "bytes read per second");
        let [p, q, r] = limit!($prefix, "bps-write", "bytes written per second");
        let size = opt(concat!($prefix, "iops-size"), INT, "bytes beyond which a request counts as several")
            .default("0: each counts as one");
        [$($first,)? a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, size]
    }};
}

static LIMITS_MEMBERS: [Member; 19] = limits!("");
static LIMITS: Object =
    Object::new("ThrottleLimits", "What members of a throttle group may do together.", &LIMITS_MEMBERS);

static THROTTLE_GROUP_MEMBERS: [Member; 20] =
    limits!("x-", opt("limits", Type::Object(&LIMITS), "the limits; those below are the same one by one"));
static THROTTLE_GROUP: Object =
    Object::new("ThrottleGroupProperties", "Limits that throttle nodes share.", &THROTTLE_GROUP_MEMBERS);

static ENDPOINT: Enum = Enum::new(
    "QCryptoTLSCredsEndpoint",
    "Which end.",
    &[value("client", "the client's"), value("server", "the server's")],
);
static TLS_CREDS: Object = Object::new(
    "TlsCredsX509Properties",
    "Certificates for TLS, in files with the names that QEMU uses.",
    &[
        opt("dir", STR, "where they lie; has to be given"),
        opt("endpoint", Type::Enum(&ENDPOINT), "for which end").default("client"),
        opt("verify-peer", BOOL, "whether the other end's certificate is checked").default("true"),
        opt("sanity-check", BOOL, "without effect").default("true"),
        opt("priority", STR, "refused"),
        opt("passwordid", STR, "refused"),
    ],
);

static SECRET_FORMAT: Enum = Enum::new(
    "QCryptoSecretFormat",
    "How the bytes are written.",
    &[value("raw", "as they are"), value("base64", "in base64")],
);
static SECRET: Object = Object::new(
    "SecretProperties",
    "Bytes that are not to be seen.",
    &[
        opt("data", STR, "the bytes"),
        opt("file", STR, "a file that holds them"),
        opt("format", Type::Enum(&SECRET_FORMAT), "how they are written").default("raw"),
        opt("keyid", STR, "without effect"),
        opt("iv", STR, "without effect"),
    ],
);

static IOTHREAD: Object = Object::new(
    "IothreadProperties",
    "An I/O thread. There is none: each export has threads of its own, started when needed.",
    &[
        opt("poll-max-ns", INT, "without effect"),
        opt("poll-grow", INT, "without effect"),
        opt("poll-shrink", INT, "without effect"),
        opt("aio-max-batch", INT, "without effect"),
        opt("thread-pool-min", INT, "without effect"),
        opt("thread-pool-max", INT, "without effect"),
    ],
);

/// An object to be made.
pub(crate) static OBJECT_OPTIONS: Object = Object::union(
    "ObjectOptions",
    "An object to be made.",
    &[req("qom-type", Type::Enum(&OBJECT_TYPE), "what kind"), req("id", STR, "its name")],
    "qom-type",
    &[
        case("iothread", &IOTHREAD),
        case("secret", &SECRET),
        case("throttle-group", &THROTTLE_GROUP),
        case("tls-creds-x509", &TLS_CREDS),
    ],
);

static OBJECT_ADD: Command =
    Command::boxed("object-add", "Makes an object that others refer to.", &OBJECT_OPTIONS);
static OBJECT_DEL: Command =
    Command::new("object-del", "Forgets an object that is not in use.", &[req("id", STR, "the object")]);

static IOTHREAD_OR_NULL: Alternate =
    Alternate::new("StrOrNull", "The id of an I/O thread, or none.", &[STR, NULL]);
static SET_IOTHREAD: Command = Command::new(
    "x-blockdev-set-iothread",
    "Assigns a node to an I/O thread. Without effect but that the object is in use.",
    &[
        req("node-name", STR, "the node"),
        req("iothread", Type::Alternate(&IOTHREAD_OR_NULL), "the thread; null for none"),
        opt("force", BOOL, "whether it may be in use by an export or a job").default("false"),
    ],
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add_quick(&OBJECT_ADD, |daemon, _, args| daemon.objects.add(args).map(|()| Value::Null))
        .add(&SET_IOTHREAD, |daemon, _, args| {
            let force = args.opt_bool("force")?.unwrap_or(false);
            let thread = args.get("iothread").and_then(Value::as_str);
            daemon.set_iothread(args.str("node-name")?, thread, force).map(|()| Value::Null)
        })
        .add_quick(&OBJECT_DEL, |daemon, _, args| {
            daemon.objects.remove(args.str("id")?).map(|()| Value::Null)
        });
}
