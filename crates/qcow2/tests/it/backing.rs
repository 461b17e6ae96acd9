//! The backing file's name and device change while the image is open: what the header keeps, what a crash
//! leaves.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use blockmirror_block::testing::{FaultDisk, Faults, MemoryDisk, MemoryStorage, OpKind, RecordingStorage};
use blockmirror_block::{BlockDevice, ByteRange, Storage, WriteFlags, ZeroFlags};
use blockmirror_file::FileOptions;
use blockmirror_qcow2::{CreateOptions, Header, OpenOptions, Qcow2, Version, check};
use blockmirror_testing::qemu::have;

const NAMES: [(Option<&str>, Option<&str>); 6] = [
    (Some("base.qcow2"), Some("qcow2")),
    (None, None),
    (Some("a"), None),
    (Some("folder/some-other-base.raw"), Some("raw")),
    (Some("a"), Some("raw")),
    (Some("base.qcow2"), Some("qcow2")),
];

fn image(version: Version, cluster: u64, first: (Option<&str>, Option<&str>)) -> Vec<u8> {
    let mut options = CreateOptions::new(1 << 20);
    options.version = version;
    options.cluster_size = cluster;
    options.backing_file = first.0.map(|n| n.as_bytes().to_vec());
    options.backing_format = first.1.map(str::to_owned);
    let storage = MemoryStorage::new();
    options.create(&storage, None).unwrap();
    storage.to_vec()
}

fn named(header: &Header) -> (Option<String>, Option<String>) {
    let backing = header.backing.as_ref();
    (backing.map(|b| b.name.to_string()), backing.and_then(|b| b.format.clone()))
}

fn owned((name, format): (Option<&str>, Option<&str>)) -> (Option<String>, Option<String>) {
    (name.map(str::to_owned), format.map(str::to_owned))
}

fn set(disk: &Qcow2, (name, format): (Option<&str>, Option<&str>)) {
    disk.set_backing_file(name.map(str::as_bytes), format).unwrap();
}

/// An overlay longer than what it stands on, and then on something longer: what was zeroed past the end of
/// the first stays zero, what was discarded reads as it did, and what was left alone shows the new layer.
#[test]
fn zeros_past_the_end_of_a_backing_device_are_the_images_own() {
    const K: u64 = 1 << 10;
    let disk = |len: u64, byte| Arc::new(MemoryDisk::with_contents(&vec![byte; len as usize]));
    for (version, extended) in [(Version::V2, false), (Version::V3, false), (Version::V3, true)] {
        let storage = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new(1 << 20);
        options.version = version;
        options.extended_l2 = extended;
        options.backing_file = Some(b"below".to_vec());
        options.create(&*storage, None).unwrap();
        let image =
            OpenOptions::new().writable(true).backing(disk(128 * K, 0xaa)).open(storage.clone()).unwrap();
        // Whole clusters, parts of them, and a range that begins before the end of the backing device.
        let zeroed = [(192 * K, 64 * K), (256 * K + 100, 5000), (100 * K, 64 * K), (960 * K, 64 * K)];
        for (n, (at, len)) in zeroed.iter().enumerate() {
            let flags = if n % 2 == 0 { ZeroFlags::MAY_UNMAP } else { ZeroFlags::NONE };
            image.write_zeroes(ByteRange::at(*at, *len), flags).unwrap();
        }
        image.write_at(&[1; 64 << 10], 512 * K, WriteFlags::NONE).unwrap();
        image.discard(ByteRange::at(512 * K, 64 * K)).unwrap();
        image.write_at(&[2; 1000], 640 * K + 100, WriteFlags::NONE).unwrap();
        let read = |image: &Qcow2| {
            let mut all = vec![0; 1 << 20];
            image.read_at(&mut all, 0).unwrap();
            all
        };
        let before = read(&image);
        image.replace_backing(Some(disk(1 << 20, 0xbb)));
        let after = read(&image);
        let mut own = zeroed.to_vec();
        // Around a small write lies what the guest saw when it was made.
        own.extend([(512 * K, 64 * K), (640 * K, 2048)]);
        for (at, len) in own {
            let span = at as usize..(at + len) as usize;
            let differs = before[span.clone()].iter().zip(&after[span]).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{version:?}, extended {extended}: {len} bytes at {at}");
        }
        assert_eq!(after[800 << 10], 0xbb, "{version:?}: untouched");
    }
}

