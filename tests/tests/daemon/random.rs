//! Commands on chains in random order, against a plain array: whatever is done to the images, the guest reads
//! what it wrote, and in the end QEMU finds every image clean and reads the same from the last.
//! `BLOCKMIRROR_SEEDS` tells how many orders, and
//! `BLOCKMIRROR_SEED` the first of them. Skipped, visibly, without QEMU's tools.
//!
//! The guest writes, zeroes and discards where it likes, also while a job is *pending*. The images of a chain
//! have unequal lengths and layouts, and some targets of mirrors hide the backing file that their header
//! names.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod guest;
mod images;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::world::World;
use blockmirror_block::testing::Rng;
use blockmirror_testing::qemu::{Qemu, have};
use blockmirror_testing::scratch::scratch;
use guest::{Guest, same};
use images::Layer;
use serde_json::{Value, json};

/// How a job came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The guest is on the target now.
    Pivoted,
    /// The target is a copy.
    Kept,
    /// It failed, or was aborted; or it was no mirror.
    Other,
}

/// What was done so far; printed where the test fails.
#[derive(Default)]
struct Log(Vec<String>);

impl Log {
    fn push(&mut self, line: impl Into<String>) {
        self.0.push(line.into());
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{:#?}", self.0);
        }
    }
}

/// The daemon, the guest of its disk, and who gives the commands.
struct Session {
    world: World,
    /// None if the disk is written from elsewhere.
    guest: Option<Guest>,
    qemu: Qemu,
    len: u64,
    rng: Rng,
    dir: PathBuf,
    made: u32,
    /// The last job, by number: a start that is refused has events too.
    job: u32,
    /// Whether the next job passes through *pending* by itself.
    finalizes: bool,
    log: Log,
}

impl Session {
    fn new(qemu: Qemu, dir: &Path, disk: &Value, len: u64, seed: u64) -> Self {
        Self {
            world: World::ours(dir, &[disk.to_string()]),
            guest: None,
            qemu,
            len,
            rng: Rng::new(seed, 7),
            dir: dir.to_owned(),
            made: 0,
            job: 0,
            finalizes: true,
            log: Log(vec![format!("seed {seed}"), disk.to_string()]),
        }
    }

    /// The node that the guest uses.
    fn node(&mut self) -> String {
        let exports = self.world.must("query-block-exports", json!({}));
        exports[0]["node-name"].as_str().unwrap().to_owned()
    }

    /// Up to `most` requests of the guest.
    fn act(&mut self, most: u64) {
        let Some(guest) = &mut self.guest else { return };
        for _ in 0..self.rng.range(0, most) {
            self.log.push(guest.act());
        }
    }

    fn check(&self) {
        if let Some(guest) = &self.guest {
            guest.check().unwrap_or_else(|why| panic!("{why}"));
        }
    }

    /// The name of a new job.
    fn new_job(&mut self) -> String {
        self.job += 1;
        self.job()
    }

