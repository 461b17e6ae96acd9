//! Backing edges: what an overlay reads is what the graph says it stands on.
//!
//! An overlay holds an *edge*, a [`Front`] that leads to the disk below. It leads past the tap, so that the
//! overlay stays on what it was made for when other users are moved; but while a job may pivot that disk it
//! leads to the tap, for then the overlay is moved as well, and has to be at the very instant at which writes
//! go elsewhere.
//!
//! Other children are always reached by their taps. So a node that may take another's place must not stand on
//! it, but for backing files.
//!
//! What must hold: nothing leads to a tap that may come to forward to something that stands on it.

use std::collections::BTreeSet;
use std::sync::Arc;

use blockmirror_block::BlockDevice;
use blockmirror_image_lock::Permission;
use blockmirror_qmp::QmpError;

use super::{ALL_PERMS, Front, FrontOptions, Graph, Holder, Perms, Use, UseId};
use crate::Reply;

/// An edge to `device`, which its holder reads.
pub(crate) fn edge_to(device: &Arc<Front>) -> Arc<Front> {
    let options = FrontOptions { read_only: true, ..FrontOptions::default() };
    Front::new(Arc::clone(device) as _, options)
}

impl Graph {
    /// Puts `overlay` on `base`. The image of the overlay has to be given the edge that is returned.
    ///
    /// # Errors
    /// Another use of `base` contradicts it.
    pub(crate) fn attach_backing(&mut self, overlay: &str, base: &str) -> Reply<Arc<Front>> {
        let holder = Holder::Node { name: overlay.to_owned(), role: "backing" };
        let edge = edge_to(&self.find(base)?.device);
        // As in QEMU, others may write it: those who do know what they do.
        let link = self.attach(base, holder, Perms::READ, ALL_PERMS)?;
        self.hold_edge(link, &edge);
        Ok(edge)
    }

    /// Refuses `base` as what `overlay` is put on, as [`attach_backing`](Self::attach_backing) would.
    pub(crate) fn check_backing(&self, base: &str, overlay: &str) -> Reply<()> {
        let holder = Holder::Node { name: overlay.to_owned(), role: "backing" };
        let link = Use { node: base.to_owned(), holder, needs: Perms::READ, shares: ALL_PERMS, edge: None };
        self.check_new_use(base, &link)
    }

    /// The edge by which the holder of `link` reads. From now on it leads where it has to.
    pub(crate) fn hold_edge(&mut self, link: UseId, edge: &Arc<Front>) {
        if let Some(link) = self.uses.get_mut(&link) {
            link.edge = Some(Arc::clone(edge));
        }
        self.aim_edges();
    }

    /// Lets all edges lead where they have to, after uses have changed.
    pub(super) fn aim_edges(&self) {
        // Nodes that a job may pivot, with the job; its other nodes are those to which it may pivot them.
        let mut moving: Vec<(&str, &str)> = Vec::new();
        for u in self.uses.values() {
            if let Holder::Job { id, kind: "mirror" | "commit" } = &u.holder {
                moving.push((&u.node, id));
            }
        }
        for u in self.uses.values() {
            let (Some(edge), Some(node), Some(holder)) = (&u.edge, self.nodes.get(&u.node), u.parent())
            else {
                continue;
            };
            let ids: BTreeSet<_> = moving.iter().filter(|(n, _)| *n == u.node).map(|(_, id)| id).collect();
            let would_loop =
                || moving.iter().any(|(other, id)| ids.contains(id) && self.stands_on(other, holder));
            let to: Arc<dyn BlockDevice> = match !ids.is_empty() && !would_loop() {
                true => Arc::clone(&node.tap) as _,
                false => Arc::clone(&node.device) as _,
            };
            edge.replace(to);
        }
    }

    /// Refuses if a node stood on itself once every mirror that runs has put its target in the place of its
    /// source, and one that is still to come its own: `next`, with the node and what replaces it.
    pub(crate) fn check_pivots(&self, next: Option<(&str, &str)>) -> Reply<()> {
        let mut pivots = self.mirrors();
        pivots.extend(next);
        for &(from, to) in &pivots {
            if self.comes_back(from, to, &pivots) {
                return Err(QmpError::generic(format!(
                    "'{to}' cannot take the place of '{from}': it would come to stand on itself"
                )));
            }
        }
        Ok(())
    }

    /// Sources and targets of the mirrors that run.
    pub(super) fn mirrors(&self) -> Vec<(&str, &str)> {
        let of_mirrors = self.uses.values().filter_map(|u| match &u.holder {
            Holder::Job { id, kind: "mirror" } => Some((id, u)),
            _ => None,
        });
        let (targets, sources): (Vec<_>, Vec<_>) =
            of_mirrors.partition(|(_, u)| u.needs.contains(Permission::Write));
        let target_of = |id| targets.iter().find(|(other, _)| *other == id);
        sources.iter().filter_map(|(id, source)| Some((&*source.node, &*target_of(*id)?.1.node))).collect()
    }

    /// Whether `to` leads to `from` otherwise than by backing files alone, where `pivots` may be made.
    fn comes_back(&self, from: &str, to: &str, pivots: &[(&str, &str)]) -> bool {
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
