//! Configuration of a core, derived once from the options and the target's geometry.

use std::time::Duration;

use blockmirror_bitmap::{DirtyBitmap, affordable_granularity};
use blockmirror_block::{ByteRange, Geometry, ZeroCost};

use crate::granularity::{GranularityError, MAX_GRANULARITY};
use crate::options::{
    BitmapMode, CopyMode, DEFAULT_BUF_SIZE, DEFAULT_LATENCY_BUDGET, DEFAULT_MIN_ZERO_RUN, MirrorOptions,
    OnError, SyncMode,
};

/// One data operation takes at most this part of the buffer: 512 KiB by default, which stays in a processor's
/// own cache between read and write. The most in flight together is limited by the buffer and by number.
const SHARES: u64 = 32;
/// Small buffers are not cut into operations below this, and none is smaller.
const MIN_OPERATION: u64 = 64 << 10;
/// Copies are not cut below this for the guest's sake, if the target's units are no larger.
const MIN_COPY: u64 = 64 << 10;
/// Dirt is kept in units of 4 KiB where the granularity is coarser, so that a small write costs a small copy.
const DETAIL: u64 = 4096;
/// Interval of periodic flushes of a volatile target.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// What does not change while a job runs, but for the copy mode.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Length of the disk.
    pub(crate) len: u64,
    /// What one bit of the dirty bitmap stands for: the granularity, or finer; coarser where memory would not
    /// do.
    pub(crate) detail: u64,
    /// The granularity; with a speed limit, no operation is cut below it.
    pub(crate) granularity: u64,
    pub(crate) sync: SyncMode,
    /// The most bytes of one data operation; a power of two.
    pub(crate) operation: u64,
    /// The most bytes of all data operations in flight.
    pub(crate) buffer: u64,
    pub(crate) max_in_flight: usize,
    pub(crate) speed: u64,
    pub(crate) on_source_error: OnError,
    pub(crate) on_target_error: OnError,
    /// Whole units of this are made zero without data being written, if `zero_by_metadata`; a power of two.
    pub(crate) zero_unit: u64,
    pub(crate) zero_by_metadata: bool,
    /// The job is attached to a tap and ends on request; otherwise it ends by itself when the target is
    /// equal.
    pub(crate) live: bool,
    pub(crate) copy_mode: CopyMode,
    /// What was asked for; [`latency_budget`](Self::latency_budget) is what counts.
    pub(crate) asked_budget: Option<Duration>,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
    /// Interval of periodic flushes; `None` for targets that are not volatile.
    pub(crate) flush_interval: Option<Duration>,
    /// Bytes of data between two flushes that a checkpoint or a log follows, at least one operation; `None`
    /// for a job without.
    pub(crate) checkpoint_interval: Option<u64>,
    /// What is copied, if it is not the whole disk.
    pub(crate) only: Option<DirtyBitmap>,
    /// After a failure the bitmap that says what to copy is cut to what is left.
    pub(crate) cut_bitmap: bool,
    /// There is a log, which ends with the job.
    pub(crate) log: bool,
    /// Before the bitmap is cut, one flush of the target may take so long; zero is no flush.
    pub(crate) final_flush_timeout: Duration,
}

impl Config {
    /// `options` and `granularity` have been checked.
    pub(crate) fn new(options: &MirrorOptions, granularity: u64, len: u64, target: Geometry) -> Self {
        let asked = if options.buf_size == 0 { DEFAULT_BUF_SIZE } else { options.buf_size };
        let buffer = asked.max(MIN_OPERATION).next_multiple_of(granularity);
        let share = (asked / SHARES).max(MIN_OPERATION);
        // A cluster in one piece is allocated and filled in one go.
        let cluster = target.cluster_size.unwrap_or(1);
        let operation = floor_power_of_two(share.max(cluster).min(buffer));
        Self {
            len,
            detail: detail(granularity, len),
            granularity,
            sync: options.sync,
            operation,
            buffer,
            max_in_flight: options.max_in_flight,
            speed: options.speed,
            on_source_error: options.on_source_error,
            on_target_error: options.on_target_error,
            zero_unit: zero_unit(target),
            zero_by_metadata: target.zero_cost == ZeroCost::Metadata,
            live: false,
            copy_mode: options.copy_mode,
            asked_budget: options.latency_budget,
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            flush_interval: target.forgetful.then_some(FLUSH_INTERVAL),
            checkpoint_interval: None,
            only: options.only.clone(),
            cut_bitmap: matches!(&options.bitmap, Some((_, BitmapMode::Always))),
            log: false,
            final_flush_timeout: options.final_flush_timeout,
        }
    }

    /// With checkpoints after `bytes` of data each.
    pub(crate) fn with_checkpoints(mut self, bytes: u64) -> Self {
        self.checkpoint_interval = Some(bytes.max(self.operation));
        self
    }

    /// With a log that clears regions after `interval` bytes of data: only what it has `marked` is copied.
    ///
    /// # Errors
    /// The detail is no granularity of a bitmap.
    pub(crate) fn with_log(self, marked: &[ByteRange], interval: u64) -> Result<Self, GranularityError> {
        let mut config = self.with_checkpoints(interval);
        config.log = true;
        let is_whole = |range: &ByteRange| range.start() == 0 && range.end() >= config.len;
        if !marked.iter().any(is_whole) {
            let unit = config.detail;
            let only = DirtyBitmap::new(config.len, unit);
            let mut only = only.map_err(|_| GranularityError::OutOfRange(unit))?;
            for range in marked {
                only.set(range.start()..range.end());
            }
            config.only = Some(only);
        }
        Ok(config)
    }

