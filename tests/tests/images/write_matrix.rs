//! Writing: targets made with every option are clean to `qemu-img check`, leaks included, and hold what the
//! source does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::ffi::OsStr;

use crate::common::{ours, ours_ok};
use blockmirror_testing::content::write_raw;
use blockmirror_testing::matrix::{Combination, Feature, combinations};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::report;
use blockmirror_testing::scratch::scratch;

fn write_all(cluster: u64) {
    let Some(qemu) = Qemu::find("write_matrix") else { return };
    let mut written = 0;
    for combination in combinations(cluster) {
        if matches!(combination.feature, Feature::Deflate) {
            continue; // The target is a plain one: nothing is written compressed.
        }
        if combination.possible() {
            write_one(qemu, combination);
            written += 1;
        } else {
            refuse_one(combination);
        }
    }
    report(format_args!("write matrix, clusters of {cluster}: {written} combinations clean and identical"));
    assert!(written >= 19, "only {written} combinations");
}

fn write_one(qemu: Qemu, combination: Combination) {
    let dir = scratch().unwrap();
    let target = dir.path().join("target.qcow2");
    let options = combination.options(&dir.path().join("target").to_string_lossy());
    let mut words: Vec<&OsStr> = ["mirror", "-q", "-O", "qcow2", "-o", &options].map(OsStr::new).to_vec();
    let source;
    let format = match combination.feature {
        Feature::Chain => {
            let plain = Combination { feature: Feature::Chain, ..combination };
            source = plain.make(qemu, dir.path(), "source").unwrap();
            words.extend(["--sync=top", "-B", "source-middle.qcow2", "-F", "qcow2"].map(OsStr::new));
            "qcow2"
        }
        Feature::Zeroes => {
            source = combination.make(qemu, dir.path(), "source").unwrap();
            "qcow2"
        }
        _ => {
            source = dir.path().join("source.raw");
            write_raw(&source, combination.disk(), &combination.runs(1)).unwrap();
            "raw"
        }
    };
    words.extend([OsStr::new("-f"), OsStr::new(format), source.as_os_str(), target.as_os_str()]);
    ours_ok(&words);
    qemu.check(&target).unwrap_or_else(|e| panic!("{combination:?}: {e}"));
    qemu.compare(format, &source, "qcow2", &target).unwrap_or_else(|e| panic!("{combination:?}: {e}"));
}

/// A target that cannot exist is refused before anything is made.
fn refuse_one(combination: Combination) {
    let dir = scratch().unwrap();
    let (source, target) = (dir.path().join("source.raw"), dir.path().join("target.qcow2"));
    write_raw(&source, 1 << 20, &[]).unwrap();
    let options = combination.options("target");
    let words = ["mirror", "-q", "-f", "raw", "-O", "qcow2", "-o", &options].map(OsStr::new);
    let ran = ours(words.into_iter().chain([source.as_os_str(), target.as_os_str()]));
    assert_ne!(ran.code, 0, "{combination:?} was accepted");
    assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{combination:?}: {}", ran.stderr);
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["source.raw"], "{combination:?}");
}

#[test]
fn clusters_of_512() {
    write_all(512);
}

#[test]
fn clusters_of_4k() {
    write_all(4 << 10);
}

#[test]
fn clusters_of_64k() {
    write_all(64 << 10);
}

#[test]
fn clusters_of_2m() {
    write_all(2 << 20);
}
