//! `blockdev-reopen`: other options for nodes that are open, for all that are listed or for none.
//!
//! All options of a node are given, as for `blockdev-add`, and so are those of children that are described
//! inside; those left out take their defaults. Everything that can fail is done first, with the guests of the
//! nodes held, and taken back if something fails; then the rest changes at once.

mod image_file;
mod nested;

use std::collections::BTreeMap;
use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_file::FileStorage;
use blockmirror_mirror::Drained;
use blockmirror_qmp::schema::Command;
use blockmirror_qmp::{QmpError, Session};
use serde_json::{Map, Value};

use self::image_file::MovedImage;
use self::nested::ReopenRequest;
use super::{Commands, Services};
use crate::Reply;
use crate::arguments::{Arguments, arguments};
use crate::context::Context;
use crate::driver::{
    Below, Common, CommonOptions, DriverEntry, Inherited, NodeOptions, Rebased, Reopened, flattened,
    overlap_checks,
};
use crate::errors::{cannot_change, is_read_only, qmp_error};
use crate::graph::{
    ALL_PERMS, AttachmentId, BackingLink, BlockedParents, Graph, HOLD_LIMIT, Kind, NO_CHANGE, Node, Parent,
    Perms, Released,
};

arguments! {
    struct ReopenArgs {
        options: Vec<NodeOptions> = "options", "the nodes, each with all its options";
    }
}

static BLOCKDEV_REOPEN: Command = Command::new(
    "blockdev-reopen",
    "Changes the options of nodes that are open, of all or of none: `read-only`, `discard`, \
     `detect-zeroes`, `cache`, \
     the `backing` and the `file` of a qcow2 image, the `file` of a raw or throttle node, the group of a \
     throttle node. The new `file` of an image has to hold the same image. \
     All options are \
     given; a child by its name or, if it was opened with its parent, by its options, which change too. \
     Others cannot change.",
    ReopenArgs::MEMBERS,
);

pub(super) fn register(commands: &mut Commands<'_>) {
    commands.add(&BLOCKDEV_REOPEN, reopen);
}

