//! Crash points: what they may show, and that they show all of it.

use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::ByteRange;
use crate::ZeroFlags;
use crate::storage::Storage;
use crate::testing::{CrashPoint, Logged, RecordingStorage};

fn images(recording: &RecordingStorage) -> Vec<(CrashPoint, Vec<u8>)> {
    recording.crash_points().map(|point| (point.clone(), point.storage().to_vec())).collect()
}

#[test]
fn what_was_flushed_is_in_every_later_image() {
    let recording = RecordingStorage::with_contents(&[9; 512]);
    recording.write_at(&[1; 512], 0).unwrap();
    recording.flush().unwrap();
    recording.write_at(&[2; 512], 512).unwrap();
    let flushed = recording.log().iter().position(|e| *e == Logged::Flush).unwrap();
    let images = images(&recording);
    assert_eq!(images[0].1, [9; 512]);
    for (point, image) in images.iter().filter(|(p, _)| p.position() > flushed) {
        assert_eq!(image[..512], [1; 512], "{point}");
    }
    assert!(images.iter().any(|(_, image)| image.len() == 1024));
}

#[test]
fn every_subset_of_a_few_unflushed_writes_occurs() {
    let recording = RecordingStorage::with_contents(&[0; 4 * 512]);
    for i in 0..4u64 {
        recording.write_at(&[1; 512], i * 512).unwrap();
    }
    let masks: BTreeSet<u8> = images(&recording)
        .iter()
        .map(|(_, image)| (0..4).fold(0, |mask, i| mask | image[i * 512] << i))
        .collect();
    assert_eq!(masks.len(), 16);
}

#[test]
fn of_many_writes_each_alone_each_missing_and_each_group_occur() {
    let recording = RecordingStorage::with_contents(&[0; 9 * 512]);
    for i in 0..9u64 {
        recording.write_at(&[1; 512], i * 512).unwrap();
    }
    let masks: BTreeSet<u16> = images(&recording)
        .iter()
        .map(|(_, image)| (0..9).fold(0, |mask, i| mask | u16::from(image[i * 512]) << i))
        .collect();
    for i in 0..9 {
        assert!(masks.contains(&(1 << i)) && masks.contains(&(0x1ff & !(1 << i))), "{i}");
        for j in i + 1..9 {
            let group = (1u16 << j) - (1 << i);
            assert!(masks.contains(&(0x1ff & !group)), "{i}..{j}");
        }
    }
    // The first and the last alone with nothing between: a reordered disk.
    assert!(masks.contains(&0x101));
}

#[test]
fn a_write_is_torn_at_sectors_of_the_storage() {
    let recording = RecordingStorage::with_contents(&[0; 2048]);
    // Begins in the middle of a sector, and ends in one.
    recording.write_at(&[1; 1536], 256).unwrap();
    let mut torn = BTreeSet::new();
    for (point, image) in images(&recording) {
        for sector in 0..4 {
            let (start, end) = ((sector * 512).max(256), (sector * 512 + 512).min(1792));
            assert!(image[start..end].iter().all(|b| *b == image[start]), "{point} tears a sector");
        }
        assert!(image[..256].iter().chain(&image[1792..]).all(|b| *b == 0));
        torn.insert((0..4).map(|s| image[(s * 512_usize).max(256)]).collect::<Vec<_>>());
    }
    for expected in [[0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 1]] {
        assert!(torn.contains(expected.as_slice()), "{expected:?} in {torn:?}");
    }
}

/// Two writes into one sector: the disk cannot have the second without the first, since the sector goes there
/// as a whole. An early version replayed bytes and accused formats of losing the first.
#[test]
fn writes_into_one_sector_are_not_taken_apart() {
    let recording = RecordingStorage::with_contents(&[0; 512]);
    recording.write_at(&[1; 100], 0).unwrap();
    recording.write_zeroes(ByteRange::new(50, 60), ZeroFlags::NONE).unwrap();
    recording.write_at(&[2; 100], 100).unwrap();
    for (point, image) in images(&recording) {
        assert!(image[150] != 2 || (image[0] == 1 && image[55] == 0), "{point}");
    }
}

#[test]
fn a_point_describes_itself() {
    let recording = RecordingStorage::default();
    recording.set_len(4096).unwrap();
    recording.write_at(&[1; 1024], 0).unwrap();
    let lines: Vec<String> = recording.crash_points().map(|p| p.to_string()).collect();
    assert!(
        lines.contains(&"crash after 2 of the log, dropped [0], torn without 0x200..0x400".to_owned()),
        "{lines:?}"
    );
    let last = recording.crash_points().last().unwrap();
    assert_eq!(format!("{last:?}"), "crash after 2 of the log, dropped [0]; kept: [1: write 0x0..0x400]");
}

proptest! {
    /// Each sector of each image holds a value that it had, durably or not, since the last flush before the
    /// crash.
    #[test]
    fn no_image_holds_anything_that_was_not_there(
        ops in proptest::collection::vec((0u64..6, 1u64..4, 0u8..5), 1..14)
    ) {
        let recording = RecordingStorage::with_contents(&[255; 9 * 512]);
        // The possible values of each sector at each position of the log.
        let mut possible = vec![vec![BTreeSet::from([255u8]); 9]];
        for (i, (sector, n, kind)) in ops.iter().enumerate() {
            let range = ByteRange::at(sector * 512, n * 512);
            let mut now = possible.last().unwrap().clone();
            let live = |now: &mut Vec<BTreeSet<u8>>, value: u8| {
                (*sector..sector + n).for_each(|s| { now[s as usize].insert(value); });
            };
            match kind {
                0 => {
                    recording.flush().unwrap();
                    let bytes = recording.to_vec();
                    now = (0..9).map(|s| BTreeSet::from([bytes[s * 512]])).collect();
                }
                1 => {
                    recording.write_zeroes(range, ZeroFlags::NONE).unwrap();
                    live(&mut now, 0);
                }
                _ => {
                    recording.write_at(&vec![i as u8 + 1; range.len() as usize], range.start()).unwrap();
                    live(&mut now, i as u8 + 1);
                }
            }
            possible.push(now);
        }
        let mut full = 0;
        for (point, image) in images(&recording) {
            for s in 0..9 {
                let bytes = &image[s * 512..][..512];
                prop_assert!(bytes.iter().all(|b| *b == bytes[0]), "{}", point);
                prop_assert!(possible[point.position()][s].contains(&bytes[0]), "{} sector {}", point, s);
            }
            full += usize::from(image == recording.to_vec());
        }
        prop_assert!(full > 0);
    }
}
