//! Snapshots: `blockdev-snapshot` and `blockdev-snapshot-sync`. An overlay comes on top of a node, and the
//! node's users move to it at one instant, in which none of their writes is under way.

use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_image::Format;
use blockmirror_image_lock::Permission;
use blockmirror_mirror::{Drained, Tap};
use blockmirror_qmp::QmpError;
use blockmirror_qmp::schema::Command;
use serde_json::{Value, json};

use super::Commands;
use super::resize::named_node;
use crate::Reply;
use crate::arguments::{Arguments, arguments, choice};
use crate::context::Context;
use crate::driver::{Found, Inherited};
use crate::errors::{is_read_only, qmp_error};
use crate::graph::{
    ALL_PERMS, Attachment, BackingLink, Graph, HOLD_LIMIT, Node, NodeId, Parent, Perms, Released,
};
use crate::new_image::{CreatedFile, NewFileSpec, format_named, protocol_node};

choice! {
    pub(super) enum NewImageMode("NewImageMode", "Where an image comes from.") {
        Existing = "existing", "it is there";
        AbsolutePaths = "absolute-paths", "it is made; names in it are absolute";
    }
}

arguments! {
    /// The arguments of `blockdev-snapshot`, in a transaction too.
    pub(super) struct SnapshotArgs("BlockdevSnapshot", "An overlay that is there.") {
        node: String = "node", "the node that becomes the backing file";
        overlay: String = "overlay", "the node that comes on top: it has no backing file, and is used by \
         nothing but a mirror that fills it";
    }
}

arguments! {
    /// The arguments of `blockdev-snapshot-sync`, in a transaction too.
    pub(super) struct SnapshotSyncArgs("BlockdevSnapshotSync", "An overlay that is opened.") {
        device: Option<String> = "device", "a guest's device, of which there are none";
        node_name: Option<String> = "node-name", "the node that becomes the backing file; has to be given";
        snapshot_file: String = "snapshot-file", "path of the overlay";
        snapshot_node_name: Option<String> = "snapshot-node-name", "name of the overlay's node; has to be \
         given";
        format: Option<String> = "format", "format of the overlay" [default "qcow2"];
        mode: Option<NewImageMode> = "mode", "whether it is made" [default "absolute-paths"];
    }
}

static SNAPSHOT: Command = Command::new(
    "blockdev-snapshot",
    "Moves the users of a node to an overlay on it.",
    SnapshotArgs::MEMBERS,
);
static SNAPSHOT_SYNC: Command = Command::new(
    "blockdev-snapshot-sync",
    "Makes an overlay on a node and moves the node's users to it.",
    SnapshotSyncArgs::MEMBERS,
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands
        .add(&SNAPSHOT, |services, _, args: SnapshotArgs| {
            snapshot(&services.context, &args).map(|snapshot| {
                let overlay = snapshot.keep();
                services.context.refresh_from(&overlay);
                Value::Null
            })
        })
        .add(&SNAPSHOT_SYNC, |services, _, args: SnapshotSyncArgs| {
            snapshot_sync(&services.context, &args, Naming::Now).map(|snapshot| {
                let overlay = snapshot.keep();
                services.context.refresh_from(&overlay);
                Value::Null
            })
        });
}

/// When a file that a snapshot creates gets its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// Before a guest writes to it.
    Now,
    /// When nothing else of the transaction can fail, for which the guests are held.
    AtCommit,
}

/// A snapshot that has been taken, as long as it can be undone.
pub(super) struct Snapshot {
    node: String,
    overlay: String,
    was_read_only: bool,
    /// The file that was created for it.
    created: Option<CreatedFile>,
    /// The overlay's node, if it was opened for it.
    opened: Option<NodeId>,
    /// No users were moved: the overlay is filled by a mirror.
    is_link_only: bool,
}

impl Snapshot {
    /// It stays. The overlay, whose length and that of the filters on it are to be brought up to date when no
    /// guest is held.
    pub(super) fn keep(self) -> String {
        if let Some(created) = self.created {
            created.keep();
        }
        self.overlay
    }

    /// Gives the file that was created its name, before the guest goes on.
    ///
    /// # Errors
    /// That fails: the snapshot is to be undone.
    pub(super) fn give_name(&mut self) -> Reply<()> {
        self.created.as_mut().map_or(Ok(()), CreatedFile::give_name)
    }

