//! `transaction`: several actions at one instant, all or none.
//!
//! Guests of all disks concerned are held meanwhile. Bitmap actions are done one after the other, each with a
//! way back; mirrors are started last, when nothing else can fail. With `completion-mode` grouped the mirrors
//! end together too.

use std::collections::BTreeSet;
use std::sync::Arc;

use blockmirror_mirror::{Drained, Tap};
use blockmirror_qmp::schema::{Command, Object, Type};
use blockmirror_qmp::{QmpError, Session};
use serde_json::Value;

use super::bitmap::{
    AddBitmap, MergeBitmaps, add_bitmap, enable_stored, in_words, merge_bitmaps, remove_bitmap, stored,
};
use super::internal_snapshot::{TakeArgs, take};
use super::snapshot::{Naming, Snapshot, SnapshotArgs, SnapshotSyncArgs, snapshot, snapshot_sync};
use super::{Commands, Services};
use crate::Reply;
use crate::arguments::{Argument, Arguments, arguments, choice, variant};
use crate::context::Context;
use crate::graph::HOLD_LIMIT;
use crate::job::{MirrorRequest, Prepared};
use crate::schema::{MirrorArgs, OneBitmap};

choice! {
    enum ActionKind("TransactionActionKind", "What is done.") {
        Abort = "abort", "nothing: the transaction fails";
        AddBitmap = "block-dirty-bitmap-add", "the command";
        RemoveBitmap = "block-dirty-bitmap-remove", "the command";
        ClearBitmap = "block-dirty-bitmap-clear", "the command";
        EnableBitmap = "block-dirty-bitmap-enable", "the command";
        DisableBitmap = "block-dirty-bitmap-disable", "the command";
        MergeBitmaps = "block-dirty-bitmap-merge", "the command";
        Mirror = "blockdev-mirror", "the command" [ours];
        Snapshot = "blockdev-snapshot", "the command";
        InternalSnapshot = "blockdev-snapshot-internal-sync", "the command";
        SnapshotSync = "blockdev-snapshot-sync", "the command";
    }
}

arguments! {
    struct Abort("Abort", "Nothing.") {}
}

macro_rules! wrappers {
    ($($wrapper:ident $name:literal $data:ident;)*) => {
        $(arguments! {
            struct $wrapper($name, "The arguments of an action.") {
                data: $data = "data", "the arguments";
            }
        })*
    };
}

wrappers! {
    AbortData "AbortWrapper" Abort;
    AddData "BlockDirtyBitmapAddWrapper" AddBitmap;
    OneData "BlockDirtyBitmapWrapper" OneBitmap;
    MergeData "BlockDirtyBitmapMergeWrapper" MergeBitmaps;
    MirrorData "BlockdevMirrorWrapper" MirrorArgs;
    SnapshotData "BlockdevSnapshotWrapper" SnapshotArgs;
    InternalData "BlockdevSnapshotInternalWrapper" TakeArgs;
    SnapshotSyncData "BlockdevSnapshotSyncWrapper" SnapshotSyncArgs;
}

arguments! {
    struct AnyAction {
        kind: ActionKind = "type", "what is done";
    }
}

static ACTION: Object = Object::union(
    "TransactionAction",
    "One action.",
    AnyAction::MEMBERS,
    "type",
    &[
        variant::<AbortData>("abort"),
        variant::<AddData>("block-dirty-bitmap-add"),
        variant::<OneData>("block-dirty-bitmap-remove"),
        variant::<OneData>("block-dirty-bitmap-clear"),
        variant::<OneData>("block-dirty-bitmap-enable"),
        variant::<OneData>("block-dirty-bitmap-disable"),
        variant::<MergeData>("block-dirty-bitmap-merge"),
        variant::<MirrorData>("blockdev-mirror"),
        variant::<SnapshotData>("blockdev-snapshot"),
        variant::<InternalData>("blockdev-snapshot-internal-sync"),
        variant::<SnapshotSyncData>("blockdev-snapshot-sync"),
    ],
);

