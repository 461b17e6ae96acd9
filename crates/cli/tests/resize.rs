//! `resize`, beside `qemu-img`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

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
        place.ours_fails("resize --preallocation=full @disk 4M", 2),
        "blockmirror: resize: @disk: --preallocation=full is not supported, only off"
    );
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
