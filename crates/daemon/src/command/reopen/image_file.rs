//! The `file` of an image: the image is opened a second time in another node, which holds the same, and put
//! in the place of the first. Called by [`super::reopen`], with the guest held.
//!
//! What must hold: all that the first image knows is on disk before the second is opened; a file that holds
//! another image is not written to; nothing is written by the second while a reader uses the first.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::BlockDevice;
use blockmirror_qcow2::{Header, Qcow2};
use blockmirror_qmp::QmpError;

use super::Change;
use crate::Reply;
use crate::context::Context;
use crate::driver::{DriverEntry, OpenNode, OpenedAgain};
use crate::errors::qmp_error;
use crate::graph::{HOLD_LIMIT, NodeDevice};

/// How long requests that began before may take.
const READERS_LIMIT: Duration = Duration::from_secs(5);
/// How often it is looked whether they have ended.
const LOOK: Duration = Duration::from_millis(1);

/// An image that was put on another file, as long as it can be put back.
pub(super) struct MovedImage {
    node: String,
    device: Arc<NodeDevice>,
    old: OpenedAgain,
}

impl MovedImage {
    /// Puts the image of the node that changes on `file`.
    ///
    /// # Errors
    /// It cannot be flushed; `file` does not hold it; a reader does not end. Nothing has changed then.
    pub(super) fn new(context: &Context, change: &Change, file: &str) -> Reply<Self> {
        let (device, driver, image, stored, mut parts) = {
            let graph = context.graph.lock();
            let (node, child) = (graph.find_node(&change.node)?, graph.find_node(file)?);
            let image = node.qcow2.clone().ok_or_else(|| QmpError::generic("The node is no image"))?;
            let storage = child.storage.clone().ok_or_else(|| {
                QmpError::generic(format!(
                    "Node '{file}' cannot hold an image: only files and filters on files can"
                ))
            })?;
            let data = graph.children(&node.name).find(|(role, _)| *role == "data-file");
            let parts = OpenNode {
                filename: child.filename.clone(),
                options: change.options.clone(),
                file: None,
                storage: Some(storage),
                image: Some(Arc::clone(&image)),
                data: data.and_then(|(_, data)| data.storage.clone()),
            };
            (Arc::clone(&node.device), DriverEntry::of_node(node)?, image, node.stored_bitmaps(), parts)
        };
        stored.map_or(Ok(()), |stored| stored.store_within(HOLD_LIMIT))?;
        // Past the options of the node, which may say that flushes do nothing.
        image.flush().map_err(qmp_error)?;
        let is_other =
            || QmpError::generic(format!("Node '{file}' does not hold the image of '{}'", change.node));
        // Opening repairs an image that is dirty, which is not to happen to another one.
        if let Some(storage) = &parts.storage {
            let header = Header::read(&**storage);
            let header = header.map_err(|e| qmp_error(e.in_file(&parts.filename.as_str().into())))?;
            if header != *image.header() {
                return Err(is_other());
            }
        }
        let new = (driver.reopen_on)(&parts)?;
        parts.image = None;
        if new.image.as_ref().is_none_or(|new| new.header() != image.header()) {
            return Err(is_other());
        }
        drop(image);
        let moved =
            Self { node: change.node.clone(), old: swap(context, &change.node, &device, new), device };
        match moved.wait_for_readers() {
            Ok(()) => Ok(moved),
            Err(error) => {
                moved.undo(context);
                Err(error)
            }
        }
    }

    /// Waits until the guest's reads of the first image have ended.
    fn wait_for_readers(&self) -> Reply<()> {
        // As device and as image it is held here.
        let until = Instant::now() + READERS_LIMIT;
        while Arc::strong_count(&self.old.device) > 2 {
            if Instant::now() > until {
                return Err(QmpError::generic(format!("A request to node '{}' does not end", self.node)));
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Puts the first image back. Nothing was written since.
    pub(super) fn undo(self, context: &Context) {
        drop(swap(context, &self.node, &self.device, self.old));
    }
}

/// Puts `new` in the place of the image of the node `name`, and returns that.
fn swap(context: &Context, name: &str, device: &NodeDevice, new: OpenedAgain) -> OpenedAgain {
    let mut graph = context.graph.lock();
    let old = device.replace(new.device);
    let image: Option<Arc<Qcow2>> = match graph.get_mut(name) {
        Some(node) => std::mem::replace(&mut node.qcow2, new.image),
        None => None,
    };
    OpenedAgain { device: old, image }
}
