//! The uses of nodes, found by the node, by the node that uses it, by job, and by whether a link goes with
//! them. Owned by the graph, which checks what it puts in.
//!
//! What must hold: each use is in the indexes under what it says now, so nothing changes a use but the
//! methods here. A look at the uses of one node costs as much as there are of them, however many nodes there
//! are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Attachment, AttachmentId, BackingLink, JobRole, Parent, Perms};

/// Uses by a name: those of one name in the order in which they came.
#[derive(Debug, Default)]
struct Index(BTreeMap<String, BTreeSet<AttachmentId>>);

impl Index {
    fn insert(&mut self, name: &str, id: AttachmentId) {
        match self.0.get_mut(name) {
            Some(ids) => _ = ids.insert(id),
            None => _ = self.0.insert(name.to_owned(), BTreeSet::from([id])),
        }
    }

    fn remove(&mut self, name: &str, id: AttachmentId) {
        if let Some(ids) = self.0.get_mut(name) {
            ids.remove(&id);
            if ids.is_empty() {
                self.0.remove(name);
            }
        }
    }

    fn get<'a>(&'a self, name: &str) -> impl Iterator<Item = AttachmentId> + use<'a> {
        self.0.get(name).into_iter().flatten().copied()
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Attachments {
    by_id: BTreeMap<AttachmentId, Attachment>,
    next: u64,
    /// By the node that is used.
    of_node: Index,
    /// By the node that uses it.
    of_parent: Index,
    of_job: Index,
    /// Those with a link.
    linked: BTreeSet<AttachmentId>,
}

impl Attachments {
    pub(super) fn insert(&mut self, attachment: Attachment) -> AttachmentId {
        let id = AttachmentId(self.next);
        self.next += 1;
        self.of_node.insert(&attachment.node, id);
        if let Some(parent) = attachment.parent.node() {
            self.of_parent.insert(parent, id);
        }
        if let Some(job) = attachment.parent.job() {
            self.of_job.insert(job, id);
        }
        if attachment.link.is_some() {
            self.linked.insert(id);
        }
        self.by_id.insert(id, attachment);
        id
    }

    pub(super) fn remove(&mut self, id: AttachmentId) -> Option<Attachment> {
        let attachment = self.by_id.remove(&id)?;
        self.of_node.remove(&attachment.node, id);
        if let Some(parent) = attachment.parent.node() {
            self.of_parent.remove(parent, id);
        }
        if let Some(job) = attachment.parent.job() {
            self.of_job.remove(job, id);
        }
        self.linked.remove(&id);
        Some(attachment)
    }

    /// Forgets all; numbers are not given again.
    pub(super) fn clear(&mut self) {
        *self = Self { next: self.next, ..Self::default() };
    }

    pub(super) fn get(&self, id: AttachmentId) -> Option<&Attachment> {
        self.by_id.get(&id)
    }

    /// All, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Attachment> {
        self.by_id.values()
    }

    fn found(
        &self,
        ids: impl Iterator<Item = AttachmentId>,
    ) -> impl Iterator<Item = (AttachmentId, &Attachment)> {
        ids.filter_map(|id| Some((id, self.by_id.get(&id)?)))
    }

    /// The uses of the node `name`, oldest first.
    pub(super) fn of_node<'a>(
        &'a self,
        name: &str,
    ) -> impl Iterator<Item = (AttachmentId, &'a Attachment)> + use<'a> {
        self.found(self.of_node.get(name))
    }

    /// What the node `name` uses, whichever way, oldest first.
    pub(super) fn of_parent<'a>(
        &'a self,
        name: &str,
    ) -> impl Iterator<Item = (AttachmentId, &'a Attachment)> + use<'a> {
        self.found(self.of_parent.get(name))
    }

    /// What the job `id` uses, oldest first.
    pub(super) fn of_job<'a>(&'a self, id: &str) -> impl Iterator<Item = &'a Attachment> + use<'a> {
        self.found(self.of_job.get(id)).map(|(_, attachment)| attachment)
    }

    /// Those with a link.
    pub(super) fn linked(&self) -> impl Iterator<Item = &Attachment> {
        self.found(self.linked.iter().copied()).map(|(_, attachment)| attachment)
    }

    /// The target of a job that `attachment` is the source of, if the job is of a `kind`.
    pub(super) fn target_of(&self, attachment: &Attachment, of_kind: impl Fn(&str) -> bool) -> Option<&str> {
        let Parent::Job { id, kind, role: JobRole::Source } = &attachment.parent else { return None };
        if !of_kind(kind) {
            return None;
        }
        let is_target = |u: &&Attachment| u.may_pivot();
        Some(&self.of_job(id).find(is_target)?.node)
    }

    /// The holder of `id` reaches its node by `link`.
    pub(super) fn hold_link(&mut self, id: AttachmentId, link: &Arc<BackingLink>) {
        if let Some(attachment) = self.by_id.get_mut(&id) {
            attachment.link = Some(Arc::clone(link));
            self.linked.insert(id);
        }
    }

    /// The holder of `id` needs `perm` from now on.
    pub(super) fn set_perm(&mut self, id: AttachmentId, perm: Perms) {
        if let Some(attachment) = self.by_id.get_mut(&id) {
            attachment.perm = perm;
        }
    }

    /// `id` is a use of `node` from now on.
    pub(super) fn move_to(&mut self, id: AttachmentId, node: &str) {
        if let Some(attachment) = self.by_id.get_mut(&id) {
            self.of_node.remove(&attachment.node, id);
            node.clone_into(&mut attachment.node);
            self.of_node.insert(node, id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn use_of(node: &str, parent: Parent) -> Attachment {
        Attachment { node: node.to_owned(), parent, perm: Perms::READ, shared_perm: Perms::READ, link: None }
    }

    fn nodes<'a>(found: impl Iterator<Item = (AttachmentId, &'a Attachment)>) -> Vec<&'a str> {
        found.map(|(_, attachment)| &*attachment.node).collect()
    }

    #[test]
    fn a_use_is_found_by_what_it_says_now_and_by_nothing_once_it_is_gone() {
        let mut all = Attachments::default();
        let of_job = |role| Parent::Job { id: "j".into(), kind: "mirror", role };
        let source = all.insert(use_of("a", of_job(JobRole::Source)));
        let target = all.insert(use_of("b", of_job(JobRole::Target)));
        let file = all.insert(use_of("f", Parent::Node { name: "a".into(), role: "file" }));
        let claim = all.insert(use_of("a", Parent::Claim { name: "a".into() }));
        assert_eq!(nodes(all.of_parent("a")), ["f", "a"]);
        assert_eq!(all.of_job("j").count(), 2);
        assert_eq!(all.target_of(all.get(source).unwrap(), |kind| kind == "mirror"), Some("b"));
        assert_eq!(all.target_of(all.get(source).unwrap(), |kind| kind == "commit"), None);
        assert_eq!(all.target_of(all.get(target).unwrap(), |_| true), None);

        all.move_to(file, "g");
        assert_eq!(nodes(all.of_parent("a")), ["g", "a"]);
        assert_eq!((all.of_node("f").count(), all.of_node("g").count()), (0, 1));

        for id in [source, target, file, claim] {
            assert!(all.remove(id).is_some());
            assert!(all.remove(id).is_none());
        }
        let Attachments { by_id, next: 4, of_node, of_parent, of_job, linked } = all else { panic!() };
        assert!(by_id.is_empty() && linked.is_empty());
        assert!([of_node, of_parent, of_job].iter().all(|index| index.0.is_empty()));
    }
}
