//! Reading: what QEMU's tools wrote, in every version, cluster size and feature, reads as they read it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;

use crate::common::ours_ok;
use blockmirror_testing::matrix::combinations;
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::report;
use blockmirror_testing::scratch::scratch;

fn read_all(cluster: u64) {
    let Some(qemu) = Qemu::find("read_matrix") else { return };
    let mut read = 0;
    for (i, combination) in combinations(cluster).enumerate() {
        let dir = scratch().unwrap();
        let made = combination.make(qemu, dir.path(), &format!("image{i}"));
        let Ok(image) = made else {
            assert!(!combination.possible(), "{combination:?} should be possible: {made:?}");
            continue;
        };
        assert!(combination.possible(), "{combination:?} was made though it should not be possible");
        let (truth, raw) = (dir.path().join("truth"), dir.path().join("raw"));
        qemu.to_raw("qcow2", &image, &truth).unwrap();
        ours_ok([
            "convert".as_ref(),
            "-f".as_ref(),
            "qcow2".as_ref(),
            "-O".as_ref(),
            "raw".as_ref(),
            image.as_os_str(),
            raw.as_os_str(),
        ]);
        assert!(fs::read(&truth).unwrap() == fs::read(&raw).unwrap(), "{combination:?} reads differently");
        read += 1;
    }
    report(format_args!("read matrix, clusters of {cluster}: {read} combinations read as QEMU reads them"));
    assert!(read >= 21, "only {read} combinations");
}

#[test]
fn clusters_of_512() {
    read_all(512);
}

#[test]
fn clusters_of_4k() {
    read_all(4 << 10);
}

#[test]
fn clusters_of_64k() {
    read_all(64 << 10);
}

#[test]
fn clusters_of_2m() {
    read_all(2 << 20);
}
