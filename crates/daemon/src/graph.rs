//! The graph: nodes by name, and who uses them for what.
//!
//! The daemon keeps one graph behind one mutex; commands, exports and jobs change it. It does no I/O of its
//! own.
//!
//! What must hold:
//! - A node in use is not removed.
//! - No two uses of a node contradict each other: what one needs, every other shares.
//! - Users of a disk hold its *tap*, never the device below it: that is how a pivot moves them.

mod attachment;
mod attachments;
mod backing_link;
mod blocked_parents;
mod chain;
mod child_link;
mod close;
mod filters;
mod host_size;
mod host_size_cell;
mod node;
mod node_device;
mod retarget;
mod stored_bitmaps;
mod write_watch;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::BlockDevice;
use blockmirror_file::FileId;
use blockmirror_image_lock::Permission;
use blockmirror_mirror::Tap;
use blockmirror_qmp::QmpError;

pub(crate) use attachment::{
    ALL as ALL_PERMS, Attachment, AttachmentId, JobRole, NO_CHANGE, Parent, Perms, WRITE,
};
use attachments::Attachments;
pub(crate) use backing_link::BackingLink;
pub(crate) use blocked_parents::BlockedParents;
pub(crate) use child_link::ChildLink;
pub(crate) use close::{close_all, close_released};
pub(crate) use host_size::HostSizes;
pub(crate) use node::{Kind, Node, NodeDriver, NodeId};
pub(crate) use node_device::{Counter, DeviceOptions, NodeDevice};
pub(crate) use stored_bitmaps::StoredBitmaps;

use crate::Reply;
use crate::ids::is_well_formed;

/// How long a guest that does not finish its writes may keep the command waiting that holds it. Tests hold
/// guests that do finish, on machines that may be slow.
pub(crate) const HOLD_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 600 } else { 30 });

/// Nodes and their uses.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    nodes: BTreeMap<String, Node>,
    attachments: Attachments,
    next_node: u64,
    /// Nodes on which none is put while a command changes them ([`BlockedParents`]).
    blocked: BTreeSet<String>,
}

/// What a change of the graph has left without users: it is to be closed, under no lock.
#[derive(Debug, Default)]
#[must_use = "its nodes stay open"]
pub(crate) struct Released {
    /// Nodes that are out of the graph, users before what they stand on.
    pub(crate) gone: Vec<Node>,
    /// Nodes whose length may have changed while they were used.
    pub(crate) stale: Vec<String>,
}

impl Released {
    /// These, and `more` after them.
    pub(crate) fn and(mut self, more: Self) -> Self {
        self.gone.extend(more.gone);
        self.stale.extend(more.stale);
        self
    }
}

impl Graph {
    /// A name for a node that got none.
    pub(crate) fn name_for_unnamed(&mut self) -> String {
        loop {
            let name = format!("#block{:03}", self.next_node);
            self.next_node += 1;
            if !self.nodes.contains_key(&name) {
                return name;
            }
        }
    }

    /// Whether a new node may be called `name`.
    pub(crate) fn check_name(&self, name: &str) -> Reply<()> {
        if !is_well_formed(name) {
            return Err(QmpError::generic(format!("Invalid node-name: '{name}'")));
        }
        if name.len() > 31 {
            return Err(QmpError::generic("Node name too long"));
        }
        if self.nodes.contains_key(name) {
            return Err(QmpError::generic(format!("Duplicate nodes with node-name='{name}'")));
        }
        Ok(())
    }

    /// Puts a new node in; its name has been checked.
    pub(crate) fn insert(&mut self, mut node: Node) -> NodeId {
        node.number = self.next_node;
        self.next_node += 1;
        let id = NodeId { name: node.name.clone(), number: node.number };
        self.nodes.insert(node.name.clone(), node);
        id
    }

