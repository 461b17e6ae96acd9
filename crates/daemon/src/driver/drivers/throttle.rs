//! `throttle`: a member of a throttle group.

use std::sync::Arc;

use blockmirror_filter::{Throttle, ThrottleStorage};
use serde_json::Value;

use super::schema::NodeRef;
use super::{Below, Driver, FlatOptions, Rebased};
use crate::Reply;
use crate::arguments::arguments;
use crate::driver::{Opened, Opening};
use crate::graph::Kind;
use crate::object::Objects;

arguments! {
    pub(super) struct ThrottleArgs("BlockdevOptionsThrottle", "Slows another node down.") {
        throttle_group: String = "throttle-group", "id of the group whose limits hold" [reopen];
        file: NodeRef = "file", "the node" [reopen];
    }
}

/// Slows another node down.
pub(super) struct ThrottleDriver;

impl Driver for ThrottleDriver {
    const NAME: &'static str = "throttle";
    const DOC: &'static str = "slows another node down";
    type Options = ThrottleArgs;

    fn kind(_: bool) -> Kind {
        Kind::Filter
    }

    fn open(opening: &mut Opening<'_>, options: ThrottleArgs) -> Reply<Opened> {
        let group = opening.context.objects.throttle_group(&options.throttle_group)?;
        let file = opening.child(&options.file, opening.common.for_file())?;
        let read_only = opening.common.read_only || file.read_only;
        let link = file.below_filter();
        let device = Arc::new(Throttle::new(Arc::clone(&link) as _, &group));
        let storage =
            file.storage.clone().map(|storage| Arc::new(ThrottleStorage::new(storage, &group)) as _);
        let children = vec![file.filter_link("file", read_only, &link)];
        Ok(Opened { storage, path: file.path, read_only, children, ..Opened::leaf(device, file.filename) })
    }

    fn needs_rebase(old: &FlatOptions, new: &ThrottleArgs) -> bool {
        old.get("throttle-group").and_then(Value::as_str) != Some(&new.throttle_group)
    }

    fn rebase(objects: &Objects, options: &ThrottleArgs, below: Below) -> Reply<Rebased> {
        let group = objects.throttle_group(&options.throttle_group)?;
        let device = Arc::new(Throttle::new(below.link as _, &group));
        let wrap = move |storage| Arc::new(ThrottleStorage::new(storage, &group)) as _;
        Ok(Rebased { device, wrap: Some(Box::new(wrap)) })
    }
}
