//! Creating a snapshot of the active disk.

use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blockmirror_block::{Error as BlockError, Result as BlockResult};
use byteorder::{BigEndian, ByteOrder};

use super::directory::NewTable;
use super::references::L2Tables;
use crate::error::{Error, Result};
use crate::format::entry::L1Entry;
use crate::format::snapshot::{MAX_NAME, Snapshot, encode};
use crate::image::Qcow2;
use crate::limits::MAX_SNAPSHOTS;
use crate::offset::{ClusterRange, HostCluster};
use crate::overlap::MetadataKind;
use crate::stop::StopCheck;

/// What a new snapshot says of itself.
///
/// ```
/// use blockmirror_qcow2::NewSnapshot;
///
/// let snapshot = NewSnapshot::new("before-upgrade");
/// # let _ = snapshot;
/// ```
#[derive(Clone, Debug)]
pub struct NewSnapshot {
    name: String,
    id: Option<String>,
    date: Option<Duration>,
    vm_clock: Duration,
    icount: Option<u64>,
}

impl NewSnapshot {
    /// A snapshot with this name, which may be empty and need not be unique, taken now.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), id: None, date: None, vm_clock: Duration::ZERO, icount: None }
    }

    /// Its identifier; by default the lowest number above those that are in use.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// When it is taken, since 1970 in UTC.
    #[must_use]
    pub fn date(mut self, date: Duration) -> Self {
        self.date = Some(date);
        self
    }

    /// How long the guest has run.
    #[must_use]
    pub fn vm_clock(mut self, clock: Duration) -> Self {
        self.vm_clock = clock;
        self
    }

    /// Instructions that the guest has executed, if that is counted.
    #[must_use]
    pub fn icount(mut self, count: impl Into<Option<u64>>) -> Self {
        self.icount = count.into();
        self
    }

    /// # Errors
    /// A string that is too long.
    fn check(&self) -> Result<()> {
        for (what, text) in [
            ("the name of a snapshot", &self.name),
            ("the id of a snapshot", self.id.as_ref().unwrap_or(&String::new())),
        ] {
            if text.len() > MAX_NAME {
                return Err(Error::LimitExceeded { what, value: text.len() as u64, limit: MAX_NAME as u64 });
            }
        }
        Ok(())
    }
}

/// The snapshots that there are, as far as a new one must know them.
#[derive(Debug, Default)]
struct Existing {
    count: u32,
    /// The highest number that is an identifier, or begins one.
    highest: u64,
    /// Where the table ends, as an offset from its start.
    table_len: u64,
    taken: bool,
}

/// Everything that a new snapshot needs, in its place.
struct Prepared {
    tables: L2Tables,
    l1: Range<HostCluster>,
    table: NewTable,
    snapshot: Snapshot,
}

impl Qcow2 {
    /// Takes a snapshot of the disk as it is now. No guest reads or writes meanwhile.
    ///
    /// Whatever fails, the snapshots that there were stay whole and listed. If the write of the header fails
    /// the image is poisoned, and the new one may be listed, whole, when it is opened anew. After other
    /// failures it is not listed.
    ///
    /// # Errors
    /// A read-only or poisoned image, or one with an external data file; an identifier in use; a limit of the
    /// format, also of refcounts: one of `n` bits counts less than 2^`n` references; the storage fails;
    /// cancelled.
    pub fn create_snapshot(&self, new: &NewSnapshot) -> Result<Snapshot> {
        new.check()?;
        self.quiesced("create snapshot", |stop| {
            let existing = self.existing(new.id.as_deref())?;
            let (prepared, old_len) = (self.prepare_snapshot(new, &existing, stop)?, existing.table_len);
            self.use_snapshot_table(prepared.table, old_len)?;
            let mut meta = self.meta.lock();
            let refcounts = meta.refcounts(&self.ctx)?;
            for cluster in prepared.l1.each() {
                refcounts.metadata.insert(MetadataKind::InactiveL1, cluster);
            }
            prepared.tables.clusters(&self.ctx).for_each(|table| {
                refcounts.metadata.insert(MetadataKind::InactiveL2, table);
            });
            drop(meta);
            self.write_back()?;
            Ok(prepared.snapshot)
        })
    }

