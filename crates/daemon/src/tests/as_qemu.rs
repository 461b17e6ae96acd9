//! Small things that scripts for QEMU rely on: names, orders, texts.

use super::*;

impl Client {
    fn names(&mut self, command: &str, key: &str) -> Vec<String> {
        let list = self.run(command, json!({}));
        list.as_array().unwrap().iter().map(|item| item[key].as_str().unwrap().to_owned()).collect()
    }

    fn bitmap_names(&mut self, node: &str) -> Vec<String> {
        let nodes = self.run("query-named-block-nodes", json!({}));
        let node = nodes.as_array().unwrap().iter().find(|found| found["node-name"] == node).unwrap().clone();
        let bitmaps = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        bitmaps.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn lists_begin_with_the_newest() {
    let mut client = Client::new();
    for id in ["b", "c", "a"] {
        for role in ["s", "t"] {
            let name = format!("{role}{id}");
            client.run("blockdev-add", json!({"driver": "null-co", "node-name": name, "size": SIZE}));
        }
        let arguments =
            json!({"job-id": id, "device": format!("s{id}"), "target": format!("t{id}"), "sync": "full"});
        client.run("blockdev-mirror", arguments);
        client.run("block-dirty-bitmap-add", json!({"node": "sb", "name": id}));
    }
    assert_eq!(client.names("query-jobs", "id"), ["a", "c", "b"]);
    assert_eq!(client.names("query-named-block-nodes", "node-name"), ["ta", "sa", "tc", "sc", "tb", "sb"]);
    assert_eq!(client.names("query-block-jobs", "device"), ["a", "c", "b"]);
    assert_eq!(client.bitmap_names("sb"), ["a", "c", "b"]);
}

/// It went with the users to the overlay.
#[test]
fn a_bitmap_stays_with_its_node_at_a_snapshot() {
    let mut client = Client::new();
    client.chain();
    client.image("over.qcow2", 4, None);
    client.add("over", "over.qcow2", Value::Null);
    client.run("block-dirty-bitmap-add", json!({"node": "top", "name": "both"}));
    client.run("block-dirty-bitmap-add", json!({"node": "top", "name": "old"}));
    client.run("block-dirty-bitmap-add", json!({"node": "over", "name": "both"}));
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    tap.write_at(&[5; 65536], 0, WriteFlags::NONE).unwrap();
    let snapshot = json!({"type": "blockdev-snapshot", "data": {"node": "top", "overlay": "over"}});
    let dirty = |client: &Client, node: &str, bitmap: &str| {
        let tap = Arc::clone(&client.daemon.services.context.graph.lock().find(node).unwrap().tap);
        tap.bitmap(bitmap).unwrap().dirty_bytes()
    };
    // Taken back, all is as before.
    client.refused("transaction", json!({"actions": [snapshot, {"type": "abort", "data": {}}]}));
    assert_eq!(client.bitmap_names("top"), ["old", "both"]);
    assert_eq!(client.bitmap_names("over"), ["both"]);
    client.run("transaction", json!({"actions": [snapshot]}));
    // What is written now is written to the overlay.
    tap.write_at(&[6; 65536], 1 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.bitmap_names("top"), ["old", "both"]);
    assert_eq!(client.bitmap_names("over"), ["both"]);
    assert_eq!(["old", "both"].map(|name| dirty(&client, "top", name)), [65536, 65536]);
    assert_eq!(dirty(&client, "over", "both"), 65536);
}

/// Only absolute names, and those that nodes were opened by, were known.
#[test]
fn images_of_a_chain_are_named_as_in_the_header() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("mid.qcow2", 2, Some("base.qcow2"));
    client.image("top.qcow2", 3, Some("mid.qcow2"));
    let file = json!({"driver": "file", "filename": client.path("top.qcow2")});
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
    let commit = |top: &str, base: &str| json!({"job-id": "c", "device": "top", "top": top, "base": base});
    assert_eq!(
        client.refused("block-commit", commit("mid.qcow2", "no.qcow2")),
        "Can't find 'no.qcow2' in the backing chain"
    );
    client.run("block-commit", commit("mid.qcow2", "base.qcow2"));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    client.run("block-stream", json!({"job-id": "s", "device": "top", "base": "base.qcow2"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert_eq!(client.blocks("top"), [1, 2, 3]);
}

/// By the header where the node below was opened by another name, and by what a name leads to where the
/// header has another one.
#[test]
fn a_name_is_that_in_the_header_or_leads_to_the_image() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("other.qcow2", 2, None);
    client.image("mid.qcow2", 2, client.path("base.qcow2").to_str());
    client.image("top.qcow2", 3, Some("other.qcow2"));
    client.add("base", "base.qcow2", Value::Null);
    client.add("mid", "mid.qcow2", json!("base"));
    client.add("top", "top.qcow2", json!("mid"));
    client.run(
        "block-commit",
        json!({"job-id": "c", "device": "top", "top": "other.qcow2", "base": "base.qcow2"}),
    );
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert_eq!((client.backing("top").as_deref(), client.blocks("base")), (Some("base"), vec![1, 2]));
}

/// What lies below filters is replaced, and the filters stay.
#[test]
fn a_mirror_replaces_what_lies_below_a_filter() {
    let mut client = Client::new();
    client.image("s.qcow2", 1, None);
    client.image("t.qcow2", 9, None);
    client.image("d.qcow2", 9, None);
    client.add("s", "s.qcow2", Value::Null);
    client.add("t", "t.qcow2", Value::Null);
    client.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
    client.run(
        "blockdev-add",
        json!({"driver": "throttle", "node-name": "f", "throttle-group": "g", "file": "s"}),
    );
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("f").unwrap().tap);
    let mirror = |replaces: &str| json!({"job-id": "m", "device": "f", "target": "t", "sync": "full", "replaces": replaces});
    assert_eq!(client.refused("blockdev-mirror", mirror("no")), "Failed to find node with node-name='no'");
    assert!(
        client
            .refused("blockdev-mirror", mirror("t"))
            .starts_with("Cannot replace 't' by a node mirrored from 'f'")
    );
    // What else stands on it would go over, too.
    client.image("over.qcow2", 8, None);
    client.add("over", "over.qcow2", json!("s"));
    let text = client.refused("blockdev-mirror", mirror("s"));
    assert!(text.starts_with("Need a root block node: 's' is used by node 'over'"), "{text}");
    client.run("blockdev-del", json!({"node-name": "over"}));
    client.run("blockdev-mirror", mirror("s"));
    client.wait("BLOCK_JOB_READY");
    tap.write_at(&[2; 65536], 2 << 16, WriteFlags::NONE).unwrap();
    client.run("job-complete", json!({"id": "m"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    tap.write_at(&[3; 65536], 3 << 16, WriteFlags::NONE).unwrap();
    assert_eq!((client.blocks("f"), client.blocks("s")), (vec![1, 2, 3], vec![1, 2]));
    client.run("blockdev-del", json!({"node-name": "s"}));

    // A drive has a name then.
    let path = client.path("d.qcow2");
    let mut drive = json!({"job-id": "d", "device": "f", "target": path, "mode": "existing", "sync": "full", "replaces": "t"});
    let text = client.refused("drive-mirror", drive.clone());
    assert_eq!(text, "a node-name must be provided when replacing a named node of the graph");
    drive["node-name"] = json!("drive");
    client.run("drive-mirror", drive);
    client.wait("BLOCK_JOB_READY");
    client.run("job-complete", json!({"id": "d"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    client.run("blockdev-del", json!({"node-name": "t"}));
    assert_eq!(client.blocks("drive"), [1, 2, 3]);
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.blocks("drive"), [1, 2, 3, 4]);
}

#[test]
fn jobs_fail_in_the_words_that_scripts_know() {
    let mut client = Client::new();
    for (errno, text) in [(5, "Input/output error"), (28, "No space left on device")] {
        client.image("s.qcow2", 1, None);
        client.add("s", "s.qcow2", Value::Null);
        let rule = json!({"event": "write_aio", "errno": errno});
        let image = json!({"driver": "null-co", "size": SIZE});
        let target = json!({"driver": "blkdebug", "node-name": "t", "image": image, "inject-error": [rule]});
        client.run("blockdev-add", target);
        client.run("blockdev-mirror", json!({"job-id": "j", "device": "s", "target": "t", "sync": "full"}));
        let failed = client.wait("BLOCK_JOB_ERROR");
        assert!(failed["message"].as_str().unwrap().len() > text.len(), "{failed}");
        assert_eq!(client.wait("BLOCK_JOB_COMPLETED")["error"], text);
        for node in ["s", "t"] {
            client.run("blockdev-del", json!({"node-name": node}));
        }
        std::fs::remove_file(client.path("s.qcow2")).unwrap();
    }
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "a", "size": SIZE}));
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "b", "size": 512}));
    client.run("blockdev-mirror", json!({"job-id": "j", "device": "a", "target": "b", "sync": "full"}));
    assert_eq!(client.wait("BLOCK_JOB_COMPLETED")["error"], "Source and target image have different sizes");
    client.image("held.qcow2", 1, None);
    client.add("held", "held.qcow2", Value::Null);
    let file = json!({"driver": "file", "node-name": "again", "filename": client.path("held.qcow2")});
    let text = client.refused("blockdev-add", file);
    let asked = format!("Is another process using the image [{}]?", client.path("held.qcow2").display());
    assert!(text.starts_with("Failed to get \"write\" lock") && text.ends_with(&asked), "{text}");
}

/// What a blkdebug node takes and does not share counts for all others, and not for its own users.
#[test]
fn permissions_of_a_blkdebug_node_take_effect() {
    let mut client = Client::new();
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": client.path("nbd")}}}));
    let export = |id: &str, node: &str| json!({"type": "nbd", "id": id, "node-name": node, "writable": true});
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": SIZE}));
    let debug = |more: Value| {
        let mut debug = json!({"driver": "blkdebug", "node-name": "d", "image": "n"});
        for (key, value) in more.as_object().unwrap() {
            debug[key] = value.clone();
        }
        debug
    };
    client.run("blockdev-add", debug(json!({"unshare-child-perms": ["write"]})));
    let text = client.refused("block-export-add", export("e", "n"));
    assert!(
        text.starts_with("Permission conflict on node 'n': permissions 'write' are both required by"),
        "{text}"
    );
    client.run("block-export-add", export("e", "d"));
    client.run("block-export-del", json!({"id": "e"}));
    client.run("blockdev-del", json!({"node-name": "d"}));
    // The other way about: there is a writer already.
    client.run("block-export-add", export("e", "n"));
    let text = client.refused("blockdev-add", debug(json!({"unshare-child-perms": ["write"]})));
    assert!(text.starts_with("Permission conflict on node 'n'"), "{text}");
    client.run("block-export-del", json!({"id": "e"}));
    client.run("blockdev-add", debug(json!({"take-child-perms": ["resize", "write"]})));
    // What it takes counts although it has no user that writes.
    let other =
        json!({"driver": "blkdebug", "node-name": "o", "image": "n", "unshare-child-perms": ["write"]});
    let text = client.refused("blockdev-add", other.clone());
    assert!(text.starts_with("Permission conflict on node 'n'"), "{text}");
    client.run("blockdev-del", json!({"node-name": "d"}));
    client.run("blockdev-add", other);
    client.run("blockdev-del", json!({"node-name": "o"}));
    client.run("blockdev-del", json!({"node-name": "n"}));
}

/// A filter inside of a chain ended it.
#[test]
fn chains_are_streamed_and_committed_over_filters() {
    let filtered = || {
        let mut client = Client::new();
        client.image("base.qcow2", 1, None);
        client.image("mid.qcow2", 2, None);
        client.image("top.qcow2", 3, None);
        client.add("base", "base.qcow2", Value::Null);
        client.add("mid", "mid.qcow2", json!("base"));
        client.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
        let filter = json!({"driver": "throttle", "node-name": "f", "throttle-group": "g", "file": "mid"});
        client.run("blockdev-add", filter);
        client.add("top", "top.qcow2", json!("f"));
        client
    };
    let mut client = filtered();
    client.run("block-stream", json!({"job-id": "s", "device": "top", "base-node": "base"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert_eq!((client.backing("top").as_deref(), client.blocks("top")), (Some("base"), vec![1, 2, 3]));
    client.run("blockdev-del", json!({"node-name": "f"}));

    let mut client = filtered();
    client.run("block-stream", json!({"job-id": "s", "device": "top"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert_eq!((client.backing("top"), client.blocks("top")), (None, vec![1, 2, 3]));

    let mut client = filtered();
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    client.run("block-commit", json!({"job-id": "c", "device": "top", "base-node": "base"}));
    assert_eq!(client.wait("BLOCK_JOB_READY")["len"], 2 * 65536);
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    client.run("job-complete", json!({"id": "c"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.blocks("base"), [1, 2, 3, 4, 5]);
}
