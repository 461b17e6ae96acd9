//! Images with one field changed: header, L1 and L2 entries, refcount table and blocks, in many ways each.
//!
//! Whatever is changed, opening, reading, mapping, writing and flushing end with a typed error or with
//! success, and damage stays where it is: guest data that the changed field does not speak of reads as
//! before, and no write lands on metadata.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod bounded;
pub(crate) mod counted;

use std::sync::Arc;

use blockmirror_block::testing::{MemoryDisk, MemoryStorage};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Storage, Visit, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{
    CreateOptions, Damage, Header, MetadataKind, OpenOptions, Preallocation, Qcow2, Version,
};

/// No disk here is longer; a changed header may declare any length.
const MOST: u64 = 1 << 20;

/// An image, and what is needed to open it.
struct Image {
    name: String,
    bytes: Vec<u8>,
    data: Option<Vec<u8>>,
    backing: bool,
    truth: Vec<u8>,
    header: Header,
}

fn backing() -> Arc<dyn BlockDevice> {
    let disk = MemoryDisk::new(MOST);
    disk.write_at(&[0xb0; 1 << 17], 0, WriteFlags::NONE).unwrap();
    Arc::new(disk)
}

impl Image {
    fn make(name: &str, change: impl Fn(&mut CreateOptions)) -> Self {
        let mut options = CreateOptions::new(300 * 1024 + 512);
        change(&mut options);
        let storage = Arc::new(MemoryStorage::new());
        let data = options.data_file.as_ref().map(|_| Arc::new(MemoryStorage::new()));
        options.create(&*storage, data.as_ref().map(|d| &**d as &dyn Storage)).unwrap();
        let backed = options.backing_file.is_some();
        let disk = open(storage.clone(), data.clone(), backed, true).unwrap();
        disk.write_at(&[0x11; 70_000], 1000, WriteFlags::NONE).unwrap();
        disk.write_at(&[0x22; 20_000], 200_000, WriteFlags::NONE).unwrap();
        disk.write_zeroes(ByteRange::at(30_000, 40_000), ZeroFlags::NONE).unwrap();
        disk.discard(ByteRange::at(205_000, 9000)).unwrap();
        disk.flush().unwrap();
        let mut truth = vec![0; disk.len() as usize];
        disk.read_at(&mut truth, 0).unwrap();
        let header = Header::read(&*storage).unwrap();
        Self {
            name: name.into(),
            bytes: storage.to_vec(),
            data: data.map(|d| d.to_vec()),
            backing: backed,
            truth,
            header,
        }
    }

    fn all() -> Vec<Self> {
        let with_backing = |o: &mut CreateOptions| {
            (o.backing_file, o.backing_format) = (Some(b"b".to_vec()), Some("raw".into()));
        };
        vec![
            Self::make("plain 64K", |_| {}),
            Self::make("v2 512", |o| (o.version, o.cluster_size) = (Version::V2, 512)),
            Self::make("v3 4K, backed", |o| {
                o.cluster_size = 4096;
                with_backing(o);
            }),
            Self::make("v2 4K, backed", |o| {
                (o.version, o.cluster_size) = (Version::V2, 4096);
                with_backing(o);
            }),
            Self::make("subclusters 16K, backed", |o| {
                (o.cluster_size, o.extended_l2) = (16384, true);
                with_backing(o);
            }),
            Self::make("1-bit refcounts 512", |o| (o.cluster_size, o.refcount_bits) = (512, 1)),
            Self::make("64-bit refcounts 512, preallocated", |o| {
                (o.cluster_size, o.refcount_bits) = (512, 64);
                o.preallocation = Preallocation::Metadata;
            }),
            Self::make("data file 4K", |o| (o.cluster_size, o.data_file) = (4096, Some(b"d".to_vec()))),
            Self::make("raw data file, subclusters 16K", |o| {
                (o.cluster_size, o.extended_l2) = (16384, true);
                (o.data_file, o.data_file_raw) = (Some(b"d".to_vec()), true);
            }),
        ]
    }

