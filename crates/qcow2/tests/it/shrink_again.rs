//! A shrink that fails or is cancelled after the header has the new length, and the one that finishes it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::Arc;

use crate::common::{qemu_check_finds_no_corruption, qemu_check_finds_nothing};
use blockmirror_block::testing::{Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{BlockDevice, ErrorKind, Storage, WriteFlags};
use blockmirror_qcow2::{CreateOptions, Header, NewSnapshot, OpenOptions, Qcow2, SnapshotRef};
use byteorder::{BigEndian, ByteOrder};

const CLUSTER: u64 = 512;
const LONG: u64 = 400_384;
const SHORT: u64 = 20_480;

fn words(storage: &dyn Storage, at: u64, count: u64) -> Vec<u64> {
    let mut bytes = vec![0; count as usize * 8];
    storage.read_at(&mut bytes, at).unwrap();
    bytes.chunks_exact(8).map(BigEndian::read_u64).collect()
}

/// Guest clusters past `len` that an image of plain clusters maps.
fn mapped_past(storage: &dyn Storage, len: u64) -> usize {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let header = Header::read(storage).unwrap();
    let (per_table, first) = (CLUSTER / 8, len.div_ceil(CLUSTER));
    let l1 = words(storage, header.l1_offset, header.l1_entries.into());
    let tables = (0..).step_by(per_table as usize).zip(l1).filter(|(_, entry)| entry & OFFSET != 0);
    tables
        .flat_map(|(start, entry)| (start..).zip(words(storage, entry & OFFSET, per_table)))
        .filter(|(cluster, entry)| *cluster >= first && *entry != 0)
        .count()
}

fn open(storage: &Arc<MemoryStorage>, faults: &Faults) -> Qcow2 {
    let storage = Arc::new(FaultStorage::new(Arc::clone(storage) as _, faults.clone()));
    OpenOptions::new().writable(true).open(storage).unwrap()
}

/// The image of a full disk.
fn full() -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(LONG);
    options.cluster_size = CLUSTER;
    options.create(&*storage, None).unwrap();
    open(&storage, &Faults::new()).write_at(&[7; LONG as usize], 0, WriteFlags::FUA).unwrap();
    storage.to_vec()
}

#[test]
fn whatever_fails_another_shrink_to_the_same_length_finishes_it() {
    let before = full();
    let (mut cut, mut poisoned) = (0, 0);
    for (kind, error) in [
        (OpKind::Write, ErrorKind::NoSpace),
        (OpKind::Write, ErrorKind::Io),
        (OpKind::Flush, ErrorKind::Io),
        (OpKind::Read, ErrorKind::Io),
    ] {
        for n in 0.. {
            let storage = Arc::new(MemoryStorage::with_contents(&before));
            let faults = Faults::new();
            let mut disk = open(&storage, &faults);
            faults.inject(Fault::on(kind).after(n).with(error));
            let result = disk.resize(SHORT, true);
            let what = format!("{kind:?} {n} {error:?}: {result:?}");
            if faults.failed() == 0 {
                assert!(n > 2, "{what}");
                break;
            }
            faults.heal();
            assert_eq!(result.unwrap_err().kind(), error, "{what}");
            // A poisoned image is opened anew; what it has not given back may leak.
            let in_doubt = disk.flush().is_err();
            if in_doubt {
                poisoned += 1;
                drop(disk);
                disk = open(&storage, &faults);
            }
            cut += usize::from(disk.len() == SHORT);
            disk.resize(SHORT, true).unwrap();
            assert_eq!((disk.len(), Header::read(&*storage).unwrap().virtual_size), (SHORT, SHORT), "{what}");
            assert_eq!(mapped_past(&*storage, SHORT), 0, "{what}: mapped past the end");
            drop(disk);
            let check = if in_doubt { qemu_check_finds_no_corruption } else { qemu_check_finds_nothing };
            check(&storage.to_vec(), &what);
        }
    }
    assert!(cut > 5 && poisoned > 5, "{cut} {poisoned}");
}

