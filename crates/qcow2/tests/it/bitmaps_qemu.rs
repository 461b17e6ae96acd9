//! Persistent bitmaps and QEMU: each reads the bits that the other has stored, and finds nothing wrong.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]
#![allow(clippy::single_range_in_vec_init, reason = "a list of runs may have one")]

use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use blockmirror_block::{BlockDevice, ByteRange, WriteFlags, ZeroFlags};
use blockmirror_file::FileOptions;
use blockmirror_qcow2::{BitmapOptions, OpenOptions, Qcow2};
use blockmirror_testing::eventually;
use blockmirror_testing::qemu::{have, listens};
use serde_json::Value;

use crate::qemu::{assert_clean, img, info, io};

const CLUSTERS: [u64; 4] = [512, 4096, 65536, 2 << 20];

fn open(path: &Path, writable: bool) -> Qcow2 {
    let file = FileOptions::new().writable(writable).open(path).unwrap();
    OpenOptions::new().writable(writable).open(Arc::new(file)).unwrap()
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The dirty runs of a bitmap as QEMU's NBD server shows them. It marks what is dirty as no data.
fn runs_by_qemu(dir: &Path, image: &str, bitmap: &str) -> Vec<Range<u64>> {
    let socket = dir.join("nbd.sock");
    let mut server = Command::new("qemu-nbd");
    server.current_dir(dir).args(["-r", "-t", "-x", "e", "-f", "qcow2", "-B", bitmap, "-k"]);
    let server = server.arg(&socket).arg(image).stdin(Stdio::null()).stderr(Stdio::null());
    let server = Server(server.spawn().unwrap());
    eventually("qemu-nbd listens", || listens(&socket));
    let export = format!(
        "driver=nbd,export=e,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let map = img(dir, &["map", "--output=json", "--image-opts", &export]).unwrap();
    drop(server);
    let _ = std::fs::remove_file(socket);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let mut runs: Vec<Range<u64>> = Vec::new();
    for row in map.iter().filter(|row| row["data"] == false) {
        let (start, len) = (row["start"].as_u64().unwrap(), row["length"].as_u64().unwrap());
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += len,
            _ => runs.push(start..start + len),
        }
    }
    runs
}

fn ours(path: &Path, bitmap: &str) -> Vec<Range<u64>> {
    open(path, false).read_bitmap(bitmap).unwrap().runs().collect()
}

#[test]
fn qemu_reads_the_bits_that_we_store() {
    if !have("qemu_reads_the_bits_that_we_store", &["qemu-img", "qemu-nbd"]) {
        return;
    }
    for cluster in CLUSTERS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let options = format!("cluster_size={cluster}");
        img(dir.path(), &["create", "-q", "-f", "qcow2", "-o", &options, "a.qcow2", "9M"]).unwrap();
        let disk = open(&path, true);
        disk.add_bitmap("fine", &BitmapOptions::new().granularity(512)).unwrap();
        disk.add_bitmap("coarse", &BitmapOptions::new()).unwrap();
        disk.add_bitmap("off", &BitmapOptions::new().disabled(true)).unwrap();
        disk.write_at(&[1; 3000], 1 << 20, WriteFlags::NONE).unwrap();
        disk.write_zeroes(ByteRange::at(2 << 20, 5 << 20), ZeroFlags::MAY_UNMAP).unwrap();
        disk.write_at(&[1; 100], (9 << 20) - 100, WriteFlags::NONE).unwrap();
        disk.store_bitmaps().unwrap();
        disk.flush().unwrap();
        drop(disk);
        assert_clean(dir.path(), "a.qcow2", "stored by us");
        let listed = info(dir.path(), "a.qcow2")["format-specific"]["data"]["bitmaps"].clone();
        let flags: Vec<_> = listed.as_array().unwrap().iter().map(|b| b["flags"].to_string()).collect();
        assert_eq!(flags, ["[\"auto\"]", "[\"auto\"]", "[]"], "clusters of {cluster}");
        for bitmap in ["fine", "coarse", "off"] {
            assert_eq!(
                runs_by_qemu(dir.path(), "a.qcow2", bitmap),
                ours(&path, bitmap),
                "{cluster}: {bitmap}"
            );
        }
        assert_eq!(ours(&path, "off"), []);
    }
}

