//! What jobs, exports and commands do with nodes: a change of the graph together with closing what it has
//! left without users, an image that replaces another, and notes in bitmaps of writes that these did not see.

use std::sync::Arc;

use blockmirror_qcow2::Qcow2;
use tracing::warn;

use super::Context;
use crate::Reply;
use crate::errors::qmp_error;
use crate::graph::{AttachmentId, HOLD_LIMIT, Node, NodeDevice, NodeId, Released, close_released};

impl Context {
    /// Closes nodes, as [`close_released`] does, and brings lengths of nodes that stay up to date. Not to be
    /// called under a lock.
    pub(crate) fn close(&self, released: Released) {
        self.written.note_closed(&released.gone);
        close_released(released.gone);
        self.refresh(released.stale);
    }

    /// Takes the node `id` back, which could not be finished, with what was opened for it. Another one that
    /// has got its name stays.
    pub(crate) fn undo_node(&self, id: &NodeId) {
        let released = self.graph.lock().undo(id);
        self.close(released);
    }

    /// Closes `name` if it has neither owner nor users any more.
    pub(crate) fn collect(&self, name: &str) {
        let released = self.graph.lock().collect(name);
        self.close(released);
    }

    /// An image is, or was, made in the nodes of `attachments`: bitmaps and logs of all that they stand on do
    /// not see it. Not to be called under a lock.
    pub(crate) fn rewritten_below(&self, attachments: &[AttachmentId]) {
        let nodes: Vec<_> = {
            let graph = self.graph.lock();
            let nodes = attachments.iter().filter_map(|id| graph.attachment(*id));
            let below = nodes.flat_map(|node| graph.all_below(&node.node));
            let node = |node: &Node| (Arc::clone(&node.tap), Arc::clone(&node.device));
            below.filter_map(|name| graph.get(name)).map(node).collect()
        };
        for (tap, device) in nodes {
            tap.note_rewritten();
            tap.give_up_log();
            device.watch().note_rewritten();
        }
    }

    /// Lets uses go, and closes what was there for them alone.
    pub(crate) fn detach_all(&self, attachments: &[AttachmentId]) {
        let mut graph = self.graph.lock();
        let released = attachments.iter().fold(Released::default(), |all, id| all.and(graph.detach(*id)));
        drop(graph);
        self.close(released);
    }

    /// A job writes, or has written, to the device of `name`: neither bitmaps that record there nor a log can
    /// tell where. Not to be called under a lock.
    pub(crate) fn note_rewritten(&self, name: &str) {
        let tap = self.graph.lock().get(name).map(|node| Arc::clone(&node.tap));
        if let Some(tap) = tap {
            tap.note_rewritten();
            tap.give_up_log();
        }
    }

    /// A job is about to start that may put the node `target` in another one's place: the bitmaps that its
    /// image stores are in use on disk from now on.
    ///
    /// # Errors
    /// The image cannot be written.
    pub(crate) fn keep_bitmaps_in_use(&self, target: &str) -> Reply<()> {
        let stored = self.graph.lock().get(target).and_then(Node::stored_bitmaps);
        stored.map_or(Ok(()), |stored| stored.keep_in_use()).map_err(qmp_error)
    }

    /// The job has not put the node `target` in another one's place, nor will it: the bitmaps that its image
    /// stores are not in use on disk any more. Those that cannot be stored stay so until the node is closed.
    /// The job still holds the node, which no guest writes.
    pub(crate) fn release_bitmaps(&self, target: &str) {
        let stored = self.graph.lock().get(target).and_then(Node::stored_bitmaps);
        if let Some(Err(error)) = stored.map(|stored| stored.store_within(HOLD_LIMIT)) {
            warn!(name = target, error = error.desc, "bitmaps of a target stay marked as in use");
        }
    }

    /// Puts `fresh`, which was opened anew, in the place of the image of the node `name`. A command may have
    /// put the node on another one meanwhile: `fresh` stands on what the graph says.
    pub(crate) fn replace_image(&self, name: &str, device: &Arc<NodeDevice>, fresh: Arc<Qcow2>) {
        loop {
            let link = self.graph.lock().backing_link(name);
            // Nothing uses it yet, so there is nothing to wait for.
            fresh.replace_backing(link.clone().map(|link| link as _));
            let mut graph = self.graph.lock();
            let now = graph.backing_link(name);
            if now.as_ref().map(Arc::as_ptr) != link.as_ref().map(Arc::as_ptr) {
                continue;
            }
            device.replace(Arc::clone(&fresh) as _);
            if let Some(node) = graph.get_mut(name)
                && Arc::ptr_eq(&node.device, device)
            {
                node.qcow2 = Some(fresh);
            }
            return;
        }
    }
}
