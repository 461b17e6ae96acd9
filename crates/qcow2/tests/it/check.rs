//! Checking and repairing images with one field changed, and repairs that are cut short.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::sync::Arc;

use blockmirror_block::testing::{Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, ExtentKind, Storage, Visit, WriteFlags};
use blockmirror_qcow2::{
    CheckObserver, CheckReport, CreateOptions, Finding, OpenOptions, Repair, Severity, Version, check, repair,
};
use blockmirror_testing::mutate::{Mutation, mutations};

use crate::raw_image::{COPIED, OFFSET, RawImage};

pub(crate) const SIZE: u64 = 256 << 10;
const BLOCK: usize = 4096;
/// Blocks of a disk; none where one cannot be read.
pub(crate) type Blocks = Vec<Option<Vec<u8>>>;
/// At most twice the disk is read.
const READ_BLOCKS: usize = 2 * SIZE as usize / BLOCK;

/// A small image with data, zeros and room.
pub(crate) fn image(change: impl Fn(&mut CreateOptions)) -> Vec<u8> {
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

pub(crate) fn images() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("4K", image(|o| o.cluster_size = 4096)),
        ("v2 512", image(|o| (o.version, o.cluster_size) = (Version::V2, 512))),
        ("subclusters 16K", image(|o| (o.cluster_size, o.extended_l2) = (16384, true))),
        ("1-bit refcounts", image(|o| (o.cluster_size, o.refcount_bits) = (512, 1))),
        ("64-bit refcounts", image(|o| (o.cluster_size, o.refcount_bits) = (4096, 64))),
        ("compressed", changed(|o| o.cluster_size = 4096, |image| (1..3).for_each(|at| image.compress(at)))),
        (
            "subclusters, compressed",
            changed(
                |o| (o.cluster_size, o.extended_l2) = (16384, true),
                |image| (1..3).for_each(|at| image.compress(at)),
            ),
        ),
        ("snapshot", changed(|o| o.cluster_size = 4096, RawImage::add_snapshot)),
        (
            "snapshot 512, compressed",
            changed(
                |o| o.cluster_size = 512,
                |image| {
                    image.compress(4);
                    image.add_snapshot();
                },
            ),
        ),
        ("bitmaps", changed(|o| o.cluster_size = 4096, RawImage::add_bitmaps)),
    ]
}

fn changed(options: impl Fn(&mut CreateOptions), change: impl Fn(&mut RawImage)) -> Vec<u8> {
    let mut image = RawImage(image(options));
    change(&mut image);
    image.0
}

