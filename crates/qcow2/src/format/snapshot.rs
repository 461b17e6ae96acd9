//! The snapshot table: what snapshots there are, not what they hold.
//!
//! Entries have variable length, so they are read one after the other, each bounded before it is allocated.
//! `info` calls this, and the module `snapshots`.

use std::time::Duration;

use blockmirror_block::Storage;
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::Header;
use crate::error::{Error, Result};
use crate::limits::{self, MIN_SNAPSHOT_ENTRY};

/// Bytes of the extra data that is known: size of the VM state, length of the disk, instructions.
const KNOWN_EXTRA: u32 = 24;

const _: () = assert!(size_of::<RawSnapshot>() as u64 == MIN_SNAPSHOT_ENTRY);

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSnapshot {
    l1_table_offset: U64,
    l1_size: U32,
    id_str_size: U16,
    name_size: U16,
    date_sec: U32,
    date_nsec: U32,
    vm_clock_nsec: U64,
    vm_state_size: U32,
    extra_data_size: U32,
}

/// An internal snapshot, as its entry describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Snapshot {
    /// Its identifier, unique in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken, since 1970 in UTC.
    pub date: Duration,
    /// How long the guest had run.
    pub vm_clock: Duration,
    /// Bytes of saved guest state.
    pub vm_state_size: u64,
    /// Length of the disk when it was taken, if the entry has it.
    pub disk_size: Option<u64>,
    /// Instructions the guest had executed, if that was counted.
    pub icount: Option<u64>,
    /// Where its L1 table starts, as declared; checked where that table is read.
    pub l1_offset: u64,
    /// Entries of its L1 table, as declared.
    pub l1_entries: u32,
}

impl Snapshot {
    /// Bytes that follow the fixed part, padding excluded.
    fn variable_len(raw: &RawSnapshot) -> usize {
        raw.extra_data_size.get() as usize
            + usize::from(raw.id_str_size.get())
            + usize::from(raw.name_size.get())
    }

    /// `variable` has [`Self::variable_len`] bytes.
    fn parse(raw: &RawSnapshot, variable: &[u8]) -> Self {
        let (extra, strings) = variable.split_at(raw.extra_data_size.get() as usize);
        let (id, name) = strings.split_at(usize::from(raw.id_str_size.get()));
        let word =
            |index: usize| U64::read_from_bytes(extra.get(index * 8..index * 8 + 8)?).ok().map(U64::get);
        Self {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            date: Duration::from_secs(raw.date_sec.get().into())
                + Duration::from_nanos(raw.date_nsec.get().into()),
            vm_clock: Duration::from_nanos(raw.vm_clock_nsec.get()),
            vm_state_size: word(0).unwrap_or_else(|| raw.vm_state_size.get().into()),
            disk_size: word(1),
            icount: word(2).filter(|count| *count != u64::MAX),
            l1_offset: raw.l1_table_offset.get(),
            l1_entries: raw.l1_size.get(),
        }
    }
}

/// Bytes of an identifier or a name that is given to a new snapshot. QEMU's tools find no longer one.
pub(crate) const MAX_NAME: usize = 255;

/// The entry of `snapshot`, whose strings are at most [`MAX_NAME`] bytes, with its padding.
pub(crate) fn encode(snapshot: &Snapshot) -> Vec<u8> {
    let (id, name) = (snapshot.id.as_bytes(), snapshot.name.as_bytes());
    let extra: [U64; 3] = [
        U64::new(snapshot.vm_state_size),
        U64::new(snapshot.disk_size.unwrap_or_default()),
        U64::new(snapshot.icount.unwrap_or(u64::MAX)),
    ];
    let raw = RawSnapshot {
        l1_table_offset: U64::new(snapshot.l1_offset),
        l1_size: U32::new(snapshot.l1_entries),
        // At most MAX_NAME.
        id_str_size: U16::new(id.len() as u16),
        name_size: U16::new(name.len() as u16),
        // The format's clock ends in 2106.
        date_sec: U32::new(u32::try_from(snapshot.date.as_secs()).unwrap_or(u32::MAX)),
        date_nsec: U32::new(snapshot.date.subsec_nanos()),
        vm_clock_nsec: U64::new(u64::try_from(snapshot.vm_clock.as_nanos()).unwrap_or(u64::MAX)),
        // Readers of the extra data do not look at it.
        vm_state_size: U32::new(u32::try_from(snapshot.vm_state_size).unwrap_or(0)),
        extra_data_size: U32::new(size_of_val(&extra) as u32),
    };
    let mut entry = [raw.as_bytes(), extra.as_bytes(), id, name].concat();
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry
}

