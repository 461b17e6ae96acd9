//! Mover: performs the core's operations, the only place in this crate that moves a job's data.
//!
//! Each thread of the engine owns one mover and with it one buffer, which is used again for every copy and so
//! tends to stay in the processor's cache. No lock is held here.
//!
//! A copy that reads while the guest writes there may read any mixture of old and new bytes, zeros among
//! them, and writes that to the target. It does no harm: the write marks its range when it has finished, so
//! the range is copied again.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::sync::Instant;
use blockmirror_block::{
    self as block, AlignedBuf, BlockDevice, ByteRange, ErrorKind, Extent, Geometry, HostRun, Visit,
    WriteFlags, ZeroFlags, cancel, zero,
};
use tracing::debug;

use crate::cow_target::{CowTarget, Lost};
use crate::machine::config::zero_scan_unit;
use crate::machine::{Cloned, Done, Moved, Work};
use crate::options::MirrorOptions;
use crate::progress::Operation;
use crate::reflink::Clones;
use crate::scan::{CopyAction, CopyExtent, Failure, Rules, TargetContent, scan, scan_sharing};

/// The part of the options that matters while data is moved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyPolicy {
    rules: Rules,
    /// What is known of the target where a promise is not valid any more.
    unpromised: TargetContent,
    zero_flags: ZeroFlags,
    /// Shorter runs of zeros are written as data; 0 looks for none.
    min_zero_run: u64,
    zero_unit: u64,
}

impl CopyPolicy {
    /// `content` is what is known of the target unless `options` promise more.
    pub(crate) fn new(options: &MirrorOptions, target: Geometry, content: TargetContent) -> Self {
        Self {
            rules: Rules {
                top_layers: options.counted_layers(),
                seek_zeros: options.min_zero_run > 0,
                allocate: options.allocate,
                target: if options.target_is_zero { TargetContent::Zero } else { content },
            },
            unpromised: content,
            zero_flags: if options.unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::NONE },
            min_zero_run: options.min_zero_run,
            zero_unit: zero_scan_unit(target, options.min_zero_run),
        }
    }
}

/// One worker's buffer and devices.
#[derive(Debug)]
pub(crate) struct Mover<'a> {
    source: &'a dyn BlockDevice,
    /// The target, or what is in front of it.
    target: &'a dyn BlockDevice,
    cow: Option<&'a CowTarget>,
    policy: CopyPolicy,
    /// What is cloned, if anything is.
    clones: Option<&'a Clones>,
    /// Flushes are of the source, too.
    flushes_source: bool,
    /// What the source reads at least, as far as it says.
    block: u64,
    buffer: AlignedBuf,
}

/// A clone that has taken so long is interrupted between two pieces.
const CLONE_TIME: Duration = Duration::from_millis(100);
/// What is cloned at once: a file in fragments takes time for each. A multiple of any device's unit.
const CLONE_PIECE: u64 = 32 << 20;

/// No block is smaller.
const SECTOR: u64 = 512;
/// The most blocks that are read one by one.
const MOST_BLOCKS: u64 = 128;

impl<'a> Mover<'a> {
    /// Everything goes to `cow`, if there is one in front of `target`.
    pub(crate) fn new(
        source: &'a dyn BlockDevice,
        target: &'a dyn BlockDevice,
        cow: Option<&'a CowTarget>,
        policy: CopyPolicy,
    ) -> Self {
        let block = u64::from(source.geometry().request_alignment).max(SECTOR);
        let target = cow.map_or(target, |cow| cow as &dyn BlockDevice);
        Self {
            source,
            target,
            cow,
            policy,
            clones: None,
            flushes_source: false,
            block,
            buffer: AlignedBuf::new(0),
        }
    }

    /// The same, sharing blocks of the target with the source's files as `clones` says.
    pub(crate) fn sharing(mut self, clones: Option<&'a Clones>) -> Self {
        self.clones = clones;
        self
    }

    /// The same, with flushes of the source before those of the target if it is said so.
    pub(crate) fn flushing_source(mut self, flushes_source: bool) -> Self {
        self.flushes_source = flushes_source;
        self
    }

    /// Performs `work`. What a failure leaves behind is for the core to have copied again.
    pub(crate) fn perform(&mut self, work: Work) -> Result<Done, Failure> {
        match work {
            Work::Scan { range, untouched, by_block, .. } => {
                let mut rules = self.policy.rules;
                if !untouched {
                    // Zeros that were promised may have been written over since.
                    rules.target = self.policy.unpromised;
                } else if self.cow.is_some() && rules.target == TargetContent::Zero {
                    // It knows which units the promise still holds for.
                    rules.target = TargetContent::Asked;
                }
                let part = |extent: &Extent| Some(self.clones?.part_of(self.target, extent)?.0);
                match scan_sharing(self.source, Some(self.target), range, rules, &part) {
                    Err(Failure { operation: Operation::Read, .. })
                        if by_block && range.len() <= self.block * MOST_BLOCKS =>
                    {
                        self.scan_by_block(range, rules)
                    }
                    scanned => scanned.map(Done::Scanned),
                }
            }
            Work::Copy { range, target_zero, by_block: false } => {
                self.copy(range, target_zero).map(Done::Copied)
            }
            Work::Copy { range, target_zero, by_block: true } => self.salvage(range, target_zero),
            Work::Clone { range, .. } => self.share(range).map(Done::Cloned),
            Work::Zero { range, metadata_only } => self.zero(range, metadata_only),
            // Moves no data: the caller that holds the tap performs it.
            Work::End(_) => Ok(Done::Ended),
            Work::Flush | Work::PeriodicFlush => {
                if self.flushes_source {
                    self.source.flush().map_err(Failure::at_source)?;
                }
                self.target.flush().map(|()| Done::Flushed).map_err(Failure::at_target)
            }
        }
    }