/// What lies below a discarded cluster does not show any more, as with QEMU, where the format has a mark for
/// that; and nothing is allocated for it.
#[test]
fn a_discard_hides_what_lies_below() {
    for (version, shown) in [(Version::V2, 0xaa), (Version::V3, 0)] {
        let storage = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new(1 << 20);
        options.version = version;
        options.backing_file = Some(b"below".to_vec());
        options.create(&*storage, None).unwrap();
        let below = Arc::new(MemoryDisk::with_contents(&vec![0xaa; 1 << 20]));
        let disk = OpenOptions::new().writable(true).backing(below).open(storage.clone()).unwrap();
        // Parts of clusters stay.
        disk.discard(ByteRange::new(1000, (300 << 10) + 5)).unwrap();
        disk.flush().unwrap();
        let mut found = vec![0; 1 << 20];
        disk.read_at(&mut found, 0).unwrap();
        for (at, byte) in [(0, 0xaa), ((64 << 10) - 1, 0xaa), (64 << 10, shown), ((256 << 10) - 1, shown)] {
            assert_eq!(found[at], byte, "{version:?} at {at}");
        }
        assert_eq!(found[256 << 10], 0xaa, "{version:?}");
        let report = check(&*storage, &mut ()).unwrap();
        assert_eq!((report.allocated_clusters, report.corruptions, report.leaks), (0, 0, 0), "{version:?}");
    }
}

/// From each name to each: whatever a crash leaves names one of the two, and nothing else of the header is
/// lost at the end.
#[test]
fn a_crash_leaves_the_old_name_or_the_new_one() {
    let long = "n".repeat(1023);
    let mut names = NAMES.to_vec();
    names.push((Some(&long), Some("raw")));
    let mut points = 0;
    for version in [Version::V2, Version::V3] {
        for cluster in [512, 4096, 65536] {
            for from in &names {
                for to in &names {
                    if cluster == 512 && (from.0 == Some(&long) || to.0 == Some(&long)) {
                        continue;
                    }
                    let before = image(version, cluster, *from);
                    let recording = Arc::new(RecordingStorage::with_contents(&before));
                    let disk = OpenOptions::new().writable(true).open(recording.clone()).unwrap();
                    set(&disk, *to);
                    assert_eq!(named(&disk.header()), owned(*to));
                    for point in recording.crash_points() {
                        points += 1;
                        let header = Header::read(&point.storage()).unwrap();
                        let found = named(&header);
                        assert!(
                            found == owned(*from) || found == owned(*to),
                            "{version:?} {cluster}: {from:?} to {to:?}: {found:?} at {point:?}"
                        );
                    }
                    let (old, new) = (Header::parse(&before).unwrap(), Header::read(&*recording).unwrap());
                    assert_eq!(named(&new), owned(*to));
                    let rest = |header: &Header| {
                        let mut rest = header.clone();
                        rest.backing = None;
                        rest
                    };
                    if cluster > 512 {
                        assert_eq!(rest(&old), rest(&new), "{version:?} {cluster}: {from:?} to {to:?}");
                    }
                }
            }
        }
    }
    assert!(points > 1000, "only {points} points");
}

