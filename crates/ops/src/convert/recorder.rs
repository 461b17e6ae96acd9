//! Recorder: writes the checkpoint of a running conversion, and removes it when it is of no use any more.
//!
//! The mirror job calls it after each flush ([`CheckpointSink`]). Where source or target does not show
//! whether it was written, a region is marked with the digest of what was read of the source, which the job
//! reads through the [`HashedSource`] of this. Must hold: a region is marked only when none of it was missing
//! as the flush began.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_bitmap::{DirtyBitmap, MAX_GRANULARITY};
use blockmirror_block::sync::Mutex;
use blockmirror_block::{self as block, BlockDevice, ByteRange};
use blockmirror_checkpoint::{self as checkpoint, Checkpoint, region_size};
use blockmirror_file::FileOptions;
use blockmirror_image::{CopyPlace, PreparedImage};
use blockmirror_mirror::{CheckpointSink, Checkpoints};

use super::checkpoint::{Place, Resumable};
use super::error::ConvertError;
use super::hashed_source::HashedSource;
use super::identity;
use super::resume::PreparedCheckpoint;
use super::resume_check::{Finished, ResumeCheck, sample, short};

/// The checkpoint of a running conversion. Dropped before it is [settled](Self::settle), one that was begun
/// anew is removed.
#[derive(Debug)]
pub(super) struct Recorder {
    /// *Guards* the log: held while a record is written, by one worker at a time. *Order*: before those of
    /// the hashed source. *Not under it*: calls of the disks.
    log: Mutex<Checkpoint>,
    path: PathBuf,
    /// Where the copy is: its temporary file, or the target.
    copy: PathBuf,
    /// Whether that keeps its name.
    in_place: bool,
    interval: u64,
    check: ResumeCheck,
    /// The source, if regions are marked with digests.
    hashed: Option<Arc<HashedSource>>,
    /// Bytes of the disk that an earlier run had copied.
    resumed: u64,
    /// Whether there is a mark in a file that stays.
    resumable: Resumable,
    /// Whether the file stays when this is dropped, or is gone already.
    settled: AtomicBool,
}

