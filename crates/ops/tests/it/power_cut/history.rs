//! Storages that are recorded together, in one order, so that a power cut leaves all of them at one instant.

use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_block::testing::{Logged, RecordingStorage, Rng};
use blockmirror_block::{ByteRange, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags};

/// The changes of several storages: which storage each was of, and how many entries that then had.
#[derive(Debug, Default)]
pub(super) struct History {
    changes: Mutex<Vec<(usize, usize)>>,
}

/// One of the storages of a history.
#[derive(Debug)]
pub(super) struct Part {
    name: &'static str,
    index: usize,
    own: RecordingStorage,
    base: Vec<u8>,
    history: Arc<History>,
}

impl History {
    /// A storage that holds `base`, durably. Each part has an `index` of its own.
    pub(super) fn part(self: &Arc<Self>, index: usize, name: &'static str, base: Vec<u8>) -> Arc<Part> {
        let own = RecordingStorage::with_contents(&base);
        Arc::new(Part { name, index, own, base, history: Arc::clone(self) })
    }

    /// Changes so far.
    pub(super) fn len(&self) -> usize {
        self.changes.lock().len()
    }

    /// Entries that the part `index` had after so many changes.
    pub(super) fn position(&self, index: usize, changes: usize) -> usize {
        let all = self.changes.lock();
        all[..changes].iter().rev().find(|(part, _)| *part == index).map_or(0, |(_, position)| *position)
    }

    /// Changes when the part `index` first had `position` entries.
    pub(super) fn reaching(&self, index: usize, position: usize) -> usize {
        let all = self.changes.lock();
        let reached = all.iter().position(|(part, entries)| *part == index && *entries >= position);
        if position == 0 { 0 } else { reached.map_or(all.len(), |change| change + 1) }
    }
}

impl Part {
    pub(super) fn own(&self) -> &RecordingStorage {
        &self.own
    }

    fn change<T>(&self, change: impl FnOnce(&RecordingStorage) -> T) -> T {
        let mut changes = self.history.changes.lock();
        let done = change(&self.own);
        changes.push((self.index, self.own.position()));
        done
    }

    /// What a power cut has left when its recording, whose entries these are, had `position` of them: all
    /// that was flushed, and of the rest nothing, all, or any part, torn between sectors.
    pub(super) fn after_cut(&self, entries: &[Logged], position: usize, rng: &mut Rng) -> Vec<u8> {
        let entries = &entries[..position];
        let flushed = entries.iter().rposition(|entry| *entry == Logged::Flush);
        let lost = rng.below(4);
        let mut bytes = self.base.clone();
        for (index, entry) in entries.iter().enumerate() {
            let is_durable = flushed.is_some_and(|flushed| index <= flushed);
            let stays = is_durable || (lost > 0 && (lost == 1 || rng.one_in(2)));
            // A length is set with the first of the writes that need it.
            match entry {
                Logged::SetLen(len) if stays => bytes.resize(*len as usize, 0),
                Logged::Zero(range) if stays => {
                    bytes.resize(bytes.len().max(range.end() as usize), 0);
                    bytes[range.start() as usize..range.end() as usize].fill(0);
                }
                Logged::Write { offset, data } if stays => {
                    let torn = !is_durable && lost == 3 && rng.one_in(3);
                    let sectors = data.len() as u64 / 512;
                    let len = if torn { rng.below(sectors + 1) as usize * 512 } else { data.len() };
                    let at = *offset as usize;
                    bytes.resize(bytes.len().max(at + len), 0);
                    bytes[at..at + len].copy_from_slice(&data[..len]);
                }
                _ => {}
            }
        }
        bytes
    }
}

impl Storage for Part {
    fn name(&self) -> &str {
        self.name
    }

    fn len(&self) -> Result<u64> {
        self.own.len()
    }

    fn info(&self) -> StorageInfo {
        self.own.info()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.own.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.change(|own| own.write_at(buf, offset))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.change(|own| own.write_zeroes(range, flags))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.change(|own| own.discard(range))
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.change(|own| own.allocate(range))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(|own| own.set_len(len))
    }

    fn flush(&self) -> Result<()> {
        self.change(Storage::flush)
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.own.extents(range, visit)
    }
}
