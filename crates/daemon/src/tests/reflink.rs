//! A mirror under a guest that shares blocks: only if it is asked to. Needs root, loop devices, `mkfs.xfs`
//! and `mkfs.btrfs`; skipped visibly without.

use std::fs;

use blockmirror_testing::LoopFs;

use super::*;

/// Mirrors `d` to a new image on `fs` with the guest writing; what `query-block-jobs` says of it once it is
/// ready.
fn mirrored(client: &mut Client, fs: &LoopFs, reflink: &str) -> Value {
    let target = fs.path().join(format!("{reflink}.qcow2"));
    let mirror = json!({
        "job-id": "m", "device": "d", "target": target, "format": "qcow2", "sync": "full", "x-reflink": reflink,
    });
    client.run("drive-mirror", mirror);
    client.wait("BLOCK_JOB_READY");
    let info = client.run("query-block-jobs", json!({}))[0].clone();
    let stats = client.run("query-blockstats", json!({"query-nodes": true}));
    let written = |node: &Value| node["stats"]["wr_highest_offset"] == SIZE;
    assert!(stats.as_array().unwrap().iter().any(written), "{reflink}: {stats}");
    client.run("block-job-cancel", json!({"device": "m"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    client.wait_for_status("null");
    info
}

#[test]
fn a_mirror_shares_blocks_only_if_it_is_asked_to() {
    for fs in LoopFs::with_reflinks("a_mirror_shares_blocks_only_if_it_is_asked_to") {
        let mut client = Client::new();
        let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 251) as u8 + 1).collect();
        let path = fs.path().join("source.raw");
        fs::write(&path, &bytes).unwrap();
        client.run(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "d", "file": {
            "driver": "file", "filename": path}}),
        );
        for (reflink, shares) in [("auto", false), ("never", false), ("always", true)] {
            let info = mirrored(&mut client, &fs, reflink);
            assert_eq!(info["shared"].as_u64().unwrap() > 0, shares, "{reflink}: {info}");
            assert_eq!(info["clone-calls"].as_u64().unwrap() > 0, shares, "{reflink}: {info}");
        }
        let elsewhere = client.path("t.qcow2");
        let refused = client.refused(
            "drive-mirror",
            json!({"job-id": "m", "device": "d", "target": elsewhere, "format": "qcow2", "sync": "full",
                "x-reflink": "always"}),
        );
        assert!(refused.contains("can share no blocks with source"), "{refused}");
        assert!(!elsewhere.exists(), "{refused}");
        drop(client);
        assert!(fs::read(&path).unwrap() == bytes);
    }
}

/// What is shared with the file below blkverify is compared with nothing.
#[test]
fn a_mirror_from_blkverify_shares_nothing() {
    for fs in LoopFs::with_reflinks("a_mirror_from_blkverify_shares_nothing") {
        let mut client = Client::new();
        for name in ["test", "raw"] {
            let path = fs.path().join(name);
            fs::write(&path, vec![7; 1 << 20]).unwrap();
            client.run(
                "blockdev-add",
                json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": path}}),
            );
        }
        client.run(
            "blockdev-add",
            json!({"driver": "blkverify", "node-name": "v", "test": "test", "raw": "raw"}),
        );
        let refused = client.refused(
            "drive-mirror",
            json!({"job-id": "m", "device": "v", "target": fs.path().join("t"), "format": "raw",
                "sync": "full", "x-reflink": "always"}),
        );
        assert!(refused.contains("can share no blocks with source"), "{refused}");
    }
}