    fn existing(&self, id: Option<&str>) -> Result<Existing> {
        let mut existing = Existing::default();
        let end = self.each_snapshot(&mut |snapshot, _| {
            existing.count += 1;
            existing.taken |= id == Some(&snapshot.id);
            let digits = snapshot.id.bytes().take_while(u8::is_ascii_digit).count();
            existing.highest = existing.highest.max(snapshot.id[..digits].parse().unwrap_or(0));
        })?;
        existing.table_len = end - self.header().snapshots_offset;
        if existing.count >= MAX_SNAPSHOTS {
            let (value, limit) = (u64::from(existing.count) + 1, MAX_SNAPSHOTS.into());
            return Err(Error::LimitExceeded { what: "the number of snapshots", value, limit });
        }
        if existing.taken {
            return Err(self.snapshot_refused("create snapshot", "the id is in use"));
        }
        Ok(existing)
    }

    /// Writes all that the snapshot is, but for the header. If it fails everything is as before.
    fn prepare_snapshot(
        &self,
        new: &NewSnapshot,
        existing: &Existing,
        stop: &StopCheck<'_>,
    ) -> Result<Prepared> {
        let tables = L2Tables::of(&self.ctx, self.meta.lock().l1())?;
        let shared = self.share(&tables, stop).map_err(Error::from);
        let prepared = shared.and_then(|()| {
            let written = self.write_snapshot(new, existing, stop);
            written.inspect_err(|_| {
                let _ = self.unless_poisoned(|| self.take_back_references(&tables, u64::MAX));
            })
        });
        match prepared {
            Ok((l1, table, snapshot)) => Ok(Prepared { tables, l1, table, snapshot }),
            Err(error) => {
                // The disk has lost nothing but flags, which cost a copy each. Once the counts are back where
                // they were the flags are right.
                let _ = self.unless_poisoned(|| self.set_copied(&tables).and_then(|()| self.write_back()));
                Err(error)
            }
        }
    }

    fn unless_poisoned(&self, cleanup: impl FnOnce() -> BlockResult<()>) -> BlockResult<()> {
        if self.is_poisoned() { Ok(()) } else { cleanup() }
    }

    /// Makes everything that the active disk uses shared with another L1 table that is about to exist.
    fn share(&self, tables: &L2Tables, stop: &StopCheck<'_>) -> BlockResult<()> {
        self.clear_copied(tables, stop)?;
        self.clear_copied_l1();
        // Before a count is raised no entry says that its cluster has one reference.
        self.write_back()?;
        self.add_references(tables, stop)
    }

    /// Writes the L1 table and the snapshot table, durably. If it fails their places are given back.
    fn write_snapshot(
        &self,
        new: &NewSnapshot,
        existing: &Existing,
        stop: &StopCheck<'_>,
    ) -> Result<(Range<HostCluster>, NewTable, Snapshot)> {
        let cluster = self.ctx.cluster();
        let active: Vec<L1Entry> = self.meta.lock().l1().to_vec();
        // At most 32 MiB, and whole clusters.
        let mut bytes = vec![0; (cluster.count(active.len() as u64 * 8) * cluster.bytes()) as usize];
        for (word, entry) in bytes.chunks_exact_mut(8).zip(&active) {
            BigEndian::write_u64(word, entry.0);
        }
        let l1 = if active.is_empty() { Range::default() } else { self.write_table(&bytes, stop)? };
        let give_back_l1 = |error: &BlockError| self.give_back_table(l1.clone(), error);
        let snapshot = Snapshot {
            id: new.id.clone().unwrap_or_else(|| existing.highest.saturating_add(1).to_string()),
            name: new.name.clone(),
            date: new
                .date
                .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()),
            vm_clock: new.vm_clock,
            vm_state_size: 0,
            disk_size: Some(self.ctx.size()),
            icount: new.icount,
            l1_offset: cluster.start(l1.start).0,
            // At most 32 MiB of table: it fits.
            l1_entries: active.len() as u32,
        };
        let table = self.snapshot_table(None).and_then(|(mut table, _)| {
            table.extend(encode(&snapshot));
            self.write_snapshot_table(table, existing.count + 1, stop)
        });
        let table = table.map_err(|error| {
            let error = error.in_file(&self.ctx.name);
            give_back_l1(&error);
            error
        })?;
        self.write_back().inspect_err(|error| {
            give_back_l1(error);
            self.give_back_snapshot_table(&table, error);
        })?;
        Ok((l1, table, snapshot))
    }
}
