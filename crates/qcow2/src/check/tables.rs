//! Counts what the L1 tables, their L2 tables and the tables of bitmaps refer to.
//!
//! Entries that no reader could take otherwise are corrected on the way, if that is asked for (`fixing`):
//! reserved bits are cleared, and a misaligned cluster that holds nothing but zeros is dropped.

use blockmirror_block::zero::is_zero;
use byteorder::{BigEndian, ByteOrder};

use super::counts::{COPIED, NOT_COPIED};
use super::directories::Uses;
use super::spans::{Span, spans};
use super::{Checker, Finding, Structure};
use crate::error::Result;
use crate::format::bitmaps::TableEntry;
use crate::format::entry::{CompressedRun, Entry, EntryError, L1Entry, PlainEntry};
use crate::offset::{GuestOffset, HostOffset};

/// Bytes that are read at once, if a table is not longer.
const READ: u64 = 1 << 20;
/// Bytes of a table that are skipped at once if they are zeros.
const SKIP: usize = 1024;
/// References to L2 tables that are kept before those to the same table are made one.
const MANY_REFS: usize = 1 << 16;

/// An L2 table, and how many L1 entries refer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TableRef {
    pub(super) at: u64,
    pub(super) active: u64,
    pub(super) others: u64,
}

impl TableRef {
    pub(super) fn uses(&self) -> u64 {
        self.active + self.others
    }
}

/// An L2 entry: its two words, of which the second is zero unless entries are extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Words(pub(super) u64, pub(super) u64);