    /// Moves the users back, and removes what was created.
    ///
    /// # Errors
    /// They cannot be moved. The snapshot stays then: what they write is on an open image, which gets its
    /// name if it has none yet.
    pub(super) fn undo(mut self, context: &Context) -> Reply<()> {
        if self.is_link_only {
            unlink_target(context, &self.overlay);
            return Ok(());
        }
        let (tap, of_node, device) = {
            let graph = context.graph.lock();
            let (Some(node), Some(overlay)) = (graph.get(&self.node), graph.get(&self.overlay)) else {
                return Ok(());
            };
            (Arc::clone(&overlay.tap), Arc::clone(&node.tap), Arc::clone(&node.device))
        };
        let mut drained = tap.drain();
        // Those of the overlay stay with it, in its length.
        let of_overlay = Tap::new(tap.device());
        tap.give_bitmaps(&of_overlay);
        if let Err(error) = drained.replace(Arc::clone(&device) as _) {
            tap.take_bitmaps(&of_overlay, false);
            let mut text = format!("'{}' stays the overlay of '{}': {error}", self.overlay, self.node);
            if let Some(Err(error)) = self.created.as_mut().map(CreatedFile::give_name) {
                text = format!("{text}; its file may have no name: {}", error.desc);
            }
            let _ = self.keep();
            return Err(QmpError::generic(text));
        }
        device.set_read_only(self.was_read_only);
        let exported = context.exported_bitmaps.suspend(&of_node);
        let (image, released) = {
            let mut graph = context.graph.lock();
            if let Some(node) = graph.get_mut(&self.node) {
                node.read_only = self.was_read_only;
            }
            graph.pivot(&self.overlay, &self.node, &[], false);
            exported.resume(&tap);
            if let Some(overlay) = graph.get(&self.overlay) {
                overlay.tap.take_bitmaps(&of_overlay, false);
            }
            let image = graph.get(&self.overlay).and_then(|overlay| overlay.qcow2.clone());
            let mut released = Released::default();
            if let Some(link) = graph.link(&self.overlay, "backing") {
                released = graph.detach(link);
            }
            if let Some(opened) = &self.opened {
                released = released.and(graph.undo(opened));
            }
            (image, released)
        };
        drop(drained);
        if let Some(image) = image {
            image.replace_backing(None);
        }
        context.close(released);
        Ok(())
    }
}

/// `blockdev-snapshot`.
pub(super) fn snapshot(context: &Context, args: &SnapshotArgs) -> Reply<Snapshot> {
    put_overlay(context, &args.node, &args.overlay, false).map(|(snapshot, _)| snapshot)
}

/// `blockdev-snapshot-sync`.
pub(super) fn snapshot_sync(context: &Context, args: &SnapshotSyncArgs, naming: Naming) -> Reply<Snapshot> {
    let path = &*args.snapshot_file;
    let existing = args.mode == Some(NewImageMode::Existing);
    let (node, overlay, size, backing) = {
        let graph = context.graph.lock();
        let node = named_node(&graph, args.device.as_deref(), args.node_name.as_deref())?;
        let overlay = args.snapshot_node_name.as_deref();
        let overlay = overlay.ok_or_else(|| QmpError::generic("New overlay node-name missing"))?;
        if graph.get(overlay).is_some() {
            return Err(QmpError::generic("New overlay node-name already in use"));
        }
        graph.check_name(overlay)?;
        let format = format_named(args.format.as_deref().unwrap_or("qcow2"))?;
        if format == Format::Raw {
            return Err(QmpError::generic("Backing file not supported for file format 'raw'"));
        }
        check_below(&graph, &node.name)?;
        let named = graph.in_headers(node);
        let backing = match existing {
            true => None,
            false => Some((graph.header_name(&named.name)?, named.format_in_headers())),
        };
        (node.name.clone(), overlay.to_owned(), node.device.len(), backing)
    };
    let created = match existing {
        true => None,
        false => {
            let new = NewFileSpec { path, format: Format::Qcow2, size, backing };
            Some(CreatedFile::create(context, &node, new, || Ok(()))?)
        }
    };
    let found = created.as_ref().and_then(CreatedFile::found);
    let opened = open_overlay(context, path, &overlay, found)?;
    let put = put_overlay(context, &node, &overlay, true).inspect_err(|_| context.undo_node(&opened));
    let (snapshot, held) = put?;
    let mut snapshot = Snapshot { created, opened: Some(opened), ..snapshot };
    if naming == Naming::Now
        && let Err(error) = snapshot.give_name()
    {
        let undone = snapshot.undo(context);
        drop(held);
        return Err(match undone {
            Ok(()) => error,
            Err(left) => QmpError::generic(format!("{error}; and it could not be undone: {left}")),
        });
    }
    Ok(snapshot)
}

