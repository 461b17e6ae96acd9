//! The work that an image can cause is bounded, whatever it says of itself: counted in reads of the storage,
//! never in time.

use std::sync::Arc;

use blockmirror_block::testing::{Fault, FaultStorage, Faults, MemoryStorage, OpKind};
use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Storage, StorageInfo, WriteFlags, ZeroFlags,
};
use blockmirror_qcow2::{CreateOptions, CutShort, Header, OpenOptions, Version};

use super::counted::Counted;

/// Where [`ManyTables`] has its refcount table, the one refcount block, the L1 table and the L2 tables.
const REFCOUNTS: u64 = 1 << 20;
const BLOCK: u64 = 9 << 20;
const L1: u64 = 16 << 20;
const L2: u64 = 64 << 20;

/// Of an L1 entry: the table belongs to it alone.
const COPIED: u64 = 1 << 63;

/// Block 500 of distinct refcount blocks of 512 bytes.
const BLOCK_500: ByteRange = ByteRange::new(BLOCK + 500 * 512, BLOCK + 501 * 512);

/// An image made by hand that claims far more metadata than its file holds bytes.
struct ManyTables {
    cluster_bits: u32,
    /// Of the refcount table, in clusters.
    refcount_clusters: u32,
    /// Entries of the refcount table, from the first on, that are not empty.
    blocks: u64,
    /// The refcount of a cluster; without it all entries name one refcount block of zeros.
    counts: Option<fn(u64) -> u16>,
    l1_entries: u64,
    /// The first entry of each L2 table.
    entry: u64,
    /// L1 entries, from the first on, that are empty.
    empty: u64,
    len: u64,
}

impl ManyTables {
    /// Clusters of 512 bytes and a refcount table that reaches 8 MiB far.
    const SMALL: Self = Self {
        cluster_bits: 9,
        refcount_clusters: 1,
        blocks: 1,
        counts: None,
        l1_entries: 1 << 15,
        entry: 0,
        empty: 1,
        len: 96 << 20,
    };

    fn make(&self) -> MemoryStorage {
        let cluster = 1_u64 << self.cluster_bits;
        let size = self.l1_entries * cluster / 8 * cluster;
        let mut header = 0x5146_49fb_u32.to_be_bytes().to_vec();
        header.extend(3_u32.to_be_bytes());
        header.extend([0; 12]);
        header.extend(self.cluster_bits.to_be_bytes());
        header.extend(size.to_be_bytes());
        header.extend([0; 4]);
        header.extend((self.l1_entries as u32).to_be_bytes());
        header.extend(L1.to_be_bytes());
        header.extend(REFCOUNTS.to_be_bytes());
        header.extend(self.refcount_clusters.to_be_bytes());
        header.extend([0; 36]);
        header.extend(4_u32.to_be_bytes());
        header.extend(104_u32.to_be_bytes());
        let storage = MemoryStorage::new();
        let words = |at: u64, words: Vec<u64>| write_words(&storage, at, words);
        storage.write_at(&header, 0).unwrap();
        match self.counts {
            None => words(REFCOUNTS, vec![BLOCK; self.blocks as usize]),
            Some(counts) => {
                words(REFCOUNTS, (0..self.blocks).map(|i| BLOCK + i * cluster).collect());
                let counts: Vec<u8> =
                    (0..self.blocks * cluster / 2).flat_map(|i| counts(i).to_be_bytes()).collect();
                storage.write_at(&counts, BLOCK).unwrap();
            }
        }
        words(L1, (0..self.l1_entries).map(|i| if i < self.empty { 0 } else { L2 + i * cluster }).collect());
        if self.entry != 0 {
            (0..self.l1_entries).for_each(|i| words(L2 + i * cluster, vec![self.entry]));
        }
        storage.set_len(self.len).unwrap();
        storage
    }
}

fn write_words(storage: &MemoryStorage, at: u64, words: Vec<u64>) {
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_be_bytes).collect();
    storage.write_at(&bytes, at).unwrap();
}