/// `entry` with the extra data that version 3 wants, of a disk of `disk_size` bytes where it does not say how
/// long that was, and with its padding. Other extra data stays.
pub(crate) fn completed(entry: &[u8], disk_size: u64) -> Vec<u8> {
    let mut out = match RawSnapshot::read_from_prefix(entry) {
        Ok((raw, variable))
            if raw.extra_data_size.get() < KNOWN_EXTRA && variable.len() >= Snapshot::variable_len(&raw) =>
        {
            let snapshot = Snapshot::parse(&raw, &variable[..Snapshot::variable_len(&raw)]);
            let extra: [U64; 3] = [
                U64::new(snapshot.vm_state_size),
                U64::new(snapshot.disk_size.unwrap_or(disk_size)),
                U64::new(snapshot.icount.unwrap_or(u64::MAX)),
            ];
            let strings = &variable[raw.extra_data_size.get() as usize..Snapshot::variable_len(&raw)];
            let raw = RawSnapshot { extra_data_size: U32::new(KNOWN_EXTRA), ..raw };
            [raw.as_bytes(), extra.as_bytes(), strings].concat()
        }
        _ => entry.to_vec(),
    };
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

/// An entry of the snapshot table as a repair keeps it.
#[derive(Debug)]
pub(crate) struct KeptEntry {
    /// Its bytes without padding; none if it says nothing at all.
    pub(crate) bytes: Option<Vec<u8>>,
    /// Whether they are other ones than the table has.
    pub(crate) changed: bool,
    /// Where the next entry starts.
    pub(crate) end: u64,
}

impl KeptEntry {
    /// Reads the entry at `at` and cuts extra data that is too long. If it is to be `complete`, what it lacks
    /// is added, with `disk_size` for the length of the disk. `None` if the file, of `file_len` bytes, does
    /// not hold it.
    pub(crate) fn read(
        storage: &dyn Storage,
        at: u64,
        file_len: u64,
        complete: bool,
        disk_size: u64,
    ) -> Result<Option<Self>> {
        let mut fixed = [0; MIN_SNAPSHOT_ENTRY as usize];
        storage.read_at(&mut fixed, at)?;
        let Ok(mut raw) = RawSnapshot::read_from_bytes(&fixed) else { return Ok(None) };
        let extra_len = u64::from(raw.extra_data_size.get());
        let names_at = at + MIN_SNAPSHOT_ENTRY + extra_len;
        let names_len = usize::from(raw.id_str_size.get()) + usize::from(raw.name_size.get());
        let end = names_at + names_len as u64;
        if end > file_len {
            return Ok(None);
        }
        let end = end.next_multiple_of(8);
        if names_len == 0 && raw.l1_size.get() == 0 {
            return Ok(Some(Self { bytes: None, changed: true, end }));
        }
        // At most 1024 bytes.
        let mut extra = vec![0; extra_len.min(limits::MAX_SNAPSHOT_EXTRA.into()) as usize];
        storage.read_at(&mut extra, at + MIN_SNAPSHOT_ENTRY)?;
        if complete && extra.len() < 8 {
            extra = u64::from(raw.vm_state_size.get()).to_be_bytes().to_vec();
        }
        if complete && extra.len() < 16 {
            extra.truncate(8);
            extra.extend(disk_size.to_be_bytes());
        }
        let changed = extra.len() as u64 != extra_len;
        // At most 2 * 65535 bytes.
        let mut names = vec![0; names_len];
        storage.read_at(&mut names, names_at)?;
        // Cut to 1024 bytes above.
        raw.extra_data_size = U32::new(extra.len() as u32);
        Ok(Some(Self { bytes: Some([raw.as_bytes(), &extra, &names].concat()), changed, end }))
    }
}

/// Reads the snapshot table entry by entry. Ends after the first error.
#[derive(Debug)]
pub struct Snapshots<'a> {
    storage: &'a dyn Storage,
    file_len: u64,
    start: u64,
    offset: u64,
    index: u32,
    count: u32,
}

impl<'a> Snapshots<'a> {
    /// The snapshots of the image in `storage`, whose header is `header`.
    ///
    /// # Errors
    /// [`Error::Storage`] if the length of the storage cannot be had.
    pub fn new(storage: &'a dyn Storage, header: &Header) -> Result<Self> {
        let start = header.snapshots_offset;
        let file_len = storage.len()?;
        Ok(Self { storage, file_len, start, offset: start, index: 0, count: header.snapshot_count })
    }

    /// Where the next entry starts: after the last one, the end of the table.
    pub(crate) fn end(&self) -> u64 {
        self.offset
    }

    fn read_entry(&mut self) -> Result<Snapshot> {
        let mut fixed = [0; MIN_SNAPSHOT_ENTRY as usize];
        self.check_room(self.offset, MIN_SNAPSHOT_ENTRY)?;
        self.storage.read_at(&mut fixed, self.offset)?;
        let raw = RawSnapshot::read_from_bytes(&fixed)
            .map_err(|_| self.damaged("the fixed part cannot be read".into()))?;
        let extra = raw.extra_data_size.get();
        if extra > limits::MAX_SNAPSHOT_EXTRA {
            return Err(Error::LimitExceeded {
                what: "the extra data of a snapshot",
                value: extra.into(),
                limit: limits::MAX_SNAPSHOT_EXTRA.into(),
            });
        }
        // Bounded by the caps of its parts: 1024 + 2 * 65535.
        let mut variable = vec![0; Snapshot::variable_len(&raw)];
        let at = self.offset + MIN_SNAPSHOT_ENTRY;
        self.check_room(at, variable.len() as u64)?;
        self.storage.read_at(&mut variable, at)?;
        self.offset = (at + variable.len() as u64).next_multiple_of(8);
        self.index += 1;
        Ok(Snapshot::parse(&raw, &variable))
    }

    /// The next `len` bytes of the table lie inside the file and below the cap on the table.
    fn check_room(&self, at: u64, len: u64) -> Result<()> {
        let bytes = at + len - self.start;
        if bytes > limits::MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::LimitExceeded {
                what: "the snapshot table, in bytes,",
                value: bytes,
                limit: limits::MAX_SNAPSHOT_TABLE_BYTES,
            });
        }
        if at + len > self.file_len {
            return Err(self.damaged(format!("it reaches past the end of the file at {}", self.file_len)));
        }
        Ok(())
    }

    fn damaged(&self, problem: String) -> Error {
        Error::TableEntry { table: "snapshot table", index: self.index, offset: self.offset, problem }
    }
}

impl Iterator for Snapshots<'_> {
    type Item = Result<Snapshot>;

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
