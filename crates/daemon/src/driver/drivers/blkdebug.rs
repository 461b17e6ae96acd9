//! `blkdebug`: fault injection, by QEMU's keys.

use std::sync::Arc;

use blockmirror_filter::{
    BlkdebugDisk, BlkdebugError, BlkdebugOptions, BlkdebugStorage, Event, InjectError, IoType, SetState,
};
use blockmirror_image_lock::Permission;
use blockmirror_qmp::QmpError;

use super::Driver;
use super::schema::NodeRef;
use crate::Reply;
use crate::arguments::{Int64, Size, arguments, choice, disagreement};
use crate::driver::{Opened, Opening};
use crate::errors::{qmp_error, system_text};
use crate::graph::{ALL_PERMS, ChildLink, Kind, Perms};

arguments! {
    pub(super) struct InjectErrorArgs("BlkdebugInjectErrorOptions", "Fails a request.") {
        event: String = "event", "what arms it, by QEMU's names";
        state: Option<i64> = "state", "in which state" [default "any"];
        iotype: Option<String> = "iotype", "which requests fail" [default "all but block-status"];
        errno: Option<i64> = "errno", "the error" [default "5"];
        sector: Option<Int64> = "sector", "only requests that touch this sector of 512 bytes";
        once: Option<bool> = "once", "only one request" [default "false"];
        immediately: Option<bool> = "immediately", "without effect: failures are immediate" [default "false"];
    }
}

arguments! {
    pub(super) struct SetStateArgs("BlkdebugSetStateOptions", "Changes the state.") {
        event: String = "event", "at what";
        state: Option<i64> = "state", "in which state" [default "any"];
        new_state: i64 = "new_state", "the state afterwards";
    }
}

choice! {
    pub(super) enum PermArg("BlockPermission", "What a user of a node may do with it.") {
        ConsistentRead = "consistent-read", "read what was written";
        Write = "write", "write";
        WriteUnchanged = "write-unchanged", "write what is read there already";
        Resize = "resize", "make it longer or shorter";
    }
}

arguments! {
    pub(super) struct BlkdebugArgs(
        "BlockdevOptionsBlkdebug",
        "Fault injection.",
        differs "the node makes its events itself, at each request; those of metadata are known and never \
         happen"
    ) {
        image: NodeRef = "image", "the node";
        config: Option<String> = "config", "a file of rules";
        align: Option<i64> = "align", "alignment that is asked of requests";
        max_transfer: Option<Size> = "max-transfer", "largest request";
        opt_write_zero: Option<Size> = "opt-write-zero", "alignment of zeroing";
        max_write_zero: Option<Size> = "max-write-zero", "longest zeroing";
        opt_discard: Option<Size> = "opt-discard", "alignment of discards";
        max_discard: Option<Size> = "max-discard", "longest discard";
        inject_error: Option<Vec<InjectErrorArgs>> = "inject-error", "rules that fail requests";
        set_state: Option<Vec<SetStateArgs>> = "set-state", "rules that change the state";
        take_child_perms: Option<Vec<PermArg>> = "take-child-perms", "what it needs of the node besides \
         what its users do";
        unshare_child_perms: Option<Vec<PermArg>> = "unshare-child-perms", "what no other user of the node \
         may do";
    }
}

/// Fault injection.
pub(super) struct Blkdebug;

impl Driver for Blkdebug {
    const NAME: &'static str = "blkdebug";
    const DOC: &'static str = "fault injection, before another node";
    type Options = BlkdebugArgs;

    fn kind(_: bool) -> Kind {
        Kind::Filter
    }

    fn open(opening: &mut Opening<'_>, args: BlkdebugArgs) -> Reply<Opened> {
        let image = opening.child(&args.image, opening.common.for_file())?;
        let read_only = opening.common.read_only || image.read_only;
        let rules = rules(&args)?;
        let link = image.below_filter();
        let device = Arc::new(BlkdebugDisk::new(Arc::clone(&link) as _, rules.clone()).map_err(qmp_error)?);
        let storage = match image.storage.clone() {
            Some(storage) => Some(Arc::new(BlkdebugStorage::new(storage, rules).map_err(qmp_error)?) as _),
            None => None,
        };
        let mut children = vec![image.filter_link("image", read_only, &link)];
        let (perm, unshared) = (perms(args.take_child_perms), perms(args.unshare_child_perms));
        if perm != Perms::NONE || unshared != Perms::NONE {
            let shared_perm = ALL_PERMS.iter().filter(|perm| !unshared.contains(*perm));
            let shared_perm = shared_perm.fold(Perms::NONE, Perms::with);
            let claim = image.filter_link("image", true, &link);
            children.push(ChildLink { perm, shared_perm, claim: true, link: None, ..claim });
        }
        Ok(Opened { storage, path: image.path, read_only, children, ..Opened::leaf(device, image.filename) })
    }
}

fn rules(args: &BlkdebugArgs) -> Reply<BlkdebugOptions> {
    let mut options = BlkdebugOptions::default();
    if let Some(config) = &args.config {
        options.read_config(config).map_err(|error| match &error {
            BlkdebugError::Read(why) => {
                QmpError::generic(format!("Could not read blkdebug config file: {}", system_text(why)))
            }
            _ => qmp_error(error),
        })?;
    }
    for rule in args.inject_error.iter().flatten() {
        options.inject_error.push(InjectError {
            state: state("state", rule.state)?,
            iotype: match &rule.iotype {
                Some(name) => Some(known("iotype", name, IoType::from_name(name))?),
                None => None,
            },
            errno: state("errno", rule.errno)?.unwrap_or(5),
            sector: rule.sector.and_then(|sector| u64::try_from(sector.0).ok()),
            once: rule.once.unwrap_or(false),
            immediately: rule.immediately.unwrap_or(false),
            ..InjectError::new(event(&rule.event)?)
        });
    }
    for rule in args.set_state.iter().flatten() {
        let new_state = state("new_state", Some(rule.new_state))?.unwrap_or(0);
        let (event, state) = (event(&rule.event)?, state("state", rule.state)?);
        options.set_state.push(SetState { event, state, new_state });
    }
    let size = |size: Option<Size>| size.map_or(0, |size| size.0);
    options.align = u64::try_from(args.align.unwrap_or(0)).map_err(|_| disagreement("align"))?;
    options.max_transfer = size(args.max_transfer);
    options.opt_write_zero = size(args.opt_write_zero);
    options.max_write_zero = size(args.max_write_zero);
    options.opt_discard = size(args.opt_discard);
    options.max_discard = size(args.max_discard);
    Ok(options)
}

fn perms(list: Option<Vec<PermArg>>) -> Perms {
    list.into_iter().flatten().fold(Perms::NONE, |perms, perm| {
        perms.with(match perm {
            PermArg::ConsistentRead => Permission::ConsistentRead,
            PermArg::Write => Permission::Write,
            PermArg::WriteUnchanged => Permission::WriteUnchanged,
            PermArg::Resize => Permission::Resize,
        })
    })
}

fn event(name: &str) -> Reply<Event> {
    known("event", name, Event::from_name(name))
}

fn known<T>(what: &str, name: &str, value: Option<T>) -> Reply<T> {
    value.ok_or_else(|| QmpError::generic(format!("Parameter '{what}' does not accept value '{name}'")))
}

fn state(name: &str, number: Option<i64>) -> Reply<Option<i32>> {
    let number = number.map(i32::try_from).transpose();
    number.map_err(|_| QmpError::generic(format!("Parameter '{name}' is out of range")))
}
