//! Jobs on chains of images.

use serde_json::json;

use super::*;
use crate::graph::{Parent, Perms};

impl Client {
    /// The chain of `chain`, of which only the top is opened by name.
    fn implicit_chain(&mut self) -> Vec<String> {
        self.image("base.qcow2", 1, None);
        self.image("mid.qcow2", 2, Some("base.qcow2"));
        self.image("top.qcow2", 3, Some("mid.qcow2"));
        let file = json!({"driver": "file", "filename": self.path("top.qcow2")});
        self.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
        self.daemon.services.context.graph.lock().chain("top").iter().map(|node| node.name.clone()).collect()
    }

    /// The name of the file that `node` lives in.
    fn file_of(&self, node: &str) -> String {
        let graph = self.daemon.services.context.graph.lock();
        let (_, file) = graph.children(node).find(|(role, _)| *role == "file").unwrap();
        file.name.clone()
    }

    fn is_read_only(&self, node: &str) -> (bool, bool) {
        let graph = self.daemon.services.context.graph.lock();
        let node = graph.find(node).unwrap();
        let file = graph.children(&node.name).find(|(role, _)| *role == "file").unwrap().1;
        assert_eq!(file.read_only, !file.storage.as_ref().unwrap().info().writable);
        (node.read_only, file.read_only)
    }
}

/// A backing file that the chain itself brought along is open for reading. A commit into it was refused; it
/// opens it for writing, for as long as the job runs.
#[test]
fn a_backing_file_is_written_for_the_time_of_a_commit() {
    let mut client = Client::new();
    let names = client.implicit_chain();
    let (mid, base) = (&names[1], &names[2]);
    client.run(
        "block-commit",
        json!({"job-id": "c", "device": "top", "top-node": mid, "auto-finalize": false}),
    );
    client.wait("BLOCK_JOB_PENDING");
    assert_eq!(client.is_read_only(base), (false, false));
    client.run("job-finalize", json!({"id": "c"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert_eq!(client.is_read_only(base), (true, true));
    assert_eq!(client.blocks(base), [1, 2]);
    client.wait_for_status("null");

    client.run("block-commit", json!({"job-id": "c", "device": "top"}));
    client.wait("BLOCK_JOB_READY");
    client.run("block-job-cancel", json!({"device": "c"}));
    client.wait_for_status("null");
    assert_eq!(client.is_read_only(base), (true, true));

    client.run("block-commit", json!({"job-id": "c", "device": "top"}));
    client.wait("BLOCK_JOB_READY");
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    client.run("job-complete", json!({"id": "c"}));
    client.wait_for_status("null");
    assert_eq!(client.is_read_only(base), (false, false));
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.blocks(base), [1, 2, 3, 4]);
}

/// In the middle of a chain everything is open for reading: the base, and the image whose header changes.
#[test]
fn an_image_above_a_commit_is_written_too() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("mid.qcow2", 2, Some("base.qcow2"));
    client.image("top.qcow2", 3, Some("mid.qcow2"));
    client.image("last.qcow2", 4, Some("top.qcow2"));
    let file = json!({"driver": "file", "filename": client.path("last.qcow2")});
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "last", "file": file}));
    let mid = client.path("mid.qcow2");
    client.run("block-commit", json!({"job-id": "c", "device": "last", "top": mid}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    client.wait_for_status("null");
    let above = client.backing("last").unwrap();
    assert_eq!(client.is_read_only(&above), (true, true));
    assert_eq!(client.blocks("last"), [1, 2, 3, 4]);

    // A stream into an image in the middle.
    client.run("block-stream", json!({"job-id": "s", "device": above}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    client.wait_for_status("null");
    assert_eq!(client.is_read_only(&above), (true, true));
    assert_eq!(client.backing(&above), None);
    client.run("blockdev-del", json!({"node-name": "last"}));
    client.add("alone", "top.qcow2", Value::Null);
    assert_eq!(client.blocks("alone"), [1, 2, 3]);
}

#[test]
fn a_base_that_somebody_else_holds_is_not_written() {
    let mut client = Client::new();
    let names = client.implicit_chain();
    let other = blockmirror_file::FileOptions::new().open(client.path("base.qcow2")).unwrap();
    let text = client.refused("block-commit", json!({"job-id": "c", "device": "top"}));
    assert!(text.contains("base.qcow2"), "{text}");
    assert_eq!(client.is_read_only(&names[2]), (true, true));
    drop(other);
    client.run("block-commit", json!({"job-id": "c", "device": "top"}));
    client.wait("BLOCK_JOB_READY");
    client.run("block-job-cancel", json!({"device": "c", "force": true}));
    client.wait("BLOCK_JOB_CANCELLED");
    assert_eq!(client.is_read_only(&names[2]), (true, true));
}

/// The daemon hung: it gave the image back, which it had opened for writing, while it had the graph locked.
#[test]
fn a_stream_that_is_refused_gives_its_image_back() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("mid.qcow2", 2, Some("base.qcow2"));
    client.image("top.qcow2", 3, Some("mid.qcow2"));
    client.add("base", "base.qcow2", Value::Null);
    let socket = json!({"type": "unix", "data": {"path": client.path("nbd.sock")}});
    client.run("nbd-server-start", json!({"addr": socket}));
    client.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "base", "writable": true}));
    let file = |client: &Client, name: &str| json!({"driver": "file", "filename": client.path(name)});
    let mid = json!({"driver": "qcow2", "file": file(&client, "mid.qcow2"), "backing": "base"});
    let top = file(&client, "top.qcow2");
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": top, "backing": mid}));
    let mid = client.backing("top").unwrap();
    let text = client.refused("block-stream", json!({"job-id": "s", "device": mid}));
    assert!(text.starts_with("Permission conflict on node 'base'"), "{text}");
    assert_eq!(client.is_read_only(&mid), (true, true));
}

