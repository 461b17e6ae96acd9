//! Ends beside peers that do not answer.

use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{ByteRange, Extent, Geometry, Result, Visit, ZeroFlags};
use serde_json::json;

use super::*;
use crate::graph::{DeviceOptions, NodeDevice, Released};

/// Disks whose flushes end when all of them flush, or are cancelled.
#[derive(Debug)]
struct Together {
    disk: MemoryDisk,
    all: Arc<All>,
}

#[derive(Debug, Default)]
struct All {
    /// Flushes that have begun, and cancellations.
    state: Mutex<(usize, usize)>,
    changed: Condvar,
}

impl BlockDevice for Together {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn name(&self) -> &str {
        self.disk.name()
    }

    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.disk.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.disk.write_at(buf, offset, flags)
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.disk.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.disk.discard(range)
    }

    fn flush(&self) -> Result<()> {
        let mut state = self.all.state.lock();
        state.0 += 1;
        self.all.changed.notify_all();
        while state.0 < 3 && state.1 == 0 {
            state = self.all.changed.wait(state);
        }
        Ok(())
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.disk.extents(range, visit)
    }

    fn cancel_in_flight(&self) {
        self.all.state.lock().1 += 1;
        self.all.changed.notify_all();
    }
}

/// Nodes were closed one after the other, each with the patience that a dead peer gets: six of them took 24
/// seconds.
#[test]
fn nodes_are_closed_beside_each_other() {
    let mut client = Client::new();
    let all = Arc::new(All::default());
    let mut nodes = Vec::new();
    for name in ["a", "b", "c"] {
        client.run("blockdev-add", json!({"driver": "null-co", "node-name": name, "size": SIZE}));
        let mut node = client.daemon.services.context.graph.lock().remove(name).unwrap().gone.remove(0);
        let disk = Together { disk: MemoryDisk::new(SIZE), all: Arc::clone(&all) };
        node.device = NodeDevice::new(Arc::new(disk), DeviceOptions::default());
        nodes.push(node);
    }
    client.daemon.services.context.close(Released { gone: nodes, stale: Vec::new() });
    assert_eq!(*all.state.lock(), (3, 0));
}
