//! A target overlay whose backing file is not attached while it is filled (the sixth way to get a mirror wrong): its
//! clusters are larger than what is copied, and the rest of each must come from the source's chain, not from nowhere.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

#[path = "common/world.rs"]
mod world;

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::testing::{MemoryDisk, MemoryStorage};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags, ZeroFlags};
use blockmirror_mirror::{MirrorJob, MirrorOptions, SyncMode};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};
use blockmirror_tests::qemu::Qemu;
use blockmirror_tests::scratch::scratch;
use serde_json::{Value, json};
use world::World;

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
    /// What the guest writes when the job is ready.
    writes: &'static [&'static str],
    /// The target is reached through an export of another daemon.
    over_nbd: bool,
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
        let what = format!("{} {} over NBD: {}", self.target, self.arguments, self.over_nbd);
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
        let mut server = None;
        if self.over_nbd {
            let dir = dir.join("server");
            std::fs::create_dir(&dir).unwrap();
            image["node-name"] = json!("disk");
            server = Some(World::ours(&dir, &[image.to_string()]));
            let address = json!({"type": "unix", "path": dir.join("nbd")});
            image = json!({"driver": "nbd", "node-name": "t", "server": address, "export": "disk"});
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
        world.must("blockdev-mirror", arguments);
        world.wait_for("BLOCK_JOB_READY");
        for write in self.writes {
            let line = format!("qemu-io disk \"{write}\"");
            let said = world.must("human-monitor-command", json!({"command-line": line}));
            assert_eq!(said, "", "{write}");
        }
        let end = if self.writes.is_empty() { "block-job-complete" } else { "block-job-cancel" };
        world.must(end, json!({"device": "j"}));
        assert_eq!(world.wait_for("BLOCK_JOB_COMPLETED").get("error"), None);
        world.wait_for_status("null");
        world.end();
        if let Some(server) = server {
            server.end();
        }
    }
}

/// The zeros of the source were left out, because what the target hides was taken for zeros.
#[test]
fn zeros_are_written_over_a_backing_file_that_is_not_attached() {
    let Some(qemu) = Qemu::find("zeros_are_written_over_a_backing_file_that_is_not_attached") else { return };
    for over_nbd in [false, true] {
        for sync in ["top", "full"] {
            let arguments = json!({"sync": sync});
            Case { target: "compat=1.1", arguments, source: MIXED, writes: &[], over_nbd }.play(qemu);
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
        Case { target, arguments, source: MIXED, writes: &[], over_nbd: false }.play(qemu);
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
    for over_nbd in [false, true] {
        let (arguments, writes) = (json!({"sync": "top"}), &["write -q -P 30 4M 4k"]);
        Case { target: "compat=1.1", arguments, source: &[], writes, over_nbd }.play(qemu);
    }
}

/// Writes of all sizes, with the job in any mode, at any granularity, into images of both versions.
#[test]
fn every_mode_fills_a_target_whose_backing_file_is_not_attached() {
    let Some(qemu) = Qemu::find("every_mode_fills_a_target_whose_backing_file_is_not_attached") else {
        return;
    };
    let writes = &[
        "write -q -P 31 4194816 512",
        "write -q -P 32 4300000 3000",
        "write -q -P 33 6M 1M",
        "write -q -z 7340544 4k",
        "write -q -z -u 2M 128k",
        "discard -q 1300k 100k",
        "write -q -P 34 8388096 512",
    ];
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
                let over_nbd = turn % 5 == 0;
                // Of the others nothing is copied but what the guest writes.
                let source = if matches!(sync, "full" | "top") { MIXED } else { &[] };
                let cluster = if target.contains("2M") { 2 << 20 } else { 512 << 10 };
                let granularity = if over_nbd { granularity.max(cluster) } else { granularity };
                let mut arguments = json!({"sync": sync, "copy-mode": mode, "granularity": granularity});
                if sync == "bitmap" {
                    arguments["bitmap"] = json!("b");
                }
                Case { target, arguments, source, writes, over_nbd }.play(qemu);
            }
        }
    }
}

/// A shallow copy: the target gets its backing file while the mirror runs. The zeros of the source's top image do not let it
/// show, whether the header of the target names it or not.
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
        let path = |name: &str| dir.join(name).display().to_string();
        std::fs::write(dir.join("base.raw"), vec![0xbb; 8 << 20]).unwrap();
        qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "disk.qcow2"])
            .unwrap();
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
        let node =
            format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={}", path("disk.qcow2"));
        let mut world = World::ours(dir, &[node]);
        let file = json!({"driver": "file", "node-name": "t-file", "filename": path("t.qcow2")});
        let target = json!({"driver": "qcow2", "node-name": "t", "backing": null, "file": file});
        world.must("blockdev-add", target);
        let file = json!({"driver": "file", "filename": path("copy.raw"), "read-only": true});
        let base = json!({"driver": "raw", "node-name": "base", "read-only": true, "file": file});
        world.must("blockdev-add", base);
        world.must("blockdev-mirror", json!({"job-id": "j", "device": "disk", "target": "t", "sync": "top"}));
        world.wait_for("BLOCK_JOB_READY");
        if writes {
            world.must(
                "human-monitor-command",
                json!({"command-line": "qemu-io disk \"write -q -P 40 5M 1k\""}),
            );
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
            world.must(
                "human-monitor-command",
                json!({"command-line": "qemu-io disk \"write -q -P 41 6M 1k\""}),
            );
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
            let line = format!("qemu-io disk \"read -q -P {byte} {at} 512\"");
            let said = world.must("human-monitor-command", json!({"command-line": line}));
            assert_eq!(said, "", "{at}: named {named}, {version}, reopen {reopen}");
        }
        world.end();
        qemu.check(&dir.join("t.qcow2")).unwrap();
    }
}
