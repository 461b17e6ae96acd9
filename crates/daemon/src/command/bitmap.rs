//! Dirty bitmaps. They belong to the disk as its users see it, and follow them in a pivot.

use std::sync::Arc;

use blockmirror_mirror::{Error, GranularityChoice, Tap};
use blockmirror_qmp::schema::{Alternate, BOOL, Command, Member, Object, STR, Type, UINT32, opt, req};
use blockmirror_qmp::{Args, QmpError};
use serde_json::Value;

use super::Commands;
use crate::Reply;
use crate::daemon::Daemon;
use crate::graph::Node;

/// As an image could hold it.
const LONGEST_NAME: usize = 1023;

const NODE: Member = req("node", STR, "the node");
const NAME: Member = req("name", STR, "the bitmap");

/// The arguments of `block-dirty-bitmap-add`, in a transaction too.
pub(crate) static ADD_MEMBERS: [Member; 5] = [
    NODE,
    NAME,
    opt("granularity", UINT32, "bytes per bit, a power of two of at least 512")
        .default("as for a mirror to the node"),
    opt("persistent", BOOL, "refused if true").default("false"),
    opt("disabled", BOOL, "whether it records nothing until it is enabled").default("false"),
];
/// The arguments of the commands about one bitmap.
pub(crate) static ONE_MEMBERS: [Member; 2] = [NODE, NAME];

/// A bitmap, with its node.
pub(crate) static ONE_BITMAP: Object = Object::new("BlockDirtyBitmap", "A bitmap of a node.", &ONE_MEMBERS);
/// A bitmap of the node that is spoken of, or of another.
pub(crate) static BITMAP_OR_STR: Alternate = Alternate::new(
    "BlockDirtyBitmapOrStr",
    "A bitmap: its name, or with the node that it belongs to.",
    &[STR, Type::Object(&ONE_BITMAP)],
);

/// The arguments of `block-dirty-bitmap-merge`, in a transaction too.
pub(crate) static MERGE_MEMBERS: [Member; 3] = [
    NODE,
    req("target", STR, "the bitmap that gets the others"),
    req("bitmaps", Type::Array(&Type::Alternate(&BITMAP_OR_STR)), "the others, of this node or of another"),
];

static ADD: Command =
    Command::new("block-dirty-bitmap-add", "Begins to record what is written.", &ADD_MEMBERS)
        .differs(
            "bitmaps are not stored in images: `persistent` is refused. They go with the users of the node in a pivot and a \
             snapshot. A job marks all of its target in bitmaps there. Nodes that a format lives in are refused: it writes past \
             their bitmaps",
        );
static REMOVE: Command = Command::new("block-dirty-bitmap-remove", "Forgets a bitmap.", &ONE_MEMBERS);
static CLEAR: Command = Command::new("block-dirty-bitmap-clear", "Starts a bitmap anew.", &ONE_MEMBERS);
static ENABLE: Command = Command::new("block-dirty-bitmap-enable", "Records from now on.", &ONE_MEMBERS);
static DISABLE: Command = Command::new(
    "block-dirty-bitmap-disable",
    "Records nothing any more, and keeps what there is.",
    &ONE_MEMBERS,
);
static MERGE: Command = Command::new(
    "block-dirty-bitmap-merge",
    "Adds to a bitmap what others hold; all or nothing.",
    &MERGE_MEMBERS,
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add(&ADD, |daemon, _, args| daemon.add_bitmap(args).map(|()| Value::Null))
        .add(&REMOVE, |daemon, _, args| {
            daemon.with_bitmap(args, |tap, name| tap.remove_bitmap(name).map(drop)).map(|()| Value::Null)
        })
        .add(&CLEAR, |daemon, _, args| {
            daemon.with_bitmap(args, |tap, name| tap.clear_bitmap(name).map(drop)).map(|()| Value::Null)
        })
        .add(&ENABLE, |daemon, _, args| {
            daemon.with_bitmap(args, |tap, name| tap.enable_bitmap(name)).map(|()| Value::Null)
        })
        .add(&DISABLE, |daemon, _, args| {
            daemon.with_bitmap(args, |tap, name| tap.disable_bitmap(name)).map(|()| Value::Null)
        })
        .add(&MERGE, |daemon, _, args| daemon.merge_bitmaps(args).map(|()| Value::Null));
}

impl Daemon {
    /// `block-dirty-bitmap-add`.
    pub(crate) fn add_bitmap(&self, args: &Args) -> Reply<()> {
        let name = args.str("name")?;
        if name.is_empty() {
            return Err(QmpError::generic("Bitmap name cannot be empty"));
        }
        if name.len() > LONGEST_NAME {
            return Err(QmpError::generic("Bitmap name too long"));
        }
        if args.opt_bool("persistent")?.unwrap_or(false) {
            return Err(QmpError::generic("Persistent bitmaps are not supported"));
        }
        let graph = self.graph.lock();
        let node = graph.find(args.str("node")?)?;
        graph.check_sees_writes(&node.name)?;
        let granularity = match args.opt_u64("granularity")? {
            Some(bytes) if bytes < 512 || !bytes.is_power_of_two() => {
                return Err(QmpError::generic("Granularity must be power of 2 and at least 512"));
            }
            Some(bytes) => bytes,
            None => default_granularity(node)?,
        };
        let tap = Arc::clone(&node.tap);
        drop(graph);
        let added = if args.opt_bool("disabled")?.unwrap_or(false) {
            tap.add_disabled_bitmap(name, granularity)
        } else {
            tap.add_bitmap(name, granularity)
        };
        added.map_err(in_words)
    }

    /// Does something to the bitmap `name` of the node `node`.
    pub(crate) fn with_bitmap<T>(
        &self,
        args: &Args,
        work: impl FnOnce(&Arc<Tap>, &str) -> Result<T, Error>,
    ) -> Reply<T> {
        let node = args.str("node")?;
        let tap = {
            let graph = self.graph.lock();
            let node =
                graph.get(node).ok_or_else(|| QmpError::generic(format!("Node '{node}' not found")))?;
            Arc::clone(&node.tap)
        };
        work(&tap, args.str("name")?).map_err(in_words)
    }

    /// `block-dirty-bitmap-merge`.
    pub(crate) fn merge_bitmaps(&self, args: &Args) -> Reply<()> {
        let node = args.str("node")?;
        let tap = Arc::clone(&self.graph.lock().find(node)?.tap);
        if !tap.bitmaps().iter().any(|bitmap| Some(&*bitmap.name) == args.opt_str("target").ok().flatten()) {
            return Err(QmpError::generic(format!("Dirty bitmap '{}' not found", args.str("target")?)));
        }
        let others = args.get("bitmaps").and_then(Value::as_array).into_iter().flatten().map(|other| {
            let (node, name) = match other {
                Value::Object(members) => {
                    let args = Args::new(members.clone());
                    (args.str("node")?.to_owned(), args.str("name")?.to_owned())
                }
                other => (node.to_owned(), other.as_str().unwrap_or_default().to_owned()),
            };
            let tap = Arc::clone(&self.graph.lock().find(&node)?.tap);
            tap.bitmap(&name).map_err(in_words)
        });
        let others = others.collect::<Reply<Vec<_>>>()?;
        let others: Vec<_> = others.iter().collect();
        tap.merge_bitmap(args.str("target")?, &others).map_err(in_words)
    }
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