    /// The node `name`, in the words of commands that take a device or a node.
    pub(crate) fn find(&self, name: &str) -> Reply<&Node> {
        self.nodes
            .get(name)
            .ok_or_else(|| QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'")))
    }

    /// The node `name`, in the words of commands that take a node only.
    pub(crate) fn find_node(&self, name: &str) -> Reply<&Node> {
        self.nodes
            .get(name)
            .ok_or_else(|| QmpError::generic(format!("Cannot find device='' nor node-name='{name}'")))
    }

    /// The node `name`, if there is one.
    pub(crate) fn get(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// The node `name` to change, if there is one.
    pub(crate) fn get_mut(&mut self, name: &str) -> Option<&mut Node> {
        self.nodes.get_mut(name)
    }

    /// All nodes, newest first.
    pub(crate) fn nodes(&self) -> Vec<&Node> {
        let mut nodes: Vec<_> = self.nodes.values().collect();
        nodes.sort_by_key(|node| std::cmp::Reverse(node.number));
        nodes
    }

    /// The uses of `name`, oldest first.
    pub(crate) fn attachments_of<'a>(
        &'a self,
        name: &str,
    ) -> impl Iterator<Item = (AttachmentId, &'a Attachment)> + use<'a> {
        self.attachments.of_node(name)
    }

    /// The use `id`.
    pub(crate) fn attachment(&self, id: AttachmentId) -> Option<&Attachment> {
        self.attachments.get(id)
    }

    /// The host file that the node `name` stands on by way of files and filters alone.
    pub(crate) fn file_below(&self, name: &str) -> Option<FileId> {
        let mut node = self.get(name)?;
        loop {
            if let Some(file) = &node.file {
                return Some(file.id());
            }
            let below = self.children(&node.name).find(|(role, _)| matches!(*role, "file" | "image" | "raw"));
            node = below?.1;
        }
    }

    /// The node `name` and those that it lives in, backing files aside: each before what it stands on.
    pub(crate) fn lives_in<'a>(&'a self, name: &'a str) -> Vec<&'a Node> {
        let mut nodes: Vec<_> = self.get(name).into_iter().collect();
        let mut seen = 0;
        while let Some(node) = nodes.get(seen) {
            let own = self.children(&node.name).filter(|(role, _)| *role != "backing");
            nodes.extend(own.map(|(_, child)| child));
            seen += 1;
        }
        nodes
    }

    /// The host files that the node `name` stands on, backing files too, and whether a server may have some
    /// of its bytes in a file of this host.
    pub(crate) fn all_files_below(&self, name: &str) -> (Vec<FileId>, bool) {
        let nodes: Vec<_> = self.all_below(name).into_iter().filter_map(|name| self.get(name)).collect();
        let files = nodes.iter().filter_map(|node| node.file.as_ref()).map(|file| file.id()).collect();
        let is_remote = |node: &&Node| node.file.is_none() && self.children(&node.name).next().is_none();
        (files, nodes.iter().any(is_remote))
    }

    /// The children of `parent`, each with its role.
    pub(crate) fn children<'a>(
        &'a self,
        parent: &str,
    ) -> impl Iterator<Item = (&'static str, &'a Node)> + use<'a> {
        self.attachments.of_parent(parent).filter_map(|(_, u)| match &u.parent {
            Parent::Node { role, .. } => Some((*role, self.nodes.get(&u.node)?)),
            _ => None,
        })
    }

    /// Refuses if what a format lives in by `link` is not what the node has any more, or if the node has got
    /// another length since its user looked: opening locks no node.
    pub(crate) fn check_holds(&self, link: &ChildLink) -> Reply<()> {
        let node = self.find(&link.node)?;
        if node.device.len() != link.len {
            return Err(QmpError::generic(format!("Node '{}' was resized meanwhile", link.node)));
        }
        let present = &node.storage;
        match (&link.storage, present) {
            (Some(held), Some(present)) if Arc::ptr_eq(held, present) => Ok(()),
            (None, _) => Ok(()),
            _ => Err(QmpError::generic(format!("Node '{}' has been put on another file", link.node))),
        }
    }