/// What becomes of a node.
struct Change {
    node: String,
    common: Common,
    options: BTreeMap<String, Value>,
    /// Another child: its role, and its name or none.
    child: Option<(&'static str, Option<String>)>,
    /// The disk for another file or group.
    disk: Option<NewDisk>,
    /// It is an image that is put on another file.
    moves_image: bool,
    /// The nodes that go past the host's page cache, or no longer, with it; itself, or what was opened for it
    /// alone.
    files: Vec<(String, Arc<FileStorage>)>,
}

/// A disk on another file, or in another group.
struct NewDisk {
    new: Rebased,
    /// The node that it is on.
    file: String,
    /// By what it reaches that.
    link: Arc<BackingLink>,
}

impl Change {
    /// The node that it comes to stand on as `file`, if it has to be put there.
    fn new_file(&self) -> Option<&str> {
        match (&self.disk, &self.child) {
            (Some(disk), _) => Some(&disk.file),
            (None, Some((_, Some(file)))) if self.moves_image => Some(file),
            _ => None,
        }
    }
}

fn reopen(services: &Arc<Services>, _: &Session, args: ReopenArgs) -> Reply<Value> {
    let mut changes: Vec<Change> = Vec::new();
    let mut all = Vec::new();
    for options in args.options {
        nested::collect(&services.context.graph.lock(), options.0, &mut all)?;
    }
    for wanted in all {
        let change = Change::new(&services.context, wanted)?;
        // Who is named twice gets what is said last.
        changes.retain(|other| other.node != change.node);
        changes.push(change);
    }
    let held = hold(&services.context, &changes)?;
    let mut done = Done::default();
    let result = done.prepare(&services.context, &mut changes);
    if let Err(error) = result {
        done.undo(&services.context);
        return Err(error);
    }
    let changed: Vec<_> = changes.iter().map(|change| change.node.clone()).collect();
    let released = done.commit(&services.context, changes);
    drop(held);
    services.context.close(released);
    changed.iter().for_each(|node| services.context.refresh_from(node));
    Ok(Value::Null)
}

fn hold(context: &Context, changes: &[Change]) -> Reply<Vec<Drained>> {
    let taps = context.graph.lock().taps_from_top(changes.iter().map(|change| change.node.clone()).collect());
    let held = taps.iter().map(|tap| {
        tap.drain_for(HOLD_LIMIT)
            .ok_or_else(|| QmpError::generic("A write of a guest does not end: nothing was changed"))
    });
    held.collect()
}

impl Change {
    /// Reads and checks what is asked for.
    fn new(context: &Context, wanted: ReopenRequest) -> Reply<Self> {
        let ReopenRequest { node: name, options: given, inherited: from_above, above } = wanted;
        let common = CommonOptions::parse(&given)?;
        let graph = context.graph.lock();
        let node = graph.find_node(&name)?;
        let names_backing = node.qcow2.as_ref().is_some_and(|image| image.header().backing.is_some());
        if (names_backing || graph.backing_of(&name).is_some()) && !given.contains_key("backing") {
            return Err(QmpError::generic(format!("backing is missing for '{name}'")));
        }
        let driver = common.driver.0;
        if driver.name() != node.driver.name {
            return Err(cannot_change("driver"));
        }
        if !driver.reopens {
            return Err(QmpError::generic(format!(
                "Block format '{}' used by node '{name}' does not support reopening files",
                driver.name()
            )));
        }
        let common = Common::new(&common, from_above.unwrap_or_else(|| inherited(&graph, node)))?;
        if common.no_flush && !node.device.options().no_flush && node.device.watch().has_log() {
            return Err(cannot_change("cache.no-flush"));
        }
        let mut files = Vec::new();
        if common.direct != node.direct {
            above.iter().chain([&name]).try_for_each(|name| graph.check_no_job(name))?;
            files_below(&graph, node, &mut files);
        }
        let options = flattened(&given);
        check_fixed(driver, node, &options)?;
        let child = child(&graph, driver, node, &given)?;
        let moves_image = node.qcow2.is_some() && matches!(child, Some(("file", _)));
        if moves_image {
            graph.check_no_job(&name)?;
            if common.read_only != node.read_only {
                return Err(QmpError::generic(format!(
                    "The 'file' and 'read-only' of '{name}' cannot change in one step"
                )));
            }
        }
        let below = match moves_image {
            true => None,
            false => new_below(&graph, driver, node, &given, child.as_ref())?,
        };
        drop(graph);
        // Asks the file, so not under the graph's lock.
        let disk = below.map(|NewBelow { file, below }| {
            let link = Arc::clone(&below.link);
            let new = (driver.rebase)(&context.objects, &given, below)?;
            Ok::<_, QmpError>(NewDisk { new, file, link })
        });
        Ok(Self { node: name, common, options, child, disk: disk.transpose()?, moves_image, files })
    }
}

/// The file of `node`, or those that were opened for it alone.
fn files_below(graph: &Graph, node: &Node, files: &mut Vec<(String, Arc<FileStorage>)>) {
    files.extend(node.file.as_ref().map(|file| (node.name.clone(), Arc::clone(file))));
    for (_, child) in graph.children(&node.name).filter(|(role, child)| *role != "backing" && !child.owned) {
        files_below(graph, child, files);
    }
}

/// What `node` gets from the one it was opened with.
fn inherited(graph: &Graph, node: &Node) -> Inherited {
    if node.owned {
        return Inherited::default();
    }
    let parent = graph
        .attachments_of(&node.name)
        .find_map(|(_, u)| Some((graph.get(u.parent_node()?)?, u.is_backing())));
    match parent {
        Some((_, true)) => Inherited { read_only: Some(true), direct: node.direct, ..Inherited::default() },
        Some((parent, false)) => Inherited {
            read_only: Some(parent.read_only),
            direct: parent.direct,
            no_flush: parent.device.options().no_flush,
            ..Inherited::default()
        },
        None => Inherited::default(),
    }
}

/// Refuses changes of options that cannot change.
fn check_fixed(driver: &DriverEntry, node: &Node, options: &BTreeMap<String, Value>) -> Reply<()> {
    let is_free = |name: &str| {
        let first = name.split('.').next().unwrap_or(name);
        let of_all = CommonOptions::CHANGEABLE.iter().any(|(option, free)| *option == first && *free);
        of_all || driver.may_change(first)
    };
    for (name, value) in options {
        if !is_free(name) && node.options.get(name) != Some(value) {
            return Err(cannot_change(name));
        }
    }
    match node.options.keys().find(|name| !is_free(name) && !options.contains_key(*name)) {
        Some(name) if name != "node-name" => {
            Err(QmpError::generic(format!("Option '{name}' cannot be reset to its default value")))
        }
        _ => Ok(()),
    }
}

/// The child that is to be another one, if there is one.
fn child(
    graph: &Graph,
    driver: &DriverEntry,
    node: &Node,
    given: &Map<String, Value>,
) -> Reply<Option<(&'static str, Option<String>)>> {
    let mut other = None;
    for role in driver.children() {
        let Some(reference) = given.get(role) else { continue };
        let present = graph.children(&node.name).find(|(r, _)| *r == role).map(|(_, child)| child);
        let wanted = match reference {
            Value::String(name) => Some(graph.find_node(name)?),
            // Described, it stays: a change of its own.
            Value::Object(_) => present,
            _ => None,
        };
        if wanted.map(|node| &node.name) == present.map(|node| &node.name) {
            continue;
        }
        let wanted = wanted.map(|node| node.name.clone());
        if !driver.may_change(role) || node.is_part() {
            return Err(cannot_change(role));
        }
        if let Some((first, _)) = other.replace((role, wanted)) {
            return Err(QmpError::generic(format!(
                "The '{first}' and '{role}' of '{}' cannot change in one step",
                node.name
            )));
        }
    }
    Ok(other)
}

/// What a node comes to stand on.
struct NewBelow {
    file: String,
    below: Below,
}

/// What a node is to stand on, if that is another child, or the same by another device.
fn new_below(
    graph: &Graph,
    driver: &DriverEntry,
    node: &Node,
    given: &Map<String, Value>,
    child: Option<&(&'static str, Option<String>)>,
) -> Reply<Option<NewBelow>> {
    let file = match child {
        Some(("file", Some(name))) => graph.find_node(name)?,
        None if (driver.needs_rebase)(&node.options, given)? => {
            match graph.children(&node.name).find(|(role, _)| *role == "file") {
                Some((_, file)) => file,
                None => return Ok(None),
            }
        }
        _ => return Ok(None),
    };
    check_no_format(graph, node)?;
    let storage = file.storage.clone().filter(|_| file.path.is_some());
    let link = BackingLink::for_filter(Arc::clone(&file.tap) as _);
    Ok(Some(NewBelow { file: file.name.clone(), below: Below { link, file: storage } }))
}

/// Refuses a node in which a format lives, which would not see that it is put on another file.
fn check_no_format(graph: &Graph, node: &Node) -> Reply<()> {
    match graph.format_in(&node.name).filter(|_| node.storage.is_some()) {
        None => Ok(()),
        Some(parent) => Err(QmpError::generic(format!(
            "Node '{}' is busy: an image lives in it, node '{}'",
            node.name, parent.name
        ))),
    }
}

/// What has been done and can be taken back.
#[derive(Default)]
struct Done<'a> {
    /// No node is put on those that change.
    blocked: Option<BlockedParents<'a>>,
    writable: Vec<Reopened>,
    read_only: Vec<Reopened>,
    links: Vec<AttachmentId>,
    /// Files, with whether they went past the page cache.
    direct: Vec<(Arc<FileStorage>, bool)>,
    images: Vec<MovedImage>,
}

impl<'a> Done<'a> {
    fn prepare(&mut self, context: &'a Context, changes: &mut [Change]) -> Reply<()> {
        self.link(context, changes)?;
        // Users stop writing before what they stand on, and begin after it.
        context.graph.lock().sort_from_top(changes, |change| &change.node);
        for change in changes.iter() {
            for (_, file) in &change.files {
                file.set_direct(change.common.direct).map_err(qmp_error)?;
                self.direct.push((Arc::clone(file), !change.common.direct));
            }
        }
        let is_read_only = |name: &str| Ok::<_, QmpError>(context.graph.lock().find(name)?.read_only);
        for change in changes.iter() {
            if change.common.read_only && !is_read_only(&change.node)? {
                self.read_only.push(context.set_read_only(&change.node)?);
            }
        }
        for change in changes.iter().rev() {
            if !change.common.read_only && is_read_only(&change.node)? {
                match context.make_writable(&change.node) {
                    Ok(reopened) => self.writable.push(reopened),
                    Err(_) if change.common.auto_read_only => {}
                    Err(error) => return Err(error),
                }
            }
        }
        for change in changes.iter().filter(|change| change.moves_image) {
            if let Some(file) = change.new_file() {
                self.images.push(MovedImage::new(context, change, file)?);
            }
        }
        Ok(())
    }

