//! `resize`, beside `qemu-img`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::os::unix::fs::MetadataExt;

use common::{Place, have_qemu};

#[test]
fn sizes_are_absolute_or_by_how_much() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 1M");
    assert_eq!(place.ours_ok("resize @disk +1M").split(": ").last().unwrap(), "2 MiB (2097152 bytes)\n");
    assert_eq!(place.ours_ok("resize -q @disk 3M"), "");
    assert_eq!(
        place.ours_fails("resize @disk -1M", 2),
        "blockmirror: resize: @disk: 2097152 bytes would cut off the last 1048576 of 3145728; --shrink allows it"
    );
    place.ours_ok("resize -q --shrink @disk -1M");
    assert!(place.ours_ok("info @disk").contains("2 MiB (2097152 bytes)"));
    assert_eq!(
        place.ours_fails("resize --shrink @disk -2M", 2),
        "blockmirror: resize: @disk: it has 2097152 bytes, which cannot be changed by that much"
    );
    assert_eq!(
        place.ours_fails("resize --shrink --preallocation=full @disk 1M", 2),
        "blockmirror: resize: @disk: --preallocation is for what is added, and 1048576 bytes are less than 2097152"
    );
    assert_eq!(place.ours("resize --preallocation=metadata @disk 4M").code, 2);
    place.ours_ok("resize -q --shrink --preallocation=off @disk 1000");
    assert!(place.ours_ok("info @disk").contains("(1024 bytes)"), "rounded up");
}

#[test]
fn raw_and_overlays() {
    if !have_qemu("resize") {
        return;
    }
    let place = Place::new();
    std::fs::write(place.path("base"), vec![7; 2 << 20]).unwrap();
    place.img("create -q -f qcow2 -b base -F raw @overlay 1M");
    place.ours_ok("resize -q @overlay 3M");
    place.img("check -q @overlay");
    std::fs::write(place.path("want"), [vec![7; 1 << 20], vec![0; 2 << 20]].concat()).unwrap();
    place.img("compare -q -F raw @overlay @want");
    place.ours_ok("resize -q --shrink -f raw @base 4096");
    assert_eq!(std::fs::metadata(place.path("base")).unwrap().len(), 4096);
}

#[test]
fn what_is_added_can_be_allocated_at_once() {
    let have_qemu = have_qemu("resize");
    for (format, mode) in [("raw", "falloc"), ("raw", "full"), ("qcow2", "falloc"), ("qcow2", "full")] {
        let place = Place::new();
        place.ours_ok(&format!("create -q -f {format} @disk 1M"));
        place.ours_ok(&format!("resize -q -f {format} --preallocation={mode} @disk 3000K"));
        let map = place.ours_ok(&format!("map --output=json -f {format} @disk"));
        let allocated = std::fs::metadata(place.path("disk")).unwrap().blocks() * 512;
        assert!((2_023_424..3 << 20).contains(&allocated), "{format} {mode}: {allocated}");
        if format == "qcow2" {
            assert!(
                map.contains("\"start\": 1048576, \"length\": 2023424") && map.contains("\"data\": true"),
                "{map}"
            );
            if have_qemu {
                place.img("check -q @disk");
            }
        }
        place.ours_ok("create -q @zeros 3000K");
        assert_eq!(
            place.ours_ok(&format!("compare -f {format} -F raw @disk @zeros")),
            "Images are identical.\n"
        );
    }
}
