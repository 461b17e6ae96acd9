//! Dirty bitmaps: where they go, and what they see.

use serde_json::json;

use super::*;

impl Client {
    /// Bitmaps of a node, each with its bytes that count as written.
    fn bitmaps(&self, node: &str) -> Vec<(String, u64)> {
        let tap = Arc::clone(&self.daemon.services.context.graph.lock().find(node).unwrap().tap);
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
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
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
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
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
    assert!(client.daemon.services.context.graph.lock().get("r").is_none());
    client.run("block-dirty-bitmap-remove", json!({"node": "f", "name": "b"}));
    client.run("blockdev-add", raw);
    assert_eq!(client.refused("block-dirty-bitmap-add", json!({"node": "f", "name": "b"})), text);
    client.add_bitmap("r", "b");
}

/// What an image in it writes goes past the file's tap, by whatever it was put there. A mirror of the file
/// lost it.
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
    let unseen = |image: &str| {
        format!("A bitmap of 'f' would not see what '{image}' writes there: take one of '{image}'")
    };
    let busy = "Node 'g' is busy: block device is in use by block job: mirror";
    let conflict = "Permission conflict on node 'g': permissions 'resize' are both required by node 'new'";
    for (file, when_added, when_reopened) in
        [("f", unseen("new"), unseen("r")), ("g", conflict.to_owned(), busy.to_owned())]
    {
        let filter = format!("on-{file}");
        client.run(
            "blockdev-add",
            json!({"driver": "throttle", "node-name": filter, "throttle-group": "t", "file": file}),
        );
        let refused = client.refused("blockdev-add", raw("new", &filter));
        assert!(refused.starts_with(&when_added), "{refused}");
        let refused = client.refused("blockdev-reopen", json!({"options": [raw("r", &filter)]}));
        assert_eq!(refused, when_reopened);
        client.run("blockdev-del", json!({"node-name": filter}));
    }
}

/// An export of the target's bitmap went on showing what that had held before the pivot, and kept it busy for
/// ever.
#[test]
fn a_target_whose_bitmap_is_in_use_is_refused() {
    let mut client = Client::new();
    client.chain();
    client.image("t.qcow2", 9, None);
    client.add("t", "t.qcow2", Value::Null);
    client.image("over.qcow2", 4, None);
    client.add("over", "over.qcow2", Value::Null);
    for node in ["over", "t"] {
        client.add_bitmap(node, "b");
        let tap = Arc::clone(&client.daemon.services.context.graph.lock().find(node).unwrap().tap);
        let used = tap.use_bitmap("b").unwrap();
        let (command, arguments) = match node {
            "t" => {
                ("blockdev-mirror", json!({"job-id": "m", "device": "over", "target": "t", "sync": "full"}))
            }
            _ => ("blockdev-snapshot", json!({"node": "top", "overlay": "over"})),
        };
        let refused = client.refused(command, arguments.clone());
        assert_eq!(refused, format!("Node '{node}' is busy: its bitmap 'b' is in use"));
        drop(used);
        client.run(command, arguments);
    }
}

/// Nor does another use of it begin while the mirror runs.
#[test]
fn a_bitmap_of_a_target_is_not_exported() {
    let mut client = Client::new();
    client.chain();
    client.image("t.qcow2", 9, None);
    client.add("t", "t.qcow2", Value::Null);
    client.add_bitmap("t", "b");
    let path = client.path("nbd");
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path}}}));
    client.run("blockdev-mirror", json!({"job-id": "m", "device": "top", "target": "t", "sync": "full"}));
    let bitmaps = json!([{"node": "t", "name": "b"}]);
    let export = json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true, "bitmaps": bitmaps});
    let refused = client.refused("block-export-add", export);
    assert_eq!(refused, "Node 't' is busy: block device is in use by block job: mirror");
}

/// The same at the end of a commit.
#[test]
fn a_base_whose_bitmap_is_in_use_is_refused() {
    let mut client = Client::new();
    client.chain();
    client.add_bitmap("base", "b");
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("base").unwrap().tap);
    let used = tap.use_bitmap("b").unwrap();
    let commit = json!({"job-id": "c", "device": "top"});
    let refused = client.refused("block-commit", commit.clone());
    assert_eq!(refused, "Node 'base' is busy: its bitmap 'b' is in use");
    // With a filter on the image that is named as the highest it is the same commit.
    client.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
    client.run(
        "blockdev-add",
        json!({"driver": "throttle", "node-name": "f", "throttle-group": "g", "file": "top"}),
    );
    let by_filter = json!({"job-id": "c", "device": "f", "top-node": "top"});
    assert_eq!(client.refused("block-commit", by_filter), refused);
    client.run("blockdev-del", json!({"node-name": "f"}));
    drop(used);
    client.run("block-commit", commit);
}

/// One that recorded joined one that did not, and recorded no more.
#[test]
fn bitmaps_that_join_record_if_one_did() {
    let mut client = Client::new();
    client.chain();
    client.image("over.qcow2", 4, None);
    client.add("over", "over.qcow2", Value::Null);
    client.add_bitmap("over", "b");
    client.run("block-dirty-bitmap-add", json!({"node": "top", "name": "b", "disabled": true}));
    client.run("blockdev-snapshot", json!({"node": "top", "overlay": "over"}));
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("over").unwrap().tap);
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.bitmaps("over"), [bits("b", 65536)]);
}

