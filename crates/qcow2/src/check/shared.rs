//! Tables that share a cluster: with each other, or an L2 table among entries of one L1 table.
//!
//! A check that counts references, as QEMU's, takes that for sound once the refcounts say so, which they do
//! after QEMU's repair. But a change of one of them changes the other, so such an image is not opened for
//! writing (`overlap`). The check says so, and names the tables that a repair moves to clusters of their own.
//!
//! Where a refcount is too low that is the finding, as it is QEMU's, and nothing is added to it. Refcount
//! blocks have a finding of their own.

use super::spans::{Use, spans};
use super::{Checker, Finding};
use crate::error::Result;
use crate::offset::{ClusterRange, HostCluster, HostOffset};

/// An L2 table, and how many entries of the active L1 table get a copy of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableToMove {
    pub(crate) at: u64,
    pub(crate) copies: u64,
}

impl Checker<'_> {
    /// Looks for tables that share a cluster.
    pub(super) fn check_shared(&mut self) -> Result<()> {
        let cluster = self.format.cluster;
        let mut uses = self.table_clusters.clone();
        let header = &self.header;
        let refcounts = u64::from(header.refcount_table_clusters) << cluster.bits();
        for (start, len) in [(0, cluster.bytes()), (header.refcount_table_offset, refcounts)] {
            let (start, end) = (start >> cluster.bits(), cluster.count(start.saturating_add(len)));
            uses.push(Use { start, end: end.min(self.file_clusters()), active: true });
        }
        let spans = spans(&uses);
        for span in spans.iter().filter(|span| span.uses() > 1) {
            for cluster in span.start..span.end {
                self.find_shared(cluster, &Finding::TablesOverlap { cluster, tables: span.uses() })?;
            }
        }
        let mut rest = &*spans;
        let tables = std::mem::take(&mut self.tables);
        let found = tables.iter().filter(|table| table.active > 0).try_for_each(|table| {
            let index = table.at >> cluster.bits();
            // Both are in order of the file.
            while let [span, behind @ ..] = rest
                && span.end <= index
            {
                rest = behind;
            }
            let others = rest.first().filter(|span| span.start <= index).map_or(0, |span| span.uses());
            // More than one there was found above.
            if others == 1 {
                self.find_shared(index, &Finding::TablesOverlap { cluster: index, tables: 2 })?;
            }
            if table.active > 1 {
                let (offset, entries) = (table.at, table.active);
                self.find_shared(index, &Finding::SharedL2Table { offset, entries })?;
            }
            Ok(())
        });
        self.tables = tables;
        found
    }

    /// Reports `finding` of `cluster`, unless its refcount is wrong so that this was found.
    fn find_shared(&mut self, cluster: u64, finding: &Finding) -> Result<()> {
        let references = self.counts.get(cluster);
        if self.refcount_on_disk(cluster)?.is_some_and(|refcount| refcount >= references) {
            self.find(finding, 1);
        }
        Ok(())
    }

    /// The L2 tables of the active disk that share their cluster, with how many copies leave each entry of
    /// the L1 table its own; and whether the active L1 table lies in a cluster with something else.
    ///
    /// At most as many copies as the file has clusters: where there would be more, tables of several entries
    /// stay. So they do with a data file, in whose clusters references are not counted: two entries that map
    /// one of them would both write to it. And nothing is moved where refcounts cannot say how often clusters
    /// are referred to once it is: tables that overlap keep the image from being written, and a write would
    /// free what another entry maps.
    pub(crate) fn shared_tables(&self) -> (Vec<TableToMove>, bool) {
        let to_move = |with_shared: bool| -> Vec<TableToMove> {
            let tables = self.tables.iter().filter(|table| table.active > 0);
            let copies = tables.map(|table| {
                let is_alone = self.is_alone(table.at, table.uses());
                let is_kept = is_alone || table.others > 0;
                let copies = match (table.active, is_kept) {
                    (1, _) => u64::from(!is_kept),
                    // Nor could the flags of one that stays be set right in its place.
                    _ if !with_shared || is_kept && !is_alone => 0,
                    (entries, _) => entries - u64::from(is_kept),
                };
                TableToMove { at: table.at, copies }
            });
            copies.filter(|table| table.copies > 0).collect()
        };
        let l1 = u64::from(self.header.l1_entries) * 8;
        let clusters = self.format.cluster.touched::<HostOffset>(HostOffset(self.header.l1_offset), l1);
        let (first, end) = (clusters.start.0, clusters.end.0);
        let is_shared = |cluster: HostCluster| self.counts.get(cluster.0) > 1;
        let l1_shared = clusters.each().any(is_shared);
        let of_l1 = |cluster: u64| u64::from(l1_shared && (first..end).contains(&cluster));
        let loses = |tables: &[TableToMove]| {
            self.counts.any_beyond(|cluster| {
                let found =
                    tables.binary_search_by_key(&cluster, |table| table.at >> self.format.cluster.bits());
                found.map_or(0, |index| tables[index].copies) + of_l1(cluster)
            })
        };
        let mut tables = to_move(!self.format.external_data);
        let copies = tables.iter().map(|table| table.copies).sum::<u64>();
        if copies > self.file_clusters() || loses(&tables) {
            tables = to_move(false);
        }
        if loses(&tables) {
            return (Vec::new(), false);
        }
        (tables, l1_shared)
    }
}
