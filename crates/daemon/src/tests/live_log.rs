//! `x-log`: which log is gone on with, and when it is not believed. That it survives `kill -9` is tested with
//! a process of its own.

use std::fs;

use super::*;

const MIB: u64 = 1 << 20;
const LEN: u64 = 8 * MIB;

impl Client {
    /// Nodes `s` and `t` on raw files that are there; the source is full.
    fn open_disks(&mut self) {
        for (node, byte) in [("s", 7), ("t", 0)] {
            if !self.path(node).exists() {
                fs::write(self.path(node), vec![byte; LEN as usize]).unwrap();
            }
            let file = json!({"driver": "file", "filename": self.path(node)});
            self.run("blockdev-add", json!({"driver": "raw", "node-name": node, "file": file}));
        }
    }

    /// As a restart of the daemon would: what the nodes were is forgotten.
    fn reopen_disks(&mut self) {
        for node in ["s", "t"] {
            self.run("blockdev-del", json!({"node-name": node}));
        }
        self.open_disks();
    }

    fn args(&self) -> Value {
        json!({"job-id": "m", "device": "s", "target": "t", "sync": "full", "x-log": self.path("log")})
    }

    /// Starts the mirror; the bytes that it has looked at when it is ready.
    fn mirrored(&mut self) -> u64 {
        let args = self.args();
        self.run("blockdev-mirror", args);
        self.wait("BLOCK_JOB_READY")["offset"].as_u64().unwrap()
    }

    fn finish(&mut self, command: &str) {
        let key = if command.starts_with("block-") { "device" } else { "id" };
        self.run(command, json!({key: "m"}));
        self.wait_for_status("null");
    }

    fn guest_writes(&self, region: u64) {
        let tap = Arc::clone(&self.daemon.services.context.graph.lock().find("s").unwrap().tap);
        tap.write_at(&[9; 100], region * MIB + 50, WriteFlags::NONE).unwrap();
    }

    fn is_equal(&self) -> bool {
        fs::read(self.path("s")).unwrap() == fs::read(self.path("t")).unwrap()
    }
}

#[test]
fn a_mirror_goes_on_with_what_was_written_since() {
    for command in ["block-job-cancel", "job-cancel"] {
        let mut client = Client::new();
        client.open_disks();
        assert_eq!(client.mirrored(), LEN);
        client.finish(command);
        // The guest goes on, and the log with it: for another mirror now, and for one after a restart.
        client.guest_writes(3);
        assert_eq!(client.mirrored(), MIB, "{command}");
        assert!(client.is_equal());
        client.finish(command);
        client.guest_writes(6);
        client.guest_writes(7);
        client.reopen_disks();
        // What was written lately stays marked.
        assert_eq!(client.mirrored(), 3 * MIB, "{command}");
        client.finish("job-cancel");
        assert!(client.is_equal());
    }
}

#[test]
fn a_source_that_was_written_without_the_log_differs_everywhere() {
    for closes in [false, true] {
        let mut client = Client::new();
        client.open_disks();
        client.mirrored();
        client.finish("job-cancel");
        client.reopen_disks();
        client.guest_writes(5);
        if closes {
            // Nodes that are opened anew know nothing of it.
            client.reopen_disks();
        }
        assert_eq!(client.mirrored(), LEN);
        assert!(client.is_equal());
    }
}

/// By a process that is killed then; the next one finds an empty file in place of the log.
#[test]
fn a_log_is_emptied_before_others_write_to_the_target() {
    let mut client = Client::new();
    client.open_disks();
    client.mirrored();
    client.finish("job-cancel");
    let len = |client: &Client| fs::metadata(client.path("log")).unwrap().len();
    assert!(len(&client) > 0);
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("t").unwrap().tap);
    tap.write_at(&[1], 0, WriteFlags::NONE).unwrap();
    assert_eq!(len(&client), 0);
    // The source is closed when it happens.
    client.mirrored();
    client.finish("job-cancel");
    client.run("blockdev-del", json!({"node-name": "s"}));
    assert!(len(&client) > 0);
    tap.write_at(&[1], 0, WriteFlags::NONE).unwrap();
    assert_eq!(len(&client), 0);
}

