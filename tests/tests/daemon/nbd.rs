//! Nodes of the daemon that are exports of another server, and jobs on them when that server goes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;

use crate::common::host::Host;
use crate::common::nbd::{Server, noise};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags, ZeroFlags};
use blockmirror_testing::qemu::{have, run};
use blockmirror_testing::scratch::{allocated, scratch};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// The export of `server` as options of a node.
fn node(server: &Server, name: &str) -> Value {
    json!({"driver": "nbd", "node-name": name,
           "server": {"type": "unix", "path": server.path("socket")}})
}

/// A `raw` node on an export was that export as formats use it, which never flushes again once a flush has
/// failed: a mirror to it that had stopped for a lost server stopped again at each flush, for ever.
#[test]
fn a_mirror_to_raw_on_an_export_goes_on_after_the_server_was_lost() {
    if !have("a_mirror_to_raw_on_an_export_goes_on_after_the_server_was_lost", &["qemu-nbd"]) {
        return;
    }
    let mut server = Server::qemu_raw(32 * MIB, &[]);
    let bytes = noise(1, 32 * MIB as usize);
    let source = server.path("source");
    fs::write(&source, &bytes).unwrap();
    let mut host =
        Host::start(server.dir.path(), "host", None, &crate::common::host::image("source", "raw", &source));
    host.must("blockdev-add", node(&server, "export"));
    host.must("blockdev-add", json!({"driver": "raw", "node-name": "target", "file": "export"}));
    host.must(
        "blockdev-mirror",
        json!({"job-id": "m", "device": "source", "target": "target", "sync": "full", "speed": 32 * MIB,
               "on-target-error": "stop"}),
    );
    host.wait_until(|job| job["copied"].as_u64() > Some(4 * MIB));
    server.kill();
    let stopped = host.wait_until(|job| job["paused"] == true);
    assert_eq!(stopped["io-status"], "failed");
    server.restart();
    host.must("block-job-set-speed", json!({"device": "m", "speed": 0}));
    // What was in flight reported its own failures.
    host.events.clear();
    host.must("block-job-resume", json!({"device": "m"}));
    let ready = host.wait_until(|job| job["ready"] == true || job["io-status"] != "ok");
    assert_eq!(ready["io-status"], "ok", "once resumed it does not stop again");
    assert!(!host.has_heard("BLOCK_JOB_ERROR"));
    host.must("job-complete", json!({"id": "m"}));
    assert_eq!(host.wait_for("BLOCK_JOB_COMPLETED").get("error"), None);
    host.quit();
    assert!(fs::read(server.path("image")).unwrap() == bytes);
}

/// What a server tells of its own backing chain is not the chain of this daemon's graph: a mirror of the top
/// of the latter copied only what the top image of the former held.
#[test]
fn the_servers_chain_is_not_ours() {
    if !have("the_servers_chain_is_not_ours", &["qemu-nbd", "qemu-img", "qemu-io"]) {
        return;
    }
    let dir = scratch().unwrap();
    let img = |line: &str| run("qemu-img", dir.path(), line.split(' ')).unwrap();
    img("create -q -f qcow2 base 4M");
    run("qemu-io", dir.path(), ["-c", "write -P 1 0 1M", "base"]).unwrap();
    img("create -q -f qcow2 -b base -F qcow2 top");
    run("qemu-io", dir.path(), ["-c", "write -P 2 2M 1M", "top"]).unwrap();
    img("create -q -f qcow2 target 4M");
    let server = Server::qemu(dir, "qcow2", "top", &["-A"]);
    let target = server.path("target");
    let mut host =
        Host::start(server.dir.path(), "host", None, &crate::common::host::image("target", "qcow2", &target));
    host.must("blockdev-add", node(&server, "source"));
    host.must(
        "blockdev-mirror",
        json!({"job-id": "m", "device": "source", "target": "target", "sync": "top"}),
    );
    host.wait_for("BLOCK_JOB_READY");
    host.must("block-job-cancel", json!({"device": "m"}));
    host.wait_for("BLOCK_JOB_COMPLETED");
    host.quit();
    drop(server.open());
    let uri = format!("nbd+unix:///?socket={}", server.path("socket").display());
    run("qemu-img", server.dir.path(), ["compare", "-F", "qcow2", &uri, "target"]).unwrap();
}

