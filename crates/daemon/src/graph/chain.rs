//! Chains of images in the graph: who stands on whom as backing file, and what keeps a layer busy.

use std::sync::Arc;

use blockmirror_image::Format;
use blockmirror_mirror::{BitmapInfo, Tap};
use blockmirror_qmp::QmpError;

use super::{Attachment, AttachmentId, BackingLink, Graph, Node, Parent};
use crate::Reply;

impl Graph {
    /// The link by which `parent` stands on its child in `role`.
    pub(crate) fn link(&self, parent: &str, role: &str) -> Option<AttachmentId> {
        self.links(parent, role).first().copied()
    }

    /// All such links: there are two while one takes the place of the other.
    pub(crate) fn links(&self, parent: &str, role: &str) -> Vec<AttachmentId> {
        let is_it = |by: &Parent| matches!(by, Parent::Node { role: r, .. } if *r == role);
        let links = self.attachments.of_parent(parent).filter(|(_, u)| is_it(&u.parent));
        links.map(|(id, _)| id).collect()
    }

    /// The link by which `name` reaches its backing file.
    pub(crate) fn backing_link(&self, name: &str) -> Option<Arc<BackingLink>> {
        self.attachment(self.link(name, "backing")?)?.link.clone()
    }

    /// The backing file of `name`.
    pub(crate) fn backing_of<'a>(&'a self, name: &'a str) -> Option<&'a Node> {
        self.children(name).find(|(role, _)| *role == "backing").map(|(_, node)| node)
    }

