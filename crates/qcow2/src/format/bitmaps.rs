//! The directory of persistent bitmaps, and the entries of their tables: parsed and encoded. The bits are
//! read and written elsewhere (`crate::bitmaps`).
//!
//! `info`, the check and the open image call this.

use blockmirror_block::Storage;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::bitmap_name::BitmapName;
use super::extension::BitmapsExtension;
use crate::error::{Error, Result};
use crate::limits;
use crate::offset::{ClusterSize, HostOffset};

const FLAG_IN_USE: u32 = 1 << 0;
const FLAG_AUTO: u32 = 1 << 1;
/// Extra data may be ignored by who does not know it.
const FLAG_EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
const FLAGS_KNOWN: u32 = FLAG_IN_USE | FLAG_AUTO | FLAG_EXTRA_DATA_COMPATIBLE;
/// The only type of bitmap there is: one that tracks writes.
const TYPE_TRACKING: u8 = 1;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// In a table entry without an offset: all bits are set.
const ALL_SET: u64 = 1;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    table_offset: U64,
    table_size: U32,
    flags: U32,
    bitmap_type: u8,
    granularity_bits: u8,
    name_size: U16,
    extra_data_size: U32,
}

const FIXED: u64 = size_of::<RawEntry>() as u64;

/// A persistent bitmap, as its directory entry describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct BitmapEntry {
    /// Its name, unique in the image.
    pub name: BitmapName,
    #[cfg_attr(feature = "serde", serde(skip))]
    pub(crate) extra_data_compatible: bool,
    /// Guest bytes per bit.
    pub granularity: u64,
    /// Whether it was in use and was not stored again: its bits are not to be trusted.
    pub in_use: bool,
    /// Whether it is to be loaded and to track writes whenever the image is opened for writing.
    pub auto: bool,
    /// Where its table starts, as declared; checked where that table is read.
    pub table_offset: u64,
    /// Entries of its table, as declared.
    pub table_entries: u32,
}

impl BitmapEntry {
    /// A new one that has no table yet.
    pub(crate) fn new(name: &str, granularity: u64, auto: bool) -> Self {
        Self {
            name: name.into(),
            extra_data_compatible: false,
            granularity,
            in_use: false,
            auto,
            table_offset: 0,
            table_entries: 0,
        }
    }

    /// Appends the entry as it is to stand in the directory, padded to 8 bytes; with the mark *in use* if it
    /// is to be marked.
    fn append(&self, in_use: bool, out: &mut Vec<u8>) {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(in_use, FLAG_IN_USE)
            | flag(self.auto, FLAG_AUTO)
            | flag(self.extra_data_compatible, FLAG_EXTRA_DATA_COMPATIBLE);
        let raw = RawEntry {
            table_offset: self.table_offset.into(),
            table_size: self.table_entries.into(),
            flags: flags.into(),
            bitmap_type: TYPE_TRACKING,
            // A power of two of at most 2^31.
            granularity_bits: self.granularity.trailing_zeros() as u8,
            // At most 1023 bytes.
            name_size: (self.name.as_bytes().len() as u16).into(),
            extra_data_size: 0.into(),
        };
        out.extend(raw.as_bytes());
        out.extend(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// The directory of `entries`, each of which is marked as in use or not.
pub(crate) fn encode_directory<'a>(entries: impl IntoIterator<Item = (&'a BitmapEntry, bool)>) -> Vec<u8> {
    let mut out = Vec::new();
    entries.into_iter().for_each(|(entry, in_use)| entry.append(in_use, &mut out));
    out
}

/// What an entry of a bitmap's table says of the bits in one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableEntry {
    /// All are clear: they take no cluster.
    Clear,
    /// All are set: they take no cluster.
    Set,
    /// They lie in the cluster at this offset.
    Stored(HostOffset),
    /// It makes no sense.
    Invalid,
}

impl TableEntry {
    pub(crate) fn parse(word: u64, cluster: ClusterSize) -> Self {
        let offset = HostOffset(word & OFFSET_MASK);
        if word & !(OFFSET_MASK | ALL_SET) != 0 || cluster.within(offset) != 0 {
            return Self::Invalid;
        }
        match (offset.0, word & ALL_SET) {
            (0, 0) => Self::Clear,
            (0, _) => Self::Set,
            (_, 0) => Self::Stored(offset),
            _ => Self::Invalid,
        }
    }

