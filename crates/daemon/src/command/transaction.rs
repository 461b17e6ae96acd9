//! `transaction`: several actions at one instant, all or none.
//!
//! Guests of all disks concerned are held meanwhile. Bitmap actions are done one after the other, each with a
//! way back; mirrors are started last, when nothing else can fail. With `completion-mode` grouped the mirrors
//! end together too.

use std::collections::BTreeSet;
use std::sync::Arc;

use blockmirror_mirror::{Drained, Tap};
use blockmirror_qmp::schema::{Command, Enum, Object, Type, case, opt, req, value};
use blockmirror_qmp::{Args, QmpError, Session};
use serde_json::Value;

use super::Commands;
use super::bitmap::{ADD_MEMBERS, MERGE_MEMBERS, ONE_BITMAP, in_words};
use super::block::BLOCKDEV_MIRROR_MEMBERS;
use super::snapshot::{Naming, SNAPSHOT_MEMBERS, SNAPSHOT_SYNC_MEMBERS, Snapshot};
use crate::Reply;
use crate::daemon::Daemon;
use crate::graph::HOLD_LIMIT;
use crate::job::{MirrorRequest, Prepared};

static ACTION_KIND: Enum = Enum::new(
    "TransactionActionKind",
    "What is done.",
    &[
        value("abort", "nothing: the transaction fails"),
        value("block-dirty-bitmap-add", "the command"),
        value("block-dirty-bitmap-remove", "the command"),
        value("block-dirty-bitmap-clear", "the command"),
        value("block-dirty-bitmap-enable", "the command"),
        value("block-dirty-bitmap-disable", "the command"),
        value("block-dirty-bitmap-merge", "the command"),
        value("blockdev-mirror", "the command").ours(),
        value("blockdev-snapshot", "the command"),
        value("blockdev-snapshot-sync", "the command"),
    ],
);

static ABORT: Object = Object::new("Abort", "Nothing.", &[]);
static BITMAP_ADD: Object = Object::new("BlockDirtyBitmapAdd", "A new bitmap.", &ADD_MEMBERS);
static BITMAP_MERGE: Object = Object::new("BlockDirtyBitmapMerge", "Bitmaps to be merged.", &MERGE_MEMBERS);
static MIRROR: Object = Object::new("BlockdevMirror", "A mirror.", BLOCKDEV_MIRROR_MEMBERS);
static SNAPSHOT: Object = Object::new("BlockdevSnapshot", "An overlay that is there.", &SNAPSHOT_MEMBERS);
static SNAPSHOT_SYNC: Object =
    Object::new("BlockdevSnapshotSync", "An overlay that is opened.", &SNAPSHOT_SYNC_MEMBERS);

macro_rules! wrappers {
    ($($wrapper:ident $name:literal $data:ident;)*) => {
        $(static $wrapper: Object = Object::new(
            $name,
            "The arguments of an action.",
            &[req("data", Type::Object(&$data), "the arguments")],
        );)*
    };
}
wrappers! {
    ABORT_DATA "AbortWrapper" ABORT;
    ADD_DATA "BlockDirtyBitmapAddWrapper" BITMAP_ADD;
    ONE_DATA "BlockDirtyBitmapWrapper" ONE_BITMAP;
    MERGE_DATA "BlockDirtyBitmapMergeWrapper" BITMAP_MERGE;
    MIRROR_DATA "BlockdevMirrorWrapper" MIRROR;
    SNAPSHOT_DATA "BlockdevSnapshotWrapper" SNAPSHOT;
    SNAPSHOT_SYNC_DATA "BlockdevSnapshotSyncWrapper" SNAPSHOT_SYNC;
}

static ACTION: Object = Object::union(
    "TransactionAction",
    "One action.",
    &[req("type", Type::Enum(&ACTION_KIND), "what is done")],
    "type",
    &[
        case("abort", &ABORT_DATA),
        case("block-dirty-bitmap-add", &ADD_DATA),
        case("block-dirty-bitmap-remove", &ONE_DATA),
        case("block-dirty-bitmap-clear", &ONE_DATA),
        case("block-dirty-bitmap-enable", &ONE_DATA),
        case("block-dirty-bitmap-disable", &ONE_DATA),
        case("block-dirty-bitmap-merge", &MERGE_DATA),
        case("blockdev-mirror", &MIRROR_DATA),
        case("blockdev-snapshot", &SNAPSHOT_DATA),
        case("blockdev-snapshot-sync", &SNAPSHOT_SYNC_DATA),
    ],
);

