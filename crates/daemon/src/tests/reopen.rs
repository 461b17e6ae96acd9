//! `blockdev-reopen`.

mod image_file;

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use super::*;

impl Client {
    fn reopen(&mut self, options: Value) -> Result<Value, String> {
        let options = if options.is_array() { options } else { json!([options]) };
        self.ask("blockdev-reopen", json!({"options": options}))
    }

    fn cannot_reopen(&mut self, options: Value) -> String {
        self.reopen(options).unwrap_err()
    }

    /// `base` <- `mid` <- `top`, each in a file node of its own.
    fn chain_of_files(&mut self) {
        self.image("base.qcow2", 1, None);
        self.image("mid.qcow2", 2, Some("base.qcow2"));
        self.image("top.qcow2", 3, Some("mid.qcow2"));
        let mut backing = Value::Null;
        for name in ["base", "mid", "top"] {
            let path = self.path(&format!("{name}.qcow2"));
            let file = format!("{name}-file");
            self.run("blockdev-add", json!({"driver": "file", "node-name": file, "filename": path}));
            self.run(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing}),
            );
            backing = json!(name);
        }
    }

    fn node(&mut self, name: &str) -> Value {
        let nodes = self.run("query-named-block-nodes", json!({"flat": true}));
        nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name).unwrap().clone()
    }
}

fn top(more: Value) -> Value {
    let mut options = json!({"driver": "qcow2", "node-name": "top", "file": "top-file", "backing": "mid"});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    options
}

/// The texts are those of QEMU's storage daemon, but where a node is named that it does not name.
#[test]
fn what_cannot_change_is_refused_by_name() {
    let mut client = Client::new();
    client.chain_of_files();
    let raw = client.path("raw");
    std::fs::write(&raw, vec![0; SIZE as usize]).unwrap();
    client.run("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": raw}));
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"}));
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": SIZE}));
    client.run("blockdev-add", json!({"driver": "copy-on-read", "node-name": "cor", "file": "n"}));
    for (options, text) in [
        (json!({"driver": "qcow2", "file": "f"}), "node-name not specified"),
        (
            json!({"driver": "qcow2", "node-name": "zz", "file": "f"}),
            "Failed to find node with node-name='zz'",
        ),
        (json!({"driver": "qcow2", "node-name": "top", "file": "top-file"}), "backing is missing for 'top'"),
        (
            json!({"driver": "raw", "node-name": "base", "file": "base-file"}),
            "Cannot change the option 'driver'",
        ),
        (top(json!({"file": "zz"})), "Cannot find device='' nor node-name='zz'"),
        (
            top(json!({"file": "f"})),
            "Permission conflict on node 'f': permissions 'write, resize' are both required by node 'r' (uses \
             node 'f' as 'file' child) and unshared by node 'top' (uses node 'f' as 'file' child).",
        ),
        (top(json!({"file": {"driver": "file", "filename": raw}})), "Cannot change the option 'file.driver'"),
        (top(json!({"data-file": "f"})), "Cannot change the option 'data-file'"),
        (top(json!({"force-share": true, "read-only": true})), "Cannot change the option 'force-share'"),
        (top(json!({"backing": "top"})), "Making 'top' a backing child of 'top' would create a cycle"),
        (
            top(json!({"detect-zeroes": "unmap"})),
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
        (
            json!({"driver": "file", "node-name": "f", "filename": "/x"}),
            "Cannot change the option 'filename'",
        ),
        (
            json!({"driver": "file", "node-name": "f", "filename": raw, "aio": "native"}),
            "Cannot change the option 'aio'",
        ),
        (
            json!({"driver": "file", "node-name": "f", "filename": raw, "read-only": true}),
            "Read-only block node 'f' cannot support read-write users",
        ),
        (
            json!({"driver": "raw", "node-name": "r", "file": "r"}),
            "Making 'r' a file child of 'r' would create a cycle",
        ),
        (
            json!({"driver": "null-co", "node-name": "n"}),
            "Option 'size' cannot be reset to its default value",
        ),
        (json!({"driver": "null-co", "node-name": "n", "size": 5}), "Cannot change the option 'size'"),
        (
            json!({"driver": "copy-on-read", "node-name": "cor", "file": "n"}),
            "Block format 'copy-on-read' used by node 'cor' does not support reopening files",
        ),
    ] {
        assert_eq!(client.cannot_reopen(options.clone()), text, "{options}");
    }
    assert!(!client.node("top")["ro"].as_bool().unwrap());
}