/// Whose file was given `read-only` is not written by anything, inside the options of the node or by name;
/// what only follows its parent, or may fall back to reading, is opened for writing for the time of a job.
#[test]
fn what_was_given_read_only_is_not_written() {
    for (own, given, is_written) in [
        (false, json!({"read-only": true}), false),
        (false, json!({"read-only": true, "auto-read-only": true}), false),
        (true, json!({"read-only": true}), false),
        (false, json!({}), true),
        (false, json!({"auto-read-only": true}), true),
        (false, json!({"read-only": false}), true),
        (true, json!({"auto-read-only": true}), true),
    ] {
        let at = format!("{own} {given}");
        let mut client = Client::new();
        client.image("base.qcow2", 1, None);
        client.image("mid.qcow2", 2, Some("base.qcow2"));
        client.image("top.qcow2", 3, Some("mid.qcow2"));
        let file = |client: &mut Client, name: &str| {
            let mut file = json!({"driver": "file", "filename": client.path(name)});
            for (key, value) in given.as_object().unwrap() {
                file[key] = value.clone();
            }
            if own {
                file["node-name"] = json!(format!("f-{}", &name[..3]));
                client.run("blockdev-add", file.clone());
                file = file["node-name"].clone();
            }
            file
        };
        for (name, image, backing) in [
            ("base", "base.qcow2", Value::Null),
            ("mid", "mid.qcow2", json!("base")),
            ("top", "top.qcow2", json!("mid")),
        ] {
            let file = file(&mut client, image);
            let node = json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing, "read-only": true});
            client.run("blockdev-add", node);
        }
        let bytes = |client: &Client| {
            ["base", "mid", "top"].map(|n| std::fs::read(client.path(&format!("{n}.qcow2"))).unwrap())
        };
        let before = bytes(&client);
        let writers = [
            ("block-commit", json!({"job-id": "j", "device": "top", "top-node": "mid"})),
            ("block-commit", json!({"job-id": "j", "device": "top"})),
            ("block-stream", json!({"job-id": "j", "device": "top"})),
            (
                "change-backing-file",
                json!({"device": "top", "image-node-name": "top", "backing-file": "else"}),
            ),
        ];
        if !is_written {
            for (command, arguments) in writers {
                assert_eq!(client.refused(command, arguments), "Block node is read-only", "{at} {command}");
            }
            let reopened = json!({"driver": "qcow2", "node-name": "base", "file": client.file_of("base"), "backing": null});
            let text = client.refused("blockdev-reopen", json!({"options": [reopened]}));
            assert_eq!(text, "Block node is read-only", "{at}");
            assert!(before == bytes(&client), "{at}: something was written");
            continue;
        }
        // From the last to the first: each leaves what the next one needs.
        let (command, arguments) = &writers[3];
        client.run(command, arguments.clone());
        client.run(command, json!({"device": "top", "image-node-name": "top", "backing-file": "mid.qcow2"}));
        let (command, arguments) = &writers[0];
        client.run(command, arguments.clone());
        client.wait("BLOCK_JOB_COMPLETED");
        assert_eq!((client.blocks("base"), client.blocks("top")), (vec![1, 2], vec![1, 2, 3]), "{at}");
        let (command, arguments) = &writers[2];
        client.run(command, arguments.clone());
        client.wait("BLOCK_JOB_COMPLETED");
        assert_eq!(client.backing("top"), None, "{at}");
        // And set back.
        let file_follows = !own && given.get("read-only").is_none();
        assert!(["base", "top"].iter().all(|node| client.is_read_only(node) == (true, file_follows)), "{at}");
    }
}

