//! Snapshots as the steps that a command consists of.

use std::sync::Weak;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{ByteRange, Extent, Geometry, Result, Visit, WriteFlags, ZeroFlags};
use blockmirror_image::{CreateSettings, CreateSpec, NewImage};
use blockmirror_mirror::{MirrorJob, MirrorOptions};

use super::*;
use crate::graph::{DeviceOptions, NodeDevice};

/// A context with a node `n`.
fn context() -> Arc<Context> {
    let context = Context::new(Vec::new(), Vec::new());
    let options = json!({"driver": "null-co", "size": 1 << 20, "node-name": "n"});
    context.add_node(options.as_object().unwrap()).unwrap();
    context
}

/// It was taken back in the graph although the tap could not be moved: the guest went on with a closed
/// image, or with one in a file that had no name.
#[test]
fn a_snapshot_that_cannot_be_undone_stays() {
    for naming in [Naming::Now, Naming::AtCommit] {
        let context = context();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snap.qcow2");
        let tap = Arc::clone(&context.graph.lock().find("n").unwrap().tap);
        let args = json!({"node-name": "n", "snapshot-file": path, "snapshot-node-name": "snap"});
        let args = SnapshotSyncArgs::parse(args.as_object().unwrap()).unwrap();
        let snapshot = snapshot_sync(&context, &args, naming).unwrap();
        assert_eq!(path.exists(), naming == Naming::Now);
        let target = Arc::new(MemoryDisk::new(1 << 20));
        let job = MirrorJob::attach(&tap, target, MirrorOptions::new()).unwrap();
        let error = snapshot.undo(&context).unwrap_err();
        assert_eq!(error.desc, "'snap' stays the overlay of 'n': n is being mirrored");
        drop(job);
        tap.write_at(b"here", 0, WriteFlags::NONE).unwrap();
        assert!(path.exists(), "{naming:?}");
        assert_eq!(context.graph.lock().backing_of("snap").unwrap().name, "n");
    }
}

/// Before the file of the overlay had its name, its node was not yet put on the other one in the graph. A
/// node that was opened on that one meanwhile was moved with the users, and followed what they wrote.
#[test]
fn a_node_that_is_opened_before_the_command_has_ended_stays_on_the_old_one() {
    let context = context();
    let dir = tempfile::tempdir().unwrap();
    let add = |name: &str, backing: Value| {
        let path = dir.path().join(name);
        let spec = CreateSpec::new(Format::Qcow2, 1 << 20, CreateSettings::default());
        NewImage::create(&path, &spec).unwrap().persist().unwrap();
        let file = json!({"driver": "file", "filename": path});
        let image = json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing});
        context.add_node(image.as_object().unwrap()).unwrap();
    };
    add("ov", Value::Null);
    let (_snapshot, held) = put_overlay(&context, "n", "ov", false).unwrap();
    add("x", json!("n"));
    drop(held);
    let graph = context.graph.lock();
    assert_eq!(graph.backing_of("x").unwrap().name, "n");
    assert_eq!(graph.backing_of("ov").unwrap().name, "n");
}

/// A disk that counts how often its length is asked for, and how often while the graph is not locked.
#[derive(Debug)]
struct Asked {
    disk: MemoryDisk,
    context: Weak<Context>,
    times: AtomicUsize,
    unlocked: AtomicUsize,
}

impl BlockDevice for Asked {
    fn len(&self) -> u64 {
        self.times.fetch_add(1, Ordering::SeqCst);
        let unlocked = self.context.upgrade().is_some_and(|context| context.graph.try_lock().is_some());
        self.unlocked.fetch_add(usize::from(unlocked), Ordering::SeqCst);
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
        self.disk.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.disk.extents(range, visit)
    }
}

/// Between the two a node that is opened on the old one would be moved with the users. A tap asks the disk
/// that is put below it for its length.
#[test]
fn a_tap_changes_under_the_lock_of_the_graph() {
    let context = context();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ov");
    let spec = CreateSpec::new(Format::Qcow2, 1 << 20, CreateSettings::default());
    NewImage::create(&path, &spec).unwrap().persist().unwrap();
    let file = json!({"driver": "file", "filename": path});
    let image = json!({"driver": "qcow2", "node-name": "ov", "file": file, "backing": null});
    context.add_node(image.as_object().unwrap()).unwrap();
    let asked = Arc::new(Asked {
        disk: MemoryDisk::new(1 << 20),
        context: Arc::downgrade(&context),
        times: AtomicUsize::new(0),
        unlocked: AtomicUsize::new(0),
    });
    {
        let mut graph = context.graph.lock();
        let device = NodeDevice::new(Arc::clone(&asked) as _, DeviceOptions::default());
        graph.get_mut("ov").unwrap().device = device;
    }
    let held = put_overlay(&context, "n", "ov", false).unwrap();
    assert!(asked.times.load(Ordering::SeqCst) > 0);
    assert_eq!(asked.unlocked.load(Ordering::SeqCst), 0);
    drop(held);
}
