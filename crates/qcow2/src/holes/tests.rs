//! Mapped clusters over holes: what extents say of them, and how often the storage is asked.

use std::sync::Arc;

use blockmirror_block::testing::{FaultStorage, Faults, MemoryDisk, MemoryStorage, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, Extent, ExtentKind, Storage, Visit, WriteFlags, ZeroFlags};

use crate::{CreateOptions, OpenOptions, Preallocation, Qcow2};

const CLUSTER: u64 = 65536;

fn create(size: u64, change: impl Fn(&mut CreateOptions)) -> Arc<MemoryStorage> {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(size);
    change(&mut options);
    options.create(&*storage, None).unwrap();
    storage
}

fn open(storage: &Arc<MemoryStorage>) -> Qcow2 {
    OpenOptions::new().writable(true).open(storage.clone()).unwrap()
}

/// The image opened anew over a storage that counts calls.
fn counted(storage: &Arc<MemoryStorage>) -> (Qcow2, Faults) {
    let faults = Faults::new();
    let storage = Arc::new(FaultStorage::new(storage.clone(), faults.clone()));
    (OpenOptions::new().open(storage).unwrap(), faults)
}

fn extents(disk: &Qcow2) -> Vec<Extent> {
    let mut found: Vec<Extent> = Vec::new();
    disk.extents(ByteRange::new(0, disk.len()), &mut |next| {
        match found.last_mut() {
            Some(last) if last.continues_into(&next) => {
                last.range = ByteRange::new(last.range.start(), next.range.end());
            }
            _ => found.push(next),
        }
        Visit::Continue(())
    })
    .unwrap();
    found
}

fn show(disk: &Qcow2) -> Vec<(u64, u64, ExtentKind, bool, bool)> {
    let row = |e: Extent| (e.range.start(), e.range.end(), e.kind, e.mapped_hole, e.host.is_some());
    extents(disk).into_iter().map(row).collect()
}

/// Proxmox's default: everything mapped, next to nothing written. Each mapped cluster counted as data, so
/// that a disk of 20 GiB was read to the last byte.
#[test]
fn a_preallocated_image_reads_as_zero_where_nothing_was_written() {
    let size = 20 << 30;
    let storage = create(size, |o| o.preallocation = Preallocation::Metadata);
    open(&storage).write_at(&[7; CLUSTER as usize], 5 << 30, WriteFlags::NONE).unwrap();
    let (disk, faults) = counted(&storage);
    let data = 5 << 30;
    let hole = |from, to| (from, to, ExtentKind::Zero, true, true);
    assert_eq!(
        show(&disk),
        [hole(0, data), (data, data + CLUSTER, ExtentKind::Data, false, true), hole(data + CLUSTER, size)]
    );
    // 327,680 mapped clusters.
    assert!(faults.seen(OpKind::Extents) <= 16, "{}", faults.seen(OpKind::Extents));
}

