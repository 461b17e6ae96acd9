//! Objects: what `object-add` makes and other things refer to by id. Secrets, TLS credentials, throttle groups.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_filter::{Rate, ThrottleGroup, ThrottleLimits};
use blockmirror_qmp::{Args, QmpError};
use serde_json::Value;

use crate::Reply;
use crate::graph::is_well_formed;

/// What an object is.
#[derive(Debug)]
pub(crate) enum Object {
    /// Limits that throttle nodes share.
    ThrottleGroup(Arc<ThrottleGroup>),
    /// Where certificates lie, and for which side.
    TlsCreds(TlsCreds),
    /// Bytes that are not to be seen. Kept for scripts that set one up; nothing here reads it yet.
    Secret,
}

/// Credentials for TLS with certificates.
#[derive(Clone, Debug)]
pub(crate) struct TlsCreds {
    pub(crate) dir: PathBuf,
    pub(crate) server: bool,
    pub(crate) verify_peer: bool,
}

/// Objects by id.
#[derive(Debug, Default)]
pub(crate) struct Objects(Mutex<BTreeMap<String, Object>>);

impl Objects {
    /// Makes an object of the type `qom-type`.
    pub(crate) fn add(&self, args: &Args) -> Reply<()> {
        let id = args.str("id")?;
        if !is_well_formed(id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        let object = match args.str("qom-type")? {
            "throttle-group" => Object::ThrottleGroup(throttle_group(args)?),
            "tls-creds-x509" => Object::TlsCreds(tls_creds(args)?),
            "secret" => secret(args)?,
            other => return Err(QmpError::generic(format!("invalid object type: {other}"))),
        };
        let mut objects = self.0.lock();
        if objects.contains_key(id) {
            return Err(QmpError::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        objects.insert(id.to_owned(), object);
        Ok(())
    }

    /// Forgets an object that nobody uses.
    pub(crate) fn remove(&self, id: &str) -> Reply<()> {
        let mut objects = self.0.lock();
        match objects.get(id) {
            None => Err(QmpError::generic(format!("object '{id}' not found"))),
            // Each member holds the group.
            Some(Object::ThrottleGroup(group)) if Arc::strong_count(group) > 1 => {
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

fn throttle_group(args: &Args) -> Reply<Arc<ThrottleGroup>> {
    let limits = Args::new(args.get("limits").and_then(Value::as_object).cloned().unwrap_or_default());
    let figure = |name: &str| -> Reply<Option<u64>> {
        let given = match limits.opt_i64(name)? {
            None => args.opt_i64(&format!("x-{name}"))?,
            given => given,
        };
        given
            .map(u64::try_from)
            .transpose()
            .map_err(|_| QmpError::generic("bps/iops/max values must be within [0, 1000000000000000]"))
    };
    let rate = |name: &str| -> Reply<Rate> {
        let mut rate = Rate::default();
        rate.avg = figure(name)?.unwrap_or(rate.avg);
        rate.max = figure(&format!("{name}-max"))?.unwrap_or(rate.max);
        rate.max_length = figure(&format!("{name}-max-length"))?.unwrap_or(rate.max_length);
        Ok(rate)
    };
    let limits = ThrottleLimits {
        iops_total: rate("iops-total")?,
        iops_read: rate("iops-read")?,
        iops_write: rate("iops-write")?,
        bps_total: rate("bps-total")?,
        bps_read: rate("bps-read")?,
        bps_write: rate("bps-write")?,
        iops_size: figure("iops-size")?.unwrap_or(0),
    };
    ThrottleGroup::new(limits).map_err(|e| QmpError::generic(e.to_string()))
}

fn tls_creds(args: &Args) -> Reply<TlsCreds> {
    for refused in ["priority", "passwordid"] {
        if args.has(refused) {
            return Err(QmpError::generic(format!("'{refused}' of tls-creds-x509 is not supported")));
        }
    }
    let dir = args.opt_str("dir")?.ok_or_else(|| QmpError::generic("Missing 'dir' property value"))?;
    let authority = Path::new(dir).join("ca-cert.pem");
    if !authority.exists() {
        let path = authority.display();
        return Err(QmpError::generic(format!(
            "Unable to access credentials {path}: No such file or directory"
        )));
    }
    Ok(TlsCreds {
        dir: PathBuf::from(dir),
        server: args.opt_str("endpoint")? == Some("server"),
        verify_peer: args.opt_bool("verify-peer")?.unwrap_or(true),
    })
}

fn secret(args: &Args) -> Reply<Object> {
    match (args.has("data"), args.has("file")) {
        (true, true) => Err(QmpError::generic("'file' and 'data' are mutually exclusive")),
        (false, false) => Err(QmpError::generic("Either 'file' or 'data' must be provided")),
        _ => Ok(Object::Secret),
    }
}
