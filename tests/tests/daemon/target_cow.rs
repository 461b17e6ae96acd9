//! A target overlay whose backing file is not attached while it is filled (the sixth way to get a mirror
//! wrong): its clusters are larger than what is copied, and the rest of each must come from the source's
//! chain, not from nowhere.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use crate::common::world::World;
use blockmirror_block::testing::{MemoryDisk, MemoryStorage};
use blockmirror_block::{BlockDevice, ByteRange, Storage, WriteFlags, ZeroFlags};
use blockmirror_file::FileOptions;
use blockmirror_mirror::{Error, MirrorJob, MirrorOptions, SyncMode};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;
use serde_json::{Value, json};

const SIZE: u64 = (6 << 20) + 512;

fn base() -> Arc<dyn BlockDevice> {
    let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8 | 1).collect();
    Arc::new(MemoryDisk::with_contents(&bytes))
}

fn overlay(cluster_size: u64, extended_l2: bool) -> Arc<MemoryStorage> {
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = cluster_size;
    options.extended_l2 = extended_l2;
    options.backing_file = Some(b"base.raw".to_vec());
    options.backing_format = Some("raw".into());
    let storage = Arc::new(MemoryStorage::new());
    options.create(&*storage, None).unwrap();
    storage
}

fn contents(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.len()).unwrap()];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A source overlay with one sector written, some zeros and some data at the end.
fn source(cluster_size: u64) -> Arc<Qcow2> {
    let disk = OpenOptions::new().writable(true).backing(base()).open(overlay(cluster_size, false)).unwrap();
    disk.write_at(&[0xaa; 512], (1 << 20) + 4608, WriteFlags::NONE).unwrap();
    disk.write_zeroes(ByteRange::at((3 << 20) + 1024, 70_000), ZeroFlags::MAY_UNMAP).unwrap();
    disk.write_at(&[0xbb; 700], SIZE - 700, WriteFlags::NONE).unwrap();
    Arc::new(disk)
}

fn fill(cluster_size: u64, extended_l2: bool, sync: SyncMode, granularity: u64) {
    let source = source(4096);
    let storage = overlay(cluster_size, extended_l2);
    let target = Arc::new(OpenOptions::new().writable(true).open(storage.clone()).unwrap());
    let options = MirrorOptions::new().sync(sync).granularity(granularity);
    MirrorJob::start(source.clone(), target, options).unwrap().wait().unwrap();
    // Now, as at the pivot, with the backing file.
    let target = OpenOptions::new().backing(base()).open(storage).unwrap();
    let (found, wanted) = (contents(&target), contents(&*source));
    let differs = (0..found.len()).find(|&at| found[at] != wanted[at]);
    assert_eq!(
        differs, None,
        "clusters of {cluster_size}, {sync:?}, granularity {granularity}: first different byte"
    );
}

#[test]
fn the_rest_of_a_cluster_comes_from_the_source() {
    for sync in [SyncMode::Top, SyncMode::Full] {
        for granularity in [512, 65536, 64 << 20] {
            fill(2 << 20, false, sync, granularity);
            fill(1 << 20, false, sync, granularity);
            fill(64 << 10, true, sync, granularity);
            fill(4096, false, sync, granularity);
        }
    }
}

/// A mirror in the daemon to an overlay that is opened with `"backing": null`, or to an export of one.
struct Case {
    /// Options of `qemu-img create` for the target.
    target: &'static str,
    /// The job's own arguments.
    arguments: Value,
    /// What the top image of the source holds.
    source: &'static [&'static str],
    /// What the guest writes while the first pass is under way.
    during: &'static [&'static str],
    /// What the guest writes when the job is ready.
    writes: &'static [&'static str],
    server: Server,
}

/// How the target is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    /// It is a node of the daemon.
    None,
    /// Through an export of another daemon.
    Ours,
    /// Through `qemu-nbd`. Not for version 2: QEMU leaves zeros out of an image that hides its backing file,
    /// and says that it has written them.
    QemuNbd,
}

/// Data, zeros and a little more data; the rest shows the base.
const MIXED: &[&str] = &["write -P 17 0 512k", "write -z 1M 1M", "write -P 18 3M 64k"];

