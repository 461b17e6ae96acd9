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

use super::{ALL_PERMS, Attachment, AttachmentId, BackingLink, Graph, Node, Parent, Perms};
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
        self.attachments.hold_link(id, link);
        self.retarget_backing_links();
    }

    /// Puts `parent`, a filter on the node of the use `id`, on `node` instead.
    ///
    /// # Errors
    /// Another use of `node` contradicts it; nothing has changed then.
    pub(crate) fn move_filter(&mut self, id: AttachmentId, node: &str) -> Reply<()> {
        let Some(old) = self.attachments.get(id) else { return Ok(()) };
        let moved = Attachment {
            node: node.to_owned(),
            parent: old.parent.clone(),
            perm: old.perm,
            shared_perm: old.shared_perm,
            link: None,
        };
        self.check_new_attachment(node, &moved)?;
        self.attachments.move_to(id, node);
        self.refer_to(node);
        self.retarget_backing_links();
        Ok(())
    }

    /// Makes all links lead where they have to, after uses or taps have changed.
    pub(super) fn retarget_backing_links(&self) {
        for u in self.attachments.linked() {
            let (Some(link), Some(node), Some(parent)) = (&u.link, self.nodes.get(&u.node), u.parent_node())
            else {
                continue;
            };
            let targets = || self.moved_to(&u.node, |kind| matches!(kind, "mirror" | "commit"));
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
        // Those that the next one is not connected to cannot come to stand on themselves by it.
        let mut pivots = match next {
            None => self.mirrors(),
            Some((from, to)) => self.mirrors_among(&self.connected(&[from, to])),
        };
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
        let target_of = |u| self.attachments.target_of(u, |kind| kind == "mirror");
        self.attachments.iter().filter_map(|u| Some((&*u.node, target_of(u)?))).collect()
    }

    /// The same, of those whose source is among `names`.
    fn mirrors_among<'a>(&'a self, names: &BTreeSet<String>) -> Vec<(&'a str, &'a str)> {
        let sources = names.iter().filter_map(|name| self.get(name));
        let targets = |node: &'a Node| self.moved_to(&node.name, |kind| kind == "mirror");
        sources.flat_map(|node| targets(node).map(|target| (&*node.name, target))).collect()
    }

    /// What the jobs of a kind may put in the place of `source`.
    fn moved_to<'a, F: Fn(&str) -> bool>(
        &'a self,
        source: &str,
        of_kind: F,
    ) -> impl Iterator<Item = &'a str> + use<'a, F> {
        self.attachments.of_node(source).filter_map(move |(_, u)| self.attachments.target_of(u, &of_kind))
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
