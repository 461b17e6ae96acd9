//! Amended images: what a guest reads stays, checks find nothing, and a change that was cut short or has
//! failed leaves the old image or the new one, and can be repeated.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use std::ops::ControlFlow;
use std::sync::Arc;

use blockmirror_block::testing::{
    Done, Fault, FaultStorage, Faults, MemoryStorage, OpKind, RecordingStorage,
};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{
    AmendOptions, CreateOptions, Error, Header, NewSnapshot, OpenOptions, Version, amend, check,
};

use crate::check::readable;
use crate::common::{backing_disk, qemu_check_finds_nothing};
use crate::raw_image::RawImage;

const SIZE: u64 = 64 << 10;

/// An image with data, zeros, and zeros that keep a place; how it is opened.
struct Sample {
    bytes: Vec<u8>,
    open: OpenOptions,
}

impl Sample {
    fn new(version: Version, cluster_size: u64, refcount_bits: u32, backed: bool) -> Self {
        let mut options = CreateOptions::new(SIZE);
        (options.version, options.cluster_size) = (version, cluster_size);
        options.refcount_bits = refcount_bits;
        let mut open = OpenOptions::new();
        if backed {
            options.backing_file = Some(b"base.raw".to_vec());
            options.backing_format = Some("raw".to_owned());
            open = open.backing(backing_disk(SIZE));
        }
        let storage = Arc::new(MemoryStorage::new());
        options.create(&*storage, None).unwrap();
        let disk = open.clone().writable(true).open(storage.clone()).unwrap();
        disk.write_at(&[0x11; 20_000], 1000, WriteFlags::NONE).unwrap();
        disk.write_at(&[0x22; 9000], SIZE - 9000, WriteFlags::NONE).unwrap();
        disk.write_zeroes(ByteRange::at(4096, 8192), ZeroFlags::NONE).unwrap();
        disk.write_zeroes(ByteRange::at(24 << 10, 9000), ZeroFlags::MAY_UNMAP).unwrap();
        disk.flush().unwrap();
        drop(disk);
        Self { bytes: storage.to_vec(), open }
    }

