//! The log: made, opened, and extended by marks.
//!
//! Used by whatever copies. Must hold: what [`Checkpoint::mark`] has returned `Ok` for is marked after any
//! crash, and nothing is marked that no call has asked to be; the area and the header that a valid header
//! leads to are only appended to.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Arc;

use blockmirror_bitmap::ChunkBitmap;
use blockmirror_block::{self as block, ByteRange, ErrorKind, Storage};

use crate::crc::crc32c;
use crate::digests::{Digest, DigestTable};
use crate::error::Error;
use crate::header::{Header, KIND_COPY, VERIFY};
use crate::identity::{Identity, MAX_IDENTITY};
use crate::marked;
use crate::record::{self, Replayed};

/// A log of marked regions on a storage.
#[derive(Debug)]
pub struct Checkpoint {
    storage: Arc<dyn Storage>,
    header: Header,
    identity: Identity,
    regions: ChunkBitmap,
    /// The digests of marked regions, if the log has them.
    table: Option<DigestTable>,
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
}

impl Checkpoint {
    /// Makes a log of a disk of `len` bytes in regions of `region` bytes, a power of two ([`region_size`]),
    /// none of which is marked. What `storage` held is lost.
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
        Self::make(storage, len, region, identity, false)
    }

    /// The same for a log that has a digest of each marked region ([`mark_with`](Self::mark_with)), and takes
    /// up to 16 MiB more, in memory too.
    ///
    /// # Errors
    /// As for [`create`](Self::create).
    pub fn create_with_digests(
        storage: Arc<dyn Storage>,
        len: u64,
        region: u64,
        identity: Identity,
    ) -> Result<Self, Error> {
        Self::make(storage, len, region, identity, true)
    }

    fn make(
        storage: Arc<dyn Storage>,
        len: u64,
        region: u64,
        identity: Identity,
        digests: bool,
    ) -> Result<Self, Error> {
        let too_large = |what| Error::TooLarge { name: storage.name().to_owned(), what };
        let text = identity.to_text();
        let identity_len = match u32::try_from(text.len()) {
            Ok(bytes) if text.len() <= MAX_IDENTITY => bytes,
            _ => return Err(too_large("an identity of more than 1 MiB")),
        };
        let identity_crc = crc32c(&[text.as_bytes()]);
        let (kind, id, generation) = (KIND_COPY, random(), 0);
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
        let (regions, state) = (ChunkBitmap::new(header.regions()), State::AtEnd);
        let table = digests.then(|| DigestTable::new(&header));
        let mut log = Self { storage, header, identity, regions, table, used: 0, sequence: 0, state };
        log.begin_area(header, ChunkBitmap::new(header.regions()))?;
        Ok(log)
    }

    /// Opens the log on `storage`, which must be writable for [`mark`](Self::mark) only. Reads at most some
    /// 1.3 MiB, and 16 MiB of digests, whatever it says.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`] if there is none; [`Error::NotBegun`] if its creation was interrupted;
    /// [`Error::Damaged`], [`Error::Version`], [`Error::Storage`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self, Error> {
        let damaged = |what| Error::Damaged { name: storage.name().to_owned(), what };
        let header = Header::read(&*storage, KIND_COPY)?;
        let mut text = vec![0; header.identity_len as usize];
        storage.read_at(&mut text, Header::identity_at())?;
        let identity = (crc32c(&[&text]) == header.identity_crc).then(|| Identity::parse(&text));
        let identity = identity.flatten().ok_or_else(|| damaged("the identity"))?;
        // Its length follows from the number of regions, which is bounded.
        let mut area = vec![0; header.area_len() as usize];
        storage.read_at(&mut area, header.area_at(header.generation))?;
        let mut table = header.digests.then(|| DigestTable::read(&header, &*storage)).transpose()?;
        let replayed = record::replay(&header, &area, table.as_mut());
        let Replayed { regions, used, sequence } =
            replayed.ok_or_else(|| damaged("the snapshot or a record"))?;
        // What the last record is was decided now: a crash while the next one is written must not bring
        // another one to light.
        Ok(Self { storage, header, identity, regions, table, used, sequence, state: State::AtEnd })
    }

    /// What it belongs to.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Random bytes that no other log has.
    pub fn id(&self) -> [u8; 16] {
        self.header.id
    }

    /// The regions, by number: which of them are marked.
    pub fn regions(&self) -> &ChunkBitmap {
        &self.regions
    }

    /// Bytes of a region; the last one of a disk may be shorter.
    pub fn region_size(&self) -> u64 {
        self.header.region
    }

    /// The length of the disk.
    pub fn disk_len(&self) -> u64 {
        self.header.len
    }

    /// Bytes of the disk in marked regions.
    pub fn marked_bytes(&self) -> u64 {
        self.marked().map(ByteRange::len).sum()
    }

    /// The marked bytes of the disk, in order.
    pub fn marked(&self) -> impl Iterator<Item = ByteRange> + '_ {
        marked::bytes(&self.header, &self.regions)
    }

    /// Whether each marked region has a digest.
    pub fn has_digests(&self) -> bool {
        self.table.is_some()
    }

    /// Whether the copy [is to be verified](Self::require_verification).
    pub fn requires_verification(&self) -> bool {
        self.header.flags & VERIFY != 0
    }

    /// Records, durably, that the copy is to be verified when it is complete: a later run that goes on with
    /// it is to know.
    ///
    /// # Errors
    /// As for [`mark`](Self::mark).
    pub fn require_verification(&mut self) -> Result<(), Error> {
        if self.requires_verification() {
            return Ok(());
        }
        let (generation, flags) = (self.header.generation + 1, self.header.flags | VERIFY);
        self.begin_area(Header { generation, flags, ..self.header }, self.regions.clone())
    }

    /// The digest that `region` was marked with; `None` if it is not marked, or the log has no digests.
    pub fn digest(&self, region: u64) -> Option<Digest> {
        let table = self.table.as_ref()?;
        (region < self.regions.len() && self.regions.get(region)).then(|| table.get(region)).flatten()
    }

    /// Marks the regions with numbers in `runs`, durably: one write and one flush, unless all are marked.
    /// Numbers past the last region are left out.
    ///
    /// # Errors
    /// [`Error::Storage`]: the regions may be marked after a crash, and are not marked here. The call can be
    /// repeated, but for a failure of the kind [`ErrorKind::Poisoned`]. [`Error::NoDigest`] of a log that has
    /// digests.
    pub fn mark(&mut self, runs: &[Range<u64>]) -> Result<(), Error> {
        if self.table.is_some() {
            return Err(Error::NoDigest { name: self.storage.name().to_owned() });
        }
        let end = self.header.regions();
        let runs = runs.iter().map(|run| run.start..run.end.min(end));
        let runs: Vec<_> = runs
            .filter(|run| self.regions.count_in(run.clone()) < run.end.saturating_sub(run.start))
            .collect();
        self.append(&runs)
    }

    /// Marks the regions with numbers in `runs`, as [`mark`](Self::mark) does, each with what `digest` says
    /// of it. Of a region that is marked already nothing changes, and its digest is not asked for.
    ///
    /// # Errors
    /// As for [`mark`](Self::mark); [`Error::NoDigest`] of a log that has none.
    pub fn mark_with(
        &mut self,
        runs: &[Range<u64>],
        digest: &mut dyn FnMut(u64) -> Digest,
    ) -> Result<(), Error> {
        let Some(table) = &mut self.table else {
            return Err(Error::NoDigest { name: self.storage.name().to_owned() });
        };
        let (end, mut new) = (self.header.regions(), Vec::new());
        for run in runs {
            let (mut at, end) = (run.start, run.end.min(end));
            while let Some(start) = self.regions.next_clear(at).filter(|start| *start < end) {
                at = self.regions.next_set(start).unwrap_or(end).min(end);
                (start..at).for_each(|region| table.set(region, digest(region)));
                new.push(start..at);
            }
        }
        self.append(&new)
    }

    /// Marks `runs`, whose digests are in the table if there is one.
    fn append(&mut self, runs: &[Range<u64>]) -> Result<(), Error> {
        if runs.is_empty() {
            return Ok(());
        }
        let mut marked = self.regions.clone();
        for run in runs {
            marked.set(run.clone());
        }
        let len = match &self.table {
            Some(_) => record::marks_with_digests_len(runs),
            None => record::marks_len(runs.len()),
        };
        if self.state != State::Appending || len > self.header.area_len() - self.used {
            let header = Header { generation: self.header.generation + 1, ..self.header };
            return self.begin_area(header, marked);
        }
        let record = match &self.table {
            Some(table) => record::marks_with_digests(&self.header, self.sequence, runs, table),
            None => record::marks(&self.header, self.sequence, runs),
        };
        // Until it is known to be there.
        self.state = State::AtEnd;
        self.storage.write_at(&record, self.header.area_at(self.header.generation) + self.used)?;
        self.storage.flush()?;
        (self.state, self.regions) = (State::Appending, marked);
        self.used += record.len() as u64;
        self.sequence += 1;
        Ok(())
    }

    /// Marks every region that no range of `missing` overlaps: a flush has succeeded that began after all
    /// else was written. Otherwise as [`mark`](Self::mark).
    ///
    /// # Errors
    /// As for [`mark`](Self::mark).
    pub fn mark_except(&mut self, missing: &[ByteRange]) -> Result<(), Error> {
        self.mark(&self.all_except(missing))
    }

    /// The regions that no range of `missing` overlaps, marked or not.
    pub fn all_except(&self, missing: &[ByteRange]) -> Vec<Range<u64>> {
        let (region, count) = (self.header.region, self.header.regions());
        let mut pending = ChunkBitmap::new(count);
        for range in missing.iter().filter(|range| !range.is_empty()) {
            pending.set(range.start() / region..range.end().div_ceil(region));
        }
        let (mut done, mut at) = (Vec::new(), 0);
        while let Some(start) = pending.next_clear(at) {
            at = pending.next_set(start).unwrap_or(count);
            done.push(start..at);
        }
        done
    }

    /// Has the storage hold no checkpoint any more, durably; to [`open`](Self::open) it is one whose creation
    /// was interrupted. No region can be marked then.
    ///
    /// # Errors
    /// [`Error::Storage`]: it may be valid after a crash.
    pub fn invalidate(&mut self) -> Result<(), Error> {
        self.state = State::Unknown;
        self.regions = ChunkBitmap::new(self.header.regions());
        self.storage.set_len(0)?;
        Header::begin(&*self.storage)?;
        Ok(self.storage.flush()?)
    }

    /// Begins the area of `header` with a snapshot of `regions`, and then has it counted.
    fn begin_area(&mut self, header: Header, regions: ChunkBitmap) -> Result<(), Error> {
        if self.state == State::Unknown {
            let error = block::Error::new(ErrorKind::Poisoned, "write");
            return Err(error.in_file(self.storage.name()).into());
        }
        let snapshot = record::snapshot(&header, &regions);
        // The header that was read may be one that an interrupted run has written and not flushed: the area
        // before it is written over from here on. With it go the digests of the records there.
        if let Some(table) = &self.table {
            table.write(&header, &*self.storage)?;
        }
        self.storage.flush()?;
        if let Some(table) = &mut self.table {
            table.is_durable();
        }
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

/// Bytes that no other log has.
pub(crate) fn random() -> [u8; 16] {
    let mut id = [0; 16];
    for half in id.chunks_mut(8) {
        half.copy_from_slice(&RandomState::new().hash_one(std::process::id()).to_be_bytes());
    }
    id
}
