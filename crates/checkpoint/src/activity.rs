//! The log of a live job: a marked region may differ between source and target.
//!
//! Used by whatever mirrors a disk that is written meanwhile (DRBD's activity log). Must hold: a region is
//! marked durably before a write to it begins, and cleared only when both disks hold the same there,
//! durably; that is the caller's to keep. Kept here: after a crash at any instant the log has what the last
//! call that returned has left, and of the call under way any part.

use std::ops::Range;
use std::sync::Arc;

use blockmirror_bitmap::ChunkBitmap;
use blockmirror_block::{self as block, ByteRange, ErrorKind, Storage};

use crate::crc::crc32c;
use crate::error::Error;
use crate::header::{Header, KIND_LIVE};
use crate::identity::{Identity, MAX_IDENTITY};
use crate::log::random;
use crate::marked;
use crate::record::{self, HEAD, MARKS, RUN, SNAPSHOT};

/// Runs of regions that are not marked any more.
const CLEARS: u32 = 4;
/// The log has ended.
const END: u32 = 5;

/// A log of the regions in which two disks may differ.
///
/// ```
/// use std::sync::Arc;
/// use blockmirror_block::testing::MemoryStorage;
/// use blockmirror_checkpoint::{ActivityLog, Identity};
///
/// # fn main() -> Result<(), blockmirror_checkpoint::Error> {
/// let storage = Arc::new(MemoryStorage::new());
/// let mut log = ActivityLog::create(Arc::clone(&storage) as _, 100 << 20, 1 << 20, Identity::new())?;
/// assert_eq!(log.marked_bytes(), 100 << 20);
/// // Copied, and flushed on both disks.
/// log.update(&[], &[0..100])?;
/// // Before a write to the eighth region begins.
/// log.update(&[7..8], &[])?;
///
/// let log = ActivityLog::open(storage)?;
/// assert_eq!(log.marked_bytes(), 1 << 20);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ActivityLog {
    storage: Arc<dyn Storage>,
    header: Header,
    identity: Identity,
    regions: ChunkBitmap,
    /// Bytes of the area in use that records take.
    used: u64,
    /// The number of the next record.
    sequence: u64,
    state: State,
}

/// Whether and how the log can be extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// By a record.
    Appending,
    /// A record may have been written in part: the next one begins another area.
    AtEnd,
    /// It is not known which header counts after a crash.
    Unknown,
    /// It has ended.
    Ended,
}

impl ActivityLog {
    /// Makes a log of two disks of `len` bytes in regions of `region` bytes, a power of two
    /// ([`region_size`]), all of which are marked. What `storage` held is lost.
    ///
    /// [`region_size`]: crate::region_size
    ///
    /// # Errors
    /// [`Error::TooLarge`] for more than [`MAX_REGIONS`](crate::MAX_REGIONS) regions, or more than
    /// [`MAX_IDENTITY`] bytes of identity; [`Error::Storage`].
    pub fn create(
        storage: Arc<dyn Storage>,
        len: u64,
        region: u64,
        identity: Identity,
    ) -> Result<Self, Error> {
        let too_large = |what| Error::TooLarge { name: storage.name().to_owned(), what };
        let text = identity.to_text();
        let identity_len = match u32::try_from(text.len()) {
            Ok(bytes) if text.len() <= MAX_IDENTITY => bytes,
            _ => return Err(too_large("an identity of more than 1 MiB")),
        };
        let (kind, id, identity_crc) = (KIND_LIVE, random(), crc32c(&[text.as_bytes()]));
        let (generation, digests) = (0, false);
        let header =
            Header { kind, id, generation, len, region, identity_len, identity_crc, digests, flags: 0 };
        if !header.is_possible() {
            return Err(too_large("such regions"));
        }
        // No header is valid until the rest is durable.
        storage.set_len(0)?;
        Header::begin(&*storage)?;
        storage.set_len(header.log_len())?;
        // Records must find room when the disk is full.
        match storage.allocate(ByteRange::new(0, header.log_len())) {
            Err(error) if error.kind() != ErrorKind::Unsupported => return Err(error.into()),
            _ => {}
        }
        storage.flush()?;
        storage.write_at(text.as_bytes(), Header::identity_at())?;
        let mut regions = ChunkBitmap::new(header.regions());
        regions.set_all();
        let (all, state) = (regions.clone(), State::AtEnd);
        let mut log = Self { storage, header, identity, regions, used: 0, sequence: 0, state };
        log.begin_area(header, all)?;
        Ok(log)
    }

