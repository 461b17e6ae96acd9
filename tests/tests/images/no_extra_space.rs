//! Sparse stays sparse: the target allocates no cluster that the source's data does not touch.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;

use crate::common::ours_ok;
use blockmirror_testing::content::{Fill, write_raw};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::report;
use blockmirror_testing::scratch::{allocated, scratch};

const DISK: u64 = (48 << 20) + 512;
/// Data of one sector, of some clusters, across borders; far apart.
const RUNS: [(u64, u64, Fill); 6] = [
    (0, 512, Fill::Noise),
    ((5 << 20) + 61440, 8192, Fill::Noise),
    ((9 << 20) - 512, 1024, Fill::Noise),
    (14 << 20, 3 << 20, Fill::Noise),
    (30 << 20, 1 << 20, Fill::Zeros),
    (DISK - 512, 512, Fill::Noise),
];

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Bytes in target clusters that the data of `image` touches, as `qemu-img map` sees it.
fn touched(qemu: Qemu, format: &str, image: &Path, cluster: u64) -> u64 {
    let words = ["map", "--output=json", "-f", format].map(OsStr::new);
    let map = json(&qemu.img(words.into_iter().chain([image.as_os_str()])).unwrap());
    let mut clusters = BTreeSet::new();
    for row in map.as_array().unwrap() {
        if row["data"] == true {
            let (start, len) = (row["start"].as_u64().unwrap(), row["length"].as_u64().unwrap());
            clusters.extend(start / cluster..(start + len).div_ceil(cluster));
        }
    }
    clusters.len() as u64 * cluster
}

fn allocated_clusters(qemu: Qemu, image: &Path) -> u64 {
    let words = ["check", "--output=json", "-f", "qcow2"].map(OsStr::new);
    let check = json(&qemu.img(words.into_iter().chain([image.as_os_str()])).unwrap());
    check["allocated-clusters"].as_u64().unwrap_or(0)
}

#[test]
fn no_cluster_more_than_the_data_touches() {
    let Some(qemu) = Qemu::find("no_extra_space") else { return };
    let mut copies = 0;
    for source_cluster in [4096u64, 65536, 1 << 20] {
        let dir = scratch().unwrap();
        let (raw, source) = (dir.path().join("raw"), dir.path().join("source"));
        write_raw(&raw, DISK, &RUNS).unwrap();
        let options = format!("cluster_size={source_cluster}");
        qemu.img_in(dir.path(), ["convert", "-f", "raw", "-O", "qcow2", "-o", &options, "raw", "source"])
            .unwrap();
        for target_cluster in [512u64, 4096, 65536, 2 << 20] {
            let bound = touched(qemu, "qcow2", &source, target_cluster);
            for granularity in ["default", "512", "4K", "64K", "1M", "64M"] {
                let target = dir.path().join("target");
                let options = format!("cluster_size={target_cluster}");
                let mut words = vec!["mirror", "-q", "-f", "qcow2", "-O", "qcow2", "-o", &options];
                if granularity != "default" {
                    words.extend(["--granularity", granularity]);
                }
                let words = words.into_iter().map(OsStr::new);
                ours_ok(words.chain([source.as_os_str(), target.as_os_str()]));
                let used = allocated_clusters(qemu, &target) * target_cluster;
                assert!(
                    used <= bound,
                    "{source_cluster} -> {target_cluster} at {granularity}: {used} bytes, {bound} touched"
                );
                copies += 1;
                std::fs::remove_file(&target).unwrap();
            }
        }
    }
    report(format_args!("no extra space: {copies} copies within what their source's data touches"));
}

#[test]
fn a_sparse_raw_source_stays_sparse() {
    let dir = scratch().unwrap();
    let source = dir.path().join("source");
    write_raw(&source, DISK, &RUNS[..4]).unwrap();
    let before = allocated(&source).unwrap();
    for granularity in ["512", "64K", "64M"] {
        let target = dir.path().join("target");
        let words = ["mirror", "-q", "-f", "raw", "-O", "raw", "--granularity", granularity].map(OsStr::new);
        ours_ok(words.into_iter().chain([source.as_os_str(), target.as_os_str()]));
        let after = allocated(&target).unwrap();
        assert!(after * 100 <= before * 101, "at {granularity}: {after} bytes from {before}");
        assert!(std::fs::read(&source).unwrap() == std::fs::read(&target).unwrap(), "at {granularity}");
        std::fs::remove_file(&target).unwrap();
    }
}
