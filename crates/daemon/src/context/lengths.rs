//! Lengths of nodes, which follow those of what they stand on. Called where something below a node has
//! changed.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::BlockDevice;
use blockmirror_mirror::Tap;
use blockmirror_raw::{Raw, RawOptions};

use super::Context;
use crate::graph::{HOLD_LIMIT, NodeDevice};

impl Context {
    /// Brings lengths up to date that may have changed while nodes were used. Asks files, so not to be called
    /// under a lock. Waits for no guest: where a write that was given up is still under way, the length
    /// stays.
    pub(super) fn refresh(&self, stale: Vec<String>) {
        for name in stale {
            let (tap, device, storage) = {
                let graph = self.graph.lock();
                let node = graph.get(&name).filter(|node| node.tap.writes_under_way() == 0);
                let Some(node) = node else { continue };
                let storage = node.file.as_ref().and(node.storage.clone());
                (Arc::clone(&node.tap), Arc::clone(&node.device), storage)
            };
            if let Some(storage) = storage
                && storage.len().is_ok_and(|len| len != device.len())
                && let Ok(disk) = Raw::open(storage, RawOptions::new())
            {
                device.replace(Arc::new(disk));
            }
            self.refresh_tap(&name, &tap, &device, Duration::ZERO);
        }
    }

    /// Gives `tap` the length of `device`, which are those of the node `name`, once no guest writes; after
    /// `limit` it keeps its own.
    pub(crate) fn refresh_tap(&self, name: &str, tap: &Arc<Tap>, device: &Arc<NodeDevice>, limit: Duration) {
        if tap.len() == device.len() {
            return;
        }
        let Some(mut drained) = tap.drain_for(limit) else { return };
        let device: Arc<dyn BlockDevice> = Arc::clone(device) as _;
        let graph = self.graph.lock();
        // A snapshot or a job may have put it before another node meanwhile.
        let is_its_own = graph.get(name).is_some_and(|node| Arc::ptr_eq(&node.tap, tap));
        if is_its_own && Arc::ptr_eq(drained.device(), &device) {
            // With a job or a bitmap in use it keeps its length.
            let _ = drained.replace(device);
        }
    }

    /// Brings the length of `name` up to date, below which something has changed, and that of the filters on
    /// it.
    pub(crate) fn refresh_from(&self, name: &str) {
        let nodes: Vec<_> = {
            let graph = self.graph.lock();
            let names = std::iter::once(name.to_owned()).chain(graph.filters_on(name));
            let node = |name: String| {
                let node = graph.get(&name)?;
                Some((Arc::clone(&node.tap), Arc::clone(&node.device), name))
            };
            names.filter_map(node).collect()
        };
        for (tap, device, name) in nodes {
            self.refresh_tap(&name, &tap, &device, HOLD_LIMIT);
        }
    }
}
