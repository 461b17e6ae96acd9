//! L1 and L2 table entries, decoded and encoded. Pure: words in, typed values out.
//!
//! An image without extended L2 entries is treated as having one subcluster per cluster, so that every rule
//! above this file is written once, in subclusters. Reserved bits are ignored on reading, as QEMU does.

use crate::offset::{ClusterSize, GuestOffset, HostOffset};

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const L1_RESERVED: u64 = !(OFFSET_MASK | COPIED);
/// Of an entry that is not compressed. Bit 0 is reserved too in extended entries, but no reader minds it.
const L2_RESERVED: u64 = !(OFFSET_MASK | COPIED | COMPRESSED | ZERO);

/// An L1 entry: where an L2 table lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// An entry for a table at `offset` whose refcount is exactly one.
    pub const fn owned(offset: HostOffset) -> Self {
        Self(offset.0 | COPIED)
    }

    /// Where the L2 table is, if there is one.
    pub const fn table(self) -> Option<HostOffset> {
        match self.0 & OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset(offset)),
        }
    }

    /// Whether the table's refcount is exactly one, so that it may be changed in place.
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same entry with its COPIED flag as given.
    pub(crate) const fn with_copied(self, copied: bool) -> Self {
        Self(self.0 & !COPIED | if copied { COPIED } else { 0 })
    }

    /// The same entry without reserved bits; zero if it has no table.
    pub(crate) const fn cleaned(self) -> Self {
        if self.table().is_none() { Self(0) } else { Self(self.0 & !L1_RESERVED) }
    }
}

/// How L2 entries of one image are laid out and read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EntryFormat {
    /// The cluster size.
    pub cluster: ClusterSize,
    /// 16-byte entries with 32 subclusters.
    pub extended: bool,
    /// Whether the zero flag exists (version 3).
    pub has_zero: bool,
    /// Guest data lies in an external file at its guest offset.
    pub external_data: bool,
}

/// Why an L2 entry makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// The host offset is not a multiple of the cluster size.
    #[error("host offset {0:#x} is not aligned to the cluster size")]
    Misaligned(u64),
    /// The zero flag in an image whose version has none.
    #[error("zero flag in a version 2 image")]
    ZeroInV2,
    /// A subcluster is both allocated and zero.
    #[error("subclusters {0:#010x} are both allocated and zero")]
    AllocatedAndZero(u32),
    /// Subclusters are allocated but the entry has no host cluster.
    #[error("subclusters {0:#010x} are allocated without a host cluster")]
    AllocatedNowhere(u32),
    /// A compressed cluster where the image cannot have one.
    #[error("compressed cluster in an image with an external data file")]
    CompressedExternal,
    /// With an external data file, a cluster must lie at its own guest offset.
    #[error("host offset {0:#x} differs from the guest offset in an image with an external data file")]
    NotAtGuestOffset(u64),
}

/// One guest cluster, decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Not compressed: any mix of allocated, zero and unallocated subclusters.
    Plain(PlainEntry),
    /// Stored compressed.
    Compressed(CompressedRun),
}

/// An uncompressed guest cluster. Bit n of the masks speaks of subcluster n.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PlainEntry {
    /// The host cluster, if one is reserved.
    pub host: Option<HostOffset>,
    /// Whether that cluster's refcount is exactly one.
    pub copied: bool,
    /// Subclusters whose data lies in the host cluster.
    pub allocated: u32,
    /// Subclusters that read as zeros.
    pub zero: u32,
}

/// Where compressed data lies: an unaligned byte run in the image file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CompressedRun {
    /// First byte.
    pub offset: HostOffset,
    /// Bytes up to the end of its last 512-byte sector: the stream may end earlier.
    pub len: u64,
}

impl CompressedRun {
    /// The sectors of a stream of `len` bytes, more than none, at `offset`.
    pub(crate) const fn of(offset: HostOffset, len: u64) -> Self {
        let within = offset.0 % 512;
        Self { offset, len: (within + len).next_multiple_of(512) - within }
    }
}

impl Entry {
    /// An entry that maps nothing.
    pub const UNALLOCATED: Self =
        Self::Plain(PlainEntry { host: None, copied: false, allocated: 0, zero: 0 });
}