/// Opens the image at `path`, or the file `found` that will be there, as the node `overlay`.
fn open_overlay(context: &Context, path: &str, overlay: &str, found: Option<Found>) -> Reply<NodeId> {
    let (options, found) = protocol_node(path, found)?;
    let file = context.open_node_on(&options, Inherited::default(), found)?;
    let image = json!({"driver": "qcow2", "node-name": overlay, "file": file.name, "backing": null});
    let image = image.as_object().cloned().unwrap_or_default();
    let opened = context.open_node(&image, Inherited::default());
    opened.inspect_err(|_| context.undo_node(&file))
}

/// Puts `overlay`, which the command has `opened` or not, on `node`, and moves the users of that. Also
/// returns what keeps guests from writing until the command cannot fail any more.
fn put_overlay(
    context: &Context,
    node: &str,
    overlay: &str,
    opened: bool,
) -> Reply<(Snapshot, Option<Drained>)> {
    let (tap, below, image, bitmaps) = {
        let graph = context.graph.lock();
        let (base, above) = (graph.find(node)?, graph.find(overlay)?);
        check_below(&graph, node)?;
        let image = above.qcow2.clone();
        let image = image.ok_or_else(|| QmpError::generic("The overlay does not support backing images"))?;
        let is_target = check_overlay(&graph, node, above, image.backing().is_some())?;
        if is_target {
            drop(graph);
            return put_below_target(context, node, overlay).map(|snapshot| (snapshot, None));
        }
        (Arc::clone(&base.tap), Arc::clone(&base.device), image, base.stored_bitmaps())
    };
    let mut drained = hold(&tap)?;
    below.flush().map_err(qmp_error)?;
    // They stay with the node, which is not written any more.
    bitmaps.map_or(Ok(()), |bitmaps| bitmaps.store_within(HOLD_LIMIT))?;
    let link = BackingLink::for_overlay(Arc::clone(&below) as _);
    image.replace_backing(Some(Arc::clone(&link) as _));
    match move_users(context, node, overlay, opened, &link, &mut drained) {
        Ok(snapshot) => Ok((snapshot, Some(drained))),
        Err(error) => {
            image.replace_backing(None);
            Err(error)
        }
    }
}

/// Moves the users of `node`, which are `drained`, to `overlay`, which stands on it by `link`. Tap and
/// graph change under one lock with the last checks: nodes may have been opened on the two since the
/// first ones, which locks nothing.
fn move_users(
    context: &Context,
    node: &str,
    overlay: &str,
    opened: bool,
    link: &Arc<BackingLink>,
    drained: &mut Drained,
) -> Reply<Snapshot> {
    let mut graph = context.graph.lock();
    check_below(&graph, node)?;
    let above = graph.find(overlay)?;
    if check_overlay(&graph, node, above, false)? {
        return Err(QmpError::generic("The overlay is already in use"));
    }
    let (above, below) = (Arc::clone(&above.device), Arc::clone(&graph.find(node)?.device));
    let tap = Arc::clone(drained.tap());
    // Bitmaps stay with the node, exported ones too.
    let of_node = Tap::new(Arc::clone(&below) as _);
    let exported = context.exported_bitmaps.suspend(&tap);
    tap.give_bitmaps(&of_node);
    if let Err(error) = drained.replace(above) {
        tap.take_bitmaps(&of_node, false);
        exported.resume(&tap);
        return Err(qmp_error(error));
    }
    let was_read_only = below.options().read_only;
    below.set_read_only(true);
    if let Some(base) = graph.get_mut(node) {
        base.read_only = true;
    }
    graph.pivot(node, overlay, &[], false);
    let of_base = graph.get(node).map_or(of_node.clone(), |base| {
        base.tap.take_bitmaps(&of_node, false);
        Arc::clone(&base.tap)
    });
    exported.resume(&of_base);
    let is_used = graph.attachments_of(overlay).next().is_some();
    if let (true, Some(overlay)) = (opened, graph.get_mut(overlay)) {
        // It goes with its last user. One that has none yet can be closed by name only.
        overlay.owned = !is_used;
    }
    let parent = Parent::Node { name: overlay.to_owned(), role: "backing" };
    // Checked above, when the users were on the node.
    let id = graph.attach(node, parent, Perms::READ, ALL_PERMS)?;
    graph.hold_link(id, link);
    Ok(Snapshot {
        node: node.to_owned(),
        overlay: overlay.to_owned(),
        was_read_only,
        created: None,
        opened: None,
        is_link_only: false,
    })
}

