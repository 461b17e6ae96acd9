//! Records: what is appended to an area.
//!
//! Written and read by [`crate::log`]. A record's CRC covers the log's id and the generation too, so that
//! what an earlier log or an earlier use of the area left is not valid.

use std::ops::Range;

use blockmirror_bitmap::ChunkBitmap;

use crate::crc::crc32c;
use crate::digests::DigestTable;
use crate::header::{DIGEST, Header};

/// Bytes before the payload.
pub(crate) const HEAD: usize = 24;
/// The bitmap of all regions; the first record of an area, and no other.
pub(crate) const SNAPSHOT: u32 = 1;
/// Runs of regions that are marked.
pub(crate) const MARKS: u32 = 2;
/// Runs of regions that are marked, with the digest of each; in a log that has digests in place of the other.
const MARKS_WITH_DIGESTS: u32 = 3;
/// Bytes of a run, and of their number.
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

/// The same with the digests that `table` has of the regions.
pub(crate) fn marks_with_digests(
    header: &Header,
    sequence: u64,
    runs: &[Range<u64>],
    table: &DigestTable,
) -> Vec<u8> {
    let mut payload = (runs.len() as u64).to_be_bytes().to_vec();
    for run in runs {
        payload.extend_from_slice(&(run.start << 32 | (run.end - run.start)).to_be_bytes());
    }
    for run in runs {
        payload.extend_from_slice(table.of_run(run.clone()).as_flattened());
    }
    record(header, MARKS_WITH_DIGESTS, sequence, &payload)
}

/// Bytes of such a record.
pub(crate) fn marks_with_digests_len(runs: &[Range<u64>]) -> u64 {
    let regions: u64 = runs.iter().map(|run| run.end - run.start).sum();
    marks_len(runs.len()) + RUN as u64 + regions * DIGEST as u64
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
/// has interrupted. The digests in them go to `table`. `None` if the snapshot is not, or a valid record makes
/// no sense.
pub(crate) fn replay(header: &Header, area: &[u8], mut table: Option<&mut DigestTable>) -> Option<Replayed> {
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
            (MARKS, 1..) if payload.len().is_multiple_of(RUN) && table.is_none() => {
                let (runs, _) = payload.as_chunks::<RUN>();
                for run in runs {
                    replayed.regions.set(run_of(header, *run)?);
                }
            }
            (MARKS_WITH_DIGESTS, 1..) => {
                replay_digests(header, payload, table.as_deref_mut()?, &mut replayed.regions)?;
            }
            _ => return None,
        }
        replayed.used += (HEAD + payload.len()) as u64;
        replayed.sequence += 1;
    }
    (replayed.sequence > 0).then_some(replayed)
}

/// The run that these bytes say, if the disk has its regions.
fn run_of(header: &Header, run: [u8; RUN]) -> Option<Range<u64>> {
    let run = u64::from_be_bytes(run);
    let (first, count) = (run >> 32, run & u64::from(u32::MAX));
    (first + count <= header.regions()).then_some(first..first + count)
}

/// Reads the payload of a record with digests; `None` if it makes no sense.
fn replay_digests(
    header: &Header,
    payload: &[u8],
    table: &mut DigestTable,
    regions: &mut ChunkBitmap,
) -> Option<()> {
    let (count, rest) = payload.split_first_chunk::<RUN>()?;
    let bytes = usize::try_from(u64::from_be_bytes(*count)).ok()?.checked_mul(RUN)?;
    let (runs, digests) = rest.split_at_checked(bytes)?;
    let (digests, left) = digests.as_chunks::<DIGEST>();
    if !left.is_empty() {
        return None;
    }
    let mut digests = digests.iter();
    let (runs, _) = runs.as_chunks::<RUN>();
    for run in runs {
        let run = run_of(header, *run)?;
        for region in run.clone() {
            // Fewer than there are regions end it.
            table.set(region, *digests.next()?);
        }
        regions.set(run);
    }
    digests.next().is_none().then_some(())
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
