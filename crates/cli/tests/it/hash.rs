//! `hash`: one hash for one content, whatever holds it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use crate::common::Place;

/// The disk of docs/hash.md.
const KNOWN: &str = "bm1:0bcda0d25a2111dc9097e9a5736d090a17597396fac3cf2e1bd20478c837e5a6";

fn known(place: &Place) {
    let mut bytes = vec![0; (1 << 20) + 512];
    bytes[1 << 20..][..11].copy_from_slice(b"blockmirror");
    std::fs::write(place.path("disk.raw"), bytes).unwrap();
}

#[test]
fn the_hash_is_the_same_for_every_format() {
    let place = Place::new();
    known(&place);
    place.ours_ok("convert -O qcow2 -o cluster_size=512 @disk.raw @small");
    place.ours_ok("convert -c -O qcow2 @disk.raw @compressed");
    place.ours_ok("create -f qcow2 -b disk.raw -F raw @overlay");
    let said = place.ours_ok("hash @disk.raw @small @compressed @overlay");
    let hashes: Vec<_> = said.lines().map(|line| line.split_once("  ").unwrap().0).collect();
    assert_eq!(hashes, [KNOWN; 4], "{said}");
    place.ours_ok("resize @small +512");
    assert!(!place.ours_ok("hash @small").contains(KNOWN), "the length counts");
    let bytes = std::fs::read(place.path("disk.raw")).unwrap();
    let plain = place.ours_ok("hash --plain -f qcow2 @overlay");
    assert_eq!(plain.split_once("  ").unwrap().0, blake3::hash(&bytes).to_hex().as_str());
}

#[test]
fn what_it_says_of_each_image_as_json() {
    let place = Place::new();
    known(&place);
    let said = place.ours_ok("hash --output=json @disk.raw");
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let object = &said[0];
    assert_eq!((&object["hash"], &object["format"]), (&KNOWN.into(), &"raw".into()));
    assert_eq!(object["virtual-size"], (1 << 20) + 512);
    assert_eq!(said.as_array().unwrap().len(), 1);
}

#[test]
fn an_image_that_is_not_there_is_an_error() {
    let place = Place::new();
    known(&place);
    let said = place.ours("hash @disk.raw @missing");
    assert_eq!(said.code, 1);
    assert!(said.out.contains(KNOWN), "the first one is printed: {said:?}");
    assert!(said.err.contains("missing"), "{said:?}");
    assert_eq!(place.ours("hash").code, 2);
}

/// A large disk of holes: what is not read is what makes it quick. The figure is that of docs/hash.md.
#[test]
fn eight_tebibytes_of_holes() {
    let place = Place::new();
    place.ours_ok("create -f qcow2 @large 8T");
    let said = place.ours_ok("hash @large");
    let (hash, _) = said.split_once("  ").unwrap();
    assert_eq!(hash, "bm1:99bea89584ce4afcd390b073a7badf45dba24ee8324a5329dfa7860fd5a5ba34");
}
