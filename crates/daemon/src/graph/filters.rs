//! Filters, which stand before a disk: what their users need and share counts below them, and what a filter
//! stands for follows from what it is on. Called by the graph and by what changes it.
//!
//! What must hold: a use is checked against all others that reach the same disk, by whatever filters; no
//! format lives in a filter's storage that is not the filter's disk any more.

use super::{Attachment, AttachmentId, Graph, Node, Parent};
use crate::Reply;

impl Graph {
    /// The filter whose link this is; it needs and shares what its own users do.
    pub(super) fn filter_of<'a>(&self, u: &'a Attachment) -> Option<&'a str> {
        let parent = u.parent_node().filter(|_| !u.is_backing())?;
        self.get(parent).is_some_and(Node::is_filter).then_some(parent)
    }

    /// Refuses a use of `node` that its holder could not go on with: by what it needs and shares, or because
    /// a job may move it to another place.
    ///
    /// # Errors
    /// Another use contradicts it.
    pub(super) fn check_new_attachment(&self, node: &str, new: &Attachment) -> Reply<()> {
        let Some(filter) = self.filter_of(new) else {
            self.check_attachment(node, new, None)?;
            if new.parent_node().is_some() && !new.is_backing() {
                // A format holds the file itself, and would stay behind in a pivot.
                self.below_filters(node).into_iter().try_for_each(|below| self.check_no_job(below))?;
            }
            return Ok(());
        };
        self.users_of(filter).into_iter().try_for_each(|(id, u)| self.check_attachment(node, u, Some(id)))
    }

    /// Whether a job may put `name` in another one's place.
    pub(crate) fn may_pivot(&self, name: &str) -> bool {
        self.attachments_of(name).any(|(_, u)| u.may_pivot())
    }

    /// Refuses if a job may put `name` in another one's place.
    pub(crate) fn check_keeps_tap(&self, name: &str) -> Reply<()> {
        if self.may_pivot(name) { self.check_no_job(name) } else { Ok(()) }
    }

    /// The uses of `name`; in place of a filter on it, those of the filter.
    pub(crate) fn users_of<'a>(&'a self, name: &'a str) -> Vec<(AttachmentId, &'a Attachment)> {
        let mut users = Vec::new();
        let mut open = vec![name];
        while let Some(name) = open.pop() {
            for (id, u) in self.attachments_of(name) {
                match self.filter_of(u) {
                    Some(filter) => open.push(filter),
                    None => users.push((id, u)),
                }
            }
        }
        users
    }

    /// Refuses the `new` use of `name` if it contradicts another one but `except`, there or wherever filters
    /// pass it on to. The old child of a node and the one that takes its place may lead to one disk.
    pub(super) fn check_attachment(
        &self,
        name: &str,
        new: &Attachment,
        except: Option<AttachmentId>,
    ) -> Reply<()> {
        for name in self.below_filters(name) {
            for (id, other) in self.users_of(name) {
                let of_one_holder = matches!(new.parent, Parent::Node { .. }) && other.parent == new.parent;
                let is_claim = self.is_claim_above(other, new) || self.is_claim_above(new, other);
                if Some(id) != except && !of_one_holder && !is_claim {
                    other.check_against(new)?;
                }
            }
        }
        Ok(())
    }

    /// Whether `claim` is that of a filter by which `u` reaches the disk: its own users are not meant.
    fn is_claim_above(&self, claim: &Attachment, u: &Attachment) -> bool {
        matches!(&claim.parent, Parent::Claim { name } if self.below_filters(&u.node).contains(&&**name))
    }

    /// `name`, and if it is a filter what it is on, down to the disk.
    pub(crate) fn below_filters<'a>(&'a self, name: &'a str) -> Vec<&'a str> {
        let mut names = vec![name];
        let mut seen = 0;
        while let Some(&name) = names.get(seen) {
            let links = self.attachments.of_parent(name).filter(|(_, u)| self.filter_of(u).is_some());
            names.extend(links.map(|(_, u)| &*u.node));
            seen += 1;
        }
        names
    }

    /// The node that an image is said to stand on that stands on `node`: filters have no name in headers.
    pub(crate) fn in_headers<'a>(&'a self, node: &'a Node) -> &'a Node {
        let below = |node: &&'a Node| {
            let (_, child) = node.is_filter().then(|| self.children(&node.name).next())??;
            Some(child)
        };
        std::iter::successors(Some(node), below).last().unwrap_or(node)
    }

    /// The format that lives in `name`, as it is or by way of filters.
    pub(crate) fn format_in(&self, name: &str) -> Option<&Node> {
        self.attachments_of(name).filter(|(_, u)| !u.is_backing()).find_map(|(_, u)| {
            let parent = self.get(u.parent_node()?)?;
            if parent.is_format() { Some(parent) } else { self.format_in(&parent.name) }
        })
    }

    /// The filters on `name`, and those on them, from below.
    pub(crate) fn filters_on(&self, name: &str) -> Vec<String> {
        let mut filters: Vec<String> = Vec::new();
        let mut next = name;
        let mut seen = 0;
        loop {
            let above = self.attachments_of(next).filter_map(|(_, u)| self.filter_of(u));
            filters.extend(above.map(str::to_owned));
            let Some(filter) = filters.get(seen) else { return filters };
            next = self.get(filter).map_or("", |node| &node.name);
            seen += 1;
        }
    }

    /// Filters on `name` that were not opened on what it is now stand for it from now on. No format lives in
    /// them, nor can one any more.
    pub(crate) fn refer_to(&mut self, name: &str) {
        let Some(node) = self.get(name) else { return };
        let (path, filename) = (node.path.clone(), node.filename.clone());
        for filter in self.filters_on(name) {
            if let Some(node) = self.get_mut(&filter) {
                (node.path, node.filename) = (path.clone(), filename.clone());
                node.storage = None;
            }
        }
    }

    /// Notes that the length of `name`, which is not in use, is to be brought up to date, after those of the
    /// files it alone lives in: what lived there may have made them longer.
    pub(super) fn note_stale(&self, name: &str, stale: &mut Vec<String>) {
        let alone = |child: &Node| self.attachments_of(&child.name).all(|(_, u)| u.is_link_of(name));
        for (role, child) in self.children(name) {
            if role != "backing" && alone(child) {
                self.note_stale(&child.name, stale);
            }
        }
        stale.push(name.to_owned());
    }
}