/// The blocks that a guest can read; none if the image does not open.
pub(crate) fn readable(bytes: &[u8]) -> Blocks {
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
pub(crate) fn is_header(block: &[u8]) -> bool {
    block.windows(4).any(|four| four == b"QFI\xfb")
}

pub(crate) fn repaired(bytes: &[u8], what: Repair) -> (Vec<u8>, Option<CheckReport>) {
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

/// What a guest can read of the disk, and of a snapshot of it.
fn all_readable(bytes: &[u8]) -> Blocks {
    let image = RawImage(bytes.to_vec());
    let of_snapshot = image.snapshot().map(|entry| readable(&image.as_of_snapshot(entry)));
    let mut all = readable(bytes);
    all.resize(all.len().max(READ_BLOCKS), None);
    all.extend(of_snapshot.into_iter().flatten());
    all
}

/// The blocks that could be read in `before` and read differently in `after`.
fn lost(before: &[Option<Vec<u8>>], after: &[Option<Vec<u8>>]) -> Vec<usize> {
    let differs = |(at, was): (usize, &Option<Vec<u8>>)| {
        let block = was.as_ref().filter(|block| !is_header(block))?;
        (after.get(at).and_then(Option::as_ref) != Some(block)).then_some(at)
    };
    before.iter().enumerate().filter_map(differs).collect()
}

/// Writes to all of the disk that has no place, if the image can be written; then what can be read, but
/// there.
fn filled(bytes: &[u8]) -> Option<(Vec<u8>, Blocks)> {
    let storage = Arc::new(MemoryStorage::with_contents(bytes));
    let disk = OpenOptions::new().writable(true).open(storage.clone()).ok()?;
    let mut free = Vec::new();
    let range = ByteRange::new(0, disk.len().min(2 * SIZE));
    disk.extents(range, &mut |extent| {
        if extent.kind == ExtentKind::Unallocated {
            free.push(extent.range);
        }
        Visit::Continue(())
    })
    .ok()?;
    for range in &free {
        disk.write_at(&vec![0xab; range.len() as usize], range.start(), WriteFlags::NONE).ok()?;
    }
    disk.flush().ok()?;
    drop(disk);
    let bytes = storage.to_vec();
    let mut blocks = all_readable(&bytes);
    for (block, start) in blocks.iter_mut().zip((0..).step_by(BLOCK)).take(READ_BLOCKS) {
        let block_range = ByteRange::at(start, BLOCK as u64);
        if free.iter().any(|range| range.overlaps(block_range)) {
            *block = None;
        }
    }
    Some((bytes, blocks))
}

/// Nothing that could be read is lost once what is free has been written anew. A repair of leaks raises no
/// refcounts: what was lost without it may be lost.
fn keeps_once_filled(before: &[Option<Vec<u8>>], damaged: &[u8], after: &[u8], mode: Repair, what: &str) {
    let overwritten = |bytes: &[u8]| RawImage(bytes.to_vec()).free_overwritten();
    let gone = lost(before, &all_readable(&overwritten(after)));
    if mode == Repair::Leaks {
        let without = lost(before, &all_readable(&overwritten(damaged)));
        assert!(gone.iter().all(|at| without.contains(at)), "{what}: freed: {gone:?}, not {without:?}");
        return;
    }
    assert!(gone.is_empty(), "{what}: the blocks {gone:?} are lost");
    let Some((filled, blocks)) = filled(after) else { return };
    let written: Vec<_> = blocks.iter().map(Option::is_none).collect();
    let gone: Vec<_> = lost(before, &blocks).into_iter().filter(|at| !written[*at]).collect();
    assert!(gone.is_empty(), "{what}: the blocks {gone:?} are lost once the disk is full");
    // What an entry maps past the end of the file is not kept free.
    let is_sound = harmful(after) > 0 || harmful(&filled) == 0;
    assert!(is_sound, "{what}: it is corrupt once the disk is full");
}

/// Findings that are corruptions. An entry is left without the COPIED flag when the other one of its cluster
/// is written elsewhere.
fn harmful(bytes: &[u8]) -> u64 {
    struct Harmful(u64);
    impl CheckObserver for Harmful {
        fn found(&mut self, finding: &Finding, times: u64) {
            let is_harmless = matches!(finding, Finding::CopiedWrong { copied: false, refcount: 1, .. });
            if finding.severity() == Severity::Corruption && !is_harmless {
                self.0 += times;
            }
        }
    }
    let mut harmful = Harmful(0);
    check(&MemoryStorage::with_contents(bytes), &mut harmful).unwrap();
    harmful.0
}

/// Changes of the snapshot's entry and tables.
fn snapshot_mutations(bytes: &[u8]) -> Vec<Mutation> {
    let image = RawImage(bytes.to_vec());
    let Some(entry) = image.snapshot() else { return Vec::new() };
    let (l1, end) = (image.get(entry), image.len().next_multiple_of(image.cluster()));
    let l2 = image.get(l1) & OFFSET;
    let mut places = vec![entry, entry + 8, entry + 12, entry + 36, l1];
    places.extend((l2..l2 + image.cluster()).step_by(8).filter(|at| image.get(*at) != 0).take(5));
    let mut all = Vec::new();
    for at in places {
        let was = image.get(at);
        let values = [
            0,
            was ^ 0x200,
            was ^ 1 << 57,
            was ^ 2,
            was ^ COPIED,
            was ^ 1 << 62,
            was << 1,
            end,
            1 << 55,
            l1,
            l2,
        ];
        for value in values.into_iter().filter(|value| *value != was) {
            let label = format!("snapshot at {at:#x}: {was:#x} -> {value:#x}");
            let (old, new) = (was.to_be_bytes().to_vec(), value.to_be_bytes().to_vec());
            all.push(Mutation { label, offset: at as usize, old, new });
        }
    }
    all
}

#[test]
fn no_mutant_loses_what_could_be_read() {
    for (name, bytes) in images() {
        for mutation in mutations(&bytes).into_iter().chain(snapshot_mutations(&bytes)) {
            let what = format!("{name}: {}", mutation.label);
            let mut damaged = bytes.clone();
            let end = mutation.offset + mutation.new.len();
            damaged[mutation.offset..end].copy_from_slice(&mutation.new);
            let before = all_readable(&damaged);
            let storage = MemoryStorage::with_contents(&damaged);
            let first = check(&storage, &mut ()).ok();
            assert_eq!(storage.to_vec(), damaged, "{what}: a check writes nothing");
            for mode in [Repair::Leaks, Repair::All] {
                let (after, report) = repaired(&damaged, mode);
                assert_eq!(report.is_some(), first.is_some(), "{what}");
                let gone = lost(&before, &all_readable(&after));
                assert!(gone.is_empty(), "{what}, {mode:?}: the blocks {gone:?} read differently");
                keeps_once_filled(&before, &damaged, &after, mode, &format!("{what}, {mode:?}"));
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
