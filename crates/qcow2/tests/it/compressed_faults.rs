//! Compressed writes that fail, and power that fails during them: leaks at most, and no cluster but old or
//! new.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::sync::Arc;

use blockmirror_block::testing::{Fault, FaultStorage, Faults, MemoryStorage, OpKind, RecordingStorage};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, WriteFlags};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Qcow2};

use crate::common::qemu_check_finds_no_corruption;
use crate::compressed_write::{checked, content, create, open, read};

const CLUSTER: usize = 4096;

/// Small images of several refcount widths.
fn images() -> impl Iterator<Item = Arc<MemoryStorage>> {
    [1, 2, 16].into_iter().map(|bits| create(|o| (o.cluster_size, o.refcount_bits) = (4096, bits)))
}

/// The first bytes of each step of [`steps`].
const AT: [u64; 4] = [0, 8, 2, 12];

/// Writes that share host clusters, replace each other and free what they held.
fn steps(disk: &Qcow2, mut done: impl FnMut(usize)) -> blockmirror_block::Result<()> {
    let offset = |step: usize| AT[step] * CLUSTER as u64;
    disk.write_compressed(&content(6 * CLUSTER as u64, 1), offset(0))?;
    done(0);
    disk.write_compressed(&[0x11; 4 * CLUSTER], offset(1))?;
    done(1);
    disk.flush()?;
    disk.write_compressed(&[0x22; 3 * CLUSTER], offset(2))?;
    done(2);
    disk.write_at(&[0x33; 700], offset(1) + 300, WriteFlags::NONE)?;
    disk.flush()?;
    disk.discard(ByteRange::at(0, 8 * CLUSTER as u64))?;
    disk.flush()?;
    disk.write_compressed(&content(8 * CLUSTER as u64, 2), offset(3))?;
    done(3);
    disk.flush()
}

#[test]
fn a_failure_leaks_at_most_and_writing_goes_on_after_it_or_after_opening_anew() {
    for image in images() {
        for kind in [OpKind::Write, OpKind::Flush, OpKind::Read] {
            for error in [ErrorKind::Io, ErrorKind::NoSpace] {
                for forever in [false, true] {
                    let mut n = 0;
                    while fails_at(&image, kind, error, forever, n) {
                        n += 1;
                    }
                    assert!(n > 4 || kind == OpKind::Read, "{kind:?}: {n} operations");
                }
            }
        }
    }
}

/// Plays the steps with the `n`th operation failing; false if there was none.
fn fails_at(image: &MemoryStorage, kind: OpKind, error: ErrorKind, forever: bool, n: u64) -> bool {
    let what = format!("{kind:?} {n} fails with {error:?}, for ever: {forever}");
    let below = Arc::new(MemoryStorage::with_contents(&image.to_vec()));
    let faults = Faults::new();
    let disk = open(Arc::new(FaultStorage::new(below.clone(), faults.clone())));
    let fault = Fault::on(kind).after(n).with(error);
    faults.inject(if forever { fault.forever() } else { fault });
    let result = steps(&disk, |_| ());
    if faults.failed() == 0 {
        result.unwrap();
        return false;
    }
    faults.heal();
    // What cannot be written any more is said by each operation; what can is right.
    let mut truth = read(&disk);
    let again = content(4 * CLUSTER as u64, 3);
    let at = 20 * CLUSTER;
    if disk.write_compressed(&again, at as u64).is_ok() && disk.flush().is_ok() {
        truth[at..at + again.len()].copy_from_slice(&again);
        assert!(read(&disk) == truth, "{what}");
        drop(disk);
        assert!(read(&open(below.clone())) == truth, "{what}: opened anew");
    }
    let report = checked(&*below);
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {report:?}");
    let anew = open(below.clone());
    anew.write_compressed(&again, at as u64).unwrap();
    anew.flush().unwrap();
    assert!(read(&anew)[at..at + again.len()] == again, "{what}");
    assert_eq!(checked(&*below).corruptions, 0, "{what}");
    true
}

