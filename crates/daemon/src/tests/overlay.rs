//! Overlays: `blockdev-snapshot`, `blockdev-snapshot-sync`, and targets of `drive-mirror` that stand on other
//! images.

use serde_json::json;

use super::*;

#[test]
fn users_move_to_an_overlay_that_is_there() {
    let mut client = Client::new();
    client.chain();
    client.image("over.qcow2", 4, None);
    client.add("over", "over.qcow2", Value::Null);
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    let snapshot = |node, overlay| json!({"node": node, "overlay": overlay});
    for (node, overlay, text) in [
        ("zz", "over", "Cannot find device='zz' nor node-name='zz'"),
        ("top", "zz", "Cannot find device='zz' nor node-name='zz'"),
        ("over", "mid", "The overlay is already in use"),
        ("over", "top", "The overlay already has a backing image"),
    ] {
        assert_eq!(client.refused("blockdev-snapshot", snapshot(node, overlay)), text);
    }
    client.run("blockdev-snapshot", snapshot("top", "over"));
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!((client.blocks("top"), client.blocks("over")), (vec![1, 2, 3], vec![1, 2, 3, 4, 5]));
    assert_eq!(client.backing("over").as_deref(), Some("top"));
}

/// Whatever it fails at, the node is written as before, and the file of the overlay is free.
#[test]
fn a_snapshot_that_fails_leaves_nothing_behind() {
    let mut client = Client::new();
    client.chain();
    client.image("other.qcow2", 9, None);
    std::fs::write(client.path("raw"), vec![0; SIZE as usize]).unwrap();
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    let snapshot = |file: PathBuf| json!({"node-name": "top", "snapshot-file": file, "snapshot-node-name": "snap", "mode": "existing"});
    client.refused("blockdev-snapshot-sync", snapshot(client.path("raw")));
    client.refused("blockdev-snapshot-sync", snapshot(client.path("none")));
    client.refused("blockdev-snapshot-sync", snapshot(client.path("top.qcow2")));
    // It fails after the overlay has been opened: the transaction holds the node already.
    let actions = json!([
        {"type": "blockdev-snapshot-sync", "data": snapshot(client.path("other.qcow2"))},
        {"type": "block-dirty-bitmap-clear", "data": {"node": "top", "name": "none"}},
    ]);
    client.refused("transaction", json!({"actions": actions}));
    assert!(client.daemon.services.context.graph.lock().get("snap").is_none());
    for file in ["other.qcow2", "raw"] {
        blockmirror_file::FileOptions::new().writable(true).open(client.path(file)).unwrap();
    }
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.blocks("top"), [1, 2, 3, 5]);
}

impl Client {
    /// Changes the name of the backing file, and its format, in the header of the image `name`.
    fn name_backing(&self, name: &str, backing: Option<(&[u8], &str)>) {
        let file = blockmirror_file::FileOptions::new().writable(true).open(self.path(name)).unwrap();
        let image = blockmirror_qcow2::OpenOptions::new().writable(true).open(Arc::new(file)).unwrap();
        image.set_backing_file(backing.map(|(name, _)| name), backing.map(|(_, format)| format)).unwrap();
        image.flush().unwrap();
    }
}

fn mirror(client: &mut Client, more: Value) {
    let mut args = json!({"job-id": "m", "device": "top", "sync": "full"});
    args.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    client.run("drive-mirror", args);
    client.wait("BLOCK_JOB_READY");
}