    /// Scans a block of the source at a time. One that the source does not map counts as data.
    fn scan_by_block(&self, range: ByteRange, rules: Rules) -> Result<Done, Failure> {
        let (mut extents, mut unmapped) = (Vec::new(), Vec::new());
        for block in range.pieces(self.block) {
            let mut rest = block;
            while !rest.is_empty() {
                let found = match scan(self.source, Some(self.target), rest, rules) {
                    Err(Failure { operation: Operation::Read, error }) => {
                        unmapped.push((rest, error));
                        let action = CopyAction::Copy { target_zero: false };
                        vec![CopyExtent { range: rest, action, below: false }]
                    }
                    found => found?,
                };
                let end = found.last().map_or(block.end(), |last| last.range.end());
                extents.extend(found);
                rest = ByteRange::new(end, block.end());
            }
        }
        Ok(Done::ScannedInPart(extents, unmapped))
    }

    fn zero(&mut self, range: ByteRange, metadata_only: bool) -> Result<Done, Failure> {
        let mut flags = self.policy.zero_flags;
        if metadata_only {
            flags |= ZeroFlags::NO_FALLBACK;
        }
        match self.target.write_zeroes(range, flags) {
            Err(error) if metadata_only && error.kind() == ErrorKind::Unsupported => {
                Ok(Done::ZeroUnsupported)
            }
            result => result.map(|()| Done::Zeroed).map_err(Failure::at_target),
        }
    }

    /// Clones what can be cloned of `range`, until it has taken its time.
    fn share(&self, range: ByteRange) -> Result<Cloned, Failure> {
        let mut sharing = Sharing { range, cloned: Cloned { end: range.start(), ..Cloned::default() } };
        let Some(clones) = self.clones else {
            sharing.leave(range.end());
            return Ok(sharing.cloned);
        };
        let started = Instant::now();
        let is_over = || started.elapsed() >= CLONE_TIME || cancel::is_cancelled();
        let mut stopped = false;
        let answer = self.source.extents(range, &mut |extent| {
            if let Some((part, run)) = extent.clip(range).and_then(|e| clones.part_of(self.target, &e)) {
                sharing.leave(part.start());
                for piece in part.pieces(CLONE_PIECE) {
                    let offset = run.offset.saturating_add(piece.start() - part.start());
                    let from = HostRun { storage: Arc::clone(&run.storage), offset };
                    match self.target.clone_range(piece.start(), &from, piece.len()) {
                        Ok(calls) => sharing.shared(piece.end(), calls),
                        Err(error) => {
                            // A copy meets the same error, unless it is about clones.
                            debug!(range = %piece, %error, "copied, not cloned");
                            break;
                        }
                    }
                    stopped = is_over();
                    if stopped {
                        return Visit::Break(());
                    }
                }
            }
            sharing.leave(extent.range.end());
            stopped = sharing.is_enough() || is_over();
            if stopped { Visit::Break(()) } else { Visit::Continue(()) }
        });
        answer.map_err(|error| Failure { operation: Operation::Read, error })?;
        if !stopped {
            sharing.leave(range.end());
        }
        Ok(sharing.cloned)
    }

    fn copy(&mut self, range: ByteRange, target_zero: bool) -> Result<Moved, Failure> {
        self.read(range)?;
        self.write(range, target_zero)
    }

    /// Copies what the source gives of `range`, a block of the source at a time where it does not give all of
    /// it.
    fn salvage(&mut self, range: ByteRange, target_zero: bool) -> Result<Done, Failure> {
        match self.read(range) {
            Ok(()) => {
                return match (self.write(range, target_zero), self.cow) {
                    // All of the range can be read, and what the unit has around it cannot.
                    (Err(Failure { operation: Operation::Read, .. }), Some(cow)) => {
                        let mut lost = Vec::new();
                        let moved = self.write_salvaged(cow, range, range, &mut lost)?;
                        Ok(Done::Salvaged(moved, lost))
                    }
                    (result, _) => result.map(Done::Copied),
                };
            }
            // More would be too many reads of a source that is slow to fail.
            Err(failure) if range.len() > self.block * MOST_BLOCKS => return Err(failure),
            Err(_) => {}
        }
        let (mut moved, mut lost) = (Moved::default(), Vec::new());
        for block in range.pieces(self.block) {
            match self.read(block) {
                Ok(()) => {
                    let part = match self.cow {
                        Some(cow) => self.write_salvaged(cow, range, block, &mut lost)?,
                        None => self.write(block, target_zero)?,
                    };
                    moved.copied += part.copied;
                    moved.zeroed += part.zeroed;
                    moved.skipped += part.skipped;
                }
                Err(failure) => lost.push((block, failure.error)),
            }
        }
        Ok(Done::Salvaged(moved, lost))
    }

