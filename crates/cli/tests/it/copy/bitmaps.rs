//! `convert --bitmaps`, beside `qemu-img`.

use blockmirror_image::OpenOptions;
use serde_json::Value;

use crate::common::{Place, have_qemu};

/// The bitmaps of an image as `qemu-img info` lists them.
fn listed(place: &Place, name: &str) -> Value {
    let info: Value = serde_json::from_str(&place.img(&format!("info --output=json @{name}"))).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// An image with an enabled bitmap that has bits and a disabled one; with `broken`, one that misses writes
/// stands between them.
fn source(place: &Place, broken: bool) {
    place.ours_ok("create -q -f qcow2 @src 4M");
    place.ours_ok("bitmap --add -g 4K @src fine");
    if broken {
        place.ours_ok("bitmap --add @src broken");
    }
    place.ours_ok("bitmap --add --disable @src off");
    place.io("src", &["write 1M 5k", "write 3M 64k"]);
    if broken {
        let image = OpenOptions::new().open(place.path("src")).unwrap();
        let directory = image.qcow2().unwrap().header().bitmaps.unwrap().directory_offset as usize;
        let mut bytes = std::fs::read(place.path("src")).unwrap();
        let entry = bytes[directory..].windows(6).position(|bytes| bytes == b"broken").unwrap() - 24;
        // Its flags.
        bytes[directory + entry + 15] |= 1;
        std::fs::write(place.path("src"), bytes).unwrap();
    }
}

#[test]
fn bitmaps_come_along_with_names_granularity_and_flags() {
    if !have_qemu("bitmaps_come_along_with_names_granularity_and_flags") {
        return;
    }
    let place = Place::new();
    source(&place, false);
    place.ours_ok("convert -q -O qcow2 -o cluster_size=4k --bitmaps @src @ours");
    place.img("convert -O qcow2 -o cluster_size=4k --bitmaps @src @theirs");
    assert_eq!(listed(&place, "ours"), listed(&place, "theirs"));
    place.img("check -q @ours");
    place.img("compare -q @src @ours");
    let bits = |name: &str| {
        place.img(&format!("bitmap --add -g 4k --disable --merge fine @{name} copy"));
        place.ours_ok(&format!("bitmap --merge copy @{name} off"));
        let image = OpenOptions::new().open(place.path(name)).unwrap();
        image.qcow2().unwrap().read_bitmap("off").unwrap().runs().collect::<Vec<_>>()
    };
    let ours = bits("ours");
    assert_eq!(ours, bits("theirs"));
    assert_eq!(ours, [1 << 20..(1 << 20) + 65536, 3 << 20..(3 << 20) + 65536]);
    // Without the option none is copied, and into an image that has them only once.
    place.ours_ok("convert -q -O qcow2 @src @none");
    assert_eq!(listed(&place, "none"), Value::Null);
    place.ours_ok("convert -q -n -O qcow2 --bitmaps @src @none");
    assert_eq!(listed(&place, "none"), listed(&place, "src"));
    let refused = place.ours_fails("convert -q -n -O qcow2 --bitmaps @src @none", 1);
    assert_eq!(refused, "blockmirror: copy: @none: it has a bitmap \"fine\" already");
}

#[test]
fn what_cannot_be_copied_is_refused_before_the_target_is_touched() {
    if !have_qemu("what_cannot_be_copied_is_refused_before_the_target_is_touched") {
        return;
    }
    let place = Place::new();
    source(&place, true);
    assert_eq!(
        place.ours_fails("convert -q -O qcow2 --bitmaps @src @ours", 1),
        "blockmirror: copy: @ours: bitmap \"broken\" of the source is inconsistent; --skip-broken-bitmaps \
         leaves it out"
    );
    assert!(!place.path("ours").exists());
    let ran = place.ours("convert -q -O qcow2 --bitmaps --skip-broken-bitmaps @src @ours");
    assert_eq!((ran.code, ran.out.as_str()), (0, ""));
    assert!(ran.err.contains("bitmap \"broken\" is inconsistent: it is not copied"), "{ran:?}");
    place.img("convert -O qcow2 --bitmaps --skip-broken-bitmaps @src @theirs");
    assert_eq!(listed(&place, "ours"), listed(&place, "theirs"));
    place.ours_ok("create -q -f raw @raw 4M");
    place.ours_ok("create -q -f qcow2 @longer 5M");
    place.ours_ok("create -q -f qcow2 -o compat=0.10 @old 4M");
    let skip = "--bitmaps --skip-broken-bitmaps";
    for (line, code, why) in [
        (format!("convert -q -O raw {skip} @src @new"), 1, "a raw image has no bitmaps"),
        (format!("convert -q -f raw -O qcow2 {skip} @raw @new"), 1, "a raw image has no bitmaps"),
        (format!("convert -q -n -O raw {skip} @src @raw"), 1, "a raw image has no bitmaps"),
        (format!("convert -q -n -O qcow2 {skip} @src @longer"), 1, "its length is not that of the source"),
        (format!("convert -q -O qcow2 {skip} @src @src @new"), 2, "from a single source only"),
        ("convert -q -O qcow2 --skip-broken-bitmaps @src @new".into(), 2, "--bitmaps"),
        ("convert -q -O qcow2 --bitmaps @old @new".into(), 1, "version 2 (compat=0.10) has no bitmaps"),
        (format!("convert -q -O qcow2 -o compat=0.10 {skip} @src @new"), 1, "version 2"),
    ] {
        let error = place.ours_error(&line, code);
        assert!(error.contains(why), "{line}: {error}");
        assert!(!place.path("new").exists(), "{line}");
    }
}

/// Under the name `qemu-img`: its words, with the last of the directory first.
#[test]
fn words_of_qemu_img() {
    if !have_qemu("words_of_qemu_img") {
        return;
    }
    let place = Place::new();
    source(&place, true);
    for line in [
        "convert -O raw --bitmaps --skip-broken-bitmaps @src @new",
        "convert -O qcow2 --bitmaps @src @new",
        "convert -O qcow2 --bitmaps --skip-broken-bitmaps @src @new",
    ] {
        let (ours, theirs) = (place.ours(&format!("qemu-img {line}")), place.theirs("qemu-img", line));
        assert_eq!((ours.code, ours.err), (theirs.code, theirs.err), "{line}");
    }
}
