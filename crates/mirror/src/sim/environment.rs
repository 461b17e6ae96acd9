//! The environment of a schedule: disks, the job's options, latency and faults of the devices.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::testing::{MemoryDisk, Rng};
use blockmirror_block::{
    self as block, BlockDevice, ByteRange, ErrorKind, Geometry, WriteFlags, ZeroCost, ZeroFlags,
};

use crate::machine::config::Config;
use crate::options::{CopyMode, MirrorOptions, OnError, SyncMode};
use crate::progress::Operation;

/// Lengths at which mirrors have had bugs.
const LENGTHS: [u64; 11] = [0, 1, 511, 512, 1000, 4096, 20_000, 65_535, 65_536, 66_048, 200_000];
const POLICIES: [OnError; 6] =
    [OnError::Report, OnError::Ignore, OnError::Ignore, OnError::Stop, OnError::Auto, OnError::Enospc];
pub(super) const SPEEDS: [u64; 5] = [0, 0, 50_000, 100_000, 1_000_000];
pub(super) const MODES: [CopyMode; 3] = [CopyMode::Background, CopyMode::WriteBlocking, CopyMode::Auto];

/// The environment of one schedule. Devices are [`MemoryDisk`]s, so that contents, allocation and backing
/// files behave as in a format.
pub(super) struct Environment {
    pub(super) source: Arc<MemoryDisk>,
    pub(super) target: Arc<MemoryDisk>,
    pub(super) options: MirrorOptions,
    pub(super) config: Config,
    pub(super) latency: LatencyModel,
    pub(super) faults: Faults,
}

impl Environment {
    pub(super) fn random(rng: &mut Rng) -> Self {
        let len = if rng.one_in(3) { 1 + rng.below(150_000) } else { rng.pick(&LENGTHS) };
        let top = rng.one_in(3);
        let mut disk = |name: &str, backing: &Option<Arc<MemoryDisk>>| {
            let mut geometry = Geometry::plain();
            geometry.cluster_size = rng.pick(&[None, Some(512), Some(4096), Some(65536)]);
            if geometry.cluster_size == Some(65536) && rng.one_in(3) {
                geometry.subcluster_size = Some(2048);
            }
            geometry.zero_cost = rng.pick(&[ZeroCost::Metadata, ZeroCost::Metadata, ZeroCost::Data]);
            let disk = MemoryDisk::new(len).with_geometry(geometry).named(name);
            match backing {
                Some(backing) => disk.with_backing(Arc::clone(backing) as Arc<dyn BlockDevice>),
                None => disk,
            }
        };
        let base = Arc::new(disk("base", &None));
        let backing = top.then(|| Arc::clone(&base));
        let source = Arc::new(disk("source", &backing));
        let target = Arc::new(disk("target", &backing));
        let writes = |rng: &mut Rng, disk: &MemoryDisk, n: u64| {
            for _ in 0..rng.below(n) {
                write_randomly(rng, disk);
            }
        };
        writes(rng, &base, 6);
        writes(rng, &source, 12);
        // With sync=top, old contents of the target are undefined behaviour of the user's making.
        let fresh = top || rng.one_in(2);
        if !fresh {
            writes(rng, &target, 12);
        }
        let granularity = 512 << if rng.one_in(2) { rng.below(3) } else { rng.below(18) };
        let options = MirrorOptions::new()
            .sync(if top { SyncMode::Top } else { SyncMode::Full })
            .granularity(granularity)
            .max_in_flight(1 + rng.index(6))
            .speed(rng.pick(&SPEEDS))
            .on_source_error(rng.pick(&POLICIES))
            .on_target_error(rng.pick(&POLICIES))
            .unmap(rng.one_in(2))
            .min_zero_run(rng.pick(&[0, 512, 4096, 5000]))
            .target_is_zero(fresh && !top && rng.one_in(3));
        let mut config = Config::new(&options, granularity, len, target.geometry());
        // Small operations, so that a small disk takes many; sometimes a promise of the geometry that is
        // false.
        config.operation = config.detail << rng.below(4);
        config.buffer = config.operation * (1 + rng.below(6));
        config.zero_by_metadata |= rng.one_in(3);
        config.flush_interval =
            rng.pick(&[None, None, Some(Duration::from_micros(1)), Some(Duration::from_millis(5))]);
        let latency = LatencyModel::random(rng);
        let faults = Faults { one_in: rng.pick(&[0, 0, 100, 20, 3]), ..Faults::default() };
        Self { source, target, options, config, latency, faults }
    }