    fn open(
        &self,
        bytes: &[u8],
        writable: bool,
    ) -> Result<(Arc<MemoryStorage>, Qcow2), blockmirror_qcow2::Error> {
        let storage = Arc::new(MemoryStorage::with_contents(bytes));
        let data = self.data.as_ref().map(|d| Arc::new(MemoryStorage::with_contents(d)));
        open(storage.clone(), data, self.backing, writable).map(|disk| (storage, disk))
    }

    fn word(&self, at: u64) -> u64 {
        let at = at as usize;
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn cluster(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Where the L2 table lies that L1 entry `index` points at.
    fn l2(&self, index: u64) -> u64 {
        self.word(self.header.l1_offset + index * 8) & 0x00ff_ffff_ffff_fe00
    }

    fn entry_size(&self) -> u64 {
        if self.header.extended_l2 { 16 } else { 8 }
    }

    /// The file with `width` bytes at `at` replaced by the low bytes of `value`.
    fn changed(&self, at: u64, width: usize, value: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[at as usize..at as usize + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        bytes
    }

    /// Values for a field that holds `now`.
    fn values(&self, now: u64) -> Vec<u64> {
        let cluster = self.cluster();
        let mut out = vec![
            0,
            1,
            2,
            u64::MAX,
            u64::MAX >> 1,
            now.wrapping_add(1),
            now.wrapping_sub(1),
            now.wrapping_add(8),
            now.wrapping_add(512),
            now.wrapping_add(cluster),
            now.wrapping_mul(2),
            !now,
            cluster,
            self.bytes.len() as u64,
            (self.bytes.len() as u64).next_multiple_of(cluster) | 1 << 63,
            0x00ff_ffff_ffff_fe00,
            0x00ff_ffff_ffff_0000 | 1 << 63,
            1 << 56,
        ];
        for bit in [1, 4, 9, 16, 31, 32, 48, 55, 61, 62, 63] {
            out.push(now ^ 1 << bit);
        }
        for table in [self.header.l1_offset, self.header.refcount_table_offset, self.l2(0), 0] {
            out.extend([table, table | 1 << 63, table | 1 << 62]);
        }
        out
    }
}

fn open(
    storage: Arc<MemoryStorage>,
    data: Option<Arc<MemoryStorage>>,
    backed: bool,
    writable: bool,
) -> Result<Qcow2, blockmirror_qcow2::Error> {
    let mut options = OpenOptions::new().writable(writable);
    if let Some(data) = data {
        options = options.data_file(data);
    }
    if backed {
        options = options.backing(backing());
    }
    options.open(storage)
}

/// Reads and maps what there is, at most [`MOST`] bytes; the content if all of it can be read.
fn read(disk: &dyn BlockDevice) -> Option<Vec<u8>> {
    let len = disk.len().min(MOST);
    let mut seen = 0;
    let _ = disk.extents(ByteRange::new(0, disk.len()), &mut |extent| {
        assert_eq!(extent.range.start(), seen, "a gap or an overlap between extents");
        assert!(!extent.range.is_empty());
        seen = extent.range.end();
        if seen > MOST { Visit::Break(()) } else { Visit::Continue(()) }
    });
    let mut end = [0; 512];
    let _ = disk.read_at(&mut end, disk.len().saturating_sub(512));
    let mut content = vec![0; len as usize];
    disk.read_at(&mut content, 0).is_ok().then_some(content)
}

/// Writes, zeroes and discards, here and there; whether that works is the image's business.
fn write(disk: &dyn BlockDevice) {
    for at in [0, 1000, 65_536, 204_800, 290_000, disk.len().saturating_sub(700)] {
        let _ = disk.write_at(&[0x5a; 700], at, WriteFlags::NONE);
        let _ = disk.write_zeroes(ByteRange::at(at, 5000), ZeroFlags::MAY_UNMAP);
        let _ = disk.discard(ByteRange::at(at, 600));
        let _ = disk.write_at(&[0xa5; 5000], at, WriteFlags::NONE);
    }
    let _ = disk.flush();
}

/// The fixed header without what a writer may change: the corrupt bit, autoclear bits, the refcount table's
/// place.
fn fixed_header(bytes: &[u8]) -> Vec<u8> {
    let mut fixed = bytes[..112].to_vec();
    for range in [48..60, 72..80, 88..96] {
        fixed[range].fill(0);
    }
    fixed
}

/// Does everything to a changed image; `same` says which guest bytes must read as ever.
fn exercise(image: &Image, what: &str, bytes: &[u8], same: impl Fn(u64) -> bool) {
    let context = || format!("{}: {what}", image.name);
    if let Ok((_, disk)) = image.open(bytes, false) {
        let mut sector = vec![0; 512];
        for at in (0..disk.len().min(image.truth.len() as u64)).step_by(512) {
            if !same(at) {
                continue;
            }
            disk.read_at(&mut sector, at).unwrap_or_else(|e| panic!("{}: {at}: {e}", context()));
            assert!(
                sector == image.truth[at as usize..at as usize + 512],
                "{}: wrong data at {at}",
                context()
            );
        }
        read(&disk);
    }
    if let Ok((storage, disk)) = image.open(bytes, true) {
        write(&disk);
        read(&disk);
        drop(disk);
        let mut after = vec![0; 112];
        storage.read_at(&mut after, 0).unwrap();
        assert_eq!(fixed_header(&after), fixed_header(bytes), "{}: the header was overwritten", context());
    }
}

#[test]
fn header_fields() {
    const FIELDS: [(u64, usize); 18] = [
        (0, 4),
        (4, 4),
        (8, 8),
        (16, 4),
        (20, 4),
        (24, 8),
        (32, 4),
        (36, 4),
        (40, 8),
        (48, 8),
        (56, 4),
        (60, 4),
        (64, 8),
        (72, 8),
        (80, 8),
        (88, 8),
        (96, 4),
        (100, 4),
    ];
    for image in Image::all() {
        for (at, width) in FIELDS {
            let now = image.word(at) >> (64 - width * 8);
            for value in image.values(now) {
                exercise(
                    &image,
                    &format!("header byte {at} = {value:#x}"),
                    &image.changed(at, width, value),
                    |_| false,
                );
            }
        }
        for at in 104..240 {
            for value in [1, 0xff] {
                let bytes = image.changed(at, 1, value);
                exercise(&image, &format!("header byte {at} = {value}"), &bytes, |_| false);
            }
        }
    }
}

#[test]
fn l1_entries() {
    for image in Image::all() {
        let covers = image.header.l2_entries() * image.cluster();
        let last = u64::from(image.header.l1_entries) - 1;
        for index in [0, last / 2, last] {
            let at = image.header.l1_offset + index * 8;
            for value in image.values(image.word(at)) {
                let bytes = image.changed(at, 8, value);
                exercise(&image, &format!("L1 entry {index} = {value:#x}"), &bytes, |guest| {
                    guest / covers != index
                });
            }
        }
    }
}

#[test]
fn l2_entries() {
    for image in Image::all() {
        for cluster in [0, 1, 30_000 / image.cluster(), 204_800 / image.cluster()] {
            let (table, entry) = (cluster / image.header.l2_entries(), cluster % image.header.l2_entries());
            if image.l2(table) == 0 {
                continue;
            }
            for word in (0..image.entry_size()).step_by(8) {
                let at = image.l2(table) + entry * image.entry_size() + word;
                for value in image.values(image.word(at)) {
                    let bytes = image.changed(at, 8, value);
                    let what = format!("L2 entry {cluster} word {} = {value:#x}", word / 8);
                    exercise(&image, &what, &bytes, |guest| guest / image.cluster() != cluster);
                }
            }
        }
    }
}

#[test]
fn refcount_entries() {
    for image in Image::all() {
        let table = image.header.refcount_table_offset;
        for index in 0..3 {
            let at = table + index * 8;
            for value in image.values(image.word(at)) {
                let bytes = image.changed(at, 8, value);
                exercise(&image, &format!("refcount table entry {index} = {value:#x}"), &bytes, |_| true);
            }
        }
        let block = image.word(table);
        for index in 0..4 {
            let at = block + index * 8;
            for value in image.values(image.word(at)) {
                let bytes = image.changed(at, 8, value);
                exercise(&image, &format!("refcount block word {index} = {value:#x}"), &bytes, |_| true);
            }
        }
    }
}

/// A compressed cluster that lies on the header had the header's cluster freed when the guest discarded it:
/// the reference was dropped, the refcount reached zero, and the header was punched out of the file.
#[test]
fn discarding_a_cluster_that_names_metadata_frees_nothing() {
    for image in Image::all().into_iter().filter(|image| image.data.is_none()) {
        for target in [0, image.header.refcount_table_offset, image.header.l1_offset] {
            for flag in [1 << 62, 0] {
                let mut bytes = image.changed(image.l2(0), 8, target | flag);
                if image.header.extended_l2 {
                    let allocated = if flag == 0 && target != 0 { u64::from(u32::MAX) } else { 0 };
                    bytes[image.l2(0) as usize + 8..][..8].copy_from_slice(&allocated.to_be_bytes());
                }
                let (storage, disk) = image.open(&bytes, true).unwrap();
                let first = ByteRange::at(0, image.cluster());
                disk.discard(first).unwrap();
                disk.write_zeroes(first, ZeroFlags::MAY_UNMAP).unwrap();
                disk.flush().unwrap();
                drop(disk);
                let after = storage.to_vec();
                let size = (image.cluster() as usize).min(512);
                let at = target as usize;
                assert!(after[at..at + size] == bytes[at..at + size], "{}: {target:#x}", image.name);
            }
        }
    }
}

/// A guest cluster mapped onto metadata must never be written there: a guest could rewrite the image's own
/// tables.
#[test]
fn writes_onto_metadata_are_refused_and_mark_the_image() {
    for image in Image::all().into_iter().filter(|image| image.data.is_none()) {
        let refcount_block = image.word(image.header.refcount_table_offset);
        // Host offset 0 says "nothing here": no entry can name the header.
        let targets = [
            (MetadataKind::RefcountTable, image.header.refcount_table_offset),
            (MetadataKind::RefcountBlock, refcount_block),
            (MetadataKind::ActiveL1, image.header.l1_offset),
            (MetadataKind::ActiveL2, image.l2(0)),
        ];
        for (what, target) in targets {
            let mut bytes = image.changed(image.l2(0), 8, target | 1 << 63);
            if image.header.extended_l2 {
                bytes[image.l2(0) as usize + 8..][..8].copy_from_slice(&0xffff_ffffu64.to_be_bytes());
            }
            let (storage, disk) = image.open(&bytes, true).unwrap();
            let error = disk.write_at(&[0x5a; 100], 0, WriteFlags::NONE).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{}: {what}: {error}", image.name);
            assert_eq!(Damage::of(&error), Some(Damage::Overlap(what)), "{}: {what}: {error}", image.name);
            let again = disk.write_at(&[0x5a; 100], 250_000, WriteFlags::NONE).unwrap_err();
            assert_eq!(again.kind(), ErrorKind::Poisoned, "{}: {what}: {again}", image.name);
            drop(disk);
            let after = storage.to_vec();
            if image.header.version == 3 {
                assert!(Header::read(&*storage).unwrap().is_corrupt(), "{}: {what}", image.name);
                bytes[79] |= 2;
            }
            assert!(after == bytes, "{}: {what}: something was written", image.name);
        }
    }
}
