//! Jobs that fill a block device claim it. With loop devices: needs root, `losetup`, `mkfs.ext4` and `mount`;
//! skipped visibly without.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blockmirror_block::{ByteRange, ZeroFlags};

use super::host::{Loop, Mount, system};
use super::*;

impl Client {
    fn add_device(&mut self, name: &str, device: &Loop) {
        self.run("blockdev-add", json!({"driver": "host_device", "node-name": name, "filename": device.0}));
    }

    /// An export, which makes a guest of it.
    fn export(&mut self, node: &str) {
        let nbd = self.path("nbd");
        self.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": nbd}}}));
        let export = json!({"type": "nbd", "id": "e", "node-name": node, "name": "e", "writable": true});
        self.run("block-export-add", export);
    }
}

#[test]
fn jobs_do_not_write_a_device_that_is_mounted() {
    let mut client = Client::new();
    client.chain();
    let file = client.path("disk");
    File::create(&file).unwrap().set_len(SIZE).unwrap();
    if system("mkfs.ext4", &[Path::new("-q"), Path::new("-F"), &file]).is_none() {
        return;
    }
    let Some(device) = Loop::new(&file) else { return };
    fs::create_dir(client.path("mnt")).unwrap();
    let mount = client.path("mnt");
    let Some(mount) = Mount::new("-oro", &device.0, mount) else { return };
    let before = fs::read(&file).unwrap();

    // A plain node claims nothing, with a guest or without, nor does the source of a job.
    client.add_device("d", &device);
    client.export("d");
    client.image("copy.qcow2", 9, None);
    client.add("copy", "copy.qcow2", Value::Null);
    client.run("blockdev-mirror", json!({"job-id": "m", "device": "d", "target": "copy", "sync": "full"}));
    client.wait("BLOCK_JOB_READY");
    client.run("block-job-cancel", json!({"device": "m"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    client.wait_for_status("null");
    client.run("block-export-del", json!({"id": "e"}));

    let mirror = json!({"job-id": "m", "device": "top", "target": "d", "sync": "full"});
    let said = client.refused("blockdev-mirror", mirror.clone());
    let of_mount = format!("it is mounted on {}", mount.0.display());
    let names = |said: &str| said.contains(&*device.0.to_string_lossy()) && said.contains(&of_mount);
    assert!(names(&said), "{said}");
    let actions = json!([{"type": "blockdev-mirror", "data": mirror}]);
    let said = client.refused("transaction", json!({"actions": actions}));
    assert!(names(&said), "{said}");
    let create = json!({"driver": "qcow2", "file": "d", "size": SIZE / 2});
    client.run("blockdev-create", json!({"job-id": "c", "options": create}));
    // Starts that were refused come and go as well.
    client.wait_for_status("concluded");
    let said = client.run("query-jobs", json!({}))[0]["error"].as_str().unwrap().to_owned();
    assert!(names(&said), "{said}");
    client.run("job-dismiss", json!({"id": "c"}));
    client.run("blockdev-del", json!({"node-name": "d"}));
    for mode in ["existing", "absolute-paths"] {
        let target = device.0.to_string_lossy();
        let args = json!({
            "job-id": "m", "device": "top", "target": target, "sync": "full", "mode": mode, "format": "raw",
        });
        let said = client.refused("drive-mirror", args);
        assert!(names(&said), "{mode}: {said}");
    }
    assert!(fs::read(&file).unwrap() == before);
    assert_eq!(client.run("query-jobs", json!({})), json!([]));

    // As soon as it is not mounted any more it is a target like any other.
    drop(mount);
    client.add_device("d", &device);
    let mirror = json!({"job-id": "m", "device": "top", "target": "d", "sync": "full"});
    client.run("blockdev-mirror", mirror);
    client.wait("BLOCK_JOB_READY");
}

#[test]
fn a_claim_lasts_as_long_as_its_job() {
    let mut client = Client::new();
    client.chain();
    let file = client.path("disk");
    fs::write(&file, vec![9; SIZE as usize]).unwrap();
    let Some(device) = Loop::new(&file) else { return };
    client.add_device("d", &device);
    let filter = json!({"driver": "copy-on-read", "node-name": "f", "file": "d"});
    client.run("blockdev-add", filter);
    let mirror = |id, from, to| json!({"job-id": id, "device": from, "target": to, "sync": "full"});

    // Held by another, it is refused, and the nodes are free again.
    let other = device.claim().unwrap();
    let said = client.refused("blockdev-mirror", mirror("m", "top", "f"));
    assert!(said.contains("the block device is in use"), "{said}");
    drop(other);

    // Below a filter, for a job that ends in each of its ways, and one that fails to start.
    for force in [true, false] {
        client.run("blockdev-mirror", mirror("m", "top", "f"));
        client.wait("BLOCK_JOB_READY");
        assert!(device.is_claimed());
        client.run("block-job-cancel", json!({"device": "m", "force": force}));
        client.wait(if force { "BLOCK_JOB_CANCELLED" } else { "BLOCK_JOB_COMPLETED" });
        assert!(!device.is_claimed(), "force {force}");
    }
    client.run("block_resize", json!({"node-name": "top", "size": 2 * SIZE}));
    client.run("blockdev-mirror", mirror("m", "top", "f"));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_some());
    assert!(!device.is_claimed());
    client.run("blockdev-del", json!({"node-name": "f"}));

    // The guest goes over to it, and may do what it did: zeroing is refused to those beside a claim.
    client.export("base");
    client.run("blockdev-del", json!({"node-name": "top"}));
    client.run("blockdev-del", json!({"node-name": "mid"}));
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("base").unwrap().tap);
    client.run("blockdev-mirror", mirror("m", "base", "d"));
    client.wait("BLOCK_JOB_READY");
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    tap.write_zeroes(ByteRange::new(1 << 16, 2 << 16), ZeroFlags::MAY_UNMAP).unwrap();
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    client.run("block-job-complete", json!({"device": "m"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert!(!device.is_claimed());
    tap.write_zeroes(ByteRange::new(4 << 16, 5 << 16), ZeroFlags::MAY_UNMAP).unwrap();
    tap.discard(ByteRange::new(8 << 16, 9 << 16)).unwrap();
    tap.flush().unwrap();
    let byte = |block: u64| {
        let mut buf = [0xee];
        File::open(&file).unwrap().read_exact_at(&mut buf, block << 16).unwrap();
        buf[0]
    };
    assert_eq!([byte(1), byte(4), byte(5), byte(9)], [0, 0, 5, 0]);

    // And back again, by a second job: a source claims nothing.
    client.run("blockdev-mirror", mirror("n", "d", "base"));
    client.wait("BLOCK_JOB_READY");
    assert!(!device.is_claimed());
    client.run("block-job-complete", json!({"device": "n"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert_eq!(client.blocks("base"), [5]);
}

#[test]
fn commits_and_new_images_claim_what_they_write() {
    let mut client = Client::new();
    let file = client.path("disk");
    File::create(&file).unwrap().set_len(4 * SIZE).unwrap();
    let Some(device) = Loop::new(&file) else { return };
    client.add_device("d", &device);
    let create = json!({"driver": "qcow2", "file": "d", "size": SIZE});
    let make = |client: &mut Client| {
        client.run("blockdev-create", json!({"job-id": "c", "options": create}));
        client.wait_for_status("concluded");
        let error = client.run("query-jobs", json!({}))[0].get("error").cloned();
        client.run("job-dismiss", json!({"id": "c"}));
        error
    };
    let other = device.claim().unwrap();
    let said = make(&mut client).unwrap();
    assert!(said.as_str().unwrap().contains("the block device is in use"), "{said}");
    drop(other);
    assert_eq!(make(&mut client), None);
    assert!(!device.is_claimed());

    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "b", "file": "d"}));
    for (name, below) in [("mid", "b"), ("top", "mid")] {
        client.image(&format!("{name}.qcow2"), 3, None);
        client.add(name, &format!("{name}.qcow2"), json!(below));
    }
    let active = json!({"job-id": "j", "device": "top"});
    let middle = json!({"job-id": "j", "device": "top", "top-node": "mid", "auto-finalize": false});
    let other = device.claim().unwrap();
    for commit in [&active, &middle] {
        let said = client.refused("block-commit", commit.clone());
        assert!(said.contains("the block device is in use"), "{said}");
    }
    drop(other);
    client.run("block-commit", middle);
    client.wait("BLOCK_JOB_PENDING");
    assert!(device.is_claimed());
    client.run("job-finalize", json!({"id": "j"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert!(!device.is_claimed());
    client.run("block-commit", active);
    client.wait("BLOCK_JOB_READY");
    assert!(device.is_claimed());
    client.run("block-job-complete", json!({"device": "j"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert!(!device.is_claimed());
    assert_eq!(client.blocks("b"), [3]);
}

/// The source read through a loop device, the target the file below it, or the other way round.
#[test]
fn a_mirror_does_not_overwrite_its_source_by_another_name() {
    let mut client = Client::new();
    let file = client.path("disk");
    let bytes = vec![5; SIZE as usize];
    fs::write(&file, &bytes).unwrap();
    let Some(device) = Loop::new(&file) else { return };
    let plain = json!({"driver": "file", "node-name": "f", "filename": file, "locking": "off"});
    client.add_device("d", &device);
    client.run("blockdev-add", plain);
    client.image("top.qcow2", 3, None);
    let mirror = |source, target| json!({"job-id": "m", "device": source, "target": target, "sync": "full"});
    let refused = |client: &mut Client, source, target| {
        let said = client.refused("blockdev-mirror", mirror(source, target));
        assert!(said.contains(&format!("is part of the source '{source}'")), "{said}");
        let actions = json!([{"type": "blockdev-mirror", "data": mirror(source, target)}]);
        let said = client.refused("transaction", json!({"actions": actions}));
        assert!(said.contains("is part of the source"), "{said}");
    };
    refused(&mut client, "d", "f");
    refused(&mut client, "f", "d");
    client.add("top", "top.qcow2", json!("d"));
    refused(&mut client, "top", "f");
    client.run("blockdev-del", json!({"node-name": "f"}));
    let named = |source, mode, format| json!({"job-id": "m", "device": source, "target": file, "sync": "full", "mode": mode, "format": format});
    for (mode, why) in [("absolute-paths", "which is in use"), ("existing", "is part of the source")] {
        let said = client.refused("drive-mirror", named("top", mode, "raw"));
        assert!(said.contains(why), "{mode}: {said}");
    }
    client.run("blockdev-del", json!({"node-name": "top"}));
    for format in ["raw", "qcow2"] {
        let said = client.refused("drive-mirror", named("d", "absolute-paths", format));
        assert!(said.contains("which is in use") || said.contains("it stands on"), "{format}: {said}");
    }
    let snapshot = json!({"node-name": "d", "snapshot-node-name": "s", "snapshot-file": file});
    let said = client.refused("blockdev-snapshot-sync", snapshot);
    assert!(said.contains("backing file") || said.contains("part of the chain"), "{said}");
    assert!(fs::read(&file).unwrap() == bytes);
}
