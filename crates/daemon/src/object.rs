//! Objects: what `object-add` makes and other things refer to by id. Secrets, TLS credentials, throttle
//! groups, I/O threads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use blockmirror_block::sync::Mutex;
use blockmirror_filter::{Rate, ThrottleGroup, ThrottleLimits};
use blockmirror_mirror::Tap;
use blockmirror_qmp::QmpError;
use serde_json::Map;

use crate::Reply;
use crate::arguments::Arguments;
use crate::ids::is_well_formed;
use crate::schema::{
    Endpoint, IothreadArgs, Limits, ObjectArgs, ObjectKind, SecretArgs, ThrottleGroupArgs, TlsCredsArgs,
};

/// What an object is.
#[derive(Debug)]
pub(crate) enum Object {
    /// Limits that throttle nodes share.
    ThrottleGroup(Arc<ThrottleGroup>),
    /// Where certificates lie, and for which side.
    TlsCreds(TlsCreds),
    /// Bytes that are not to be seen. Kept for scripts that set one up; nothing here reads it yet.
    Secret,
    /// An I/O thread, which does nothing: each export has threads of its own. Kept because configurations
    /// name one.
    Iothread(Arc<Iothread>),
}

/// An I/O thread. Whatever is assigned to it holds it.
#[derive(Debug)]
pub(crate) struct Iothread;

/// Credentials for TLS with certificates.
#[derive(Clone, Debug)]
pub(crate) struct TlsCreds {
    pub(crate) dir: PathBuf,
    pub(crate) server: bool,
    pub(crate) verify_peer: bool,
}

impl Object {
    fn is_used(&self) -> bool {
        match self {
            Self::ThrottleGroup(group) => Arc::strong_count(group) > 1,
            Self::Iothread(thread) => Arc::strong_count(thread) > 1,
            Self::TlsCreds(_) | Self::Secret => false,
        }
    }
}

/// Objects by id.
#[derive(Debug, Default)]
pub(crate) struct Objects(Mutex<BTreeMap<String, Object>>, Mutex<Vec<Assigned>>);

/// A node that `x-blockdev-set-iothread` has assigned to an I/O thread, for as long as it exists.
#[derive(Debug)]
struct Assigned {
    node: Weak<Tap>,
    /// Held, so that the thread counts as used.
    _thread: Arc<Iothread>,
}