#[test]
fn scattered_data_without_holes_is_asked_about_once() {
    let storage = create(1 << 30, |o| o.cluster_size = 4096);
    let disk = open(&storage);
    let clusters: u64 = 4000;
    // Backwards in steps, so that no two neighbours of the guest are neighbours in the file.
    for i in 0..clusters {
        let cluster = (i * 1237) % clusters;
        disk.write_at(&[1; 4096], cluster * 4096, WriteFlags::NONE).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    let (disk, faults) = counted(&storage);
    assert!(extents(&disk).iter().filter(|e| e.kind == ExtentKind::Data).count() > 3000);
    assert!(faults.seen(OpKind::Extents) <= 4, "{}", faults.seen(OpKind::Extents));
    // What is known to be data is not asked about again.
    let before = faults.seen(OpKind::Extents);
    extents(&disk);
    assert!(faults.seen(OpKind::Extents) <= before + 4);
}

/// Each cluster that lay further down than those before it cost a call: about as many as the logarithm of the
/// clusters of each layer of a chain.
#[test]
fn what_lies_below_known_data_is_asked_about_with_its_surroundings() {
    let storage = create(64 << 20, |_| {});
    let disk = open(&storage);
    let clusters: u64 = 1000;
    for cluster in (0..clusters).rev() {
        disk.write_at(&[1; CLUSTER as usize], cluster * CLUSTER, WriteFlags::NONE).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    let (disk, faults) = counted(&storage);
    // The first in the file is the last on the disk.
    for cluster in 0..clusters {
        disk.extents(ByteRange::at(cluster * CLUSTER, CLUSTER), &mut |_| Visit::Continue(())).unwrap();
    }
    assert!(faults.seen(OpKind::Extents) <= 20, "{}", faults.seen(OpKind::Extents));
}

#[test]
fn scattered_holes_cost_no_call_for_each_cluster() {
    let storage = create(64 << 20, |_| {});
    let disk = open(&storage);
    for cluster in 0..1000u64 {
        disk.write_at(&[1; CLUSTER as usize], cluster * 997 % 1000 * CLUSTER, WriteFlags::NONE).unwrap();
    }
    disk.flush().unwrap();
    let hosts: Vec<_> =
        extents(&disk).iter().filter_map(|e| Some((e.range, e.host.as_ref()?.offset))).collect();
    drop(disk);
    // Every other cluster is punched out of the file below.
    let mut expected = 0;
    for (range, host) in hosts {
        for part in range.pieces(CLUSTER).filter(|part| (part.start() / CLUSTER).is_multiple_of(2)) {
            storage.discard(ByteRange::at(host + (part.start() - range.start()), CLUSTER)).unwrap();
            expected += CLUSTER;
        }
    }
    let (disk, faults) = counted(&storage);
    let found = extents(&disk);
    let holes: u64 = found.iter().filter(|e| e.mapped_hole).map(|e| e.range.len()).sum();
    assert_eq!(holes, expected);
    for extent in found.iter().filter(|e| e.mapped_hole) {
        assert!(extent.range.pieces(CLUSTER).all(|part| (part.start() / CLUSTER).is_multiple_of(2)));
    }
    assert!(faults.seen(OpKind::Extents) <= 4, "{}", faults.seen(OpKind::Extents));
}

#[test]
fn over_a_backing_file_a_hole_stays_allocated() {
    let storage = create(4 * CLUSTER, |o| o.backing_file = Some(b"base".to_vec()));
    let base = Arc::new(MemoryDisk::with_contents(&vec![9; 4 * CLUSTER as usize]));
    let open = || OpenOptions::new().writable(true).backing(base.clone()).open(storage.clone()).unwrap();
    let disk = open();
    disk.write_at(&[1; CLUSTER as usize], CLUSTER, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    let host = extents(&disk)[1].host.as_ref().unwrap().offset;
    drop(disk);
    storage.discard(ByteRange::at(host, CLUSTER)).unwrap();
    let found = extents(&open());
    assert_eq!(found.len(), 3);
    assert!(found[1].mapped_hole && found[1].in_top() && found[1].reads_as_zero());
    assert_eq!((found[1].depth, found[0].depth), (0, 1));
}

#[test]
fn an_external_data_file_is_asked_and_not_the_image() {
    for raw in [false, true] {
        let (storage, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
        let mut options = CreateOptions::new(16 * CLUSTER);
        (options.data_file, options.data_file_raw) = (Some(b"data".to_vec()), raw);
        options.preallocation = Preallocation::Metadata;
        options.create(&*storage, Some(&*data)).unwrap();
        let disk = OpenOptions::new().writable(true).data_file(data.clone()).open(storage.clone()).unwrap();
        disk.write_at(&[1; 2 * CLUSTER as usize], 4 * CLUSTER, WriteFlags::NONE).unwrap();
        disk.flush().unwrap();
        let kinds =
            |disk: &Qcow2| show(disk).into_iter().map(|row| (row.0 / CLUSTER, row.2)).collect::<Vec<_>>();
        let (zero, data_kind) = (ExtentKind::Zero, ExtentKind::Data);
        assert_eq!(kinds(&disk), [(0, zero), (4, data_kind), (6, zero)], "raw {raw}");
        // Zeros that a raw data file must hold itself: what was known to be data is asked about again.
        disk.write_zeroes(ByteRange::at(4 * CLUSTER, CLUSTER), ZeroFlags::MAY_UNMAP).unwrap();
        assert_eq!(kinds(&disk).iter().find(|row| row.1 == data_kind), Some(&(5, data_kind)), "raw {raw}");
    }
}

#[test]
fn what_lies_past_the_end_of_the_file_is_no_hole() {
    let storage = create(4 * CLUSTER, |_| {});
    let disk = open(&storage);
    disk.write_at(&[1; 4 * CLUSTER as usize], 0, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    drop(disk);
    storage.set_len(storage.len().unwrap() - CLUSTER).unwrap();
    // For reading: an image that was cut short is not written.
    let disk = OpenOptions::new().open(storage).unwrap();
    assert!(extents(&disk).iter().all(|e| !e.mapped_hole));
}

#[test]
fn a_query_hands_out_partial_runs_so_that_its_visitor_can_stop() {
    // Sixteen tables of 8192 zero clusters: one run.
    let size = 8 << 30;
    let storage = create(size, |o| o.preallocation = Preallocation::Metadata);
    let disk = open(&storage);
    disk.write_zeroes(ByteRange::new(0, size), ZeroFlags::MAY_UNMAP).unwrap();
    let mut seen = Vec::new();
    disk.extents(ByteRange::new(0, size), &mut |extent| {
        seen.push((extent.range.len() / CLUSTER, extent.partial));
        Visit::Continue(())
    })
    .unwrap();
    assert_eq!(seen, [(32768, true), (32768, true), (32768, true), (32768, false)]);
    // The budget of a layer below is that of the chain.
    let top = create(size, |o| o.backing_file = Some(b"base".to_vec()));
    let top = OpenOptions::new().backing(Arc::new(disk)).open(top).unwrap();
    let mut visits = 0;
    top.extents(ByteRange::new(0, size), &mut |extent| {
        visits += 1;
        if extent.partial { Visit::Break(()) } else { Visit::Continue(()) }
    })
    .unwrap();
    assert_eq!(visits, 1);
}
