//! Nodes that were opened for reading become writable, and read-only again: for the time of a commit into a
//! backing file, or because `blockdev-reopen` says so. Called by commands, one at a time, and by the end of
//! jobs.
//!
//! What was opened for such a node alone, its file for instance, turns with it. Readers go on meanwhile.
//!
//! What must hold: nothing is written while a reader still uses what was opened for reading, for it would not
//! see it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::BlockDevice;
use blockmirror_image_lock::Permission;
use blockmirror_qmp::QmpError;

use super::drivers::{DriverEntry, OpenNode, OpenedAgain};
use crate::Reply;
use crate::context::Context;
use crate::errors::{is_read_only, qmp_error};
use crate::graph::{Graph, HOLD_LIMIT, Perms};

/// How long requests that began before may take.
const READERS_LIMIT: Duration = Duration::from_secs(5);
/// How often it is looked whether they have ended.
const LOOK: Duration = Duration::from_millis(1);

/// Nodes that were turned, those below first. They stay as they are until they are turned back.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Reopened(Vec<String>);

impl Reopened {
    /// These and `more`, which were turned after them.
    pub(crate) fn and(&mut self, more: Self) {
        self.0.extend(more.0);
    }
}

impl Context {
    /// Makes the node `name` writable, with what was opened for it alone, if it is not.
    ///
    /// # Errors
    /// A file that cannot be written, that another user holds, or that is a node of its own and read-only.
    /// Nothing has changed then.
    pub(crate) fn make_writable(&self, name: &str) -> Reply<Reopened> {
        let mut plan = Vec::new();
        plan_reopen_rw(&self.graph.lock(), name, &mut plan)?;
        let mut reopened = Reopened::default();
        for node in plan {
            if let Err(error) = self.reopen_rw(&node) {
                self.make_read_only(reopened);
                return Err(error);
            }
            reopened.0.push(node);
        }
        Ok(reopened)
    }

    /// Makes nodes read-only that were made writable.
    pub(crate) fn make_read_only(&self, reopened: Reopened) {
        for name in reopened.0.iter().rev() {
            // What cannot be flushed now could not be later; the node reports that at each flush.
            let _ = self.reopen_ro(name);
        }
    }

    /// Makes the node `name` read-only, with what was opened for it alone.
    ///
    /// # Errors
    /// It is written to, or it cannot be flushed. Nothing has changed then.
    pub(crate) fn set_read_only(&self, name: &str) -> Reply<Reopened> {
        let mut plan = Vec::new();
        plan_reopen_ro(&self.graph.lock(), name, &mut plan)?;
        let mut done: Vec<String> = Vec::new();
        for node in plan {
            if let Err(error) = self.reopen_ro(&node) {
                self.make_writable_again(Reopened(done));
                return Err(error);
            }
            done.insert(0, node);
        }
        Ok(Reopened(done))
    }

    /// Makes nodes writable again that were made read-only a moment ago.
    pub(crate) fn make_writable_again(&self, reopened: Reopened) {
        for name in &reopened.0 {
            // They could be written before, and there was no time for another user to lock them.
            let _ = self.reopen_rw(name);
        }
    }

    fn reopen_rw(&self, name: &str) -> Reply<()> {
        let (device, driver, node) = {
            let graph = self.graph.lock();
            let node = graph.find(name)?;
            let data = graph.children(name).find(|(role, _)| *role == "data-file");
            let parts = OpenNode {
                filename: node.filename.clone(),
                options: node.options.clone(),
                file: node.file.clone(),
                storage: node.storage.clone().filter(|_| node.path.is_some()),
                image: node.qcow2.clone(),
                data: data.and_then(|(_, data)| data.storage.clone()),
            };
            (Arc::clone(&node.device), DriverEntry::of_node(node)?, parts)
        };
        let new = (driver.reopen_rw)(&node);
        let file = node.file.clone();
        // Whatever else holds the image that was opened for reading counts as one of its readers.
        drop(node);
        let result = new.and_then(|new| self.put_writable(name, &device, new));
        if let (Err(_), Some(file)) = (&result, &file) {
            // Nothing was written, so there is nothing that could fail.
            let _ = file.set_writable(false);
        }
        result
    }

