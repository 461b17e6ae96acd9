//! Crash replay: whenever the power fails, an image opens, leaks at most, and has every flushed byte.
//!
//! Sequences of guest operations are played over a storage that records what was flushed; from its log come
//! all images that a crash could have left (each prefix, unflushed writes missing singly and in groups, torn
//! at sectors). Each is opened, checked by a checker that shares no code with the crate, and read: flushed
//! data must be there, and every sector must hold an old or a new value. Every few points a write goes on
//! where the crash left off, and QEMU's own check has its say.
//!
//! Sequences of three operations are thinned out by default; `BLOCKMIRROR_CRASH_ALL=1` plays them all.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

mod checker;
mod data_file;
mod faults;
mod resize;
mod scenario;

use std::io::Write as _;

use blockmirror_block::testing::CrashPoint;
use blockmirror_qcow2::Version;
use blockmirror_testing::qemu::Qemu;
use blockmirror_testing::scratch::scratch;
use scenario::{Contents, OPS, Op, Played, Start, play};

/// A write goes on at every so-manieth point.
const GO_ON_EVERY: u64 = 23;
/// QEMU looks at every so-manieth point, a process each time.
const QEMU_EVERY: u64 = 1009;

#[derive(Debug, Default)]
struct Tally {
    sequences: u64,
    points: u64,
    judged_by_qemu: u64,
}

/// All sequences of `len` operations.
fn sequences(len: usize) -> Vec<Vec<Op>> {
    let mut out = vec![Vec::new()];
    for _ in 0..len {
        out = out.iter().flat_map(|head| OPS.map(|op| [head.as_slice(), &[op]].concat())).collect();
    }
    out
}

/// Sequences of one to three operations, those of three thinned out unless all are asked for.
fn up_to_three() -> Vec<Vec<Op>> {
    let all = std::env::var_os("BLOCKMIRROR_CRASH_ALL").is_some_and(|v| v == "1");
    let threes = sequences(3).into_iter().step_by(if all { 1 } else { 6 });
    sequences(1).into_iter().chain(sequences(2)).chain(threes).collect()
}

fn replay(version: Version, cluster: u64, extended: bool) {
    let mut starts = Vec::new();
    for backed in [false, true] {
        for contents in [Contents::Empty, Contents::Populated] {
            starts.push(Start { version, cluster, extended, backed, contents });
        }
    }
    let tally = replay_all(&starts, &up_to_three());
    assert!(tally.points >= 4000, "only {} points", tally.points);
}

fn replay_all(starts: &[Start], sequences: &[Vec<Op>]) -> Tally {
    let qemu = Qemu::find("crash_replay");
    let mut tally = Tally::default();
    for start in starts {
        for ops in sequences {
            tally.sequences += 1;
            replay_one(&play(*start, ops), qemu, &mut tally);
        }
    }
    // Past the capture of the test runner: the count is part of what is claimed.
    let _ = writeln!(
        std::io::stderr(),
        "crash replay, from {}: {} points of {} sequences, {} judged by qemu-img",
        starts[0],
        tally.points,
        tally.sequences,
        tally.judged_by_qemu,
    );
    tally
}

fn replay_one(played: &Played, qemu: Option<Qemu>, tally: &mut Tally) {
    let fail = |point: &CrashPoint, why: &str| -> ! {
        panic!("{}: {:?}: {point:?}: {why}", played.start, played.ops)
    };
    let mut last = Vec::new();
    for point in played.points() {
        tally.points += 1;
        let contents = played.verify(&point).unwrap_or_else(|why| fail(&point, &why));
        if tally.points.is_multiple_of(GO_ON_EVERY) {
            played.go_on(&point, &contents).unwrap_or_else(|why| fail(&point, &why));
        }
        if let Some(qemu) = qemu
            && tally.points.is_multiple_of(QEMU_EVERY)
        {
            judge(qemu, played, &point, &contents).unwrap_or_else(|why| fail(&point, &why));
            tally.judged_by_qemu += 1;
        }
        last = contents;
    }
    assert!(
        last == played.final_contents(),
        "{}: {:?}: the last flush did not last",
        played.start,
        played.ops
    );
}

