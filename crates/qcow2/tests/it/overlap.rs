//! A guest cluster that is mapped to metadata: which structure a write would have hit, what is checked
//! against by choice, and the same verdict as QEMU's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::process::Command;
use std::sync::Arc;

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{Damage, Header, MetadataKind, OpenOptions, OverlapChecks};
use blockmirror_testing::qemu::have;

use crate::check::image;
use crate::raw_image::{COPIED, OFFSET, RawImage};

const CLUSTER: u64 = 4096;

/// An image, and where each of its structures lies that an entry can name.
fn places() -> (RawImage, Vec<(MetadataKind, u64)>) {
    let image = RawImage(image(|o| o.cluster_size = CLUSTER));
    let places = vec![
        (MetadataKind::ActiveL1, image.get(40)),
        (MetadataKind::ActiveL2, image.get(image.l1_at(0)) & OFFSET),
        (MetadataKind::RefcountTable, image.refcount_table()),
        (MetadataKind::RefcountBlock, image.get(image.refcount_table())),
    ];
    (image, places)
}

/// The same image, whose guest cluster 2 is mapped to `host`.
fn mapped_to(image: &RawImage, host: u64) -> RawImage {
    let mut image = image.clone();
    let entry = image.l2_at(2);
    image.set(entry, host | COPIED);
    image
}

fn open(storage: &Arc<MemoryStorage>, checks: OverlapChecks) -> blockmirror_qcow2::Qcow2 {
    OpenOptions::new().writable(true).overlap_checks(checks).open(storage.clone()).unwrap()
}

#[test]
fn a_write_says_what_it_would_have_hit() {
    let (image, places) = places();
    for (kind, host) in places {
        let damaged = mapped_to(&image, host);
        let storage = Arc::new(MemoryStorage::with_contents(&damaged.0));
        let disk = open(&storage, OverlapChecks::default());
        // Other clusters can be written as long as the damage has not been met.
        disk.write_at(&[1; 100], 3 * CLUSTER, WriteFlags::FUA).unwrap();
        let error = disk.write_at(&[1; 100], 2 * CLUSTER + 8, WriteFlags::NONE).unwrap_err();
        assert_eq!(Damage::of(&error), Some(Damage::Overlap(kind)));
        assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(host)));
        assert!(error.to_string().contains(&kind.to_string()), "{error}");
        assert!(Header::read(&*storage).unwrap().is_corrupt(), "{kind}");
        // Nothing is written any more, here or by who opens it next; it can be read.
        let next = disk.write_at(&[1; 100], 3 * CLUSTER, WriteFlags::NONE).unwrap_err();
        assert_eq!(next.kind(), ErrorKind::Poisoned, "{next}");
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Poisoned);
        assert!(OpenOptions::new().writable(true).open(storage.clone()).is_err());
        let disk = OpenOptions::new().open(storage).unwrap();
        let mut found = [0; 100];
        disk.read_at(&mut found, 3 * CLUSTER).unwrap();
        assert_eq!(found, [1; 100]);
    }
}

/// Zeroing and discarding drop the entry: the structure stays as it is, also when its cluster would be given
/// back.
#[test]
fn an_entry_that_is_dropped_frees_no_metadata() {
    let (image, places) = places();
    for (kind, host) in places {
        for discard in [false, true] {
            let damaged = mapped_to(&image, host);
            let storage = Arc::new(MemoryStorage::with_contents(&damaged.0));
            let disk = open(&storage, OverlapChecks::default());
            let range = ByteRange::at(2 * CLUSTER, CLUSTER);
            match discard {
                true => disk.discard(range).unwrap(),
                false => disk.write_zeroes(range, ZeroFlags::MAY_UNMAP).unwrap(),
            }
            disk.write_at(&[3; 60_000], 180_000, WriteFlags::FUA).unwrap();
            let after = RawImage(storage.to_vec());
            assert_eq!(after.refcount(host / CLUSTER), Some(1), "{kind} {discard}");
            drop(disk);
            let report = blockmirror_qcow2::check(&*storage, &mut ()).unwrap();
            assert_eq!(report.corruptions, 0, "{kind} {discard}: {report:?}");
        }
    }
}

#[test]
fn only_chosen_kinds_are_checked_against() {
    let (image, places) = places();
    let sets = [
        OverlapChecks::NONE,
        OverlapChecks::CONSTANT,
        OverlapChecks::CACHED,
        OverlapChecks::ALL,
        OverlapChecks::ALL.with(MetadataKind::ActiveL1, false),
        OverlapChecks::NONE.with(MetadataKind::RefcountBlock, true),
    ];
    for (kind, host) in places {
        for checks in sets {
            let damaged = mapped_to(&image, host);
            let storage = Arc::new(MemoryStorage::with_contents(&damaged.0));
            let disk = open(&storage, checks);
            // At the end of the cluster, where the structure has nothing.
            let written = disk.write_at(&[0; 8], 3 * CLUSTER - 8, WriteFlags::NONE);
            assert_eq!(written.is_err(), checks.contains(kind), "{kind} {checks:?}: {written:?}");
        }
    }
}

/// Beside `qemu-io`: it fails as well, and both images are marked.
#[test]
fn the_verdict_is_qemus() {
    if !have("the_verdict_is_qemus", &["qemu-io", "qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let (image, places) = places();
    for (kind, host) in places {
        let damaged = mapped_to(&image, host);
        std::fs::write(&path, &damaged.0).unwrap();
        let io =
            Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 8k 512"]).arg(&path).output().unwrap();
        let theirs = Header::parse(&std::fs::read(&path).unwrap()).unwrap().is_corrupt();
        assert!(theirs && !io.status.success(), "{kind}: {io:?}");
        let storage = Arc::new(MemoryStorage::with_contents(&damaged.0));
        let written =
            open(&storage, OverlapChecks::default()).write_at(&[0; 512], 2 * CLUSTER, WriteFlags::NONE);
        assert!(written.is_err());
        assert_eq!(Header::read(&*storage).unwrap().is_corrupt(), theirs, "{kind}");
    }
}