/// Where the cluster is small the names of features give way to the backing file's; where even that is not
/// enough, it is refused.
#[test]
fn a_name_that_does_not_fit_is_refused() {
    let storage = Arc::new(MemoryStorage::new());
    storage.write_at(&image(Version::V3, 512, (None, None)), 0).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    let before = storage.to_vec();
    let refused = disk.set_backing_file(Some(&[b'n'; 500]), None).unwrap_err();
    assert_eq!(refused.to_string(), "option backing_file: the name does not fit into a cluster of 512 bytes");
    assert!(disk.set_backing_file(Some(b""), None).is_err());
    assert!(disk.set_backing_file(Some(b"a\0b"), None).is_err());
    assert!(disk.set_backing_file(Some(b"a"), Some("no format")).is_err());
    assert!(disk.set_backing_file(None, Some("raw")).is_err());
    assert!(disk.set_backing_file(Some(&[b'n'; 1024]), None).is_err());
    assert_eq!(storage.to_vec(), before);
    disk.set_backing_file(Some(&[b'n'; 300]), Some("raw")).unwrap();
    assert_eq!(Header::read(&*storage).unwrap().backing.as_ref().unwrap().name.as_bytes().len(), 300);
}

#[test]
fn what_shows_through_follows_the_device_and_not_the_name() {
    let storage = Arc::new(MemoryStorage::new());
    storage.write_at(&image(Version::V3, 65536, NAMES[0]), 0).unwrap();
    let layer = |byte| -> Arc<dyn BlockDevice> { Arc::new(MemoryDisk::with_contents(&vec![byte; 1 << 20])) };
    let disk = OpenOptions::new().writable(true).backing(layer(1)).open(storage).unwrap();
    disk.write_at(&[9; 100], 0, WriteFlags::NONE).unwrap();
    let read = || {
        let mut found = [0; 2];
        disk.read_at(&mut found[..1], 99).unwrap();
        disk.read_at(&mut found[1..], 1 << 19).unwrap();
        found
    };
    assert_eq!(read(), [9, 1]);
    let old = disk.replace_backing(Some(layer(2)));
    assert_eq!(old.unwrap().len(), 1 << 20);
    assert_eq!(read(), [9, 2]);
    disk.set_backing_file(None, None).unwrap();
    assert_eq!(read(), [9, 2]);
    disk.replace_backing(None);
    assert_eq!(read(), [9, 0]);
}

/// QEMU reads what we wrote into images it made, and its own check is content.
#[test]
fn qemu_reads_the_names() {
    if !have("backing", &["qemu-img"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for options in [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=4k,lazy_refcounts=on",
        "extended_l2=on,compression_type=zstd",
    ] {
        for from in NAMES {
            let mut create = vec!["create", "-q", "-u", "-f", "qcow2", "-o", options];
            if let (Some(name), Some(format)) = from {
                create.extend(["-b", name, "-F", format]);
            }
            create.extend(["image", "1M"]);
            crate::qemu::img(dir.path(), &create).unwrap();
            for to in NAMES {
                let file = FileOptions::new().writable(true).open(dir.path().join("image")).unwrap();
                set(&OpenOptions::new().writable(true).open(Arc::new(file)).unwrap(), to);
                let info = crate::qemu::info(dir.path(), "image");
                assert_eq!(info["backing-filename"].as_str(), to.0, "{options}: {from:?} to {to:?}");
                assert_eq!(info["backing-filename-format"].as_str(), to.1, "{options}: {from:?} to {to:?}");
            }
            let file = FileOptions::new().writable(true).open(dir.path().join("image")).unwrap();
            set(&OpenOptions::new().writable(true).open(Arc::new(file)).unwrap(), (None, None));
            crate::qemu::assert_clean(dir.path(), "image", options);
        }
    }
}

/// An image that a job fills stands on a layer that the guest reads too: cancelling what the image has in
/// flight made the guest's reads fail.
#[test]
fn what_a_backing_device_has_in_flight_is_not_the_images() {
    let faults = Faults::new();
    let below = Arc::new(FaultDisk::new(Arc::new(MemoryDisk::new(1 << 20)), faults.clone()));
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(1 << 20);
    options.backing_file = Some(b"below".to_vec());
    options.create(&*storage, None).unwrap();
    let image = OpenOptions::new().writable(true).backing(Arc::clone(&below) as _).open(storage).unwrap();
    let gate = faults.hold(OpKind::Read, None);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| below.read_at(&mut [0; 512], 0));
        gate.wait_held(1);
        image.cancel_in_flight();
        gate.open();
        guest.join().unwrap().unwrap();
    });
}