static COMPLETION: Enum = Enum::new(
    "ActionCompletionMode",
    "How the jobs of a transaction end.",
    &[value("individual", "each by itself"), value("grouped", "all at one instant, or none")],
);
static PROPERTIES: Object = Object::new(
    "TransactionProperties",
    "How a transaction is done.",
    &[opt("completion-mode", Type::Enum(&COMPLETION), "how its jobs end").default("individual")],
);

static TRANSACTION: Command = Command::new(
    "transaction",
    "Does several things at one instant: all, or none.",
    &[
        req(
            "actions",
            Type::Array(&Type::Object(&ACTION)),
            "what is done, in this order; mirrors start last",
        ),
        opt("properties", Type::Object(&PROPERTIES), "how it is done"),
    ],
)
.differs(
    "mirrors can be actions, and with `completion-mode` grouped they pivot, or keep their copies, at one instant; the actions \
     `blockdev-backup`, `drive-backup` and `blockdev-snapshot-internal-sync` are not there",
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands.add(&TRANSACTION, transaction);
}

type Undo = Box<dyn FnOnce()>;

/// What has been done so far, to be undone if something fails.
#[derive(Default)]
struct Progress {
    undo: Vec<Undo>,
    /// How many of `undo` there were, and what was snapshot then.
    snapshots: Vec<(usize, Snapshot)>,
    mirrors: Vec<Prepared>,
}

impl Progress {
    /// Takes back what was done, the latest first.
    ///
    /// # Errors
    /// A snapshot that cannot be taken back. It stays as it is, and those before it, on which it may stand.
    fn undo(mut self, daemon: &Daemon) -> Reply<()> {
        let mut result = Ok(());
        loop {
            let last = self.snapshots.last().map(|(before, _)| *before);
            if last == Some(self.undo.len()) {
                match self.snapshots.pop() {
                    Some((_, snapshot)) if result.is_ok() => result = snapshot.undo(daemon),
                    Some((_, snapshot)) => drop(snapshot.keep()),
                    None => {}
                }
            } else if let Some(undo) = self.undo.pop() {
                undo();
            } else {
                return result;
            }
        }
    }
}

fn transaction(daemon: &Arc<Daemon>, session: &Session, args: &Args) -> Reply<Value> {
    let actions: Vec<Args> = objects(args.get("actions"));
    let properties =
        Args::new(args.get("properties").and_then(Value::as_object).cloned().unwrap_or_default());
    let grouped = properties.opt_str("completion-mode")? == Some("grouped");
    let held = hold(daemon, &actions)?;
    let mut progress = Progress::default();
    let result = actions
        .iter()
        .try_for_each(|action| act(daemon, action, grouped, &mut progress))
        .and_then(|()| start(daemon, session, &mut progress, grouped));
    let result = result.map_err(|error| {
        // No job is there any more: what was started has gone again.
        for mirror in &progress.mirrors {
            daemon.forget_mirror(mirror);
        }
        match std::mem::take(&mut progress).undo(daemon) {
            Ok(()) => error,
            Err(left) => QmpError::generic(format!("{error}; and it could not be undone: {left}")),
        }
    });
    let overlays: Vec<_> = progress.snapshots.into_iter().map(|(_, snapshot)| snapshot.keep()).collect();
    drop(held);
    overlays.iter().for_each(|overlay| daemon.refresh_from(overlay));
    result.map(|()| Value::Null)
}

fn objects(list: Option<&Value>) -> Vec<Args> {
    let list = list.and_then(Value::as_array).into_iter().flatten();
    list.filter_map(|action| action.as_object().cloned()).map(Args::new).collect()
}

fn data(action: &Args) -> Args {
    Args::new(action.get("data").and_then(Value::as_object).cloned().unwrap_or_default())
}

/// Holds the guests of all disks that the actions are about. Those of nodes that do not exist fail later, in
/// words.
fn hold(daemon: &Daemon, actions: &[Args]) -> Reply<Vec<Drained>> {
    let mut names = BTreeSet::new();
    for action in actions {
        let data = data(action);
        for key in ["node", "node-name", "device"] {
            names.extend(data.opt_str(key)?.map(str::to_owned));
        }
    }
    let taps = daemon.graph.lock().taps_from_top(names.into_iter().collect());
    let held = taps.iter().map(|tap| {
        tap.drain_for(HOLD_LIMIT)
            .ok_or_else(|| QmpError::generic("A write of a guest does not end: the transaction was given up"))
    });
    held.collect()
}

