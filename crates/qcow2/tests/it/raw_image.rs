//! An image as bytes, by fields: a reader and writer of its own, so that what is damaged and what counts as
//! free do not depend on the code under test.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::Write;

use blockmirror_block::Storage;
use blockmirror_block::testing::MemoryStorage;
use blockmirror_qcow2::format::snapshot::Snapshots;
use blockmirror_qcow2::{Header, Repair, check, repair};
use flate2::Compression;
use flate2::write::DeflateEncoder;

pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// What is written where the refcounts say that nothing lies.
const JUNK: u8 = 0xee;

#[derive(Clone)]
pub(crate) struct RawImage(pub(crate) Vec<u8>);

impl RawImage {
    pub(crate) fn number(&self, at: u64, len: usize) -> u64 {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let bytes = self.0.get(at..at.saturating_add(len)).unwrap_or_default();
        bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
    }

    pub(crate) fn get(&self, at: u64) -> u64 {
        self.number(at, 8)
    }

    pub(crate) fn set_len(&mut self, at: u64, value: u64, len: usize) {
        let at = at as usize;
        self.0[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }

    pub(crate) fn set(&mut self, at: u64, value: u64) {
        self.set_len(at, value, 8);
    }

    pub(crate) fn change(&mut self, at: u64, to: impl FnOnce(u64) -> u64) {
        self.set(at, to(self.get(at)));
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn cluster_bits(&self) -> u64 {
        self.number(20, 4)
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits()
    }

    fn is_extended(&self) -> bool {
        self.number(4, 4) >= 3 && self.get(72) & 0x10 != 0
    }

    fn entry_size(&self) -> u64 {
        if self.is_extended() { 16 } else { 8 }
    }

    /// Where entry `index` of the L1 table lies.
    pub(crate) fn l1_at(&self, index: u64) -> u64 {
        self.get(40) + index * 8
    }

    /// Where the L2 entry of the guest cluster `guest` lies.
    pub(crate) fn l2_at(&self, guest: u64) -> u64 {
        let per_table = self.cluster() / self.entry_size();
        (self.get(self.l1_at(guest / per_table)) & OFFSET) + guest % per_table * self.entry_size()
    }

    pub(crate) fn refcount_table(&self) -> u64 {
        self.get(48)
    }

    fn refcount_bits(&self) -> u64 {
        if self.number(4, 4) >= 3 { 1 << self.number(96, 4).min(6) } else { 16 }
    }

    /// The refcount of `cluster`; none if its block lies nowhere that can be read.
    pub(crate) fn refcount(&self, cluster: u64) -> Option<u64> {
        let (bits, per_block) = (self.refcount_bits(), self.cluster() * 8 / self.refcount_bits());
        let index = cluster / per_block;
        if index * 8 >= self.number(56, 4) * self.cluster() {
            return Some(0);
        }
        let block = self.get(self.refcount_table() + index * 8);
        let is_there = block.is_multiple_of(self.cluster()) && block < self.len();
        if block != 0 && !is_there {
            return None;
        }
        let bit = cluster % per_block * bits;
        Some(match (block, bits) {
            (0, _) => 0,
            (_, 8..) => self.number(block + bit / 8, bits as usize / 8),
            _ => self.number(block + bit / 8, 1) >> (bit % 8) & ((1 << bits) - 1),
        })
    }

    /// Says that `cluster` has `count` references.
    pub(crate) fn set_refcount(&mut self, cluster: u64, count: u64) {
        let bytes = self.refcount_bits() / 8;
        let per_block = self.cluster() / bytes;
        let block = self.get(self.refcount_table() + cluster / per_block * 8);
        self.set_len(block + cluster % per_block * bytes, count, bytes as usize);
    }

    /// The image once each cluster that its refcounts call free has been written anew, as later writers may.
    pub(crate) fn free_overwritten(&self) -> Vec<u8> {
        let mut bytes = self.0.clone();
        if (9..=21).contains(&self.cluster_bits()) {
            for (cluster, data) in (0..).zip(bytes.chunks_mut(self.cluster() as usize)) {
                if self.refcount(cluster) == Some(0) {
                    data.fill(JUNK);
                }
            }
        }
        bytes
    }

    /// Compresses the guest cluster `guest` in the place that it has.
    pub(crate) fn compress(&mut self, guest: u64) {
        let (at, size) = (self.l2_at(guest), self.cluster());
        let host = self.get(at) & OFFSET;
        let data = &mut self.0[host as usize..][..size as usize];
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(data).unwrap();
        let stream = encoder.finish().unwrap();
        data.fill(0);
        data[..stream.len()].copy_from_slice(&stream);
        self.set_compressed(guest, host, (stream.len() as u64 - 1) / 512);
        if self.is_extended() {
            self.set(at + 8, 0);
        }
    }

    /// Says that `guest` lies compressed at `host`, in one sector and `more`.
    pub(crate) fn set_compressed(&mut self, guest: u64, host: u64, more: u64) {
        let x = 62 - (self.cluster_bits() - 8);
        let at = self.l2_at(guest);
        self.set(at, COMPRESSED | more << x | host);
    }

    /// Adds `len` bytes of whole clusters at the end, and returns where.
    pub(crate) fn append(&mut self, len: u64) -> u64 {
        let at = self.len().next_multiple_of(self.cluster());
        self.0.resize((at + len.next_multiple_of(self.cluster())) as usize, 0);
        at
    }

    /// Adds a copy of the clusters at `from`.
    pub(crate) fn append_copy(&mut self, from: u64, len: u64) -> u64 {
        let data = self.0[from as usize..][..len as usize].to_vec();
        let at = self.append(len);
        self.0[at as usize..][..data.len()].copy_from_slice(&data);
        at
    }

    /// Adds an internal snapshot of the disk as it is, in which the first mapped guest cluster of the first
    /// table has other contents.
    pub(crate) fn add_snapshot(&mut self) {
        let (size, step) = (self.cluster(), self.entry_size());
        let l1_entries = self.number(36, 4);
        let l1 = self.append_copy(self.get(40), l1_entries * 8);
        let l2 = self.append_copy(self.get(l1) & OFFSET, size);
        self.set(l1, l2);
        let data = self.append(size);
        self.0[data as usize..].fill(0x77);
        let mapped = (l2..l2 + size).step_by(step as usize).find(|at| self.get(*at) & COPIED != 0);
        self.set(mapped.unwrap(), data);
        let table = self.append(size);
        self.set(table, l1);
        self.set_len(table + 8, l1_entries, 4);
        self.set_len(table + 12, 0x0001_0001, 4);
        self.set_len(table + 36, 16, 4);
        self.set(table + 48, self.get(24));
        self.0[table as usize + 56..][..2].copy_from_slice(b"1a");
        self.set_len(60, 1, 4);
        self.set(64, table);
        self.settle();
    }

    /// Adds two persistent bitmaps with a table and a cluster each.
    pub(crate) fn add_bitmaps(&mut self) {
        let size = self.cluster();
        let directory = self.append(size);
        for index in 0..2 {
            let (table, data) = (self.append(size), self.append(size));
            self.0[data as usize..].fill(0x55);
            self.set(table, data);
            let at = directory + index * 32;
            self.set(at, table);
            self.set_len(at + 8, 1, 4);
            self.set_len(at + 12, 2, 4);
            self.set_len(at + 16, 0x0110_0001, 4);
            self.0[at as usize + 24] = b'a' + index as u8;
        }
        let header_end = self.number(100, 4) as usize;
        let mut extension = [0; 32];
        extension[..4].copy_from_slice(&0x2385_2875_u32.to_be_bytes());
        extension[7] = 24;
        extension[11] = 2;
        extension[16..24].copy_from_slice(&64_u64.to_be_bytes());
        extension[24..].copy_from_slice(&directory.to_be_bytes());
        self.0[header_end..size as usize].rotate_right(32);
        self.0[header_end..header_end + 32].copy_from_slice(&extension);
        self.change(88, |features| features | 1);
        self.settle();
    }

    /// Has the refcounts and COPIED flags agree with the tables, where they are: the file does not grow.
    pub(crate) fn settle(&mut self) {
        let storage = MemoryStorage::fixed(self.len());
        storage.write_at(&self.0, 0).unwrap();
        repair(&storage, Repair::All, &mut ()).unwrap();
        assert!(check(&storage, &mut ()).unwrap().is_clean());
        self.0 = storage.to_vec();
    }

    /// The image whose disk is that of the snapshot whose entry lies at `entry`.
    pub(crate) fn as_of_snapshot(&self, entry: u64) -> Vec<u8> {
        let mut image = self.clone();
        image.set(40, self.get(entry));
        image.set_len(36, self.number(entry + 8, 4), 4);
        image.set_len(60, 0, 4);
        image.0
    }

    /// Where the first entry of the snapshot table lies, if a reader finds one there.
    pub(crate) fn snapshot(&self) -> Option<u64> {
        let storage = MemoryStorage::with_contents(&self.0);
        let header = Header::read(&storage).ok()?;
        Snapshots::new(&storage, &header).ok()?.next()?.ok()?;
        Some(header.snapshots_offset)
    }
}