impl Case {
    /// Performs it; then the target over its backing file reads as the source does.
    fn play(&self, qemu: Qemu) {
        let dir = scratch().unwrap();
        let dir = dir.path();
        std::fs::write(dir.join("base.raw"), vec![0xbb; 8 << 20]).unwrap();
        qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "disk.qcow2"])
            .unwrap();
        qemu.img_in(
            dir,
            ["create", "-q", "-f", "qcow2", "-o", self.target, "-b", "base.raw", "-F", "raw", "t.qcow2"],
        )
        .unwrap();
        qemu.io("qcow2", &dir.join("disk.qcow2"), self.source).unwrap();
        self.mirror(dir);
        let (disk, target) = (dir.join("disk.qcow2"), dir.join("t.qcow2"));
        let what = format!("{} {} server: {:?}", self.target, self.arguments, self.server);
        qemu.compare("qcow2", &disk, "qcow2", &target).unwrap_or_else(|error| panic!("{what}: {error}"));
        qemu.check(&target).unwrap_or_else(|error| panic!("{what}: {error}"));
    }

    fn mirror(&self, dir: &Path) {
        let file = dir.join("disk.qcow2").display().to_string();
        let node = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={file}");
        let mut world = World::ours(dir, &[node]);
        let file = json!({"driver": "file", "filename": dir.join("t.qcow2")});
        let mut image =
            json!({"driver": "qcow2", "node-name": "t", "backing": null, "file": file, "discard": "unmap"});
        let export = |image: &mut Value, socket: &Path| {
            let address = json!({"type": "unix", "path": socket});
            *image = json!({"driver": "nbd", "node-name": "t", "server": address, "export": "disk"});
        };
        let (mut ours, mut theirs) = (None, None);
        match self.server {
            Server::None => {}
            Server::Ours => {
                let dir = dir.join("server");
                std::fs::create_dir(&dir).unwrap();
                image["node-name"] = json!("disk");
                ours = Some(World::ours(&dir, &[image.to_string()]));
                export(&mut image, &dir.join("nbd"));
            }
            Server::QemuNbd => {
                let path = dir.join("t.qcow2").display().to_string();
                let server = crate::common::nbd::Server::qemu_without_backing(
                    scratch().unwrap(),
                    &path,
                    &["-x", "disk"],
                );
                export(&mut image, &server.path("socket"));
                theirs = Some(server);
            }
        }
        world.must("blockdev-add", image);
        let mut arguments = json!({"job-id": "j", "device": "disk", "target": "t"});
        for (name, value) in self.arguments.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        if arguments.get("bitmap").is_some() {
            world.must("block-dirty-bitmap-add", json!({"node": "disk", "name": "b"}));
            let line = "qemu-io disk \"write -q -P 40 5M 1k\"";
            world.must("human-monitor-command", json!({"command-line": line}));
        }
        if !self.during.is_empty() {
            // The first pass would take minutes.
            arguments["speed"] = json!(4096);
        }
        world.must("blockdev-mirror", arguments);
        if !self.during.is_empty() {
            write_all(&mut world, self.during);
            let jobs = world.must("query-block-jobs", json!({}));
            assert_eq!(jobs[0]["status"], "running", "the first pass was over before the writes");
            world.must("block-job-set-speed", json!({"device": "j", "speed": 0}));
        }
        world.wait_for("BLOCK_JOB_READY");
        write_all(&mut world, self.writes);
        let end = if self.writes.is_empty() { "block-job-complete" } else { "block-job-cancel" };
        world.must(end, json!({"device": "j"}));
        assert_eq!(world.wait_for("BLOCK_JOB_COMPLETED").get("error"), None);
        world.wait_for_status("null");
        world.end();
        if let Some(server) = ours {
            server.end();
        }
        // What the job has flushed is in the file.
        drop(theirs);
    }
}

/// Lets the guest write.
fn write_all(world: &mut World, writes: &[&str]) {
    for write in writes {
        let line = format!("qemu-io disk \"{write}\"");
        let said = world.must("human-monitor-command", json!({"command-line": line}));
        assert_eq!(said, "", "{write}");
    }
}

/// The zeros of the source were left out, because what the target hides was taken for zeros.
#[test]
fn zeros_are_written_over_a_backing_file_that_is_not_attached() {
    let Some(qemu) = Qemu::find("zeros_are_written_over_a_backing_file_that_is_not_attached") else { return };
    for server in [Server::None, Server::Ours, Server::QemuNbd] {
        for sync in ["top", "full"] {
            let (arguments, target) = (json!({"sync": sync}), "compat=1.1");
            Case { target, arguments, source: MIXED, during: &[], writes: &[], server }.play(qemu);
        }
    }
}

