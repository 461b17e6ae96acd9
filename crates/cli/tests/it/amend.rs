//! `amend`, beside `qemu-img`: the same options taken and refused, the same image afterwards.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::process::Command;

use crate::common::{Place, have_qemu};
use serde_json::Value;

/// How images are made, and what is then asked for; `%` is the image.
const CASES: &[(&str, &[&str])] = &[
    (
        "-o compat=1.1 % 4M",
        &[
            "compat=0.10",
            "lazy_refcounts=on",
            "refcount_bits=8",
            "compat=1.1,refcount_bits=8,lazy_refcounts=on",
            "compat=0.10",
            "compat=0.10,refcount_bits=32",
            "compat=v2,refcount_bits=16",
            "compat=2",
            "size=8M",
            "size=0",
            "size=1000",
            "size=2M,compat=1.1",
        ],
    ),
    (
        "-o cluster_size=512,refcount_bits=64 % 4M",
        &[
            "refcount_bits=1",
            "refcount_bits=2",
            "refcount_bits=64",
            "refcount_bits=3",
            "refcount_bits=0",
            "compat=v3",
        ],
    ),
    ("-o extended_l2=on % 4M", &["compat=0.10", "refcount_bits=1,lazy_refcounts=on", "lazy_refcounts=off"]),
    ("-o compression_type=zstd % 4M", &["compat=0.10", "compat=1.1"]),
    (
        "-b base -F raw % 4M",
        &[
            "backing_file=base",
            "backing_fmt=raw",
            "backing_file=base,backing_fmt=raw,lazy_refcounts=on",
            "backing_file=other,backing_fmt=raw",
            "compat=0.10",
            "compat=1.1",
            "cluster_size=4k",
            "preallocation=full",
            "no_such_option=1",
            "encrypt.keyslot=1",
            "data_file=new",
            "data_file_raw=on",
            "data_file_raw=off",
        ],
    ),
    (
        "-o data_file=%.data,data_file_raw=on % 4M",
        &[
            "data_file_raw=on",
            "compat=0.10",
            "data_file_raw=off",
            "data_file_raw=on",
            "refcount_bits=1,size=6M",
        ],
    ),
];

fn info(place: &Place, name: &str) -> Value {
    let mut info: Value =
        serde_json::from_str(&place.img(&format!("info --output=json -f qcow2 @{name}"))).unwrap();
    let data = info["format-specific"]["data"].take();
    let mut shown = serde_json::json!({ "size": info["virtual-size"], "backing": info["backing-filename"] });
    shown["data"] = data;
    // Each image has a data file of its own.
    shown["data"]["data-file"] = Value::Null;
    shown
}

#[test]
fn options_are_taken_and_refused_as_by_qemu() {
    if !have_qemu("amend") {
        return;
    }
    for (create, amendments) in CASES {
        let place = Place::new();
        std::fs::write(place.path("base"), vec![7; 4 << 20]).unwrap();
        for name in ["ours", "theirs"] {
            let create = create.replace('%', &format!("@{name}"));
            place.img(&format!("create -q -f qcow2 {create}"));
            let commands =
                ["write -P 5 100k 300k", "write -z 1M 512k", "write -P 6 1200k 10k", "write -z 2M 70k"];
            place.io(name, &commands);
        }
        for options in *amendments {
            let what = format!("{create}: {options}");
            let ours = place.ours(&format!("amend -q -f qcow2 --shrink -o {options} @ours"));
            let theirs = place.theirs("qemu-img", &format!("amend -q -f qcow2 -o {options} @theirs"));
            assert_eq!(ours.code == 0, theirs.code == 0, "{what}: {} | {}", ours.err, theirs.err);
            assert_eq!(info(&place, "ours"), info(&place, "theirs"), "{what}");
            place.img("check -q -f qcow2 @ours");
            place.img("compare -q -f qcow2 -F qcow2 @ours @theirs");
        }
    }
}

