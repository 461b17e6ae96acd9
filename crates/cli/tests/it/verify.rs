//! Copies that are verified, and ranges that are written by one command and copied by another.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::os::unix::fs::FileExt;

use crate::common::Place;
use serde_json::Value;

const LEN: usize = 3 << 20;

/// Data in the first half of 3 MiB, and at the end.
fn source(place: &Place) {
    let mut bytes: Vec<u8> = (0..LEN).map(|at| (at / 512 * 7 + at) as u8).collect();
    bytes[LEN / 2..LEN - 512].fill(0);
    fs::write(place.path("source"), bytes).unwrap();
}

fn change(place: &Place, name: &str, at: &[u64]) {
    let file = fs::OpenOptions::new().write(true).open(place.path(name)).unwrap();
    at.iter().for_each(|at| file.write_all_at(b"changed", *at).unwrap());
}

#[test]
fn each_mode_verifies_each_target() {
    let place = Place::new();
    source(&place);
    let hash = place.ours_ok("hash @source");
    let hash = hash.split("  ").next().unwrap();
    for mode in ["readback", "hash", "full"] {
        for words in [
            "convert -f raw",
            "convert -f raw -O qcow2",
            "convert -f raw -O qcow2 -c -m 1",
            "convert -f raw -O qcow2 -o cluster_size=2M,preallocation=metadata",
            "convert -f raw -S 0 -t none",
            "mirror -f raw",
        ] {
            let said = place.ours_ok(&format!("{words} --verify={mode} @source @target"));
            let last = said.lines().last().unwrap();
            assert!(last.starts_with(&format!("verified ({mode}): ")), "{words}: {said}");
            assert_eq!(last.contains(hash), mode == "hash", "{words}: {said}");
            let compared = place.ours_ok("compare -f raw @source @target");
            assert_eq!(compared, "Images are identical.\n", "{words}");
            // Into what is there now, and into one that is longer.
            place.ours_ok(&format!("mirror -n -f raw --verify={mode} @source @target"));
        }
        fs::write(place.path("longer"), vec![1; LEN + 5120]).unwrap();
        place.ours_ok(&format!("convert -n -f raw -O raw --verify={mode} @source @longer"));
        assert!(fs::read(place.path("longer")).unwrap()[LEN..].iter().all(|byte| *byte == 1));
    }
    assert_eq!(place.names(), ["longer", "source", "target"]);
}

#[test]
fn what_was_verified_is_told_to_programs() {
    let place = Place::new();
    source(&place);
    let said = place.ours_ok("convert -f raw --verify=hash --output=json @source @target");
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["verified"]["mode"], "hash");
    assert_eq!(said["verified"]["bytes"], LEN);
    let hash = said["verified"]["hash"].as_str().unwrap().to_owned();
    assert!(place.ours_ok("hash @target").starts_with(&hash));
    let said = place.ours_ok("convert -f raw --output=json @source @other");
    assert!(!said.contains("verified"), "{said}");
}

/// What cannot be read of the source is listed, and no fault of the copy.
#[test]
fn what_was_left_out_is_not_verified() {
    let place = Place::new();
    source(&place);
    fs::write(place.path("rules"), "[inject-error]\nevent = \"read_aio\"\nsector = \"8\"\n").unwrap();
    for mode in ["readback", "full"] {
        let line = format!("convert --salvage --verify={mode} -f raw blkdebug:@rules:@source @target");
        let ran = place.ours(&line);
        assert_eq!(ran.code, 3, "{ran:?}");
        assert!(ran.out.contains(&format!("verified ({mode})")), "{ran:?}");
    }
    let said = place.ours_fails("convert --salvage --verify=hash -f raw @source @target", 2);
    assert!(said.ends_with("ranges that fail are left out, and a hash verifies the whole disk"), "{said}");
}

#[test]
fn what_makes_no_sense_together_is_refused_before_anything_is_touched() {
    let place = Place::new();
    source(&place);
    place.ours_ok("create -q -f qcow2 -b source -F raw @top");
    for (line, why) in [
        ("convert --ranges @r @source @t", "--verify"),
        ("convert --only @r @source @t", "--no-create"),
        ("mirror --sync top --verify=hash @top @t", "only the top of the source is copied"),
        ("convert --verify=some @source @t", "--verify"),
        ("compare -s --ranges @r @source @source", "--strict"),
    ] {
        let said = place.ours_fails(line, 2);
        assert!(said.contains(why), "{line}: {said}");
    }
    assert_eq!(place.names(), ["source", "top"]);
}

fn ranges(place: &Place, name: &str) -> Vec<(u64, u64)> {
    let text = fs::read_to_string(place.path(name)).unwrap();
    let row = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        (row["start"].as_u64().unwrap(), row["length"].as_u64().unwrap())
    };
    text.lines().map(row).collect()
}