    /// The word in the table; of one that makes no sense, that of clear bits.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Clear | Self::Invalid => 0,
            Self::Set => ALL_SET,
            Self::Stored(offset) => offset.0,
        }
    }
}

/// Reads the bitmap directory entry by entry. Ends after the first error.
#[derive(Debug)]
pub struct Bitmaps<'a> {
    storage: &'a dyn Storage,
    offset: u64,
    end: u64,
    index: u32,
    count: u32,
}

impl<'a> Bitmaps<'a> {
    /// The bitmaps of the image in `storage`, whose header has `extension`.
    ///
    /// # Errors
    /// [`Error::TableEntry`] if the directory reaches past the end of the file.
    pub fn new(storage: &'a dyn Storage, extension: &BitmapsExtension) -> Result<Self> {
        let offset = extension.directory_offset;
        // The header's parser has checked that this is below 2^56.
        let end = offset + extension.directory_size;
        let out = Self { storage, offset, end, index: 0, count: extension.count };
        let file_len = storage.len()?;
        if end > file_len {
            return Err(out.damaged(format!("the directory reaches past the end of the file at {file_len}")));
        }
        Ok(out)
    }

    /// Where the next entry starts: after the last one, the end of the directory.
    pub(crate) fn next_offset(&self) -> u64 {
        self.offset
    }

    fn read_entry(&mut self) -> Result<BitmapEntry> {
        let mut fixed = [0; FIXED as usize];
        self.check_room(FIXED)?;
        self.storage.read_at(&mut fixed, self.offset)?;
        let raw = RawEntry::read_from_bytes(&fixed)
            .map_err(|_| self.damaged("the fixed part cannot be read".into()))?;
        let (flags, bits) = (raw.flags.get(), raw.granularity_bits);
        let name_len = usize::from(raw.name_size.get());
        let problem = if raw.bitmap_type != TYPE_TRACKING {
            Some(format!("type {} is not known, only 1 is", raw.bitmap_type))
        } else if flags & !FLAGS_KNOWN != 0 {
            Some(format!("flags {flags:#x} have reserved bits"))
        } else if !limits::BITMAP_GRANULARITY_BITS.contains(&bits) {
            Some(format!("a granularity of 2^{bits} bytes, 2^9 to 2^31 is allowed"))
        } else if !(1..=limits::MAX_BITMAP_NAME).contains(&name_len) {
            Some(format!("a name of {name_len} bytes, 1 to {} are allowed", limits::MAX_BITMAP_NAME))
        } else if raw.extra_data_size.get() != 0 {
            Some(format!("{} bytes of extra data, none is known", raw.extra_data_size.get()))
        } else {
            None
        };
        if let Some(problem) = problem {
            return Err(self.damaged(problem));
        }
        let mut name = vec![0; name_len];
        self.check_room(FIXED + name_len as u64)?;
        self.storage.read_at(&mut name, self.offset + FIXED)?;
        self.offset = (self.offset + FIXED + name_len as u64).next_multiple_of(8);
        self.index += 1;
        Ok(BitmapEntry {
            name: BitmapName::new(name),
            extra_data_compatible: flags & FLAG_EXTRA_DATA_COMPATIBLE != 0,
            granularity: 1 << bits,
            in_use: flags & FLAG_IN_USE != 0,
            auto: flags & FLAG_AUTO != 0,
            table_offset: raw.table_offset.get(),
            table_entries: raw.table_size.get(),
        })
    }

    fn check_room(&self, len: u64) -> Result<()> {
        if self.offset + len > self.end {
            return Err(self.damaged(format!("it reaches past the end of the directory at {}", self.end)));
        }
        Ok(())
    }

    fn damaged(&self, problem: String) -> Error {
        Error::TableEntry { table: "bitmap directory", index: self.index, offset: self.offset, problem }
    }
}

impl Iterator for Bitmaps<'_> {
    type Item = Result<BitmapEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.index >= self.count {
            return None;
        }
        let entry = self.read_entry();
        if entry.is_err() {
            self.index = self.count;
        }
        Some(entry)
    }
}