    /// Puts nodes on other children, in the graph, beside those that they stand on.
    fn link(&mut self, context: &'a Context, changes: &[Change]) -> Reply<()> {
        let mut graph = context.graph.lock();
        let mut edges: BTreeMap<(String, &'static str), Option<String>> = BTreeMap::new();
        for change in changes {
            let Some(file) = change.new_file() else { continue };
            // It may have been opened since the node was looked at: that locks nothing.
            check_no_format(&graph, graph.find_node(&change.node)?)?;
            if let Some(other) = changes
                .iter()
                .find(|c| c.node != change.node && c.new_file().is_some() && graph.stands_on(file, &c.node))
            {
                return Err(QmpError::generic(format!(
                    "'{}' cannot be put on '{file}' in one step with a change of '{}'",
                    change.node, other.node
                )));
            }
        }
        for change in changes {
            let Some((role, wanted)) = &change.child else { continue };
            let old = graph.children(&change.node).find(|(r, _)| r == role).map(|(_, old)| old.name.clone());
            if let (Some(old), true) = (old, works_on_chain(&graph, &change.node)) {
                return Err(QmpError::generic(format!(
                    "Cannot change frozen '{role}' link from '{}' to '{old}'",
                    change.node
                )));
            }
            edges.insert((change.node.clone(), role), wanted.clone());
            let Some(child) = wanted else { continue };
            if reaches(&graph, &edges, child, &change.node) {
                return Err(QmpError::generic(format!(
                    "Making '{child}' a {role} child of '{}' would create a cycle",
                    change.node
                )));
            }
            let parent = Parent::Node { name: change.node.clone(), role };
            let (node, below) = (graph.find_node(&change.node)?, graph.find_node(child)?);
            // On a file, what stood on a disk becomes a format.
            let is_format = (node.driver.kind)(below.storage.is_some()) == Kind::Format;
            let (file, read_only) = (*role == "file", below.read_only);
            if file && read_only && !change.common.read_only && !changes.iter().any(|c| c.node == *child) {
                return Err(is_read_only());
            }
            let shared_perm = if file && is_format { NO_CHANGE } else { ALL_PERMS };
            self.links.push(graph.attach(child, parent, Perms::READ, shared_perm)?);
            if file {
                let writes = !graph.find_node(&change.node)?.read_only;
                graph.change_perm(&change.node, writes)?;
            }
            graph.check_hides_nothing(&change.node)?;
        }
        graph.check_pivots(None)?;
        let names = changes.iter().map(|change| change.node.clone()).collect();
        self.blocked = Some(BlockedParents::new(&context.graph, &mut graph, names));
        Ok(())
    }

    fn undo(self, context: &Context) {
        self.images.into_iter().rev().for_each(|moved| moved.undo(context));
        self.writable.into_iter().rev().for_each(|reopened| context.make_read_only(reopened));
        self.read_only.into_iter().rev().for_each(|reopened| context.make_writable_again(reopened));
        for (file, direct) in self.direct.into_iter().rev() {
            // It was like that before.
            let _ = file.set_direct(direct);
        }
        context.detach_all(&self.links);
    }

    /// What cannot fail. Returns nodes that are not needed any more.
    fn commit(self, context: &Context, changes: Vec<Change>) -> Released {
        let mut released = Released::default();
        for change in changes {
            let mut graph = context.graph.lock();
            for (name, _) in &change.files {
                if let Some(node) = graph.get_mut(name) {
                    node.direct = change.common.direct;
                }
            }
            if let Some((role, _)) = &change.child {
                let old = graph.links(&change.node, role);
                for old in old.into_iter().filter(|link| !self.links.contains(link)) {
                    released = released.and(graph.detach(old));
                }
            }
            let backing = change.child.as_ref().and_then(|(_, child)| {
                let link = BackingLink::for_overlay(Arc::clone(&graph.get(child.as_ref()?)?.device) as _);
                let id =
                    graph.links(&change.node, "backing").into_iter().find(|id| self.links.contains(id))?;
                graph.hold_link(id, &link);
                Some(link as Arc<dyn BlockDevice>)
            });
            if let (Some(disk), Some(id)) = (&change.disk, graph.link(&change.node, "file")) {
                graph.hold_link(id, &disk.link);
            }
            // The only one by now, wherever a pivot has moved it meanwhile.
            let file = graph.children(&change.node).find(|(r, _)| *r == "file").map(|(_, file)| file);
            let file = file.map(|file| (file.storage.clone(), file.path.clone(), file.filename.clone()));
            let Some(node) = graph.get_mut(&change.node) else { continue };
            let read_only = node.device.options().read_only;
            node.device.set_options(change.common.device_options(read_only));
            node.direct = change.common.direct;
            let checks = overlap_checks(&change.options);
            node.options = change.options;
            let image = node.qcow2.clone();
            let is_moved = change.disk.is_some() || change.moves_image;
            if let (true, Some((_, path, filename))) = (change.moves_image, &file) {
                (node.path, node.filename) = (path.clone(), filename.clone());
            }
            if let Some(NewDisk { new: Rebased { device, wrap }, .. }) = change.disk {
                node.device.replace(device);
                if let Some((storage, path, filename)) = file {
                    (node.storage, node.path, node.filename) = (storage, path, filename);
                }
                if let Some(wrap) = wrap {
                    node.storage = node.storage.take().map(wrap);
                }
            }
            if is_moved {
                graph.refer_to(&change.node);
            }
            drop(graph);
            if let Some(image) = &image {
                image.set_overlap_checks(checks);
            }
            if let (Some(("backing", _)), Some(image)) = (&change.child, image) {
                // Waits for reads under way.
                image.replace_backing(backing);
            }
        }
        released
    }
}

/// Whether a job holds the chain below `name`.
fn works_on_chain(graph: &Graph, name: &str) -> bool {
    graph.attachments_of(name).any(|(_, u)| matches!(u.parent, Parent::Job { kind: "stream" | "commit", .. }))
}

/// Whether `from` stands on `to`, with `edges` in place of what is there.
fn reaches(
    graph: &Graph,
    edges: &BTreeMap<(String, &'static str), Option<String>>,
    from: &str,
    to: &str,
) -> bool {
    let mut open = vec![from.to_owned()];
    let mut seen = Vec::new();
    while let Some(name) = open.pop() {
        if name == to {
            return true;
        }
        if seen.contains(&name) {
            continue;
        }
        for (role, child) in graph.children(&name) {
            if !edges.contains_key(&(name.clone(), role)) {
                open.push(child.name.clone());
            }
        }
        let others = edges.iter().filter(|((parent, _), _)| *parent == name);
        open.extend(others.filter_map(|(_, child)| child.clone()));
        seen.push(name);
    }
    false
}
