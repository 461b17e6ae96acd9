//! Commands of the daemon beside QEMU's storage daemon and its tools: the same refusals, and images that are
//! whole however it ends. Skipped, visibly, without them (Debian: qemu-utils, fio).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::common::world::World;
use blockmirror_testing::qemu::{Qemu, have};
use blockmirror_testing::scratch::scratch;
use serde_json::{Value, json};

fn qcow2(dir: &Path, node: &str, file: &str) -> String {
    format!("driver=qcow2,node-name={node},file.driver=file,file.filename={}", dir.join(file).display())
}

/// A client that writes and dies without flushing.
fn write_and_die(dir: &Path) {
    let uri = format!("nbd+unix:///disk?socket={}", dir.join("nbd").display());
    let died = Command::new("qemu-io")
        .args(["-t", "writeback", "-f", "raw", "-c", "write -P 5 1M 3M", "-c", "write -P 6 40M 64k"])
        .args(["-c", "sigraise 9", &uri])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(!died.success());
}

fn holds_all(qemu: Qemu, image: &Path) {
    qemu.check(image).unwrap();
    let read = qemu.io("qcow2", image, &["read -P 5 1M 3M", "read -P 6 40M 64k"]).unwrap();
    assert!(!read.contains("failed"), "{read}");
}

/// Metadata of an image waits in memory for a flush, which its user need not ask for. A node that was closed
/// without one lost what had been written, or kept its file locked.
#[test]
fn what_nobody_flushed_is_there_however_a_node_goes() {
    let Some(qemu) = Qemu::find("what_nobody_flushed_is_there_however_a_node_goes") else { return };
    for way in ["quit", "blockdev-del", "nbd-server-stop", "pivot", "pivot and blockdev-del"] {
        let dir = scratch().unwrap();
        let dir = dir.path();
        for name in ["disk", "copy"] {
            qemu.img_in(dir, ["create", "-q", "-f", "qcow2", &format!("{name}.qcow2"), "64M"]).unwrap();
        }
        let nodes = [qcow2(dir, "disk", "disk.qcow2"), qcow2(dir, "copy", "copy.qcow2")];
        let mut world = World::ours(dir, &nodes);
        write_and_die(dir);
        let (disk, copy) = (dir.join("disk.qcow2"), dir.join("copy.qcow2"));
        match way {
            "blockdev-del" => {
                world.must("block-export-del", json!({"id": "e", "mode": "hard"}));
                world.must("blockdev-del", json!({"node-name": "disk"}));
                // Before the daemon ends: the file is free, and whole.
                holds_all(qemu, &disk);
            }
            "nbd-server-stop" => {
                world.must("nbd-server-stop", json!({}));
                world.must("blockdev-del", json!({"node-name": "disk"}));
                holds_all(qemu, &disk);
            }
            "quit" => {}
            _ => {
                let mirror = json!({"job-id": "m", "device": "disk", "target": "copy", "sync": "full"});
                world.must("blockdev-mirror", mirror);
                world.wait_for("BLOCK_JOB_READY");
                world.must("job-complete", json!({"id": "m"}));
                world.wait_for_status("null");
                if way == "pivot and blockdev-del" {
                    world.must("blockdev-del", json!({"node-name": "disk"}));
                    holds_all(qemu, &disk);
                }
            }
        }
        world.end();
        holds_all(qemu, &disk);
        if way.starts_with("pivot") {
            holds_all(qemu, &copy);
        }
    }
}

/// base <- mid <- disk, each with a block of its own.
fn chain(qemu: Qemu, dir: &Path) {
    qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "base.qcow2", "64M"]).unwrap();
    for (image, below) in [("mid", "base.qcow2"), ("disk", "mid.qcow2")] {
        let name = format!("{image}.qcow2");
        qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", &name]).unwrap();
    }
    for (image, script) in
        [("base", "write -P 1 0 64k"), ("mid", "write -P 2 64k 64k"), ("disk", "write -P 3 128k 64k")]
    {
        qemu.io("qcow2", &dir.join(format!("{image}.qcow2")), &[script]).unwrap();
    }
}