    /// Records that `parent` uses `node`.
    ///
    /// # Errors
    /// Another use contradicts it.
    pub(crate) fn attach(
        &mut self,
        node: &str,
        parent: Parent,
        perm: Perms,
        shared_perm: Perms,
    ) -> Reply<AttachmentId> {
        self.find(node)?;
        let new = Attachment { node: node.to_owned(), parent, perm, shared_perm, link: None };
        self.check_new_attachment(node, &new)?;
        let id = self.attachments.insert(new);
        self.retarget_backing_links();
        Ok(id)
    }

    /// Records a use that contradicts others: a fault that tests inject.
    #[cfg(test)]
    pub(crate) fn attach_unchecked(&mut self, node: &str, parent: Parent, perm: Perms, shared_perm: Perms) {
        self.attachments.insert(Attachment { node: node.to_owned(), parent, perm, shared_perm, link: None });
    }

    /// Changes what the node `parent` needs of those it stands on, backing files aside, as it is to be
    /// written or not.
    ///
    /// # Errors
    /// Another use contradicts it; nothing has changed then.
    pub(crate) fn change_perm(&mut self, parent: &str, writes: bool) -> Reply<()> {
        // A format resizes what it lives in.
        let formats = self.nodes.get(parent).is_some_and(Node::is_format);
        let perm = match (writes, formats) {
            (false, _) => Perms::READ,
            (true, true) => Perms::READ_WRITE,
            (true, false) => WRITE,
        };
        let is_file = |u: &Attachment| u.is_link_of(parent) && !u.is_backing();
        let links = self.attachments.of_parent(parent).filter(|(_, u)| is_file(u));
        let links: Vec<_> = links.map(|(id, _)| id).collect();
        for &id in &links {
            let Some(link) = self.attachments.get(id) else { continue };
            let wanted = Attachment {
                node: link.node.clone(),
                parent: link.parent.clone(),
                perm,
                shared_perm: link.shared_perm,
                link: None,
            };
            if self.filter_of(link).is_none() {
                self.check_attachment(&link.node, &wanted, Some(id))?;
            }
        }
        for id in links {
            self.attachments.set_perm(id, perm);
        }
        Ok(())
    }

    /// Forgets a use; nodes that were there for it alone go with it.
    pub(crate) fn detach(&mut self, id: AttachmentId) -> Released {
        let Some(old) = self.attachments.remove(id) else { return Released::default() };
        self.retarget_backing_links();
        self.collect(&old.node)
    }

    /// Takes `name` out if it has neither owner nor users any more.
    pub(crate) fn collect(&mut self, name: &str) -> Released {
        let mut released = Released::default();
        self.collect_if_orphaned(name, &mut released);
        released
    }

    fn collect_if_orphaned(&mut self, name: &str, released: &mut Released) {
        let mut candidates = vec![name.to_owned()];
        while let Some(name) = candidates.pop() {
            if self.attachments_of(&name).next().is_some() {
                continue;
            }
            match self.nodes.get(&name) {
                Some(node) if !node.owned => self.take_out(&name, &mut candidates, &mut released.gone),
                _ => self.note_stale(&name, &mut released.stale),
            }
        }
    }

    fn take_out(&mut self, name: &str, candidates: &mut Vec<String>, gone: &mut Vec<Node>) {
        let Some(node) = self.nodes.remove(name) else { return };
        gone.push(node);
        let held: Vec<_> = self.attachments.of_parent(name).map(|(id, _)| id).collect();
        candidates.extend(held.into_iter().filter_map(|id| Some(self.attachments.remove(id)?.node)));
    }