    /// The node `name` and the backing files below it, from the top, with the filters that stand before them.
    pub(crate) fn chain<'a>(&'a self, name: &'a str) -> Vec<&'a Node> {
        let below = |node: &&'a Node| match node.is_filter() {
            true => self.children(&node.name).next().map(|(_, child)| child),
            false => self.backing_of(&node.name),
        };
        std::iter::successors(self.get(name), below).collect()
    }

    /// The name by which clients know `name`: of a node without a name of its own, that of the one it was
    /// opened for.
    pub(crate) fn known_as<'a>(&'a self, name: &'a str) -> &'a str {
        let above = |name: &&'a str| {
            let unnamed = name.starts_with('#');
            self.attachments_of(name).filter(|_| unnamed).find_map(|(_, u)| u.parent_node())
        };
        std::iter::successors(Some(name), above).last().unwrap_or(name)
    }

    /// Whether `below` is `above` or something that it stands on, in whatever role.
    pub(crate) fn stands_on(&self, above: &str, below: &str) -> bool {
        self.all_below(above).contains(&below)
    }

    /// Sorts `things`, each about a node, so that nodes come before what they stand on.
    pub(crate) fn sort_from_top<T>(&self, things: &mut [T], name: impl Fn(&T) -> &str) {
        // What a mirror writes through to is below its source, for a guest.
        let mirrors = self.mirrors();
        things.sort_by_cached_key(|thing| std::cmp::Reverse(self.all_reached(name(thing), &mirrors).len()));
    }

    /// The taps of nodes, in the order in which their guests can be held: a write that is under way in one
    /// can still reach those below.
    pub(crate) fn taps_from_top(&self, mut names: Vec<String>) -> Vec<Arc<Tap>> {
        self.sort_from_top(&mut names, String::as_str);
        names.iter().filter_map(|name| self.get(name)).map(|node| Arc::clone(&node.tap)).collect()
    }

    /// `name` and whatever it stands on, in whatever role.
    pub(crate) fn all_below<'a>(&'a self, name: &'a str) -> Vec<&'a str> {
        self.all_reached(name, &[])
    }

    /// The same, with the second of each of `more` below the first.
    fn all_reached<'a>(&'a self, name: &'a str, more: &[(&'a str, &'a str)]) -> Vec<&'a str> {
        let mut open = vec![name];
        let mut seen = Vec::new();
        while let Some(name) = open.pop() {
            if !seen.contains(&name) {
                seen.push(name);
                open.extend(self.children(name).map(|(_, node)| node.name.as_str()));
                open.extend(more.iter().filter(|(above, _)| *above == name).map(|(_, below)| *below));
            }
        }
        seen
    }

    /// Refuses if a bitmap of `name` is in use, which is about to take another node's place.
    pub(crate) fn check_bitmaps_free(&self, name: &str) -> Reply<()> {
        self.check_bitmaps_free_but(name, |_| false)
    }

    /// The same, but for those that `moves` says can move while they are in use.
    pub(crate) fn check_bitmaps_free_but(&self, name: &str, moves: impl Fn(&str) -> bool) -> Reply<()> {
        let is_in_use = |bitmap: &BitmapInfo| bitmap.busy && !moves(&bitmap.name);
        match self.find(name)?.tap.bitmaps().into_iter().find(is_in_use) {
            Some(bitmap) => Err(busy(name, &format!("its bitmap '{}' is in use", bitmap.name))),
            None => Ok(()),
        }
    }

    /// Refuses if a job works on `name`.
    pub(crate) fn check_no_job(&self, name: &str) -> Reply<()> {
        for (_, u) in self.attachments_of(name) {
            if let Parent::Job { kind, .. } = &u.parent {
                return Err(busy(name, &format!("block device is in use by block job: {kind}")));
            }
        }
        Ok(())
    }

    /// Refuses if an overlay stands on `name`.
    pub(crate) fn check_no_overlay(&self, name: &str) -> Reply<()> {
        for (_, u) in self.attachments_of(name) {
            if let Parent::Node { name: parent, role: "backing" } = &u.parent {
                return Err(busy(name, &format!("node is used as backing hd of '{parent}'")));
            }
        }
        Ok(())
    }

    /// Refuses if there is a reader or writer of the layer `name` of a chain other than through its overlay
    /// `parent`. Other overlays that are not in use do not count.
    pub(crate) fn check_layer(&self, name: &str, parent: &str) -> Reply<()> {
        self.check_no_job(name)?;
        let other = |u: &Attachment| {
            !u.is_link_of(parent) && !u.parent_node().is_some_and(|other| self.is_idle(other))
        };
        match self.attachments_of(name).find(|(_, u)| other(u)) {
            Some((_, u)) => Err(busy(name, &format!("it is in use by {}", u.parent))),
            None => Ok(()),
        }
    }

    /// Whether `name` is unused, and so is what stands on it.
    fn is_idle(&self, name: &str) -> bool {
        self.attachments_of(name).all(|(_, u)| u.parent_node().is_some_and(|parent| self.is_idle(parent)))
    }

    /// The image that writes to `name` past its tap, as formats do to what they live in.
    fn hidden_writer<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        let node = self.get(name).filter(|node| node.storage.is_some())?;
        self.attachments_of(name).filter(|(_, u)| !u.is_backing()).find_map(|(_, u)| {
            let parent = self.get(u.parent_node()?)?;
            match (parent.driver.writes_past_tap)(node) {
                true => Some(parent.name.as_str()),
                false => self.hidden_writer(&parent.name),
            }
        })
    }

    /// Refuses if bitmaps of `name` would not see what is written there.
    pub(crate) fn check_sees_writes(&self, name: &str) -> Reply<()> {
        match self.hidden_writer(name) {
            None => Ok(()),
            Some(image) => Err(QmpError::generic(format!(
                "A bitmap of '{name}' would not see what '{image}' writes there: take one of '{image}'"
            ))),
        }
    }

    /// Refuses what `name` now stands on if bitmaps of those nodes would not see any more what is written
    /// there.
    pub(crate) fn check_hides_nothing(&self, name: &str) -> Reply<()> {
        for below in self.all_below(name).into_iter().skip(1) {
            if self.get(below).is_some_and(|node| !node.tap.bitmaps().is_empty()) {
                self.check_sees_writes(below)?;
            }
        }
        Ok(())
    }

    /// What the header of an image that is to stand on `name` calls it.
    pub(crate) fn header_name(&self, name: &str) -> Reply<String> {
        let mut next = self.find(name)?;
        loop {
            if next.is_part() {
                return Err(QmpError::generic(format!(
                    "Node '{name}' lies in a part of a file, which the header of an image cannot name"
                )));
            }
            match self.children(&next.name).find(|(role, _)| matches!(*role, "file" | "image" | "raw")) {
                Some((_, child)) => next = child,
                None => return Ok(self.find(name)?.name_in_headers()),
            }
        }
    }

    /// Refuses if `name` has any attachment.
    pub(crate) fn check_unused(&self, name: &str) -> Reply<()> {
        self.check_no_job(name)?;
        self.check_no_overlay(name)?;
        match self.attachments_of(name).next() {
            Some((_, u)) => Err(busy(name, &format!("it is in use by {}", u.parent))),
            None => Ok(()),
        }
    }
}

fn busy(name: &str, why: &str) -> QmpError {
    QmpError::generic(format!("Node '{name}' is busy: {why}"))
}

impl Node {
    /// What the header of an image that stands on this one calls it: an absolute path, where it is a file.
    pub(crate) fn name_in_headers(&self) -> String {
        let absolute = self.path.as_ref().and_then(|path| std::path::absolute(path).ok());
        absolute.map_or_else(|| self.filename.clone(), |path| path.display().to_string())
    }

    /// The format that such a header names.
    pub(crate) fn format_in_headers(&self) -> Format {
        if self.qcow2.is_some() { Format::Qcow2 } else { Format::Raw }
    }

    /// Whether this is what `name`, given by a client, means.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.filename == name || self.name_in_headers() == name
    }
}