/// Only the top is opened by name. What is committed, and written meanwhile, QEMU reads from the base, and
/// finds it clean.
#[test]
fn a_chain_is_committed_into_files_that_came_along() {
    let Some(qemu) = Qemu::find("a_chain_is_committed_into_files_that_came_along") else { return };
    let dir = scratch().unwrap();
    let dir = dir.path();
    chain(qemu, dir);
    let mut world = World::ours(dir, &[qcow2(dir, "disk", "disk.qcow2")]);
    let mid = dir.join("mid.qcow2");
    world.must("block-commit", json!({"job-id": "c", "device": "disk", "top": mid}));
    assert!(world.wait_for("BLOCK_JOB_COMPLETED").get("error").is_none());
    world.wait_for_status("null");
    world.must("block-commit", json!({"job-id": "c", "device": "disk"}));
    world.wait_for("BLOCK_JOB_READY");
    write_and_die(dir);
    world.must("job-complete", json!({"id": "c"}));
    world.wait_for_status("null");
    world.end();
    holds_all(qemu, &dir.join("base.qcow2"));
    let script = ["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 3 128k 64k"];
    for image in ["base", "disk"] {
        let image = dir.join(format!("{image}.qcow2"));
        qemu.check(&image).unwrap();
        let read = qemu.io("qcow2", &image, &script).unwrap();
        assert!(!read.contains("failed"), "{read}");
    }
    qemu.check(&mid).unwrap();
}

