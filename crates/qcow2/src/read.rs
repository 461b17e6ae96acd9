//! Reading guest bytes: a batch of runs is resolved under the metadata lock, then the data moves without it.

use std::fmt;
use std::sync::Arc;

use blockmirror_block::{ByteRange, HostRun, RangeGuard, Result};

use crate::image::Qcow2;
use crate::meta::{MapRun, Mapping};
use crate::offset::GuestOffset;

/// Runs that are resolved at once. Bounds the time under the lock and the memory per reader.
const BATCH: usize = 256;

/// Where the bytes of a run come from.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ReadSource {
    /// They lie in a host file as they are.
    Host(HostRun),
    /// They are zeros.
    Zeros,
    /// The backing device has them, as far as it reaches; zeros past its end.
    Backing,
    /// They are stored compressed: read them through the device.
    Compressed,
}

/// A run of guest bytes and where they come from.
#[derive(Clone, Debug)]
pub struct ReadRun {
    /// The guest bytes.
    pub range: ByteRange,
    /// Where they come from.
    pub source: ReadSource,
}

/// A resolved read. As long as it lives, the host clusters that it names are not reused.
#[must_use = "the host ranges may be reused as soon as this is dropped"]
pub struct ReadGuard<'a> {
    runs: Vec<ReadRun>,
    _pin: RangeGuard<'a>,
}

impl ReadGuard<'_> {
    /// The runs, in order and without gaps, from the start of the range that was asked for. They may end
    /// before it does: resolve the rest again.
    pub fn runs(&self) -> &[ReadRun] {
        &self.runs
    }
}

impl fmt::Debug for ReadGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.runs).finish()
    }
}

impl Qcow2 {
    /// Says where the bytes of `range` lie, and pins them there, so that a caller can move them by its own
    /// means.
    ///
    /// # Errors
    /// A range that reaches past the disk; damaged or unreadable metadata.
    pub fn resolve_read(&self, range: ByteRange) -> Result<ReadGuard<'_>> {
        let range = self.bounds("read", Some(range), range.start(), range.len())?;
        let pin = self.ranges.lock_shared(range)?;
        let runs = self.meta.lock().runs(&self.ctx, range, BATCH)?;
        let to_read_run = |run: MapRun| ReadRun {
            range: run.range,
            source: match run.mapping {
                Mapping::Data(host) => {
                    ReadSource::Host(HostRun { storage: Arc::clone(self.ctx.data()), offset: host.0 })
                }
                Mapping::Zero(_) => ReadSource::Zeros,
                Mapping::Unallocated if self.ctx.backing_covers(run.range) => ReadSource::Backing,
                Mapping::Unallocated => ReadSource::Zeros,
                Mapping::Compressed(_) => ReadSource::Compressed,
            },
        };
        Ok(ReadGuard { runs: runs.into_iter().map(to_read_run).collect(), _pin: pin })
    }

    /// Fills `buf` with the bytes of `range`, which lies inside the disk and which the caller holds.
    pub(crate) fn read_mapped(&self, buf: &mut [u8], range: ByteRange) -> Result<()> {
        let mut rest = buf;
        let mut at = range.start();
        while at < range.end() {
            let runs = self.meta.lock().runs(&self.ctx, ByteRange::new(at, range.end()), BATCH)?;
            for run in runs {
                // A run lies inside the range, whose length is that of a buffer.
                let (part, tail) = rest.split_at_mut(run.range.len() as usize);
                self.read_run(part, run)?;
                rest = tail;
                at = run.range.end();
            }
        }
        Ok(())
    }

    fn read_run(&self, buf: &mut [u8], run: MapRun) -> Result<()> {
        match run.mapping {
            Mapping::Data(host) => self.ctx.read_data(buf, host),
            Mapping::Zero(_) => {
                buf.fill(0);
                Ok(())
            }
            Mapping::Unallocated => self.read_backing(buf, run.range),
            Mapping::Compressed(compressed) => {
                // BackingLayer the cluster size.
                let within = self.ctx.cluster().within(GuestOffset(run.range.start())) as usize;
                self.decompressors.read(&self.ctx, compressed, within, buf)
            }
        }
    }

    /// A backing device that is shorter than the image reads as zeros past its end.
    fn read_backing(&self, buf: &mut [u8], range: ByteRange) -> Result<()> {
        let Some(backing) = self.ctx.backing() else {
            buf.fill(0);
            return Ok(());
        };
        let there = range.intersect(ByteRange::new(0, backing.len()));
        // No longer than the buffer.
        let (inside, past) = buf.split_at_mut(there.len() as usize);
        past.fill(0);
        if inside.is_empty() { Ok(()) } else { backing.read_at(inside, range.start()) }
    }
}