/// An action, with its arguments.
#[derive(Clone, Debug)]
enum Action {
    Abort,
    AddBitmap(AddBitmap),
    RemoveBitmap(OneBitmap),
    ClearBitmap(OneBitmap),
    /// Or disables it.
    EnableBitmap(OneBitmap, bool),
    MergeBitmaps(MergeBitmaps),
    Mirror(Box<MirrorArgs>),
    Snapshot(SnapshotArgs),
    InternalSnapshot(TakeArgs),
    SnapshotSync(SnapshotSyncArgs),
}

impl Argument for Action {
    const TYPE: Type = Type::Object(&ACTION);

    fn read(value: &Value) -> Option<Self> {
        let kind = AnyAction::parse(value.as_object()?).ok()?.kind;
        let one = || OneData::read(value).map(|action| action.data);
        Some(match kind {
            ActionKind::Abort => {
                let AbortData { data: Abort {} } = AbortData::read(value)?;
                Self::Abort
            }
            ActionKind::AddBitmap => Self::AddBitmap(AddData::read(value)?.data),
            ActionKind::RemoveBitmap => Self::RemoveBitmap(one()?),
            ActionKind::ClearBitmap => Self::ClearBitmap(one()?),
            ActionKind::EnableBitmap => Self::EnableBitmap(one()?, true),
            ActionKind::DisableBitmap => Self::EnableBitmap(one()?, false),
            ActionKind::MergeBitmaps => Self::MergeBitmaps(MergeData::read(value)?.data),
            ActionKind::Mirror => Self::Mirror(Box::new(MirrorData::read(value)?.data)),
            ActionKind::Snapshot => Self::Snapshot(SnapshotData::read(value)?.data),
            ActionKind::InternalSnapshot => Self::InternalSnapshot(InternalData::read(value)?.data),
            ActionKind::SnapshotSync => Self::SnapshotSync(SnapshotSyncData::read(value)?.data),
        })
    }
}

impl Action {
    fn kind(&self) -> ActionKind {
        match self {
            Self::Abort => ActionKind::Abort,
            Self::AddBitmap(_) => ActionKind::AddBitmap,
            Self::RemoveBitmap(_) => ActionKind::RemoveBitmap,
            Self::ClearBitmap(_) => ActionKind::ClearBitmap,
            Self::EnableBitmap(_, true) => ActionKind::EnableBitmap,
            Self::EnableBitmap(_, false) => ActionKind::DisableBitmap,
            Self::MergeBitmaps(_) => ActionKind::MergeBitmaps,
            Self::Mirror(_) => ActionKind::Mirror,
            Self::Snapshot(_) => ActionKind::Snapshot,
            Self::InternalSnapshot(_) => ActionKind::InternalSnapshot,
            Self::SnapshotSync(_) => ActionKind::SnapshotSync,
        }
    }

    /// The node whose guest is held.
    fn node(&self) -> Option<&str> {
        match self {
            Self::Abort => None,
            Self::AddBitmap(args) => Some(&args.node),
            Self::RemoveBitmap(one) | Self::ClearBitmap(one) | Self::EnableBitmap(one, _) => Some(&one.node),
            Self::MergeBitmaps(args) => Some(&args.node),
            Self::Mirror(args) => Some(&args.device),
            Self::Snapshot(args) => Some(&args.node),
            Self::InternalSnapshot(args) => Some(&args.device),
            Self::SnapshotSync(args) => args.node_name.as_deref(),
        }
    }
}

choice! {
    enum CompletionMode("ActionCompletionMode", "How the jobs of a transaction end.") {
        Individual = "individual", "each by itself";
        Grouped = "grouped", "all at one instant, or none";
    }
}

arguments! {
    struct Properties("TransactionProperties", "How a transaction is done.") {
        completion_mode: Option<CompletionMode> = "completion-mode", "how its jobs \
         end" [default "individual"];
    }
}

arguments! {
    struct TransactionArgs {
        actions: Vec<Action> = "actions", "what is done, in this order; mirrors start last";
        properties: Option<Properties> = "properties", "how it is done";
    }
}