impl Objects {
    /// Makes an object.
    pub(crate) fn add(&self, ObjectArgs { id, kind }: ObjectArgs) -> Reply<()> {
        if !is_well_formed(&id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        let object = match kind {
            ObjectKind::ThrottleGroup(args) => Object::ThrottleGroup(throttle_group(&args)?),
            ObjectKind::TlsCreds(args) => Object::TlsCreds(tls_creds(&args)?),
            ObjectKind::Secret(args) => secret(&args)?,
            ObjectKind::Iothread(args) => iothread(&args)?,
        };
        let mut objects = self.0.lock();
        if objects.contains_key(&id) {
            return Err(QmpError::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        objects.insert(id, object);
        Ok(())
    }

    /// Forgets an object that is not in use.
    pub(crate) fn remove(&self, id: &str) -> Reply<()> {
        self.forget_removed_nodes();
        let mut objects = self.0.lock();
        match objects.get(id) {
            None => Err(QmpError::generic(format!("object '{id}' not found"))),
            // Each member holds the group, each export and node its thread.
            Some(object) if object.is_used() => {
                Err(QmpError::generic(format!("object '{id}' is in use, can not be deleted")))
            }
            Some(_) => {
                objects.remove(id);
                Ok(())
            }
        }
    }

    /// The throttle group `id`.
    pub(crate) fn throttle_group(&self, id: &str) -> Reply<Arc<ThrottleGroup>> {
        match self.0.lock().get(id) {
            Some(Object::ThrottleGroup(group)) => Ok(Arc::clone(group)),
            _ => Err(QmpError::generic(format!("Throttle group '{id}' does not exist"))),
        }
    }

    /// The I/O thread `id`, if there is one.
    pub(crate) fn iothread(&self, id: &str) -> Option<Arc<Iothread>> {
        match self.0.lock().get(id) {
            Some(Object::Iothread(thread)) => Some(Arc::clone(thread)),
            _ => None,
        }
    }

    fn forget_removed_nodes(&self) {
        self.1.lock().retain(|assigned| assigned.node.strong_count() > 0);
    }

    /// Assigns a node to a thread, or to none.
    pub(crate) fn assign(&self, node: &Arc<Tap>, thread: Option<Arc<Iothread>>) {
        self.forget_removed_nodes();
        let mut assigned = self.1.lock();
        assigned.retain(|other| !std::ptr::eq(other.node.as_ptr(), Arc::as_ptr(node)));
        assigned.extend(thread.map(|thread| Assigned { node: Arc::downgrade(node), _thread: thread }));
    }

    /// The TLS credentials `id` for the given side.
    pub(crate) fn tls_creds(&self, id: &str, server: bool) -> Reply<TlsCreds> {
        match self.0.lock().get(id) {
            Some(Object::TlsCreds(creds)) if creds.server == server => Ok(creds.clone()),
            Some(Object::TlsCreds(_)) => {
                let side = if server { "server" } else { "client" };
                Err(QmpError::generic(format!("Expecting TLS credentials with a {side} endpoint")))
            }
            Some(_) => Err(QmpError::generic(format!("Object with id '{id}' is not TLS credentials"))),
            None => Err(QmpError::generic(format!("No TLS credentials with id '{id}'"))),
        }
    }
}

fn throttle_group(args: &ThrottleGroupArgs) -> Reply<Arc<ThrottleGroup>> {
    // Each limit is given in `limits`, or beside it.
    let none = Map::new();
    let given = args.limits.clone().map_or_else(|| Limits::parse(&none), Ok)?;
    let figure = |(inside, beside): (Option<i64>, Option<i64>)| {
        inside
            .or(beside)
            .map(u64::try_from)
            .transpose()
            .map_err(|_| QmpError::generic("bps/iops/max values must be within [0, 1000000000000000]"))
    };
    let rate = |[avg, max, max_length]: [(Option<i64>, Option<i64>); 3]| -> Reply<Rate> {
        let mut rate = Rate::default();
        rate.avg = figure(avg)?.unwrap_or(rate.avg);
        rate.max = figure(max)?.unwrap_or(rate.max);
        rate.max_length = figure(max_length)?.unwrap_or(rate.max_length);
        Ok(rate)
    };
    let limits = ThrottleLimits {
        iops_total: rate([
            (given.iops_total, args.iops_total),
            (given.iops_total_max, args.iops_total_max),
            (given.iops_total_max_length, args.iops_total_max_length),
        ])?,
        iops_read: rate([
            (given.iops_read, args.iops_read),
            (given.iops_read_max, args.iops_read_max),
            (given.iops_read_max_length, args.iops_read_max_length),
        ])?,
        iops_write: rate([
            (given.iops_write, args.iops_write),
            (given.iops_write_max, args.iops_write_max),
            (given.iops_write_max_length, args.iops_write_max_length),
        ])?,
        bps_total: rate([
            (given.bps_total, args.bps_total),
            (given.bps_total_max, args.bps_total_max),
            (given.bps_total_max_length, args.bps_total_max_length),
        ])?,
        bps_read: rate([
            (given.bps_read, args.bps_read),
            (given.bps_read_max, args.bps_read_max),
            (given.bps_read_max_length, args.bps_read_max_length),
        ])?,
        bps_write: rate([
            (given.bps_write, args.bps_write),
            (given.bps_write_max, args.bps_write_max),
            (given.bps_write_max_length, args.bps_write_max_length),
        ])?,
        iops_size: figure((given.iops_size, args.iops_size))?.unwrap_or(0),
    };
    ThrottleGroup::new(limits).map_err(|e| QmpError::generic(e.to_string()))
}

fn tls_creds(args: &TlsCredsArgs) -> Reply<TlsCreds> {
    for (refused, given) in [("priority", args.priority.is_some()), ("passwordid", args.passwordid.is_some())]
    {
        if given {
            return Err(QmpError::generic(format!("'{refused}' of tls-creds-x509 is not supported")));
        }
    }
    let dir = args.dir.as_ref().ok_or_else(|| QmpError::generic("Missing 'dir' property value"))?;
    let authority = Path::new(dir).join("ca-cert.pem");
    if !authority.exists() {
        let path = authority.display();
        return Err(QmpError::generic(format!(
            "Unable to access credentials {path}: No such file or directory"
        )));
    }
    Ok(TlsCreds {
        dir: PathBuf::from(dir),
        server: args.endpoint == Some(Endpoint::Server),
        verify_peer: args.verify_peer.unwrap_or(true),
    })
}

fn iothread(args: &IothreadArgs) -> Reply<Object> {
    for (name, value) in [
        ("poll-max-ns", args.poll_max_ns),
        ("poll-grow", args.poll_grow),
        ("poll-shrink", args.poll_shrink),
        ("aio-max-batch", args.aio_max_batch),
    ] {
        if value.is_some_and(|value| value < 0) {
            return Err(QmpError::generic(format!("{name} value must be in range [0, {}]", i64::MAX)));
        }
    }
    let (least, most) = (args.thread_pool_min.unwrap_or(0), args.thread_pool_max.unwrap_or(64));
    if least < 0 || most < 1 || most > i64::from(i32::MAX) || least > most {
        return Err(QmpError::generic("bad thread-pool-min/thread-pool-max values"));
    }
    Ok(Object::Iothread(Arc::new(Iothread)))
}

fn secret(args: &SecretArgs) -> Reply<Object> {
    match (args.data.is_some(), args.file.is_some()) {
        (true, true) => Err(QmpError::generic("'file' and 'data' are mutually exclusive")),
        (false, false) => Err(QmpError::generic("Either 'file' or 'data' must be provided")),
        _ => Ok(Object::Secret),
    }
}
