//! Images as QEMU makes them, and their fields by offset: a reader of its own, so that what is damaged does
//! not depend on the code that is to find it.

use std::fs;
use std::path::{Path, PathBuf};

use blockmirror_testing::qemu::{Qemu, run};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Behind the end of each file here.
pub(crate) const FAR: u64 = 0x1000_0000;

/// The kinds of image that are damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// 18 clusters in two runs.
    Plain,
    /// The same in version 2.
    V2,
    /// Two L2 tables.
    TwoTables,
    /// A disk that ends inside its only L2 table.
    Short,
    /// 16 compressed clusters.
    Compressed,
    /// Subclusters.
    Extended,
    /// The same, with 16 compressed clusters.
    ExtendedCompressed,
    /// Guest data in another file.
    DataFile,
    /// Refcounts of one bit.
    Narrow,
    /// Clusters of 512 bytes: several tables of each kind.
    Small,
    /// Two internal snapshots.
    Snapshots,
    /// Two persistent bitmaps.
    Bitmaps,
}

impl Kind {
    /// Options and size for `qemu-img create`, and what `qemu-io` does then.
    fn recipe(self) -> (&'static str, &'static str, &'static [&'static str]) {
        const TWO_RUNS: &[&str] = &["write -q -P 1 0 1M", "write -q -P 2 4M 128k"];
        match self {
            Self::Plain | Self::Snapshots => ("compat=1.1", "8M", TWO_RUNS),
            Self::Bitmaps => ("compat=1.1", "8M", TWO_RUNS),
            Self::V2 => ("compat=0.10", "8M", TWO_RUNS),
            Self::TwoTables => ("compat=1.1", "2G", &["write -q -P 1 0 64k", "write -q -P 1 512M 64k"]),
            Self::Short => ("compat=1.1", "1M", &["write -q -P 1 0 1M"]),
            Self::Compressed => ("compat=1.1", "8M", &["write -q -c -P 7 0 1M"]),
            Self::Extended => (
                "extended_l2=on",
                "8M",
                &["write -q -P 1 0 1M", "write -q -P 2 4M 128k", "write -q -P 3 6M 2k"],
            ),
            Self::ExtendedCompressed => (
                "extended_l2=on",
                "8M",
                &["write -q -c -P 7 0 1M", "write -q -P 2 4M 128k", "write -q -P 3 6M 2k"],
            ),
            Self::DataFile => ("data_file=data.raw", "8M", TWO_RUNS),
            Self::Narrow => ("refcount_bits=1", "8M", TWO_RUNS),
            Self::Small => ("cluster_size=512", "1M", &["write -q -P 1 0 300k", "write -q -P 2 500k 20k"]),
        }
    }

    /// What of the disk has no place in the file: start and length.
    pub(crate) fn unallocated(self) -> (u64, u64) {
        match self {
            Self::Short => (0, 0),
            Self::Small => (600 << 10, 400 << 10),
            _ => (2 << 20, 2 << 20),
        }
    }

    /// Makes the image in `dir`.
    pub(crate) fn make(self, qemu: Qemu, dir: &Path) -> PathBuf {
        let path = dir.join("base.qcow2");
        let (options, size, script) = self.recipe();
        qemu.img_in(dir, ["create", "-q", "-f", "qcow2", "-o", options, "base.qcow2", size]).unwrap();
        // QEMU looks for a data file in the folder where it runs.
        let io = |line: &str| drop(run("qemu-io", dir, ["-f", "qcow2", "-c", line, "base.qcow2"]).unwrap());
        script.iter().for_each(|line| io(line));
        let more: &[&str] = match self {
            Self::Snapshots | Self::Bitmaps => &["0", "1"],
            _ => &[],
        };
        for name in more {
            let words = match self {
                Self::Snapshots => ["snapshot", "-c", name, "base.qcow2"],
                _ => ["bitmap", "--add", "base.qcow2", name],
            };
            qemu.img_in(dir, words).unwrap();
            io("write -q -P 9 1M 64k");
        }
        path
    }
}

/// An image as bytes.
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Bytes {
    pub(crate) fn read(path: &Path) -> Self {
        Self(fs::read(path).unwrap())
    }

    fn number(&self, at: u64, len: usize) -> u64 {
        let at = at as usize;
        self.0.get(at..at + len).unwrap_or_default().iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
    }

    pub(crate) fn get(&self, at: u64) -> u64 {
        self.number(at, 8)
    }

    pub(crate) fn set(&mut self, at: u64, value: u64) {
        self.set_len(at, value, 8);
    }

    pub(crate) fn set_len(&mut self, at: u64, value: u64, len: usize) {
        let at = at as usize;
        self.0[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }

    /// Changes the word at `at`.
    pub(crate) fn change(&mut self, at: u64, to: impl FnOnce(u64) -> u64) {
        let was = self.get(at);
        self.set(at, to(was));
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len() as u64
    }

    /// Where the cluster behind the end of the file begins.
    pub(crate) fn end(&self) -> u64 {
        self.len().next_multiple_of(65536) | COPIED
    }

    pub(crate) fn l1(&self) -> u64 {
        self.get(40)
    }

    pub(crate) fn l2(&self) -> u64 {
        self.get(self.l1()) & OFFSET
    }

    pub(crate) fn refcount_table(&self) -> u64 {
        self.get(48)
    }

    pub(crate) fn refcount_block(&self) -> u64 {
        self.get(self.refcount_table()) & OFFSET
    }

    /// Sets the 16-bit refcount of `cluster`.
    pub(crate) fn set_refcount(&mut self, cluster: u64, to: u64) {
        self.set_len(self.refcount_block() + cluster * 2, to, 2);
    }

    /// Sets the refcount of the cluster that the entry at `at` points at.
    pub(crate) fn set_refcount_of(&mut self, at: u64, to: u64) {
        self.set_refcount((self.get(at) & OFFSET) >> 16, to);
    }

    /// The first entry of the snapshot table.
    pub(crate) fn snapshot(&self) -> u64 {
        self.get(64)
    }

    pub(crate) fn snapshot_l1(&self) -> u64 {
        self.get(self.snapshot())
    }

    pub(crate) fn snapshot_l2(&self) -> u64 {
        self.get(self.snapshot_l1()) & OFFSET
    }

    /// The data of the bitmaps extension.
    pub(crate) fn bitmaps(&self) -> u64 {
        let mut at = self.number(100, 4);
        while self.number(at, 4) != 0x2385_2875 {
            assert_ne!(self.number(at, 4), 0, "no bitmaps");
            at += 8 + self.number(at + 4, 4).next_multiple_of(8);
        }
        at + 8
    }

    pub(crate) fn bitmap_directory(&self) -> u64 {
        self.get(self.bitmaps() + 16)
    }

    pub(crate) fn bitmap_table(&self) -> u64 {
        self.get(self.bitmap_directory())
    }
}