    /// Writes `block` of `range`, which was read, where the rest of its unit may not be readable.
    fn write_salvaged(
        &mut self,
        cow: &CowTarget,
        range: ByteRange,
        block: ByteRange,
        lost: &mut Vec<Lost>,
    ) -> Result<Moved, Failure> {
        let buf = &*self.buffer.at_least(index(block, block.end()));
        let mut around = Vec::new();
        cow.write_salvaged(buf, block.start(), self.block, &mut around).map_err(Failure::at_target)?;
        // What lies in the range is found there.
        lost.extend(around.into_iter().filter(|(part, _)| !range.overlaps(*part)));
        Ok(Moved { copied: block.len(), ..Moved::default() })
    }

    /// The first half of a copy.
    pub(crate) fn read(&mut self, range: ByteRange) -> Result<(), Failure> {
        let on_source = |error| Failure { operation: Operation::Read, error };
        let len = usize::try_from(range.len())
            .map_err(|_| on_source(block::Error::new(ErrorKind::LimitExceeded, "copy").at(range.start())))?;
        self.source.read_at(self.buffer.at_least(len), range.start()).map_err(on_source)
    }

    /// The second half: writes what [`read`](Self::read) has read of the same range.
    pub(crate) fn write(&mut self, range: ByteRange, target_zero: bool) -> Result<Moved, Failure> {
        let len = index(range, range.end());
        let buf = &*self.buffer.at_least(len);
        let mut moved = Moved::default();
        let mut written = 0;
        if self.policy.min_zero_run > 0 {
            let unit = usize::try_from(self.policy.zero_unit).unwrap_or(len);
            for run in zero::runs(buf, range.start(), unit).filter(|run| run.zero) {
                let found = at(range, run.range.start, run.range.end);
                // Zeros that need not be written at all may end anywhere; those that take the place of old
                // contents are worth it in whole units only.
                let zeros = if target_zero { found } else { found.align_inward(self.policy.zero_unit) };
                if zeros.is_empty() || zeros.len() < self.policy.min_zero_run {
                    continue;
                }
                let (from, to) = (index(range, zeros.start()), index(range, zeros.end()));
                moved.copied += put(self.target, range, buf, written, from)?;
                written = to;
                if target_zero {
                    let zeroed = match self.cow {
                        Some(cow) => cow.leave_zeros(zeros).map_err(Failure::at_target)?,
                        None => 0,
                    };
                    moved.zeroed += zeroed;
                    moved.skipped += zeros.len() - zeroed;
                } else {
                    self.target.write_zeroes(zeros, self.policy.zero_flags).map_err(Failure::at_target)?;
                    moved.zeroed += zeros.len();
                }
            }
        }
        moved.copied += put(self.target, range, buf, written, len)?;
        Ok(moved)
    }
}

/// A clone under way: all before `cloned.end` was looked at.
struct Sharing {
    range: ByteRange,
    cloned: Cloned,
}

impl Sharing {
    /// Separate ranges that one clone leaves to be copied.
    const MAX_REST: usize = 1024;

    /// What has not been cloned up to `end` is to be copied.
    fn leave(&mut self, end: u64) {
        let Cloned { end: at, rest, .. } = &mut self.cloned;
        let left = ByteRange::new(*at, end.min(self.range.end()));
        if left.is_empty() {
            return;
        }
        match rest.last_mut() {
            Some(last) if last.end() == left.start() => *last = ByteRange::new(last.start(), left.end()),
            _ => rest.push(left),
        }
        *at = left.end();
    }

    /// The bytes up to `end` were cloned.
    fn shared(&mut self, end: u64, calls: u64) {
        self.cloned.end = end;
        self.cloned.calls += calls;
    }

    fn is_enough(&self) -> bool {
        self.cloned.rest.len() >= Self::MAX_REST
    }
}

/// The bytes of the disk that `from..to` of a buffer holding `range` are.
fn at(range: ByteRange, from: usize, to: usize) -> ByteRange {
    ByteRange::new(range.start() + from as u64, range.start() + to as u64)
}

/// Where `offset` lies in a buffer holding `range`. No buffer is longer than `usize`.
fn index(range: ByteRange, offset: u64) -> usize {
    (offset - range.start()) as usize
}

/// Writes `from..to` of the buffer, if that is anything.
fn put(
    target: &dyn BlockDevice,
    range: ByteRange,
    buf: &[u8],
    from: usize,
    to: usize,
) -> Result<u64, Failure> {
    if from >= to {
        return Ok(0);
    }
    let place = at(range, from, to);
    target.write_at(&buf[from..to], place.start(), WriteFlags::NONE).map_err(Failure::at_target)?;
    Ok(place.len())
}