    fn read(&self, storage: Arc<dyn Storage>) -> Vec<u8> {
        let disk = self.open.clone().open(storage).unwrap();
        let mut bytes = vec![0; SIZE.min(disk.len()) as usize];
        disk.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn guest(&self) -> Vec<u8> {
        self.read(Arc::new(MemoryStorage::with_contents(&self.bytes)))
    }

    fn amend(&self, storage: Arc<dyn Storage>, options: &AmendOptions) -> Result<(), Error> {
        amend(storage, &self.open, options, &mut |_, _| ControlFlow::Continue(()))
    }
}

fn to_version(version: Version) -> AmendOptions {
    let mut options = AmendOptions::default();
    options.version = Some(version);
    options
}

fn to_width(bits: u32) -> AmendOptions {
    let mut options = AmendOptions::default();
    options.refcount_bits = Some(bits);
    options
}

/// All that can be changed at once, there and back.
fn changes(version: Version) -> Vec<AmendOptions> {
    let mut all = to_width(64);
    (all.version, all.lazy_refcounts, all.size) = (Some(Version::V3), Some(true), Some(2 * SIZE));
    let mut back = to_version(Version::V2);
    (back.refcount_bits, back.lazy_refcounts) = (Some(16), Some(false));
    match version {
        Version::V2 => vec![to_version(Version::V3), all],
        _ => vec![to_version(Version::V2), to_width(1), to_width(32), all, back],
    }
}

fn assert_sound(storage: &MemoryStorage, what: &str, leaks: u64) {
    let report = check(storage, &mut ()).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {report:?}");
    assert!(report.leaks <= leaks, "{what}: {report:?}");
}

#[test]
fn every_width_becomes_every_other() {
    for cluster_size in [512, 4096, 65536] {
        for from in [1, 2, 4, 8, 16, 32, 64] {
            let sample = Sample::new(Version::V3, cluster_size, from, false);
            let guest = sample.guest();
            for to in [1, 2, 4, 8, 16, 32, 64] {
                let what = format!("clusters {cluster_size}, {from} to {to} bits");
                let storage = Arc::new(MemoryStorage::with_contents(&sample.bytes));
                sample.amend(storage.clone(), &to_width(to)).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(Header::read(&*storage).unwrap().refcount_bits(), to, "{what}");
                assert_sound(&storage, &what, 0);
                assert!(sample.read(storage.clone()) == guest, "{what}");
                if to == 8 || from == 64 {
                    qemu_check_finds_nothing(&storage.to_vec(), &what);
                }
                // Free clusters are known as such.
                let disk = sample.open.clone().writable(true).open(storage.clone()).unwrap();
                disk.write_at(&[0x44; SIZE as usize], 0, WriteFlags::FUA).unwrap();
                drop(disk);
                assert_sound(&storage, &what, 0);
            }
        }
    }
}

#[test]
fn the_width_changes_where_the_storage_cannot_grow() {
    let sample = Sample::new(Version::V3, 512, 16, false);
    let room = |bytes: u64| {
        let storage = Arc::new(MemoryStorage::fixed(sample.bytes.len() as u64 + bytes));
        storage.write_at(&sample.bytes, 0).unwrap();
        storage
    };
    let storage = room(64 << 10);
    sample.amend(storage.clone(), &to_width(64)).unwrap();
    assert_sound(&storage, "room", 0);
    assert!(sample.read(storage) == sample.guest());
    let storage = room(0);
    let before = storage.to_vec();
    let error = sample.amend(storage.clone(), &to_width(64)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert!(storage.to_vec() == before);
}

/// The L1 table takes two clusters, and its refcounts say that both are free.
#[test]
fn tables_without_refcounts_are_not_overwritten() {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(4 << 20);
    options.cluster_size = 512;
    options.create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    disk.write_at(&[0x11; 2000], 1000, WriteFlags::FUA).unwrap();
    drop(disk);
    let mut image = RawImage(storage.to_vec());
    let (l1, block) = (image.get(40) / 512, image.get(image.refcount_table()));
    image.set_len(block + l1 * 2, 0, 4);
    for fixed in [true, false] {
        let storage = match fixed {
            true => Arc::new(MemoryStorage::fixed(image.len() + 4096)),
            false => Arc::new(MemoryStorage::new()),
        };
        storage.write_at(&image.0, 0).unwrap();
        let done =
            amend(storage.clone(), &OpenOptions::new(), &to_width(1), &mut |_, _| ControlFlow::Continue(()));
        done.unwrap();
        let disk = OpenOptions::new().open(storage).unwrap();
        let mut found = [0; 2000];
        disk.read_at(&mut found, 1000).unwrap();
        assert!(found == [0x11; 2000], "fixed {fixed}: the L1 table was overwritten");
    }
}

#[test]
fn versions_change_there_and_back() {
    for (cluster_size, backed) in [(512, false), (1024, true), (2048, true), (4096, true), (65536, false)] {
        let what = format!("clusters {cluster_size}, backed {backed}");
        let sample = Sample::new(Version::V3, cluster_size, 16, backed);
        let guest = sample.guest();
        let storage = Arc::new(MemoryStorage::with_contents(&sample.bytes));
        for version in [Version::V2, Version::V3, Version::V2] {
            sample.amend(storage.clone(), &to_version(version)).unwrap_or_else(|e| panic!("{what}: {e}"));
            let header = Header::read(&*storage).unwrap();
            assert_eq!(header.version, if version == Version::V2 { 2 } else { 3 });
            assert_eq!(header.backing.is_some(), backed);
            assert_sound(&storage, &what, 0);
            assert!(sample.read(storage.clone()) == guest, "{what}");
            if !backed {
                qemu_check_finds_nothing(&storage.to_vec(), &what);
            }
        }
    }
}

/// After each crash the image is sound and reads the same, and the same amendment comes to its end.
#[test]
fn a_crash_leaves_the_old_image_or_the_new_one() {
    let mut points = 0;
    for (version, cluster_size, backed) in [
        (Version::V3, 512, false),
        (Version::V3, 4096, true),
        (Version::V2, 512, true),
        (Version::V2, 65536, false),
    ] {
        let sample = Sample::new(version, cluster_size, 16, backed);
        let guest = sample.guest();
        for options in changes(version) {
            let what = format!("{version:?} {cluster_size} {options:?}");
            let recording = Arc::new(RecordingStorage::with_contents(&sample.bytes));
            sample.amend(recording.clone(), &options).unwrap_or_else(|e| panic!("{what}: {e}"));
            for (nth, point) in recording.crash_points().enumerate() {
                points += 1;
                let storage = Arc::new(point.storage());
                assert_sound(&storage, &format!("{what} {point:?}"), u64::MAX);
                assert!(sample.read(storage.clone()) == guest, "{what} {point:?}");
                if nth % 16 == 0 {
                    sample.amend(storage.clone(), &options).unwrap_or_else(|e| panic!("{what} {point}: {e}"));
                    assert!(sample.read(storage.clone()) == guest, "{what} {point:?}");
                    assert_sound(&storage, &format!("again {what} {point:?}"), u64::MAX);
                }
            }
        }
    }
    assert!(points > 300, "only {points} points");
}

/// Each operation on the storage fails in turn: a typed error, a sound image, and the amendment goes through
/// when it is repeated.
#[test]
fn a_failure_leaves_an_image_that_can_be_amended() {
    for (kind, done) in [
        (ErrorKind::Io, Done::Nothing),
        (ErrorKind::Io, Done::Half),
        (ErrorKind::NoSpace, Done::Nothing),
        (ErrorKind::Io, Done::Everything),
    ] {
        let sample = Sample::new(Version::V3, 512, 16, true);
        let guest = sample.guest();
        for options in changes(Version::V3) {
            for n in 0.. {
                let what = format!("{kind:?} {done:?} n={n} {options:?}");
                let inner = Arc::new(MemoryStorage::with_contents(&sample.bytes));
                let faults = Faults::new();
                let storage = Arc::new(FaultStorage::new(inner.clone(), faults.clone()));
                faults.inject(Fault::on(OpKind::Any).after(n).with(kind).having_done(done));
                let amended = sample.amend(storage, &options);
                if faults.failed() == 0 {
                    amended.unwrap();
                    break;
                }
                if let Err(error) = amended {
                    let expected = [ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::Poisoned];
                    assert!(expected.contains(&error.kind()), "{what}: {error:?}");
                }
                assert_sound(&inner, &what, u64::MAX);
                assert!(sample.read(inner.clone()) == guest, "{what}");
                sample.amend(inner.clone(), &options).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert!(sample.read(inner) == guest, "{what}");
            }
        }
    }
}

type Change = dyn Fn(&mut AmendOptions);

/// What an option cannot become is refused before anything changes.
#[test]
fn refusals_change_nothing() {
    let sample = Sample::new(Version::V3, 4096, 8, true);
    let with = |change: &dyn Fn(&mut AmendOptions)| {
        let mut options = AmendOptions::default();
        // It comes first, were it not for the refusal.
        options.lazy_refcounts = Some(true);
        change(&mut options);
        options
    };
    let cases: [(&Change, &str); 12] = [
        (&|o| o.version = Some(Version::V2), "option lazy_refcounts: it needs compat=1.1, not 0.10"),
        (
            &|o| (o.version, o.lazy_refcounts) = (Some(Version::V2), None),
            "option compat: 0.10 needs refcount_bits=16",
        ),
        (
            &|o| (o.version, o.lazy_refcounts, o.refcount_bits) = (Some(Version::V2), None, Some(32)),
            "option refcount_bits: any but 16 needs compat=1.1, not 0.10",
        ),
        (&|o| o.refcount_bits = Some(0), "option refcount_bits: 1, 2, 4, 8, 16, 32 or 64 is allowed"),
        (&|o| o.refcount_bits = Some(7), "option refcount_bits: 1, 2, 4, 8, 16, 32 or 64 is allowed"),
        (&|o| o.refcount_bits = Some(128), "option refcount_bits: 1, 2, 4, 8, 16, 32 or 64 is allowed"),
        (&|o| o.size = Some(1000), "option size: it must be a multiple of 512"),
        (&|o| o.data_file = Some(b"d".to_vec()), "option data_file: the image has no external data file"),
        (
            &|o| o.data_file_raw = Some(true),
            "option data_file_raw: it cannot be turned on in an existing image",
        ),
        (
            &|o| o.backing_file = Some(b"other".to_vec()),
            "option backing_file: the backing file cannot be amended; a rebase changes it",
        ),
        (
            &|o| o.backing_file = Some(b"base.raw".to_vec()),
            "option backing_file: the backing file cannot be amended; a rebase changes it",
        ),
        (
            &|o| o.backing_format = Some("raw".to_owned()),
            "option backing_file: the backing file cannot be amended; a rebase changes it",
        ),
    ];
    for (change, message) in cases {
        let storage = Arc::new(MemoryStorage::with_contents(&sample.bytes));
        let error = sample.amend(storage.clone(), &with(change)).unwrap_err();
        assert_eq!(error.to_string(), message);
        assert!(storage.to_vec() == sample.bytes, "{message}");
    }
    // The backing file as it is.
    let storage = Arc::new(MemoryStorage::with_contents(&sample.bytes));
    let same = with(&|o| {
        o.backing_file = Some(b"base.raw".to_vec());
        o.backing_format = Some("raw".to_owned());
    });
    sample.amend(storage.clone(), &same).unwrap();
    assert!(Header::read(&*storage).unwrap().lazy_refcounts());
}

#[test]
fn features_of_version_3_are_not_lost_on_the_way_to_2() {
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = 16384;
    options.extended_l2 = true;
    let storage = Arc::new(MemoryStorage::new());
    options.create(&*storage, None).unwrap();
    let before = storage.to_vec();
    let error = amend(storage.clone(), &OpenOptions::new(), &to_version(Version::V2), &mut |_, _| {
        ControlFlow::Continue(())
    });
    assert_eq!(
        error.unwrap_err().to_string(),
        "option compat: 0.10 cannot have the incompatible features 0x10 of the image"
    );
    assert!(storage.to_vec() == before);
}

#[test]
fn a_refcount_that_does_not_fit_is_named() {
    let mut image = RawImage(Sample::new(Version::V3, 4096, 16, false).bytes);
    // Two guest clusters share one host cluster, as compressed ones may.
    image.compress(0);
    let entry = image.get(image.l2_at(0));
    let second = image.l2_at(4);
    image.set(second, entry);
    let storage = Arc::new(MemoryStorage::with_contents(&image.0));
    blockmirror_qcow2::repair(&*storage, blockmirror_qcow2::Repair::All, &mut ()).unwrap();
    let run = |bits| {
        amend(storage.clone(), &OpenOptions::new(), &to_width(bits), &mut |_, _| ControlFlow::Continue(()))
    };
    let error = run(1).unwrap_err().to_string();
    assert!(error.starts_with("option refcount_bits: the cluster at "), "{error}");
    assert!(error.ends_with("has the refcount 2, and 1 bits hold 1 at most"), "{error}");
    run(2).unwrap();
    assert_sound(&storage, "two bits", 0);
}

#[test]
fn the_data_file_gets_another_name() {
    let mut options = CreateOptions::new(SIZE);
    options.data_file = Some(b"old.raw".to_vec());
    options.data_file_raw = true;
    let (storage, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
    options.create(&*storage, Some(&*data)).unwrap();
    let open = OpenOptions::new().data_file(data);
    let mut change = AmendOptions::default();
    (change.data_file, change.data_file_raw) = (Some(vec![b'n'; 300]), Some(false));
    let recording = Arc::new(RecordingStorage::with_contents(&storage.to_vec()));
    amend(recording.clone(), &open, &change, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let of = |storage: &dyn Storage| {
        let data = Header::read(storage).unwrap().data_file.unwrap();
        (data.name.unwrap().as_bytes().to_vec(), data.raw)
    };
    assert_eq!(of(&*recording), (vec![b'n'; 300], false));
    for point in recording.crash_points() {
        let (name, raw) = of(&point.storage());
        assert!(name == b"old.raw" && raw || name == vec![b'n'; 300], "{point:?}");
    }
}

#[test]
fn what_is_cancelled_leaves_the_image_as_it_was() {
    let sample = Sample::new(Version::V3, 512, 16, false);
    let storage = Arc::new(MemoryStorage::with_contents(&sample.bytes));
    let stopped = amend(storage.clone(), &sample.open, &to_width(64), &mut |done, total| {
        assert!(done <= total);
        if done * 2 > total { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(Header::read(&*storage).unwrap().refcount_bits(), 16);
    assert!(sample.read(storage) == sample.guest());
}

/// An image with an internal snapshot: what both show stays, and what its entry cannot say is refused.
#[test]
fn snapshots_stay() {
    let mut image = RawImage(crate::check::image(|o| o.cluster_size = 4096));
    image.add_snapshot();
    let shown = |image: &RawImage| {
        let snapshot = image.snapshot().unwrap();
        (readable(&image.0), readable(&image.as_of_snapshot(snapshot)))
    };
    let before = shown(&image);
    let storage = Arc::new(MemoryStorage::with_contents(&image.0));
    let run = |options: &AmendOptions| {
        amend(storage.clone(), &OpenOptions::new(), options, &mut |_, _| ControlFlow::Continue(()))
    };
    let error = run(&to_width(1)).unwrap_err().to_string();
    assert!(error.ends_with("with 1 nothing can be shared, and the image has snapshots"), "{error}");
    for options in [to_width(2), to_width(64), to_width(16), to_version(Version::V2), to_version(Version::V3)]
    {
        run(&options).unwrap();
        let after = RawImage(storage.to_vec());
        assert!(shown(&after) == before, "{options:?}");
        assert_sound(&storage, &format!("{options:?}"), 0);
        qemu_check_finds_nothing(&after.0, "snapshots_stay");
    }
    // Marked as zero in the table that the snapshot alone has.
    let mut marked = RawImage(storage.to_vec());
    let table = marked.get(marked.get(marked.snapshot().unwrap())) & crate::raw_image::OFFSET;
    marked.change(table, |entry| entry | 1);
    let storage = Arc::new(MemoryStorage::with_contents(&marked.0));
    let run = |options: &AmendOptions| {
        amend(storage.clone(), &OpenOptions::new(), options, &mut |_, _| ControlFlow::Continue(()))
    };
    let before = shown(&marked);
    run(&to_version(Version::V2)).unwrap();
    assert!(shown(&RawImage(storage.to_vec())) == before);
    qemu_check_finds_nothing(&storage.to_vec(), "snapshots_stay");
    run(&to_version(Version::V3)).unwrap();
    let mut longer = to_version(Version::V2);
    longer.size = Some(1 << 20);
    let error = run(&longer).unwrap_err().to_string();
    assert!(error.ends_with("\"a\", of another size than the disk"), "{error}");
}

/// An image that then could not be opened for writing any more.
#[test]
fn refcounts_of_one_bit_are_refused_with_snapshots() {
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(SIZE).create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    disk.create_snapshot(&blockmirror_qcow2::NewSnapshot::new("s")).unwrap();
    drop(disk);
    let before = storage.to_vec();
    let mut options = AmendOptions::default();
    options.refcount_bits = Some(1);
    let error = amend(storage.clone(), &OpenOptions::new(), &options, &mut |_, _| ControlFlow::Continue(()));
    assert!(matches!(error, Err(Error::Option { .. })), "{error:?}");
    assert!(before == storage.to_vec(), "something was written");
}

/// VM state may lie past the end, and no reader of it is to see what the backing file has there: after each
/// crash, too.
#[test]
fn zeros_past_the_end_stay_zeros_over_a_backing_file() {
    for cluster_size in [512, 4096] {
        let sample = Sample::new(Version::V3, cluster_size, 16, true);
        let storage = Arc::new(MemoryStorage::with_contents(&sample.bytes));
        let zeros = ByteRange::at(40 << 10, 8192);
        let disk = sample.open.clone().writable(true).open(storage.clone()).unwrap();
        // One that keeps its place, too.
        disk.write_at(&[0x33; 4096], zeros.start(), WriteFlags::NONE).unwrap();
        disk.write_zeroes(zeros, ZeroFlags::NONE).unwrap();
        drop(disk);
        let before = sample.read(storage.clone());
        let set_len = |storage: &MemoryStorage, len: u64| storage.write_at(&len.to_be_bytes(), 24).unwrap();
        set_len(&storage, 32 << 10);
        let recording = Arc::new(RecordingStorage::with_contents(&storage.to_vec()));
        sample.amend(storage.clone(), &to_version(Version::V2)).unwrap();
        sample.amend(recording.clone(), &to_version(Version::V2)).unwrap();
        assert_eq!(Header::read(&*storage).unwrap().version, 2);
        assert_sound(&storage, "zeros past the end", 0);
        set_len(&storage, SIZE);
        let after = sample.read(storage.clone());
        let differs = before.iter().zip(&after).position(|(before, after)| before != after);
        assert_eq!(differs, None, "clusters of {cluster_size}");
        assert_sound(&storage, "zeros past the end", 0);
        for point in recording.crash_points() {
            let storage = Arc::new(point.storage());
            set_len(&storage, SIZE);
            assert!(sample.read(storage.clone()) == before, "{point:?}");
            assert_sound(&storage, &format!("{point:?}"), u64::MAX);
        }
    }
}

/// Version 2 has snapshots that do not say how long the disk was, and version 3 has not: a check took them
/// for damage once the image was amended.
#[test]
fn snapshots_are_complete_in_version_3() {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(1 << 20);
    (options.version, options.cluster_size) = (Version::V2, 4096);
    options.create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    disk.write_at(&[5; 10_000], 0, WriteFlags::NONE).unwrap();
    for name in ["one", "two"] {
        disk.create_snapshot(&NewSnapshot::new(name)).unwrap();
    }
    drop(disk);
    // The first entry loses its extra data; what was behind it moves.
    let mut image = RawImage(storage.to_vec());
    let at = image.get(64);
    let extra = image.number(at + 36, 4);
    let rest = image.0[(at + 40 + extra) as usize..][..1000].to_vec();
    image.0[(at + 40) as usize..][..1000].copy_from_slice(&rest);
    image.set_len(at + 36, 0, 4);
    let recording = Arc::new(RecordingStorage::with_contents(&image.0));
    let mut to_v3 = AmendOptions::default();
    to_v3.version = Some(Version::V3);
    let mut go_on = |_, _| ControlFlow::Continue(());
    amend(recording.clone(), &OpenOptions::new(), &to_v3, &mut go_on).unwrap();
    for point in recording.crash_points() {
        let left = point.storage();
        let report = check(&left, &mut ()).unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{point:?}");
        let disk = OpenOptions::new().open(Arc::new(left)).unwrap();
        let names: Vec<_> = disk.snapshots().unwrap().into_iter().map(|found| found.name).collect();
        assert_eq!(names, ["one", "two"], "{point:?}");
    }
    let after = recording.to_vec();
    assert!(check(&MemoryStorage::with_contents(&after), &mut ()).unwrap().is_clean());
    qemu_check_finds_nothing(&after, "snapshots_are_complete_in_version_3");
    let disk = OpenOptions::new().open(Arc::new(MemoryStorage::with_contents(&after))).unwrap();
    let sizes: Vec<_> = disk.snapshots().unwrap().into_iter().map(|found| found.disk_size).collect();
    assert_eq!((disk.header().version, sizes), (3, vec![Some(1 << 20); 2]));
}