#[test]
fn a_drive_moves_to_a_target_that_is_there() {
    let mut client = Client::new();
    client.chain();
    // What it held goes.
    client.image("t.qcow2", 9, None);
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": client.path("nbd")}}}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "e", "writable": true});
    client.run("block-export-add", export);
    let path = client.path("t.qcow2");
    mirror(&mut client, json!({"target": path, "mode": "existing", "node-name": "t"}));
    assert_eq!(
        client.refused("blockdev-del", json!({"node-name": "t"})),
        "Node t is in use by block job 'm': mirror"
    );
    client.run("block-job-complete", json!({"device": "m"}));
    client.wait_for_status("null");
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    assert_eq!((client.blocks("t"), client.blocks("top")), (vec![1, 2, 3, 4], vec![1, 2, 3]));
    assert_eq!(client.run("query-block-exports", json!({}))[0]["node-name"], "t");
    // The target goes with its last user, and its file is free.
    client.run("block-export-del", json!({"id": "e"}));
    assert!(client.daemon.services.context.graph.lock().get("t").is_none());
    client.add("again", "t.qcow2", Value::Null);
    assert_eq!(client.blocks("again"), [1, 2, 3, 4]);
}

/// A target that is there was put on the source's backing file, or on the source, whatever its own header
/// said.
#[test]
fn a_target_that_is_there_stands_on_what_its_header_names() {
    let shown = vec![1, 2, 3];
    for (sync, named, node, blocks) in [
        ("top", None, None, vec![3]),
        ("top", Some("mid.qcow2"), Some("mid"), shown.clone()),
        ("top", Some("./link.qcow2"), Some("mid"), shown.clone()),
        ("full", Some("base.qcow2"), Some("base"), shown.clone()),
        ("full", Some("other.qcow2"), None, shown.clone()),
        ("full", None, None, shown.clone()),
        ("none", Some("top.qcow2"), Some("top"), shown),
        ("none", None, None, vec![3]),
    ] {
        let case = format!("sync {sync}, {named:?}");
        let mut client = Client::new();
        client.chain();
        client.image("other.qcow2", 5, None);
        std::os::unix::fs::symlink("mid.qcow2", client.path("link.qcow2")).unwrap();
        client.image("t.qcow2", 3, None);
        let backing = named.map(|name| (name.as_bytes(), "qcow2"));
        client.name_backing("t.qcow2", backing);
        client
            .run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": client.path("nbd")}}}));
        let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "e"});
        client.run("block-export-add", export);
        let path = client.path("t.qcow2");
        mirror(&mut client, json!({"target": path, "sync": sync, "mode": "existing", "node-name": "t"}));
        client.run("block-job-complete", json!({"device": "m"}));
        assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none(), "{case}");
        let below = client.backing("t");
        match (named, node) {
            (Some(named), None) => {
                let graph = client.daemon.services.context.graph.lock();
                let below = graph.find(below.as_deref().unwrap()).unwrap();
                assert_eq!(below.path.as_deref(), Some(&*client.path(named)), "{case}");
            }
            _ => assert_eq!(below.as_deref(), node, "{case}"),
        }
        assert_eq!(client.blocks("t"), blocks, "{case}");
    }
}

/// Names in the header of a target are judged as those of any image.
#[test]
fn a_target_that_names_what_may_not_be_opened_is_refused() {
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::write(elsewhere.path().join("secret"), vec![7; SIZE as usize]).unwrap();
    let outside = elsewhere.path().join("secret").display().to_string();
    let mut client = Client::new();
    client.chain();
    for (name, format, text) in [
        (&*outside, "raw", "outside the directories that images may refer to"),
        ("none.qcow2", "qcow2", "No such file"),
        ("json:{}", "raw", "which is not a plain path"),
        // It is open for writing as something else.
        ("mid.qcow2", "raw", "Is another process using the image"),
        ("mid.qcow2", "vmdk", "vmdk"),
        ("t.qcow2", "qcow2", "Is another process using the image"),
    ] {
        client.image("t.qcow2", 3, None);
        client.name_backing("t.qcow2", Some((name.as_bytes(), format)));
        let before = std::fs::read(client.path("t.qcow2")).unwrap();
        let path = client.path("t.qcow2");
        let args = json!({
            "job-id": "m", "device": "top", "sync": "top", "target": path, "mode": "existing", "node-name": "t",
        });
        let said = client.refused("drive-mirror", args);
        assert!(said.contains(text), "{name} {format}: {said}");
        assert!(client.daemon.services.context.graph.lock().get("t").is_none());
        blockmirror_file::FileOptions::new().writable(true).open(client.path("t.qcow2")).unwrap();
        assert!(std::fs::read(client.path("t.qcow2")).unwrap() == before, "{name} {format}: written");
    }
}

