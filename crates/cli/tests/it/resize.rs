//! `resize`, beside `qemu-img`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::os::unix::fs::MetadataExt;

use crate::common::{Place, have_qemu};
use serde_json::Value;

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
    place.ours_fails("resize --shrink --preallocation=metadata @disk 1M", 2);
    assert_eq!(place.ours("resize --preallocation=most @disk 4M").code, 2);
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
            // The file ends with a whole cluster, the disk within it.
            assert!(std::fs::metadata(place.path("disk")).unwrap().len().is_multiple_of(64 << 10), "{mode}");
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

/// The rows of a map without places in the file, which tables may part: where each kind begins, and where all
/// ends.
fn kinds(map: &str) -> Vec<(u64, String)> {
    let rows: Vec<Value> = serde_json::from_str(map).unwrap();
    let mut all: Vec<(u64, String)> = Vec::new();
    for row in &rows {
        let kind = format!("{} {} {} {}", row["depth"], row["present"], row["zero"], row["data"]);
        if all.last().is_none_or(|(_, last)| *last != kind) {
            all.push((row["start"].as_u64().unwrap(), kind));
        }
    }
    let end = rows.last().unwrap();
    all.push((end["start"].as_u64().unwrap() + end["length"].as_u64().unwrap(), "end".to_owned()));
    all
}

/// What is added is mapped and takes no space, as by `qemu-img`.
#[test]
fn what_is_added_can_be_mapped_at_once() {
    let have_qemu = have_qemu("what_is_added_can_be_mapped_at_once");
    for (options, from, to) in [
        ("cluster_size=64k", "1M", "5M"),
        ("cluster_size=4k", "1M", "5M"),
        ("cluster_size=512", "1M", "5M"),
        ("cluster_size=2M", "1M", "1G"),
        ("compat=0.10", "1M", "5M"),
        ("cluster_size=64k", "1000448", "5000704"),
        ("extended_l2=on", "1M", "5000704"),
        ("data_file=@ext", "1M", "5M"),
        ("data_file=@ext,data_file_raw=on", "1M", "5M"),
        ("backing_file=base,backing_fmt=raw", "1M", "5M"),
        ("cluster_size=64k", "1G", "3G"),
    ] {
        let place = Place::new();
        std::fs::write(place.path("base"), vec![7; 3 << 20]).unwrap();
        place.ours_ok(&format!("create -q -f qcow2 -o {options} @disk {from}"));
        place.ours_ok(&format!("resize -q -f qcow2 --preallocation=metadata @disk {to}"));
        place.ours_ok(&format!("create -q @zeros {to}"));
        if options.starts_with("backing") {
            let mut want = vec![7; 1 << 20];
            want.resize(5 << 20, 0);
            std::fs::write(place.path("zeros"), want).unwrap();
        }
        let case = format!("{options} {from} {to}");
        let said = place.ours_ok("compare -f qcow2 -F raw @disk @zeros");
        assert_eq!(said, "Images are identical.\n", "{case}");
        // The added space is mapped: nothing is written for it but tables.
        let map = place.ours_ok("map --output=json @disk");
        assert!(!map.lines().last().unwrap().contains("\"present\": false"), "{case}: {map}");
        let meta = std::fs::metadata(place.path("disk")).unwrap();
        assert!(meta.blocks() * 512 < 3 << 20, "{case}: {} blocks", meta.blocks());
        if !have_qemu {
            continue;
        }
        place.img("check -q @disk");
        place.img("compare -q -f qcow2 -F raw @disk @zeros");
        place.img(&format!("create -q -f qcow2 -o {} @theirs {from}", options.replace("@ext", "@ext2")));
        place.img(&format!("resize -q --preallocation=metadata @theirs {to}"));
        let len = |name: &str| std::fs::metadata(place.path(name)).unwrap().len();
        // QEMU ends such a file within its last cluster.
        assert!(options == "extended_l2=on" || len("disk") == len("theirs"), "{case}");
        // Where clusters are smaller than the blocks of the file system, tables beside them make blocks of
        // data.
        let is_plain = ["cluster_size=64k", "cluster_size=4k", "compat=0.10"].contains(&options);
        if is_plain && from != "1000448" {
            let theirs = place.img("map --output=json @theirs");
            assert_eq!(kinds(&map), kinds(&theirs), "{case}");
        }
    }
    let place = Place::new();
    place.ours_ok("create -q @disk 1M");
    assert!(place.ours_fails("resize -f raw --preallocation=metadata @disk 2M", 2).contains("no metadata"));
    assert_eq!(std::fs::metadata(place.path("disk")).unwrap().len(), 1 << 20);
}