/// Those of the overlay stayed with the base when a snapshot was taken back.
#[test]
fn an_overlay_gets_its_bitmaps_back() {
    let mut client = Client::new();
    client.chain();
    client.image("over.qcow2", 4, None);
    client.add("over", "over.qcow2", Value::Null);
    // Another length, to which the bitmap belongs.
    client.run("block_resize", json!({"node-name": "over", "size": 2 * SIZE}));
    client.add_bitmap("over", "of-over");
    client.add_bitmap("top", "of-top");
    let snapshot = json!({"type": "blockdev-snapshot", "data": {"node": "top", "overlay": "over"}});
    client.refused("transaction", json!({"actions": [snapshot, {"type": "abort", "data": {}}]}));
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("over").unwrap().tap);
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(
        (client.bitmaps("over"), client.bitmaps("top")),
        (vec![bits("of-over", 65536)], vec![bits("of-top", 0)])
    );
}

/// A bitmap of a file saw nothing of an image that was made in it.
#[test]
fn an_image_that_is_made_shows_in_bitmaps() {
    let mut client = Client::new();
    std::fs::write(client.path("raw"), vec![0; SIZE as usize]).unwrap();
    let file = json!({"driver": "file", "node-name": "f", "filename": client.path("raw")});
    client.run("blockdev-add", file);
    client.add_bitmap("f", "b");
    let options = json!({"driver": "qcow2", "file": "f", "size": SIZE});
    client.run("blockdev-create", json!({"job-id": "c", "options": options}));
    client.wait_for_status("concluded");
    let [(_, dirty)] = &client.bitmaps("f")[..] else { panic!("one bitmap") };
    assert!(*dirty > 65536, "{dirty}");
}

/// It went with the users to the overlay, and its client read there what had never been written to the node.
#[test]
fn an_exported_bitmap_stays_with_its_node_at_a_snapshot() {
    let mut client = Client::new();
    client.chain();
    client.image("over.qcow2", 4, None);
    client.add("over", "over.qcow2", Value::Null);
    for name in ["b", "c"] {
        client.add_bitmap("top", name);
    }
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": client.path("nbd")}}}));
    let export = json!({
        "type": "nbd", "id": "e", "node-name": "top", "name": "e", "writable": true, "bitmaps": ["b"],
    });
    client.run("block-export-add", export);
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    let write = |block: u8| tap.write_at(&[block; 65536], u64::from(block) << 16, WriteFlags::NONE).unwrap();
    let busy = |client: &Client, node: &str| {
        let tap = Arc::clone(&client.daemon.services.context.graph.lock().find(node).unwrap().tap);
        tap.bitmaps().into_iter().filter(|bitmap| bitmap.busy).map(|bitmap| bitmap.name).collect::<Vec<_>>()
    };
    write(4);
    let snapshot = json!({"node": "top", "overlay": "over"});
    let actions = json!([
        {"type": "blockdev-snapshot", "data": snapshot},
        {"type": "abort", "data": {}},
    ]);
    client.refused("transaction", json!({"actions": actions}));
    write(5);
    assert_eq!(client.bitmaps("top"), [bits("b", 2 << 16), bits("c", 2 << 16)]);
    assert_eq!(busy(&client, "top"), ["b"]);

    client.run("blockdev-snapshot", snapshot);
    write(6);
    assert_eq!(client.bitmaps("top"), [bits("b", 2 << 16), bits("c", 2 << 16)]);
    assert_eq!((client.bitmaps("over"), busy(&client, "top")), (vec![], vec!["b".to_owned()]));
    assert_eq!(
        client.refused("block-dirty-bitmap-remove", json!({"node": "top", "name": "b"})),
        "Bitmap 'b' is currently in use by another operation and cannot be used"
    );
    client.run("block-export-del", json!({"id": "e", "mode": "hard"}));
    assert_eq!(busy(&client, "top"), Vec::<String>::new());
    client.run("block-dirty-bitmap-remove", json!({"node": "top", "name": "b"}));
}

/// The commit was refused, as the bitmap would have gone to the users' tap, and the export not.
#[test]
fn an_exported_bitmap_stays_with_its_node_at_a_commit() {
    let mut client = Client::new();
    client.chain();
    client.add_bitmap("base", "b");
    client.run("block-dirty-bitmap-add", json!({"node": "base", "name": "d", "disabled": true}));
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": client.path("nbd")}}}));
    let bitmaps = json!([{"node": "base", "name": "b"}, {"node": "base", "name": "d"}]);
    let export = json!({
        "type": "nbd", "id": "e", "node-name": "top", "name": "e", "writable": true, "bitmaps": bitmaps,
    });
    client.run("block-export-add", export);
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    let commit = json!({"job-id": "c", "device": "top"});
    // One of its name would join it.
    client.add_bitmap("top", "b");
    let refused = client.refused("block-commit", commit.clone());
    assert_eq!(refused, "Node 'base' is busy: its bitmap 'b' is in use");
    client.run("block-dirty-bitmap-remove", json!({"node": "top", "name": "b"}));
    client.run("block-commit", commit);
    client.wait("BLOCK_JOB_READY");
    client.run("job-complete", json!({"id": "c"}));
    client.wait_for_status("null");
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    // Everything may have been written by the commit.
    assert_eq!(client.bitmaps("base"), [bits("b", SIZE), bits("d", 0)]);
    let in_use = |client: &Client| {
        let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("base").unwrap().tap);
        tap.bitmaps().iter().filter(|bitmap| bitmap.busy).count()
    };
    assert_eq!(in_use(&client), 2);
    client.run("block-export-del", json!({"id": "e", "mode": "hard"}));
    assert_eq!(in_use(&client), 0);
    client.run("block-dirty-bitmap-remove", json!({"node": "base", "name": "b"}));
}
