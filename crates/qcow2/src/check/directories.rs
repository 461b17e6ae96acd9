//! The snapshot table and the directory of bitmaps: the directories themselves, and which tables they name.

use std::collections::HashSet;

use super::spans::Use;
use super::{Checker, Finding, Structure};
use crate::error::{Error, Result};
use crate::format::bitmaps::{BitmapEntry, Bitmaps};
use crate::format::snapshot::{Snapshot, Snapshots};
use crate::limits;

/// Tables of words, as bytes of the file and as the clusters that they take.
#[derive(Debug, Default)]
pub(super) struct Uses {
    pub(super) bytes: Vec<Use>,
    pub(super) clusters: Vec<Use>,
}

impl Checker<'_> {
    /// Adds a table of `len` bytes at `offset` to `uses`; whether the file has all of it.
    pub(super) fn use_table(
        &mut self,
        uses: &mut Uses,
        structure: Structure,
        offset: u64,
        len: u64,
        active: bool,
    ) -> bool {
        let end = offset.saturating_add(len);
        let missing = end.saturating_sub(self.file_len);
        // No reader takes a part of a table.
        let is_whole = missing == 0 || (len == 0 && missing < self.cluster_size());
        if !is_whole {
            self.find(&Finding::PastEnd { structure, offset, len }, 1);
        }
        // What lies there is looked at, but it may be anything, so nothing in it is corrected.
        if is_whole || self.fixing.is_none() {
            let (start, end) = (offset.min(self.file_len), end.min(self.file_len));
            uses.bytes.push(Use { start, end, active });
        }
        // The file may end inside its last cluster.
        if missing < self.cluster_size() {
            let cluster = self.format.cluster;
            let (start, end) = (offset >> cluster.bits(), cluster.count(end));
            uses.clusters.push(Use { start, end, active });
        }
        is_whole
    }

    /// Counts the snapshot table, and adds the L1 tables of snapshots to `uses`.
    pub(super) fn count_snapshots(&mut self, uses: &mut Uses) -> Result<()> {
        let (storage, start) = (self.storage, self.header.snapshots_offset);
        let header = self.header.clone();
        let mut snapshots = Snapshots::new(storage, &header)?;
        let mut at = start;
        while let Some(entry) = snapshots.next() {
            match entry {
                Ok(snapshot) => self.use_snapshot(&snapshot, at, uses),
                Err(error @ Error::Storage(_)) => return Err(error),
                Err(error) => {
                    self.tables_missing = true;
                    let (structure, why) = (Structure::SnapshotTable, error.to_string());
                    self.find(&Finding::Unreadable { structure, offset: start, why }, 1);
                }
            }
            at = snapshots.end();
        }
        if self.count_range(Structure::SnapshotTable, start, at - start, 1, 0) {
            let cluster = self.format.cluster;
            let (start, end) = (start >> cluster.bits(), cluster.count(at));
            self.table_clusters.push(Use { start, end, active: true });
        }
        Ok(())
    }

    fn use_snapshot(&mut self, snapshot: &Snapshot, at: u64, uses: &mut Uses) {
        let (offset, len) = (snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
        if self.header.version >= 3 && snapshot.disk_size.is_none() {
            self.find(
                &Finding::BadEntry { at, why: "a snapshot that does not say how long the disk was" },
                1,
            );
        }
        let structure = Structure::L1Table;
        if !offset.is_multiple_of(self.cluster_size()) || offset > limits::MAX_HOST_OFFSET {
            self.find(&Finding::Misaligned { structure, at, offset }, 1);
        } else if len > limits::MAX_L1_BYTES {
            self.find(&Finding::BadEntry { at, why: "a snapshot whose L1 table is too long" }, 1);
        } else if self.use_table(uses, structure, offset, len, false) {
            return;
        }
        self.tables_missing = true;
    }

    /// Counts the directory of bitmaps, and adds their tables to `uses`. Bitmaps that are not valid have no
    /// clusters: no reader uses them.
    pub(super) fn count_bitmaps(&mut self, uses: &mut Uses) -> Result<()> {
        let Some(extension) = self.header.bitmaps.filter(|_| self.header.bitmaps_valid()) else {
            return Ok(());
        };
        let (structure, offset) = (Structure::BitmapDirectory, extension.directory_offset);
        if !self.count_range(structure, offset, extension.directory_size, 1, 0) {
            self.bitmaps_damaged = true;
            return Ok(());
        }
        let storage = self.storage;
        let mut entries = match Bitmaps::new(storage, &extension) {
            Ok(entries) => entries,
            Err(error) => return self.bad_bitmaps(offset, error),
        };
        let mut names = HashSet::new();
        for entry in entries.by_ref() {
            let bitmap = match entry {
                Ok(bitmap) => bitmap,
                Err(error) => return self.bad_bitmaps(offset, error),
            };
            if let Some(why) = self.unusable(&bitmap) {
                self.bitmaps_damaged = true;
                self.find(&Finding::BadEntry { at: offset, why }, 1);
            }
            // As bytes: names that are no text may look alike.
            if !names.insert(bitmap.name) {
                self.bitmaps_damaged = true;
                self.find(&Finding::BadEntry { at: offset, why: "two bitmaps with one name" }, 1);
            }
            let (table, len) = (bitmap.table_offset, u64::from(bitmap.table_entries) * 8);
            if table == 0 || !table.is_multiple_of(self.cluster_size()) {
                self.bitmaps_damaged = true;
                let structure = Structure::BitmapTable;
                self.find(&Finding::Misaligned { structure, at: offset, offset: table }, 1);
            } else if !self.use_table(uses, Structure::BitmapTable, table, len, false) {
                self.bitmaps_damaged = true;
            }
        }
        if entries.next_offset() != offset + extension.directory_size {
            self.bitmaps_damaged = true;
            self.find(&Finding::BadEntry { at: offset, why: "a directory longer than its bitmaps" }, 1);
        }
        Ok(())
    }

    /// Why no reader takes the bitmap, whatever its table holds.
    fn unusable(&self, bitmap: &BitmapEntry) -> Option<&'static str> {
        // At most 2^53.
        let bytes = u64::from(bitmap.table_entries) * self.cluster_size();
        let covered = (bytes * 8).saturating_mul(bitmap.granularity);
        if bytes == 0 {
            Some("a bitmap whose table has no entries")
        } else if bytes > limits::MAX_BITMAP_BYTES {
            Some("a bitmap whose table is too long")
        } else if !bitmap.in_use && covered < self.header.virtual_size {
            Some("a bitmap that is too short for the disk")
        } else {
            None
        }
    }

    fn bad_bitmaps(&mut self, offset: u64, error: Error) -> Result<()> {
        if matches!(error, Error::Storage(_)) {
            return Err(error);
        }
        self.bitmaps_damaged = true;
        let (structure, why) = (Structure::BitmapDirectory, error.to_string());
        self.find(&Finding::Unreadable { structure, offset, why }, 1);
        Ok(())
    }
}