    pub(super) fn len(&self) -> u64 {
        self.config.len
    }

    /// The first byte in which source and target differ, `excused` ranges left aside.
    pub(super) fn difference(&self, excused: &[ByteRange]) -> Option<usize> {
        let (mut source, mut target) = (contents(&self.source), contents(&self.target));
        for range in excused {
            let range = range.start() as usize..range.end() as usize;
            source[range.clone()].fill(0);
            target[range].fill(0);
        }
        source.iter().zip(&target).position(|(a, b)| a != b)
    }
}

pub(super) fn contents(disk: &MemoryDisk) -> Vec<u8> {
    disk.contents().expect("a memory disk does not fail")
}

/// Writes, zeroes or discards something somewhere; where.
pub(super) fn write_randomly(rng: &mut Rng, disk: &MemoryDisk) -> ByteRange {
    if disk.is_empty() {
        return ByteRange::default();
    }
    let longest = rng.pick(&[1, 512, 4096, 20_000]);
    let range = rng.byte_range(ByteRange::new(0, disk.len()), longest);
    let done = match rng.below(6) {
        0 => disk.write_zeroes(range, ZeroFlags::MAY_UNMAP),
        1 => disk.discard(range),
        2 => disk.write_at(&vec![0; range.len() as usize], range.start(), WriteFlags::NONE),
        _ => disk.write_at(&rng.nonzero_bytes(range.len()), range.start(), WriteFlags::NONE),
    };
    done.expect("a memory disk does not fail");
    range
}

/// Latency of the devices in virtual time: minimum and maximum for each half of an operation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LatencyModel {
    pub(super) source: [Duration; 2],
    pub(super) target: [Duration; 2],
    /// One operation in so many takes a second longer; 0 for none.
    pub(super) stalls: u64,
}

impl LatencyModel {
    fn random(rng: &mut Rng) -> Self {
        const NO_TIME: [Duration; 2] = [Duration::ZERO; 2];
        const FAST: [Duration; 2] = [Duration::from_micros(50), Duration::from_micros(200)];
        const SLOW: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(50)];
        let speeds = [NO_TIME, NO_TIME, FAST, SLOW];
        if rng.one_in(2) {
            return Self::default();
        }
        Self { source: rng.pick(&speeds), target: rng.pick(&speeds), stalls: rng.pick(&[0, 0, 50]) }
    }

    /// Latency of one half of an operation on this side.
    pub(super) fn takes(&self, rng: &mut Rng, side: Operation) -> Duration {
        let [least, most] = match side {
            Operation::Read => self.source,
            Operation::Write => self.target,
        };
        let spread = most.saturating_sub(least).as_micros() as u64;
        let stall = self.stalls > 0 && rng.one_in(self.stalls);
        least
            + Duration::from_micros(if spread == 0 { 0 } else { rng.below(spread) })
            + if stall { Duration::from_secs(1) } else { Duration::ZERO }
    }
}

/// How the devices fail.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    /// One half-operation in so many fails; 0 for none.
    pub(super) one_in: u64,
    /// Whatever touches these bytes of the source, or of the target, fails.
    pub(super) bad: [ByteRange; 2],
    /// One write to the target in so many finds it full, and so do all after it until room is made; 0 for
    /// none.
    pub(super) fills: u64,
    full: bool,
    /// Failures so far, at the source and at the target.
    pub(super) injected: [u64; 2],
}

impl Faults {
    /// Removes all faults.
    pub(super) fn clear(&mut self) {
        *self = Self { injected: self.injected, ..Self::default() };
    }

    pub(super) fn make_room(&mut self) {
        self.full = false;
    }

    /// Whether an operation on `range` (empty for a flush) fails, and with what.
    pub(super) fn inject(
        &mut self,
        rng: &mut Rng,
        side: Operation,
        range: ByteRange,
    ) -> Option<block::Error> {
        self.full |= side == Operation::Write && self.fills > 0 && rng.one_in(self.fills);
        let kind = if side == Operation::Write && self.full {
            ErrorKind::NoSpace
        } else if !range.is_empty() && self.bad[side as usize].overlaps(range) {
            ErrorKind::Io
        } else if self.one_in > 0 && rng.one_in(self.one_in) {
            rng.pick(&[ErrorKind::Io, ErrorKind::Io, ErrorKind::NoSpace])
        } else {
            return None;
        };
        self.injected[side as usize] += 1;
        Some(block::Error::new(kind, "simulated").at(range.start()))
    }
}
