//! `-t` and `-T`: whatever the cache mode, the copy is the source. That each ends with a flush is tested over
//! NBD, where flushes can be counted (`tests/nbd/images.rs`).

use std::fs;

use super::targets::Loop;
use crate::common::{Place, have_qemu};

const MODES: [&str; 6] = ["none", "off", "writeback", "writethrough", "directsync", "unsafe"];

/// 1,000,001 bytes: no multiple of any block, with data up to the end and a hole in the middle.
fn odd(place: &Place) {
    let mut bytes: Vec<u8> = (0..1_000_001_u32).map(|at| (at % 251) as u8 + 1).collect();
    bytes[300_000..700_000].fill(0);
    fs::write(place.path("odd"), bytes).unwrap();
}

#[test]
fn a_copy_is_the_same_in_every_cache_mode() {
    let place = Place::new();
    odd(&place);
    for (n, mode) in MODES.into_iter().enumerate() {
        // Small clusters make requests that fit no block of a device.
        for (format, options) in
            [("raw", ""), ("qcow2", ""), ("qcow2", "-o cluster_size=512"), ("qcow2", "-o extended_l2=on")]
        {
            let options = format!("-O {format} {options}");
            let options = options.trim_end();
            place.ours_ok(&format!("convert -q -t {mode} -T {mode} -f raw {options} @odd @t"));
            let said = place.ours_ok(&format!("compare -T {mode} @odd @t"));
            assert_eq!(said, "Images are identical.\n", "{mode}: {options}");
            place.ours_ok(&format!("convert -q -n -t {mode} -T {mode} -f raw -O {format} @odd @t"));
            place.ours_ok(&format!("convert -q --in-place -t {mode} -f raw {options} @odd @t"));
            assert_eq!(place.ours_ok("compare @odd @t"), "Images are identical.\n", "{mode}: {options}");
        }
        let other = MODES[(n + 1) % MODES.len()];
        place.ours_ok(&format!("mirror -q -T {mode} -t {other} @t @u"));
        assert_eq!(place.ours_ok("compare @odd @u"), "Images are identical.\n", "{mode}, {other}");
        // The layers below the target are opened as it is.
        place.ours_ok("create -q -f qcow2 -b odd -F raw @top");
        place.ours_ok(&format!("convert -q -t {mode} -O qcow2 -B odd -F raw @top @u"));
        assert_eq!(place.ours_ok("compare @odd @u"), "Images are identical.\n", "{mode}");
        place.ours_ok(&format!("convert --dry-run -t {mode} -T {mode} @t @u"));
    }
    if have_qemu("a_copy_is_the_same_in_every_cache_mode") {
        place.ours_ok("convert -q -t none -T none -f raw -O qcow2 -o cluster_size=512 @odd @t");
        place.img("check -q @t");
        place.img("compare -q @odd @t");
    }
}

#[test]
fn an_unknown_cache_mode_is_refused() {
    let place = Place::new();
    odd(&place);
    let what = "unknown cache mode \"direct\": must be none, writeback, writethrough, directsync or unsafe";
    for (line, option) in [
        ("convert -t direct @odd @t", "--target-cache"),
        ("mirror -T direct @odd @t", "--source-cache"),
        ("compare -T direct @odd @odd", "--source-cache"),
    ] {
        assert_eq!(place.ours_fails(line, 2), format!("blockmirror: {option}: {what}"), "{line}");
    }
    assert_eq!(place.names(), ["odd"]);
}

/// Where the file system has no direct I/O that is said, and nothing is made.
#[test]
fn direct_io_that_is_not_possible_is_named() {
    let place = Place::new();
    odd(&place);
    let what = "the filesystem does not do direct I/O";
    for line in ["convert -T none -f raw /proc/version @t", "convert -T directsync -f raw /proc/version @t"] {
        assert_eq!(place.ours_fails(line, 1), format!("blockmirror: open: /proc/version: {what}"), "{line}");
    }
    assert_eq!(place.ours("compare -T none /proc/version @odd").code, 2);
    assert_eq!(place.names(), ["odd"]);
    place.ours_ok("convert -q -T unsafe -f raw /proc/version @t");
}

/// Blocks of 4 KiB: what is not aligned goes another way.
#[test]
fn a_device_with_large_sectors_is_read_and_written_directly() {
    let place = Place::new();
    odd(&place);
    place.ours_ok("create -q @disk 2M");
    let Some(device) = Loop::with("--sector-size 4096", &place.path("disk")) else { return };
    let device = &device.0;
    let odd = fs::read(place.path("odd")).unwrap();
    for mode in ["none", "directsync"] {
        for (format, options) in
            [("raw", "-n -O raw"), ("qcow2", "-O qcow2"), ("qcow2", "-O qcow2 -o cluster_size=512")]
        {
            place.ours_ok(&format!("convert -q -t {mode} -f raw {options} @odd {device}"));
            place.ours_ok(&format!("convert -q -T {mode} -t {mode} -f {format} -O raw {device} @back"));
            // The device is longer than a raw image in it.
            let back = fs::read(place.path("back")).unwrap();
            assert!(back.len() >= odd.len() && back[..odd.len()] == odd, "{mode}: {options}");
        }
    }
}