/// Puts `overlay`, which a mirror fills, on `node`, which has no user. The mirror goes on; what it has
/// written stays.
fn put_below_target(context: &Context, node: &str, overlay: &str) -> Reply<Snapshot> {
    let (link, image, was_read_only) = {
        let mut graph = context.graph.lock();
        // First the link: nothing is read that the graph does not protect, and an image that takes the
        // place of this one, as the mirror is resumed, is put on the node too.
        let link = graph.attach_backing(overlay, node)?;
        (link, graph.find(overlay)?.qcow2.clone(), graph.find(node)?.read_only)
    };
    if let Some(image) = image {
        image.replace_backing(Some(link as _));
    }
    Ok(Snapshot {
        node: node.to_owned(),
        overlay: overlay.to_owned(),
        was_read_only,
        created: None,
        opened: None,
        is_link_only: true,
    })
}

/// Takes back what put `overlay`, which a mirror fills, on another node.
fn unlink_target(context: &Context, overlay: &str) {
    let image = |graph: &Graph| graph.get(overlay).and_then(|overlay| overlay.qcow2.clone());
    let released = loop {
        let held = image(&context.graph.lock());
        if let Some(image) = &held {
            image.replace_backing(None);
        }
        let mut graph = context.graph.lock();
        // As the mirror is resumed, another image may have taken the place of this one.
        if held.as_ref().map(Arc::as_ptr) == image(&graph).as_ref().map(Arc::as_ptr) {
            break graph.link(overlay, "backing").map(|link| graph.detach(link));
        }
    };
    context.close(released.unwrap_or_default());
}

fn hold(tap: &Arc<Tap>) -> Reply<Drained> {
    tap.drain_for(HOLD_LIMIT)
        .ok_or_else(|| QmpError::generic("A write of a guest does not end: the snapshot was given up"))
}

/// Refuses what cannot come on top of `node`, as what has a backing file cannot; also says whether a mirror
/// fills it.
fn check_overlay(graph: &Graph, node: &str, above: &Node, has_backing: bool) -> Reply<bool> {
    let overlay = &*above.name;
    // A mirror does not read what it writes.
    let by_mirror = |u: &Attachment| {
        matches!(u.parent, Parent::Job { kind: "mirror", .. }) && u.perm.contains(Permission::Write)
    };
    if graph.attachments_of(overlay).any(|(_, u)| !by_mirror(u)) {
        return Err(QmpError::generic("The overlay is already in use"));
    }
    let is_target = graph.attachments_of(overlay).next().is_some();
    if let (true, Some((_, u))) = (is_target, graph.attachments_of(node).next()) {
        return Err(QmpError::generic(format!("Node '{node}' is busy: it is in use by {}", u.parent)));
    }
    if has_backing {
        return Err(QmpError::generic("The overlay already has a backing image"));
    }
    if graph.stands_on(overlay, node) {
        return Err(QmpError::generic(format!(
            "Making '{node}' a backing child of '{overlay}' would create a cycle"
        )));
    }
    if above.read_only {
        return Err(is_read_only());
    }
    graph.check_bitmaps_free(overlay)?;
    graph.check_backing(node, overlay)?;
    Ok(is_target)
}

/// Refuses nodes whose users cannot be moved.
fn check_below(graph: &Graph, name: &str) -> Reply<()> {
    graph.check_no_job(name)?;
    graph.check_no_overlay(name)?;
    // What stands on a file holds the file itself and not its tap.
    let holds_file = graph.find(name)?.storage.is_some();
    for (_, u) in graph.attachments_of(name) {
        if let (true, Parent::Node { name: parent, role }) = (holds_file, &u.parent) {
            return Err(QmpError::generic(format!(
                "Node '{name}' is busy: node is used as {role} of '{parent}'"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