    /// Opens the log on `storage`, and makes durable what it says. Reads at most some 1.3 MiB, whatever it
    /// says.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`] if there is none, or it was [invalidated](Self::invalidate);
    /// [`Error::NotBegun`] if its creation was interrupted; [`Error::OtherKind`], [`Error::Damaged`],
    /// [`Error::Version`], [`Error::Storage`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self, Error> {
        let damaged = |what| Error::Damaged { name: storage.name().to_owned(), what };
        let header = Header::read(&*storage, KIND_LIVE)?;
        let mut text = vec![0; header.identity_len as usize];
        storage.read_at(&mut text, Header::identity_at())?;
        let identity = (crc32c(&[&text]) == header.identity_crc).then(|| Identity::parse(&text));
        let identity = identity.flatten().ok_or_else(|| damaged("the identity"))?;
        // Its length follows from the number of regions, which is bounded.
        let mut area = vec![0; header.area_len() as usize];
        storage.read_at(&mut area, header.area_at(header.generation))?;
        let replayed = replay(&header, &area).ok_or_else(|| damaged("the snapshot or a record"))?;
        // A mark that a killed process has written, and not flushed, is believed from now on.
        storage.flush()?;
        let Replayed { regions, used, sequence, ended } = replayed;
        // What the last record is was decided now: a crash while the next one is written must not bring
        // another one to light.
        let state = if ended { State::Ended } else { State::AtEnd };
        Ok(Self { storage, header, identity, regions, used, sequence, state })
    }

    /// What it belongs to.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The regions, by number: which of them are marked.
    pub fn regions(&self) -> &ChunkBitmap {
        &self.regions
    }

    /// Bytes of a region; the last one of a disk may be shorter.
    pub fn region_size(&self) -> u64 {
        self.header.region
    }

    /// The length of the disks.
    pub fn disk_len(&self) -> u64 {
        self.header.len
    }

    /// Bytes of the disks in marked regions.
    pub fn marked_bytes(&self) -> u64 {
        self.marked().map(ByteRange::len).sum()
    }

    /// The marked bytes of the disks, in order.
    pub fn marked(&self) -> impl Iterator<Item = ByteRange> + '_ {
        marked::bytes(&self.header, &self.regions)
    }

    /// Whether it has [ended](Self::end).
    pub fn is_ended(&self) -> bool {
        self.state == State::Ended
    }

    /// Marks the regions with numbers in `mark` and clears those in `clear` that are not among them, durably:
    /// one write and one flush, unless that changes nothing. Numbers past the last region are left out.
    ///
    /// # Errors
    /// [`Error::Storage`]: any part of it may be so after a crash, and nothing has changed here. The call can
    /// be repeated, but for a failure of the kind [`ErrorKind::Poisoned`]. [`Error::Ended`].
    pub fn update(&mut self, mark: &[Range<u64>], clear: &[Range<u64>]) -> Result<(), Error> {
        let count = self.header.regions();
        let mut clears = ChunkBitmap::new(count);
        for run in clear {
            clears.set(run.clone());
        }
        for run in mark {
            clears.clear(run.clone());
        }
        let is_new =
            |run: &Range<u64>| self.regions.count_in(run.clone()) < run.end.saturating_sub(run.start);
        let marks = mark.iter().map(|run| run.start..run.end.min(count));
        let marks: Vec<_> = marks.filter(|run| run.start < run.end && is_new(run)).collect();
        let clears: Vec<_> =
            marked::runs(&clears).filter(|run| self.regions.count_in(run.clone()) > 0).collect();
        if marks.is_empty() && clears.is_empty() {
            return Ok(());
        }
        let mut regions = self.regions.clone();
        let (mut bytes, mut sequence) = (Vec::new(), self.sequence);
        for (kind, runs) in [(MARKS, marks), (CLEARS, clears)] {
            if runs.is_empty() {
                continue;
            }
            bytes.extend(runs_record(&self.header, kind, sequence, &runs));
            sequence += 1;
            for run in runs {
                change(&mut regions, kind, run);
            }
        }
        self.append(&bytes, sequence, regions)
    }

    /// Records that the log has no meaning any more, because the target has taken the source's place, say:
    /// [`is_ended`](Self::is_ended) tells a later run so. It can not be updated then.
    ///
    /// # Errors
    /// As for [`update`](Self::update).
    pub fn end(&mut self) -> Result<(), Error> {
        // A snapshot does not say so: the record needs room in the area that it begins.
        if self.state != State::Ended {
            if !self.has_room(HEAD) {
                self.begin_next_area(self.regions.clone())?;
            }
            let bytes = record::record(&self.header, END, self.sequence, &[]);
            self.append(&bytes, self.sequence + 1, self.regions.clone())?;
            self.state = State::Ended;
        }
        Ok(())
    }

    /// Has the storage hold no log any more, durably: it is empty. No region can be marked then.
    ///
    /// # Errors
    /// [`Error::Storage`]: it may be valid after a crash.
    pub fn invalidate(&mut self) -> Result<(), Error> {
        self.state = State::Unknown;
        self.regions.set_all();
        self.storage.set_len(0)?;
        Ok(self.storage.flush()?)
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.state == State::Appending && bytes as u64 <= self.header.area_len() - self.used
    }

    /// Appends records, after which the log has these `regions` and the next record this number; or has
    /// another area say so.
    fn append(&mut self, records: &[u8], sequence: u64, regions: ChunkBitmap) -> Result<(), Error> {
        if !self.has_room(records.len()) {
            return self.begin_next_area(regions);
        }
        // Until it is known to be there.
        self.state = State::AtEnd;
        self.storage.write_at(records, self.header.area_at(self.header.generation) + self.used)?;
        self.storage.flush()?;
        (self.state, self.regions, self.sequence) = (State::Appending, regions, sequence);
        self.used += records.len() as u64;
        Ok(())
    }

    fn begin_next_area(&mut self, regions: ChunkBitmap) -> Result<(), Error> {
        self.begin_area(Header { generation: self.header.generation + 1, ..self.header }, regions)
    }

    /// Begins the area of `header` with a snapshot of `regions`, and then has it counted.
    fn begin_area(&mut self, header: Header, regions: ChunkBitmap) -> Result<(), Error> {
        match self.state {
            State::Appending | State::AtEnd => {}
            State::Ended => return Err(Error::Ended { name: self.storage.name().to_owned() }),
            State::Unknown => {
                let error = block::Error::new(ErrorKind::Poisoned, "write");
                return Err(error.in_file(self.storage.name()).into());
            }
        }
        let snapshot = record::snapshot(&header, &regions);
        // The header that was read may be one that an interrupted run has written and not flushed: the area
        // before it is written over from here on.
        self.storage.flush()?;
        self.storage.write_at(&snapshot, header.area_at(header.generation))?;
        self.storage.flush()?;
        self.state = State::Unknown;
        header.write(&*self.storage)?;
        self.storage.flush()?;
        (self.header, self.regions, self.state) = (header, regions, State::Appending);
        (self.used, self.sequence) = (snapshot.len() as u64, 1);
        Ok(())
    }
}