/// Other writers than jobs on chains, to nodes that are read-only as their files are.
#[test]
fn nothing_else_writes_what_was_given_read_only() {
    let mut client = Client::new();
    client.image("r.qcow2", 1, None);
    let before = std::fs::read(client.path("r.qcow2")).unwrap();
    let file = json!({"driver": "file", "filename": client.path("r.qcow2"), "read-only": true});
    let with = |node: &str, driver: &str, child: &str| json!({"driver": driver, "node-name": node, "read-only": true, child: file});
    client.run("blockdev-add", with("q", "qcow2", "file"));
    client.run("blockdev-add", with("r", "raw", "file"));
    client.run("blockdev-add", with("b", "blkdebug", "image"));
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "source", "size": SIZE}));
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": client.path("nbd")}}}));
    for node in ["q", "r", "b"] {
        let mirror = json!({"job-id": "j", "device": "source", "target": node, "sync": "full"});
        assert_eq!(client.refused("blockdev-mirror", mirror), "Block node is read-only");
        let export = json!({"type": "nbd", "id": "e", "node-name": node, "writable": true});
        assert_eq!(client.refused("block-export-add", export), "Cannot export read-only node as writable");
        assert_eq!(
            client.refused("block_resize", json!({"node-name": node, "size": 2 * SIZE})),
            "Image is read-only"
        );
        let create = json!({"driver": "qcow2", "file": node, "size": SIZE});
        client.run("blockdev-create", json!({"job-id": "c", "options": create}));
        client.wait_for_status("concluded");
        let jobs = client.run("query-jobs", json!({}));
        assert_eq!(jobs[0]["error"], "Block node is read-only");
        client.run("job-dismiss", json!({"id": "c"}));
    }
    for (driver, child) in [("qcow2", "file"), ("copy-on-read", "file")] {
        for auto in [false, true] {
            let node = json!({"driver": driver, "node-name": "n", "auto-read-only": auto, child: file});
            assert_eq!(client.refused("blockdev-add", node), "Block node is read-only", "{driver} {auto}");
        }
    }
    client.image("overlay.qcow2", 2, None);
    let file = json!({"driver": "file", "filename": client.path("overlay.qcow2"), "read-only": true});
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "o", "read-only": true, "file": file}));
    client.run("nbd-server-stop", json!({}));
    assert_eq!(before, std::fs::read(client.path("r.qcow2")).unwrap());
}

