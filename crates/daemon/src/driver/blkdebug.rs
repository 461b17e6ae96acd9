//! `blkdebug`: fault injection, by QEMU's keys.

use std::sync::Arc;

use blockmirror_filter::{
    BlkdebugDisk, BlkdebugError, BlkdebugOptions, BlkdebugStorage, Event, InjectError, IoType, SetState,
};
use blockmirror_image_lock::Permission;
use blockmirror_qmp::{Args, QmpError};
use serde_json::Value;

use super::{ChildLink, Opened, Opening, qmp_error, system_text};
use crate::Reply;
use crate::graph::{ALL_PERMS, Perms};

pub(super) fn open(opening: &mut Opening<'_>, args: &Args) -> Reply<Opened> {
    let inherited = opening.common.for_file();
    let image = opening.child(args, "image", inherited)?;
    let read_only = opening.common.read_only || image.read_only;
    let options = options(args)?;
    let link = image.below_filter();
    let device = Arc::new(BlkdebugDisk::new(Arc::clone(&link) as _, options.clone()).map_err(qmp_error)?);
    let storage = match image.storage.clone() {
        Some(storage) => Some(Arc::new(BlkdebugStorage::new(storage, options).map_err(qmp_error)?) as _),
        None => None,
    };
    let mut children = vec![image.filter_link("image", read_only, &link)];
    let (perm, unshared) = (perms(args, "take-child-perms")?, perms(args, "unshare-child-perms")?);
    if perm != Perms::NONE || unshared != Perms::NONE {
        let shared_perm = ALL_PERMS.iter().filter(|perm| !unshared.contains(*perm));
        let shared_perm = shared_perm.fold(Perms::NONE, Perms::with);
        let claim = image.filter_link("image", true, &link);
        children.push(ChildLink { perm, shared_perm, claim: true, link: None, ..claim });
    }
    Ok(Opened { storage, path: image.path, read_only, children, ..Opened::leaf(device, image.filename) })
}

fn options(args: &Args) -> Reply<BlkdebugOptions> {
    let mut options = BlkdebugOptions::default();
    if let Some(config) = args.opt_str("config")? {
        options.read_config(config).map_err(|error| match &error {
            BlkdebugError::Read(why) => {
                QmpError::generic(format!("Could not read blkdebug config file: {}", system_text(why)))
            }
            _ => qmp_error(error),
        })?;
    }
    for rule in rules(args, "inject-error") {
        options.inject_error.push(InjectError {
            state: state(&rule, "state")?,
            iotype: match rule.opt_str("iotype")? {
                Some(name) => Some(known("iotype", name, IoType::from_name(name))?),
                None => None,
            },
            errno: state(&rule, "errno")?.unwrap_or(5),
            sector: rule.opt_i64("sector")?.and_then(|sector| u64::try_from(sector).ok()),
            once: rule.opt_bool("once")?.unwrap_or(false),
            immediately: rule.opt_bool("immediately")?.unwrap_or(false),
            ..InjectError::new(event(&rule)?)
        });
    }
    for rule in rules(args, "set-state") {
        let new_state = state(&rule, "new_state")?.unwrap_or(0);
        options.set_state.push(SetState { event: event(&rule)?, state: state(&rule, "state")?, new_state });
    }
    let size = |name| Ok::<_, QmpError>(args.opt_u64(name)?.unwrap_or(0));
    options.align = size("align")?;
    options.max_transfer = size("max-transfer")?;
    options.opt_write_zero = size("opt-write-zero")?;
    options.max_write_zero = size("max-write-zero")?;
    options.opt_discard = size("opt-discard")?;
    options.max_discard = size("max-discard")?;
    Ok(options)
}

/// The permissions that the member `name` lists.
fn perms(args: &Args, name: &str) -> Reply<Perms> {
    let list = args.get(name).and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).try_fold(Perms::NONE, |perms, perm| {
        Ok(perms.with(match perm {
            "consistent-read" => Permission::ConsistentRead,
            "write" => Permission::Write,
            "write-unchanged" => Permission::WriteUnchanged,
            "resize" => Permission::Resize,
            other => return known(name, other, None),
        }))
    })
}

fn rules(args: &Args, name: &str) -> Vec<Args> {
    let list = args.get(name).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|rule| rule.as_object().cloned()).map(Args::new).collect()
}

fn event(rule: &Args) -> Reply<Event> {
    let name = rule.str("event")?;
    known("event", name, Event::from_name(name))
}

fn known<T>(what: &str, name: &str, value: Option<T>) -> Reply<T> {
    value.ok_or_else(|| QmpError::generic(format!("Parameter '{what}' does not accept value '{name}'")))
}

fn state(rule: &Args, name: &str) -> Reply<Option<i32>> {
    let number = rule.opt_i64(name)?.map(i32::try_from).transpose();
    number.map_err(|_| QmpError::generic(format!("Parameter '{name}' is out of range")))
}
