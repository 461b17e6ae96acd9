//! Records: what is appended to an area.
//!
//! Written and read by [`crate::log`]. A record's CRC covers the log's id and the generation too, so that
//! what an earlier log or an earlier use of the area left is not valid.

use std::ops::Range;

use blockmirror_bitmap::ChunkBitmap;

use crate::crc::crc32c;
use crate::header::Header;

/// Bytes before the payload.
pub(crate) const HEAD: usize = 24;
/// The bitmap of all regions; the first record of an area, and no other.
pub(crate) const SNAPSHOT: u32 = 1;
/// Runs of regions that are marked.
pub(crate) const MARKS: u32 = 2;
/// Bytes of a run.
pub(crate) const RUN: usize = 8;

/// A record as bytes.
pub(crate) fn record(header: &Header, kind: u32, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&sequence.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u64).to_be_bytes());
    bytes.extend_from_slice(payload);
    let crc = crc(header, &bytes);
    bytes[..4].copy_from_slice(&crc.to_be_bytes());
    bytes
}

fn crc(header: &Header, record: &[u8]) -> u32 {
    crc32c(&[&header.id, &header.generation.to_be_bytes(), &record[4..]])
}

/// The first record of the area of `header`: all of `regions`.
pub(crate) fn snapshot(header: &Header, regions: &ChunkBitmap) -> Vec<u8> {
    let words = header.bitmap_len() as u64 / 8;
    let payload: Vec<_> = (0..words).flat_map(|index| regions.word(index).to_be_bytes()).collect();
    record(header, SNAPSHOT, 0, &payload)
}

/// A record that marks `runs`; their numbers are below [`MAX_REGIONS`](crate::MAX_REGIONS).
pub(crate) fn marks(header: &Header, sequence: u64, runs: &[Range<u64>]) -> Vec<u8> {
    let run = |run: &Range<u64>| (run.start << 32 | (run.end - run.start)).to_be_bytes();
    let payload: Vec<_> = runs.iter().flat_map(run).collect();
    record(header, MARKS, sequence, &payload)
}

/// Bytes of a record that marks so many runs.
pub(crate) fn marks_len(runs: usize) -> u64 {
    (HEAD + runs * RUN) as u64
}

/// What an area says.
pub(crate) struct Replayed {
    pub(crate) regions: ChunkBitmap,
    /// Bytes that its valid records take.
    pub(crate) used: u64,
    /// The sequence number of the next record.
    pub(crate) sequence: u64,
}

/// Reads the records in `area`, the area of `header`, up to the first that is not valid: the one that a crash
/// has interrupted. `None` if the snapshot is not, or a valid record makes no sense.
pub(crate) fn replay(header: &Header, area: &[u8]) -> Option<Replayed> {
    let mut replayed = Replayed { regions: ChunkBitmap::new(header.regions()), used: 0, sequence: 0 };
    while let Some((kind, payload)) = valid_record(header, &area[replayed.used as usize..], replayed.sequence)
    {
        match (kind, replayed.sequence) {
            (SNAPSHOT, 0) if payload.len() == header.bitmap_len() => {
                let (words, _) = payload.as_chunks::<8>();
                for (word, index) in words.iter().zip(0..) {
                    replayed.regions.set_word(index, u64::from_be_bytes(*word));
                }
            }
            (MARKS, 1..) if payload.len().is_multiple_of(RUN) => {
                let (runs, _) = payload.as_chunks::<RUN>();
                for run in runs {
                    let run = u64::from_be_bytes(*run);
                    let (first, count) = (run >> 32, run & u64::from(u32::MAX));
                    if first + count > header.regions() {
                        return None;
                    }
                    replayed.regions.set(first..first + count);
                }
            }
            _ => return None,
        }
        replayed.used += (HEAD + payload.len()) as u64;
        replayed.sequence += 1;
    }
    (replayed.sequence > 0).then_some(replayed)
}

/// The kind and the payload of the record at the start of `bytes`, if it is valid and has this number.
pub(crate) fn valid_record<'a>(header: &Header, bytes: &'a [u8], sequence: u64) -> Option<(u32, &'a [u8])> {
    let head = bytes.get(..HEAD)?;
    let kind = u32::from_be_bytes(*head[4..].first_chunk()?);
    let number = u64::from_be_bytes(*head[8..].first_chunk()?);
    let len = usize::try_from(u64::from_be_bytes(*head[16..].first_chunk()?)).ok()?;
    let record = bytes.get(..HEAD.checked_add(len)?)?;
    let valid = number == sequence && crc(header, record) == u32::from_be_bytes(*head.first_chunk()?);
    valid.then(|| (kind, &record[HEAD..]))
}