/// An emptied log is no new one: the target has been written.
#[test]
fn what_is_promised_of_the_target_is_not_believed_with_an_empty_log() {
    let mut client = Client::new();
    fs::write(client.path("s"), vec![0; LEN as usize]).unwrap();
    fs::write(client.path("t"), vec![5; LEN as usize]).unwrap();
    fs::write(client.path("log"), []).unwrap();
    client.open_disks();
    let mut args = client.args();
    args["target-is-zero"] = json!(true);
    client.run("blockdev-mirror", args);
    client.wait("BLOCK_JOB_READY");
    assert!(client.is_equal());
}

#[test]
fn an_image_that_is_made_in_the_target_is_another_target() {
    let mut client = Client::new();
    fs::write(client.path("s"), vec![7; LEN as usize]).unwrap();
    fs::write(client.path("i"), []).unwrap();
    for _ in 0..2 {
        let (source, image) = (client.path("s"), client.path("i"));
        let file = json!({"driver": "file", "filename": source});
        client.run("blockdev-add", json!({"driver": "raw", "node-name": "s", "file": file}));
        client.run("blockdev-add", json!({"driver": "file", "node-name": "i", "filename": image}));
        let made = json!({"driver": "qcow2", "file": "i", "size": LEN});
        client.run("blockdev-create", json!({"job-id": "c", "options": made}));
        client.wait_for_status("concluded");
        client.run("job-dismiss", json!({"id": "c"}));
        client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "t", "file": "i"}));
        assert_eq!(client.mirrored(), LEN);
        client.finish("job-cancel");
        for node in ["s", "t", "i"] {
            client.run("blockdev-del", json!({"node-name": node}));
        }
    }
}

#[test]
fn a_file_that_was_made_anew_is_another_one() {
    let mut client = Client::new();
    client.open_disks();
    client.mirrored();
    client.finish("job-cancel");
    for node in ["s", "t"] {
        client.run("blockdev-del", json!({"node-name": node}));
    }
    fs::remove_file(client.path("t")).unwrap();
    client.open_disks();
    let args = client.args();
    let text = client.refused("blockdev-mirror", args);
    assert!(text.ends_with("it is the log of another mirror (target)"), "{text}");
}

/// The target is written without the log.
#[test]
fn a_mirror_without_the_log_to_its_target_empties_it() {
    let mut client = Client::new();
    client.open_disks();
    client.mirrored();
    client.finish("job-cancel");
    client.guest_writes(2);
    client.run("blockdev-mirror", json!({"job-id": "m", "device": "s", "target": "t", "sync": "full"}));
    client.wait("BLOCK_JOB_READY");
    assert_eq!(fs::metadata(client.path("log")).unwrap().len(), 0);
    client.finish("job-complete");
}

#[test]
fn a_target_that_others_have_written_differs_everywhere() {
    let mut client = Client::new();
    client.open_disks();
    client.mirrored();
    client.finish("job-cancel");
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("t").unwrap().tap);
    tap.write_at(&[1], 0, WriteFlags::NONE).unwrap();
    assert_eq!(client.mirrored(), LEN);
    assert!(client.is_equal());
}

#[test]
fn after_a_pivot_the_log_is_refused() {
    let mut client = Client::new();
    client.open_disks();
    client.mirrored();
    client.finish("job-complete");
    for node in ["s", "t"] {
        client.run("blockdev-del", json!({"node-name": node}));
    }
    client.open_disks();
    let args = client.args();
    let text = client.refused("blockdev-mirror", args);
    assert!(text.contains("which is newer than the source now"), "{text}");
    fs::remove_file(client.path("log")).unwrap();
    assert_eq!(client.mirrored(), LEN);
}

#[test]
fn a_log_is_of_one_source_and_one_target() {
    let mut client = Client::new();
    client.open_disks();
    client.mirrored();
    client.finish("job-cancel");
    fs::write(client.path("u"), vec![0; LEN as usize]).unwrap();
    let file = json!({"driver": "file", "filename": client.path("u")});
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "u", "file": file}));
    let mut other = client.args();
    other["target"] = json!("u");
    let shown = client.path("log").display().to_string();
    let wanted = format!("Cannot use the log '{shown}': it is the log of another mirror (target)");
    assert_eq!(client.refused("blockdev-mirror", other.clone()), wanted);
    // Read from the file, too.
    client.run("blockdev-del", json!({"node-name": "s"}));
    let file = json!({"driver": "file", "filename": client.path("s")});
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "s", "file": file}));
    assert_eq!(client.refused("blockdev-mirror", other), wanted);
    // The target was written since it was opened: that it was by a mirror with the log went with the source.
    assert_eq!(client.mirrored(), LEN);
    client.finish("job-cancel");
    let mut second = client.args();
    second["x-log"] = json!(client.path("second"));
    let text = client.refused("blockdev-mirror", second);
    assert_eq!(text, format!("s has the log {shown}"));
}

