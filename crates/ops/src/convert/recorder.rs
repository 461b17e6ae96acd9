//! Recorder: writes the checkpoint of a running conversion, and removes it when it is of no use any more.
//!
//! The mirror job calls it after each flush ([`CheckpointSink`]). Must hold: a region is marked only when
//! none of it was missing as the flush began.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_bitmap::{DirtyBitmap, MAX_GRANULARITY};
use blockmirror_block::sync::Mutex;
use blockmirror_block::{self as block, ByteRange};
use blockmirror_checkpoint::{self as checkpoint, Checkpoint, region_size};
use blockmirror_file::FileOptions;
use blockmirror_image::PreparedImage;
use blockmirror_mirror::{CheckpointSink, Checkpoints};

use super::checkpoint::{Place, Resumable};
use super::error::ConvertError;
use super::identity;
use super::resume::PreparedCheckpoint;

/// The checkpoint of a running conversion. Dropped before it is [settled](Self::settle), one that was begun
/// anew is removed.
#[derive(Debug)]
pub(super) struct Recorder {
    /// Guards the log. Leaf lock: held while a record is written, by one worker at a time.
    log: Mutex<Checkpoint>,
    path: PathBuf,
    partial: PathBuf,
    interval: u64,
    /// Bytes of the disk that an earlier run had copied.
    resumed: u64,
    /// Whether there is a mark in a file that stays.
    resumable: Resumable,
    /// Whether the file stays when this is dropped, or is gone already.
    settled: AtomicBool,
}

impl Recorder {
    /// Opens the checkpoint, or makes it, for a copy of a disk of `len` bytes.
    pub(super) fn begin(
        prepared: PreparedCheckpoint,
        image: &mut PreparedImage,
        len: u64,
        cluster_size: Option<u64>,
    ) -> Result<Arc<Self>, ConvertError> {
        let PreparedCheckpoint { planned, path, partial, interrupted, resumable } = prepared;
        let interval = planned.options.interval;
        let recorder = |log: Checkpoint, settled| {
            let (resumed, settled) = (log.marked_bytes(), AtomicBool::new(settled));
            Arc::new(Self {
                log: Mutex::new(log),
                path: path.clone(),
                partial: partial.path.clone(),
                interval,
                resumed,
                resumable: resumable.clone(),
                settled,
            })
        };
        if interrupted.is_some() {
            let file = planned.open_file(&path, true).map_err(checkpoint::Error::from)?;
            return Ok(recorder(Checkpoint::open(Arc::new(file))?, true));
        }
        // One that was named may be there, and is to be begun anew.
        let there = matches!(planned.options.place, Place::File(_)) && path.exists();
        let file = match there {
            true => planned.open_file(&path, true),
            false => FileOptions::new().lock(planned.lock).writable(true).create_new(true).open(&path),
        };
        let file = file.map_err(checkpoint::Error::from)?;
        let identity = identity::with_partial(planned.identity.clone(), &partial);
        let region = region_size(len, cluster_size.unwrap_or(1));
        let file = Arc::new(file);
        let log = Checkpoint::create(Arc::clone(&file) as _, len, region, identity).inspect_err(|_| {
            let _ = fs::remove_file(&path);
        })?;
        let recorder = recorder(log, false);
        // A later run must find both by their names.
        image.sync_partial_name()?;
        file.sync_name(&path)?;
        Ok(recorder)
    }

    /// Bytes of the disk that an earlier run had copied.
    pub(super) fn resumed(&self) -> u64 {
        self.resumed
    }

    /// What the job has to do for it.
    pub(super) fn checkpoints(self: &Arc<Self>) -> Checkpoints {
        Checkpoints::new(Arc::clone(self) as _, self.interval)
    }

    /// Bytes of the disk that need not be copied again.
    pub(super) fn done(&self) -> u64 {
        self.log.lock().marked_bytes()
    }

    /// What is left to copy; `None` if that is the whole disk.
    pub(super) fn left(&self) -> Option<DirtyBitmap> {
        let log = self.log.lock();
        if log.marked_bytes() == 0 {
            return None;
        }
        // A region is a power of two and no less than a granule can be.
        let mut left = DirtyBitmap::new(log.disk_len(), log.region_size().min(MAX_GRANULARITY)).ok()?;
        left.set_all();
        for done in log.marked() {
            left.clear(done.start()..done.end());
        }
        Some(left)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn partial(&self) -> &Path {
        &self.partial
    }

    /// Makes it lead to nothing, durably: removing its file alone may be refused, or undone by a crash.
    /// Its path if it may still lead to the copy.
    pub(super) fn invalidate(&self) -> Option<PathBuf> {
        self.resumable.set(false);
        let emptied = self.log.lock().invalidate();
        emptied.is_err().then(|| self.path.clone())
    }

    /// Keeps its file for a later run, or removes it.
    pub(super) fn settle(&self, keep: bool) {
        self.settled.store(true, Ordering::Relaxed);
        if !keep {
            self.resumable.set(false);
            // One that stays leads to nothing any more: the copy is gone, or it is invalid.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl CheckpointSink for Recorder {
    fn record(&self, missing: &[ByteRange]) -> block::Result<()> {
        let mut log = self.log.lock();
        log.mark_except(missing).map_err(|error| match error {
            checkpoint::Error::Storage(error) => error,
            error => block::Error::new(block::ErrorKind::Io, "write").because(error.to_string()),
        })?;
        self.resumable.set(log.marked_bytes() > 0);
        Ok(())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if !self.settled.load(Ordering::Relaxed) {
            self.settle(false);
        }
    }
}
