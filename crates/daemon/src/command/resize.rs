//! `block_resize`.

use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_mirror::Error;
use blockmirror_qmp::schema::Command;
use blockmirror_qmp::{QmpError, Session};
use serde_json::Value;

use super::{Commands, Services};
use crate::Reply;
use crate::arguments::{Arguments, arguments};
use crate::errors::qmp_error;
use crate::graph::{BlockedParents, HOLD_LIMIT, Node};

arguments! {
    struct ResizeArgs {
        device: Option<String> = "device", "a guest's device, of which there are none";
        node_name: Option<String> = "node-name", "the node; has to be given";
        size: i64 = "size", "the new length in bytes, a multiple of 512";
    }
}

static BLOCK_RESIZE: Command = Command::new(
    "block_resize",
    "Makes a node that is not in use longer or shorter. Bytes past a new end are gone.",
    ResizeArgs::MEMBERS,
)
.differs("the node must not be in use");

pub(super) fn register(commands: &mut Commands<'_>) {
    commands.add(&BLOCK_RESIZE, block_resize);
}

/// Looks up what a command names that takes a guest's device or a node.
pub(super) fn named_node<'a>(
    graph: &'a crate::graph::Graph,
    device: Option<&str>,
    node: Option<&str>,
) -> Reply<&'a Node> {
    let (device, name) = (device.unwrap_or_default(), node.unwrap_or_default());
    graph
        .get(name)
        .ok_or_else(|| QmpError::generic(format!("Cannot find device='{device}' nor node-name='{name}'")))
}

fn block_resize(services: &Arc<Services>, _: &Session, args: ResizeArgs) -> Reply<Value> {
    let (tap, device, size, _blocked) = {
        let mut graph = services.context.graph.lock();
        let node = named_node(&graph, args.device.as_deref(), args.node_name.as_deref())?;
        let size = u64::try_from(args.size);
        let size = size.map_err(|_| QmpError::generic("Parameter 'size' expects a >0 size"))?;
        if !size.is_multiple_of(512) {
            return Err(QmpError::generic("The new size must be a multiple of 512"));
        }
        graph.check_unused(&node.name)?;
        if node.read_only {
            return Err(QmpError::generic("Image is read-only"));
        }
        if let Some(bitmap) = node.tap.bitmaps().into_iter().find(|bitmap| bitmap.busy) {
            let (disk, name) = (node.tap.name().to_owned(), bitmap.name);
            return Err(qmp_error(Error::BitmapBusy { disk, name }));
        }
        let (name, tap, device) = (node.name.clone(), Arc::clone(&node.tap), Arc::clone(&node.device));
        (tap, device, size, BlockedParents::new(&services.context.graph, &mut graph, vec![name]))
    };
    let drained = tap.drain_for(HOLD_LIMIT);
    let mut drained =
        drained.ok_or_else(|| QmpError::generic("A write of a guest does not end: nothing was changed"))?;
    // Below the tap, whose own lock queries take.
    let resized = device.resize(size, true).map_err(qmp_error);
    // The disk may have its new length although that has failed: the tap takes the length that there is.
    let replaced = drained.replace(device).map_err(qmp_error);
    resized.and(replaced).map(|_| Value::Null)
}
