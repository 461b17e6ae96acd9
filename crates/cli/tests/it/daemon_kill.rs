//! A daemon that is killed: what it leaves of persistent bitmaps.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a failure is the point")]

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blockmirror_qmp::Client;
use serde_json::{Value, json};

use crate::common::{Place, have_qemu};

const OURS: &str = env!("CARGO_BIN_EXE_blockmirror");
/// Nothing here takes longer, on a machine that works at all.
const LIMIT: Duration = Duration::from_secs(60);

/// A daemon with the nodes `base` and, on it, `top`.
struct Running {
    daemon: Child,
    client: Client,
}

impl Running {
    fn new(place: &Place) -> Self {
        let _ = std::fs::remove_file(place.path("pid"));
        let node = |name: &str, backing: &str| {
            format!("driver=qcow2,node-name={name},file.driver=file,file.filename={name}{backing}")
        };
        let daemon = Command::new(OURS)
            .current_dir(place.path("."))
            .arg("daemon")
            .args(["--blockdev", &node("base", ""), "--blockdev", &node("top", ",backing=base")])
            .args(["--chardev", "socket,id=c,path=qmp,server=on,wait=off", "--monitor", "chardev=c"])
            .args(["--pidfile", "pid"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let since = Instant::now();
        while !place.path("pid").exists() {
            assert!(since.elapsed() < LIMIT, "the daemon does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { daemon, client: Client::connect(place.path("qmp"), LIMIT).unwrap() }
    }

    fn must(&mut self, command: &str, arguments: Value) {
        self.client.execute(command, arguments).unwrap();
    }

    fn wait_for(&mut self, event: &str) {
        while self.client.next_event(LIMIT).unwrap().expect("an event in time").name != event {}
    }

    /// Commits `top`, in which a block was written that its bitmap has recorded, into `base`.
    fn commit(&mut self) {
        self.must("block-dirty-bitmap-add", json!({"node": "top", "name": "b", "granularity": 65536}));
        let write = "qemu-io top \"write -P 7 320k 64k\"";
        self.must("human-monitor-command", json!({"command-line": write}));
        self.must("block-commit", json!({"job-id": "j", "device": "top"}));
        self.wait_for("BLOCK_JOB_READY");
        self.must("job-complete", json!({"id": "j"}));
        self.wait_for("BLOCK_JOB_COMPLETED");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SIGKILL.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// The flags of the bitmap that `base` stores, as `qemu-img` sees them.
fn flags(place: &Place) -> Value {
    place.img("check -q @base");
    let info: Value = serde_json::from_str(&place.img("info --output=json @base")).unwrap();
    let bitmaps = &info["format-specific"]["data"]["bitmaps"];
    assert_eq!(bitmaps[0]["name"], "b", "{bitmaps}");
    bitmaps[0]["flags"].clone()
}

/// `base` stores a bitmap of the same name as that of `top`, which records. What a client backs up by it
/// after the commit must not miss the block.
#[test]
fn a_bitmap_that_a_commit_has_joined_is_inconsistent_after_a_kill_and_whole_after_an_end() {
    if !have_qemu("a_bitmap_that_a_commit_has_joined") {
        return;
    }
    for killed in [true, false] {
        let place = Place::new();
        place.img("create -q -f qcow2 @base 1M");
        place.img("bitmap --add --disable @base b");
        place.img("create -q -f qcow2 -b base -F qcow2 @top");
        let mut running = Running::new(&place);
        running.commit();
        if killed {
            drop(running);
            assert_eq!(flags(&place), json!(["in-use"]));
            continue;
        }
        running.must("quit", json!({}));
        assert_eq!(running.daemon.wait().unwrap().code(), Some(0));
        assert_eq!(flags(&place), json!(["auto"]));
        place.img("bitmap --add --disable @base copy");
        place.img("bitmap --merge b @base copy");
        let mut running = Running::new(&place);
        let nodes = running.client.execute("query-named-block-nodes", json!({})).unwrap();
        let base = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "base").unwrap();
        assert_eq!(base["dirty-bitmaps"][0]["count"], 65536, "{base}");
    }
}
