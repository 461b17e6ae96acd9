//! `commit` and `rebase` beside `qemu-img`: the same chain twice, one command each, and the same left behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;

use crate::common::{Place, have_qemu};
use serde_json::Value;

/// One image of a chain: format, creation options, length.
type Layer = (&'static str, &'static str, &'static str);

/// Makes the chain `layer0` (the bottom) and so on in a folder, each with data, zeros and discards of its
/// own; `want`, the raw content of the top; and `other`, which is no part of the chain.
fn make(place: &Place, layers: &[Layer]) {
    for (n, (format, options, len)) in layers.iter().enumerate() {
        let below = match n {
            0 => String::new(),
            n => format!("-b layer{} -F {} ", n - 1, layers[n - 1].0),
        };
        let options = if options.is_empty() { String::new() } else { format!("-o {options} ") };
        place.img(&format!("create -q -f {format} {options}{below}@layer{n} {len}"));
        let at = |k: u64| k + 37 * n as u64;
        let commands = [
            format!("write -q -P {} {}k 150k", 16 * (n + 1), at(5)),
            format!("write -q -z {}k 70k", at(200)),
            format!("write -q -P {} {}k 20k", 16 * (n + 1) + 1, at(100)),
            format!("discard -q {}k 128k", at(256)),
            format!("write -q -P {} {}k 9k", 16 * (n + 1) + 2, at(700)),
        ];
        let commands: Vec<_> = commands.iter().map(String::as_str).collect();
        place.io_as(format, &format!("layer{n}"), &commands);
    }
    place.img("create -q -f raw @other 1200k");
    place.io_as("raw", "other", &["write -q -P 16 0 100k", "write -q -P 99 210k 300k"]);
    let top = layers.len() - 1;
    place.img(&format!("convert -f {} -O raw @layer{top} @want", layers[top].0));
}

/// What `info` says of an image, but for what it occupies and how long its file is.
fn facts(place: &Place, name: &str) -> Value {
    let mut all: Value = serde_json::from_str(&place.img(&format!("info --output=json @{name}"))).unwrap();
    let map = all.as_object_mut().unwrap();
    for key in ["actual-size", "children", "filename", "full-backing-filename"] {
        map.remove(key);
    }
    all
}

/// Makes the chain twice, runs `line` in both folders, by ours and by `qemu-img`, and compares what is left
/// of all layers.
fn twin(layers: &[Layer], line: &str, case: &str) {
    twin_of(layers, line, case, |_| {});
}

/// The same with a chain that `change` changes first.
fn twin_of(layers: &[Layer], line: &str, case: &str, change: impl Fn(&Place)) -> (Place, Place) {
    let (ours, theirs) = (Place::new(), Place::new());
    make(&ours, layers);
    change(&ours);
    for name in ours.names() {
        fs::copy(ours.path(&name), theirs.path(&name)).unwrap();
    }
    let (a, b) = (ours.ours(&format!("{line} -q")), theirs.theirs("qemu-img", &format!("{line} -q")));
    assert_eq!(a.code, b.code, "{case}: {line}: {a:?} {b:?}");
    for (n, (format, _, _)) in layers.iter().enumerate() {
        let name = format!("layer{n}");
        if *format == "qcow2" {
            ours.img(&format!("check -q @{name}"));
        }
        assert_eq!(facts(&ours, &name), facts(&theirs, &name), "{case}: {line}: {name}");
        let other = theirs.path(&name);
        let compared = ours.theirs("qemu-img", &format!("compare @{name} {}", other.display()));
        assert_eq!(compared.code, 0, "{case}: {line}: {name}: {compared:?}");
    }
    let top = layers.len() - 1;
    let compared = ours.theirs("qemu-img", &format!("compare -F raw @layer{top} @want"));
    assert_eq!(compared.code, 0, "{case}: {line}: the content: {compared:?}");
    (ours, theirs)
}

const RAW: Layer = ("raw", "", "2M");

/// Chains of one to four images over each other, of unequal length and kind.
fn chains() -> Vec<(&'static str, Vec<Layer>)> {
    let q = |options, len| ("qcow2", options, len);
    vec![
        ("on raw", vec![RAW, q("", "2M")]),
        ("short raw", vec![("raw", "", "1M"), q("cluster_size=4k", "3M")]),
        ("long base", vec![q("", "4M"), q("cluster_size=512", "1500k")]),
        ("version 2", vec![q("compat=0.10", "2M"), q("compat=0.10", "2500k")]),
        (
            "subclusters",
            vec![q("cluster_size=4k", "2M"), q("extended_l2=on", "2M"), q("extended_l2=on", "2M")],
        ),
        ("short middle", vec![RAW, q("", "900k"), q("cluster_size=8k", "2M")]),
        ("large clusters", vec![q("", "5M"), q("cluster_size=2M", "5M"), q("cluster_size=2M", "5M")]),
        ("four", vec![RAW, q("", "3M"), q("cluster_size=1k", "1M"), q("", "2M")]),
    ]
}

#[test]
fn commit_leaves_what_qemu_img_leaves() {
    if !have_qemu("commit") {
        return;
    }
    for (case, layers) in chains() {
        let top = layers.len() - 1;
        twin(&layers, &format!("commit @layer{top}"), case);
        twin(&layers, &format!("commit -d @layer{top}"), case);
        if top > 1 {
            twin(&layers, &format!("commit -b layer0 @layer{top}"), case);
        }
    }
}

#[test]
fn rebase_leaves_what_qemu_img_leaves() {
    if !have_qemu("rebase") {
        return;
    }
    for (case, layers) in chains() {
        let top = layers.len() - 1;
        twin(&layers, &format!("rebase -b  @layer{top}"), case);
        let (below, format) = (top - 1, layers[top - 1].0);
        twin(&layers, &format!("rebase -u -b ./layer{below} -F {format} -f qcow2 @layer{top}"), case);
        if top > 1 {
            let bottom = layers[0].0;
            twin(&layers, &format!("rebase -b layer0 -F {bottom} @layer{top}"), case);
        }
        twin(&layers, &format!("rebase -b other -F raw @layer{top}"), case);
    }
}

/// QEMU's program crashes on some of these chains.
#[test]
fn rebase_stores_what_it_copies_compressed() {
    if !have_qemu("rebase_stores_what_it_copies_compressed") {
        return;
    }
    let mut stored = 0;
    for (case, layers) in chains() {
        let top = layers.len() - 1;
        for onto in ["-b ", "-b other -F raw", "-b layer0 -F LOWEST"] {
            let line = format!("rebase -q -c {onto} @layer{top}").replace("LOWEST", layers[0].0);
            let place = Place::new();
            make(&place, &layers);
            place.ours_ok(&line);
            place.img(&format!("check -q @layer{top}"));
            let compared = place.theirs("qemu-img", &format!("compare -F raw @layer{top} @want"));
            assert_eq!(compared.code, 0, "{case}: {line}: {compared:?}");
            stored +=
                place.img(&format!("map --output=json @layer{top}")).matches("\"compressed\": true").count();
        }
    }
    assert!(stored > 20, "{stored}");
}

/// Persistent bitmaps are stored again, and none of them is in use.
#[test]
fn bitmaps_stay_valid_as_with_qemu_img() {
    if !have_qemu("bitmaps_stay_valid_as_with_qemu_img") {
        return;
    }
    let layers = [("qcow2", "", "2M"), ("qcow2", "cluster_size=4k", "2M"), ("qcow2", "", "2M")];
    let add = |place: &Place| {
        for layer in 0..3 {
            place.img(&format!("bitmap --add -g 64k @layer{layer} on"));
            place.img(&format!("bitmap --add --disable @layer{layer} off"));
        }
    };
    for line in [
        "commit @layer2",
        "commit -d @layer2",
        "commit -b layer0 @layer2",
        "rebase -b layer0 -F qcow2 @layer2",
        "rebase -b  @layer2",
        "rebase -u -b ./layer1 -F qcow2 @layer2",
    ] {
        twin_of(&layers, line, "bitmaps", add);
    }
}

/// Snapshots of the image, the base and what lies between stay whole. Where they hold nothing they show what
/// is below, as with QEMU.
#[test]
fn snapshots_stay_as_with_qemu_img() {
    if !have_qemu("snapshots_stay_as_with_qemu_img") {
        return;
    }
    let layers = [("qcow2", "", "2M"), ("qcow2", "cluster_size=4k", "2M"), ("qcow2", "extended_l2=on", "2M")];
    let take = |place: &Place| {
        for layer in 0..3 {
            place.img(&format!("snapshot -c one @layer{layer}"));
            place.io_as(
                "qcow2",
                &format!("layer{layer}"),
                &["write -q -P 200 16k 64k", "write -q -z 300k 8k"],
            );
        }
        place.img("convert -f qcow2 -O raw @layer2 @want");
    };
    for line in [
        "commit @layer2",
        "commit -d @layer2",
        "commit -b layer0 @layer2",
        "rebase -b layer0 -F qcow2 @layer2",
        "rebase -b  @layer2",
    ] {
        let (ours, theirs) = twin_of(&layers, line, "snapshots", take);
        for layer in 0..3 {
            for place in [&ours, &theirs] {
                place.img(&format!("convert -l one -O raw @layer{layer} @taken"));
            }
            let same = fs::read(ours.path("taken")).unwrap() == fs::read(theirs.path("taken")).unwrap();
            assert!(same, "{line}: the snapshot of {layer}");
        }
    }
}

#[test]
fn an_emptied_image_holds_nothing_and_takes_no_space() {
    let place = Place::new();
    place.ours_ok("create -q -f raw @base 4M");
    place.ours_ok("create -q -f qcow2 -b base -F raw @overlay");
    place.ours_ok("bench -q -w -c 512 -s 8K --pattern 5 @overlay");
    let said = place.ours_ok("commit @overlay");
    assert!(said.contains("4 MiB copied, 0 B zeroed") && said.starts_with("committed "), "{said}");
    assert!(fs::read(place.path("base")).unwrap() == vec![5; 4 << 20]);
    let map = place.ours_ok("map --output=json @overlay");
    assert!(map.contains("\"depth\": 1") && !map.contains("\"depth\": 0"), "{map}");
    assert!(blockmirror_testing::scratch::allocated(&place.path("overlay")).unwrap() < 1 << 20);
    assert!(place.ours_ok("check @overlay").contains("no errors"));
}

#[test]
fn what_cannot_be_committed_or_rebased_changes_nothing() {
    let place = Place::new();
    fs::write(place.path("base"), vec![7; 1 << 20]).unwrap();
    place.ours_ok("create -q -f qcow2 -b base -F raw @overlay");
    place.ours_ok("create -q -f qcow2 -b overlay -F qcow2 @top");
    std::os::unix::fs::symlink(place.path("top"), place.path("link")).unwrap();
    fs::hard_link(place.path("overlay"), place.path("hard")).unwrap();
    let before: Vec<_> = ["base", "overlay", "top"].map(|name| fs::read(place.path(name)).unwrap()).into();
    for (line, code, message) in [
        ("commit -f raw @base", 1, "commit: @base: it has no backing file"),
        ("commit -b @elsewhere @top", 1, "commit: @top: @elsewhere is not in its backing chain"),
        ("commit -b @top @top", 1, "commit: @top: @top is not in its backing chain"),
        ("rebase -b base @top", 2, "rebase: @top: the format of base is missing; give it with -F"),
        ("rebase -b x -F raw @base -f raw", 1, "rebase: @base: a raw image cannot have a backing file"),
        (
            "rebase -b link -F qcow2 @top",
            1,
            "rebase: @top: it is part of the chain of @link, which it would stand on",
        ),
        (
            "rebase -u -b top -F qcow2 @overlay",
            1,
            "rebase: @overlay: it is part of the chain of @top, which it would stand on",
        ),
        (
            "rebase -b top -F qcow2 @hard",
            1,
            "rebase: @hard: it is part of the chain of @top, which it would stand on",
        ),
        (
            "rebase -b json:{} -F raw @top",
            1,
            "open: @top names the backing file \"json:{}\", which is not a plain path; only plain paths are opened",
        ),
    ] {
        assert_eq!(place.ours_fails(line, code), format!("blockmirror: {message}"), "{line}");
    }
    for (name, bytes) in ["base", "overlay", "top"].iter().zip(before) {
        assert!(fs::read(place.path(name)).unwrap() == bytes, "{name}");
    }
    // An image that loops back to itself, made by changing the header only.
    place.ours_ok("rebase -q -u @overlay");
    place.ours_ok("rebase -q -u -b missing -F qcow2 @overlay");
    fs::rename(place.path("top"), place.path("missing")).unwrap();
    for line in ["commit @missing", "rebase -b  @missing"] {
        let said = place.ours_fails(line, 1);
        assert!(said.contains("already part of the chain"), "{line}: {said}");
    }
}

/// A layer that a name on the command line leads to in another way is the one that is meant.
#[test]
fn a_base_is_found_by_its_name_and_by_its_file() {
    for name in ["layer0", "@layer0", "./layer0", "@other/../layer0", "@link"] {
        let place = Place::new();
        fs::write(place.path("layer0"), vec![1; 1 << 20]).unwrap();
        fs::create_dir(place.path("other")).unwrap();
        std::os::unix::fs::symlink("layer0", place.path("link")).unwrap();
        place.ours_ok("create -q -f qcow2 -b layer0 -F raw @layer1");
        place.ours_ok("create -q -f qcow2 -b layer1 -F qcow2 @layer2");
        place.ours_ok("bench -q -w -c 4 --pattern 9 @layer2");
        place.ours_ok(&format!("commit -q -b {name} @layer2"));
        assert_eq!(fs::read(place.path("layer0")).unwrap()[..16384], [9; 16384], "{name}");
    }
}

/// Files outside of the image's folder are written only where an option says so, not the environment.
#[test]
fn a_base_elsewhere_needs_permission_to_be_written() {
    let (place, other) = (Place::new(), Place::new());
    fs::write(other.path("base"), vec![1; 1 << 20]).unwrap();
    let base = other.path("base");
    place.ours_ok(&format!("create -q -f qcow2 -b {} -F raw @overlay", base.display()));
    assert!(place.ours_fails("commit @overlay", 1).contains("--allow-backing"));
    let allowed = other.path(".");
    place.ours_ok(&format!("commit -q --allow-backing {} @overlay", allowed.display()));
    // What a person has named is allowed by that.
    place.ours_ok(&format!(
        "rebase -q -b {} -F raw --allow-backing {} @overlay",
        base.display(),
        allowed.display()
    ));
}

/// As QEMU: where only the header changes it may make a circle, and can be changed again.
#[test]
fn the_name_qemu_img_makes_a_circle_that_can_be_undone() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @a 1M");
    place.ours_ok("create -q -f qcow2 -b a -F qcow2 @b");
    for (line, looped) in [("rebase -u -b a -F qcow2 @a", "a"), ("rebase -u -b b -F qcow2 @a", "a")] {
        let refused = place.ours_fails(line, 1);
        assert!(refused.contains("part of the chain"), "{refused}");
        place.ours_ok(&format!("qemu-img {line}"));
        let said = place.ours_error("qemu-img info --backing-chain @a", 1);
        let path = place.path(looped);
        let want = format!("qemu-img: Backing file '{}' creates an infinite loop.\n", path.display());
        assert_eq!(said, want, "{line}");
        place.ours_ok("qemu-img rebase -u -b  @a");
        place.ours_ok("qemu-img info --backing-chain @b");
    }
}