impl EntryFormat {
    /// Bytes of one L2 entry.
    pub const fn entry_size(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Subclusters in a cluster: 32, or 1 without extended L2 entries.
    pub const fn subclusters(self) -> u32 {
        if self.extended { 32 } else { 1 }
    }

    /// Bytes of a subcluster.
    pub const fn subcluster_size(self) -> u64 {
        self.cluster.bytes() / self.subclusters() as u64
    }

    /// The mask with every subcluster set.
    pub const fn all(self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
    }

    /// The mask of the subclusters that the bytes `from..to` of a cluster touch.
    pub const fn touched(self, from: u64, to: u64) -> u32 {
        if from >= to {
            return 0;
        }
        let size = self.subcluster_size();
        Self::mask(from / size, to.div_ceil(size))
    }

    /// The mask of the subclusters that the bytes `from..to` of a cluster cover whole.
    pub const fn covered(self, from: u64, to: u64) -> u32 {
        let size = self.subcluster_size();
        let (first, end) = (from.div_ceil(size), to / size);
        if first >= end { 0 } else { Self::mask(first, end) }
    }

    const fn mask(first: u64, end: u64) -> u32 {
        // `first < end <= 32`: the callers' offsets lie within one cluster.
        (((1u64 << end) - 1) & !((1u64 << first) - 1)) as u32
    }

    /// Decodes the entry of the guest cluster that starts at `guest`; `word1` is the subcluster bitmap,
    /// ignored unless extended.
    pub fn decode(self, word0: u64, word1: u64, guest: GuestOffset) -> Result<Entry, EntryError> {
        if word0 & COMPRESSED != 0 {
            if self.external_data {
                return Err(EntryError::CompressedExternal);
            }
            return Ok(Entry::Compressed(self.decode_compressed(word0)));
        }
        let offset = word0 & OFFSET_MASK;
        if self.cluster.within(HostOffset(offset)) != 0 {
            return Err(EntryError::Misaligned(offset));
        }
        let copied = word0 & COPIED != 0;
        // In an external data file guest cluster 0 lies at host offset 0; the COPIED bit tells it from
        // "none".
        let host =
            if offset != 0 || (self.external_data && copied) { Some(HostOffset(offset)) } else { None };
        if self.external_data && host.is_some() && offset != guest.0 {
            return Err(EntryError::NotAtGuestOffset(offset));
        }
        let (allocated, zero) = if self.extended {
            // Truncation splits the bitmap into its halves.
            let (allocated, zero) = (word1 as u32, (word1 >> 32) as u32);
            if allocated & zero != 0 {
                return Err(EntryError::AllocatedAndZero(allocated & zero));
            }
            if allocated != 0 && host.is_none() {
                return Err(EntryError::AllocatedNowhere(allocated));
            }
            (allocated, zero)
        } else if word0 & ZERO != 0 {
            if !self.has_zero {
                return Err(EntryError::ZeroInV2);
            }
            (0, 1)
        } else {
            (u32::from(host.is_some()), 0)
        };
        Ok(Entry::Plain(PlainEntry { host, copied, allocated, zero }))
    }

    /// The host offset of an entry that is not compressed, aligned or not.
    pub(crate) const fn host_of(self, word0: u64) -> HostOffset {
        HostOffset(word0 & OFFSET_MASK)
    }

    /// The host offset of an entry, aligned or not, if it is not compressed and has one.
    pub(crate) const fn mapped_host(self, word0: u64) -> Option<HostOffset> {
        let offset = self.host_of(word0);
        let is_there = offset.0 != 0 || (self.external_data && self.is_copied(word0));
        if word0 & COMPRESSED == 0 && is_there { Some(offset) } else { None }
    }

    /// Whether the entry is that of a compressed cluster.
    pub(crate) const fn is_compressed(self, word0: u64) -> bool {
        word0 & COMPRESSED != 0
    }

    /// The bits of the first word that are not part of the host offset, if it is not compressed.
    pub(crate) const fn flags(self, word0: u64) -> u64 {
        word0 & !OFFSET_MASK
    }

    /// The COPIED flag of an entry.
    pub(crate) const fn is_copied(self, word0: u64) -> bool {
        word0 & COPIED != 0
    }

    /// The first word of an entry with its COPIED flag as given.
    pub(crate) const fn with_copied(self, word0: u64, copied: bool) -> u64 {
        word0 & !COPIED | if copied { COPIED } else { 0 }
    }

    /// The bits of the first word that must be zero and are not. A compressed entry has none.
    pub(crate) const fn reserved(self, word0: u64) -> u64 {
        if word0 & COMPRESSED != 0 { 0 } else { word0 & L2_RESERVED }
    }

    /// Bits that a compressed entry has for the offset.
    const fn compressed_offset_bits(self) -> u32 {
        62 - (self.cluster.bits() - 8)
    }

    /// Whether an entry can say where `run` lies, and how long it is.
    pub(crate) const fn holds_compressed(self, run: CompressedRun) -> bool {
        let x = self.compressed_offset_bits();
        let sectors = (run.offset.0 % 512 + run.len) / 512 - 1;
        run.offset.0 >> x == 0 && sectors >> (62 - x) == 0
    }

    /// Encodes the entry of a compressed cluster that an entry can hold; the second word is zero.
    pub(crate) const fn encode_compressed(self, run: CompressedRun) -> u64 {
        let sectors = (run.offset.0 % 512 + run.len) / 512 - 1;
        COMPRESSED | sectors << self.compressed_offset_bits() | run.offset.0
    }

    fn decode_compressed(self, word: u64) -> CompressedRun {
        let x = self.compressed_offset_bits();
        let offset = word & ((1 << x) - 1);
        let sectors = (word >> x) & ((1 << (62 - x)) - 1);
        // The first sector is the one `offset` lies in; the count is of *additional* ones.
        CompressedRun { offset: HostOffset(offset), len: (sectors + 1) * 512 - (offset & 511) }
    }

    /// Encodes an uncompressed entry into its two words.
    ///
    /// A cluster whose subclusters are all unallocated but which keeps its host cluster can only be said with
    /// extended entries; without, callers never build one.
    pub const fn encode(self, entry: PlainEntry) -> (u64, u64) {
        let mut word = match entry.host {
            Some(HostOffset(offset)) => offset | if entry.copied { COPIED } else { 0 },
            None => 0,
        };
        if self.extended {
            return (word, (entry.zero as u64) << 32 | entry.allocated as u64);
        }
        if entry.zero != 0 {
            word |= ZERO;
        }
        (word, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST_0: GuestOffset = GuestOffset(0);

    fn format(bits: u32, extended: bool) -> EntryFormat {
        EntryFormat {
            cluster: ClusterSize::from_bits(bits).unwrap(),
            extended,
            has_zero: true,
            external_data: false,
        }
    }

    #[test]
    fn plain_entries_round_trip() {
        let f = format(16, false);
        for entry in [
            PlainEntry::default(),
            PlainEntry { zero: 1, ..PlainEntry::default() },
            PlainEntry { host: Some(HostOffset(0x50000)), copied: true, allocated: 1, zero: 0 },
            PlainEntry { host: Some(HostOffset(0x50000)), copied: true, allocated: 0, zero: 1 },
            PlainEntry { host: Some(HostOffset(0x50000)), copied: false, allocated: 1, zero: 0 },
        ] {
            let (a, b) = f.encode(entry);
            assert_eq!(f.decode(a, b, GUEST_0), Ok(Entry::Plain(entry)));
        }
    }

    #[test]
    fn subcluster_masks() {
        let f = format(16, true);
        assert_eq!(f.subcluster_size(), 2048);
        assert_eq!(f.touched(0, 65536), u32::MAX);
        assert_eq!(f.touched(2047, 2049), 0b11);
        assert_eq!(f.covered(2047, 2049), 0);
        assert_eq!(f.covered(2048, 6143), 0b10);
        assert_eq!(f.touched(5, 5), 0);
        assert_eq!(format(16, false).touched(1, 2), 1);
        assert_eq!(format(16, false).covered(1, 65536), 0);
    }

    #[test]
    fn nonsense_is_named() {
        let f = format(16, false);
        assert_eq!(f.decode(0x200, 0, GUEST_0), Err(EntryError::Misaligned(0x200)));
        assert_eq!(EntryFormat { has_zero: false, ..f }.decode(1, 0, GUEST_0), Err(EntryError::ZeroInV2));
        let x = format(16, true);
        assert_eq!(x.decode(0x10000, 1 | 1 << 32, GUEST_0), Err(EntryError::AllocatedAndZero(1)));
        assert_eq!(x.decode(0, 2, GUEST_0), Err(EntryError::AllocatedNowhere(2)));
        let e = EntryFormat { external_data: true, ..f };
        assert_eq!(e.decode(0x10000, 0, GUEST_0), Err(EntryError::NotAtGuestOffset(0x10000)));
        assert_eq!(e.decode(COMPRESSED, 0, GUEST_0), Err(EntryError::CompressedExternal));
    }

    /// Testing `offset == 0` for "unallocated" loses guest cluster 0 of images with a data file.
    #[test]
    fn guest_cluster_zero_in_a_data_file() {
        let f = EntryFormat { external_data: true, ..format(16, false) };
        let Ok(Entry::Plain(e)) = f.decode(COPIED, 0, GUEST_0) else { panic!("not plain") };
        assert_eq!((e.host, e.allocated), (Some(HostOffset(0)), 1));
        assert_eq!(f.decode(0, 0, GUEST_0), Ok(Entry::UNALLOCATED));
    }

    #[test]
    fn compressed_runs_end_at_a_sector() {
        // 64 KiB clusters: x = 54.
        let f = format(16, false);
        let word = COMPRESSED | 3 << 54 | 0x50123;
        assert_eq!(
            f.decode(word, 0, GUEST_0),
            Ok(Entry::Compressed(CompressedRun { offset: HostOffset(0x50123), len: 4 * 512 - 0x123 }))
        );
    }

    #[test]
    fn compressed_entries_round_trip() {
        for bits in ClusterSize::MIN_BITS..=ClusterSize::MAX_BITS {
            let f = format(bits, false);
            for at in [0x50000, 0x50001, 0x501ff, 0x50200] {
                for len in [1, 511, 512, 513, f.cluster.bytes() - 1] {
                    let run = CompressedRun::of(HostOffset(at), len);
                    assert!(run.len >= len && run.len < len + 512 && (at + run.len).is_multiple_of(512));
                    assert!(f.holds_compressed(run));
                    let word = f.encode_compressed(run);
                    assert_eq!(f.decode(word, 0, GUEST_0), Ok(Entry::Compressed(run)), "{bits} {at} {len}");
                }
            }
            let far = CompressedRun::of(HostOffset(1 << f.compressed_offset_bits()), 1);
            assert!(!f.holds_compressed(far));
        }
    }
}
