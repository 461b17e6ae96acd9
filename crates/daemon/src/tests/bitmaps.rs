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

/// What an image in it writes goes past the file's tap, by whatever it was put there. A mirror of the file lost it.
#[test]
fn nothing_is_written_past_a_bitmap_or_a_mirror() {
    let mut client = Client::new();
    for name in ["f", "g", "target", "other"] {
        std::fs::write(client.path(name), vec![0; SIZE as usize]).unwrap();
        let file = json!({"driver": "file", "node-name": name, "filename": client.path(name)});
        client.run("blockdev-add", file);
    }
    let raw = |name: &str, file: &str| json!({"driver": "raw", "node-name": name, "file": file});
    client.run("blockdev-add", raw("r", "other"));
    client.add_bitmap("f", "b");
    client.run("object-add", json!({"qom-type": "throttle-group", "id": "t"}));
    client.run("blockdev-mirror", json!({"job-id": "j", "device": "g", "target": "target", "sync": "none"}));
    let busy = "it is in use by block job 'j': mirror, which would not see what 'X' writes there";
    for (file, text) in
        [("f", "A bitmap of 'f' would not see what 'X' writes there: take one of 'X'"), ("g", busy)]
    {
        let filter = format!("on-{file}");
        client.run(
            "blockdev-add",
            json!({"driver": "throttle", "node-name": filter, "throttle-group": "t", "file": file}),
        );
        let refused = client.refused("blockdev-add", raw("new", &filter));
        assert!(refused.ends_with(&text.replace('X', "new")), "{refused}");
        let refused = client.refused("blockdev-reopen", json!({"options": [raw("r", &filter)]}));
        assert!(refused.ends_with(&text.replace('X', "r")), "{refused}");
        client.run("blockdev-del", json!({"node-name": filter}));
    }
}
