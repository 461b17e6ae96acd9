//! Disks whose length fits nothing: granularity, cluster, sector.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::ffi::OsStr;
use std::fs;

use crate::common::ours_ok;
use blockmirror_testing::content::{Fill, write_raw};
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::report;
use blockmirror_testing::scratch::scratch;

const SIZES: [u64; 7] = [0, 1, 511, 512, 1000, 65535, (1 << 20) + 512];

#[test]
fn every_size_survives_both_ways_at_every_granularity() {
    let qemu = Qemu::find("odd_sizes");
    let mut copies = 0;
    for size in SIZES {
        let dir = scratch().unwrap();
        let path = |name: &str| dir.path().join(name);
        write_raw(&path("source"), size, &[(0, size, Fill::Stamp(3))]).unwrap();
        // A disk is whole sectors: what is missing in the last one reads as zeros.
        let mut wanted = fs::read(path("source")).unwrap();
        wanted.resize(usize::try_from(size.next_multiple_of(512)).unwrap(), 0);
        for granularity in (9..=26).map(|bits| (1u64 << bits).to_string()) {
            let copy = |from: &str, source: &str, to: &str, target: &str| {
                let words =
                    ["mirror", "-q", "-f", from, "-O", to, "--granularity", &granularity].map(OsStr::new);
                ours_ok(words.into_iter().chain([path(source).as_os_str(), path(target).as_os_str()]));
            };
            copy("raw", "source", "qcow2", "image");
            copy("qcow2", "image", "raw", "back");
            copy("raw", "source", "raw", "plain");
            assert!(fs::read(path("back")).unwrap() == wanted, "{size} bytes at {granularity} through qcow2");
            let plain = fs::read(path("plain")).unwrap();
            assert!(plain == wanted || plain == wanted[..plain.len()], "{size} bytes at {granularity}, raw");
            assert!(plain.len() as u64 >= size);
            if let Some(qemu) = qemu {
                qemu.check(&path("image")).unwrap();
                qemu.compare("raw", &path("source"), "qcow2", &path("image")).unwrap();
            }
            for name in ["image", "back", "plain"] {
                fs::remove_file(path(name)).unwrap();
            }
            copies += 3;
        }
    }
    report(format_args!("odd sizes: {copies} copies of {} lengths", SIZES.len()));
    assert_eq!(copies, 3 * 18 * SIZES.len());
}
