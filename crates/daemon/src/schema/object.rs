//! What objects are made from: `object-add`, and `--object` on the command line.

use blockmirror_qmp::schema::{Member, Object};
use serde_json::{Map, Value};

use crate::Reply;
use crate::arguments::{Arguments, arguments, choice, variant};

choice! {
    enum ObjectType(
        "ObjectType",
        "What kind of object.",
        differs "other objects are not there; `tls-creds-psk` is not because the TLS library has no \
         external pre-shared keys"
    ) {
        Iothread = "iothread", "an I/O thread; without effect";
        Secret = "secret", "bytes that are not to be seen";
        ThrottleGroup = "throttle-group", "limits that throttle nodes share";
        TlsCredsX509 = "tls-creds-x509", "certificates for TLS";
    }
}

arguments! {
    pub(crate) struct Limits("ThrottleLimits", "What members of a throttle group may do together.") {
        iops_total: Option<i64> = "iops-total", "requests per second" [default "0: no limit"];
        iops_total_max: Option<i64> = "iops-total-max", "the same while a burst lasts" [default "0: no \
         bursts"];
        iops_total_max_length: Option<i64> = "iops-total-max-length", "seconds that a burst may \
         last" [default "1"];
        iops_read: Option<i64> = "iops-read", "reads per second" [default "0: no limit"];
        iops_read_max: Option<i64> = "iops-read-max", "the same while a burst lasts" [default "0: no bursts"];
        iops_read_max_length: Option<i64> = "iops-read-max-length", "seconds that a burst may \
         last" [default "1"];
        iops_write: Option<i64> = "iops-write", "writes per second" [default "0: no limit"];
        iops_write_max: Option<i64> = "iops-write-max", "the same while a burst lasts" [default "0: no \
         bursts"];
        iops_write_max_length: Option<i64> = "iops-write-max-length", "seconds that a burst may \
         last" [default "1"];
        bps_total: Option<i64> = "bps-total", "bytes per second" [default "0: no limit"];
        bps_total_max: Option<i64> = "bps-total-max", "the same while a burst lasts" [default "0: no bursts"];
        bps_total_max_length: Option<i64> = "bps-total-max-length", "seconds that a burst may \
         last" [default "1"];
        bps_read: Option<i64> = "bps-read", "bytes read per second" [default "0: no limit"];
        bps_read_max: Option<i64> = "bps-read-max", "the same while a burst lasts" [default "0: no bursts"];
        bps_read_max_length: Option<i64> = "bps-read-max-length", "seconds that a burst may \
         last" [default "1"];
        bps_write: Option<i64> = "bps-write", "bytes written per second" [default "0: no limit"];
        bps_write_max: Option<i64> = "bps-write-max", "the same while a burst lasts" [default "0: no bursts"];
        bps_write_max_length: Option<i64> = "bps-write-max-length", "seconds that a burst may \
         last" [default "1"];
        iops_size: Option<i64> = "iops-size", "bytes beyond which a request counts as several"
            [default "0: each counts as one"];
    }
}

arguments! {
    pub(crate) struct ThrottleGroupArgs("ThrottleGroupProperties", "Limits that throttle nodes share.") {
        limits: Option<Limits> = "limits", "the limits; those below are the same one by one";
        iops_total: Option<i64> = "x-iops-total", "requests per second" [default "0: no limit"];
        iops_total_max: Option<i64> = "x-iops-total-max", "the same while a burst lasts" [default "0: no \
         bursts"];
        iops_total_max_length: Option<i64> = "x-iops-total-max-length", "seconds that a burst may \
         last" [default "1"];
        iops_read: Option<i64> = "x-iops-read", "reads per second" [default "0: no limit"];
        iops_read_max: Option<i64> = "x-iops-read-max", "the same while a burst lasts" [default "0: no \
         bursts"];
        iops_read_max_length: Option<i64> = "x-iops-read-max-length", "seconds that a burst may \
         last" [default "1"];
        iops_write: Option<i64> = "x-iops-write", "writes per second" [default "0: no limit"];
        iops_write_max: Option<i64> = "x-iops-write-max", "the same while a burst lasts" [default "0: no \
         bursts"];
        iops_write_max_length: Option<i64> = "x-iops-write-max-length", "seconds that a burst may \
         last" [default "1"];
        bps_total: Option<i64> = "x-bps-total", "bytes per second" [default "0: no limit"];
        bps_total_max: Option<i64> = "x-bps-total-max", "the same while a burst lasts" [default "0: no \
         bursts"];
        bps_total_max_length: Option<i64> = "x-bps-total-max-length", "seconds that a burst may \
         last" [default "1"];
        bps_read: Option<i64> = "x-bps-read", "bytes read per second" [default "0: no limit"];
        bps_read_max: Option<i64> = "x-bps-read-max", "the same while a burst lasts" [default "0: no bursts"];
        bps_read_max_length: Option<i64> = "x-bps-read-max-length", "seconds that a burst may \
         last" [default "1"];
        bps_write: Option<i64> = "x-bps-write", "bytes written per second" [default "0: no limit"];
        bps_write_max: Option<i64> = "x-bps-write-max", "the same while a burst lasts" [default "0: no \
         bursts"];
        bps_write_max_length: Option<i64> = "x-bps-write-max-length", "seconds that a burst may \
         last" [default "1"];
        iops_size: Option<i64> = "x-iops-size", "bytes beyond which a request counts as several"
            [default "0: each counts as one"];
    }
}

