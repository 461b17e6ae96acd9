//! Commands on chains in random order, against a plain array: whatever is done to the images, the guest reads what it wrote, and
//! in the end QEMU finds every image clean and reads the same from the last. `BLOCKMIRROR_SEEDS` tells how many orders, and
//! `BLOCKMIRROR_SEED` the first of them. Skipped, visibly, without QEMU's tools.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

#[path = "common/world.rs"]
mod world;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blockmirror_tests::qemu::{Qemu, have};
use blockmirror_tests::rng::Rng;
use blockmirror_tests::scratch::scratch;
use serde_json::{Value, json};
use world::World;

const BLOCK: u64 = 64 << 10;
const BLOCKS: usize = 16;

/// The daemon, and what its guest has written.
struct Guest {
    world: World,
    blocks: [u8; BLOCKS],
    /// Somebody else writes.
    is_passive: bool,
    rng: Rng,
    dir: PathBuf,
    made: u32,
    log: Vec<String>,
}

impl Guest {
    fn new(dir: &Path, seed: u64) -> Self {
        let file = dir.join("disk.qcow2").display().to_string();
        let node = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={file}");
        Self {
            world: World::ours(dir, &[node]),
            blocks: [0; BLOCKS],
            is_passive: false,
            rng: Rng::new(seed, 7),
            dir: dir.to_owned(),
            made: 0,
            log: Vec::new(),
        }
    }

    /// The node that the guest uses.
    fn node(&mut self) -> String {
        let exports = self.world.must("query-block-exports", json!({}));
        exports[0]["node-name"].as_str().unwrap().to_owned()
    }

    fn line(&mut self, command: &str) -> String {
        let line = format!("qemu-io {} \"{command}\"", self.node());
        let text = self.world.must("human-monitor-command", json!({"command-line": line}));
        text.as_str().unwrap().to_owned()
    }

    fn write(&mut self) {
        if self.is_passive {
            return;
        }
        let (at, byte) = (self.rng.index(BLOCKS), self.rng.range(1, 255) as u8);
        let offset = at as u64 * BLOCK;
        match self.rng.below(8) {
            0 => {
                self.blocks[at] = 0;
                assert_eq!(self.line(&format!("write -q -zu {offset} {BLOCK}")), "");
            }
            _ => {
                self.blocks[at] = byte;
                assert_eq!(self.line(&format!("write -q -P {byte} {offset} {BLOCK}")), "");
            }
        }
    }

    fn check(&mut self) {
        for at in 0..BLOCKS {
            let command = format!("read -q -P {} {} {BLOCK}", self.blocks[at], at as u64 * BLOCK);
            let said = self.line(&command);
            assert_eq!(said, "", "after {:#?}", self.log);
        }
    }

    /// Asks for something that may be refused; true if it was not.
    fn attempt(&mut self, command: &str, arguments: Value) -> bool {
        let said = self.world.refusal(command, arguments.clone());
        self.log.push(format!("{command} {arguments}: {said}"));
        said == "{}"
    }

    fn new_file(&mut self) -> (String, PathBuf) {
        self.made += 1;
        let name = format!("n{}", self.made);
        let path = self.dir.join(format!("{name}.qcow2"));
        (name, path)
    }

    /// The names of the nodes that hold images.
    fn images(&mut self) -> Vec<String> {
        let nodes = self.world.must("query-named-block-nodes", json!({"flat": true}));
        let images = nodes.as_array().unwrap().iter().filter(|node| node["drv"] == "qcow2");
        images.map(|node| node["node-name"].as_str().unwrap().to_owned()).collect()
    }

    /// Lets the job that was started come to its end, one or the other, while the guest writes.
    fn finish(&mut self, can_complete: bool) {
        for _ in 0..self.rng.below(3) {
            self.write();
        }
        if !can_complete {
            self.world.wait_for_status("null");
            return;
        }
        if self.rng.chance(20) {
            self.attempt("block-job-cancel", json!({"device": "j", "force": true}));
            self.world.wait_for_status("null");
            return;
        }
        self.world.wait_for("BLOCK_JOB_READY");
        self.write();
        let end = if self.rng.chance(75) { "block-job-complete" } else { "block-job-cancel" };
        self.attempt(end, json!({"device": "j"}));
        self.world.wait_for_status("null");
    }