/// The way back from a difference: find it, copy it, and nothing else.
#[test]
fn what_compare_finds_is_what_only_copies() {
    let place = Place::new();
    source(&place);
    place.ours_ok("convert -q -f raw -O qcow2 @source @target");
    place.ours_ok("convert -q @target @raw");
    change(&place, "raw", &[1000, 2_000_000]);
    for (words, target) in [("-f raw -F raw @source @raw", "raw"), ("-f raw @raw @target", "target")] {
        let ran = place.ours(&format!("compare --ranges @{target}.ranges {words}"));
        assert_eq!((ran.code, &*ran.out), (1, "Content mismatch at offset 512!\n"), "{ran:?}");
        assert_eq!(ranges(&place, &format!("{target}.ranges")), [(512, 512), (1_999_872, 512)]);
    }
    // A change of which the file says nothing stays.
    change(&place, "raw", &[LEN as u64 - 100_000]);
    place.ours_ok("convert -n -q -f raw -O raw --only @raw.ranges --verify=full @source @raw");
    let ran = place.ours("compare --ranges @left -f raw -F raw @source @raw");
    assert_eq!(ran.code, 1, "{ran:?}");
    assert_eq!(ranges(&place, "left"), [((LEN as u64 - 100_000) / 512 * 512, 512)]);
    place.ours_ok("mirror -n -q -f raw --only @left @source @raw");
    assert_eq!(place.ours("compare --ranges @none -f raw -F raw @source @raw").code, 0);
    assert_eq!(fs::read(place.path("none")).unwrap(), b"");
}

/// The file might be an image.
#[test]
fn a_file_that_exists_is_not_replaced_by_ranges() {
    let place = Place::new();
    source(&place);
    place.ours_ok("convert -q -f raw @source @target");
    let before = fs::read(place.path("source")).unwrap();
    for line in [
        "compare --ranges @source -f raw -F raw @source @target",
        "convert --verify=full --ranges @source -f raw @source @new",
        "convert -n --verify=full --ranges @target -f raw -O raw @source @target",
    ] {
        let code = if line.starts_with("compare") { 2 } else { 1 };
        assert!(place.ours_fails(line, code).contains("exists"), "{line}");
        assert!(fs::read(place.path("source")).unwrap() == before);
        assert!(fs::read(place.path("target")).unwrap() == before);
    }
    assert_eq!(place.names(), ["source", "target"]);
}

/// A copy that fails leaves no list: an empty one would say that nothing differs.
#[test]
fn a_copy_that_fails_leaves_no_ranges() {
    let place = Place::new();
    source(&place);
    fs::write(place.path("rules"), "[inject-error]\nevent = \"read_aio\"\nsector = \"8\"\n").unwrap();
    let line = "convert --verify=full --ranges @ranges -f raw blkdebug:@rules:@source @target";
    assert_eq!(place.ours(line).code, 1);
    assert_eq!(place.names(), ["rules", "source"]);
    place.ours_ok("convert -q --verify=full --ranges @ranges -f raw @source @target");
    assert_eq!(fs::read(place.path("ranges")).unwrap(), b"");
}

#[test]
fn hostile_ranges_are_refused_before_the_target_is_touched() {
    let place = Place::new();
    source(&place);
    let before = vec![5; LEN];
    fs::write(place.path("target"), &before).unwrap();
    for (text, why) in [
        ("{\"start\":0}", "line 1: it is no JSON object"),
        ("{\"start\":0,\"length\":512}\n{\"start\":0,\"length\":512}", "line 2: it starts at 0"),
        ("{\"start\":3145728,\"length\":1}", "line 1: 1 bytes at 3145728 reach past the end of the disk"),
        ("{\"start\":18446744073709551615,\"length\":18446744073709551615}", "past the end"),
        (&*"x".repeat(10_000), "longer than 4096 bytes"),
    ] {
        fs::write(place.path("ranges"), text).unwrap();
        let said = place.ours_fails("convert -n -f raw -O raw --only @ranges @source @target", 1);
        assert!(said.contains("@ranges: ") && said.contains(why), "{said}");
    }
    let said = place.ours_fails("convert -n -f raw -O raw --only @missing @source @target", 1);
    assert!(said.contains("@missing: No such file"), "{said}");
    assert!(fs::read(place.path("target")).unwrap() == before);
    // A dry run counts what would be copied.
    fs::write(place.path("ranges"), "{\"start\":0,\"length\":65536}").unwrap();
    let said = place.ours_ok("convert --dry-run -n -f raw -O raw --only @ranges @source @target");
    assert!(said.contains("copy: 64 KiB in 1 run"), "{said}");
}