/// The numbers of the extensions in a header, in order.
fn extensions(image: &std::path::Path) -> Vec<u32> {
    let bytes = fs::read(image).unwrap();
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut at = word(100) as usize;
    let mut all = Vec::new();
    while word(at) != 0 {
        all.push(word(at));
        at += 8 + word(at + 4).next_multiple_of(8) as usize;
    }
    all
}

/// A header may name one of QEMU's drivers for files; extensions that are not known come last.
#[test]
fn a_header_names_a_driver_for_files_as_with_qemu_img() {
    if !have_qemu("a_header_names_a_driver_for_files_as_with_qemu_img") {
        return;
    }
    let place = Place::new();
    place.img("create -q -f qcow2 @ours 1M");
    let mut bytes = fs::read(place.path("ours")).unwrap();
    let unknown = [&0x1234_5678_u32.to_be_bytes()[..], &5_u32.to_be_bytes(), b"hello\0\0\0"].concat();
    let rest = bytes[112..2048].to_vec();
    bytes[112..112 + unknown.len()].copy_from_slice(&unknown);
    bytes[112 + unknown.len()..][..rest.len()].copy_from_slice(&rest);
    fs::write(place.path("ours"), &bytes).unwrap();
    fs::write(place.path("theirs"), &bytes).unwrap();
    for line in ["rebase -u -b /no/such/base -F host_device @", "rebase -u -b  @"] {
        place.ours_ok(&format!("qemu-img {line}ours"));
        place.img(&format!("{line}theirs"));
        let (ours, theirs) = (extensions(&place.path("ours")), extensions(&place.path("theirs")));
        assert_eq!(ours, theirs, "{line}");
        assert_eq!(*ours.last().unwrap(), 0x1234_5678, "{line}");
        assert_eq!(facts(&place, "ours"), facts(&place, "theirs"), "{line}");
    }
    let said = place.ours_error("qemu-img rebase -u -b x -F vhdx @ours", 1);
    assert_eq!(said, "qemu-img: Invalid format name: 'vhdx'\n");
}
