//! The header: what a log is of, and which area is in use.
//!
//! Read and written by [`crate::log`]. There are two, in sectors of their own; the one with the higher
//! generation counts. A writer changes the other one.

use blockmirror_block::Storage;

use crate::crc::crc32c;
use crate::error::Error;
use crate::identity::MAX_IDENTITY;

/// The first bytes of a header. As in PNG, a transfer that changes line ends breaks them.
const MAGIC: [u8; 8] = *b"BMCKPT\r\n";
/// Of a log without digests, and of one that has them.
const VERSIONS: [u32; 2] = [1, 2];
/// A marked region has been copied.
pub(crate) const KIND_COPY: u32 = 1;
/// A marked region may differ: the log of a live job.
pub(crate) const KIND_LIVE: u32 = 2;
/// Bytes of a header, a sector, which the disk writes whole.
const HEADER: usize = 512;
/// What lies in a block of its own: a write of one does not touch the next.
pub(crate) const BLOCK: u64 = 4096;
/// Bytes of a digest.
pub(crate) const DIGEST: usize = 16;
/// Bytes of an area after its snapshot.
const RECORDS: u64 = 128 << 10;

/// The most regions of a disk: 2^20, so that a snapshot takes at most 128 KiB.
pub const MAX_REGIONS: u64 = 1 << 20;

/// The flag of a copy that is to be verified.
pub(crate) const VERIFY: u32 = 1;

/// No log has so many snapshots.
const MAX_GENERATION: u64 = 1 << 62;

/// The smallest region, 1 MiB.
const MIN_REGION: u64 = 1 << 20;

/// The size of regions of a disk of `len` bytes: 1 MiB, or the power of two from there on that makes at most
/// [`MAX_REGIONS`] of it; and no less than `unit`, a power of two.
pub fn region_size(len: u64, unit: u64) -> u64 {
    let least = len.div_ceil(MAX_REGIONS).max(MIN_REGION).max(unit);
    least.checked_next_power_of_two().unwrap_or(1 << 63)
}

/// The fields of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// What a mark means.
    pub(crate) kind: u32,
    /// Random: what an earlier log left in the same storage is no part of this one.
    pub(crate) id: [u8; 16],
    /// Snapshots that were taken; its lowest bit is the number of the area in use, and of the header.
    pub(crate) generation: u64,
    /// Length of the disk.
    pub(crate) len: u64,
    pub(crate) region: u64,
    pub(crate) identity_len: u32,
    pub(crate) identity_crc: u32,
    /// Whether each marked region has a digest.
    pub(crate) digests: bool,
    /// Bits of [`VERIFY`].
    pub(crate) flags: u32,
}

impl Header {
    /// Whether the format can hold such regions.
    pub(crate) fn is_possible(&self) -> bool {
        self.region.is_power_of_two()
            && self.region >= 512
            && self.regions() <= MAX_REGIONS
            && self.identity_len as usize <= MAX_IDENTITY
            && self.generation < MAX_GENERATION
            && (self.flags == 0 || (self.flags == VERIFY && self.kind == KIND_COPY))
    }

    /// How many regions the disk has.
    pub(crate) fn regions(&self) -> u64 {
        self.len.div_ceil(self.region)
    }

    /// Bytes of the bitmap in a snapshot, whole words.
    pub(crate) fn bitmap_len(&self) -> usize {
        // At most 128 KiB.
        self.regions().div_ceil(64) as usize * 8
    }

    pub(crate) fn identity_at() -> u64 {
        2 * BLOCK
    }

    /// Bytes of an area.
    pub(crate) fn area_len(&self) -> u64 {
        (self.bitmap_len() as u64).next_multiple_of(BLOCK) + RECORDS
    }

    /// Where the area of `generation` begins.
    pub(crate) fn area_at(&self, generation: u64) -> u64 {
        let first = Self::identity_at() + u64::from(self.identity_len).next_multiple_of(BLOCK);
        first + (generation & 1) * self.area_len()
    }

    /// Where the table of digests begins.
    pub(crate) fn table_at(&self) -> u64 {
        self.area_at(1) + self.area_len()
    }

    /// Bytes of the whole log.
    pub(crate) fn log_len(&self) -> u64 {
        let table = if self.digests { self.regions() * DIGEST as u64 } else { 0 };
        self.table_at() + table.next_multiple_of(BLOCK)
    }

    fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut at = 0;
        let mut put = |part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        };
        put(&MAGIC);
        put(&VERSIONS[usize::from(self.digests)].to_be_bytes());
        put(&self.kind.to_be_bytes());
        put(&self.id);
        put(&self.generation.to_be_bytes());
        put(&self.len.to_be_bytes());
        put(&self.region.to_be_bytes());
        put(&self.identity_len.to_be_bytes());
        put(&self.identity_crc.to_be_bytes());
        put(&self.flags.to_be_bytes());
        let crc = crc32c(&[&bytes[..HEADER - 4]]);
        bytes[HEADER - 4..].copy_from_slice(&crc.to_be_bytes());
        bytes
    }

    /// The header in `bytes`, whether or not the format can hold what it says. `None` if it is none; a
    /// version if it is one of another.
    fn parse(bytes: &[u8; HEADER]) -> Option<Result<Self, u32>> {
        let u32_at = |at: usize| bytes[at..].first_chunk().map_or(0, |four| u32::from_be_bytes(*four));
        let u64_at = |at: usize| bytes[at..].first_chunk().map_or(0, |eight| u64::from_be_bytes(*eight));
        if bytes[..8] != MAGIC || crc32c(&[&bytes[..HEADER - 4]]) != u32_at(HEADER - 4) {
            return None;
        }
        let digests = u32_at(8) == VERSIONS[1];
        if !VERSIONS.contains(&u32_at(8)) || (digests && u32_at(12) != KIND_COPY) {
            return Some(Err(u32_at(8)));
        }
        Some(Ok(Self {
            kind: u32_at(12),
            id: *bytes[16..].first_chunk()?,
            generation: u64_at(32),
            len: u64_at(40),
            region: u64_at(48),
            identity_len: u32_at(56),
            identity_crc: u32_at(60),
            flags: u32_at(64),
            digests,
        }))
    }

    /// Writes what an interrupted creation is known by.
    pub(crate) fn begin(storage: &dyn Storage) -> Result<(), Error> {
        Ok(storage.write_at(&MAGIC, 0)?)
    }

    /// Writes it to its place.
    pub(crate) fn write(self, storage: &dyn Storage) -> Result<(), Error> {
        Ok(storage.write_at(&self.to_bytes(), (self.generation & 1) * BLOCK)?)
    }

    /// Reads the header that counts, of a log of this `kind`.
    pub(crate) fn read(storage: &dyn Storage, kind: u32) -> Result<Self, Error> {
        let name = || storage.name().to_owned();
        let mut found = None;
        let mut generations = [None, None];
        let (mut unreadable, mut second_is_zero) = (false, true);
        for slot in [0, 1] {
            let mut bytes = [0; HEADER];
            storage.read_at(&mut bytes, slot * BLOCK)?;
            second_is_zero = bytes == [0; HEADER];
            match Self::parse(&bytes) {
                None => unreadable |= bytes != [0; HEADER],
                Some(Err(version)) => return Err(Error::Version { name: name(), version }),
                Some(Ok(header)) if header.kind != kind => {
                    return Err(Error::OtherKind { name: name(), kind: header.kind });
                }
                Some(Ok(header)) if header.generation & 1 != slot => {
                    return Err(Error::Damaged { name: name(), what: "a header is in the other's place" });
                }
                Some(Ok(header)) => {
                    generations[slot as usize] = Some(header.generation);
                    found =
                        found.filter(|other: &Self| other.generation > header.generation).or(Some(header));
                }
            }
        }
        let Some(header) = found else {
            let mut first = [0; HEADER];
            storage.read_at(&mut first, 0)?;
            let (magic, rest) = first.split_at(MAGIC.len());
            // An interrupted creation leaves no more than that. One that has lost its headers may have ended.
            let is_bare = rest.iter().all(|byte| *byte == 0) && second_is_zero;
            return Err(match magic == MAGIC {
                true if kind == KIND_LIVE && !is_bare => Error::Damaged { name: name(), what: "a header" },
                true => Error::NotBegun { name: name() },
                false => Error::NoCheckpoint { name: name() },
            });
        };
        if !header.is_possible() {
            return Err(Error::Damaged { name: name(), what: "the header's figures make no sense" });
        }
        // Of a copy an older header says less than is so, of a live job it would say more. A disk writes a
        // header whole, or not.
        let before = header.generation.checked_sub(1);
        if kind == KIND_LIVE
            && (unreadable || before.is_some_and(|before| !generations.contains(&Some(before))))
        {
            return Err(Error::Damaged { name: name(), what: "a header" });
        }
        Ok(header)
    }
}
