//! Jobs that stopped at a failed flush of their target go on.

use std::fs::{self, File};
use std::path::Path;

use blockmirror_block::{ByteRange, ZeroFlags};

use super::host::{Loop, Mount, qemu_check};
use super::*;

impl Client {
    /// Waits for the first of some events, and says which it is.
    fn wait_for_one(&mut self, names: &[&str]) -> Value {
        loop {
            let found = self.events.iter().position(|e| names.iter().any(|name| e["event"] == **name));
            if let Some(index) = found {
                return self.events.drain(..=index).next_back().unwrap();
            }
            let next = self.read();
            self.events.push(next);
        }
    }

    /// Waits for `event`, and resumes the job `m` whenever an error stops it before. How often that was.
    fn wait_and_resume(&mut self, event: &str, resume: &str) -> u32 {
        for stopped in 0.. {
            let next = self.wait_for_one(&[event, "BLOCK_JOB_ERROR"]);
            if next["event"] == event {
                assert!(next["data"].get("error").is_none(), "{next}");
                return stopped;
            }
            assert_eq!(next["data"]["action"], "stop", "{next}");
            assert!(stopped < 3, "{next}");
            let key = if resume == "job-resume" { "id" } else { "device" };
            self.run(resume, json!({key: "m"}));
        }
        unreachable!()
    }

    fn bytes(&self, node: &str) -> Vec<u8> {
        let device = Arc::clone(&self.daemon.services.context.graph.lock().find(node).unwrap().device);
        let mut bytes = vec![0; SIZE as usize];
        device.read_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// Each flush of the target's file finds no space once, at the first pass, at the end of the job, and in a
/// commit. (A qcow2 target refused all writes from then on, and the job could only be given up.)
#[test]
fn a_job_goes_on_after_a_flush_that_found_no_space() {
    for (command, resume) in [
        ("blockdev-mirror", "block-job-resume"),
        ("blockdev-mirror", "job-resume"),
        ("block-commit", "job-resume"),
    ] {
        let mut stops = 0;
        for failing in 1..6 {
            let case = format!("{command}, flush {failing}");
            let mut client = Client::new();
            let commits = command == "block-commit";
            if commits {
                client.image("base.qcow2", 1, None);
                client.image("t.qcow2", 9, Some("base.qcow2"));
                client.image("over.qcow2", 4, Some("t.qcow2"));
                client.add("base", "base.qcow2", Value::Null);
            } else {
                client.chain();
                client.image("t.qcow2", 9, None);
            }
            let states: Vec<_> = (1..failing)
                .map(|state| json!({"event": "flush_to_disk", "state": state, "new_state": state + 1}))
                .collect();
            let fault = json!([{"event": "flush_to_disk", "state": failing, "errno": 28, "once": true}]);
            let file = json!({
                "driver": "blkdebug", "set-state": states, "inject-error": fault,
                "image": {"driver": "file", "filename": client.path("t.qcow2")},
            });
            let backing = if commits { json!("base") } else { Value::Null };
            client.run(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": "t", "file": file, "backing": backing}),
            );
            let args = if commits {
                client.add("over", "over.qcow2", json!("t"));
                json!({"job-id": "m", "device": "over", "base-node": "t", "on-error": "stop"})
            } else {
                json!({
                    "job-id": "m", "device": "top", "target": "t", "sync": "full",
                    "on-target-error": "enospc", "copy-mode": "write-blocking",
                })
            };
            let source = args["device"].as_str().unwrap().to_owned();
            let tap = Arc::clone(&client.daemon.services.context.graph.lock().find(&source).unwrap().tap);
            client.run(command, args);
            let early = client.wait_and_resume("BLOCK_JOB_READY", resume);
            tap.write_at(&[5; 100_000], (5 << 16) + 700, WriteFlags::NONE).unwrap();
            tap.write_zeroes(ByteRange::new(3 << 16, (3 << 16) + 5000), ZeroFlags::MAY_UNMAP).unwrap();
            client.run("job-complete", json!({"id": "m"}));
            let late = client.wait_and_resume("BLOCK_JOB_COMPLETED", resume);
            stops += early + late;
            assert!(client.bytes("t") == client.bytes(&source), "{case}");
            // After the pivot the guest's own flush may be the one that fails.
            if early + late == 0 {
                continue;
            }
            tap.write_at(&[6; 512], 6 << 16, WriteFlags::NONE).unwrap();
            tap.flush().unwrap();
            let wanted = client.bytes("t");
            drop(tap);
            client.run("blockdev-del", json!({"node-name": source}));
            client.run("blockdev-del", json!({"node-name": "t"}));
            qemu_check(&client.path("t.qcow2"), &case);
            client.add("again", "t.qcow2", backing);
            assert!(client.bytes("again") == wanted, "{case}: after it was opened again");
        }
        assert!(stops >= 2, "{command}: {stops} flushes failed");
    }
}

/// A loop device over a file that finds no space: what was written is gone from the page cache after the
/// failed flush.
#[test]
fn what_a_full_disk_has_lost_is_written_again() {
    for format in ["raw", "qcow2"] {
        let mut client = Client::new();
        let source: Vec<u8> = (0..SIZE).map(|at| (at / 4096) as u8 | 1).collect();
        fs::write(client.path("source"), &source).unwrap();
        let path = client.path("source");
        client.run("blockdev-add", json!({"driver": "file", "node-name": "s", "filename": path}));
        fs::create_dir(client.path("small")).unwrap();
        let Some(small) = Mount::new("-osize=600k", Path::new("tmpfs"), client.path("small")) else { return };
        let file = client.path("small/disk");
        File::create(&file).unwrap().set_len(4 * SIZE).unwrap();
        let Some(device) = Loop::new(&file) else { return };
        client.run("blockdev-add", json!({"driver": "host_device", "node-name": "d", "filename": device.0}));
        if format == "qcow2" {
            let create = json!({"driver": "qcow2", "file": "d", "size": SIZE});
            client.run("blockdev-create", json!({"job-id": "c", "options": create}));
            client.wait_for_status("concluded");
            client.run("job-dismiss", json!({"id": "c"}));
            client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "t", "file": "d"}));
        } else {
            fs::write(client.path("source"), source.repeat(4)).unwrap();
            client.run("blockdev-del", json!({"node-name": "s"}));
            let path = client.path("source");
            client.run("blockdev-add", json!({"driver": "file", "node-name": "s", "filename": path}));
            client.run("blockdev-add", json!({"driver": "raw", "node-name": "t", "file": "d"}));
        }
        let mirror = json!({
            "job-id": "m", "device": "s", "target": "t", "sync": "full", "on-target-error": "stop",
        });
        client.run("blockdev-mirror", mirror);
        assert_eq!(client.wait("BLOCK_JOB_ERROR")["action"], "stop", "{format}");
        // As long as there is no room it stops again, at once.
        client.run("job-resume", json!({"id": "m"}));
        assert_eq!(client.wait("BLOCK_JOB_ERROR")["action"], "stop", "{format}");
        small.resize("16M");
        // It may have to be resumed once more, for what was in flight.
        client.run("job-resume", json!({"id": "m"}));
        client.wait_and_resume("BLOCK_JOB_READY", "job-resume");
        client.run("block-job-cancel", json!({"device": "m"}));
        assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none(), "{format}");
        assert!(client.bytes("t") == source, "{format}");
        client.run("blockdev-del", json!({"node-name": "t"}));
        client.run("blockdev-del", json!({"node-name": "d"}));
        // Behind the device, past every cache of it.
        let stored = fs::read(&file).unwrap();
        if format == "qcow2" {
            qemu_check(&file, "what the loop device has stored");
            fs::write(client.path("copy.qcow2"), stored).unwrap();
            client.add("copy", "copy.qcow2", Value::Null);
            assert!(client.bytes("copy") == source, "{format}: as it is stored");
        } else {
            assert!(stored == source.repeat(4), "{format}: as it is stored");
        }
    }
}