    fn put_writable(
        &self,
        name: &str,
        device: &crate::graph::NodeDevice,
        new: Option<OpenedAgain>,
    ) -> Reply<()> {
        let could = new.as_ref().map_or(device.could_be_written(), |new| new.device.geometry().writable);
        if !could {
            return Err(is_read_only());
        }
        self.graph.lock().change_perm(name, true)?;
        if let Some(OpenedAgain { device: new, image }) = new {
            let old = device.replace(new);
            let old_image = match self.graph.lock().get_mut(name) {
                Some(node) => std::mem::replace(&mut node.qcow2, image),
                None => None,
            };
            let own = 1 + usize::from(old_image.is_some());
            let until = Instant::now() + READERS_LIMIT;
            while Arc::strong_count(&old) > own {
                if Instant::now() > until {
                    device.replace(old);
                    let mut graph = self.graph.lock();
                    if let Some(node) = graph.get_mut(name) {
                        node.qcow2 = old_image;
                    }
                    // They were allowed before.
                    let _ = graph.change_perm(name, false);
                    return Err(QmpError::generic(format!("A request to node '{name}' does not end")));
                }
                thread::sleep(LOOK);
            }
        }
        device.set_read_only(false);
        if let Some(node) = self.graph.lock().get_mut(name) {
            node.read_only = false;
        }
        Ok(())
    }

    fn reopen_ro(&self, name: &str) -> Reply<()> {
        let (device, file, bitmaps) = {
            let graph = self.graph.lock();
            let node = graph.find(name)?;
            (Arc::clone(&node.device), node.file.clone(), node.stored_bitmaps())
        };
        device.set_read_only(true);
        if let Some(Err(error)) = bitmaps.map(|bitmaps| bitmaps.store_within(HOLD_LIMIT)) {
            device.set_read_only(false);
            return Err(error);
        }
        let flushed = device.flush().and_then(|()| file.map_or(Ok(()), |file| file.set_writable(false)));
        if let Err(error) = flushed {
            device.set_read_only(false);
            return Err(qmp_error(error));
        }
        let mut graph = self.graph.lock();
        if let Some(node) = graph.get_mut(name) {
            node.read_only = true;
        }
        graph.change_perm(name, false)
    }
}

/// What has to become writable for `name` to be, those below first.
///
/// # Errors
/// Something below was given `read-only` by its own options, or is a node of its own.
fn plan_reopen_rw(graph: &Graph, name: &str, plan: &mut Vec<String>) -> Reply<()> {
    if !graph.find(name)?.read_only {
        return Ok(());
    }
    for (_, child) in graph.children(name).filter(|(role, child)| *role != "backing" && child.read_only) {
        let by_its_options = child.options.get("read-only").is_some_and(|value| *value == true);
        if child.owned || by_its_options {
            return Err(is_read_only());
        }
        plan_reopen_rw(graph, &child.name, plan)?;
    }
    plan.push(name.to_owned());
    Ok(())
}

/// What becomes read-only with `name`, those above first.
fn plan_reopen_ro(graph: &Graph, name: &str, plan: &mut Vec<String>) -> Reply<()> {
    let writes = |perm: Perms| perm.contains(Permission::Write) || perm.contains(Permission::Resize);
    let parent_turns = |parent: &str| plan.iter().any(|above| above == parent);
    let written =
        graph.attachments_of(name).any(|(_, u)| writes(u.perm) && !u.parent_node().is_some_and(parent_turns));
    if written {
        return Err(QmpError::generic(format!(
            "Read-only block node '{name}' cannot support read-write users"
        )));
    }
    plan.push(name.to_owned());
    let children: Vec<_> = graph
        .children(name)
        .filter(|(role, child)| *role != "backing" && !child.owned && !child.read_only)
        .map(|(_, child)| child.name.clone())
        .collect();
    children.iter().try_for_each(|child| plan_reopen_ro(graph, child, plan))
}
