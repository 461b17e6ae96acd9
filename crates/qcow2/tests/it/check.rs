//! Checking and repairing images with one field changed, and repairs that are cut short.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::sync::Arc;

use blockmirror_block::testing::{Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{BlockDevice, ErrorKind, Storage, Visit, WriteFlags};
use blockmirror_qcow2::{
    CheckObserver, CheckReport, CreateOptions, Finding, OpenOptions, Repair, Version, check, repair,
};
use blockmirror_testing::mutate::mutations;

const SIZE: u64 = 256 << 10;
const BLOCK: usize = 4096;

/// A small image with data, zeros and room.
fn image(change: impl Fn(&mut CreateOptions)) -> Vec<u8> {
    let mut options = CreateOptions::new(SIZE);
    change(&mut options);
    let storage = Arc::new(MemoryStorage::new());
    options.create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    disk.write_at(&[0x11; 70_000], 1000, WriteFlags::NONE).unwrap();
    disk.write_at(&[0x22; 20_000], 200_000, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    storage.to_vec()
}

fn images() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("4K", image(|o| o.cluster_size = 4096)),
        ("v2 512", image(|o| (o.version, o.cluster_size) = (Version::V2, 512))),
        ("subclusters 16K", image(|o| (o.cluster_size, o.extended_l2) = (16384, true))),
        ("1-bit refcounts", image(|o| (o.cluster_size, o.refcount_bits) = (512, 1))),
        ("64-bit refcounts", image(|o| (o.cluster_size, o.refcount_bits) = (4096, 64))),
    ]
}

/// The blocks that a guest can read; none if the image does not open.
fn readable(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
    let Ok(disk) = OpenOptions::new().open(Arc::new(MemoryStorage::with_contents(bytes))) else {
        return Vec::new();
    };
    let read = |at| {
        let mut block = vec![0; BLOCK];
        disk.read_at(&mut block, at).ok().map(|()| block)
    };
    (0..disk.len().min(2 * SIZE)).step_by(BLOCK).map(read).collect()
}

/// A guest cluster that is mapped to the header shows how it is repaired.
fn is_header(block: &[u8]) -> bool {
    block.windows(4).any(|four| four == b"QFI\xfb")
}

fn repaired(bytes: &[u8], what: Repair) -> (Vec<u8>, Option<CheckReport>) {
    let storage = MemoryStorage::with_contents(bytes);
    let report = repair(&storage, what, &mut ()).ok();
    (storage.to_vec(), report)
}

#[test]
fn a_sound_image_is_clean() {
    for (name, bytes) in images() {
        let report = check(&MemoryStorage::with_contents(&bytes), &mut ()).unwrap();
        assert!(report.is_clean(), "{name}: {report:?}");
        assert!(report.allocated_clusters > 0, "{name}");
        assert_eq!(repaired(&bytes, Repair::All).0, bytes, "{name}: a repair of nothing writes nothing");
    }
}

#[test]
fn no_mutant_loses_what_could_be_read() {
    for (name, bytes) in images() {
        for mutation in mutations(&bytes) {
            let what = format!("{name}: {}", mutation.label);
            let mut damaged = bytes.clone();
            let end = mutation.offset + mutation.new.len();
            damaged[mutation.offset..end].copy_from_slice(&mutation.new);
            let before = readable(&damaged);
            let storage = MemoryStorage::with_contents(&damaged);
            let first = check(&storage, &mut ()).ok();
            assert_eq!(storage.to_vec(), damaged, "{what}: a check writes nothing");
            for mode in [Repair::Leaks, Repair::All] {
                let (after, report) = repaired(&damaged, mode);
                assert_eq!(report.is_some(), first.is_some(), "{what}");
                let kept = readable(&after);
                for (at, (was, is)) in before.iter().zip(&kept).enumerate() {
                    let may_differ = was.as_ref().is_none_or(|block| is_header(block));
                    assert!(may_differ || was == is, "{what}, {mode:?}: the block {at} reads differently");
                }
                let Some(report) = report else { continue };
                let again = check(&MemoryStorage::with_contents(&after), &mut ()).unwrap();
                let figures = |r: &CheckReport| (r.corruptions, r.leaks, r.check_errors);
                assert_eq!(figures(&again), figures(&report), "{what}, {mode:?}");
                assert!(after.len() < 4 * bytes.len() + (64 << 10), "{what}: {} bytes", after.len());
            }
        }
    }
}