/// As in QEMU: overlays that are not in use do not keep a commit back, readers of a layer that goes do,
/// readers of the base not.
#[test]
fn readers_of_a_layer_that_goes_keep_it() {
    let mut client = Client::new();
    client.chain();
    client.image("aside.qcow2", 9, None);
    client.add("aside", "aside.qcow2", json!("mid"));
    let socket = client.path("nbd");
    let addr = json!({"type": "unix", "data": {"path": socket}});
    client.run("nbd-server-start", json!({"addr": addr}));
    let export = |node| json!({"type": "nbd", "id": "e", "node-name": node, "name": "e"});
    let commit = json!({"job-id": "c", "device": "top", "base-node": "base"});
    for node in ["mid", "aside"] {
        client.run("block-export-add", export(node));
        let text = client.refused("block-commit", commit.clone());
        let parent = if node == "mid" { "export 'e'" } else { "node 'aside' (as 'backing' child)" };
        assert_eq!(text, format!("Node 'mid' is busy: it is in use by {parent}"));
        client.run("block-export-del", json!({"id": "e"}));
    }
    client.run("block-export-add", export("base"));
    client.run("block-commit", commit);
    client.wait("BLOCK_JOB_READY");
    let mut writable = export("base");
    writable["id"] = json!("w");
    writable["name"] = json!("w");
    writable["writable"] = json!(true);
    let text = client.refused("block-export-add", writable.clone());
    assert!(text.contains("unshared by block job 'c': commit"), "{text}");
    client.run("job-complete", json!({"id": "c"}));
    client.wait_for_status("null");
    // What still stands on the base does not keep others from writing it either.
    client.run("block-export-add", writable);
}

#[test]
fn an_image_that_stands_alone_has_nothing_to_stream() {
    let mut client = Client::new();
    client.image("alone.qcow2", 1, None);
    client.add("alone", "alone.qcow2", Value::Null);
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    for device in ["alone", "n"] {
        client.run("block-stream", json!({"job-id": "s", "device": device}));
        let data = client.wait("BLOCK_JOB_COMPLETED");
        assert_eq!((&data["len"], &data["offset"]), (&json!(0), &json!(0)));
        client.wait_for_status("null");
    }
}

#[test]
fn a_header_gets_another_name_for_its_backing_file() {
    let mut client = Client::new();
    client.chain();
    let change =
        |device, image, name: &str| json!({"device": device, "image-node-name": image, "backing-file": name});
    client.run("change-backing-file", change("top", "top", "elsewhere.qcow2"));
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let top = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "top").unwrap();
    assert_eq!(top["image"]["backing-filename"], "elsewhere.qcow2");
    assert_eq!(top["image"]["backing-filename-format"], "qcow2");
    assert_eq!((client.backing("top").as_deref(), client.blocks("top")), (Some("mid"), vec![1, 2, 3]));
    for (arguments, text) in [
        (change("zz", "top", "x"), "Cannot find device='zz' nor node-name='zz'"),
        (change("top", "zz", "x"), "Cannot find device='' nor node-name='zz'"),
        (change("top", "base", "x"), "not allowing backing file change on an image without a backing file"),
        (change("mid", "top", "x"), "'mid' and image file are not in the same chain"),
    ] {
        assert_eq!(client.refused("change-backing-file", arguments), text);
    }
    client.run("blockdev-del", json!({"node-name": "top"}));
    let policy = blockmirror_image::ReferencePolicy::beside(&client.path("top.qcow2")).unwrap();
    OpenOptions::new().policy(policy).open(client.path("top.qcow2")).unwrap_err();
}