/// A node that was described inside of another one ignored the discards that the other let through.
#[test]
fn a_discard_reaches_the_file_below_a_filter() {
    let dir = scratch().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, noise(3, MIB as usize)).unwrap();
    let mut words = vec!["--object".to_owned(), "throttle-group,id=g".to_owned(), "--blockdev".to_owned()];
    let path = file.display();
    words.push(format!(
        "driver=throttle,node-name=disk,throttle-group=g,discard=unmap,file.driver=file,file.filename={path}"
    ));
    words.extend(crate::common::host::nbd_server(dir.path(), "host"));
    words.extend(crate::common::host::export("disk", "disk"));
    let host = Host::start(dir.path(), "host", None, &words);
    let disk = host.open("disk");
    disk.discard(ByteRange::new(0, MIB / 2)).unwrap();
    disk.flush().unwrap();
    drop(disk);
    host.quit();
    assert_eq!(allocated(&file).unwrap(), MIB / 2);
}

/// A guest could not write part of a cluster whose rest a layer below has lost. QEMU lets it, with zeros;
/// what a job may not copy stays lost.
#[test]
fn a_guest_writes_beside_what_was_cut_off() {
    const TEST: &str = "a_guest_writes_beside_what_was_cut_off";
    if !have(TEST, &["qemu-img", "qemu-io"]) {
        return;
    }
    let dir = scratch().unwrap();
    let at = |name: &str| dir.path().join(name);
    let img = |line: &str| run("qemu-img", dir.path(), line.split(' ')).unwrap();
    img("create -q -f qcow2 base 1M");
    run("qemu-io", dir.path(), ["-c", "write -P 1 0 1M", "base"]).unwrap();
    // Half of the overlay's fourth cluster is there.
    let base = fs::File::options().write(true).open(at("base")).unwrap();
    base.set_len(base.metadata().unwrap().len() - 9 * 65536).unwrap();
    for version in ["0.10", "1.1"] {
        for name in ["ours", "theirs"] {
            img(&format!("create -q -f qcow2 -o cluster_size=128K,compat={version} -b base -F qcow2 {name}"));
        }
        let mut words = crate::common::host::image("top", "qcow2", &at("ours")).to_vec();
        words.extend(crate::common::host::nbd_server(dir.path(), version));
        words.extend(crate::common::host::export("top", "disk"));
        let mut host = Host::start(dir.path(), version, None, &words);
        let disk = host.open("disk");
        let writes = [(0x61000, 4096), (0x73000, 512), (0x80200, 1024)];
        let zeroed = (0x61800, 512);
        let mut script = Vec::new();
        for (start, len) in writes {
            disk.write_at(&vec![9; len], start, WriteFlags::NONE).unwrap();
            script.extend(["-c".to_owned(), format!("write -P 9 {start} {len}")]);
        }
        disk.write_zeroes(ByteRange::at(zeroed.0, zeroed.1), ZeroFlags::NONE).unwrap();
        script.extend(["-c".to_owned(), format!("write -z {} {}", zeroed.0, zeroed.1), "theirs".to_owned()]);
        disk.flush().unwrap();
        drop(disk);
        run("qemu-io", dir.path(), &script).unwrap();
        // The job meets what no write has touched.
        fs::File::create(at("copy")).unwrap().set_len(MIB).unwrap();
        let file = json!({"driver": "file", "filename": at("copy")});
        host.must("blockdev-add", json!({"driver": "raw", "node-name": "copy", "file": file}));
        host.must(
            "blockdev-mirror",
            json!({"job-id": "m", "device": "top", "target": "copy", "sync": "full"}),
        );
        let ended = host.wait_for("BLOCK_JOB_COMPLETED");
        assert!(ended["error"].is_string(), "{ended}");
        host.quit();
        let log = fs::read_to_string(at(&format!("{version}.log"))).unwrap();
        assert_eq!(log.matches("export 'disk'").count(), 1, "{log}");
        let notice = log.lines().find(|line| line.starts_with("blockmirror: export 'disk': "));
        assert!(notice.is_some_and(|line| line.contains("cut short")), "{log}");
        img("compare -f qcow2 -F qcow2 ours theirs");
    }
}

/// The system's reason once was looked for where the error does not have it any more, and the text that
/// scripts know was gone.
#[test]
fn a_server_that_is_not_there_is_named_in_words_that_scripts_know() {
    let dir = scratch().unwrap();
    let mut host = Host::start(dir.path(), "host", None, &[]);
    let socket = dir.path().join("none");
    let server = json!({"type": "unix", "path": socket});
    let answer = host.ask("blockdev-add", json!({"driver": "nbd", "node-name": "n", "server": server}));
    let want = format!("Failed to connect to '{}': No such file or directory", socket.display());
    assert_eq!(answer["error"]["desc"], want);
    host.quit();
}