    /// The name of the last job.
    fn job(&self) -> String {
        format!("j{}", self.job)
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

    /// The nodes that hold images.
    fn images(&mut self) -> Vec<Value> {
        let nodes = self.world.must("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array().unwrap().iter();
        nodes.filter(|node| matches!(node["drv"].as_str(), Some("qcow2" | "raw"))).cloned().collect()
    }

    /// The image of a node, and the one below it.
    fn layers(&mut self, node: &str) -> (Layer, Option<Layer>) {
        let images = self.images();
        let layer = |image: &Value| Layer {
            path: image["file"].as_str().unwrap().into(),
            format: image["drv"].as_str().unwrap().to_owned(),
        };
        let this = images.iter().find(|image| image["node-name"] == node).unwrap();
        let below = images.iter().find(|image| image["file"] == this["backing_file"]);
        (layer(this), below.map(layer))
    }

    /// The nodes of the images below `node`, but for the one right below it.
    fn below(&mut self, node: &str) -> Vec<String> {
        let images = self.images();
        let find = |what: &str, is: &Value| images.iter().find(|image| image[what] == *is);
        let mut chain = Vec::new();
        let mut at = find("node-name", &json!(node));
        while let Some(image) = at.filter(|_| chain.len() < images.len()) {
            chain.push(image["node-name"].as_str().unwrap().to_owned());
            at = image.get("backing_file").and_then(|file| find("file", file));
        }
        chain.into_iter().skip(2).collect()
    }

    /// Waits for one of `states` of the job. Returns it, and whether the job has failed or was aborted.
    fn wait(&mut self, states: &[&str]) -> (String, bool) {
        let mut failed = false;
        loop {
            let (event, data) = self.world.next_event();
            let job = data.get("device").or(data.get("id"));
            if job.is_none_or(|job| *job != self.job()) {
                continue;
            }
            match event.as_str() {
                "BLOCK_JOB_CANCELLED" => failed = true,
                "BLOCK_JOB_COMPLETED" => {
                    failed = data.get("error").is_some();
                    if failed {
                        self.log.push(format!("{event}: {data}"));
                    }
                }
                "JOB_STATUS_CHANGE" => {
                    let status = data["status"].as_str().unwrap();
                    if states.contains(&status) {
                        return (status.to_owned(), failed);
                    }
                }
                _ => {}
            }
        }
    }

    /// Waits for the end of a job that may stop before it; there the guest goes on.
    fn wait_for_the_end(&mut self) -> bool {
        if self.finalizes {
            return self.wait(&["null"]).1;
        }
        let (state, failed) = self.wait(&["pending", "null"]);
        if state == "null" {
            return failed;
        }
        self.log.push("pending");
        self.act(16);
        self.check();
        let end = if self.rng.chance(80) { "job-finalize" } else { "job-cancel" };
        self.attempt(end, json!({"id": self.job()}));
        self.wait(&["null"]).1
    }

    /// Lets the job that was started come to its end, one or the other, while the guest writes.
    fn finish(&mut self, can_complete: bool, may_pivot: bool) -> End {
        self.act(2);
        if !can_complete {
            self.wait_for_the_end();
            return End::Other;
        }
        if self.rng.chance(20) {
            self.attempt("block-job-cancel", json!({"device": self.job(), "force": true}));
            self.wait(&["null"]);
            return End::Other;
        }
        if self.wait(&["ready", "null"]).0 == "null" {
            return End::Other;
        }
        self.act(3);
        let pivots = may_pivot && self.rng.chance(75);
        let (end, good) = match pivots {
            true => ("block-job-complete", End::Pivoted),
            false => ("block-job-cancel", End::Kept),
        };
        self.attempt(end, json!({"device": self.job()}));
        if self.wait_for_the_end() { End::Other } else { good }
    }

    /// Takes the middle out of a chain of three, with the guest about before the end: what it discards past
    /// the end of a shorter middle must not become what a longer base holds.
    fn open(&mut self) {
        let node = self.node();
        let Some(base) = self.below(&node).pop() else { return };
        self.finalizes = false;
        let arguments =
            json!({"job-id": self.new_job(), "device": node, "base-node": base, "auto-finalize": false});
        assert!(self.attempt("block-stream", arguments));
        self.finish(false, false);
        self.check();
    }

    fn step(&mut self) {
        let node = self.node();
        let images: Vec<_> =
            self.images().iter().map(|node| node["node-name"].as_str().unwrap().to_owned()).collect();
        let (one, other) = (self.rng.pick(&images), self.rng.pick(&images));
        self.finalizes = self.rng.chance(50);
        let finalizes = self.finalizes;
        match self.rng.below(13) {
            0 => {
                let (name, path) = self.new_file();
                let arguments = json!({"node-name": node, "snapshot-file": path, "snapshot-node-name": name});
                self.attempt("blockdev-snapshot-sync", arguments);
            }
            1 => self.snapshot(&node),
            2 | 3 => {
                let mut arguments = json!({"job-id": self.new_job(), "device": node, "base-node": other});
                if self.rng.chance(50) {
                    arguments["top-node"] = json!(one);
                }
                let is_active = arguments.get("top-node").is_none_or(|top| *top == *node);
                arguments["auto-finalize"] = json!(finalizes);
                if self.attempt("block-commit", arguments) {
                    self.finish(is_active, true);
                }
            }
            4 | 5 => {
                let device = if self.rng.chance(75) { &node } else { &one };
                // Mostly one that is allowed.
                let below = self.below(device);
                let base = match self.rng.chance(75) && !below.is_empty() {
                    true => self.rng.pick(&below),
                    false => other,
                };
                let arguments = json!({"job-id": self.new_job(), "device": device, "base-node": base, "auto-finalize": finalizes});
                if self.attempt("block-stream", arguments) {
                    self.finish(false, false);
                }
            }
            6 => {
                let arguments = json!({"job-id": self.new_job(), "device": node, "auto-finalize": finalizes});
                if self.attempt("block-stream", arguments) {
                    self.finish(false, false);
                }
            }
            7 => self.drive_mirror(&node),
            8 | 9 => self.mirror_to_a_target_that_hides(&node),
            10 => self.mirror_to_another_length(&node),
            11 => {
                self.attempt("blockdev-del", json!({"node-name": one}));
            }
            _ => self.reopen(&node),
        }
    }

    /// A snapshot onto an image that was made before, of any layout.
    fn snapshot(&mut self, node: &str) {
        let (name, path) = self.new_file();
        let (layer, _) = self.layers(node);
        images::create(self.qemu, &path, self.len, Some(&layer), &mut self.rng);
        self.world.must("blockdev-add", unattached(&name, &path));
        self.attempt("blockdev-snapshot", json!({"node": node, "overlay": name}));
    }

    fn drive_mirror(&mut self, node: &str) {
        let (name, path) = self.new_file();
        let mut arguments = json!({
            "job-id": self.new_job(), "device": node, "target": path, "node-name": name, "format": "qcow2",
            "sync": self.rng.pick(&["full", "top"]), "auto-finalize": self.finalizes,
            "copy-mode": self.rng.pick(&["background", "write-blocking", "auto"]),
        });
        if self.rng.chance(50) {
            let (_, below) = self.layers(node);
            images::create(self.qemu, &path, self.len, below.as_ref(), &mut self.rng);
            arguments["mode"] = json!("existing");
        }
        if self.attempt("drive-mirror", arguments) {
            self.finish(true, true);
        }
    }

    /// A mirror to an overlay that is opened without the backing file that its header names. The copy has to
    /// be right over it.
    fn mirror_to_a_target_that_hides(&mut self, node: &str) {
        let (name, path) = self.new_file();
        let (_, below) = self.layers(node);
        let sync = self.rng.pick(&["full", "top"]);
        let backing = if sync == "top" {
            below
        } else {
            // Under a full copy anything may lie.
            let images = self.images();
            let any = self.rng.pick(&images)["node-name"].clone();
            Some(self.layers(any.as_str().unwrap()).0)
        };
        images::create(self.qemu, &path, self.len, backing.as_ref(), &mut self.rng);
        self.world.must("blockdev-add", unattached(&name, &path));
        let arguments = json!({
            "job-id": self.new_job(), "device": node, "target": name, "sync": sync, "auto-finalize": self.finalizes,
            "copy-mode": self.rng.pick(&["background", "write-blocking", "auto"]),
            "granularity": self.rng.pick(&[0, 512, 4096, 65_536, 1 << 20]),
        });
        if !self.attempt("blockdev-mirror", arguments) {
            return;
        }
        let attached = match backing {
            Some(layer) if sync == "top" && self.rng.chance(50) => self.attach(&name, &layer),
            Some(_) if sync == "top" => false,
            _ => true,
        };
        let end = self.finish(true, attached);
        if end != End::Kept {
            return;
        }
        if let Some(guest) = &self.guest {
            let found = images::contents(self.qemu, &path);
            same(&found, guest.bytes()).unwrap_or_else(|why| panic!("the copy: {why}"));
        }
        self.attempt("blockdev-del", json!({"node-name": name}));
    }

    /// Gives the target of a running mirror the backing file that its header names.
    fn attach(&mut self, target: &str, layer: &Layer) -> bool {
        self.made += 1;
        let name = format!("b{}", self.made);
        let file = json!({"driver": "file", "filename": layer.path});
        let options = json!({"driver": layer.format, "node-name": name, "read-only": true, "file": file});
        self.attempt("blockdev-add", options)
            && self.attempt("blockdev-snapshot", json!({"node": name, "overlay": target}))
    }

    /// It fails, and the disk is what it was.
    fn mirror_to_another_length(&mut self, node: &str) {
        let (name, path) = self.new_file();
        let len = self.rng.pick(&[self.len - 512, self.len + 512, self.len / 2 / 512 * 512, self.len * 2]);
        images::create(self.qemu, &path, len, None, &mut self.rng);
        self.world.must("blockdev-add", unattached(&name, &path));
        let arguments = json!({"job-id": self.new_job(), "device": node, "target": name, "sync": "full"});
        if self.attempt("blockdev-mirror", arguments) {
            self.act(1);
            assert!(self.wait(&["null"]).1, "a mirror to {len} bytes");
        }
        self.attempt("blockdev-del", json!({"node-name": name}));
    }

    fn reopen(&mut self, node: &str) {
        let nodes = self.world.must("query-named-block-nodes", json!({"flat": true}));
        let find = |what: &str, is: &Value, is_file: bool| {
            let mut nodes = nodes.as_array().unwrap().iter();
            nodes
                .find(|node| node[what] == *is && (node["drv"] == "file") == is_file)
                .cloned()
                .unwrap_or_default()
        };
        let this = find("node-name", &json!(node), false);
        let file = find("file", &this["file"], true);
        let backing = match this.get("backing_file") {
            Some(name) => find("file", name, false),
            None => json!({}),
        };
        let discard = self.rng.pick(&["ignore", "unmap", "unmap"]);
        self.attempt(
            "blockdev-reopen",
            json!({"options": [{
                "driver": this["drv"], "node-name": node, "file": file["node-name"],
                "backing": backing["node-name"], "discard": discard,
            }]}),
        );
    }
}

/// A node of an image, without its backing file.
fn unattached(name: &str, path: &Path) -> Value {
    let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
    json!({"driver": "qcow2", "node-name": name, "backing": null, "file": file, "discard": "unmap"})
}

#[test]
fn whatever_is_done_to_its_images_a_guest_reads_what_it_wrote() {
    let Some(qemu) = Qemu::find("whatever_is_done_to_its_images_a_guest_reads_what_it_wrote") else { return };
    // The first by default is one in which a discard would show what a longer base holds, were it not kept
    // from that.
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let (first, seeds): (u64, u64) =
        (number("BLOCKMIRROR_SEED").unwrap_or(11), number("BLOCKMIRROR_SEEDS").unwrap_or(6));
    for seed in first..first + seeds {
        let dir = scratch().unwrap();
        let dir = dir.path();
        let (disk, bytes) = images::chain(qemu, dir, &mut Rng::new(seed, 9));
        let mut session = Session::new(qemu, dir, &disk, bytes.len() as u64, seed);
        session.guest = Some(Guest::new(dir, bytes, seed));
        session.open();
        for _ in 0..40 {
            session.act(2);
            session.step();
            session.check();
        }
        let node = session.node();
        let (last, _) = session.layers(&node);
        let Session { world, guest, log: _log, .. } = session;
        let guest = guest.unwrap();
        let wanted = guest.bytes().to_vec();
        drop(guest);
        world.end();
        let read = if last.format == "raw" {
            std::fs::read(&last.path).unwrap()
        } else {
            images::contents(qemu, &last.path)
        };
        same(&read, &wanted).unwrap_or_else(|why| panic!("QEMU: {why}"));
        all_clean(qemu, dir);
    }
}

fn all_clean(qemu: Qemu, dir: &Path) {
    for image in std::fs::read_dir(dir).unwrap() {
        let path = image.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "qcow2") {
            qemu.check(&path).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

/// The same while fio writes with checksums through the export: it notices nothing, and reads back all it
/// wrote.
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
        let file = json!({"driver": "file", "filename": dir.join("disk.qcow2")});
        let disk = json!({"driver": "qcow2", "node-name": "disk", "file": file});
        let mut session = Session::new(qemu, dir, &disk, 32 << 20, seed);
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
            session.step();
        };
        let Session { world, log, .. } = session;
        assert!(status.success(), "fio: {status}");
        assert!(log.0.iter().filter(|line| line.ends_with("{}")).count() > 10);
        world.end();
        all_clean(qemu, dir);
    }
}