#[test]
fn options_change_and_go_back_to_their_defaults() {
    let mut client = Client::new();
    client.chain_of_files();
    client.reopen(json!([])).unwrap();
    let more = json!({"discard": "unmap", "detect-zeroes": "unmap", "cache": {"no-flush": true}, "lazy-refcounts": true});
    client.reopen(top(more)).unwrap();
    let node = client.node("top");
    assert_eq!(
        (node["detect_zeroes"].as_str(), node["cache"]["no-flush"].as_bool()),
        (Some("unmap"), Some(true))
    );
    client.reopen(top(json!({}))).unwrap();
    let node = client.node("top");
    assert_eq!(
        (node["detect_zeroes"].as_str(), node["cache"]["no-flush"].as_bool()),
        (Some("off"), Some(false))
    );
}

#[test]
fn nodes_become_read_only_and_writable_together_or_not_at_all() {
    let mut client = Client::new();
    client.chain_of_files();
    let file = |client: &Client, more: bool| json!({"driver": "file", "node-name": "top-file", "filename": client.path("top.qcow2"), "read-only": more});
    let (reading, writing) = (file(&client, true), file(&client, false));
    // In any order; what is written before stays.
    client.run("human-monitor-command", json!({"command-line": "qemu-io top \"write -P 4 256k 64k\""}));
    client.reopen(json!([reading, top(json!({"read-only": true}))])).unwrap();
    assert!(client.node("top")["ro"].as_bool().unwrap() && client.node("top-file")["ro"].as_bool().unwrap());
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    tap.write_at(&[9], 0, WriteFlags::NONE).unwrap_err();
    // Two readers get along.
    blockmirror_file::FileOptions::new().open(client.path("top.qcow2")).unwrap();
    assert_eq!(client.cannot_reopen(top(json!({}))), "Block node is read-only");
    assert_eq!(
        client.cannot_reopen(json!([writing, top(json!({})), {"driver": "null-co", "node-name": "zz"}])),
        "Failed to find node with node-name='zz'"
    );
    let other = blockmirror_file::FileOptions::new().open(client.path("top.qcow2")).unwrap();
    client.cannot_reopen(json!([top(json!({})), writing]));
    assert!(client.node("top")["ro"].as_bool().unwrap() && client.node("top-file")["ro"].as_bool().unwrap());
    drop(other);
    client.reopen(json!([top(json!({})), writing])).unwrap();
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.blocks("top"), [1, 2, 3, 4, 5]);
    // Halfway through a list that fails nothing stays changed.
    let text = client.cannot_reopen(json!([
        top(json!({"read-only": true})),
        {"driver": "file", "node-name": "mid-file", "filename": client.path("mid.qcow2"), "read-only": true},
    ]));
    assert_eq!(text, "Read-only block node 'mid-file' cannot support read-write users");
    tap.write_at(&[6; 65536], 6 << 16, WriteFlags::NONE).unwrap();
}

/// What was written the one way is read the other; a file of its own is reported apart.
#[test]
fn files_go_past_the_page_cache_and_through_it() {
    let mut client = Client::new();
    client.image("alone.qcow2", 1, None);
    let path = client.path("alone.qcow2");
    let file = json!({"driver": "file", "node-name": "f", "filename": path});
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
    let options =
        |direct| json!({"driver": "qcow2", "node-name": "top", "file": "f", "cache": {"direct": direct}});
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    for round in 2..6 {
        if let Err(text) = client.reopen(options(round % 2 == 0)) {
            assert!(text.contains("does not do direct I/O"), "{text}");
            return;
        }
        assert_eq!(client.node("f")["cache"]["direct"], round % 2 == 0);
        tap.write_at(&[round; 65536], u64::from(round) << 16, WriteFlags::NONE).unwrap();
        assert_eq!(client.blocks("top"), (1..=round).collect::<Vec<_>>());
    }
    // Something that fails afterwards takes it back.
    let other = client.path("other");
    std::fs::write(&other, vec![0; SIZE as usize]).unwrap();
    client.run("blockdev-add", json!({"driver": "file", "node-name": "g", "filename": other}));
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "g"}));
    let busy = json!({"driver": "file", "node-name": "g", "filename": other, "read-only": true});
    let text = client.cannot_reopen(json!([options(true), busy]));
    assert_eq!(text, "Read-only block node 'g' cannot support read-write users");
    assert_eq!(client.node("f")["cache"]["direct"], false);
    let graph = client.daemon.services.context.graph.lock();
    assert_eq!(graph.find("f").unwrap().storage.as_ref().unwrap().info().request_alignment, 1);
}