/// A target with what is written from now on stands on the source: after the pivot too, or nothing of it
/// could be read.
#[test]
fn a_drive_moves_to_a_target_on_itself() {
    let mut client = Client::new();
    client.chain();
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": client.path("nbd")}}}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "e", "writable": true});
    client.run("block-export-add", export);
    let path = client.path("t.qcow2");
    mirror(&mut client, json!({"target": path, "sync": "none", "node-name": "t"}));
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    client.run("block-job-complete", json!({"device": "m"}));
    client.wait_for_status("null");
    assert_eq!(client.backing("t").as_deref(), Some("top"));
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!((client.blocks("t"), client.blocks("top")), (vec![1, 2, 3, 4, 5], vec![1, 2, 3, 4]));
    assert_eq!(
        client.refused("blockdev-del", json!({"node-name": "top"})),
        "Node 'top' is busy: node is used as backing hd of 't'"
    );
}

#[test]
fn a_drive_is_mirrored_to_an_export_of_another_daemon() {
    let mut there = Client::new();
    there.image("t.qcow2", 9, None);
    there.add("t", "t.qcow2", Value::Null);
    let socket = there.path("nbd");
    there.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "t", "name": "e", "writable": true});
    there.run("block-export-add", export);

    let mut client = Client::new();
    client.chain();
    let uri = format!("nbd+unix:///e?socket={}", socket.display());
    let args = json!({"job-id": "m", "device": "top", "target": uri, "sync": "full"});
    assert_eq!(client.refused("drive-mirror", args), "An export cannot be made: give 'mode' existing");
    mirror(&mut client, json!({"target": uri, "mode": "existing", "format": "raw"}));
    client.run("block-job-cancel", json!({"device": "m"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert_eq!(there.blocks("t"), [1, 2, 3]);
}

/// Refusals say who is in the way.
#[test]
fn a_disk_that_is_mirrored_is_busy() {
    let mut client = Client::new();
    client.chain();
    for name in ["t", "u"] {
        client.image(&format!("{name}.qcow2"), 9, None);
        client.add(name, &format!("{name}.qcow2"), Value::Null);
    }
    let mirror = |id, target| json!({"job-id": id, "device": "top", "target": target, "sync": "full"});
    client.run("blockdev-mirror", mirror("m", "t"));
    for (command, arguments, text) in [
        (
            "blockdev-mirror",
            mirror("n", "u"),
            "Node 'top' is busy: block device is in use by block job: mirror",
        ),
        (
            "blockdev-mirror",
            mirror("m", "u"),
            "Node 'top' is busy: block device is in use by block job: mirror",
        ),
        (
            "blockdev-del",
            json!({"node-name": "top"}),
            "Node 'top' is busy: block device is in use by block job: mirror",
        ),
        ("blockdev-del", json!({"node-name": "t"}), "Node t is in use by block job 'm': mirror"),
        (
            "block_resize",
            json!({"node-name": "top", "size": 2 * SIZE}),
            "Node 'top' is busy: block device is in use by block job: mirror",
        ),
        (
            "blockdev-snapshot",
            json!({"node": "top", "overlay": "u"}),
            "Node 'top' is busy: block device is in use by block job: mirror",
        ),
        (
            "block-stream",
            json!({"job-id": "s", "device": "top"}),
            "Node 'top' is busy: block device is in use by block job: mirror",
        ),
        (
            "block-commit",
            json!({"job-id": "c", "device": "top"}),
            "Node 'top' is busy: block device is in use by block job: mirror",
        ),
    ] {
        assert_eq!(client.refused(command, arguments), text, "{command}");
    }
    assert_eq!(
        client
            .refused("blockdev-mirror", json!({"job-id": "n", "device": "u", "target": "t", "sync": "full"})),
        "Node 't' is busy: block device is in use by block job: mirror"
    );
}