#[test]
fn we_read_and_go_on_with_the_bits_that_qemu_stores() {
    if !have("we_read_and_go_on_with_the_bits_that_qemu_stores", &["qemu-img", "qemu-io", "qemu-nbd"]) {
        return;
    }
    for cluster in CLUSTERS {
        let dir = tempfile::tempdir().unwrap();
        let (dir, path) = (dir.path(), dir.path().join("a.qcow2"));
        let options = format!("cluster_size={cluster}");
        img(dir, &["create", "-q", "-f", "qcow2", "-o", &options, "a.qcow2", "9M"]).unwrap();
        img(dir, &["bitmap", "--add", "-g", "4096", "a.qcow2", "b"]).unwrap();
        img(dir, &["bitmap", "--add", "--disable", "a.qcow2", "off"]).unwrap();
        io(dir, "a.qcow2", &["write 1M 5k", "write -z 3M 4M", "discard 2M 64k"]).unwrap();
        assert_eq!(runs_by_qemu(dir, "a.qcow2", "b"), ours(&path, "b"), "clusters of {cluster}");
        let disk = open(&path, true);
        disk.write_at(&[1; 5000], 8 << 20, WriteFlags::NONE).unwrap();
        disk.merge_bitmap("off", &disk.read_bitmap("b").unwrap()).unwrap();
        disk.resize(10 << 20, false).unwrap();
        drop(disk);
        assert_clean(dir, "a.qcow2", "gone on by us");
        let found = ours(&path, "b");
        assert_eq!(found[..3], [1 << 20..(1 << 20) + 8192, 2 << 20..(2 << 20) + 65536, 3 << 20..7 << 20]);
        assert_eq!(found.last(), Some(&(9 << 20..10 << 20)), "what is new counts as written");
        for bitmap in ["b", "off"] {
            assert_eq!(runs_by_qemu(dir, "a.qcow2", bitmap), ours(&path, bitmap), "{cluster}: {bitmap}");
        }
        // QEMU goes on, with all of its verbs.
        io(dir, "a.qcow2", &["write 0 1"]).unwrap();
        img(dir, &["bitmap", "--clear", "--merge", "b", "--enable", "a.qcow2", "off"]).unwrap();
        img(dir, &["resize", "-q", "--shrink", "a.qcow2", "3000k"]).unwrap();
        img(dir, &["bitmap", "--remove", "a.qcow2", "b"]).unwrap();
        assert_eq!(ours(&path, "off").first(), Some(&(0..cluster.clamp(4096, 65536))));
        assert_clean(dir, "a.qcow2", "gone on by QEMU");
    }
}

/// The header has a backing file's name and its format too: both stay where they are found.
#[test]
fn an_overlay_keeps_its_backing_file() {
    if !have("an_overlay_keeps_its_backing_file", &["qemu-img"]) {
        return;
    }
    for cluster in [512, 1024, 2048, 4096, 65536] {
        let dir = tempfile::tempdir().unwrap();
        let (dir, path) = (dir.path(), dir.path().join("a.qcow2"));
        std::fs::write(dir.join("base"), vec![7; 1 << 20]).unwrap();
        let options = format!("cluster_size={cluster}");
        img(dir, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "-o", &options, "a.qcow2"])
            .unwrap();
        let disk = open(&path, true);
        disk.add_bitmap("b", &BitmapOptions::new().granularity(65536)).unwrap();
        disk.write_at(&[1; 65536], 65536, WriteFlags::NONE).unwrap();
        drop(disk);
        let found = info(dir, "a.qcow2");
        assert_eq!(
            (&found["backing-filename"], &found["backing-filename-format"]),
            (&"base".into(), &"raw".into())
        );
        assert_eq!(ours(&path, "b"), [65536..131_072], "clusters of {cluster}");
        open(&path, true).remove_bitmap("b").unwrap();
        assert_eq!(info(dir, "a.qcow2")["backing-filename"], "base");
        assert_clean(dir, "a.qcow2", "an overlay");
    }
}
