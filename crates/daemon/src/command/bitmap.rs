//! Dirty bitmaps. They belong to the disk as its users see it, and follow them in a pivot.

use std::sync::Arc;

use blockmirror_mirror::{Error, GranularityChoice, Tap};
use blockmirror_qmp::QmpError;
use blockmirror_qmp::schema::Command;
use serde_json::Value;

use super::Commands;
use crate::Reply;
use crate::arguments::{Arguments, arguments};
use crate::context::Context;
use crate::graph::Node;
use crate::schema::{BitmapRef, OneBitmap};

/// As an image could hold it.
const LONGEST_NAME: usize = 1023;

arguments! {
    /// The arguments of `block-dirty-bitmap-add`, in a transaction too.
    pub(crate) struct AddBitmap("BlockDirtyBitmapAdd", "A new bitmap.") {
        node: String = "node", "the node";
        name: String = "name", "the bitmap";
        granularity: Option<u32> = "granularity", "bytes per bit, a power of two of at least 512"
            [default "as for a mirror to the node"];
        persistent: Option<bool> = "persistent", "refused if true" [default "false"];
        disabled: Option<bool> = "disabled", "whether it records nothing until it is enabled"
            [default "false"];
    }
}

arguments! {
    /// The arguments of `block-dirty-bitmap-merge`, in a transaction too.
    pub(crate) struct MergeBitmaps("BlockDirtyBitmapMerge", "Bitmaps to be merged.") {
        node: String = "node", "the node";
        target: String = "target", "the bitmap that gets the others";
        bitmaps: Vec<BitmapRef> = "bitmaps", "the others, of this node or of another";
    }
}

static ADD: Command =
    Command::new("block-dirty-bitmap-add", "Begins to record what is written.", AddBitmap::MEMBERS).differs(
        "bitmaps are not stored in images: `persistent` is refused. They go with the users of the node \
         in a pivot, and stay with it at a snapshot. A job marks all of its target in bitmaps there. Nodes \
         that a format lives in are refused: it writes past their bitmaps",
    );
static REMOVE: Command = Command::new("block-dirty-bitmap-remove", "Forgets a bitmap.", OneBitmap::MEMBERS);
static CLEAR: Command = Command::new("block-dirty-bitmap-clear", "Starts a bitmap anew.", OneBitmap::MEMBERS);
static ENABLE: Command =
    Command::new("block-dirty-bitmap-enable", "Records from now on.", OneBitmap::MEMBERS);
static DISABLE: Command = Command::new(
    "block-dirty-bitmap-disable",
    "Records nothing any more, and keeps what there is.",
    OneBitmap::MEMBERS,
);
static MERGE: Command = Command::new(
    "block-dirty-bitmap-merge",
    "Adds to a bitmap what others hold; all or nothing.",
    MergeBitmaps::MEMBERS,
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add(&ADD, |services, _, args: AddBitmap| add_bitmap(&services.context, &args).map(|()| Value::Null))
        .add(&REMOVE, |services, _, one| {
            with_bitmap(&services.context, &one, |tap, name| tap.remove_bitmap(name).map(drop))
                .map(|()| Value::Null)
        })
        .add(&CLEAR, |services, _, one| {
            with_bitmap(&services.context, &one, |tap, name| tap.clear_bitmap(name).map(drop))
                .map(|()| Value::Null)
        })
        .add(&ENABLE, |services, _, one| {
            with_bitmap(&services.context, &one, |tap, name| tap.enable_bitmap(name)).map(|()| Value::Null)
        })
        .add(&DISABLE, |services, _, one| {
            with_bitmap(&services.context, &one, |tap, name| tap.disable_bitmap(name)).map(|()| Value::Null)
        })
        .add(&MERGE, |services, _, args: MergeBitmaps| {
            merge_bitmaps(&services.context, &args).map(|()| Value::Null)
        });
}

/// `block-dirty-bitmap-add`.
pub(crate) fn add_bitmap(context: &Context, args: &AddBitmap) -> Reply<()> {
    let name = &args.name;
    if name.is_empty() {
        return Err(QmpError::generic("Bitmap name cannot be empty"));
    }
    if name.len() > LONGEST_NAME {
        return Err(QmpError::generic("Bitmap name too long"));
    }
    if args.persistent == Some(true) {
        return Err(QmpError::generic("Persistent bitmaps are not supported"));
    }
    let graph = context.graph.lock();
    let node = graph.find(&args.node)?;
    graph.check_sees_writes(&node.name)?;
    let granularity = match args.granularity {
        Some(bytes) if bytes < 512 || !bytes.is_power_of_two() => {
            return Err(QmpError::generic("Granularity must be power of 2 and at least 512"));
        }
        Some(bytes) => bytes.into(),
        None => default_granularity(node)?,
    };
    // Under the lock of the check: a format that is opened in the node sees the bitmap, or the check the
    // format.
    let added = if args.disabled == Some(true) {
        node.tap.add_disabled_bitmap(name, granularity)
    } else {
        node.tap.add_bitmap(name, granularity)
    };
    added.map_err(in_words)
}

/// Does something to a bitmap of a node.
fn with_bitmap<T>(
    context: &Context,
    OneBitmap { node, name }: &OneBitmap,
    work: impl FnOnce(&Arc<Tap>, &str) -> Result<T, Error>,
) -> Reply<T> {
    let tap = {
        let graph = context.graph.lock();
        let node = graph.get(node).ok_or_else(|| QmpError::generic(format!("Node '{node}' not found")))?;
        Arc::clone(&node.tap)
    };
    work(&tap, name).map_err(in_words)
}

/// `block-dirty-bitmap-merge`.
pub(crate) fn merge_bitmaps(context: &Context, args: &MergeBitmaps) -> Reply<()> {
    let MergeBitmaps { node, target, bitmaps } = args;
    let tap = Arc::clone(&context.graph.lock().find(node)?.tap);
    if !tap.bitmaps().iter().any(|bitmap| bitmap.name == *target) {
        return Err(QmpError::generic(format!("Dirty bitmap '{target}' not found")));
    }
    let others = bitmaps.iter().map(|other| {
        let tap = Arc::clone(&context.graph.lock().find(other.node.as_ref().unwrap_or(node))?.tap);
        tap.bitmap(&other.name).map_err(in_words)
    });
    let others = others.collect::<Reply<Vec<_>>>()?;
    let others: Vec<_> = others.iter().collect();
    tap.merge_bitmap(target, &others).map_err(in_words)
}

fn default_granularity(node: &Node) -> Reply<u64> {
    use blockmirror_block::BlockDevice;
    let choice = GranularityChoice::new(None, node.device.geometry().cluster_size);
    choice.map(|choice| choice.bytes).map_err(|e| QmpError::generic(e.to_string()))
}

/// Errors of bitmaps in the protocol's words.
pub(crate) fn in_words(error: Error) -> QmpError {
    QmpError::generic(match error {
        Error::NoBitmap { name, .. } => format!("Dirty bitmap '{name}' not found"),
        Error::BitmapExists { name, .. } => format!("Bitmap already exists: {name}"),
        Error::BitmapBusy { name, .. } => {
            format!("Bitmap '{name}' is currently in use by another operation and cannot be used")
        }
        other => other.to_string(),
    })
}
