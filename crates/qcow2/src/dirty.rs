//! Which 512-byte sectors of a table of 64-bit entries differ from what is on disk.
//!
//! The L1 table and the refcount table are kept in memory whole; a write-back writes only the sectors that
//! changed, so that a torn write never touches an entry that was not to change.

use std::collections::BTreeSet;

use byteorder::{BigEndian, ByteOrder};

const ENTRIES: usize = 64;

/// Sectors of a table that are to be written.
#[derive(Clone, Debug, Default)]
pub(crate) struct DirtySectors {
    sectors: BTreeSet<usize>,
}

impl DirtySectors {
    /// Notes that entry `index` has changed.
    pub(crate) fn mark(&mut self, index: usize) {
        self.sectors.insert(index / ENTRIES);
    }

    /// The bytes to write, with their offsets from the start of the table, as the table stands now; nothing
    /// is dirty afterwards.
    pub(crate) fn take(&mut self, table: impl Fn(usize) -> Option<u64>) -> Vec<(u64, Vec<u8>)> {
        let sectors = std::mem::take(&mut self.sectors);
        let encode = |sector: usize| {
            let words: Vec<u64> = (sector * ENTRIES..(sector + 1) * ENTRIES).map_while(&table).collect();
            let mut bytes = vec![0; words.len() * 8];
            BigEndian::write_u64_into(&words, &mut bytes);
            ((sector * ENTRIES * 8) as u64, bytes)
        };
        sectors.into_iter().map(encode).collect()
    }

    /// Marks the sectors of writes that did not reach the storage.
    pub(crate) fn put_back(&mut self, writes: &[(u64, Vec<u8>)]) {
        // The offsets came out of `take`, from a usize.
        self.sectors.extend(writes.iter().map(|(at, _)| *at as usize / (ENTRIES * 8)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changed_sectors_are_written() {
        let table: Vec<u64> = (0..100).collect();
        let mut dirty = DirtySectors::default();
        dirty.mark(70);
        let writes = dirty.take(|i| table.get(i).copied());
        assert_eq!(writes.len(), 1);
        assert_eq!((writes[0].0, writes[0].1.len()), (512, 36 * 8));
        assert_eq!(writes[0].1[..8], [0, 0, 0, 0, 0, 0, 0, 64]);
        assert!(dirty.sectors.is_empty());
        dirty.put_back(&writes);
        assert_eq!(dirty.take(|i| table.get(i).copied()).len(), 1);
    }
}
