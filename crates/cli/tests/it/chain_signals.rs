//! A commit that a signal ends, and one whose base is full, as their parent process sees them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::process::Stdio;

use crate::common::Place;
use crate::process::{output, shell, signal, wait_until};

const LEN: usize = 4 << 20;

/// A raw base and an overlay whose first half differs.
fn place() -> Place {
    let place = Place::new();
    fs::write(place.path("base"), vec![7; LEN]).unwrap();
    place.ours_ok("create -q -f qcow2 -b base -F raw @overlay");
    place.ours_ok("bench -q -w -c 32 -s 64K --pattern 9 @overlay");
    place
}

/// What the overlay reads as.
fn content(place: &Place) -> Vec<u8> {
    place.ours_ok("convert -q @overlay @content");
    let content = fs::read(place.path("content")).unwrap();
    fs::remove_file(place.path("content")).unwrap();
    content
}

fn want() -> Vec<u8> {
    [vec![9; LEN / 2], vec![7; LEN / 2]].concat()
}

/// Its rate is such that it stands after its first piece.
#[test]
fn a_signal_ends_a_commit_and_the_image_reads_as_before() {
    for (name, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let place = place();
        let before = fs::read(place.path("overlay")).unwrap();
        let mut command = shell(&place, ":", "commit -q -r 1 overlay");
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        wait_until("the commit does not begin", || fs::read(place.path("base")).unwrap()[0] == 9);
        signal(&child, name);
        let (ended, said) = output(child);
        assert_eq!(ended, Some(code), "{name}: {said}");
        assert_eq!(said, "blockmirror: commit: cancelled\n", "{name}");
        assert!(fs::read(place.path("overlay")).unwrap() == before && content(&place) == want(), "{name}");
        assert_eq!(place.names(), ["base", "overlay"]);
        place.ours_ok("commit -q @overlay");
        assert!(fs::read(place.path("base")).unwrap() == want() && content(&place) == want(), "{name}");
    }
}

/// A limit on the size of files stands for a full disk: the base is a qcow2 image that cannot grow.
#[test]
fn a_base_that_cannot_grow_leaves_the_image_as_it_was() {
    let place = Place::new();
    place.ours_ok("create -q -f qcow2 @base 4M");
    place.ours_ok("create -q -f qcow2 -b base -F qcow2 @overlay");
    place.ours_ok("bench -q -w -c 32 -s 64K --pattern 9 @overlay");
    let before = fs::read(place.path("overlay")).unwrap();
    // In blocks of 512 bytes.
    let child = shell(&place, "ulimit -f 2048", "commit -q overlay").stderr(Stdio::piped()).spawn().unwrap();
    let (ended, said) = output(child);
    assert_eq!(ended, Some(1), "{said}");
    assert!(said.contains("commit: ") && said.contains("base"), "{said}");
    assert!(fs::read(place.path("overlay")).unwrap() == before);
    place.ours_ok("check -q @base");
    place.ours_ok("commit -q @overlay");
    assert!(content(&place) == [vec![9; LEN / 2], vec![0; LEN / 2]].concat());
}