/// Marks `run`, or clears it.
fn change(regions: &mut ChunkBitmap, kind: u32, run: Range<u64>) {
    match kind {
        MARKS => regions.set(run),
        _ => regions.clear(run),
    };
}

/// A record of `runs`; their numbers are below [`MAX_REGIONS`](crate::MAX_REGIONS).
fn runs_record(header: &Header, kind: u32, sequence: u64, runs: &[Range<u64>]) -> Vec<u8> {
    let run = |run: &Range<u64>| (run.start << 32 | (run.end - run.start)).to_be_bytes();
    let payload: Vec<_> = runs.iter().flat_map(run).collect();
    record::record(header, kind, sequence, &payload)
}

/// What an area says.
struct Replayed {
    regions: ChunkBitmap,
    used: u64,
    sequence: u64,
    ended: bool,
}

/// Reads the records in `area`, the area of `header`, up to the first that is not valid: the one that a crash
/// has interrupted. `None` if the snapshot is not, or a valid record makes no sense.
fn replay(header: &Header, area: &[u8]) -> Option<Replayed> {
    let regions = ChunkBitmap::new(header.regions());
    let mut log = Replayed { regions, used: 0, sequence: 0, ended: false };
    while let Some((kind, payload)) = record::valid_record(header, &area[log.used as usize..], log.sequence) {
        match (kind, log.sequence) {
            _ if log.ended => return None,
            (SNAPSHOT, 0) if payload.len() == header.bitmap_len() => {
                let (words, _) = payload.as_chunks::<8>();
                for (word, index) in words.iter().zip(0..) {
                    log.regions.set_word(index, u64::from_be_bytes(*word));
                }
            }
            (MARKS | CLEARS, 1..) if payload.len().is_multiple_of(RUN) => {
                let (runs, _) = payload.as_chunks::<RUN>();
                for run in runs {
                    let run = u64::from_be_bytes(*run);
                    let (first, count) = (run >> 32, run & u64::from(u32::MAX));
                    if first + count > header.regions() {
                        return None;
                    }
                    change(&mut log.regions, kind, first..first + count);
                }
            }
            (END, 1..) if payload.is_empty() => log.ended = true,
            _ => return None,
        }
        log.used += (HEAD + payload.len()) as u64;
        log.sequence += 1;
    }
    let is_damaged = has_record_after(header, &area[log.used as usize..], log.sequence);
    (log.sequence > 0 && !is_damaged).then_some(log)
}

/// Whether `bytes`, which do not begin with the record `sequence`, have one that was written later. An update
/// writes at most two at once, any part of which a crash may leave; it is no crash that has taken a record
/// before those. Marks that are lost would be taken for equal regions.
fn has_record_after(header: &Header, bytes: &[u8], sequence: u64) -> bool {
    let is_later = |at: usize| {
        let number = bytes[at + 8..].first_chunk().map_or(0, |number| u64::from_be_bytes(*number));
        let possible = number > sequence + 1 && number - sequence <= (bytes.len() / HEAD) as u64;
        possible && record::valid_record(header, &bytes[at..], number).is_some()
    };
    (0..bytes.len().saturating_sub(HEAD)).any(is_later)
}