    /// Removes the node `name` as its owner asks, and the nodes that were there for it alone.
    ///
    /// # Errors
    /// There is none, it is in use, or it belongs to another node.
    pub(crate) fn remove(&mut self, name: &str) -> Reply<Released> {
        let Some(node) = self.nodes.get(name) else {
            return Err(QmpError::generic(format!("Failed to find node with node-name='{name}'")));
        };
        self.check_no_overlay(name)?;
        if let Some((_, u)) = self.attachments_of(name).next() {
            // What a job writes is in use, what it reads is busy.
            if !u.perm.contains(Permission::Write) {
                self.check_no_job(name)?;
            }
            return Err(QmpError::generic(format!("Node {name} is in use by {}", u.parent)));
        }
        if !node.owned {
            return Err(QmpError::generic(format!("Node {name} is not owned by the monitor")));
        }
        let (mut released, mut candidates) = (Released::default(), Vec::new());
        self.take_out(name, &mut candidates, &mut released.gone);
        for child in candidates {
            self.collect_if_orphaned(&child, &mut released);
        }
        Ok(released)
    }

    /// Takes the node `id` back, which could not be finished, with what was opened for it; if it is there.
    pub(crate) fn undo(&mut self, id: &NodeId) -> Released {
        let Some(node) = self.nodes.get_mut(&id.name).filter(|node| node.number == id.number) else {
            return Released::default();
        };
        node.owned = false;
        self.collect(&id.name)
    }

    /// The nodes among `names`, and all that they are connected to: by what stands on what, and by jobs.
    pub(crate) fn connected(&self, names: &[&str]) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut open: Vec<&str> =
            names.iter().copied().filter(|name| self.nodes.contains_key(*name)).collect();
        while let Some(name) = open.pop() {
            if !seen.insert(name.to_owned()) {
                continue;
            }
            open.extend(self.attachments.of_parent(name).map(|(_, u)| &*u.node));
            for (_, u) in self.attachments.of_node(name) {
                open.extend(u.parent.node());
                let of_job = u.parent.job().into_iter().flat_map(|job| self.attachments.of_job(job));
                open.extend(of_job.map(|u| &*u.node));
            }
        }
        seen
    }

    /// All nodes, to be closed at the end of everything: users before what they stand on.
    pub(crate) fn take_all(&mut self) -> Vec<Node> {
        self.attachments.clear();
        let mut nodes: Vec<_> = std::mem::take(&mut self.nodes).into_values().collect();
        nodes.sort_by_key(|node| std::cmp::Reverse(node.number));
        nodes
    }

    /// After the tap of `from` has pivoted to the device of `to`: the users of `from` use `to`, and the tap
    /// that they hold is `to`'s, with its bitmaps; of those that its image stores `from` keeps a copy. Those
    /// of `to` join them, with everything marked if a job has `rewritten` it. The uses in `except` stay
    /// (those of the job itself), and those by which `to` itself stands on `from`.
    pub(crate) fn pivot(&mut self, from: &str, to: &str, except: &[AttachmentId], rewritten: bool) {
        let below: Vec<_> = self.all_below(to).into_iter().map(str::to_owned).collect();
        let carries =
            |u: &Attachment| u.parent_node().is_some_and(|parent| below.iter().any(|name| name == parent));
        let moves = self.attachments.of_node(from).filter(|(id, u)| !except.contains(id) && !carries(u));
        for id in moves.map(|(id, _)| id).collect::<Vec<_>>() {
            self.attachments.move_to(id, to);
        }
        self.refer_to(to);
        let Some(source) = self.nodes.get_mut(from) else { return };
        let fresh = Tap::new(Arc::clone(&source.device) as _);
        source.copy_stored_bitmaps(&fresh);
        let tap = std::mem::replace(&mut source.tap, fresh);
        if let Some(target) = self.nodes.get_mut(to) {
            tap.take_bitmaps(&target.tap, rewritten);
            target.tap = tap;
        }
        self.retarget_backing_links();
    }
}
