//! Overlays on disks that jobs pivot. They read what the graph says they stand on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use blockmirror_block::testing::MemoryDisk;
use serde_json::json;

use super::*;

impl Client {
    fn write(&self, tap: &Arc<blockmirror_mirror::Tap>, block: u8, byte: u8) {
        tap.write_at(&[byte; 65536], u64::from(block) << 16, WriteFlags::NONE).unwrap();
    }

    fn tap(&self, node: &str) -> Arc<blockmirror_mirror::Tap> {
        Arc::clone(&self.daemon.services.context.graph.lock().find(node).unwrap().tap)
    }

    /// Nodes a and b, a mirror from the one to the other, and a file for an overlay.
    fn mirrored_pair(&mut self) -> Arc<blockmirror_mirror::Tap> {
        for (name, block) in [("a", 1), ("b", 2), ("ov", 9)] {
            self.image(&format!("{name}.qcow2"), block, None);
        }
        self.add("a", "a.qcow2", Value::Null);
        self.add("b", "b.qcow2", Value::Null);
        let tap = self.tap("a");
        self.run("blockdev-mirror", json!({"job-id": "j", "device": "a", "target": "b", "sync": "full"}));
        self.wait("BLOCK_JOB_READY");
        tap
    }
}

/// The graph moved the overlay to the target, but its image went on reading the source: old data, which was
/// copied into the overlay besides, and a source that could be removed while it was read.
#[test]
fn an_overlay_moves_with_the_mirror_of_its_backing_file() {
    let mut client = Client::new();
    let tap = client.mirrored_pair();
    client.add("ov", "ov.qcow2", json!("a"));
    assert_eq!(client.blocks("ov"), [1, 9]);
    client.run("job-complete", json!({"id": "j"}));
    client.wait_for_status("null");
    client.write(&tap, 1, 7);
    assert_eq!((client.backing("ov").as_deref(), client.blocks("ov")), (Some("b"), vec![7, 9]));
    assert_eq!(
        client.refused("blockdev-del", json!({"node-name": "b"})),
        "Node 'b' is busy: node is used as backing hd of 'ov'"
    );
    client.run("blockdev-del", json!({"node-name": "a"}));
    // What it copies is what it reads.
    let overlay = client.tap("ov");
    overlay.write_at(&[8; 512], 1 << 16, WriteFlags::NONE).unwrap();
    client.write(&tap, 1, 6);
    assert_eq!((client.blocks("ov"), client.blocks("b")), (vec![8, 9], vec![6]));
    let mut tail = [0; 512];
    overlay.read_at(&mut tail, (1 << 16) + 512).unwrap();
    assert_eq!(tail, [7; 512]);
}

/// A mirror that is given up leaves the overlay where it was.
#[test]
fn an_overlay_stays_if_the_mirror_does_not_pivot() {
    for end in [json!({"device": "j", "force": true}), json!({"device": "j"})] {
        let mut client = Client::new();
        let tap = client.mirrored_pair();
        client.add("ov", "ov.qcow2", json!("a"));
        client.run("block-job-cancel", end);
        client.wait_for_status("null");
        client.write(&tap, 1, 7);
        assert_eq!((client.backing("ov").as_deref(), client.blocks("ov")), (Some("a"), vec![7, 9]));
        client.run("blockdev-del", json!({"node-name": "b"}));
        // It stays on what it was made for: the disk and not its tap.
        let tap = client.tap("a");
        tap.drain().replace(Arc::new(MemoryDisk::new(SIZE))).unwrap();
        assert_eq!(client.blocks("ov"), [7, 9]);
    }
}

/// It read the image that had been committed, which is closed if it has no other user.
#[test]
fn an_overlay_moves_with_the_commit_of_its_backing_file() {
    let mut client = Client::new();
    client.chain();
    client.image("ov.qcow2", 9, None);
    let tap = client.tap("top");
    client.run("block-commit", json!({"job-id": "c", "device": "top"}));
    client.wait("BLOCK_JOB_READY");
    client.add("ov", "ov.qcow2", json!("top"));
    client.run("job-complete", json!({"id": "c"}));
    client.wait_for_status("null");
    client.write(&tap, 3, 7);
    assert_eq!(client.backing("ov").as_deref(), Some("base"));
    assert_eq!(client.blocks("ov"), [1, 2, 7, 9]);
    client.run("blockdev-del", json!({"node-name": "top"}));
    assert_eq!(client.blocks("ov"), [1, 2, 7, 9]);
}

/// Between the pivot and its event there is no moment at which the overlay lags behind.
#[test]
fn an_overlay_reads_every_write_across_the_pivot() {
    let mut client = Client::new();
    let tap = client.mirrored_pair();
    client.add("ov", "ov.qcow2", json!("a"));
    let overlay = Arc::clone(&client.daemon.services.context.graph.lock().find("ov").unwrap().device);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut byte = 0_u8;
            let mut last = false;
            loop {
                byte = byte.wrapping_add(1);
                tap.write_at(&[byte; 512], 5 << 16, WriteFlags::NONE).unwrap();
                let mut read = [0; 512];
                overlay.read_at(&mut read, 5 << 16).unwrap();
                assert_eq!(read, [byte; 512]);
                if last {
                    return;
                }
                last = over.load(Ordering::Relaxed);
            }
        });
        client.run("job-complete", json!({"id": "j"}));
        client.wait_for_status("null");
        over.store(true, Ordering::Relaxed);
        guest.join().unwrap();
    });
}

