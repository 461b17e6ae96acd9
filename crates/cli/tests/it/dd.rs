//! `dd` and `bench`, beside `qemu-img`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;

use crate::common::{Place, have_qemu};

/// A file whose length is no multiple of 512, each byte of which says where it is.
fn source(place: &Place) -> Vec<u8> {
    let bytes: Vec<u8> = (0..10_000_u32).map(|at| (at / 7 + at / 256) as u8 | 1).collect();
    fs::write(place.path("in"), &bytes).unwrap();
    bytes
}

#[test]
fn dd_copies_what_qemu_img_copies() {
    if !have_qemu("dd") {
        return;
    }
    let place = Place::new();
    source(&place);
    for operands in [
        "",
        "bs=1000",
        "bs=1000 count=3",
        "bs=1000 count=3 skip=1",
        "bs=1000 skip=3",
        "bs=1000 skip=10",
        "bs=1000 skip=30",
        "bs=1000 count=3 skip=5",
        "count=3",
        "count=0",
        "bs=1M",
        "bs=1.5k skip=0x2",
        "skip=20",
    ] {
        for format in ["raw", "qcow2"] {
            let line = format!("dd -f raw -O {format} {operands} if=@in of=@");
            let line = line.replace("  ", " ");
            let (ours, theirs) =
                (place.ours(&format!("{line}ours")), place.theirs("qemu-img", &format!("{line}theirs")));
            assert_eq!((ours.code, theirs.code), (0, 0), "{line}: {ours:?} {theirs:?}");
            if format == "raw" {
                assert!(
                    fs::read(place.path("ours")).unwrap() == fs::read(place.path("theirs")).unwrap(),
                    "{line}"
                );
            } else {
                place.img("check -q @ours");
                place.img("compare -q -f qcow2 -F qcow2 @ours @theirs");
                let size = |name: &str| place.img(&format!("info @{name}")).lines().nth(2).map(str::to_owned);
                assert_eq!(size("ours"), size("theirs"), "{line}");
            }
        }
    }
    for operands in ["seek=1", "conv=notrunc", "bs=0", "bs=2G", "count=-1", "count=1k", "foo"] {
        assert_eq!(place.ours(&format!("dd -f raw {operands} if=@in of=@new")).code, 2, "{operands}");
        assert_eq!(place.theirs("qemu-img", &format!("dd -f raw {operands} if=@in of=@new")).code, 1);
        assert!(!place.path("new").exists(), "{operands}");
    }
}

#[test]
fn dd_never_writes_its_own_input() {
    let place = Place::new();
    let bytes = source(&place);
    fs::hard_link(place.path("in"), place.path("again")).unwrap();
    for line in ["dd -f raw if=@in of=@in", "dd -f raw if=@in of=@again", "dd -f raw skip=99 if=@in of=@in"] {
        assert!(place.ours_error(line, 1).contains("part of the source"), "{line}");
        assert!(fs::read(place.path("in")).unwrap() == bytes, "{line}");
    }
    assert!(place.ours_error("dd -f raw skip=99 if=@in of=@out", 0).contains("nothing to copy at skip=99"));
    assert_eq!(fs::metadata(place.path("out")).unwrap().len(), 0);
}

#[test]
fn bench_takes_the_options_of_qemu_img() {
    let place = Place::new();
    place.ours_ok("create -q -f raw @disk 1M");
    for (options, code) in [
        ("-c 100", 0),
        ("-c 100 -w -d 4 --flush-interval 10 --pattern 0xff", 0),
        ("-c 100 -w -d 4 --flush-interval 10 --no-drain", 0),
        ("-c 10 -S 10M -s 64K -o 4K", 0),
        ("-c 10 -i threads -t none", 0),
        ("-c 10 -i io_uring -U", 0),
        ("-c 10 -n -t directsync -w", 0),
        ("-c 1000 -s 3000", 1),
        ("-c 10 -o 2M", 1),
        ("-c 10 -s 1M -o 512", 1),
        ("-c 1 -d 1 -s 64M", 1),
    ] {
        let ours = place.ours(&format!("bench -f raw {options} @disk"));
        assert_eq!(ours.code, code, "{options}: {ours:?}");
        if have_qemu("bench") && !options.contains("-i ") && !options.contains("-n ") {
            assert_eq!(
                place.theirs("qemu-img", &format!("bench -f raw {options} @disk")).code,
                code,
                "{options}"
            );
        }
    }
    let said = place.ours_ok("bench -f raw -c 20 -w -d 2 --flush-interval 4 --no-drain -S 8K @disk");
    let mut lines = said.lines();
    assert_eq!(lines.next(), Some("20 writes of 4096 bytes, 2 at a time, from offset 0 in steps of 8192"));
    assert_eq!(lines.next(), Some("a flush every 4 writes, without waiting for them"));
    assert!(lines.next().unwrap().starts_with("done in 0."));
    for options in [
        "-c 0",
        "-c -1",
        "-d 0",
        "-s 0",
        "-s 2G",
        "-w --flush-interval 10",
        "--flush-interval 100",
        "--pattern 256",
        "-i other",
        "-w -U",
        "-d 1025",
        "-d 1024 -s 2M",
    ] {
        assert_eq!(place.ours(&format!("bench -f raw {options} @disk")).code, 2, "{options}");
    }
}
