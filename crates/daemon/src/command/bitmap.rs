//! Dirty bitmaps. They belong to the disk as its users see it, and follow them in a pivot.

use std::sync::Arc;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_mirror::{Error, GranularityChoice, Tap};
use blockmirror_qcow2::BitmapOptions;
use blockmirror_qcow2::format::bitmaps::BitmapEntry;
use blockmirror_qmp::QmpError;
use blockmirror_qmp::schema::Command;
use serde_json::Value;

use super::Commands;
use crate::Reply;
use crate::arguments::{Arguments, arguments};
use crate::context::Context;
use crate::errors::qmp_error;
use crate::graph::{HOLD_LIMIT, Node, StoredBitmaps};
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
        persistent: Option<bool> = "persistent", "whether the image stores it" [default "false"];
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
        "bitmaps go with the users of the node in a pivot, where they are not persistent any more, and stay \
         with it at a snapshot. A persistent one is in the image at once. A job marks all of its target in bitmaps there. Nodes \
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
        .add(&REMOVE, |services, _, one| remove_bitmap(&services.context, &one).map(|_| Value::Null))
        .add(&CLEAR, |services, _, one: OneBitmap| {
            stored(&services.context, &one.node, &one.name, true)?;
            with_bitmap(&services.context, &one, |tap, name| tap.clear_bitmap(name).map(drop))
                .map(|()| Value::Null)
        })
        .add(&ENABLE, |services, _, one: OneBitmap| {
            enable_stored(&services.context, &one)?;
            with_bitmap(&services.context, &one, |tap, name| tap.enable_bitmap(name)).map(|()| Value::Null)
        })
        .add(&DISABLE, |services, _, one: OneBitmap| {
            stored(&services.context, &one.node, &one.name, true)?;
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
    let graph = context.graph.lock();
    let node = graph.find(&args.node)?;
    graph.check_sees_writes(&node.name)?;
    if node.bitmap_entries().iter().any(|entry| entry.name == *name) {
        return Err(QmpError::generic(format!("Bitmap already exists: {name}")));
    }
    let granularity = match args.granularity {
        Some(bytes) if bytes < 512 || !bytes.is_power_of_two() => {
            return Err(QmpError::generic("Granularity must be power of 2 and at least 512"));
        }
        Some(bytes) => bytes.into(),
        None => default_granularity(node)?,
    };
    let enabled = args.disabled != Some(true);
    let add = |tap: &Tap| {
        let added = match enabled {
            true => tap.add_bitmap(name, granularity),
            false => tap.add_disabled_bitmap(name, granularity),
        };
        added.map_err(in_words)
    };
    if args.persistent != Some(true) {
        // Under the lock of the check: a format that is opened in the node sees the bitmap, or the check the
        // format.
        return add(&node.tap);
    }
    let cannot =
        |why: &str| QmpError::generic(format!("Can't store persistent bitmaps to {}: {why}", args.node));
    if node.qcow2.is_none() {
        return Err(cannot("Operation not supported"));
    }
    let stored = node.stored_bitmaps().filter(|_| !node.read_only);
    let stored = stored.ok_or_else(|| cannot("the node is read-only"))?;
    let may_pivot = graph.may_pivot(&node.name);
    drop(graph);
    // No write is seen by one of the two alone. No format lives in an image's node.
    let _drained = stored.tap.drain_for(HOLD_LIMIT);
    let _drained =
        _drained.ok_or_else(|| QmpError::generic("A write of a guest does not end: nothing was changed"))?;
    add(&stored.tap)?;
    let options = BitmapOptions::new().granularity(granularity).disabled(!enabled).kept_in_use(may_pivot);
    stored.image.add_bitmap(name, &options).map_err(|error| {
        // It was made a moment ago, and is in no use.
        let _ = stored.tap.remove_bitmap(name);
        cannot(&error.to_string())
    })
}

/// The bitmaps that the image of `node` stores, if `name`, which is to be changed, is one of them. An
/// inconsistent one is meant only where the node's tap has none of that name.
///
/// # Errors
/// The node is read-only; the bitmap is inconsistent, and is to be `consistent`.
pub(crate) fn stored(
    context: &Context,
    node: &str,
    name: &str,
    consistent: bool,
) -> Reply<Option<StoredBitmaps>> {
    let graph = context.graph.lock();
    let Some(node) = graph.get(node) else { return Ok(None) };
    let Some(entry) = node.bitmap_entries().into_iter().find(|entry| entry.name == *name) else {
        return Ok(None);
    };
    // One that came in a pivot has the name that another has in the image, and is not that one.
    if entry.in_use && node.tap.bitmaps().iter().any(|info| info.name == name) {
        return Ok(None);
    }
    if node.read_only {
        return Err(QmpError::generic(format!("Bitmap '{name}' is readonly and cannot be modified")));
    }
    if consistent && entry.in_use {
        return Err(QmpError::generic(format!("Bitmap '{name}' is inconsistent and cannot be used")));
    }
    Ok(node.stored_bitmaps())
}

/// What was removed, to be put back if the transaction fails.
pub(crate) struct Removed {
    node: String,
    name: String,
    tap: Arc<Tap>,
    /// Its bits, unless it was inconsistent, and whether it was enabled.
    bits: Option<DirtyBitmap>,
    enabled: bool,
    /// The image that has stored it, and how.
    image: Option<(StoredBitmaps, BitmapEntry)>,
}

impl Removed {
    /// Puts it back.
    ///
    /// # Errors
    /// The image cannot be written: there it is lost.
    pub(crate) fn put_back(self, context: &Context) -> Reply<()> {
        let Self { node, name, tap, bits, enabled, image } = self;
        let Some(bits) = bits else {
            // An inconsistent one has no bits to go back to.
            let put_back = image.map(|(stored, entry)| stored.image.insert_inconsistent_bitmap(&entry));
            return put_back.unwrap_or(Ok(())).map_err(qmp_error);
        };
        let put_back = image.map(|(stored, _)| stored.image.insert_bitmap(&name, bits.clone(), enabled));
        // Its name was free a moment ago.
        let _ = tap.adopt_bitmap(&name, bits, enabled);
        put_back.unwrap_or(Ok(())).map_err(qmp_error)?;
        let may_pivot = context.graph.lock().may_pivot(&node);
        if may_pivot { context.keep_bitmaps_in_use(&node) } else { Ok(()) }
    }
}

/// `block-dirty-bitmap-remove`.
pub(crate) fn remove_bitmap(context: &Context, one: &OneBitmap) -> Reply<Removed> {
    let image = stored(context, &one.node, &one.name, false)?;
    let image = image.and_then(|stored| {
        let entry = stored.image.bitmaps().ok()?.into_iter().find(|entry| entry.name == one.name)?;
        Some((stored, entry))
    });
    let info = with_bitmap(context, one, |tap, name| Ok(tap.bitmaps().into_iter().find(|b| b.name == name)))?;
    if info.as_ref().is_some_and(|info| info.busy) {
        let (disk, name) = (one.node.clone(), one.name.clone());
        return Err(in_words(Error::BitmapBusy { disk, name }));
    }
    if let Some((stored, _)) = &image {
        stored.image.remove_bitmap(&one.name).map_err(qmp_error)?;
    }
    let enabled = info.as_ref().is_some_and(|info| info.enabled);
    let bits = match info.is_none() && image.is_some() {
        true => None,
        false => Some(with_bitmap(context, one, |tap, name| tap.remove_bitmap(name))?),
    };
    let tap = Arc::clone(&context.graph.lock().find(&one.node)?.tap);
    Ok(Removed { node: one.node.clone(), name: one.name.clone(), tap, bits, enabled, image })
}

/// Before a bitmap records: the image records as well, so that it marks the stored one before a write.
pub(crate) fn enable_stored(context: &Context, one: &OneBitmap) -> Reply<()> {
    match stored(context, &one.node, &one.name, true)? {
        Some(stored) => stored.image.enable_bitmap(&one.name).map_err(qmp_error),
        None => Ok(()),
    }
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
    let stored = stored(context, node, target, true)?;
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
    if let Some(stored) = stored {
        // The image has them first: a kill must not leave it without.
        let merge = |other: &&DirtyBitmap| stored.image.merge_bitmap(target, other);
        others.iter().try_for_each(merge).map_err(qmp_error)?;
    }
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