/// Whichever comes first, the overlay reads what the graph says.
#[test]
fn an_overlay_is_added_while_the_mirror_pivots() {
    for _ in 0..10 {
        let mut client = Client::new();
        let tap = client.mirrored_pair();
        client.run("job-complete", json!({"id": "j"}));
        client.add("ov", "ov.qcow2", json!("a"));
        client.wait_for_status("null");
        client.write(&tap, 1, 7);
        let (below, seen) = match client.backing("ov").as_deref() {
            Some("b") => ("b", vec![7, 9]),
            _ => ("a", vec![1, 9]),
        };
        assert_eq!(client.blocks("ov"), seen);
        client.refused("blockdev-del", json!({"node-name": below}));
        client.run("blockdev-del", json!({"node-name": if below == "a" { "b" } else { "a" }}));
    }
}

/// Reopening puts an image on a disk that is being mirrored as opening does.
#[test]
fn an_image_is_put_on_a_disk_that_is_mirrored() {
    let mut client = Client::new();
    client.image("other.qcow2", 4, None);
    client.add("other", "other.qcow2", Value::Null);
    let tap = client.mirrored_pair();
    client.add("ov", "ov.qcow2", json!("other"));
    let file = json!({"driver": "file", "filename": client.path("ov.qcow2")});
    let options = json!({"driver": "qcow2", "node-name": "ov", "file": file, "backing": "a"});
    client.run("blockdev-reopen", json!({"options": [options]}));
    client.run("job-complete", json!({"id": "j"}));
    client.wait_for_status("null");
    client.write(&tap, 1, 7);
    assert_eq!((client.backing("ov").as_deref(), client.blocks("ov")), (Some("b"), vec![7, 9]));
}

/// A filter on the source was taken as the target. After the pivot it led to the tap that led to it, and the
/// next flush went round until the stack was full.
#[test]
fn a_disk_is_not_mirrored_to_a_filter_on_itself() {
    let mut client = Client::new();
    client.image("a.qcow2", 1, None);
    client.add("a", "a.qcow2", Value::Null);
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "f", "file": "a"}));
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "g", "file": "f"}));
    for (target, words) in [
        ("f", "'f' cannot take the place of 'a': it would come to stand on itself"),
        ("g", "Need a root block node: 'a' is used by node 'f'"),
    ] {
        let mirror = json!({"job-id": "j", "device": "a", "target": target, "sync": "full"});
        let refused = client.refused("blockdev-mirror", mirror);
        assert!(refused.starts_with(words), "{refused}");
    }
}

/// The options of a filter on `file`.
fn filter(name: &str, file: &str) -> Value {
    json!({"driver": "throttle", "node-name": name, "throttle-group": "g", "file": file})
}

/// Nor does a target come to stand on its source while the mirror runs. The pivot would close the circle.
#[test]
fn a_target_is_not_put_on_a_filter_on_its_source() {
    let mut client = Client::new();
    client.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
    for (name, block) in [("a", 1), ("b", 2), ("c", 3), ("d", 4)] {
        client.image(&format!("{name}.qcow2"), block, None);
        client.add(name, &format!("{name}.qcow2"), Value::Null);
    }
    client.run("blockdev-add", filter("t", "b"));
    client.run("blockdev-mirror", json!({"job-id": "j", "device": "a", "target": "t", "sync": "full"}));
    client.run("blockdev-mirror", json!({"job-id": "k", "device": "c", "target": "d", "sync": "top"}));
    client.run("blockdev-add", filter("on-a", "a"));
    client.run("blockdev-add", filter("on-c", "c"));

    let refused = client.refused("blockdev-reopen", json!({"options": [filter("t", "on-a")]}));
    assert!(refused.starts_with("Permission conflict on node 'a'"), "{refused}");
    client.refused("blockdev-reopen", json!({"options": [filter("t", "a")]}));
    let file = json!({"driver": "file", "filename": client.path("d.qcow2")});
    let on_filter = json!({"driver": "qcow2", "node-name": "d", "file": file, "backing": "on-c"});
    let refused = client.refused("blockdev-reopen", json!({"options": [on_filter]}));
    assert_eq!(refused, "'d' cannot take the place of 'c': it would come to stand on itself");

    client.wait("BLOCK_JOB_READY");
    client.wait("BLOCK_JOB_READY");
    for (id, filter, target) in [("j", "on-a", "b"), ("k", "on-c", "d")] {
        client.run("job-complete", json!({"id": id}));
        client.wait("BLOCK_JOB_COMPLETED");
        assert_eq!(client.blocks(filter), client.blocks(target));
    }
}

/// Two mirrors would close a circle together, and neither alone.
#[test]
fn two_targets_are_not_put_on_each_others_sources() {
    let mut client = Client::new();
    client.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
    for (name, block) in [("a", 1), ("b", 2), ("c", 3), ("d", 4)] {
        client.image(&format!("{name}.qcow2"), block, None);
        client.add(name, &format!("{name}.qcow2"), Value::Null);
    }
    for (id, source, target) in [("j", "a", "b"), ("k", "c", "d")] {
        let mirror = json!({"job-id": id, "device": source, "target": target, "sync": "none"});
        client.run("blockdev-mirror", mirror);
        client.run("blockdev-add", filter(&format!("on-{source}"), source));
    }
    let on = |client: &Client, name: &str, backing: &str| {
        let file = json!({"driver": "file", "filename": client.path(&format!("{name}.qcow2"))});
        json!({"options": [{"driver": "qcow2", "node-name": name, "file": file, "backing": backing}]})
    };
    client.run("blockdev-reopen", on(&client, "b", "on-c"));
    let refused = client.refused("blockdev-reopen", on(&client, "d", "on-a"));
    assert_eq!(refused, "'b' cannot take the place of 'a': it would come to stand on itself");
}
