//! A snapshot onto the target of a mirror that runs, as libvirt does for a shallow copy.

use super::*;

fn snapshot(node: &str, overlay: &str) -> Value {
    json!({"node": node, "overlay": overlay})
}

impl Client {
    /// `top` is mirrored to `copy`, which has no backing file yet; `under` has no user. The mirror `m` is
    /// ready.
    fn with_shallow_copy() -> Self {
        let mut client = Self::new();
        client.chain();
        for (name, block) in [("copy", 3), ("under", 2)] {
            let file = format!("{name}.qcow2");
            client.image(&file, block, None);
            client.add(name, &file, Value::Null);
        }
        client
            .run("blockdev-mirror", json!({"job-id": "m", "device": "top", "target": "copy", "sync": "top"}));
        client.wait("BLOCK_JOB_READY");
        assert_eq!(client.blocks("copy"), [3]);
        client
    }

    fn ends_well(&mut self) {
        self.run("job-complete", json!({"id": "m"}));
        assert!(self.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    }
}

#[test]
fn a_target_gets_a_backing_file_while_it_is_filled() {
    let mut client = Client::with_shallow_copy();
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    client.run("blockdev-snapshot", snapshot("under", "copy"));
    assert_eq!((client.backing("copy").as_deref(), client.blocks("copy")), (Some("under"), vec![2, 3]));
    let again = client.refused("blockdev-snapshot", snapshot("under", "copy"));
    assert!(again.contains("backing"), "{again}");
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    client.ends_well();
    tap.write_at(&[6; 65536], 6 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.blocks("copy"), [2, 3, 5, 6]);
    // It is protected as a backing file is.
    let text = client.refused("blockdev-del", json!({"node-name": "under"}));
    assert!(text.contains("copy"), "{text}");
}

#[test]
fn a_backing_file_that_is_taken_back_is_gone() {
    let mut client = Client::with_shallow_copy();
    let snapshot = json!({"type": "blockdev-snapshot", "data": snapshot("under", "copy")});
    client.refused("transaction", json!({"actions": [snapshot, {"type": "abort", "data": {}}]}));
    assert_eq!((client.backing("copy"), client.blocks("copy")), (None, vec![3]));
    client.run("blockdev-del", json!({"node-name": "under"}));
    client.ends_well();
    assert_eq!(client.blocks("copy"), [3]);
}

/// Its users would not see what the mirror writes.
#[test]
fn a_node_with_users_does_not_come_below_a_target() {
    let mut client = Client::with_shallow_copy();
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": client.path("nbd")}}}));
    client.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "under"}));
    let text = client.refused("blockdev-snapshot", snapshot("under", "copy"));
    assert!(text.starts_with("Node 'under' is busy: it is in use by"), "{text}");
    assert_eq!(client.backing("copy"), None);
}

/// What it reads would change under it.
#[test]
fn a_source_of_a_mirror_gets_no_backing_file() {
    let mut client = Client::with_shallow_copy();
    client.ends_well();
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "null", "size": SIZE}));
    client.run("blockdev-mirror", json!({"job-id": "m", "device": "copy", "target": "null", "sync": "full"}));
    client.wait("BLOCK_JOB_READY");
    let text = client.refused("blockdev-snapshot", snapshot("under", "copy"));
    assert_eq!(text, "The overlay is already in use");
    assert_eq!(client.backing("copy"), None);
}
