//! `snapshot` and `convert -l`, beside `qemu-img`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use crate::common::{Place, have_qemu};
use serde_json::Value;

/// Without what differs with the time of day.
fn without_dates(text: &str) -> String {
    let lines = text.lines().map(|line| line.split_whitespace().filter(|word| !word.contains([':', '-'])));
    lines.map(|words| words.collect::<Vec<_>>().join(" ") + "\n").collect()
}

#[test]
fn each_verb() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 1M");
    assert_eq!(place.ours_ok("snapshot @disk"), "");
    assert!(place.ours_ok("snapshot -c one @disk").starts_with("created snapshot 1 (one) of "));
    assert_eq!(place.ours_ok("snapshot -q -c one @disk"), "");
    place.ours_ok("snapshot -c 1 @disk");
    let listed = without_dates(&place.ours_ok("snapshot -l @disk"));
    assert_eq!(
        listed,
        "Snapshot\nID TAG VM_SIZE DATE VM_CLOCK ICOUNT\n1 one 0 B 0\n2 one 0 B 0\n3 1 0 B 0\n"
    );
    assert_eq!(place.ours_ok("snapshot -U @disk"), place.ours_ok("snapshot -q -l @disk"));
    // An id before a name; to delete takes a name.
    assert!(place.ours_ok("snapshot -a 1 @disk").starts_with("applied snapshot 1 (one) of "));
    assert!(place.ours_ok("snapshot -d 1 @disk").starts_with("deleted snapshot 3 (1) of "));
    assert_eq!(
        place.ours_fails("snapshot -d 2 @disk", 1),
        "blockmirror: find snapshot: @disk: there is no snapshot with the name \"2\""
    );
    place.ours_ok("snapshot -d one @disk");
    assert!(place.ours_ok("snapshot -a one @disk").starts_with("applied snapshot 2"));
    for line in ["snapshot -l -c x @disk", "snapshot -c x -a y @disk", "snapshot -U -c x @disk"] {
        assert_eq!(place.ours(line).code, 2, "{line}");
    }
    place.ours_ok("create -q -f raw @raw 1M");
    assert_eq!(place.ours_ok("snapshot -l @raw"), "");
    for line in ["snapshot -c x @raw", "snapshot -a x -f raw @raw", "convert -l x @raw @new"] {
        assert_eq!(
            place.ours_fails(line, 1),
            "blockmirror: snapshot: @raw: such an image has no snapshots",
            "{line}"
        );
    }
    place.ours_fails("convert -l one @disk @disk @new", 2);
    place.ours_fails("convert -l snapshot.foo=1 @disk @new", 2);
    place.ours_fails("convert -l 1 @disk @new", 1);
    assert!(!place.path("new").exists());
}

#[test]
fn qemu_agrees() {
    if !have_qemu("snapshot") {
        return;
    }
    let place = Place::new();
    place.img("create -q -f qcow2 @a 2M");
    std::fs::write(place.path("raw"), vec![1; 2 << 20]).unwrap();
    place.ours_ok("convert -q -n @raw @a");
    std::fs::copy(place.path("a"), place.path("b")).unwrap();
    place.ours_ok("snapshot -q -c one @a");
    place.img("snapshot -c one @b");
    let snapshots = |name: &str| {
        let info: Value = serde_json::from_str(&place.img(&format!("info --output=json @{name}"))).unwrap();
        let mut snapshots = info["snapshots"].clone();
        for snapshot in snapshots.as_array_mut().unwrap() {
            let members = snapshot.as_object_mut().unwrap();
            members.remove("date-sec");
            members.remove("date-nsec");
        }
        snapshots
    };
    assert_eq!(snapshots("a"), snapshots("b"));
    let list = |text: &str| without_dates(text).replace(" 0 ", " ");
    assert_eq!(list(&place.ours_ok("snapshot -l @b")), list(&place.img("snapshot -l @b")));

    place.ours_ok("create -q -f raw @zeros 2M");
    for disk in ["a", "b"] {
        place.ours_ok(&format!("convert -q -n @zeros @{disk}"));
        for name in ["one", "1", "snapshot.id=1", "snapshot.name=one", "snapshot.name=one,snapshot.id=1"] {
            place.ours_ok(&format!("convert -q -l {name} @{disk} @out"));
            place.img("compare -q -F raw -f raw @out @raw");
        }
        place.ours_ok(&format!("convert -q -O qcow2 -l one @{disk} @out.qcow2"));
        place.img("compare -q -F raw @out.qcow2 @raw");
        place.ours_ok(&format!("snapshot -q -a one @{disk}"));
        place.img(&format!("compare -q -F raw @{disk} @raw"));
        place.ours_ok(&format!("snapshot -q -d one @{disk}"));
        place.img(&format!("check -q @{disk}"));
        place.img(&format!("compare -q -F raw @{disk} @raw"));
    }
}

/// VM state, which lies behind the end of the disk, is taken and applied with a snapshot.
#[test]
fn vm_state_comes_back_with_its_snapshot() {
    if !have_qemu("vm_state_comes_back_with_its_snapshot") {
        return;
    }
    let place = Place::new();
    place.img("create -q -f qcow2 @disk 64M");
    place.io("disk", &["write -q -P 7 0 64k", "write -q -b -P 17 1T 4k"]);
    place.ours_ok("snapshot -q -c one @disk");
    place.io("disk", &["write -q -P 8 0 64k", "write -q -b -P 18 1T 4k"]);
    place.ours_ok("snapshot -q -a one @disk");
    place.img("check -q @disk");
    place.io("disk", &["read -q -P 7 0 64k", "read -q -b -P 17 1T 4k"]);
    // It is no part of the disk.
    place.ours_ok("resize -q @disk 128M");
    place.ours_ok("snapshot -q -d one @disk");
    place.img("check -q @disk");
    place.io("disk", &["read -q -P 0 64M 64M", "read -q -b -P 17 1T 4k"]);
}

/// Under the name `qemu-img` success has no words, and failures have QEMU's.
#[test]
fn words_of_qemu_img() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @disk 1M");
    place.ours_ok("create -q -f qcow2 -o refcount_bits=1 @narrow 1M");
    place.ours_ok("create -q -f raw @raw 1M");
    place.ours_ok("convert -q -n @raw @disk");
    place.ours_ok("bench -w -c 1 @narrow");
    for line in ["-c one @disk", "-a one @disk", "-d one @disk", "-l @disk", "-c one @disk"] {
        assert_eq!(place.ours_ok(&format!("qemu-img snapshot {line}")), "", "{line}");
    }
    for (line, words) in [
        ("snapshot -d x @disk", "Could not delete snapshot 'x': snapshot not found"),
        (
            "snapshot -a x @disk",
            "Could not apply snapshot 'x': Failed to load snapshot: No such file or directory",
        ),
        ("snapshot -c x @narrow", "Could not create snapshot 'x': Invalid argument"),
        ("snapshot -c x -f raw @raw", "Could not create snapshot 'x': Operation not supported"),
        (
            "snapshot -a x -f raw @raw",
            "Could not apply snapshot 'x': Block driver does not support snapshots",
        ),
        ("snapshot -d x -f raw @raw", "Could not delete snapshot 'x': snapshot not found"),
        ("convert -l x @disk @new", "Failed to load snapshot: Can't find snapshot"),
    ] {
        let said = place.ours_error(&format!("qemu-img {line}"), 1);
        assert_eq!(said, format!("qemu-img: {words}\n"), "{line}");
    }
}
