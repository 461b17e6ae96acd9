//! Dirty bitmaps: where they go, and what they see.

use serde_json::json;

use super::*;

impl Client {
    /// Bitmaps of a node, each with its bytes that count as written.
    fn bitmaps(&self, node: &str) -> Vec<(String, u64)> {
        let tap = Arc::clone(&self.daemon.graph.lock().find(node).unwrap().tap);
        tap.bitmaps().into_iter().map(|info| (info.name, info.dirty_bytes)).collect()
    }

    fn add_bitmap(&mut self, node: &str, name: &str) {
        self.run("block-dirty-bitmap-add", json!({"node": node, "name": name}));
    }
}

fn bits(name: &str, bytes: u64) -> (String, u64) {
    (name.to_owned(), bytes)
}

/// Those of the target were lost with its tap, and had seen nothing of what the job wrote.
#[test]
fn bitmaps_of_a_target_outlive_the_pivot() {
    let mut client = Client::new();
    client.chain();
    client.image("t.qcow2", 9, None);
    client.add("t", "t.qcow2", Value::Null);
    for (node, name) in [("top", "of-top"), ("top", "both"), ("t", "of-t"), ("t", "both")] {
        client.add_bitmap(node, name);
    }
    let tap = Arc::clone(&client.daemon.graph.lock().find("top").unwrap().tap);
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    client.run("blockdev-mirror", json!({"job-id": "m", "device": "top", "target": "t", "sync": "full"}));
    assert_eq!(client.bitmaps("t"), [bits("both", SIZE), bits("of-t", SIZE)]);
    client.wait("BLOCK_JOB_READY");
    client.run("job-complete", json!({"id": "m"}));
    client.wait_for_status("null");
    assert_eq!(client.bitmaps("t"), [bits("both", SIZE), bits("of-t", SIZE), bits("of-top", 65536)]);
    assert_eq!(client.bitmaps("top"), []);
}

/// Those of the overlay were lost with its tap.
#[test]
fn bitmaps_of_an_overlay_outlive_the_snapshot() {
    let mut client = Client::new();
    client.chain();
    client.image("over.qcow2", 4, None);
    client.add("over", "over.qcow2", Value::Null);
    client.add_bitmap("over", "o");
    let tap = Arc::clone(&client.daemon.graph.lock().find("top").unwrap().tap);
    client.run("blockdev-snapshot", json!({"node": "top", "overlay": "over"}));
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.bitmaps("over"), [bits("o", 65536)]);
}

/// A commit wrote to the base, and a bitmap there did not know.
#[test]
fn a_commit_shows_in_bitmaps_of_its_base() {
    for top in ["top", "mid"] {
        let mut client = Client::new();
        client.chain();
        client.add_bitmap("base", "b");
        client.run("block-commit", json!({"job-id": "c", "device": "top", "top-node": top}));
        if top == "top" {
            client.wait("BLOCK_JOB_READY");
            client.run("job-complete", json!({"id": "c"}));
        }
        client.wait_for_status("null");
        assert_eq!(client.bitmaps("base"), [bits("b", SIZE)], "{top}");
    }
}

/// A bitmap of a file was there, recorded, and saw nothing of what was written to the image in it.
#[test]
fn a_file_under_a_format_has_no_bitmaps() {
    let mut client = Client::new();
    std::fs::write(client.path("raw"), vec![0; SIZE as usize]).unwrap();
    let file = json!({"driver": "file", "node-name": "f", "filename": client.path("raw")});
    client.run("blockdev-add", file);
    client.add_bitmap("f", "b");
    let raw = json!({"driver": "raw", "node-name": "r", "file": "f"});
    let text = "A bitmap of 'f' would not see what 'r' writes there: take one of 'r'";
    assert_eq!(client.refused("blockdev-add", raw.clone()), text);
    assert!(client.daemon.graph.lock().get("r").is_none());
    client.run("block-dirty-bitmap-remove", json!({"node": "f", "name": "b"}));
    client.run("blockdev-add", raw);
    assert_eq!(client.refused("block-dirty-bitmap-add", json!({"node": "f", "name": "b"})), text);
    client.add_bitmap("r", "b");
}