/// An image that was opened for reading has to be opened anew to be written.
#[test]
fn what_was_opened_for_reading_is_written() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("top.qcow2", 3, Some("base.qcow2"));
    let file = json!({"driver": "file", "node-name": "f", "filename": client.path("top.qcow2")});
    client
        .run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file, "read-only": true}));
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    tap.write_at(&[9], 0, WriteFlags::NONE).unwrap_err();
    let backing = client.backing("top").unwrap();
    let text =
        client.cannot_reopen(json!({"driver": "qcow2", "node-name": "f", "file": "f", "backing": null}));
    assert_eq!(text, "Cannot change the option 'driver'");
    client.reopen(json!({"driver": "qcow2", "node-name": "top", "file": "f", "backing": backing})).unwrap();
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.blocks("top"), [1, 3, 4]);
    client.run("blockdev-del", json!({"node-name": "top"}));
    client.add("again", "top.qcow2", Value::Null);
    assert_eq!(client.blocks("again"), [3, 4]);
}

#[test]
fn an_image_is_put_on_another_backing_file() {
    let mut client = Client::new();
    client.chain_of_files();
    client.image("other.qcow2", 7, None);
    client.add("other", "other.qcow2", Value::Null);
    client.reopen(top(json!({"backing": "other"}))).unwrap();
    assert_eq!((client.backing("top").as_deref(), client.blocks("top")), (Some("other"), vec![3, 7]));
    // The two change places in one go.
    client
        .reopen(json!([
            top(json!({"backing": null})),
            {"driver": "qcow2", "node-name": "other", "file": client.daemon.services.context.graph.lock().children("other").next().unwrap().1.name, "backing": "top"},
        ]))
        .unwrap();
    assert_eq!((client.backing("top"), client.blocks("top")), (None, vec![3]));
    assert_eq!(client.blocks("other"), [3, 7]);
    let text = client.cannot_reopen(top(json!({"backing": "other"})));
    assert_eq!(text, "Making 'other' a backing child of 'top' would create a cycle");
    client.run("blockdev-del", json!({"node-name": "mid"}));
    let text = client.refused("blockdev-del", json!({"node-name": "top"}));
    assert_eq!(text, "Node 'top' is busy: node is used as backing hd of 'other'");
}

/// A backing file that came with the image goes when the image no longer stands on it.
#[test]
fn a_backing_file_that_came_along_is_closed() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("top.qcow2", 3, Some("base.qcow2"));
    let file = json!({"driver": "file", "node-name": "top-file", "filename": client.path("top.qcow2")});
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
    client.reopen(top(json!({"backing": null}))).unwrap();
    assert_eq!(client.daemon.services.context.graph.lock().nodes().len(), 2);
    client.add("base", "base.qcow2", Value::Null);
}

#[test]
fn a_chain_that_a_job_works_on_stays() {
    let mut client = Client::new();
    client.chain_of_files();
    client.run("block-stream", json!({"job-id": "s", "device": "top", "auto-finalize": false}));
    client.wait("BLOCK_JOB_PENDING");
    let text = client.cannot_reopen(top(json!({"backing": null})));
    assert_eq!(text, "Cannot change frozen 'backing' link from 'top' to 'mid'");
    client.reopen(top(json!({"discard": "unmap"}))).unwrap();
}

/// A guest writes all the time: no request fails, and what it wrote is there, wherever it went.
#[test]
fn a_guest_that_writes_notices_nothing() {
    let mut client = Client::new();
    client.chain_of_files();
    for name in ["a", "b"] {
        let path = client.path(name);
        std::fs::write(&path, vec![0; SIZE as usize]).unwrap();
        client.run("blockdev-add", json!({"driver": "file", "node-name": name, "filename": path}));
    }
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "a"}));
    let taps = ["top", "r"]
        .map(|name| Arc::clone(&client.daemon.services.context.graph.lock().find(name).unwrap().tap));
    let over = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut round = 0_u8;
            loop {
                let last = over.load(Ordering::Relaxed);
                round = round % 200 + 1;
                for tap in &taps {
                    tap.write_at(&[round; 512], 4 << 16, WriteFlags::NONE).unwrap();
                    let mut read = [0; 512];
                    tap.read_at(&mut read, 4 << 16).unwrap();
                    // Behind a raw node there is another file from one moment to the next.
                    assert!(read == [round; 512] || Arc::ptr_eq(tap, &taps[1]));
                }
                if last {
                    return round;
                }
            }
        });
        for round in 0..50 {
            let (discard, backing) =
                if round % 2 == 0 { ("unmap", json!("base")) } else { ("ignore", json!("mid")) };
            let file = if round % 2 == 0 { "b" } else { "a" };
            client
                .reopen(json!([
                    top(json!({"discard": discard, "backing": backing})),
                    {"driver": "raw", "node-name": "r", "file": file},
                ]))
                .unwrap();
        }
        over.store(true, Ordering::Relaxed);
        guest.join().unwrap()
    });
    for (tap, at) in taps.iter().zip(["top", "r"]) {
        let mut read = [0; 512];
        tap.read_at(&mut read, 4 << 16).unwrap();
        assert!(read == [written; 512], "{at}");
    }
    client.run("blockdev-del", json!({"node-name": "r"}));
    assert_eq!(std::fs::read(client.path("a")).unwrap()[4 << 16], written);
}