static TRANSACTION: Command = Command::new(
    "transaction",
    "Does several things at one instant: all, or none.",
    TransactionArgs::MEMBERS,
)
.differs(
    "mirrors can be actions, and with `completion-mode` grouped they pivot, or keep their copies, at one \
     instant; the actions `blockdev-backup` and `drive-backup` are not there",
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands.add(&TRANSACTION, transaction);
}

/// Takes an action back; it says what it could not.
type Undo = Box<dyn FnOnce() -> Reply<()>>;

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
    /// What cannot be taken back. If that is an overlay it stays as it is, and those before it, on which it
    /// may stand.
    fn undo(mut self, context: &Context) -> Reply<()> {
        let mut overlays = Ok(());
        let mut others = Ok(());
        loop {
            let last = self.snapshots.last().map(|(before, _)| *before);
            if last == Some(self.undo.len()) {
                match self.snapshots.pop() {
                    Some((_, snapshot)) if overlays.is_ok() => overlays = snapshot.undo(context),
                    Some((_, snapshot)) => drop(snapshot.keep()),
                    None => {}
                }
            } else if let Some(undo) = self.undo.pop() {
                others = others.and(undo());
            } else {
                return overlays.and(others);
            }
        }
    }
}

fn transaction(services: &Arc<Services>, session: &Session, args: TransactionArgs) -> Reply<Value> {
    let TransactionArgs { actions, properties } = args;
    let mode = properties.and_then(|properties| properties.completion_mode);
    let grouped = mode == Some(CompletionMode::Grouped);
    let held = hold(&services.context, &actions)?;
    let mut progress = Progress::default();
    let result = actions
        .iter()
        .try_for_each(|action| act(services, action, grouped, &mut progress))
        .and_then(|()| start(services, session, &mut progress, grouped));
    let result = result.map_err(|error| {
        // No job is there any more: what was started has gone again.
        for mirror in &progress.mirrors {
            services.jobs.forget_mirror(mirror);
        }
        match std::mem::take(&mut progress).undo(&services.context) {
            Ok(()) => error,
            Err(left) => QmpError::generic(format!("{error}; and it could not be undone: {left}")),
        }
    });
    let overlays: Vec<_> = progress.snapshots.into_iter().map(|(_, snapshot)| snapshot.keep()).collect();
    drop(held);
    overlays.iter().for_each(|overlay| services.context.refresh_from(overlay));
    result.map(|()| Value::Null)
}

/// Holds the guests of all disks that the actions are about. Those of nodes that do not exist fail later, in
/// words.
fn hold(context: &Context, actions: &[Action]) -> Reply<Vec<Drained>> {
    let names: BTreeSet<_> = actions.iter().filter_map(Action::node).map(str::to_owned).collect();
    let taps = context.graph.lock().taps_from_top(names.into_iter().collect());
    let held = taps.iter().map(|tap| {
        tap.drain_for(HOLD_LIMIT)
            .ok_or_else(|| QmpError::generic("A write of a guest does not end: the transaction was given up"))
    });
    held.collect()
}

fn act(services: &Arc<Services>, action: &Action, grouped: bool, progress: &mut Progress) -> Reply<()> {
    if grouped && !matches!(action, Action::Abort | Action::Mirror(_)) {
        return Err(QmpError::generic(format!(
            "Action '{}' does not support transaction property completion-mode = grouped",
            action.kind().name()
        )));
    }
    match action {
        Action::Abort => return Err(QmpError::generic("Transaction aborted using Abort action")),
        Action::Snapshot(args) => {
            let snapshot = snapshot(&services.context, args)?;
            progress.snapshots.push((progress.undo.len(), snapshot));
        }
        Action::InternalSnapshot(args) => {
            let taken = take(&services.context, args)?;
            progress.undo.push(Box::new(move || taken.undo()));
        }
        Action::SnapshotSync(args) => {
            let snapshot = snapshot_sync(&services.context, args, Naming::AtCommit)?;
            progress.snapshots.push((progress.undo.len(), snapshot));
        }
        Action::Mirror(args) => {
            let request = MirrorRequest::new(&services.context, (**args).clone())?;
            progress.mirrors.push(services.jobs.prepare_mirror(request)?);
        }
        bitmaps => act_on_bitmap(&services.context, bitmaps, progress)?,
    }
    Ok(())
}