#[test]
fn what_is_no_log_is_refused_and_left_alone() {
    let mut client = Client::new();
    client.open_disks();
    fs::write(client.path("log"), b"something else").unwrap();
    let args = client.args();
    let text = client.refused("blockdev-mirror", args.clone());
    assert!(text.ends_with("it is no checkpoint"), "{text}");
    assert_eq!(fs::read(client.path("log")).unwrap(), b"something else");
    let mut source = args.clone();
    source["x-log"] = json!(client.path("s"));
    let text = client.refused("blockdev-mirror", source);
    assert!(text.contains("lock"), "{text}");
    fs::remove_file(client.path("log")).unwrap();
    std::os::unix::fs::symlink(client.path("nowhere/log"), client.path("log")).unwrap();
    client.refused("blockdev-mirror", args.clone());
    let mut none = args;
    none["sync"] = json!("none");
    assert_eq!(client.refused("blockdev-mirror", none), "sync mode 'none' does not use a log");
}

#[test]
fn nothing_is_durable_without_flushes() {
    let mut client = Client::new();
    fs::write(client.path("s"), [0; 4096]).unwrap();
    fs::write(client.path("t"), [0; 4096]).unwrap();
    for (node, no_flush) in [("s", false), ("t", true)] {
        let file = json!({"driver": "file", "filename": client.path(node)});
        let cache = json!({"no-flush": no_flush});
        client.run("blockdev-add", json!({"driver": "raw", "node-name": node, "file": file, "cache": cache}));
    }
    let args = client.args();
    let text = client.refused("blockdev-mirror", args);
    assert!(text.ends_with("a node with cache.no-flush has nothing durable"), "{text}");
    assert!(!client.path("log").exists());
}

#[test]
fn flushes_are_not_turned_off_under_a_log() {
    let mut client = Client::new();
    client.open_disks();
    let reopen = |client: &mut Client| {
        let file = json!({"driver": "file", "filename": client.path("t")});
        let cache = json!({"no-flush": true});
        let options = json!({"driver": "raw", "node-name": "t", "file": file, "cache": cache});
        client.ask("blockdev-reopen", json!({"options": [options]}))
    };
    client.mirrored();
    assert_eq!(reopen(&mut client).unwrap_err(), "Cannot change the option 'cache.no-flush'");
    client.finish("job-cancel");
    assert_eq!(reopen(&mut client).unwrap_err(), "Cannot change the option 'cache.no-flush'");
}

/// The log would not see it.
#[test]
fn a_source_that_a_job_fills_loses_its_log() {
    let mut client = Client::new();
    client.open_disks();
    client.mirrored();
    client.finish("job-cancel");
    assert!(fs::metadata(client.path("log")).unwrap().len() > 0);
    fs::write(client.path("u"), vec![5; LEN as usize]).unwrap();
    let file = json!({"driver": "file", "filename": client.path("u")});
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "u", "file": file}));
    client.run("blockdev-mirror", json!({"job-id": "m", "device": "u", "target": "s", "sync": "full"}));
    client.wait("BLOCK_JOB_READY");
    assert_eq!(fs::metadata(client.path("log")).unwrap().len(), 0);
    client.finish("job-cancel");
    assert_eq!(client.mirrored(), LEN);
    assert!(client.is_equal());
}

#[test]
fn a_disk_with_a_log_keeps_its_length() {
    let mut client = Client::new();
    client.open_disks();
    client.mirrored();
    client.finish("job-cancel");
    let text = client.refused("block_resize", json!({"node-name": "s", "size": 2 * LEN}));
    assert!(text.contains("has the log"), "{text}");
}

/// A transaction that fails has started no mirror; the log stays with the source, and is used by the next.
#[test]
fn a_log_can_be_used_after_a_transaction_that_failed() {
    let mut client = Client::new();
    client.open_disks();
    let actions = json!([{"type": "blockdev-mirror", "data": client.args()}, {"type": "abort", "data": {}}]);
    client.refused("transaction", json!({"actions": actions}));
    assert_eq!(client.mirrored(), LEN);
    assert!(client.is_equal());
}