    /// The most that is scanned ahead where the guest cuts it into pieces: whole units of the dirty bitmap.
    pub(crate) fn piece(&self) -> u64 {
        self.buffer.saturating_mul(2).next_multiple_of(self.detail)
    }

    /// Copies are not cut below this for the guest's sake.
    pub(crate) fn min_copy_size(&self) -> u64 {
        MIN_COPY.max(self.zero_unit).min(self.operation)
    }

    /// What the job may add to a write of the guest, if that is bounded.
    pub(crate) fn latency_budget(&self) -> Option<Duration> {
        self.asked_budget.or((self.copy_mode == CopyMode::Auto).then_some(DEFAULT_LATENCY_BUDGET))
    }
}

/// The unit in which the target can hold zeros without holding data.
pub(crate) fn zero_unit(target: Geometry) -> u64 {
    floor_power_of_two(target.subcluster_size.or(target.cluster_size).unwrap_or(1).max(1))
}

/// The unit in which zeros inside data are looked for: finer than `zero_unit` nothing would be saved.
pub(crate) fn zero_scan_unit(target: Geometry, min_zero_run: u64) -> u64 {
    let plain = floor_power_of_two(min_zero_run.clamp(512, DEFAULT_MIN_ZERO_RUN));
    zero_unit(target).max(plain)
}

/// What one bit of the dirty bitmap of a disk of `len` bytes stands for.
pub(crate) fn detail(granularity: u64, len: u64) -> u64 {
    granularity.min(DETAIL).max(affordable_unit(len))
}

/// The smallest unit of a bitmap of `len` bytes that takes less than 40 MiB in the worst case; beyond, the
/// detail is coarser, also coarser than the granularity that was asked for: 4 KiB up to 1 TiB, 32 KiB at
/// 8 TiB. (Past 16 PiB it takes more, because a unit is at most 64 MiB.) A core has three bitmaps, four with
/// sync mode top.
pub(crate) fn affordable_unit(len: u64) -> u64 {
    affordable_granularity(len).min(MAX_GRANULARITY)
}

pub(crate) fn floor_power_of_two(n: u64) -> u64 {
    1 << n.max(1).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(options: MirrorOptions, granularity: u64, cluster: Option<u64>) -> Config {
        let mut target = Geometry::plain();
        target.cluster_size = cluster;
        options.check().unwrap();
        Config::new(&options, granularity, 1 << 40, target)
    }

    #[test]
    fn the_buffer_is_a_multiple_of_the_granularity_and_holds_an_operation() {
        for shift in 9..=26 {
            for buf in [0, 1, 512, 1000, 100_000, 1 << 20, (16 << 20) + 1, 1 << 30] {
                for cluster in [None, Some(512), Some(65536), Some(2 << 20)] {
                    let c = config(MirrorOptions::new().buf_size(buf), 1 << shift, cluster);
                    assert!(c.buffer.is_multiple_of(1 << shift) && c.buffer >= buf.max(1));
                    assert!(c.operation.is_power_of_two() && c.operation <= c.buffer);
                    let limit = (c.buffer / 16).max(1 << 20).max(cluster.unwrap_or(0));
                    assert!(c.operation <= limit, "{shift} {buf} {cluster:?}: {}", c.operation);
                }
            }
        }
    }

    #[test]
    fn by_default_operations_are_half_a_mebibyte_or_a_cluster() {
        let c = config(MirrorOptions::new(), 65536, None);
        assert_eq!((c.operation, c.buffer, c.max_in_flight), (512 << 10, 16 << 20, 16));
        assert_eq!(config(MirrorOptions::new(), 65536, Some(2 << 20)).operation, 2 << 20);
    }

    #[test]
    fn dirt_is_kept_finer_than_a_coarse_granularity_within_a_budget() {
        assert_eq!(detail(64 << 20, 1 << 30), 4096);
        assert_eq!(detail(65536, 0), 4096);
        assert_eq!(detail(512, 1 << 30), 512);
        assert_eq!(detail(512, 64 << 40), 256 << 10, "memory counts more than what was asked for");
        assert_eq!(detail(4096, 1 << 40), 4096);
        assert_eq!(detail(64 << 20, 8 << 40), 32 << 10);
        assert_eq!(detail(512, u64::MAX), 64 << 20);
    }

    /// A bitmap of the worst kind: something of each leaf is dirty.
    fn worst(len: u64, detail: u64) -> usize {
        let mut bitmap = DirtyBitmap::new(len, detail).unwrap();
        let leaf = detail * 4096;
        for at in 0..len / leaf {
            bitmap.set(at * leaf..at * leaf + 1);
        }
        bitmap.heap_bytes()
    }

    #[test]
    fn the_worst_bitmap_of_a_large_disk_is_capped_by_coarsening() {
        for (granularity, len) in [(4096, 8 << 40), (512, 1 << 40), (64 << 20, 64 << 40)] {
            let bytes = worst(len, detail(granularity, len));
            assert!(bytes > 32 << 20 && bytes < 40 << 20, "{granularity} {len}: {bytes}");
        }
    }

    #[test]
    fn zeros_are_sought_in_units_the_target_can_hold() {
        let mut target = Geometry::plain();
        assert_eq!(zero_scan_unit(target, 4096), 4096);
        assert_eq!(zero_scan_unit(target, 700), 512);
        assert_eq!(zero_scan_unit(target, 1 << 20), 4096);
        target.cluster_size = Some(65536);
        assert_eq!(zero_scan_unit(target, 4096), 65536);
        target.subcluster_size = Some(2048);
        assert_eq!(zero_scan_unit(target, 4096), 4096);
    }
}
