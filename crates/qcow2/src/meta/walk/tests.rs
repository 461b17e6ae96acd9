//! Runs of tables of random entries, against the same entries looked at one by one; what is read for them.

use std::sync::Arc;

use blockmirror_block::testing::{FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{BlockDevice, Storage, WriteFlags};
use proptest::prelude::*;

use super::*;
use crate::{CreateOptions, OpenOptions, Qcow2};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// Consecutive entries: how many, of which kind, and a number for what is random in them.
type Stretch = (usize, u8, u64);

/// An image with one L2 table, which holds `stretches` from its first entry on.
fn image(stretches: &[Stretch], extended: bool) -> (Qcow2, u64) {
    let cluster: u64 = if extended { 32768 } else { 65536 };
    let entries = if extended { 2048 } else { 8192 };
    let size = entries * cluster;
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(size);
    (options.cluster_size, options.extended_l2) = (cluster, extended);
    options.create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    disk.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    let table = disk.meta.lock().l1()[0].table().unwrap();
    drop(disk);
    let mut bytes = Vec::new();
    for &(count, kind, seed) in stretches {
        let host = (seed % (1 << 24) + 16) * cluster;
        for i in 0..count as u64 {
            let (word, bitmap) = match kind {
                0 => (0, 0),
                1 => (1, u64::from(u32::MAX) << 32),
                2 => ((host + i * cluster) | COPIED, u64::from(u32::MAX)),
                3 => ((host + i * 2 * cluster) | COPIED, u64::from(u32::MAX)),
                4 => ((host + i * cluster) | 1, u64::from(u32::MAX) << 32),
                5 => (COMPRESSED | (host + i * 512), 0),
                // The flag changes in the middle of a run.
                6 => ((host + i * cluster) | if i % 3 == 0 { COPIED } else { 0 }, u64::from(u32::MAX)),
                // Subclusters of all kinds.
                _ => (host | COPIED, (seed & 0xff00_ff00) | (!seed & 0x00f0_00f0) << 32),
            };
            // Bit 0 is the zero flag of entries that are not extended.
            bytes.extend((if extended { word & !1 } else { word }).to_be_bytes());
            if extended {
                bytes.extend(bitmap.to_be_bytes());
            }
        }
    }
    bytes.truncate(cluster as usize);
    bytes.resize(cluster as usize, 0);
    storage.write_at(&bytes, table.0).unwrap();
    (OpenOptions::new().open(storage).unwrap(), size)
}

/// The runs of `range`, one entry and one subcluster after the other.
fn one_by_one(disk: &Qcow2, range: ByteRange) -> Vec<MapRun> {
    let mut runs: Vec<MapRun> = Vec::new();
    let (ctx, mut meta) = (&disk.ctx, disk.meta.lock());
    let unit = ctx.format.subcluster_size();
    for part in range.pieces(unit) {
        let guest = GuestOffset(part.start());
        let within = ctx.cluster().within(guest);
        let mapping = match meta.entry(ctx, ctx.cluster().index(guest)).unwrap() {
            Entry::Compressed(run) => Mapping::Compressed(run),
            Entry::Plain(plain) => {
                let bit = 1 << (within / unit);
                let host = plain.host.map(|host| host.plus(within));
                match host {
                    Some(host) if plain.allocated & bit != 0 => Mapping::Data(host),
                    host if plain.zero & bit != 0 => Mapping::Zero(host),
                    _ => Mapping::Unallocated,
                }
            }
        };
        let next = MapRun { range: part, mapping };
        match runs.last_mut() {
            Some(run) if run.continues_into(&next) => {
                run.range = ByteRange::new(run.range.start(), part.end());
            }
            // Of a compressed cluster all parts are one.
            Some(run)
                if run.mapping == mapping && matches!(mapping, Mapping::Compressed(_)) && within != 0 =>
            {
                run.range = ByteRange::new(run.range.start(), part.end());
            }
            _ => runs.push(next),
        }
    }
    runs
}

/// The runs of `range`, as far as it takes looks of at most `max`.
fn looked_up(disk: &Qcow2, range: ByteRange, max: usize) -> Vec<MapRun> {
    let mut all: Vec<MapRun> = Vec::new();
    let mut at = range.start();
    while at < range.end() {
        let runs = disk.meta.lock().runs(&disk.ctx, ByteRange::new(at, range.end()), max).unwrap();
        assert!(!runs.is_empty() && runs.len() <= max);
        for next in runs {
            assert_eq!(next.range.start(), at);
            at = next.range.end();
            match all.last_mut() {
                Some(run) if run.continues_into(&next) => {
                    run.range = ByteRange::new(run.range.start(), at);
                }
                _ => all.push(next),
            }
        }
    }
    all
}

fn stretches() -> impl Strategy<Value = Vec<Stretch>> {
    prop::collection::vec((1usize..700, 0u8..8, any::<u64>()), 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn runs_are_what_the_entries_say(
        stretches in stretches(),
        extended in any::<bool>(),
        ends in (any::<u64>(), any::<u64>()),
        max in prop::sample::select(vec![1usize, 3, 1024]),
    ) {
        let (disk, size) = image(&stretches, extended);
        let (start, len) = (ends.0 % (size / 512) * 512, (ends.1 % (size / 512) + 1) * 512);
        for range in [ByteRange::new(0, size), ByteRange::new(start, (start + len).min(size))] {
            prop_assert_eq!(looked_up(&disk, range, max), one_by_one(&disk, range));
        }
    }
}

/// A storage that counts, below an image of `tables` tables in each of which one cluster was written.
fn counted(tables: u64) -> (Qcow2, Faults) {
    let table_bytes = 8192 * 65536;
    let storage = Arc::new(MemoryStorage::new());
    CreateOptions::new(tables * table_bytes).create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    for table in 0..tables {
        disk.write_at(&[1; 65536], table * table_bytes, WriteFlags::NONE).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    let faults = Faults::new();
    let storage = Arc::new(FaultStorage::new(storage, faults.clone()));
    (OpenOptions::new().open(storage).unwrap(), faults)
}

/// A slice of 4 KiB was read at a time: sixteen calls for each table.
#[test]
fn a_table_is_read_at_once_where_all_of_it_is_asked_about() {
    let (disk, faults) = counted(8);
    let before = faults.seen(OpKind::Read);
    looked_up(&disk, ByteRange::new(0, disk.len()), 1024);
    assert_eq!(faults.seen(OpKind::Read) - before, 8);
    // Slices of zeros are kept too.
    looked_up(&disk, ByteRange::new(0, disk.len()), 1024);
    assert_eq!(faults.seen(OpKind::Read) - before, 8);
}

#[test]
fn of_a_small_range_only_its_slice_is_read_and_what_is_cached_is_not_read_again() {
    let (disk, faults) = counted(1);
    let slice = 512 * 65536;
    let reads = |range: ByteRange| {
        let before = faults.seen(OpKind::Read);
        looked_up(&disk, range, 1024);
        faults.seen(OpKind::Read) - before
    };
    assert_eq!(reads(ByteRange::at(5 * slice, 65536)), 1);
    assert_eq!(reads(ByteRange::at(5 * slice + 65536, slice - 65536)), 0);
    // Two runs of slices, with the cached one between them.
    assert_eq!(reads(ByteRange::new(0, disk.len())), 2);
}

/// The lower layers of a chain are asked about the holes of those above them: a slice was read at a time.
#[test]
fn questions_about_the_mapping_read_the_rest_of_a_table_at_once() {
    let (disk, faults) = counted(1);
    let before = faults.seen(OpKind::Read);
    for part in ByteRange::new(0, disk.len()).pieces(64 * 65536) {
        disk.extents(part, &mut |_| Visit::Continue(())).unwrap();
    }
    assert_eq!(faults.seen(OpKind::Read) - before, 1);
}