/// Nothing but what was copied came into a cluster of the target.
#[test]
fn clusters_are_completed_over_a_backing_file_that_is_not_attached() {
    let Some(qemu) = Qemu::find("clusters_are_completed_over_a_backing_file_that_is_not_attached") else {
        return;
    };
    for sync in ["top", "full"] {
        let arguments = json!({"sync": sync});
        let target = "cluster_size=1M";
        Case { target, arguments, source: MIXED, during: &[], writes: &[], server: Server::None }.play(qemu);
    }
}

/// The rest of the cluster became zeros.
#[test]
fn a_small_write_completes_its_cluster_over_a_backing_file_that_is_not_attached() {
    let Some(qemu) =
        Qemu::find("a_small_write_completes_its_cluster_over_a_backing_file_that_is_not_attached")
    else {
        return;
    };
    for server in [Server::None, Server::Ours, Server::QemuNbd] {
        let (arguments, writes) = (json!({"sync": "top"}), &["write -q -P 30 4M 4k"]);
        Case { target: "compat=1.1", arguments, source: &[], during: &[], writes, server }.play(qemu);
    }
}

/// Of all sizes.
const WRITES: &[&str] = &[
    "write -q -P 31 4194816 512",
    "write -q -P 32 4300000 3000",
    "write -q -P 33 6M 1M",
    "write -q -z 7340544 4k",
    "write -q -z -u 2M 128k",
    "discard -q 1300k 100k",
    "write -q -P 34 8388096 512",
];

/// Writes of all sizes, with the job in any mode, at any granularity, into images of both versions.
#[test]
fn every_mode_fills_a_target_whose_backing_file_is_not_attached() {
    let Some(qemu) = Qemu::find("every_mode_fills_a_target_whose_backing_file_is_not_attached") else {
        return;
    };
    let mut turn = 0;
    for target in [
        "compat=0.10",
        "compat=1.1",
        "compat=1.1,cluster_size=4k",
        "compat=1.1,cluster_size=2M",
        "compat=1.1,extended_l2=on",
        "compat=0.10,cluster_size=512k",
    ] {
        for sync in ["full", "top", "none", "bitmap"] {
            for mode in ["background", "write-blocking", "auto"] {
                turn += 1;
                let granularity = [512, 4096, 65536, 1 << 20][turn % 4];
                let server = match turn % 15 {
                    0 | 10 => Server::Ours,
                    5 if !target.contains("0.10") => Server::QemuNbd,
                    _ => Server::None,
                };
                // Of the others nothing is copied but what the guest writes.
                let source = if matches!(sync, "full" | "top") { MIXED } else { &[] };
                let cluster = if target.contains("2M") { 2 << 20 } else { 512 << 10 };
                let granularity = if server == Server::None { granularity } else { granularity.max(cluster) };
                let mut arguments = json!({"sync": sync, "copy-mode": mode, "granularity": granularity});
                if sync == "bitmap" {
                    arguments["bitmap"] = json!("b");
                }
                Case { target, arguments, source, during: &[], writes: WRITES, server }.play(qemu);
            }
        }
    }
}

/// The guest writes before the job has come to most of the disk, and again when it is ready.
#[test]
fn a_guest_writes_while_a_target_is_filled_whose_backing_file_is_not_attached() {
    let Some(qemu) = Qemu::find("a_guest_writes_while_a_target_is_filled_whose_backing_file_is_not_attached")
    else {
        return;
    };
    let mut turn = 0;
    for target in ["compat=0.10", "compat=1.1,cluster_size=1M", "compat=1.1,extended_l2=on"] {
        for sync in ["full", "top"] {
            for mode in ["background", "write-blocking", "auto"] {
                turn += 1;
                let server = match turn % 5 {
                    2 => Server::Ours,
                    4 if !target.contains("0.10") => Server::QemuNbd,
                    _ => Server::None,
                };
                let granularity = if server == Server::None { [512, 65536][turn % 2] } else { 1 << 20 };
                let arguments = json!({"sync": sync, "copy-mode": mode, "granularity": granularity});
                let writes = &["write -q -P 50 100k 3000", "discard -q 4M 1M", "write -q -z 7M 513"];
                Case { target, arguments, source: MIXED, during: WRITES, writes, server }.play(qemu);
            }
        }
    }
}