/// A job that is slow, paused, made fast and resumed does its work; one that is given up leaves the chain as
/// it was.
#[test]
fn stream_and_commit_can_be_slowed_paused_and_given_up() {
    for (command, more) in [("block-stream", json!({})), ("block-commit", json!({"top-node": "mid"}))] {
        let mut client = Client::new();
        client.chain();
        // A second piece for each.
        client
            .run("human-monitor-command", json!({"command-line": "qemu-io mid \"write -q -P 6 384k 64k\""}));
        let mut start = json!({"job-id": "j", "device": "top", "speed": 1});
        start.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.run(command, start.clone());
        client.wait_for_status("running");
        let info = client.run("query-block-jobs", json!({}));
        assert_eq!((&info[0]["speed"], &info[0]["ready"]), (&json!(1), &json!(false)), "{command}");
        assert_eq!(
            client.refused("block-job-complete", json!({"device": "j"})),
            "Job 'j' in state 'running' cannot accept command verb 'complete'"
        );
        client.run("block-job-cancel", json!({"device": "j"}));
        client.wait("BLOCK_JOB_CANCELLED");
        client.wait_for_status("null");
        assert_eq!(client.backing("top").as_deref(), Some("mid"), "{command}");
        assert_eq!(client.blocks("top"), [1, 2, 3, 6]);

        client.run(command, start);
        client.wait_for_status("running");
        client.run("job-pause", json!({"id": "j"}));
        client.wait_for_status("paused");
        client.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
        let info = client.run("query-block-jobs", json!({}));
        assert_eq!((&info[0]["paused"], &info[0]["status"]), (&json!(true), &json!("paused")));
        client.run("job-resume", json!({"id": "j"}));
        assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
        client.wait_for_status("null");
        let below = if command == "block-stream" { None } else { Some("base") };
        assert_eq!(client.backing("top").as_deref(), below);
        assert_eq!(client.blocks("top"), [1, 2, 3, 6]);
    }
}

/// The folder of a chain could not be moved any more: absolute names took the place of relative ones.
#[test]
fn names_stay_relative_when_a_layer_goes() {
    let at = ["1/base", "2/mid", "3/top", "4/over"];
    let chain = || {
        let mut client = Client::new();
        for (block, (name, below)) in
            at.iter().zip([None, Some("../1/base"), Some("../2/mid"), Some("../3/top")]).enumerate()
        {
            std::fs::create_dir_all(client.path(name).parent().unwrap()).unwrap();
            client.image_under(ReferencePolicy::any(), name, block as u8 + 1, below);
        }
        client.add("base", at[0], Value::Null);
        client.add("mid", at[1], json!("base"));
        client.add("top", at[2], json!("mid"));
        client.add("over", at[3], json!("top"));
        client
    };
    let name_in = |client: &Client, image: &str| {
        let info = blockmirror_image::ImageInfo::read(client.path(image), &OpenOptions::new()).unwrap();
        info.backing.unwrap().name.into_os_string().into_string().unwrap()
    };
    for (command, arguments, header, name) in [
        ("block-stream", json!({"device": "over", "base-node": "base"}), at[3], "../1/base"),
        (
            "block-stream",
            json!({"device": "over", "base-node": "base", "backing-file": "../1/./base"}),
            at[3],
            "../1/./base",
        ),
        (
            "block-commit",
            json!({"device": "over", "top-node": "mid", "base-node": "base"}),
            at[2],
            "../1/base",
        ),
    ] {
        let mut client = chain();
        let mut arguments = arguments;
        arguments["job-id"] = json!("j");
        client.run(command, arguments);
        assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
        client.wait_for_status("null");
        assert_eq!(name_in(&client, header), name, "{command}");
        // Nothing holds the images any more.
        for node in ["over", "top", "mid", "base"] {
            client.run("blockdev-del", json!({"node-name": node}));
        }
        let moved = tempfile::tempdir().unwrap();
        for folder in ["1", "2", "3", "4"] {
            std::fs::rename(client.path(folder), moved.path().join(folder)).unwrap();
        }
        let policy = ReferencePolicy::any();
        let image = OpenOptions::new().policy(policy).open(moved.path().join(at[3])).unwrap();
        let mut byte = [0];
        image.device().read_at(&mut byte, 1 << 16).unwrap();
        assert_eq!(byte[0], 1);
    }
}