/// The refcount table did not reach the end of the file, so one write brought the pass over all L2 tables to
/// its end, with the metadata lock held all the time: minutes for 2^22 tables in holes of a sparse file.
#[test]
fn the_refcount_table_grows_without_a_pass_over_all_tables() {
    const MOST: u64 = 10_000;
    // The zero flag: the tables are data, but map nothing.
    for entry in [0, 1] {
        let storage = Arc::new(ManyTables { entry, ..ManyTables::SMALL }.make());
        let faults = Faults::new();
        let slow = Arc::new(FaultStorage::new(storage.clone(), faults.clone()));
        let disk = OpenOptions::new().writable(true).open(slow).unwrap();
        faults.inject(Fault::on(OpKind::Read).after(MOST).forever());
        disk.write_at(&[7; 512], 0, WriteFlags::NONE).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let disk = OpenOptions::new().open(storage).unwrap();
        let mut found = [0; 512];
        disk.read_at(&mut found, 0).unwrap();
        assert_eq!(found, [7; 512]);
        assert_ne!(disk.header().refcount_table_offset, REFCOUNTS, "the table has grown");
    }
}

/// On a device nothing lies past the end, so that the pass must come first: in pieces, and it can be stopped.
#[test]
fn the_pass_over_all_tables_can_be_stopped() {
    const TABLES: u64 = 1 << 15;
    let make = |entry| {
        let mut info = StorageInfo::plain();
        info.fixed_len = true;
        Arc::new(ManyTables { entry, ..ManyTables::SMALL }.make().with_info(info))
    };
    let storage = make(1);
    let faults = Faults::new();
    let slow = Arc::new(FaultStorage::new(storage.clone(), faults.clone()));
    let disk = OpenOptions::new().writable(true).open(slow).unwrap();
    let gate = faults.hold(OpKind::Read, Some(ByteRange::at(L2 + 5000 * 512, 512)));
    let before = faults.seen(OpKind::Read) as u64;
    std::thread::scope(|s| {
        let write = s.spawn(|| disk.write_at(&[7; 512], 0, WriteFlags::NONE));
        gate.wait_held(1);
        disk.cancel_in_flight();
        gate.open();
        assert_eq!(write.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    });
    let looked = faults.seen(OpKind::Read) as u64 - before;
    assert!((5000..8000).contains(&looked), "{looked} reads");
    // The next allocation goes on from there.
    disk.write_at(&[7; 512], 0, WriteFlags::NONE).unwrap();
    let looked = faults.seen(OpKind::Read) as u64 - before;
    assert!((TABLES - 1..TABLES + 1000).contains(&looked), "{looked} reads");
    // Tables in holes are not read.
    let faults = Faults::new();
    let slow = Arc::new(FaultStorage::new(make(0), faults.clone()));
    let disk = OpenOptions::new().writable(true).open(slow).unwrap();
    disk.write_at(&[7; 512], 0, WriteFlags::NONE).unwrap();
    assert!(faults.seen(OpKind::Read) < 1000, "{} reads", faults.seen(OpKind::Read));
}

/// What [`CutShort::find`] finds, with its reads and their bounds.
fn cut_short(image: &ManyTables, most: u64) -> Option<CutShort> {
    let storage = Arc::new(image.make());
    let header = Header::read(&*storage).unwrap();
    let faults = Faults::new();
    let slow = Arc::new(FaultStorage::new(storage, faults.clone()));
    faults.inject(Fault::on(OpKind::Read).after(most).forever());
    let found = CutShort::find(slow, &header).unwrap();
    assert_eq!(faults.failed(), 0, "more than {most} reads");
    found
}

/// `info` read a refcount block of zeros for each of 2^20 entries of the refcount table, and each of as many
/// L2 tables.
#[test]
fn the_look_for_what_was_cut_off_is_bounded() {
    // The refcounts of 1024 blocks tell nothing, and the tables map nothing.
    let many = ManyTables {
        cluster_bits: 16,
        refcount_clusters: 64,
        blocks: 1 << 19,
        counts: None,
        l1_entries: 64,
        entry: 1,
        empty: 0,
        len: 96 << 20,
    };
    assert_eq!(cut_short(&many, 1100 + 64 * 16), None);
    // Not even the L1 table is there.
    let many = ManyTables { len: 8 << 20, ..many };
    let cut = cut_short(&many, 10).unwrap();
    assert_eq!((cut.file_len, cut.first, cut.missing, cut.complete), (8 << 20, 0, 64 << 29, true));
    // 2^13 tables of 2^13 entries, of which 2^24 entries are looked at.
    let many = ManyTables { l1_entries: 1 << 13, entry: 0, len: 1 << 40, blocks: 1 << 19, ..many };
    let cut = cut_short(&many, 1100 + 2048 * 16).unwrap();
    assert_eq!((cut.file_len, cut.missing, cut.complete), (1 << 40, 0, false));
    assert!(cut.first <= 1 << 40 && cut.first > (1 << 40) - (1 << 30), "{}", cut.first);
}

/// The refcounts of a file of 128 MiB with clusters of 512 bytes.
const COUNTED: ManyTables =
    ManyTables { refcount_clusters: 16, blocks: 1024, len: 128 << 20, ..ManyTables::SMALL };

/// Every allocation took a mebibyte of L2 tables into the pass, and for each entry of them a refcount block:
/// a write of 4 MiB, in small free runs, took minutes where an image of some 100 MiB was made for it.
#[test]
fn the_pass_over_all_tables_costs_no_more_than_the_writes_that_need_it() {
    const TABLES: u64 = 1 << 11;
    const EMPTY: u64 = 64;
    // Free are short runs behind the L1 table.
    let counts = |cluster| u16::from(!(40_000..60_000).contains(&cluster) || cluster % 256 < 8);
    let image = ManyTables { counts: Some(counts), l1_entries: TABLES, empty: EMPTY, ..COUNTED };
    let storage = image.make();
    for table in EMPTY..TABLES {
        // Each entry maps a cluster that another refcount block counts.
        let entries = (0..64).map(|i| (((i * 16 + table % 8) * 256 + 1) * 512) | (1 << 63)).collect();
        write_words(&storage, L2 + table * 512, entries);
    }
    let (disk, counted) = Counted::open(&Arc::new(storage));
    counted.reads();
    let mut reads = 0;
    for cluster in 0..EMPTY * 64 {
        disk.write_at(&[7; 512], cluster * 512, WriteFlags::NONE).unwrap();
        reads += counted.reads() as u64;
        // The search for the first free cluster, the mebibyte for free and a slice that costs more than is
        // left; then an eighth of a read for each cluster, and what each write looks up for itself.
        let most = 600 + 4 * cluster;
        assert!(reads <= most, "{reads} reads up to cluster {cluster}, more than {most}");
    }
    let mut found = vec![0; 4 * 512];
    disk.read_at(&mut found, (EMPTY * 64 - 4) * 512).unwrap();
    assert!(found.iter().all(|byte| *byte == 7));
}

/// A table that lies in a hole but for one slice was read whole: 512 reads for one block of a file.
#[test]
fn the_pass_reads_only_the_parts_of_tables_that_are_no_holes() {
    const TABLES: u64 = 64;
    let mut info = StorageInfo::plain();
    info.fixed_len = true;
    // Of 64 KiB, that is 16 slices.
    let image = ManyTables {
        cluster_bits: 16,
        blocks: 1,
        counts: Some(|cluster| u16::from(cluster < 64 + TABLES + 1024)),
        l1_entries: TABLES,
        len: 256 << 20,
        ..ManyTables::SMALL
    };
    let storage = image.make().with_info(info);
    for table in 1..TABLES {
        write_words(&storage, L2 + table * 65536 + table % 16 * 4096, vec![1]);
    }
    let (disk, counted) = Counted::open(&Arc::new(storage));
    counted.reads();
    disk.write_at(&[7; 512], 0, WriteFlags::NONE).unwrap();
    let reads = counted.reads();
    assert!(reads < 2 * TABLES as usize, "{reads} reads");
}

/// That `result` is a cancellation, soon after the read that it came at.
fn assert_cancelled(result: Result<(), Error>, counted: &Counted) {
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    let reads = counted.reads();
    assert!(reads < 300, "{reads} reads after it was cancelled");
}

/// The search for clusters looked through all refcounts under one hold of the metadata lock.
#[test]
fn a_search_for_free_clusters_can_be_stopped() {
    let all_used = ManyTables { counts: Some(|_| 1), l1_entries: 64, empty: 64, ..COUNTED };
    let storage = Arc::new(all_used.make());
    let (disk, counted) = Counted::open(&storage);
    counted.cancel_at(&disk, None, BLOCK_500);
    assert_cancelled(disk.write_at(&[7; 512], 0, WriteFlags::NONE), &counted);
    disk.write_at(&[7; 512], 0, WriteFlags::NONE).unwrap();
    assert!(storage.len().unwrap() > all_used.len, "it lies past what is counted");
}

/// The same of the search for a run of them, for a longer L1 table.
#[test]
fn a_search_for_a_run_of_clusters_can_be_stopped() {
    let counts = |cluster| (cluster % 2) as u16;
    let no_runs = ManyTables { counts: Some(counts), l1_entries: 64, empty: 64, ..COUNTED };
    let storage = Arc::new(no_runs.make());
    let (disk, counted) = Counted::open(&storage);
    // From here on each free cluster may be handed out.
    disk.write_at(&[7; 512], 0, WriteFlags::NONE).unwrap();
    let longer = disk.len() * 16;
    counted.cancel_at(&disk, None, BLOCK_500);
    assert_cancelled(disk.resize(longer, false), &counted);
    assert_eq!(disk.len(), longer / 16);
    disk.resize(longer, false).unwrap();
    let header = Header::read(&*storage).unwrap();
    assert_eq!((header.virtual_size, header.l1_entries), (longer, 64 * 16));
}

/// Shrinking could not be stopped. Before the header says the new length nothing has happened; after it, what
/// was not given back stays counted.
#[test]
fn shrinking_can_be_stopped() {
    const SHORT: u64 = 1 << 16;
    let image = ManyTables { counts: Some(|_| 1), entry: 1, l1_entries: 1 << 13, empty: 0, ..COUNTED };
    let storage = Arc::new(image.make());
    let (disk, counted) = Counted::open(&storage);
    let lengths = || (disk.len(), Header::read(&*storage).unwrap().virtual_size);
    let (long, table_5000) = (disk.len(), ByteRange::at(L2 + 5000 * 512, 512));
    counted.cancel_at(&disk, None, table_5000);
    assert_cancelled(disk.resize(SHORT, true), &counted);
    assert_eq!(lengths(), (long, long));

    let size_field = ByteRange::at(24, 8);
    counted.cancel_at(&disk, Some(size_field), table_5000);
    assert_cancelled(disk.resize(SHORT, true), &counted);
    assert_eq!(lengths(), (SHORT, SHORT));
    disk.flush().unwrap();
    drop(disk);
    let disk = OpenOptions::new().writable(true).open(storage).unwrap();
    disk.resize(long, false).unwrap();
    let mut end = [1; 512];
    disk.read_at(&mut end, long - 512).unwrap();
    assert_eq!(end, [0; 512]);
}

/// What a reopened image looks through, to free what only lost changes used: tables in holes were read whole,
/// and nothing could end it.
#[test]
fn reopening_reads_no_holes_and_can_be_stopped() {
    const TABLES: u64 = 64;
    let image = ManyTables {
        cluster_bits: 16,
        counts: Some(|cluster| u16::from(cluster < 1024 + 2 * TABLES)),
        l1_entries: TABLES,
        len: 256 << 20,
        ..ManyTables::SMALL
    };
    let storage = image.make();
    for table in 1..TABLES {
        write_words(&storage, L2 + table * 65536 + table % 16 * 4096, vec![1]);
    }
    let (disk, counted) = Counted::open(&Arc::new(storage));
    counted.reads();
    disk.reopen().unwrap();
    let reads = counted.reads();
    assert!(reads < 2 * TABLES as usize, "{reads} reads");
    counted.cancel_at(&disk, None, ByteRange::at(L2 + 5 * 65536, 65536));
    assert_eq!(disk.reopen().unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(counted.reads() < 10);
    disk.reopen().unwrap();
}

/// In version 2 a zeroing that must not write data looked at every cluster first, one by one, and nothing
/// could end it.
#[test]
fn zeroing_by_metadata_in_version_2_can_be_stopped() {
    const TABLE: u64 = 64 * 512;
    const TABLES: u64 = 1000;
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(TABLES * TABLE);
    (options.cluster_size, options.version) = (512, Version::V2);
    options.create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    let all = ByteRange::new(0, disk.len());
    for table in 0..TABLES {
        disk.write_at(&[1; 512], table * TABLE, WriteFlags::NONE).unwrap();
    }
    // The tables stay.
    disk.discard(all).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let mut entry = [0; 8];
    storage.read_at(&mut entry, Header::read(&*storage).unwrap().l1_offset + 500 * 8).unwrap();
    let table_500 = ByteRange::at(u64::from_be_bytes(entry) & !COPIED, 512);
    let (disk, counted) = Counted::open(&storage);
    counted.cancel_at(&disk, None, table_500);
    assert_cancelled(disk.write_zeroes(all, ZeroFlags::NO_FALLBACK), &counted);
    disk.write_zeroes(all, ZeroFlags::NO_FALLBACK).unwrap();
    // With space to be freed nothing but a part of a compressed cluster would take data.
    counted.reads();
    disk.write_zeroes(ByteRange::new(0, TABLE), ZeroFlags::NO_FALLBACK | ZeroFlags::MAY_UNMAP).unwrap();
    assert!(counted.reads() < 10);
    disk.write_at(&[1; 512], 600 * TABLE, WriteFlags::NONE).unwrap();
    let refused = disk.write_zeroes(all, ZeroFlags::NO_FALLBACK).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
}