/// What completes a cluster of the target is read from the source's chain. Where that fails it is an error of
/// the source, whatever the policy for the target is.
#[test]
fn a_source_that_cannot_be_read_to_complete_a_cluster_has_failed() {
    let Some(qemu) = Qemu::find("a_source_that_cannot_be_read_to_complete_a_cluster_has_failed") else {
        return;
    };
    for (policy, other) in [("report", "stop"), ("stop", "report"), ("ignore", "report")] {
        for (when_ready, mode) in [(false, "background"), (true, "background"), (true, "write-blocking")] {
            let what = format!("{policy}, when ready: {when_ready}, {mode}");
            let dir = scratch().unwrap();
            let dir = dir.path();
            std::fs::write(dir.join("base.raw"), vec![0xbb; 8 << 20]).unwrap();
            for (name, options) in [("disk.qcow2", "compat=1.1"), ("t.qcow2", "cluster_size=1M")] {
                let create =
                    ["create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", name];
                qemu.img_in(dir, create).unwrap();
            }
            let write = "write -q -P 18 3M 64k";
            if !when_ready {
                qemu.io("qcow2", &dir.join("disk.qcow2"), &[write]).unwrap();
            }
            let file = |name: &str| json!({"driver": "file", "filename": dir.join(name)});
            // 600 KiB into the cluster of the write, once.
            let sector = ((3 << 20) + (600 << 10)) / 512;
            let rule = json!({"event": "none", "iotype": "read", "sector": sector, "errno": 5, "once": true});
            let base = json!({"driver": "blkdebug", "image": file("base.raw"), "inject-error": [rule]});
            let node = json!({
                "driver": "qcow2", "node-name": "disk", "file": file("disk.qcow2"),
                "backing": {"driver": "raw", "file": base},
            });
            let mut world = World::ours(dir, &[node.to_string()]);
            let target =
                json!({"driver": "qcow2", "node-name": "t", "backing": null, "file": file("t.qcow2")});
            world.must("blockdev-add", target);
            world.must(
                "blockdev-mirror",
                json!({
                    "job-id": "j", "device": "disk", "target": "t", "sync": "top", "copy-mode": mode,
                    "granularity": 4096, "on-source-error": policy, "on-target-error": other,
                }),
            );
            if when_ready {
                world.wait_for("BLOCK_JOB_READY");
                write_all(&mut world, &[write]);
            }
            let error = world.wait_for("BLOCK_JOB_ERROR");
            assert_eq!((&error["operation"], &error["action"]), (&json!("read"), &json!(policy)), "{what}");
            if policy == "report" {
                let end = world.wait_for("BLOCK_JOB_COMPLETED");
                assert!(end.get("error").is_some(), "{what}: {end}");
                world.wait_for_status("null");
                world.end();
                continue;
            }
            if policy == "stop" {
                world.wait_for_status(if when_ready { "standby" } else { "paused" });
                world.must("job-resume", json!({"id": "j"}));
            }
            if !when_ready {
                world.wait_for("BLOCK_JOB_READY");
            }
            world.must("block-job-cancel", json!({"device": "j"}));
            assert_eq!(world.wait_for("BLOCK_JOB_COMPLETED").get("error"), None, "{what}");
            world.wait_for_status("null");
            world.end();
            let (disk, target) = (dir.join("disk.qcow2"), dir.join("t.qcow2"));
            qemu.compare("qcow2", &disk, "qcow2", &target).unwrap_or_else(|error| panic!("{what}: {error}"));
            qemu.check(&target).unwrap();
        }
    }
}

