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

    fn close_disks(&mut self) {
        for node in ["s", "t"] {
            self.run("blockdev-del", json!({"node-name": node}));
        }
    }

    fn reopen_disks(&mut self) {
        self.close_disks();
        self.open_disks();
    }

    /// Another daemon, which finds the files as `kill -9` of this one would leave them: the log says that its
    /// job runs.
    fn killed(mut self) -> Self {
        let log = fs::read(self.path("log")).unwrap();
        self.finish("job-cancel");
        self.close_disks();
        fs::write(self.path("log"), log).unwrap();
        let mut next = Self::new();
        std::mem::swap(&mut next.dir, &mut self.dir);
        next
    }

    /// Such another one, after a mirror that was ready, with a region marked.
    fn after_kill() -> Self {
        let mut client = Self::new();
        client.open_disks();
        assert_eq!(client.mirrored(), LEN);
        client.guest_writes(3);
        client.killed()
    }

    /// The mirror is refused, as its log has ended.
    fn refuses_ended(&mut self) {
        let args = self.args();
        let (text, log) = (self.refused("blockdev-mirror", args), self.path("log"));
        assert!(text.starts_with(&format!("Cannot use the log '{}': it has ended", log.display())), "{text}");
    }

    fn concluded(&mut self, options: Value) {
        self.run("blockdev-create", json!({"job-id": "c", "options": options}));
        self.wait_for_status("concluded");
        self.run("job-dismiss", json!({"id": "c"}));
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
fn a_mirror_goes_on_with_what_was_marked() {
    let mut client = Client::after_kill();
    client.open_disks();
    assert_eq!(client.mirrored(), MIB);
    assert!(client.is_equal());
    client.guest_writes(6);
    let mut client = client.killed();
    client.open_disks();
    // What was written lately stays marked.
    assert_eq!(client.mirrored(), MIB);
    assert!(client.is_equal());
}

#[test]
fn a_source_that_was_written_without_the_log_differs_everywhere() {
    for closes in [false, true] {
        let mut client = Client::after_kill();
        client.open_disks();
        client.guest_writes(5);
        if closes {
            // Nodes that are opened anew know nothing of it.
            client.reopen_disks();
        }
        assert_eq!(client.mirrored(), LEN);
        assert!(client.is_equal());
    }
}

/// The second half of the target is zeros.
#[test]
fn a_disk_that_was_cut_differs_everywhere() {
    let mut client = Client::after_kill();
    client.open_disks();
    client.run("block_resize", json!({"node-name": "t", "size": LEN / 2}));
    client.run("block_resize", json!({"node-name": "t", "size": LEN}));
    assert_eq!(client.mirrored(), LEN);
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
        client.concluded(json!({"driver": "qcow2", "file": "i", "size": LEN}));
        client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "t", "file": "i"}));
        assert_eq!(client.mirrored(), LEN);
        client = client.killed();
    }
}

#[test]
fn a_file_that_was_made_anew_is_another_one() {
    let mut client = Client::after_kill();
    fs::remove_file(client.path("t")).unwrap();
    client.open_disks();
    let args = client.args();
    let text = client.refused("blockdev-mirror", args);
    assert!(text.ends_with("it is the log of another mirror (target)"), "{text}");
}

/// From then on the disks are written without it.
#[test]
fn the_log_of_a_job_that_is_over_is_refused() {
    for command in ["job-cancel", "block-job-cancel", "job-complete"] {
        let mut client = Client::new();
        client.open_disks();
        client.mirrored();
        client.finish(command);
        if command != "job-complete" {
            client.refuses_ended();
            client.run("block_resize", json!({"node-name": "s", "size": LEN}));
        }
        client.reopen_disks();
        client.refuses_ended();
        fs::remove_file(client.path("log")).unwrap();
        assert_eq!(client.mirrored(), LEN);
    }
}

/// What the guest has written to the target since would be lost.
#[test]
fn a_log_is_refused_after_the_pivot_of_another_job() {
    let mut client = Client::new();
    client.open_disks();
    client.mirrored();
    client.finish("job-cancel");
    client.guest_writes(2);
    client.run("blockdev-mirror", json!({"job-id": "m", "device": "s", "target": "t", "sync": "full"}));
    client.wait("BLOCK_JOB_READY");
    client.finish("job-complete");
    client.reopen_disks();
    client.refuses_ended();
}

/// A log was emptied because it could not be written: no new one.
#[test]
fn a_log_without_contents_is_refused() {
    let mut client = Client::new();
    client.open_disks();
    fs::write(client.path("log"), b"").unwrap();
    let args = client.args();
    let text = client.refused("blockdev-mirror", args);
    assert!(text.contains("it was given up, or never begun"), "{text}");
    assert_eq!(fs::read(client.path("log")).unwrap(), b"");
}

/// The daemon was killed while it made the log, before it had begun the mirror.
#[test]
fn a_log_whose_creation_was_interrupted_is_made_anew() {
    let mut client = Client::new();
    client.open_disks();
    for len in [8, 1 << 19] {
        let mut contents = b"BMCKPT\r\n".to_vec();
        contents.resize(len, 0);
        fs::write(client.path("log"), &contents).unwrap();
        assert_eq!(client.mirrored(), LEN);
        assert!(client.is_equal());
        client.finish("job-cancel");
    }
    // One that has lost its headers is another thing.
    let mut contents = fs::read(client.path("log")).unwrap();
    for at in [100, 4196] {
        contents[at] ^= 1;
    }
    fs::write(client.path("log"), &contents).unwrap();
    let args = client.args();
    let text = client.refused("blockdev-mirror", args);
    assert!(text.ends_with("the checkpoint is damaged: a header"), "{text}");
}

#[test]
fn a_log_is_of_one_source_and_one_target() {
    let mut client = Client::after_kill();
    client.open_disks();
    fs::write(client.path("u"), vec![0; LEN as usize]).unwrap();
    let file = json!({"driver": "file", "filename": client.path("u")});
    client.run("blockdev-add", json!({"driver": "raw", "node-name": "u", "file": file}));
    let mut other = client.args();
    other["target"] = json!("u");
    let shown = client.path("log").display().to_string();
    let wanted = format!("Cannot use the log '{shown}': it is the log of another mirror (target)");
    assert_eq!(client.refused("blockdev-mirror", other), wanted);
    // It is left as it was.
    assert_eq!(client.mirrored(), MIB);
}

/// It has started no mirror, and all is marked.
#[test]
fn a_log_can_be_used_after_a_transaction_that_failed() {
    let mut client = Client::new();
    client.open_disks();
    let actions = json!([{"type": "blockdev-mirror", "data": client.args()}, {"type": "abort", "data": {}}]);
    client.refused("transaction", json!({"actions": actions}));
    assert_eq!(client.mirrored(), LEN);
    assert!(client.is_equal());
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
    reopen(&mut client).unwrap();
}
