//! The choice this project is about: the granularity, read from real targets, and what is refused.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::path::Path;

use crate::common::{ours, ours_ok};
use blockmirror_testing::content::write_raw;
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;

const DISK: u64 = 1 << 20;

/// `-o` of the target, and the granularity it calls for.
const QCOW2: [(&str, u64); 13] = [
    ("cluster_size=512", 4096),
    ("cluster_size=1k", 4096),
    ("cluster_size=2k", 4096),
    ("cluster_size=4k", 4096),
    ("cluster_size=8k", 8192),
    ("cluster_size=16k", 16384),
    ("cluster_size=32k", 32768),
    ("cluster_size=64k", 65536),
    ("cluster_size=128k", 65536),
    ("cluster_size=512k", 65536),
    ("cluster_size=1M", 65536),
    ("cluster_size=2M", 65536),
    ("cluster_size=16k,extended_l2=on", 16384),
];

fn granularity(words: &[&str], source: &Path, target: &Path) -> u64 {
    let head = ["mirror", "--dry-run", "--output=json", "-f", "raw"].map(str::as_ref);
    let tail = [source.as_os_str(), target.as_os_str()];
    let text = ours_ok(head.into_iter().chain(words.iter().map(AsRef::as_ref)).chain(tail));
    let plan: serde_json::Value = serde_json::from_str(&text).unwrap();
    plan["granularity"].as_u64().unwrap_or_else(|| panic!("no granularity in {text}"))
}

#[test]
fn a_target_that_exists_tells_its_granularity() {
    let Some(qemu) = Qemu::find("granularity") else { return };
    let dir = scratch().unwrap();
    let source = dir.path().join("source.raw");
    write_raw(&source, DISK, &[]).unwrap();
    for (options, wanted) in QCOW2 {
        let target = dir.path().join("target.qcow2");
        qemu.img_in(dir.path(), ["create", "-q", "-f", "qcow2", "-o", options, "target.qcow2", "1M"])
            .unwrap();
        assert_eq!(granularity(&["-n", "-O", "qcow2"], &source, &target), wanted, "{options}");
    }
    let target = dir.path().join("target.raw");
    write_raw(&target, DISK, &[]).unwrap();
    assert_eq!(granularity(&["-n", "-O", "raw"], &source, &target), 65536);
}

#[test]
fn a_target_to_be_made_is_predicted_from_its_options() {
    let dir = scratch().unwrap();
    let (source, target) = (dir.path().join("source.raw"), dir.path().join("target"));
    write_raw(&source, DISK, &[]).unwrap();
    for (options, wanted) in QCOW2 {
        assert_eq!(granularity(&["-O", "qcow2", "-o", options], &source, &target), wanted, "{options}");
    }
    assert_eq!(granularity(&["-O", "qcow2"], &source, &target), 65536);
    assert_eq!(granularity(&["-O", "raw"], &source, &target), 65536);
    assert_eq!(granularity(&["-O", "raw", "--granularity", "1M"], &source, &target), 1 << 20);
    assert!(!target.exists(), "a dry run makes nothing");
}

/// QEMU's drive-mirror leaves the new target behind when it then refuses the granularity.
#[test]
fn a_wrong_granularity_is_one_line_and_leaves_no_file() {
    let dir = scratch().unwrap();
    let (source, target) = (dir.path().join("source.raw"), dir.path().join("target.qcow2"));
    write_raw(&source, DISK, &[]).unwrap();
    for wrong in ["511", "513", "3000", "128M", "0x", "-1"] {
        let words = ["mirror", "-f", "raw", "-O", "qcow2", "--granularity", wrong].map(str::as_ref);
        let ran = ours(words.into_iter().chain([source.as_os_str(), target.as_os_str()]));
        assert_ne!(ran.code, 0, "{wrong}");
        assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{wrong}: {}", ran.stderr);
        assert!(ran.stderr.contains(wrong) || ran.stderr.contains("granularity"), "{wrong}: {}", ran.stderr);
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["source.raw"], "{wrong}");
    }
}