/// Clusters that are mapped over a hole of the file are allocated, and zeros: they are not left out for the
/// sake of what lies below.
#[test]
fn a_mapped_hole_over_a_backing_file_is_copied_as_zeros() {
    let Some(qemu) = Qemu::find("a_mapped_hole_over_a_backing_file_is_copied_as_zeros") else { return };
    for (cluster, target) in [(65_536, "compat=1.1"), (65_536, "compat=0.10"), (4096, "cluster_size=1M")] {
        for hides in [false, true] {
            let dir = scratch().unwrap();
            let dir = dir.path();
            std::fs::write(dir.join("base.raw"), vec![0xbb; 8 << 20]).unwrap();
            let layout = format!("cluster_size={cluster}");
            for (name, options) in [("disk.qcow2", &*layout), ("t.qcow2", target)] {
                let create =
                    ["create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", name];
                qemu.img_in(dir, create).unwrap();
            }
            // Data, of which the file then loses all of two clusters and half of one.
            let disk = dir.join("disk.qcow2");
            qemu.io("qcow2", &disk, &["write -q -P 17 2M 512k", "write -q -P 18 5M 64k"]).unwrap();
            let map = qemu.img([OsStr::new("map"), OsStr::new("--output=json"), disk.as_os_str()]).unwrap();
            let map: Value = serde_json::from_str(&map).unwrap();
            let row = |at: u64| map.as_array().unwrap().iter().find(|row| row["start"] == at).unwrap();
            let host = row(2 << 20)["offset"].as_u64().unwrap();
            let file = FileOptions::new().writable(true).open(&disk).unwrap();
            let punched = ByteRange::at(host + cluster, 2 * cluster + cluster / 2);
            file.write_zeroes(punched, ZeroFlags::MAY_UNMAP).unwrap();
            file.flush().unwrap();
            drop(file);
            let file = disk.display().to_string();
            let node = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={file}");
            let mut world = World::ours(dir, &[node]);
            let file = json!({"driver": "file", "filename": dir.join("t.qcow2")});
            let mut image = json!({"driver": "qcow2", "node-name": "t", "file": file});
            if hides {
                image["backing"] = Value::Null;
            }
            world.must("blockdev-add", image);
            world.must(
                "blockdev-mirror",
                json!({"job-id": "j", "device": "disk", "target": "t", "sync": "top"}),
            );
            world.wait_for("BLOCK_JOB_READY");
            world.must("block-job-cancel", json!({"device": "j"}));
            assert_eq!(world.wait_for("BLOCK_JOB_COMPLETED").get("error"), None);
            world.wait_for_status("null");
            world.end();
            let t = dir.join("t.qcow2");
            qemu.compare("qcow2", &disk, "qcow2", &t)
                .unwrap_or_else(|error| panic!("{cluster} to {target}, hides {hides}: {error}"));
            let zeros = format!("read -P 0 {} {}", (2 << 20) + cluster, 2 * cluster);
            let read = qemu.io("qcow2", &t, &[&zeros]).unwrap();
            assert!(!read.contains("failed"), "{read}");
            qemu.check(&t).unwrap();
        }
    }
}

/// A disk over a base, a copy of that base, and an empty target of `version`, whose header names the copy if
/// `named`.
fn shallow_images(qemu: Qemu, dir: &Path, named: bool, version: &str) {
    std::fs::write(dir.join("base.raw"), vec![0xbb; 8 << 20]).unwrap();
    qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "disk.qcow2"]).unwrap();
    qemu.io("qcow2", &dir.join("disk.qcow2"), MIXED).unwrap();
    qemu.io("qcow2", &dir.join("disk.qcow2"), &["write -z 64k 4k", "write -P 19 7M 512"]).unwrap();
    std::fs::copy(dir.join("base.raw"), dir.join("copy.raw")).unwrap();
    let options = format!("compat={version},cluster_size=128k");
    let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if named {
        create.extend(["-b", "copy.raw", "-F", "raw"]);
    }
    create.extend(["t.qcow2", "8M"]);
    qemu.img_in(dir, create).unwrap();
}

/// A daemon with the nodes of [`shallow_images`]: `disk`, `t` without a backing node, and `base`, the copy.
fn shallow_world(dir: &Path) -> World {
    let path = |name: &str| dir.join(name).display().to_string();
    let node = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={}", path("disk.qcow2"));
    let mut world = World::ours(dir, &[node]);
    let file = json!({"driver": "file", "node-name": "t-file", "filename": path("t.qcow2")});
    let target = json!({"driver": "qcow2", "node-name": "t", "backing": null, "file": file});
    world.must("blockdev-add", target);
    let file = json!({"driver": "file", "filename": path("copy.raw"), "read-only": true});
    let base = json!({"driver": "raw", "node-name": "base", "read-only": true, "file": file});
    world.must("blockdev-add", base);
    world
}

/// A guest's request to `disk`; what is said of it.
fn qemu_io(world: &mut World, request: &str) -> Value {
    world.must("human-monitor-command", json!({"command-line": format!("qemu-io disk \"{request}\"")}))
}

