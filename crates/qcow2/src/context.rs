//! The context of an open image: its storages, layout, length and backing device. Handed to every function
//! that works on the metadata, so that those need not know the image.
//!
//! Length and backing device change only while no read or write is under way ([`crate::resize`],
//! [`crate::backing`]); they are looked up anew by each operation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockmirror_block::sync::Mutex;
use blockmirror_block::{Backing, BlockDevice, ByteRange, Error, ErrorKind, Result, Storage, StorageEvent};

use crate::cache::SLICE_BYTES;
use crate::format::entry::EntryFormat;
use crate::known_data::KnownData;
use crate::offset::{ClusterSize, HostOffset};

/// The backing layer of an image.
#[derive(Clone, Debug, Default)]
pub(crate) struct BackingLayer {
    /// What shows through where nothing is allocated.
    pub(crate) device: Option<Arc<dyn BlockDevice>>,
    /// The header names a backing file.
    pub(crate) named: bool,
}

/// The parts of an open image that its metadata lock does not guard.
#[derive(Debug)]
pub(crate) struct ImageContext {
    /// The image file.
    pub(crate) storage: Arc<dyn Storage>,
    /// The external data file, if guest data lies there.
    pub(crate) data_file: Option<Arc<dyn Storage>>,
    /// *Guards* the backing layer. Leaf lock: held for a copy only.
    pub(crate) below: Mutex<BackingLayer>,
    /// Whether mapped clusters are looked for in the data storage, which may have a hole there.
    pub(crate) looks_for_holes: bool,
    /// New L2 tables are written whole, also where they read as zeros by themselves.
    pub(crate) whole_tables: bool,
    /// Where the data storage was last seen to hold no hole.
    pub(crate) known_data: KnownData,
    /// How L2 entries read.
    pub(crate) format: EntryFormat,
    /// Virtual size in bytes.
    pub(crate) size: AtomicU64,
    /// Writes and flushes of metadata that have ended.
    pub(crate) progress: AtomicU64,
    /// Name for messages.
    pub(crate) name: Arc<str>,
}

impl ImageContext {
    pub(crate) fn cluster(&self) -> ClusterSize {
        self.format.cluster
    }

    /// Virtual size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// What shows through where nothing is allocated.
    pub(crate) fn backing(&self) -> Option<Arc<dyn BlockDevice>> {
        self.below.lock().device.clone()
    }

    /// Whether the image names a backing file, but is open without one.
    pub(crate) fn hidden_backing(&self) -> bool {
        let below = self.below.lock();
        below.named && below.device.is_none()
    }

    /// What shows where nothing is allocated.
    pub(crate) fn backing_state(&self) -> Backing {
        let below = self.below.lock().clone();
        match below.device {
            Some(device) if device.geometry().backing == Backing::Hidden => Backing::Hidden,
            Some(_) => Backing::Attached,
            None if below.named => Backing::Hidden,
            None => Backing::Possible,
        }
    }

    /// Where guest data lies.
    pub(crate) fn data(&self) -> &Arc<dyn Storage> {
        self.data_file.as_ref().unwrap_or(&self.storage)
    }

    /// Entries in one L2 table.
    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster().bytes() / self.format.entry_size()
    }

    /// Size of the pieces in which metadata is cached and written.
    pub(crate) fn slice_size(&self) -> usize {
        // At most `SLICE_BYTES`, so the cast is exact.
        self.cluster().bytes().min(SLICE_BYTES as u64) as usize
    }

    /// An error that the bytes on disk are to blame for.
    pub(crate) fn corrupt(&self, operation: &'static str, at: u64, why: impl Into<String>) -> Error {
        Error::new(ErrorKind::Corrupt, operation).in_file(Arc::clone(&self.name)).at(at).because(why)
    }

    /// Whether the backing device may hold anything in `range`.
    pub(crate) fn backing_covers(&self, range: ByteRange) -> bool {
        self.below.lock().device.as_ref().is_some_and(|b| range.start() < b.len())
    }

    /// Whether the image stands on another layer, attached or only named.
    ///
    /// What is unallocated in such an image is not zero by itself, past the end of a shorter backing device
    /// too: a longer device may be attached later, by a stream or a commit that takes the layer between out
    /// of the chain.
    pub(crate) fn backed(&self) -> bool {
        let below = self.below.lock();
        below.named || below.device.is_some()
    }

    /// Reads guest data at `at` in the file that holds it.
    ///
    /// The file may end anywhere inside its last cluster; the rest of that cluster is zeros.
    ///
    /// # Errors
    /// [`ErrorKind::CutShort`] if a cluster of the range, or a subcluster, begins at or past the end of the
    /// file.
    pub(crate) fn read_data(&self, buf: &mut [u8], at: HostOffset) -> Result<()> {
        let data = self.data();
        self.storage.announce(StorageEvent::ReadAio);
        data.read_at(buf, at.0)?;
        // What lies past the end has been read as zeros, so the length is needed only where the last byte is
        // one.
        if buf.last() != Some(&0) {
            return Ok(());
        }
        let size = self.format.subcluster_size();
        let last = (at.0 + buf.len() as u64 - 1) / size * size;
        let len = data.len()?;
        if last < len {
            return Ok(());
        }
        Err(Error::new(ErrorKind::CutShort, "read").in_file(data.name()).at(last.min(at.0.max(len))).because(
            format!(
                "guest data lies at {last}, but the file ends at {len}: it was cut short and is whole up to \
                 there only"
            ),
        ))
    }

    /// Writes metadata to the image file.
    pub(crate) fn write_metadata(&self, buf: &[u8], at: u64) -> Result<()> {
        self.storage.write_at(buf, at)?;
        self.progress.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Reads one metadata slice into `buf`, which has room for several, and those behind it that start inside
    /// the file. Returns how many bytes of them the file has: what it lacks of the last one is zeros in
    /// `buf`.
    ///
    /// # Errors
    /// The first starts past the end of the file: it was never written.
    pub(crate) fn read_slices(&self, what: &'static str, at: HostOffset, buf: &mut [u8]) -> Result<usize> {
        let len = self.storage.len()?;
        if at.0 >= len {
            return Err(self.corrupt(
                what,
                at.0,
                format!("the table lies past the end of the file at {len}"),
            ));
        }
        let there = (len - at.0).min(buf.len() as u64) as usize;
        self.storage.read_at(&mut buf[..there.next_multiple_of(self.slice_size())], at.0)?;
        Ok(there)
    }

    /// Reads one metadata slice.
    ///
    /// # Errors
    /// As [`read_slices`](Self::read_slices).
    pub(crate) fn read_slice(&self, what: &'static str, at: HostOffset) -> Result<Box<[u8]>> {
        let mut data = vec![0; self.slice_size()].into_boxed_slice();
        self.read_slices(what, at, &mut data)?;
        Ok(data)
    }

    /// Checks that a table offset taken from the image is cluster aligned.
    pub(crate) fn check_table(&self, what: &'static str, at: HostOffset, index: u64) -> Result<()> {
        if self.cluster().within(at) == 0 {
            return Ok(());
        }
        Err(self.corrupt(
            what,
            at.0,
            format!("entry {index} points at {:#x}, which is not cluster aligned", at.0),
        ))
    }
}