/// The actions on bitmaps.
fn act_on_bitmap(context: &Arc<Context>, action: &Action, progress: &mut Progress) -> Reply<()> {
    match action {
        Action::AddBitmap(args) => {
            add_bitmap(context, args)?;
            let one = OneBitmap { node: args.node.clone(), name: args.name.clone() };
            let context = Arc::clone(context);
            progress.undo.push(Box::new(move || remove_bitmap(&context, &one).map(drop)));
        }
        Action::RemoveBitmap(one) => {
            // In the words of a transaction, if there is no such node.
            context.graph.lock().find(&one.node)?;
            let removed = remove_bitmap(context, one)?;
            let context = Arc::clone(context);
            progress.undo.push(Box::new(move || removed.put_back(&context)));
        }
        Action::ClearBitmap(OneBitmap { node, name }) => {
            let (tap, name) = bitmap(context, node, name)?;
            let image = stored(context, node, &name, true)?;
            let old = tap.clear_bitmap(&name).map_err(in_words)?;
            progress.undo.push(Box::new(move || {
                // A snapshot that was undone has stored it.
                if let Some(image) = image {
                    image.give_back_bits(&name, &old);
                }
                tap.merge_bitmap(&name, &[&old]).map_err(in_words)
            }));
        }
        Action::EnableBitmap(OneBitmap { node, name }, enabled) => {
            let (tap, name) = bitmap(context, node, name)?;
            let was = is_enabled(&tap, &name);
            let one = OneBitmap { node: node.clone(), name: name.clone() };
            let image = stored(context, node, &name, true)?;
            if *enabled {
                enable_stored(context, &one)?;
            }
            set_enabled(&tap, &name, *enabled).map_err(in_words)?;
            progress.undo.push(Box::new(move || {
                if let Some(image) = image.filter(|_| was) {
                    image.give_back_recording(&name);
                }
                set_enabled(&tap, &name, was).map_err(in_words)
            }));
        }
        Action::MergeBitmaps(args) => {
            let (tap, name) = bitmap(context, &args.node, &args.target)?;
            let image = stored(context, &args.node, &name, true)?;
            let old = tap.bitmap(&name).map_err(in_words)?;
            merge_bitmaps(context, args)?;
            progress.undo.push(Box::new(move || {
                if let Some(image) = image {
                    image.give_back_bits(&name, &old);
                }
                tap.clear_bitmap(&name).map_err(in_words)?;
                tap.merge_bitmap(&name, &[&old]).map_err(in_words)
            }));
        }
        _ => {}
    }
    Ok(())
}

/// Starts the mirrors, and gives files that were created their names as soon as all of them run.
fn start(services: &Arc<Services>, session: &Session, progress: &mut Progress, grouped: bool) -> Reply<()> {
    let mirrors = std::mem::take(&mut progress.mirrors);
    if grouped && !mirrors.is_empty() {
        return services.jobs.start_mirror_group(Some(session), mirrors);
    }
    services.jobs.start_mirrors(Some(session), mirrors, |_| {
        progress.snapshots.iter_mut().try_for_each(|(_, snapshot)| snapshot.give_name())
    })
}

fn bitmap(context: &Context, node: &str, name: &str) -> Reply<(Arc<Tap>, String)> {
    Ok((Arc::clone(&context.graph.lock().find(node)?.tap), name.to_owned()))
}

fn is_enabled(tap: &Tap, name: &str) -> bool {
    tap.bitmaps().iter().any(|info| info.name == name && info.enabled)
}

fn set_enabled(tap: &Tap, name: &str, enabled: bool) -> Result<(), blockmirror_mirror::Error> {
    if enabled { tap.enable_bitmap(name) } else { tap.disable_bitmap(name) }
}