/// A shallow copy: the target gets its backing file while the mirror runs. The zeros of the source's top
/// image do not let it show, whether the header of the target names it or not.
#[test]
fn a_target_gets_its_backing_file_while_it_is_filled() {
    let Some(qemu) = Qemu::find("a_target_gets_its_backing_file_while_it_is_filled") else { return };
    for (named, version, reopen, writes) in [
        (true, "1.1", false, true),
        (false, "1.1", false, true),
        (false, "0.10", false, false),
        (true, "1.1", true, false),
        (false, "1.1", true, true),
    ] {
        let dir = scratch().unwrap();
        let dir = dir.path();
        shallow_images(qemu, dir, named, version);
        let mut world = shallow_world(dir);
        world.must("blockdev-mirror", json!({"job-id": "j", "device": "disk", "target": "t", "sync": "top"}));
        world.wait_for("BLOCK_JOB_READY");
        if writes {
            qemu_io(&mut world, "write -q -P 40 5M 1k");
        }
        if reopen {
            let options = json!({"driver": "qcow2", "node-name": "t", "file": "t-file", "backing": "base"});
            world.must("blockdev-reopen", json!({"options": [options]}));
        } else {
            world.must("blockdev-snapshot", json!({"node": "base", "overlay": "t"}));
            let again = world.refusal("blockdev-snapshot", json!({"node": "base", "overlay": "t"}));
            assert!(again != "{}", "it has one now");
        }
        if writes {
            qemu_io(&mut world, "write -q -P 41 6M 1k");
        }
        world.must("block-job-complete", json!({"device": "j"}));
        assert_eq!(world.wait_for("BLOCK_JOB_COMPLETED").get("error"), None);
        world.wait_for_status("null");
        // The guest is on the target, over its backing file.
        let mut wanted =
            vec![(0, 17), (64 << 10, 0), (256 << 10, 17), (1 << 20, 0), (2 << 20, 0xbb), (3 << 20, 18)];
        wanted.extend([(4 << 20, 0xbb), ((7 << 20) + 512, 0xbb), (7 << 20, 19)]);
        if writes {
            wanted.extend([(5 << 20, 40), ((5 << 20) + 1024, 0xbb), (6 << 20, 41), ((6 << 20) + 1024, 0xbb)]);
        }
        for (at, byte) in wanted {
            let said = qemu_io(&mut world, &format!("read -q -P {byte} {at} 512"));
            assert_eq!(said, "", "{at}: named {named}, {version}, reopen {reopen}");
        }
        world.end();
        qemu.check(&dir.join("t.qcow2")).unwrap();
    }
}

/// A target longer than the source, and what is past the source's end lies in a backing file that is not
/// attached: it stays, and where the source ends inside a cluster the copy is refused, as a write there would
/// lose it.
#[test]
fn a_longer_target_keeps_what_its_backing_file_holds() {
    const CLUSTER: u64 = 65536;
    for (len, known, fits) in [
        (3 << 20, false, true),
        ((3 << 20) + 512, false, false),
        ((3 << 20) + CLUSTER - 512, false, false),
        ((3 << 20) + 512, true, true),
    ] {
        let storage = overlay(CLUSTER, false);
        let mut wanted = contents(&*base());
        if known {
            let target = OpenOptions::new().writable(true).backing(base()).open(storage.clone()).unwrap();
            target.write_at(&[0xdd; CLUSTER as usize], 3 << 20, WriteFlags::NONE).unwrap();
            target.flush().unwrap();
            wanted[3 << 20..(3 << 20) + CLUSTER as usize].fill(0xdd);
        }
        let before = storage.to_vec();
        let mut bytes: Vec<u8> = (0..len).map(|at| (at / 1024) as u8).collect();
        bytes[1 << 20..2 << 20].fill(0);
        let source = Arc::new(MemoryDisk::with_contents(&bytes));
        let target = Arc::new(OpenOptions::new().writable(true).open(storage.clone()).unwrap());
        let options = MirrorOptions::new().longer_target(true);
        let ended = MirrorJob::start(source, target, options).and_then(MirrorJob::wait);
        if let Err(error) = ended {
            assert!(!fits && matches!(error, Error::HiddenTail { .. }), "{len}: {error}");
            assert!(storage.to_vec() == before, "{len}");
            continue;
        }
        assert!(fits, "{len}");
        wanted[..len as usize].copy_from_slice(&bytes);
        let target = OpenOptions::new().backing(base()).open(storage).unwrap();
        assert!(contents(&target) == wanted, "{len}");
    }
}