choice! {
    pub(crate) enum Endpoint("QCryptoTLSCredsEndpoint", "Which end.") {
        Client = "client", "the client's";
        Server = "server", "the server's";
    }
}

arguments! {
    pub(crate) struct TlsCredsArgs("TlsCredsX509Properties", "Certificates for TLS, in files with the names \
     that QEMU uses.") {
        dir: Option<String> = "dir", "where they lie; has to be given";
        endpoint: Option<Endpoint> = "endpoint", "for which end" [default "client"];
        verify_peer: Option<bool> = "verify-peer", "whether the other end's certificate is \
         checked" [default "true"];
        _sanity_check: Option<bool> = "sanity-check", "without effect" [default "true"];
        priority: Option<String> = "priority", "refused";
        passwordid: Option<String> = "passwordid", "refused";
    }
}

choice! {
    pub(crate) enum SecretFormat("QCryptoSecretFormat", "How the bytes are written.") {
        Raw = "raw", "as they are";
        Base64 = "base64", "in base64";
    }
}

arguments! {
    pub(crate) struct SecretArgs("SecretProperties", "Bytes that are not to be seen.") {
        data: Option<String> = "data", "the bytes";
        file: Option<String> = "file", "a file that holds them";
        _format: Option<SecretFormat> = "format", "how they are written" [default "raw"];
        _keyid: Option<String> = "keyid", "without effect";
        _iv: Option<String> = "iv", "without effect";
    }
}

arguments! {
    pub(crate) struct IothreadArgs(
        "IothreadProperties",
        "An I/O thread. There is none: each export has threads of its own, started when needed."
    ) {
        poll_max_ns: Option<i64> = "poll-max-ns", "without effect";
        poll_grow: Option<i64> = "poll-grow", "without effect";
        poll_shrink: Option<i64> = "poll-shrink", "without effect";
        aio_max_batch: Option<i64> = "aio-max-batch", "without effect";
        thread_pool_min: Option<i64> = "thread-pool-min", "without effect";
        thread_pool_max: Option<i64> = "thread-pool-max", "without effect";
    }
}

arguments! {
    struct AnyObject {
        qom_type: ObjectType = "qom-type", "what kind";
        id: String = "id", "its name";
    }
}

/// An object to be made.
pub(crate) static OBJECT_OPTIONS: Object = Object::union(
    "ObjectOptions",
    "An object to be made.",
    AnyObject::MEMBERS,
    "qom-type",
    &[
        variant::<IothreadArgs>("iothread"),
        variant::<SecretArgs>("secret"),
        variant::<ThrottleGroupArgs>("throttle-group"),
        variant::<TlsCredsArgs>("tls-creds-x509"),
    ],
);

/// The arguments of `object-add`.
pub(crate) struct ObjectArgs {
    pub(crate) id: String,
    pub(crate) kind: ObjectKind,
}

/// What kind of object, with what it is made from.
pub(crate) enum ObjectKind {
    Iothread(IothreadArgs),
    Secret(SecretArgs),
    ThrottleGroup(Box<ThrottleGroupArgs>),
    TlsCreds(TlsCredsArgs),
}

impl Arguments for ObjectArgs {
    const MEMBERS: &'static [Member] = AnyObject::MEMBERS;
    const CHANGEABLE: &'static [(&'static str, bool)] = &[];

    fn parse(members: &Map<String, Value>) -> Reply<Self> {
        let AnyObject { qom_type, id } = AnyObject::parse(members)?;
        let kind = match qom_type {
            ObjectType::Iothread => ObjectKind::Iothread(IothreadArgs::parse(members)?),
            ObjectType::Secret => ObjectKind::Secret(SecretArgs::parse(members)?),
            ObjectType::ThrottleGroup => {
                ObjectKind::ThrottleGroup(Box::new(ThrottleGroupArgs::parse(members)?))
            }
            ObjectType::TlsCredsX509 => ObjectKind::TlsCreds(TlsCredsArgs::parse(members)?),
        };
        Ok(Self { id, kind })
    }
}