fn act(daemon: &Arc<Daemon>, action: &Args, grouped: bool, progress: &mut Progress) -> Reply<()> {
    let data = data(action);
    let kind = action.str("type")?;
    if grouped && !matches!(kind, "abort" | "blockdev-mirror") {
        return Err(QmpError::generic(format!(
            "Action '{kind}' does not support transaction property completion-mode = grouped"
        )));
    }
    match kind {
        "abort" => return Err(QmpError::generic("Transaction aborted using Abort action")),
        "block-dirty-bitmap-add" => {
            daemon.add_bitmap(&data)?;
            let (tap, name) = bitmap(daemon, &data, "name")?;
            progress.undo.push(Box::new(move || {
                let _ = tap.remove_bitmap(&name);
            }));
        }
        "block-dirty-bitmap-remove" => {
            let (tap, name) = bitmap(daemon, &data, "name")?;
            let enabled = is_enabled(&tap, &name);
            let old = tap.remove_bitmap(&name).map_err(in_words)?;
            progress.undo.push(Box::new(move || {
                let _ = tap.adopt_bitmap(&name, old, enabled);
            }));
        }
        "block-dirty-bitmap-clear" => {
            let (tap, name) = bitmap(daemon, &data, "name")?;
            let old = tap.clear_bitmap(&name).map_err(in_words)?;
            progress.undo.push(Box::new(move || {
                let _ = tap.merge_bitmap(&name, &[&old]);
            }));
        }
        "block-dirty-bitmap-enable" | "block-dirty-bitmap-disable" => {
            let (tap, name) = bitmap(daemon, &data, "name")?;
            let (was, wanted) = (is_enabled(&tap, &name), kind == "block-dirty-bitmap-enable");
            set_enabled(&tap, &name, wanted).map_err(in_words)?;
            progress.undo.push(Box::new(move || {
                let _ = set_enabled(&tap, &name, was);
            }));
        }
        "block-dirty-bitmap-merge" => {
            let (tap, name) = bitmap(daemon, &data, "target")?;
            let old = tap.bitmap(&name).map_err(in_words)?;
            daemon.merge_bitmaps(&data)?;
            progress.undo.push(Box::new(move || {
                let _ = tap.clear_bitmap(&name);
                let _ = tap.merge_bitmap(&name, &[&old]);
            }));
        }
        "blockdev-snapshot" => {
            let snapshot = daemon.snapshot(&data)?;
            progress.snapshots.push((progress.undo.len(), snapshot));
        }
        "blockdev-snapshot-sync" => {
            let snapshot = daemon.snapshot_sync(&data, Naming::AtCommit)?;
            progress.snapshots.push((progress.undo.len(), snapshot));
        }
        _ => {
            let request = MirrorRequest::new(daemon, &data, data.str("target")?)?;
            progress.mirrors.push(daemon.prepare_mirror(request)?);
        }
    }
    Ok(())
}

/// Starts the mirrors, and gives files that were created their names as soon as all of them run.
fn start(daemon: &Arc<Daemon>, session: &Session, progress: &mut Progress, grouped: bool) -> Reply<()> {
    let mirrors = std::mem::take(&mut progress.mirrors);
    if grouped && !mirrors.is_empty() {
        return daemon.start_mirror_group(Some(session), mirrors);
    }
    daemon.start_mirrors(Some(session), mirrors, |_| {
        progress.snapshots.iter_mut().try_for_each(|(_, snapshot)| snapshot.give_name())
    })
}

fn bitmap(daemon: &Daemon, data: &Args, name: &str) -> Reply<(Arc<Tap>, String)> {
    let node = data.str("node")?;
    let tap = Arc::clone(&daemon.graph.lock().find(node)?.tap);
    Ok((tap, data.str(name)?.to_owned()))
}

fn is_enabled(tap: &Tap, name: &str) -> bool {
    tap.bitmaps().iter().any(|info| info.name == name && info.enabled)
}

fn set_enabled(tap: &Tap, name: &str, enabled: bool) -> Result<(), blockmirror_mirror::Error> {
    if enabled { tap.enable_bitmap(name) } else { tap.disable_bitmap(name) }
}
