//! Filters where they stand in practice: between a format and its file, and over a chain.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::ffi::OsStr;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, ErrorKind, Storage, WriteFlags};
use blockmirror_file::FileOptions;
use blockmirror_filter::{
    BlkdebugDisk, BlkdebugOptions, BlkdebugStorage, CopyOnRead, Event, InjectError, Rate, Throttle,
    ThrottleGroup, ThrottleLimits, ThrottleStorage,
};
use blockmirror_qcow2::{CreateOptions, OpenOptions};
use blockmirror_raw::{Raw, RawOptions};
use blockmirror_testing::qemu::{Qemu, run};
use blockmirror_testing::scratch::scratch;

fn file(path: &std::path::Path) -> Arc<dyn Storage> {
    Arc::new(FileOptions::new().writable(true).open(path).unwrap())
}

/// A throttled file with a fault in it: the write fails, the image stays sound and takes the next one.
#[test]
fn an_image_in_a_filtered_file() {
    let dir = scratch().unwrap();
    let path = dir.path().join("disk.qcow2");
    let new = FileOptions::new().create_new(true).open(&path).unwrap();
    CreateOptions::new(1 << 20).create(&new, None).unwrap();
    drop(new);
    let limits = ThrottleLimits { iops_total: Rate::per_second(1_000_000), ..Default::default() };
    let group = ThrottleGroup::new(limits).unwrap();
    let rule = InjectError { errno: 28, once: true, ..InjectError::new(Event::WriteAio) };
    let options = BlkdebugOptions { inject_error: vec![rule], max_transfer: 4096, ..Default::default() };
    let storage = BlkdebugStorage::new(Arc::new(ThrottleStorage::new(file(&path), &group)), options).unwrap();
    let disk = OpenOptions::new().writable(true).open(Arc::new(storage)).unwrap();
    assert_eq!(disk.write_at(&[1; 9000], 0, WriteFlags::NONE).unwrap_err().kind(), ErrorKind::NoSpace);
    disk.write_at(&[1; 9000], 0, WriteFlags::FUA).unwrap();
    drop(disk);
    let Some(qemu) = Qemu::find("filters") else { return };
    qemu.check(&path).unwrap();
    qemu.io("qcow2", &path, &["read -P 1 0 9000", "read -P 0 9000 50000"]).unwrap();
}

#[test]
fn what_is_read_through_copy_on_read_is_in_the_image_afterwards() {
    let Some(qemu) = Qemu::find("filters") else { return };
    let dir = scratch().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("base"), vec![7; 1 << 20]).unwrap();
    qemu.img_in(dir.path(), ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top"]).unwrap();
    let base = Raw::open(file(&path("base")), RawOptions::new()).unwrap();
    let top = OpenOptions::new().writable(true).backing(Arc::new(base)).open(file(&path("top"))).unwrap();
    let group = ThrottleGroup::new(ThrottleLimits::default()).unwrap();
    // The filters in between pass on what copy-on-read asks.
    let below = BlkdebugDisk::new(Arc::new(Throttle::new(Arc::new(top), &group)), BlkdebugOptions::default());
    let disk = CopyOnRead::new(Arc::new(below.unwrap()));
    let mut buf = vec![0; 70_000];
    disk.read_at(&mut buf, 100_000).unwrap();
    assert!(buf == vec![7; 70_000]);
    disk.flush().unwrap();
    drop(disk);
    qemu.check(&path("top")).unwrap();
    std::fs::write(path("base"), vec![8; 1 << 20]).unwrap();
    // Clusters of 64 KiB: 1 and 2 hold what was read.
    let script = ["read -P 8 0 65536", "read -P 7 65536 131072", "read -P 8 196608 65536"];
    qemu.io("qcow2", &path("top"), &script).unwrap();
}

/// The same rules and the same requests here and in QEMU: the same requests fail, and for the same reason.
#[test]
fn blkdebug_fails_what_qemus_does() {
    if Qemu::find("filters").is_none() {
        return;
    }
    let dir = scratch().unwrap();
    let rules = [
        "[inject-error]\nevent = \"read_aio\"\nonce = \"on\"\n[inject-error]\nevent = \"write_aio\"\nerrno = \"28\"\n\
         state = \"2\"\niotype = \"write\"\n[set-state]\nevent = \"write_aio\"\nstate = \"1\"\nnew_state = \"2\"\n",
        "[inject-error]\nevent = \"none\"\nsector = \"4\"\n[inject-error]\nevent = \"write_aio\"\nerrno = \"28\"\n\
         sector = \"2\"\n",
        "[inject-error]\nevent = \"read_aio\"\niotype = \"write\"\nonce = \"on\"\n[set-state]\nevent = \"pwritev\"\n\
         new_state = \"3\"\n[inject-error]\nevent = \"pwritev_done\"\nstate = \"3\"\nerrno = \"28\"\niotype = \"read\"\n",
    ];
    let requests = [
        "read 2048 512",
        "write 1024 512",
        "read 0 512",
        "write 1024 512",
        "read 2048 512",
        "write 0 512",
        "read 1024 512",
    ];
    for (n, rules) in rules.iter().enumerate() {
        std::fs::write(dir.path().join("rules"), rules).unwrap();
        std::fs::write(dir.path().join("disk"), vec![0; 1 << 20]).unwrap();
        let mut theirs = Vec::new();
        let mut args: Vec<&OsStr> = ["-f", "raw"].map(OsStr::new).to_vec();
        for request in requests {
            args.extend([OsStr::new("-c"), OsStr::new(request)]);
        }
        args.push(OsStr::new("blkdebug:rules:disk"));
        // qemu-io fails if a request does; what it says is on both streams.
        let said = match run("qemu-io", dir.path(), args) {
            Ok(said) => said,
            Err(said) => said.to_string(),
        };
        theirs.push(said.matches("Input/output error").count());
        theirs.push(said.matches("No space left on device").count());

        let mut options = BlkdebugOptions::default();
        options.read_config(dir.path().join("rules")).unwrap();
        let raw = Raw::open(file(&dir.path().join("disk")), RawOptions::new()).unwrap();
        let disk = BlkdebugDisk::new(Arc::new(raw), options).unwrap();
        let mut failed = Vec::new();
        for request in requests {
            let words: Vec<&str> = request.split(' ').collect();
            let at = words[1].parse().unwrap();
            let result = match words[0] {
                "read" => disk.read_at(&mut [0; 512], at),
                _ => disk.write_at(&[1; 512], at, WriteFlags::NONE),
            };
            failed.extend(result.err().map(|e| e.kind()));
        }
        let count = |kind| failed.iter().filter(|k| **k == kind).count();
        assert_eq!(vec![count(ErrorKind::Io), count(ErrorKind::NoSpace)], theirs, "rules {n}: {said}");
        assert!(!failed.is_empty(), "rules {n} fail nothing");
    }
}