/// A stream whose write may still arrive shares its cluster with one that is there. When that goes, too, the
/// cluster was given to others.
#[test]
fn a_cluster_with_a_late_write_is_not_used_again() {
    let below = create(|o| o.cluster_size = 4096);
    let faults = Faults::new();
    let disk = open(Arc::new(FaultStorage::new(below.clone(), faults.clone())));
    disk.write_compressed(&[1; CLUSTER], 0).unwrap();
    disk.flush().unwrap();
    let shared = (below.to_vec().len() - 1) / CLUSTER;
    faults.inject(Fault::on(OpKind::Write).with(ErrorKind::Io));
    disk.write_compressed(&[2; CLUSTER], CLUSTER as u64).unwrap_err();
    faults.heal();
    disk.discard(ByteRange::at(0, CLUSTER as u64)).unwrap();
    disk.flush().unwrap();
    let noise = content(64 * CLUSTER as u64, 7);
    disk.write_at(&noise, 64 * CLUSTER as u64, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    // The late write: it must hit nothing.
    let before = read(&disk);
    blockmirror_block::Storage::write_at(&*below, &[0xff; 512], (shared * CLUSTER) as u64 + 512).unwrap();
    assert!(read(&disk) == before);
    assert_eq!(checked(&*below).corruptions, 0);
}

#[test]
fn a_crash_leaks_at_most_and_keeps_what_was_flushed() {
    let mut points = 0;
    for image in images() {
        let recording = Arc::new(RecordingStorage::with_contents(&image.to_vec()));
        let disk = open(recording.clone());
        // Contents, and the position in the log from which they may be seen, and from which they are durable.
        let mut states = vec![(read(&disk), 0, 0)];
        let mut play = |begun: usize, flush: bool| {
            if flush {
                disk.flush().unwrap();
            }
            let durable = if flush { recording.position() } else { usize::MAX };
            states.push((read(&disk), begun, durable));
        };
        for step in 0..12u64 {
            let begun = recording.position();
            match step % 4 {
                0 => disk.write_compressed(&content(5 * CLUSTER as u64, step), (step * 512) & !4095).unwrap(),
                1 => disk.write_compressed(&[step as u8; 3 * CLUSTER], (6 + step / 4) * 4096).unwrap(),
                2 => disk.write_at(&[step as u8; 5000], step * 700, WriteFlags::NONE).unwrap(),
                _ => disk.write_zeroes(ByteRange::at(4096 * step / 4, 8192), Default::default()).unwrap(),
            }
            play(begun, step % 3 == 2);
        }
        play(recording.position(), true);
        for point in recording.crash_points() {
            points += 1;
            let storage = Arc::new(point.storage());
            let report = checked(&*storage);
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{point:?}: {report:?}");
            if points % 499 == 0 {
                qemu_check_finds_no_corruption(&storage.to_vec(), "crash");
            }
            let now = read(&OpenOptions::new().open(storage).unwrap());
            let durable = states.iter().rposition(|state| state.2 <= point.position()).unwrap();
            let possible: Vec<_> =
                states[durable..].iter().filter(|state| state.1 <= point.position()).collect();
            for (sector, bytes) in now.chunks(512).enumerate() {
                let at = sector * 512..sector * 512 + bytes.len();
                let found = possible.iter().any(|(contents, ..)| contents[at.clone()] == *bytes);
                assert!(found, "{point:?}: guest sector {sector}");
            }
        }
    }
    assert!(points > 500, "{points}");
}

/// A fresh image of this size holds no more than its options say.
#[test]
fn a_full_storage_fails_the_write_alone() {
    let storage = Arc::new(MemoryStorage::fixed(24 * CLUSTER as u64));
    let mut options = CreateOptions::new(1 << 20);
    options.cluster_size = 4096;
    options.create(&*storage, None).unwrap();
    let disk = open(storage.clone());
    let noisy: Vec<u8> = (0..64 * CLUSTER).map(|i| ((i * i) >> 7) as u8 ^ (i / 3) as u8).collect();
    let mut written = 0;
    let error = loop {
        let part = &noisy[written..written + CLUSTER];
        match disk.write_compressed(part, written as u64) {
            Ok(()) => written += CLUSTER,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    disk.flush().unwrap();
    assert!(read(&disk)[..written] == noisy[..written]);
    assert!(checked(&*storage).is_clean());
}