/// QEMU must find leaks at most, and read what we read.
fn judge(qemu: Qemu, played: &Played, point: &CrashPoint, contents: &[u8]) -> Result<(), String> {
    let dir = scratch().map_err(|e| e.to_string())?;
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).map(|()| path).map_err(|e| e.to_string())
    };
    let image = write("crashed.qcow2", &point.storage().to_vec())?;
    let raw = write("contents.raw", contents)?;
    if let Some(base) = played.start.backing_contents() {
        write("base.raw", &base)?;
    }
    let checked =
        qemu.img_output([std::ffi::OsStr::new("check"), image.as_os_str()]).map_err(|e| e.to_string())?;
    if !matches!(checked.status.code(), Some(0 | 3)) {
        return Err(format!("qemu-img check: {}", String::from_utf8_lossy(&checked.stdout)));
    }
    qemu.compare("qcow2", &image, "raw", &raw).map_err(|e| e.to_string())
}

#[test]
fn version_2_clusters_of_512() {
    replay(Version::V2, 512, false);
}

#[test]
fn version_2_clusters_of_4k() {
    replay(Version::V2, 4096, false);
}

#[test]
fn version_3_clusters_of_512() {
    replay(Version::V3, 512, false);
}

#[test]
fn version_3_clusters_of_4k() {
    replay(Version::V3, 4096, false);
}

#[test]
fn extended_l2_clusters_of_16k() {
    replay(Version::V3, 16384, true);
}

/// Zeros that keep their cluster's place, then data that begins inside a sector of it, and no flush. The head
/// of that sector was once filled by itself: a crash before the data came left it half zero and half as it
/// was before both, because the entry on disk still showed the place.
#[test]
fn a_sector_cut_by_a_write_into_a_zero_cluster_is_never_a_mixture() {
    let contents = Contents::Populated;
    let start = Start { version: Version::V3, cluster: 4096, extended: false, backed: false, contents };
    let ops = vec![Op::Write4K, Op::Zero, Op::WriteAcross];
    assert!(replay_all(&[start], &[ops]).points >= 20);
}

/// The refcount table moves to a larger place, and the header with it.
#[test]
fn a_refcount_table_that_grows() {
    let contents = Contents::TableFull;
    let start = Start { version: Version::V3, cluster: 512, extended: false, backed: false, contents };
    let table = |image: &[u8]| image[48..60].to_vec();
    let played = play(start, &[Op::WriteAcross]);
    let images: Vec<_> = played.points().map(|p| table(&p.storage().to_vec())).collect();
    assert_ne!(images.first(), images.last(), "the table did not move");
    let tally = replay_all(&[start], &[sequences(1), vec![vec![Op::WriteAcross, Op::Write4K]]].concat());
    assert!(tally.points >= 100, "only {} points", tally.points);
}

/// The judge must be able to say no.
#[test]
fn the_checker_sees_damage() {
    let contents = Contents::Populated;
    let start = Start { version: Version::V3, cluster: 512, extended: false, backed: false, contents };
    let played = play(start, &[Op::Write4K]);
    let image = played.points().last().unwrap().storage().to_vec();
    assert!(checker::check(&image).unwrap().allocated >= 8);
    let at = |field: usize| image[field..field + 8].iter().fold(0, |n, b| n << 8 | usize::from(*b));
    let (l1, refcount_table) = (at(40), at(48));
    let mask = 0x00ff_ffff_ffff_fe00;
    let l2 = at(l1) & mask;
    let data = (0..64).map(|i| l2 + 8 * i).find(|entry| at(*entry) & mask != 0).unwrap();
    let damages = [
        ("COPIED cleared", data, image[data] & 0x7f),
        ("reserved bit", data + 7, image[data + 7] | 2),
        ("data over the header", data + 6, 0),
        ("L2 table misplaced", l1 + 7, 1),
        ("refcount of the header", at(refcount_table) + 7, 0),
        ("refcount too high for COPIED", at(refcount_table) + l2 / 512 * 8 + 7, 2),
    ];
    for (what, offset, byte) in damages {
        let mut damaged = image.clone();
        damaged[offset] = byte;
        if what == "data over the header" {
            damaged[data..data + 7].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 2]);
        }
        assert!(checker::check(&damaged).is_err(), "{what} went unseen");
    }
}