/// The image with a refcount block lost, a shared cluster, and a COPIED flag missing.
fn badly_damaged() -> Vec<u8> {
    let mut bytes = image(|o| o.cluster_size = 4096);
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let (l1, table) = (word(&bytes, 40) as usize, word(&bytes, 48) as usize);
    let l2 = (word(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let entry = word(&bytes, l2);
    bytes[l2 + 400..l2 + 408].copy_from_slice(&entry.to_be_bytes());
    let shared = (l2 as u64) | 1 << 63;
    bytes[l2 + 408..l2 + 416].copy_from_slice(&shared.to_be_bytes());
    bytes[l2 + 8] &= 0x7f;
    bytes[table..table + 8].fill(0);
    bytes
}

#[test]
fn a_repair_that_is_cut_short_can_be_repeated() {
    let damaged = badly_damaged();
    let before = readable(&damaged);
    let whole = repaired(&damaged, Repair::All);
    assert!(whole.1.unwrap().is_clean());
    for kind in [OpKind::Write, OpKind::Flush] {
        let mut n = 0;
        loop {
            let memory = Arc::new(MemoryStorage::with_contents(&damaged));
            let faults = Faults::new();
            faults.inject(Fault::on(kind).after(n).forever().having_done(Done::Nothing));
            let failing = FaultStorage::new(memory.clone(), faults);
            if repair(&failing, Repair::All, &mut ()).is_ok() {
                break;
            }
            assert_eq!(readable(&memory.to_vec()), before, "after {n} of {kind:?}");
            let (after, report) = repaired(&memory.to_vec(), Repair::All);
            assert!(report.unwrap().is_clean(), "after {n} of {kind:?}");
            assert_eq!(readable(&after), before, "after {n} of {kind:?}");
            n += 1;
        }
        assert!(n >= 3, "{kind:?}: {n}");
    }
}

#[test]
fn a_device_of_fixed_length_is_repaired_within() {
    let mut bytes = badly_damaged();
    bytes.resize(bytes.len() + (1 << 20), 0);
    let storage = MemoryStorage::fixed(bytes.len() as u64);
    storage.write_at(&bytes, 0).unwrap();
    let before = readable(&bytes);
    let report = repair(&storage, Repair::All, &mut ()).unwrap();
    assert_eq!(readable(&storage.to_vec()), before);
    assert_eq!((report.leaks, report.check_errors), (0, 0), "{report:?}");
}

#[test]
fn the_observer_sees_findings_and_ends_the_check() {
    #[derive(Default)]
    struct Watch {
        found: Vec<String>,
        looks: u64,
        most: u64,
    }
    impl CheckObserver for Watch {
        fn found(&mut self, finding: &Finding, times: u64) {
            self.found.push(format!("{finding} x{times}"));
        }

        fn progress(&mut self, done: u64, total: u64) -> Visit {
            assert!(done <= total);
            self.looks += 1;
            if self.looks > self.most { Visit::Break(()) } else { Visit::Continue(()) }
        }
    }
    let storage = MemoryStorage::with_contents(&badly_damaged());
    let mut watch = Watch { most: u64::MAX, ..Watch::default() };
    let report = check(&storage, &mut watch).unwrap();
    assert_eq!(watch.found.len() as u64, report.corruptions);
    let looks = watch.looks;
    for most in 0..looks {
        let error = check(&storage, &mut Watch { most, ..Watch::default() }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "at {most}");
    }
}
