//! `blockmirror ctl SOCKET snapshot`, `commit` and `stream`, and the lists of nodes, bitmaps and exports,
//! against our daemon and QEMU's.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use serde_json::{Value, json};

use crate::common::ours_ok;
use crate::ctl::World;

/// Our daemon, and QEMU's where it is installed, each with a qcow2 image of 1 MiB in the node `image`.
fn worlds() -> impl Iterator<Item = World> {
    [Some(World::ours()), World::qemu()].into_iter().flatten().map(|mut world| {
        let path = world.path("image.qcow2");
        ours_ok(["create", "-q", "-f", "qcow2", &path, "1M"]);
        let file = json!({"driver": "file", "filename": path});
        world.must("blockdev-add", json!({"driver": "qcow2", "node-name": "image", "file": file}));
        world
    })
}

#[test]
fn a_snapshot_is_taken_committed_and_streamed() {
    for mut world in worlds() {
        assert_eq!(
            world.output_of("snapshot image @one.qcow2"),
            "overlay0: the disk is @one.qcow2 now, on @image.qcow2\n[0]"
        );
        let info = ours_ok(["info", "-U", "--output=json", &world.path("one.qcow2")]);
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["backing-filename"], json!(world.path("image.qcow2")));
        assert_eq!(
            world.output_of("snapshot overlay0 @two.qcow2 --node-name two"),
            "two: the disk is @two.qcow2 now, on @one.qcow2\n[0]"
        );
        std::fs::write(world.path("old.qcow2"), b"").unwrap();
        assert_eq!(
            world.output_of("snapshot two @old.qcow2"),
            "@old.qcow2: it exists; a snapshot needs a new file\n[1]"
        );
        let output = world.output_of("snapshot two @three.qcow2 --backing-file no.qcow2");
        assert!(output.ends_with("No such file or directory\n[1]"), "{output}");
        assert_eq!(
            world.output_of("snapshot two @three.qcow2 --backing-file @image.qcow2"),
            "--backing-file @image.qcow2: it is not the image of 'two'\n[2]"
        );
        assert!(!std::path::Path::new(&world.path("three.qcow2")).exists());
        // In use, and by whom.
        assert!(world.output_of("snapshot two @one.qcow2").ends_with("\n[1]"));

        // What lies between ends by itself; the top of the chain waits for its end.
        assert_eq!(
            world.output_of("commit two --top overlay0 --base image --wait"),
            "commit0: completed\n[0]"
        );
        let ready = world.output_of("commit two --wait");
        let want = "commit0: ready: two -> the base\ncommit0: end it by one of\n  blockmirror ctl SOCKET complete commit0  users of";
        assert!(ready.starts_with(want), "{ready}");
        assert_eq!(world.output_of("abort"), "commit0: aborted\n[0]");
        assert_eq!(world.output_of("stream two --wait"), "stream0: completed\n[0]");
        let nodes = world.must("query-named-block-nodes", json!({}));
        let two = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "two").unwrap();
        assert_eq!(two["backing_file_depth"], 0);
        assert_eq!(world.must("query-jobs", json!({})), json!([]));
    }
}

#[test]
fn a_commit_moves_the_users_to_the_base() {
    for world in worlds() {
        world.output_of("snapshot image @one.qcow2 --node-name top");
        assert_eq!(world.output_of("commit top --pivot"), "commit0: completed\n[0]");
        assert!(world.output_of("stream nothing").starts_with("no node 'nothing': there is "));
        assert!(world.output_of("commit nothing").starts_with("no node 'nothing': there is "));
    }
    let mut world = World::ours();
    let export = json!({"type": "nbd", "id": "t", "node-name": "disk", "name": "t"});
    world.must("block-export-add", export);
    world.output_of("snapshot disk @one.qcow2");
    assert_eq!(world.exported(), "overlay0");
    assert_eq!(world.output_of("commit overlay0 --pivot"), "commit0: completed\n[0]");
    assert_eq!(world.exported(), "disk");
}

#[test]
fn jobs_that_were_started_say_how_they_go_on() {
    for world in worlds() {
        world.output_of("snapshot image @one.qcow2");
        let output = world.output_of("commit overlay0 --job-id c");
        let want = "c: started: overlay0 -> the base\n  blockmirror ctl SOCKET watch c\nc: when it is ready, end it by one of\n";
        assert!(output.starts_with(want), "{output}");
        assert_eq!(world.output_of("complete c --wait"), "c: completed\n[0]");
    }
}

#[test]
fn what_a_server_has() {
    for mut world in worlds() {
        assert_eq!(world.output_of("bitmaps"), "no bitmaps\n[0]");
        let bitmap = json!({"node": "image", "name": "b1", "granularity": 65536, "persistent": true});
        world.must("block-dirty-bitmap-add", bitmap);
        assert_eq!(
            world.output_of("bitmaps"),
            "NODE   BITMAP  GRANULARITY  DIRTY  STATE\n\
             image  b1           64 KiB    0 B  recording, persistent\n[0]"
        );
        let bitmaps: Value = serde_json::from_str(&world.ctl(&["bitmaps", "--output=json"]).stdout).unwrap();
        assert_eq!((&bitmaps[0]["node"], &bitmaps[0]["name"]), (&json!("image"), &json!("b1")));
        let output = world.output_of("nodes");
        let rows: Vec<Vec<_>> = output.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0], ["NODE", "DRIVER", "MODE", "SIZE", "FILE"]);
        assert!(rows.contains(&vec!["image", "qcow2", "writable", "1", "MiB", "@image.qcow2"]), "{output}");
        let nodes: Value = serde_json::from_str(&world.ctl(&["nodes", "--output=json"]).stdout).unwrap();
        assert!(nodes.as_array().unwrap().iter().any(|node| node["node-name"] == "image"));
    }
    let world = World::ours();
    assert_eq!(world.output_of("exports"), "EXPORT  TYPE  NODE\ne       nbd   disk\n[0]");
    let exports: Value = serde_json::from_str(&world.ctl(&["exports", "--output=json"]).stdout).unwrap();
    assert_eq!(exports, json!([{"node-name": "disk", "shutting-down": false, "type": "nbd", "id": "e"}]));
    if let Some(world) = World::qemu() {
        assert_eq!(world.output_of("exports"), "no exports\n[0]");
    }
}