/// As `resize`, it cuts nothing off unless an option allows it.
#[test]
fn a_disk_becomes_shorter_only_if_that_is_allowed() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 4M");
    let before = std::fs::read(place.path("disk")).unwrap();
    assert_eq!(
        place.ours_fails("amend -o size=3M,lazy_refcounts=on @disk", 2),
        "blockmirror: amend: @disk: 3145728 bytes would cut off the last 1048576 of 4194304; --shrink allows it"
    );
    assert!(
        before == std::fs::read(place.path("disk")).unwrap(),
        "it was refused, and something was written"
    );
    for line in ["amend -o size=4M @disk", "amend -o size=0 @disk", "amend -o size=5M @disk"] {
        place.ours_ok(line);
    }
    place.ours_ok("amend -q --shrink -o size=3M @disk");
    assert!(place.ours_ok("info @disk").contains("3 MiB (3145728 bytes)"));
}

#[test]
fn zstd_clusters_do_not_become_version_2() {
    if !have_qemu("amend") {
        return;
    }
    let place = Place::new();
    std::fs::write(place.path("raw"), vec![7; 1 << 20]).unwrap();
    place.img("convert -c -O qcow2 -o compression_type=zstd @raw @disk");
    assert_eq!(
        place.ours_fails("amend -o compat=0.10 @disk", 1),
        "blockmirror: amend: @disk: option compat: 0.10 cannot have zstd clusters, and the image has some"
    );
    place.ours_ok("amend -o refcount_bits=64 @disk");
    place.img("compare -q -f raw -F qcow2 @raw @disk");
}

#[test]
fn lines_that_cannot_be_right_change_nothing() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 1M");
    place.ours_ok("create -q -f raw @raw 1M");
    for (line, code) in [
        ("amend @disk", 2),
        ("amend -o compat=1.1", 2),
        ("amend -o compat @disk", 2),
        ("amend -o cluster_size=4K @disk", 2),
        ("amend -t most -o compat=1.1 @disk", 2),
        ("amend -o size=2M @raw", 1),
        ("amend -f raw -o size=2M @raw", 1),
        ("amend -o size=2M @missing", 1),
    ] {
        place.ours_error(line, code);
    }
    let help = place.ours_ok("amend -o help");
    assert!(
        help.contains("compat=") && help.contains("size=SIZE") && !help.contains("cluster_size"),
        "{help}"
    );
    let said = place
        .ours_ok("amend -o size=2M --image-opts driver=qcow2,overlap-check.template=all,file.filename=@disk");
    assert!(said.starts_with("amended ") && said.ends_with("disk\n"), "{said}");
    place.ours_error("amend -o size=2M --image-opts driver=qcow2,overlap-check=most,file.filename=@disk", 2);
    assert!(place.ours_ok("info @disk").contains("2 MiB (2097152 bytes)"));
    // Progress, if it is asked for, goes to standard error.
    assert_eq!(place.ours_ok("amend -p -q -t writethrough -o refcount_bits=1 @disk"), "");
}

/// What QEMU's writer has left that was killed.
#[test]
fn a_dirty_image_is_repaired_before_it_is_written() {
    if !have_qemu("dirty") {
        return;
    }
    let place = Place::new();
    place.img("create -q -f qcow2 -o lazy_refcounts=on @disk 4M");
    let commands = ["-f", "qcow2", "-c", "write -P 5 0 1M", "-c", "flush", "-c", "abort"];
    let killed = Command::new("qemu-io").args(commands).arg(place.path("disk")).output().unwrap();
    assert!(!killed.status.success(), "{killed:?}");
    assert!(place.ours_ok("info @disk").contains("cleanly shut down: no"));
    place.ours_ok("resize -q @disk 8M");
    assert!(!place.ours_ok("info @disk").contains("cleanly shut down: no"));
    place.img("check -q -f qcow2 @disk");
}