/// A file system that is full, and is made larger while the job waits.
#[test]
fn a_job_goes_on_when_its_file_system_has_grown() {
    for format in ["raw", "qcow2"] {
        let mut client = Client::new();
        client.chain();
        let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
        tap.write_at(&[7; 700_000], 4 << 16, WriteFlags::NONE).unwrap();
        fs::create_dir(client.path("small")).unwrap();
        let Some(small) = Mount::new("-osize=400k", Path::new("tmpfs"), client.path("small")) else { return };
        let target = client.path("small/t");
        let create = json!({
            "job-id": "m", "device": "top", "sync": "full", "format": format, "target": target,
            "on-target-error": "enospc", "node-name": "t",
        });
        client.run("drive-mirror", create);
        assert_eq!(client.wait("BLOCK_JOB_ERROR")["action"], "stop", "{format}");
        while client.run("query-block-jobs", json!({}))[0]["busy"] == true {}
        assert_eq!(client.run("query-block-jobs", json!({}))[0]["io-status"], "nospace", "{format}");
        small.resize("16M");
        client.run("block-job-resume", json!({"device": "m"}));
        client.wait("BLOCK_JOB_READY");
        assert!(client.bytes("t") == client.bytes("top"), "{format}");
        client.run("block-job-cancel", json!({"device": "m"}));
        assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none(), "{format}");
        if format == "qcow2" {
            qemu_check(&target, format);
        }
    }
}