/// Options inside of options were answered with success and left out, or refused where QEMU takes them.
#[test]
fn options_of_a_child_that_is_described_are_its_own() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("top.qcow2", 3, Some("base.qcow2"));
    let file = |client: &Client, name: &str, more: Value| {
        let mut file = json!({"driver": "file", "filename": client.path(name)});
        for (key, value) in more.as_object().unwrap() {
            file[key] = value.clone();
        }
        file
    };
    let plain = file(&client, "top.qcow2", json!({}));
    let base =
        json!({"driver": "qcow2", "node-name": "base", "file": file(&client, "base.qcow2", json!({}))});
    let node = |file: &Value, base: &Value| json!({"driver": "qcow2", "node-name": "top", "file": file, "backing": base});
    client.run("blockdev-add", node(&plain, &base));
    let file_node = {
        let graph = client.daemon.services.context.graph.lock();
        graph.children("top").find(|(role, _)| *role == "file").unwrap().1.name.clone()
    };
    // Each takes effect, and its default comes back.
    let detecting = file(&client, "top.qcow2", json!({"detect-zeroes": "on", "cache": {"no-flush": true}}));
    client.reopen(node(&detecting, &base)).unwrap();
    let shown = client.node(&file_node);
    assert_eq!((&shown["detect_zeroes"], &shown["cache"]["no-flush"]), (&json!("on"), &json!(true)));
    client.reopen(node(&plain, &base)).unwrap();
    let shown = client.node(&file_node);
    assert_eq!((&shown["detect_zeroes"], &shown["cache"]["no-flush"]), (&json!("off"), &json!(false)));
    let mut other = base.clone();
    other["detect-zeroes"] = json!("on");
    client.reopen(node(&plain, &other)).unwrap();
    assert_eq!(client.node("base")["detect_zeroes"], "on");
    client.reopen(node(&plain, &base)).unwrap();

    let cases = [
        (node(&file(&client, "base.qcow2", json!({})), &base), "Cannot change the option 'filename'"),
        (
            node(&file(&client, "top.qcow2", json!({"node-name": "zz"})), &base),
            "Cannot change the option 'node-name'",
        ),
        (
            node(&file(&client, "top.qcow2", json!({"locking": "off"})), &base),
            "Cannot change the option 'locking'",
        ),
        (
            node(&file(&client, "top.qcow2", json!({"read-only": true})), &base),
            "cannot support read-write users",
        ),
        (node(&plain, &json!({"driver": "null-co"})), "Cannot change the option 'driver'"),
    ];
    for (options, wanted) in cases {
        let text = client.cannot_reopen(options);
        assert!(text.contains(wanted), "{text}");
    }
    // Both become read-only, and the image is not written again while its file stays so.
    let mut reading = node(&file(&client, "top.qcow2", json!({"read-only": true})), &base);
    reading["read-only"] = json!(true);
    client.reopen(reading.clone()).unwrap();
    assert!(client.node("top")["ro"].as_bool().unwrap() && client.node(&file_node)["ro"].as_bool().unwrap());
    reading["read-only"] = json!(false);
    assert_eq!(client.cannot_reopen(reading), "Block node is read-only");
    client.reopen(node(&plain, &base)).unwrap();
    assert!(
        !client.node("top")["ro"].as_bool().unwrap() && !client.node(&file_node)["ro"].as_bool().unwrap()
    );
    assert_eq!(client.blocks("top"), [1, 3]);
}

/// A node of its own is not described again.
#[test]
fn a_child_with_a_name_is_not_described() {
    let mut client = Client::new();
    client.chain_of_files();
    let file = json!({"driver": "file", "node-name": "top-file", "filename": client.path("top.qcow2")});
    let text =
        client.cannot_reopen(json!({"driver": "qcow2", "node-name": "top", "file": file, "backing": "mid"}));
    assert_eq!(text, "Cannot change the option 'file.driver'");
    let text = client.cannot_reopen(top(json!({"backing": {"driver": "null-co"}})));
    assert_eq!(text, "Cannot change the option 'backing.driver'");
}

/// It was accepted for an image whose header names none.
#[test]
fn an_attached_backing_file_has_to_be_given() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("alone.qcow2", 3, None);
    client.add("base", "base.qcow2", Value::Null);
    client.add("alone", "alone.qcow2", json!("base"));
    let file = json!({"driver": "file", "filename": client.path("alone.qcow2")});
    let text = client.cannot_reopen(json!({"driver": "qcow2", "node-name": "alone", "file": file}));
    assert_eq!(text, "backing is missing for 'alone'");
    assert_eq!(client.blocks("alone"), [1, 3]);
}