    fn step(&mut self) {
        let node = self.node();
        let images = self.images();
        let (one, other) = (self.rng.pick(&images), self.rng.pick(&images));
        match self.rng.below(9) {
            0 | 1 => {
                let (name, path) = self.new_file();
                let arguments = json!({"node-name": node, "snapshot-file": path, "snapshot-node-name": name});
                self.attempt("blockdev-snapshot-sync", arguments);
            }
            2 | 3 => {
                let mut arguments =
                    json!({"job-id": "j", "device": node, "top-node": one, "base-node": other});
                if self.rng.chance(50) {
                    arguments = json!({"job-id": "j", "device": node, "base-node": other});
                }
                let is_active = arguments.get("top-node").is_none_or(|top| *top == *node);
                if self.attempt("block-commit", arguments) {
                    self.finish(is_active);
                }
            }
            4 => {
                let arguments = json!({"job-id": "j", "device": one, "base-node": other});
                if self.attempt("block-stream", arguments) {
                    self.finish(false);
                }
            }
            5 => {
                if self.attempt("block-stream", json!({"job-id": "j", "device": node})) {
                    self.finish(false);
                }
            }
            6 => {
                let (name, path) = self.new_file();
                let sync = self.rng.pick(&["full", "top"]);
                let mode = self.rng.pick(&["background", "write-blocking", "auto"]);
                let arguments = json!({
                    "job-id": "j", "device": node, "target": path, "node-name": name, "sync": sync, "copy-mode": mode,
                });
                if self.attempt("drive-mirror", arguments) {
                    self.finish(true);
                }
            }
            7 => {
                self.attempt("blockdev-del", json!({"node-name": one}));
            }
            _ => self.reopen(&node),
        }
    }

    fn reopen(&mut self, node: &str) {
        let nodes = self.world.must("query-named-block-nodes", json!({"flat": true}));
        let find = |what: &str, is: &Value, driver: &str| {
            let mut nodes = nodes.as_array().unwrap().iter();
            nodes.find(|node| node[what] == *is && node["drv"] == driver).cloned().unwrap_or_default()
        };
        let this = find("node-name", &json!(node), "qcow2");
        let file = find("file", &this["file"], "file");
        let backing = find("file", &this["backing_file"], "qcow2");
        let discard = self.rng.pick(&["ignore", "unmap"]);
        self.attempt(
            "blockdev-reopen",
            json!({"options": [{
                "driver": "qcow2", "node-name": node, "file": file["node-name"], "backing": backing["node-name"],
                "discard": discard,
            }]}),
        );
    }
}

#[test]
fn whatever_is_done_to_its_images_a_guest_reads_what_it_wrote() {
    let Some(qemu) = Qemu::find("whatever_is_done_to_its_images_a_guest_reads_what_it_wrote") else { return };
    let seeds = std::env::var("BLOCKMIRROR_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    let first = std::env::var("BLOCKMIRROR_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    for seed in first..first + seeds {
        let dir = scratch().unwrap();
        let dir = dir.path();
        qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "disk.qcow2", "1M"]).unwrap();
        let mut guest = Guest::new(dir, seed);
        guest.log.push(format!("seed {seed}"));
        for _ in 0..40 {
            guest.write();
            guest.step();
            guest.check();
        }
        let node = guest.node();
        let nodes = guest.world.must("query-named-block-nodes", json!({"flat": true}));
        let last =
            nodes.as_array().unwrap().iter().find(|n| n["node-name"] == *node).unwrap()["file"].clone();
        let Guest { world, blocks, log, .. } = guest;
        world.end();
        let script: Vec<_> =
            (0..BLOCKS).map(|at| format!("read -P {} {} {BLOCK}", blocks[at], at as u64 * BLOCK)).collect();
        let script: Vec<_> = script.iter().map(String::as_str).collect();
        let read = qemu.io("qcow2", Path::new(last.as_str().unwrap()), &script).unwrap();
        assert!(!read.contains("failed"), "{read} after {log:#?}");
        all_clean(qemu, dir, &log);
    }
}

fn all_clean(qemu: Qemu, dir: &Path, log: &[String]) {
    for image in std::fs::read_dir(dir).unwrap() {
        let path = image.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "qcow2") {
            qemu.check(&path).unwrap_or_else(|error| panic!("{error} after {log:#?}"));
        }
    }
}

/// The same while fio writes with checksums through the export: it notices nothing, and reads back all it wrote.
#[test]
fn a_client_writes_whatever_is_done_to_its_images() {
    let Some(qemu) = Qemu::find("a_client_writes_whatever_is_done_to_its_images") else { return };
    if !have("a_client_writes_whatever_is_done_to_its_images", &["fio"]) {
        return;
    }
    for seed in 0..3 {
        let dir = scratch().unwrap();
        let dir = dir.path();
        qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "disk.qcow2", "32M"]).unwrap();
        let mut guest = Guest::new(dir, seed);
        guest.is_passive = true;
        let mut client = Command::new("fio")
            .current_dir(dir)
            .args(["--name=w", "--rw=randwrite", "--bs=4k", "--size=16M", "--iodepth=8", "--minimal"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--rate_iops=2500", "--ioengine=nbd"])
            .arg(format!("--uri=nbd+unix:///disk?socket={}", dir.join("nbd").display()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let status = loop {
            if let Some(status) = client.try_wait().unwrap() {
                break status;
            }
            guest.step();
        };
        let Guest { world, log, .. } = guest;
        assert!(status.success(), "fio: {status} after {log:#?}");
        assert!(log.iter().filter(|line| line.ends_with("{}")).count() > 10, "{log:#?}");
        world.end();
        all_clean(qemu, dir, &log);
    }
}
