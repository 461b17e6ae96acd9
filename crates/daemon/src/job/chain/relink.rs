//! The graph after a stream or a commit: who stands on what, and whose users go where. Called at the end of
//! the job, when images and taps have changed.

use crate::context::Context;
use crate::graph::AttachmentId;

/// The node `overlay` stands on `base` from now on, or on nothing; its image does already.
pub(super) fn relink(context: &Context, overlay: &str, base: Option<&str>) {
    let mut graph = context.graph.lock();
    let mut old = graph.link(overlay, "backing");
    // The chain shared it before, with the same rights. Should it be refused all the same, the old edge
    // stays: what it leads to stands on the base, so that the base stays protected.
    let edge = match base.map(|base| graph.attach_backing(overlay, base)) {
        Some(Err(_)) => {
            old = None;
            None
        }
        Some(Ok(edge)) => Some(edge),
        None => None,
    };
    let image = graph.get(overlay).and_then(|node| node.qcow2.clone());
    let released = old.map(|old| graph.detach(old)).unwrap_or_default();
    drop(graph);
    if let (Some(edge), Some(image)) = (edge, image) {
        image.replace_backing(Some(edge));
    }
    context.close(released);
}

/// After a commit of what `overlay` stood on, by way of the filters `between` from the top, it stands on
/// `base`. The filters stay where they are, as in QEMU.
pub(super) fn relink_by_filters(context: &Context, overlay: &str, between: &[String], base: &str) {
    let (Some(first), Some(last)) = (between.first(), between.last()) else {
        return relink(context, overlay, Some(base));
    };
    {
        let mut graph = context.graph.lock();
        let child = graph.children(last).next().map(|(role, _)| role);
        if let Some(link) = child.and_then(|role| graph.link(last, role)) {
            // Should it be refused, the filter shows the same by what was committed.
            let _ = graph.move_filter(link, base);
        }
    }
    relink(context, overlay, Some(first));
}

/// After an active commit: the users of `device` use `base`, which keeps its bitmaps, exported ones too.
pub(super) fn pivot_to_base(context: &Context, device: &str, base: &str, attachments: &[AttachmentId]) {
    let mut graph = context.graph.lock();
    let exported = graph.get(base).map(|node| context.exported_bitmaps.suspend(&node.tap));
    graph.pivot(device, base, attachments, true);
    if let (Some(exported), Some(node)) = (exported, graph.get(base)) {
        exported.resume(&node.tap);
    }
}