impl Checker<'_> {
    /// Counts the L1 tables of the image and of its snapshots, bitmaps, and all that they refer to.
    pub(super) fn count_tables(&mut self) -> Result<()> {
        let mut uses = Uses::default();
        self.count_snapshots(&mut uses)?;
        let (offset, len) = (self.header.l1_offset, u64::from(self.header.l1_entries) * 8);
        if !self.use_table(&mut uses, Structure::L1Table, offset, len, true) {
            self.tables_missing = true;
        }
        self.count_uses(&uses);
        self.each_word(&spans(&uses.bytes), Self::count_l1_entry)?;
        self.table_clusters.extend(uses.clusters);
        let tables = merged(std::mem::take(&mut self.tables));
        self.total += tables.len() as u64 * self.cluster_size() + self.disk.table.len() as u64;
        self.each_table(&tables, Self::count_l2_table)?;
        self.tables = tables;

        let mut uses = Uses::default();
        self.count_bitmaps(&mut uses)?;
        self.count_uses(&uses);
        self.each_word(&spans(&uses.bytes), Self::count_bitmap_entry)
    }

    /// Counts the clusters that tables take.
    fn count_uses(&mut self, uses: &Uses) {
        for span in spans(&uses.clusters) {
            for cluster in span.start..span.end {
                let lost = self.counts.add(cluster, span.uses(), 0);
                self.find(&Finding::RefcountOverflow { cluster }, lost);
            }
        }
    }

    /// Calls `each` with the words in `all` that are not zero, and where they lie. What it returns takes
    /// their place: all changes in what is read at once are one write, in which what lies between them stays
    /// as it is.
    pub(super) fn each_word(
        &mut self,
        all: &[Span],
        each: fn(&mut Self, u64, u64, &Span) -> Result<u64>,
    ) -> Result<()> {
        let mut buf = Vec::new();
        for span in all {
            let end = span.end.min(self.file_len.next_multiple_of(8));
            let mut at = span.start;
            while at < end {
                let len = READ.min(end - at);
                self.step(len)?;
                // At most READ.
                buf.resize(len as usize, 0);
                self.storage.read_at(&mut buf, at)?;
                let mut changed = None;
                for index in (0..buf.len() / 8).map(|i| i * 8) {
                    let word = BigEndian::read_u64(&buf[index..]);
                    if word == 0 {
                        continue;
                    }
                    let new = each(self, at + index as u64, word, span)?;
                    if new != word {
                        BigEndian::write_u64(&mut buf[index..], new);
                        changed = Some((changed.map_or(index, |(first, _)| first), index + 8));
                    }
                }
                if let Some((first, end)) = changed {
                    self.storage.write_at(&buf[first..end], at + first as u64)?;
                }
                at += len;
            }
        }
        Ok(())
    }

    /// Whether entries are corrected, and the cluster with the one at `at` holds nothing but a table that is
    /// used `uses` times.
    fn may_fix(&self, at: u64, uses: u64) -> bool {
        let cluster = at >> self.format.cluster.bits();
        self.fixing.as_ref().is_some_and(|counted| counted.get(cluster) == uses)
    }

    fn count_l1_entry(&mut self, at: u64, word: u64, span: &Span) -> Result<u64> {
        let cleaned = self.count_l1(at, word, span);
        Ok(if self.may_fix(at, span.uses()) { cleaned } else { word })
    }

    /// Counts one L1 entry. Returns it as it should be.
    fn count_l1(&mut self, at: u64, word: u64, span: &Span) -> u64 {
        let entry = L1Entry(word);
        if entry.cleaned() != entry {
            self.bad_entries += 1;
            self.find(&Finding::ReservedBits { table: Structure::L1Table, at, entry: word }, span.uses());
        }
        let Some(HostOffset(table)) = entry.table() else { return entry.cleaned().0 };
        let (size, uses) = (self.cluster_size(), span.uses());
        let flags = match (span.active, entry.copied()) {
            (0, _) => 0,
            (_, true) => COPIED,
            (_, false) => NOT_COPIED,
        };
        let is_there = self.count_range(Structure::L2Table, table, size, uses, flags);
        if !table.is_multiple_of(size) {
            self.copied_in_doubt = true;
            let structure = Structure::L2Table;
            self.find(&Finding::Misaligned { structure, at, offset: table }, uses);
        } else if is_there {
            if table + size > self.file_len {
                // The entries that it has are counted, but not those that the file lacks.
                self.tables_missing = true;
                let structure = Structure::L2Table;
                self.find(&Finding::PastEnd { structure, offset: table, len: size }, uses);
            }
            self.tables.push(TableRef { at: table, active: span.active, others: span.others });
            // There are no more tables than clusters, so this happens less and less often.
            if self.tables.len() > MANY_REFS.max(2 * self.file_clusters() as usize) {
                self.tables = merged(std::mem::take(&mut self.tables));
            }
            return entry.cleaned().0;
        }
        self.tables_missing = true;
        entry.cleaned().0
    }

    /// Reads `tables`, which are in order, and calls `each` with the bytes of each; those are written if it
    /// says so.
    pub(super) fn each_table(
        &mut self,
        tables: &[TableRef],
        each: fn(&mut Self, &mut [u8], &TableRef) -> Result<bool>,
    ) -> Result<()> {
        let size = self.cluster_size();
        let mut buf = Vec::new();
        let mut rest = tables;
        while let Some(first) = rest.first() {
            // Tables that lie one behind the other are read in one go.
            let most = (READ / size).max(1) as usize;
            let run =
                rest.iter().zip(0..).take(most).take_while(|(t, i)| t.at == first.at + i * size).count();
            let (now, later) = rest.split_at(run);
            rest = later;
            self.step(run as u64 * size)?;
            // At most 1 MiB, or one cluster.
            buf.resize(run * size as usize, 0);
            self.storage.read_at(&mut buf, first.at)?;
            for (table, data) in now.iter().zip(buf.chunks_exact_mut(size as usize)) {
                if each(self, data, table)? {
                    self.storage.write_at(data, table.at)?;
                }
            }
        }
        Ok(())
    }

    fn count_l2_table(&mut self, data: &mut [u8], table: &TableRef) -> Result<bool> {
        let may_fix = self.may_fix(table.at, table.uses());
        let mut next = 0;
        Ok(self.each_entry(data, table.at, |checker, at, words| {
            let new = checker.count_entry(at, words, table, &mut next);
            may_fix.then_some(new)
        }))
    }

    /// Calls `each` with the entries of `data`, an L2 table at `at`, that are not zero. What it returns
    /// replaces them; whether that changed anything.
    pub(super) fn each_entry(
        &mut self,
        data: &mut [u8],
        at: u64,
        mut each: impl FnMut(&mut Self, u64, Words) -> Option<Words>,
    ) -> bool {
        let step = self.format.entry_size() as usize;
        let mut changed = false;
        for (piece, start) in data.chunks_mut(SKIP).zip((at..).step_by(SKIP)) {
            if is_zero(piece) {
                continue;
            }
            for (entry, at) in piece.chunks_exact_mut(step).zip((start..).step_by(step)) {
                let second = entry.get(8..).filter(|rest| !rest.is_empty()).map_or(0, BigEndian::read_u64);
                let words = Words(BigEndian::read_u64(entry), second);
                if words == Words(0, 0) {
                    continue;
                }
                if let Some(new) = each(self, at, words).filter(|new| *new != words) {
                    changed = true;
                    BigEndian::write_u64(entry, new.0);
                    if let Some(rest) = entry.get_mut(8..).filter(|rest| !rest.is_empty()) {
                        BigEndian::write_u64(rest, new.1);
                    }
                }
            }
        }
        changed
    }

    /// Counts one L2 entry; `next` is where a cluster would lie that follows the one before. Returns the
    /// entry as it should be.
    fn count_entry(
        &mut self,
        at: u64,
        Words(mut word, mut word1): Words,
        table: &TableRef,
        next: &mut u64,
    ) -> Words {
        let uses = table.uses();
        let reserved = self.format.reserved(word);
        if reserved != 0 {
            self.bad_entries += 1;
            self.find(&Finding::ReservedBits { table: Structure::L2Table, at, entry: word }, uses);
            word &= !reserved;
        }
        let host = self.format.host_of(word);
        let bad = |why| Finding::BadEntry { at, why };
        // With a data file, where it says it lies is where it is looked for.
        match self.format.decode(word, word1, GuestOffset(host.0)) {
            Ok(Entry::Compressed(run)) => {
                if self.format.is_copied(word) {
                    self.bad_entries += 1;
                    self.find(&bad("a compressed cluster has the COPIED flag"), uses);
                    word = self.format.with_copied(word, false);
                }
                if word1 != 0 {
                    // No reader looks at it.
                    self.bad_entries += 1;
                    self.find(&bad("a compressed cluster has subclusters"), uses);
                    word1 = 0;
                }
                self.count_compressed(run, uses);
                self.report.allocated_clusters += table.active;
                self.report.compressed_clusters += table.active;
                self.report.fragmented_clusters += table.active;
            }
            Err(error @ EntryError::CompressedExternal) => self.find(&bad(name_of(error)), uses),
            Ok(Entry::Plain(PlainEntry { host: None, .. })) => {}
            Ok(Entry::Plain(PlainEntry { host: Some(host), .. })) => {
                self.count_mapped(host, word, table, next)
            }
            Err(EntryError::Misaligned(offset)) => {
                let holds_data = if self.format.extended { word1 as u32 != 0 } else { word & 1 == 0 };
                self.find(&Finding::Misaligned { structure: Structure::Data, at, offset }, uses);
                self.copied_in_doubt = true;
                if !holds_data {
                    self.bad_entries += 1;
                    if self.may_fix(table.at, uses) {
                        return Words(if self.format.extended { 0 } else { 1 }, word1);
                    }
                }
                self.count_mapped(host, word, table, next);
            }
            Err(error) => {
                self.find(&bad(name_of(error)), uses);
                if host.0 != 0 {
                    self.count_mapped(host, word, table, next);
                }
            }
        }
        Words(word, word1)
    }

    /// Counts the clusters of a compressed run. How long it is says an upper bound: a run that begins in the
    /// file and ends past it can be read where its stream ends before. One that begins at the end of the file
    /// is lost.
    fn count_compressed(&mut self, run: CompressedRun, uses: u64) {
        let (structure, HostOffset(offset)) = (Structure::CompressedData, run.offset);
        let is_counted = self.count_range(structure, offset, run.len, uses, 0);
        if is_counted && offset >= self.file_len {
            self.find(&Finding::PastEnd { structure, offset, len: run.len }, uses);
        } else if !is_counted && offset < self.file_len {
            self.count_range(structure, offset, self.file_len - offset, uses, 0);
        }
    }

    /// Counts the cluster at `host`, which the entry `word` maps.
    fn count_mapped(&mut self, HostOffset(host): HostOffset, word: u64, table: &TableRef, next: &mut u64) {
        let size = self.cluster_size();
        if table.active > 0 {
            self.report.allocated_clusters += table.active;
            if *next != 0 && host != *next {
                self.report.fragmented_clusters += table.active;
            }
            *next = host + size;
        }
        let copied = self.format.is_copied(word);
        if self.format.external_data {
            self.copied_in_doubt |= table.active > 0 && !copied;
            return;
        }
        let flags = match (table.active, copied) {
            (0, _) => 0,
            (_, true) => COPIED,
            (_, false) => NOT_COPIED,
        };
        self.count_range(Structure::Data, host, size, table.uses(), flags);
    }

    fn count_bitmap_entry(&mut self, at: u64, word: u64, span: &Span) -> Result<u64> {
        match TableEntry::parse(word, self.format.cluster) {
            TableEntry::Clear | TableEntry::Set => {}
            TableEntry::Stored(HostOffset(offset)) => {
                let size = self.cluster_size();
                if !self.count_range(Structure::BitmapData, offset, size, span.uses(), 0) {
                    self.bitmaps_damaged = true;
                }
            }
            TableEntry::Invalid => {
                self.bitmaps_damaged = true;
                let why = "an entry of a bitmap table that makes no sense";
                self.find(&Finding::BadEntry { at, why }, span.uses());
            }
        }
        Ok(word)
    }
}

/// Tables in order of the file, each once.
fn merged(mut tables: Vec<TableRef>) -> Vec<TableRef> {
    tables.sort_unstable_by_key(|table| table.at);
    tables.dedup_by(|next, kept| {
        let same = next.at == kept.at;
        if same {
            kept.active += next.active;
            kept.others += next.others;
        }
        same
    });
    tables
}

fn name_of(error: EntryError) -> &'static str {
    match error {
        EntryError::CompressedExternal => "a compressed cluster in an image with a data file",
        EntryError::AllocatedAndZero(_) => "subclusters are both allocated and zero",
        EntryError::AllocatedNowhere(_) => "subclusters are allocated, but there is no cluster",
        _ => "an L2 entry that makes no sense",
    }
}
