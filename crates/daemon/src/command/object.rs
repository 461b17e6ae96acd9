//! `object-add` and `object-del`.

use blockmirror_qmp::schema::{BOOL, Command, Enum, INT, Member, Object, STR, Type, case, opt, req, value};
use serde_json::Value;

use super::Commands;

static OBJECT_TYPE: Enum = Enum::new(
    "ObjectType",
    "What kind of object.",
    &[
        value("secret", "bytes that are not to be seen"),
        value("throttle-group", "limits that throttle nodes share"),
        value("tls-creds-x509", "certificates for TLS"),
    ],
);

macro_rules! limits {
    ($($name:literal),* $(,)?) => { [$(opt($name, INT, "see `throttle-group`")),*] };
}

static LIMITS_MEMBERS: [Member; 19] = limits![
    "iops-total",
    "iops-total-max",
    "iops-total-max-length",
    "iops-read",
    "iops-read-max",
    "iops-read-max-length",
    "iops-write",
    "iops-write-max",
    "iops-write-max-length",
    "bps-total",
    "bps-total-max",
    "bps-total-max-length",
    "bps-read",
    "bps-read-max",
    "bps-read-max-length",
    "bps-write",
    "bps-write-max",
    "bps-write-max-length",
    "iops-size",
];
static LIMITS: Object = Object::new(
    "ThrottleLimits",
    "Requests (iops) and bytes (bps) per second, for all, reads, or writes. `-max` is the rate in bursts, `-max-length` how \
     many seconds one may last; with `iops-size` a larger request counts as several.",
    &LIMITS_MEMBERS,
);

macro_rules! group_members {
    ($($name:literal),* $(,)?) => {
        [opt("limits", Type::Object(&LIMITS), "the limits"), $(opt($name, INT, "the same member of `limits`")),*]
    };
}
static THROTTLE_GROUP_MEMBERS: [Member; 20] = group_members![
    "x-iops-total",
    "x-iops-total-max",
    "x-iops-total-max-length",
    "x-iops-read",
    "x-iops-read-max",
    "x-iops-read-max-length",
    "x-iops-write",
    "x-iops-write-max",
    "x-iops-write-max-length",
    "x-bps-total",
    "x-bps-total-max",
    "x-bps-total-max-length",
    "x-bps-read",
    "x-bps-read-max",
    "x-bps-read-max-length",
    "x-bps-write",
    "x-bps-write-max",
    "x-bps-write-max-length",
    "x-iops-size",
];
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

/// An object to be made.
pub(crate) static OBJECT_OPTIONS: Object = Object::union(
    "ObjectOptions",
    "An object to be made.",
    &[req("qom-type", Type::Enum(&OBJECT_TYPE), "what kind"), req("id", STR, "its name")],
    "qom-type",
    &[case("secret", &SECRET), case("throttle-group", &THROTTLE_GROUP), case("tls-creds-x509", &TLS_CREDS)],
);

static OBJECT_ADD: Command =
    Command::boxed("object-add", "Makes an object that others refer to.", &OBJECT_OPTIONS);
static OBJECT_DEL: Command =
    Command::new("object-del", "Forgets an object that nobody uses.", &[req("id", STR, "the object")]);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add(&OBJECT_ADD, |daemon, _, args| daemon.objects.add(args).map(|()| Value::Null))
        .add(&OBJECT_DEL, |daemon, _, args| daemon.objects.remove(args.str("id")?).map(|()| Value::Null));
}