/// It was freed for what the shrink had left, which an applied snapshot replaces.
#[test]
fn vm_state_that_is_applied_after_a_shrink_was_cut_off_stays() {
    let storage = Arc::new(MemoryStorage::with_contents(&full()));
    // What lies past it is as VM state is.
    storage.write_at(&SHORT.to_be_bytes(), 24).unwrap();
    let faults = Faults::new();
    let disk = open(&storage, &faults);
    disk.create_snapshot(&NewSnapshot::new("state")).unwrap();
    let state = mapped_past(&*storage, SHORT);
    assert!(state > 0);
    // The header has been written, no table has.
    faults.inject(Fault::on(OpKind::Write).after(1).with(ErrorKind::NoSpace));
    assert_eq!(disk.resize(SHORT / 2, true).unwrap_err().kind(), ErrorKind::NoSpace);
    faults.heal();
    assert_eq!(disk.len(), SHORT / 2);
    disk.apply_snapshot(&SnapshotRef::Name("state".into())).unwrap();
    disk.resize(SHORT, true).unwrap();
    drop(disk);
    assert_eq!(mapped_past(&*storage, SHORT), state);
    qemu_check_finds_nothing(&storage.to_vec(), "VM state after a shrink that was cut off");
}

/// Without the permission to shrink nothing past the end is looked at.
#[test]
fn a_resize_that_must_not_shrink_gives_nothing_back() {
    let storage = Arc::new(MemoryStorage::with_contents(&full()));
    let faults = Faults::new();
    let disk = open(&storage, &faults);
    // The header has been written, no table has.
    faults.inject(Fault::on(OpKind::Write).after(1).with(ErrorKind::NoSpace));
    assert_eq!(disk.resize(SHORT, true).unwrap_err().kind(), ErrorKind::NoSpace);
    faults.heal();
    drop(disk);
    let disk = open(&storage, &faults);
    assert_eq!(disk.len(), SHORT);
    let left = mapped_past(&*storage, SHORT);
    assert!(left > 0);
    disk.resize(SHORT, false).unwrap();
    assert_eq!(mapped_past(&*storage, SHORT), left);
    disk.resize(SHORT, true).unwrap();
    assert_eq!(mapped_past(&*storage, SHORT), 0);
}

#[test]
fn a_data_file_that_is_longer_than_the_disk_keeps_its_length() {
    for raw in [true, false] {
        let (storage, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
        let mut options = CreateOptions::new(LONG);
        (options.data_file, options.data_file_raw) = (Some(b"data".to_vec()), raw);
        options.create(&*storage, Some(&*data)).unwrap();
        data.write_at(&[9; 512], LONG + 512).unwrap();
        let disk = OpenOptions::new().writable(true).data_file(data.clone()).open(storage).unwrap();
        disk.resize(LONG, true).unwrap();
        assert_eq!(data.len().unwrap(), LONG + 1024, "raw: {raw}");
        assert!(data.to_vec().ends_with(&[9; 512]), "raw: {raw}");
    }
}

#[test]
fn damage_past_the_end_does_not_mark_an_image_that_keeps_its_length() {
    const CLUSTER: u64 = 4096;
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(SHORT);
    options.cluster_size = CLUSTER;
    options.create(&*storage, None).unwrap();
    open(&storage, &Faults::new()).write_at(&[7; 512], 0, WriteFlags::FUA).unwrap();
    let header = Header::read(&*storage).unwrap();
    let table = words(&*storage, header.l1_offset, 1)[0] & 0x00ff_ffff_ffff_fe00;
    // A cluster whose refcount is zero, mapped behind the disk.
    storage.write_at(&(100 * CLUSTER).to_be_bytes(), table + SHORT / CLUSTER * 8).unwrap();
    let disk = open(&storage, &Faults::new());
    disk.resize(SHORT, true).unwrap_err();
    assert_eq!(Header::read(&*storage).unwrap().incompatible, 0, "it is marked");
    disk.flush().unwrap();
}

#[test]
fn a_raw_data_file_gets_its_length_the_second_time() {
    let (storage, data) = (Arc::new(MemoryStorage::new()), Arc::new(MemoryStorage::new()));
    let mut options = CreateOptions::new(LONG);
    (options.data_file, options.data_file_raw) = (Some(b"data".to_vec()), true);
    options.create(&*storage, Some(&*data)).unwrap();
    let faults = Faults::new();
    let failing = Arc::new(FaultStorage::new(Arc::clone(&data) as _, faults.clone()));
    let disk = OpenOptions::new().writable(true).data_file(failing).open(storage).unwrap();
    faults.inject(Fault::on(OpKind::SetLen));
    disk.resize(SHORT, true).unwrap_err();
    assert_eq!((disk.len(), data.len().unwrap()), (SHORT, LONG));
    disk.resize(SHORT, true).unwrap();
    assert_eq!((disk.len(), data.len().unwrap()), (SHORT, SHORT));
}
