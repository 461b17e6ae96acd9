//! `bitmap`, beside `qemu-img`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use serde_json::Value;

use crate::common::{Place, have_qemu};

/// The bitmaps of an image as `qemu-img info` lists them.
fn bitmaps(place: &Place, name: &str) -> Value {
    let info: Value = serde_json::from_str(&place.img(&format!("info --output=json @{name}"))).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

#[test]
fn one_action_after_the_other() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 1M");
    assert_eq!(place.ours_ok("bitmap --add @disk b0"), "");
    assert_eq!(
        place.ours_fails("bitmap --add @disk b0", 1),
        "blockmirror: use persistent bitmap: @disk: bitmap \"b0\": there is a bitmap of that name already"
    );
    place.ours_ok("bitmap --add -g 4K --disable @disk b1");
    let info = place.ours_ok("info @disk");
    assert!(info.contains("name: b0\n            granularity: 65536"), "{info}");
    assert!(info.contains("name: b1\n            granularity: 4096"), "{info}");
    // What was done before an action fails stays done.
    place.ours_fails("bitmap --remove --clear @disk b1", 1);
    assert!(!place.ours_ok("info @disk").contains("b1"));
    place.ours_ok("bitmap --remove --add --clear --merge b0 --disable --enable @disk b0");
    for (line, code) in [
        ("bitmap @disk b0", 2),
        ("bitmap --add @disk", 2),
        ("bitmap --clear -g 4K @disk b0", 2),
        ("bitmap --clear -b @disk @disk b0", 2),
        ("bitmap --merge b0 -F qcow2 @disk b0", 2),
        ("bitmap --add -g 5000 @disk b2", 1),
        ("bitmap --merge nope @disk b0", 1),
        ("bitmap --merge b0 -b @nope @disk b0", 1),
        ("bitmap --enable @nope b0", 1),
    ] {
        let ran = place.ours(line);
        assert_eq!(ran.code, code, "{line}: {ran:?}");
    }
    place.ours_ok("create -q -f raw @raw 1M");
    let refused = place.ours_fails("bitmap -f raw --add @raw b", 1);
    assert_eq!(refused, "blockmirror: use persistent bitmap: @raw: a raw image has no bitmaps");
}

/// The same lines for both; ours exits with 2 where the line itself is wrong.
#[test]
fn as_qemu_img_does() {
    if !have_qemu("as_qemu_img_does") {
        return;
    }
    let place = Place::new();
    for name in ["ours", "theirs"] {
        place.img(&format!("create -q -f qcow2 -o cluster_size=4k @{name} 4M"));
        place.img(&format!("create -q -f qcow2 @{name}.other 4M"));
        place.img(&format!("create -q -f qcow2 @{name}.short 2M"));
        for image in ["other", "short"] {
            place.img(&format!("bitmap --add -g 512 @{name}.{image} src"));
            place.io(&format!("{name}.{image}"), &["write 1M 513"]);
        }
    }
    for line in [
        "--add DISK a",
        "--add -g 64k --disable DISK b",
        "--add DISK a",
        "--add -g 256 DISK c",
        "--add -g 4G DISK c",
        "--add --merge a DISK c",
        "--merge src -b DISK.other -F qcow2 DISK b",
        "--merge src -b DISK.short DISK b",
        "--merge src DISK b",
        "--enable DISK b",
        "--clear --disable DISK a",
        "--remove --clear DISK c",
        "--remove DISK c",
    ] {
        let of = |name: &str| format!("bitmap {}", line.replace("DISK", &format!("@{name}")));
        let (ours, theirs) = (place.ours(&of("ours")), place.theirs("qemu-img", &of("theirs")));
        assert_eq!(ours.code, theirs.code, "{line}: {ours:?} {theirs:?}");
        assert_eq!(bitmaps(&place, "ours"), bitmaps(&place, "theirs"), "{line}");
        place.img("check -q @ours");
    }
    // The bits, as a merge shows them: QEMU reads ours, and we read QEMU's.
    place.io("ours", &["write 3M 1"]);
    place.ours_ok("resize -q @ours 5M");
    place.img("bitmap --add --merge b @ours last");
    place.ours_ok("bitmap --merge last @ours a");
    place.img("check -q @ours");
}

/// The bits say what has changed on the disk since, not in the snapshot.
#[test]
fn bitmaps_are_not_copied_with_a_snapshot() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 1M");
    place.ours_ok("bitmap --add @disk b0");
    place.ours_ok("snapshot -c s @disk");
    assert_eq!(
        place.ours_fails("convert -l s --bitmaps -O qcow2 @disk @copy", 1),
        "blockmirror: copy: @copy: bitmaps are of the disk, and a snapshot is to be converted"
    );
    place.ours_ok("convert -q --bitmaps -O qcow2 @disk @copy");
}

/// The source of bits may stand on the image that gets them.
#[test]
fn bits_come_from_an_overlay_of_the_image() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @base 1M");
    place.ours_ok("create -q -f qcow2 -b base -F qcow2 @top");
    place.ours_ok("bitmap --add @top changed");
    place.ours_ok("bench -w -c 1 @top");
    place.ours_ok("bitmap --add --merge changed -b @top -F qcow2 @base copy");
    assert!(place.ours_ok("info @base").contains("copy"));
}