impl Recorder {
    /// Opens the checkpoint, or makes it, for a copy of the disk `source` to `target`.
    pub(super) fn begin(
        prepared: PreparedCheckpoint,
        image: &mut PreparedImage,
        source: &Arc<dyn BlockDevice>,
        target: &Path,
    ) -> Result<Arc<Self>, ConvertError> {
        let PreparedCheckpoint { planned, path, copy, digests, interrupted, resumable } = prepared;
        let (interval, check) = (planned.options.interval, planned.options.check);
        let (in_place, copied_to) = match &copy {
            CopyPlace::Partial(partial) => (false, partial.path.clone()),
            _ => (true, target.to_owned()),
        };
        let recorder = |log: Checkpoint, settled| {
            let (resumed, settled) = (log.marked_bytes(), AtomicBool::new(settled));
            let hashed = log.has_digests().then(|| HashedSource::new(Arc::clone(source)).in_pieces());
            Arc::new(Self {
                log: Mutex::new(log),
                path: path.clone(),
                copy: copied_to.clone(),
                in_place,
                interval,
                check,
                hashed: hashed.map(Arc::new),
                resumed,
                resumable: resumable.clone(),
                settled,
            })
        };
        if interrupted.is_some() {
            let file = planned.open_file(&path, true).map_err(checkpoint::Error::from)?;
            let log = Checkpoint::open(Arc::new(file))?;
            // Another run may have begun it anew since it was found.
            let own = identity::with_place(planned.identity.clone(), &copy);
            let differs = own.first_difference(log.identity(), &[]).map(|key| identity::explain(&key));
            let no_digests = || "its checkpoint has no digest of what was copied".to_owned();
            let differs = differs.or_else(|| (digests && !log.has_digests()).then(no_digests));
            let differs = differs.or_else(|| planned.lacks_verification(&log));
            if let Some(what) = differs {
                return Err(ConvertError::Changed { target: target.to_owned(), partial: copied_to, what });
            }
            return Ok(recorder(verified(log, planned.verifies)?, true));
        }
        // One that was named may be there, and is to be begun anew.
        let there = matches!(planned.options.place, Place::File(_)) && path.exists();
        let file = match there {
            true => planned.open_file(&path, true),
            false => FileOptions::new().lock(planned.lock).writable(true).create_new(true).open(&path),
        };
        let file = file.map_err(checkpoint::Error::from)?;
        let identity = identity::with_place(planned.identity.clone(), &copy);
        let region = region_size(source.len(), image.cluster_size().unwrap_or(1));
        let file = Arc::new(file);
        let create = if digests { Checkpoint::create_with_digests } else { Checkpoint::create };
        let log = create(Arc::clone(&file) as _, source.len(), region, identity);
        let log = log.and_then(|log| verified(log, planned.verifies)).inspect_err(|_| {
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

    /// What is read again of it before it goes on.
    pub(super) fn checked(&self) -> Vec<Finished> {
        let log = self.log.lock();
        let numbers = match self.check {
            ResumeCheck::All => marked(&log).flatten().collect(),
            ResumeCheck::Sample if !log.has_digests() => Vec::new(),
            // Nothing else is to be done, and nothing is to say that all is well but this.
            ResumeCheck::Sample if log.marked_bytes() == log.disk_len() => marked(&log).flatten().collect(),
            ResumeCheck::Sample => sample(&log),
        };
        let finished =
            |number| Finished { number, range: range_of(&log, number), digest: log.digest(number) };
        numbers.into_iter().map(finished).collect()
    }

    /// The source as the job reads it.
    pub(super) fn source(&self, source: &Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        match &self.hashed {
            Some(hashed) => Arc::clone(hashed) as _,
            None => Arc::clone(source),
        }
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

    /// Where the copy is, or has been.
    pub(super) fn place(&self) -> &Path {
        &self.copy
    }

    /// Where the copy is; `None` if it is there no more.
    pub(super) fn copy(&self) -> Option<&Path> {
        (self.in_place || self.copy.exists()).then_some(&*self.copy)
    }

    /// Makes it lead to nothing, durably: removing its file alone may be refused, or undone by a crash.
    /// Its path if it may still lead to the copy.
    pub(super) fn invalidate(&self) -> Option<PathBuf> {
        self.resumable.set(false);
        let emptied = self.log.lock().invalidate();
        emptied.is_err().then(|| self.path.clone())
    }

    /// A copy in place is complete: from here on it leads to nothing, durably. It would lead to what the
    /// target is used for later, with all of it marked.
    ///
    /// # Errors
    /// It can neither be made invalid nor removed.
    pub(super) fn retire(&self) -> Result<(), ConvertError> {
        if !self.in_place {
            return Ok(());
        }
        self.resumable.set(false);
        match self.log.lock().invalidate() {
            Err(error) if fs::remove_file(&self.path).is_err() => Err(error.into()),
            _ => Ok(()),
        }
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

/// The `log` of a copy, which has it that this is to be verified, if it is.
fn verified(mut log: Checkpoint, verifies: bool) -> Result<Checkpoint, checkpoint::Error> {
    if verifies {
        log.require_verification()?;
    }
    Ok(log)
}

/// Marks what is not `missing` with its digests. A region of which a block could be read in pieces only has
/// none: it counts as missing.
fn mark_hashed(
    log: &mut Checkpoint,
    missing: &[ByteRange],
    hashed: &HashedSource,
) -> Result<(), checkpoint::Error> {
    let (mut digests, mut runs) = (BTreeMap::new(), Vec::<Range<u64>>::new());
    for number in log.all_except(missing).into_iter().flatten() {
        if log.regions().get(number) {
            continue;
        }
        let Some(digest) = hashed.run_digest(range_of(log, number)) else { continue };
        digests.insert(number, short(digest));
        match runs.last_mut() {
            Some(run) if run.end == number => run.end += 1,
            _ => runs.push(number..number + 1),
        }
    }
    log.mark_with(&runs, &mut |number| digests.get(&number).copied().unwrap_or_default())?;
    for run in runs.into_iter().flatten() {
        hashed.forget(range_of(log, run));
    }
    Ok(())
}

/// The bytes of the region `number`.
fn range_of(log: &Checkpoint, number: u64) -> ByteRange {
    let start = number * log.region_size();
    ByteRange::new(start, start.saturating_add(log.region_size()).min(log.disk_len()))
}

/// The runs of marked regions.
fn marked(log: &Checkpoint) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let run = log.regions().next_run(at)?;
        at = run.end;
        Some(run)
    })
}

impl CheckpointSink for Recorder {
    fn record(&self, missing: &[ByteRange]) -> block::Result<()> {
        let mut log = self.log.lock();
        let marked = match &self.hashed {
            Some(hashed) => mark_hashed(&mut log, missing, hashed),
            None => log.mark_except(missing),
        };
        marked.map_err(|error| match error {
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