/// fio writes with checksums through the export while the options of its node change all the time: no request
/// fails, nothing is lost.
#[test]
fn a_client_writes_while_its_node_is_reopened() {
    let Some(qemu) = Qemu::find("a_client_writes_while_its_node_is_reopened") else { return };
    if !have("a_client_writes_while_its_node_is_reopened", &["fio"]) {
        return;
    }
    let dir = scratch().unwrap();
    let dir = dir.path();
    chain(qemu, dir);
    let file = format!("driver=file,node-name=f,filename={}", dir.join("disk.qcow2").display());
    let mid = qcow2(dir, "mid", "mid.qcow2") + ",read-only=on";
    let disk = "driver=qcow2,node-name=disk,file=f,backing=mid".to_owned();
    let mut world = World::ours(dir, &[file, mid, disk]);
    let mut guest = Command::new("fio")
        .current_dir(dir)
        .args(["--name=w", "--rw=randwrite", "--bs=4k", "--size=24M", "--iodepth=16", "--minimal"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--rate_iops=4000", "--ioengine=nbd"])
        .arg(format!("--uri=nbd+unix:///disk?socket={}", dir.join("nbd").display()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut rounds = 0;
    let status = loop {
        if let Some(status) = guest.try_wait().unwrap() {
            break status;
        }
        rounds += 1;
        let (discard, detect) = if rounds % 2 == 0 { ("unmap", "unmap") } else { ("ignore", "off") };
        let no_flush = rounds % 3 == 0;
        world.must(
            "blockdev-reopen",
            json!({"options": [{
                "driver": "qcow2", "node-name": "disk", "file": "f", "backing": "mid", "discard": discard,
                "detect-zeroes": detect, "cache": {"no-flush": no_flush},
            }]}),
        );
        let text = world.refusal(
            "blockdev-reopen",
            json!({"options": [{
                "driver": "qcow2", "node-name": "disk", "file": "f", "backing": "mid", "read-only": true,
            }]}),
        );
        assert_eq!(text, "Read-only block node 'disk' cannot support read-write users");
        thread::sleep(Duration::from_millis(2));
    };
    assert!(status.success(), "fio: {status}");
    assert!(rounds > 10, "{rounds}");
    world.end();
    qemu.check(&dir.join("disk.qcow2")).unwrap();
}

/// A command and its arguments.
type Request = (&'static str, Value);

fn reopen(options: Value) -> Request {
    ("blockdev-reopen", json!({"options": [options]}))
}

/// A reopen of the node `disk` as it is but for `more`.
fn reopen_disk(more: Value) -> Request {
    let mut options = json!({"driver": "qcow2", "node-name": "disk", "file": "f", "backing": "mid"});
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    reopen(options)
}

/// Some succeed, and change what the next one meets.
fn reopens() -> Vec<Request> {
    vec![
        reopen(json!({"driver": "qcow2", "node-name": "disk"})),
        reopen(json!({"driver": "qcow2", "file": "f", "backing": "mid"})),
        reopen(json!({"driver": "qcow2", "node-name": "zz", "file": "f"})),
        reopen(json!({"driver": "qcow2", "node-name": "disk", "file": "f"})),
        reopen_disk(json!({})),
        reopen_disk(json!({"backing": "zz"})),
        reopen_disk(json!({"backing": "disk"})),
        reopen_disk(json!({"data-file": "n"})),
        reopen_disk(json!({"read-only": true})),
        reopen_disk(json!({"discard": "unmap", "detect-zeroes": "unmap"})),
        reopen_disk(json!({"backing": "other"})),
        reopen_disk(json!({"backing": null})),
        reopen_disk(json!({})),
        reopen(json!({"driver": "file", "node-name": "f", "filename": "/x"})),
        reopen(json!({"driver": "file", "node-name": "f"})),
        reopen(json!({"driver": "null-co", "node-name": "n"})),
        reopen(json!({"driver": "null-co", "node-name": "n", "size": 5})),
        reopen(json!({"driver": "copy-on-read", "node-name": "cor", "file": "n"})),
    ]
}

/// Of nodes that are not there, or not in one chain.
fn snapshots_and_jobs() -> Vec<Request> {
    vec![
        ("blockdev-snapshot", json!({"node": "zz", "overlay": "other"})),
        ("blockdev-snapshot", json!({"node": "disk", "overlay": "zz"})),
        ("blockdev-snapshot", json!({"node": "other", "overlay": "mid"})),
        ("block-commit", json!({"job-id": "c", "device": "zz"})),
        ("block-commit", json!({"job-id": "c", "device": "other"})),
        ("block-commit", json!({"job-id": "c", "device": "disk", "top-node": "base"})),
        ("block-commit", json!({"job-id": "c", "device": "disk", "base-node": "other"})),
        ("block-commit", json!({"job-id": "c", "device": "disk", "base": "nope"})),
        ("block-commit", json!({"job-id": "c", "device": "disk", "top": "nope"})),
        ("block-commit", json!({"job-id": "c", "device": "disk", "top-node": "zz"})),
        ("block-commit", json!({"job-id": "c", "device": "disk", "top": "x", "top-node": "mid"})),
        ("block-commit", json!({"job-id": "c", "device": "disk", "base": "x", "base-node": "mid"})),
        ("block-commit", json!({"job-id": "c", "device": "disk", "backing-file": "x"})),
        ("block-stream", json!({"job-id": "s", "device": "disk", "bottom": "other"})),
        ("block-stream", json!({"job-id": "s", "device": "disk", "bottom": "zz"})),
        ("block-stream", json!({"job-id": "s", "device": "disk", "backing-file": "x"})),
        ("blockdev-del", json!({"node-name": "mid"})),
        ("blockdev-mirror", json!({"job-id": "m", "device": "other", "target": "mid", "sync": "full"})),
        (
            "blockdev-mirror",
            json!({"job-id": "m", "device": "disk", "target": "other", "sync": "full", "replaces": "zz"}),
        ),
    ]
}

/// Of names, addresses and files that are not good.
fn exports_and_nodes() -> Vec<Request> {
    vec![
        ("block-export-add", json!({"type": "nbd", "id": "1e", "node-name": "other"})),
        ("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "other"})),
        ("nbd-server-remove", json!({"name": "disk"})),
        ("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "/nope/x"}}})),
        ("blockdev-add", json!({"driver": "file", "node-name": "q", "filename": "/dev"})),
        ("blockdev-add", json!({"driver": "file", "node-name": "q", "filename": "/nope"})),
        ("blockdev-add", json!({"driver": "host_device", "node-name": "q", "filename": "/etc/passwd"})),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "q", "read-only": true, "file": {"driver": "file", "filename": "/etc/passwd"}}),
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "a23456789012345678901234567890123", "file": "n"}),
        ),
        ("object-add", json!({"qom-type": "secret", "id": "s"})),
        (
            "object-add",
            json!({"qom-type": "tls-creds-x509", "id": "t", "dir": "/nope", "endpoint": "server"}),
        ),
    ]
}

/// Of images that are not in a chain, and of jobs that are not there.
fn chains_and_verbs() -> Vec<Request> {
    vec![
        ("block-dirty-bitmap-merge", json!({"node": "other", "target": "a", "bitmaps": ["b"]})),
        ("block-stream", json!({"job-id": "s", "device": "zz"})),
        ("block-stream", json!({"job-id": "s", "device": "disk", "base": "nope"})),
        ("block-stream", json!({"job-id": "s", "device": "disk", "base-node": "other"})),
        ("block-stream", json!({"job-id": "s", "device": "disk", "base": "x", "base-node": "base"})),
        ("block-stream", json!({"device": "disk"})),
        ("change-backing-file", json!({"device": "zz", "image-node-name": "disk", "backing-file": "x"})),
        ("change-backing-file", json!({"device": "disk", "image-node-name": "zz", "backing-file": "x"})),
        ("change-backing-file", json!({"device": "disk", "image-node-name": "base", "backing-file": "x"})),
        (
            "change-backing-file",
            json!({"device": "disk", "image-node-name": "mid", "backing-file": "base.qcow2"}),
        ),
        ("block-job-pause", json!({"device": "zz"})),
        ("job-pause", json!({"id": "zz"})),
        ("block_resize", json!({"node-name": "zz", "size": 512})),
        ("block_resize", json!({"node-name": "mid", "size": 1 << 20})),
        ("block_resize", json!({"node-name": "other", "size": -1})),
    ]
}

/// The same commands to both daemons, the same texts from both.
#[test]
fn refusals_are_those_of_qemu() {
    let Some(qemu) = Qemu::find("refusals_are_those_of_qemu") else { return };
    if !have("refusals_are_those_of_qemu", &["qemu-storage-daemon"]) {
        return;
    }
    let transcript = |start: fn(&Path, &[String]) -> World| -> Vec<String> {
        let dir = scratch().unwrap();
        let dir = dir.path();
        chain(qemu, dir);
        qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "other.qcow2", "64M"]).unwrap();
        let nodes = [
            format!("driver=file,node-name=f,filename={}", dir.join("disk.qcow2").display()),
            qcow2(dir, "base", "base.qcow2"),
            qcow2(dir, "mid", "mid.qcow2") + ",backing=base",
            "driver=qcow2,node-name=disk,file=f,backing=mid".to_owned(),
            qcow2(dir, "other", "other.qcow2"),
            "driver=null-co,node-name=n,size=1048576".to_owned(),
            "driver=copy-on-read,node-name=cor,file=n".to_owned(),
        ];
        let mut world = start(dir, &nodes);
        let commands = [reopens(), snapshots_and_jobs(), exports_and_nodes(), chains_and_verbs()].concat();
        let said = commands.into_iter().map(|(command, arguments)| {
            format!("{command} {arguments}: {}", world.refusal(command, arguments.clone()))
        });
        let said = said.collect();
        world.end();
        said
    };
    let (ours, theirs) = (transcript(World::ours), transcript(World::qemu));
    let differ: Vec<_> = ours.iter().zip(&theirs).filter(|(ours, theirs)| ours != theirs).collect();
    assert!(differ.is_empty(), "{differ:#?}");
}
