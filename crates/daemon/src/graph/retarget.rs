//! Where backing links lead: what an overlay or a filter reads is what the graph says it stands on.
//!
//! A filter's link leads to the tap of the node below, so that bitmaps and jobs there see what it writes. An
//! overlay's leads past the tap, so that the overlay stays on what it was made for when other users are
//! moved; but while a job may pivot that node it leads to the tap, for then the overlay is moved as well, and
//! has to be at the very instant at which writes go elsewhere.
//!
//! What must hold: no link leads to a tap that may come to forward to something that stands on the link's
//! holder.

use std::collections::BTreeSet;
use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_qmp::QmpError;

use super::{ALL_PERMS, Attachment, AttachmentId, BackingLink, Graph, JobRole, Parent, Perms};
use crate::Reply;

impl Graph {
    /// Puts `overlay` on `base`. The image of the overlay has to be given the link that is returned.
    ///
    /// # Errors
    /// Another use of `base` contradicts it.
    pub(crate) fn attach_backing(&mut self, overlay: &str, base: &str) -> Reply<Arc<BackingLink>> {
        let parent = Parent::Node { name: overlay.to_owned(), role: "backing" };
        let link = BackingLink::for_overlay(Arc::clone(&self.find(base)?.device) as _);
        // As in QEMU, others may write it: those who do know what they do.
        let id = self.attach(base, parent, Perms::READ, ALL_PERMS)?;
        self.hold_link(id, &link);
        Ok(link)
    }

    /// Refuses `base` as what `overlay` is put on, as [`attach_backing`](Self::attach_backing) would.
    pub(crate) fn check_backing(&self, base: &str, overlay: &str) -> Reply<()> {
        let parent = Parent::Node { name: overlay.to_owned(), role: "backing" };
        let link = Attachment {
            node: base.to_owned(),
            parent,
            perm: Perms::READ,
            shared_perm: ALL_PERMS,
            link: None,
        };
        self.check_new_attachment(base, &link)
    }

    /// The link by which the holder of the use `id` reaches its node. From now on it leads where it has to.
    pub(crate) fn hold_link(&mut self, id: AttachmentId, link: &Arc<BackingLink>) {
        if let Some(held) = self.attachments.get_mut(&id) {
            held.link = Some(Arc::clone(link));
        }
        self.retarget_backing_links();
    }

    /// Puts `parent`, a filter on the node of the use `id`, on `node` instead.
    ///
    /// # Errors
    /// Another use of `node` contradicts it; nothing has changed then.
    pub(crate) fn move_filter(&mut self, id: AttachmentId, node: &str) -> Reply<()> {
        let Some(old) = self.attachments.get(&id) else { return Ok(()) };
        let moved = Attachment {
            node: node.to_owned(),
            parent: old.parent.clone(),
            perm: old.perm,
            shared_perm: old.shared_perm,
            link: None,
        };
        self.check_new_attachment(node, &moved)?;
        if let Some(held) = self.attachments.get_mut(&id) {
            node.clone_into(&mut held.node);
        }
        self.refer_to(node);
        self.retarget_backing_links();
        Ok(())
    }

    /// Makes all links lead where they have to, after uses or taps have changed.
    pub(super) fn retarget_backing_links(&self) {
        let pivots = self.pivots();
        for u in self.attachments.values() {
            let (Some(link), Some(node), Some(parent)) = (&u.link, self.nodes.get(&u.node), u.parent_node())
            else {
                continue;
            };
            let targets = || pivots.iter().filter(|(source, _)| *source == u.node).map(|(_, target)| *target);
            let would_loop = targets().any(|target| self.stands_on(target, parent));
            let by_tap = !would_loop && (!u.is_backing() || targets().next().is_some());
            link.retarget(match by_tap {
                true => Arc::clone(&node.tap) as Arc<dyn BlockDevice>,
                false => Arc::clone(&node.device) as _,
            });
        }
    }

    /// Refuses if a node stood on itself once every mirror that runs has put its target in the place of its
    /// source, and one that is still to come its own: `next`, with the node and what replaces it.
    pub(crate) fn check_pivots(&self, next: Option<(&str, &str)>) -> Reply<()> {
        let mut pivots = self.mirrors();
        pivots.extend(next);
        for &(from, to) in &pivots {
            if self.creates_cycle(from, to, &pivots) {
                return Err(QmpError::generic(format!(
                    "'{to}' cannot take the place of '{from}': it would come to stand on itself"
                )));
            }
        }
        Ok(())
    }

    /// Sources and targets of the mirrors that run.
    pub(super) fn mirrors(&self) -> Vec<(&str, &str)> {
        self.moves(|kind| kind == "mirror")
    }

    /// What each job that runs may put in the place of what.
    fn pivots(&self) -> Vec<(&str, &str)> {
        self.moves(|kind| matches!(kind, "mirror" | "commit"))
    }

    /// Sources and targets of the jobs of a kind.
    fn moves(&self, of_kind: impl Fn(&str) -> bool) -> Vec<(&str, &str)> {
        let in_role = |wanted: JobRole| {
            self.attachments.values().filter_map(move |u| match &u.parent {
                Parent::Job { id, kind, role } if *role == wanted => Some((id, *kind, &*u.node)),
                _ => None,
            })
        };
        let sources = in_role(JobRole::Source).filter(|(_, kind, _)| of_kind(kind));
        let target_of = |job: &String| in_role(JobRole::Target).find(|(id, ..)| *id == job);
        sources.filter_map(|(id, _, source)| Some((source, target_of(id)?.2))).collect()
    }

    /// Whether `to` leads to `from` otherwise than by backing files alone, where `pivots` may be made.
    fn creates_cycle(&self, from: &str, to: &str, pivots: &[(&str, &str)]) -> bool {
        let mut open = vec![(to, true)];
        let mut seen = BTreeSet::new();
        while let Some((name, by_backing)) = open.pop() {
            if name == from && !by_backing {
                return true;
            }
            if !seen.insert((name, by_backing)) {
                continue;
            }
            let below = self.children(name);
            open.extend(below.map(|(role, child)| (&*child.name, by_backing && role == "backing")));
            if name != from {
                open.extend(
                    pivots.iter().filter(|(source, _)| *source == name).map(|(_, other)| (*other, false)),
                );
            }
        }
        false
    }
}
