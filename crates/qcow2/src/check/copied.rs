//! Holds the COPIED flags of the active L1 and L2 tables against the refcounts on disk: an entry has it if
//! and only if the refcount of what it maps is one. Where a cluster has more references than a refcount can
//! say, no entry has it.
//!
//! The comparison of all refcounts (`compare`) came before: what it has read is not read again, in whatever
//! order entries name clusters.

use super::spans::{Span, Use, spans};
use super::tables::{TableRef, Words};
use super::{Checker, Finding, Reporting, Structure};
use crate::error::Result;
use crate::format::entry::L1Entry;

impl Checker<'_> {
    /// Looks at every flag, and with `fix` sets those right that are wrong.
    pub(crate) fn check_copied(&mut self, fix: bool) -> Result<()> {
        let (start, len) = (self.header.l1_offset, u64::from(self.header.l1_entries) * 8);
        let l1 = spans(&[Use { start, end: start.saturating_add(len), active: true }]);
        let tables: Vec<_> = self.tables.iter().filter(|table| table.active > 0).copied().collect();
        self.total += tables.len() as u64 * self.cluster_size();
        if fix {
            self.each_word(&l1, Self::fix_l1_flag)?;
            self.each_table(&tables, Self::fix_l2_flags)
        } else {
            self.each_word(&l1, Self::check_l1_flag)?;
            self.each_table(&tables, |checker, data, table| {
                checker.check_l2_flags(data, table).map(|_| false)
            })
        }
    }

    fn check_l1_flag(&mut self, at: u64, word: u64, _: &Span) -> Result<u64> {
        self.l1_flag(at, word)?;
        Ok(word)
    }

    /// The L1 entry `word` as it should be.
    fn l1_flag(&mut self, at: u64, word: u64) -> Result<u64> {
        let entry = L1Entry(word);
        let Some(table) = entry.table() else { return Ok(word) };
        let cluster = self.format.cluster.index(table).0;
        let Some(refcount) = self.refcount_on_disk(cluster)? else { return Ok(word) };
        let (copied, is_owned) = (entry.copied(), self.is_owned(cluster, refcount));
        if is_owned != copied {
            let (structure, offset) = (Structure::L2Table, table.0);
            let index = (at - self.header.l1_offset) / 8;
            self.find(&Finding::CopiedWrong { structure, at, index, offset, copied, refcount }, 1);
        }
        Ok(entry.with_copied(is_owned).0)
    }

    /// The refcount of `cluster` on disk; `None` if it cannot be read. Past the end of the file no more
    /// slices are read than the file has clusters.
    pub(super) fn refcount_on_disk(&mut self, cluster: u64) -> Result<Option<u64>> {
        let (right, most) = (self.counts.refcount(cluster), self.file_clusters());
        Ok(self.disk.get_compared(self.storage, cluster, right, most)?)
    }

    /// Whether an entry of `cluster`, whose refcount on disk is `refcount`, has the flag.
    fn is_owned(&self, cluster: u64, refcount: u64) -> bool {
        refcount == 1 && self.counts.get(cluster) == self.counts.refcount(cluster)
    }

    /// The entry `index` of the active L1 table, with the flag as it should be. Everything was checked.
    pub(crate) fn right_l1_entry(&mut self, index: u64, entry: L1Entry) -> Result<L1Entry> {
        self.reporting = Reporting::Silent;
        Ok(L1Entry(self.l1_flag(self.header.l1_offset + index * 8, entry.0)?))
    }

    /// Sets flags right in `data`, a copy of the L2 table at `at`. Everything was checked.
    pub(crate) fn set_l2_flags(&mut self, data: &mut [u8], at: u64) -> Result<()> {
        self.reporting = Reporting::Silent;
        if let Ok(index) = self.tables.binary_search_by_key(&at, |table| table.at) {
            let table = self.tables[index];
            self.check_l2_flags(data, &table)?;
        }
        Ok(())
    }

    fn fix_l1_flag(&mut self, at: u64, word: u64, _: &Span) -> Result<u64> {
        let new = self.l1_flag(at, word)?;
        Ok(if self.is_alone(at, 1) { new } else { word })
    }

    /// Looks at the flags of one table; whether some were wrong, which are right in `data` then.
    fn check_l2_flags(&mut self, data: &mut [u8], table: &TableRef) -> Result<bool> {
        let mut failed = None;
        let changed = self.each_entry(data, table.at, |checker, at, words| {
            checker.check_l2_flag(at, words, table).unwrap_or_else(|error| {
                failed = Some(error);
                None
            })
        });
        failed.map_or(Ok(changed), Err)
    }

    fn fix_l2_flags(&mut self, data: &mut [u8], table: &TableRef) -> Result<bool> {
        Ok(self.check_l2_flags(data, table)? && self.is_alone(table.at, table.uses()))
    }

    /// Whether the cluster with the byte at `at` holds nothing but a table that is used `uses` times.
    pub(super) fn is_alone(&self, at: u64, uses: u64) -> bool {
        self.counts.get(at >> self.format.cluster.bits()) == uses
    }

    fn check_l2_flag(
        &mut self,
        at: u64,
        Words(word, word1): Words,
        table: &TableRef,
    ) -> Result<Option<Words>> {
        let Some(host) = self.format.mapped_host(word) else { return Ok(None) };
        let cluster = self.format.cluster.index(host).0;
        let (refcount, is_owned) = if self.format.external_data {
            // Nothing is counted there, and nothing shared.
            (1, true)
        } else {
            let Some(refcount) = self.refcount_on_disk(cluster)? else { return Ok(None) };
            (refcount, self.is_owned(cluster, refcount))
        };
        let copied = self.format.is_copied(word);
        if is_owned == copied {
            return Ok(None);
        }
        let (structure, offset) = (Structure::Data, host.0);
        let index = (at - table.at) / self.format.entry_size();
        self.find(&Finding::CopiedWrong { structure, at, index, offset, copied, refcount }, table.active);
        Ok(Some(Words(self.format.with_copied(word, is_owned), word1)))
    }
}