/// It was found out when the work was done.
#[test]
fn a_name_that_the_header_cannot_hold_is_refused_at_the_start() {
    let mut client = Client::new();
    client.chain();
    let long = "x".repeat(1024);
    for (command, arguments) in [
        ("block-stream", json!({"job-id": "j", "device": "top", "base-node": "base", "backing-file": long})),
        ("block-commit", json!({"job-id": "j", "device": "top", "top-node": "mid", "backing-file": long})),
    ] {
        let text = client.refused(command, arguments);
        assert!(text.contains("backing_file"), "{text}");
        assert_eq!(client.run("query-jobs", json!({})), json!([]));
    }
    assert_eq!(client.backing("top").as_deref(), Some("mid"));
    assert_eq!(client.backing("mid").as_deref(), Some("base"));
}

/// When a job that shortened a chain cannot link the overlay to its base, the old link stays: the header
/// names the base by then, and what the old link leads to stands on it, so the base cannot be taken away.
/// (The old link went first.)
#[test]
fn a_base_that_cannot_be_linked_stays_protected() {
    for command in ["block-stream", "block-commit"] {
        let mut client = Client::new();
        client.chain();
        let args = match command {
            "block-stream" => json!({"base-node": "base"}),
            _ => json!({"top-node": "mid"}),
        };
        let mut all = json!({"job-id": "j", "device": "top", "auto-finalize": false});
        all.as_object_mut().unwrap().extend(args.as_object().unwrap().clone());
        client.run(command, all);
        client.wait("BLOCK_JOB_PENDING");
        client.daemon.services.context.graph.lock().attach_unchecked(
            "base",
            Parent::Monitor,
            Perms::NONE,
            Perms::NONE,
        );
        client.run("job-finalize", json!({"id": "j"}));
        client.wait("BLOCK_JOB_COMPLETED");
        assert_eq!(client.backing("top").as_deref(), Some("mid"), "{command}");
        assert!(client.daemon.services.context.graph.lock().stands_on("top", "base"), "{command}");
        assert_eq!(client.blocks("top"), [1, 2, 3], "{command}");
    }
}

/// A stream into an image that stands on nothing is a job like others: where it waits to be finalized it can
/// be cancelled.
#[test]
fn a_job_without_work_can_be_cancelled_where_it_waits() {
    for (command, name) in [("job-cancel", "id"), ("block-job-cancel", "device")] {
        let mut client = Client::new();
        client.chain();
        client.run("block-stream", json!({"job-id": "j", "device": "base", "auto-finalize": false}));
        client.wait("BLOCK_JOB_PENDING");
        client.run(command, json!({name: "j"}));
        client.wait_for_status("aborting");
        assert_eq!(client.wait("BLOCK_JOB_CANCELLED")["type"], "stream", "{command}");
        client.wait_for_status("null");
        client.run("block-stream", json!({"job-id": "j", "device": "base"}));
        client.wait_for_status("null");
    }
}

/// Each layer of a chain that opens itself kept its L1 table, without a bound for all of them.
#[test]
fn the_l1_tables_of_a_chain_are_bounded_together() {
    let mut client = Client::new();
    // An L1 table of 30 MiB each. Made from the top down: there is nothing below to look at yet.
    for index in (0..9).rev() {
        let mut settings = CreateSettings::default();
        settings.parse(Format::Qcow2, "cluster_size=512").unwrap();
        settings.backing_file = (index > 0).then(|| format!("{}", index - 1));
        settings.backing_format = (index > 0).then_some(Format::Qcow2);
        let spec = CreateSpec::new(Format::Qcow2, 120 << 30, settings);
        NewImage::create(client.path(&index.to_string()), &spec).unwrap().persist().unwrap();
    }
    let add = |client: &Client, name: &str| {
        let file = json!({"driver": "file", "filename": client.path(name)});
        json!({"driver": "qcow2", "node-name": "top", "read-only": true, "file": file})
    };
    let arguments = add(&client, "8");
    let refused = client.refused("blockdev-add", arguments);
    assert!(refused.contains("with it the L1 tables of the chain have 283"), "{refused}");
    assert!(client.daemon.services.context.graph.lock().find("top").is_err());
    let arguments = add(&client, "1");
    client.run("blockdev-add", arguments);
}
