//! A dry run: what a job would copy, zero and skip, without touching anything.
//!
//! The figures come from allocation maps alone. Data is not read, so zeros inside data count as bytes to
//! copy.

mod cost;

use std::fmt;

use blockmirror_block::size::ExactSize;
use blockmirror_block::{BlockDevice, ByteRange, Visit};

use crate::cow_target::check_tail;
use crate::error::Error;
use crate::granularity::GranularityChoice;
use crate::options::{MirrorOptions, SyncMode};
use crate::progress::Operation;
use crate::scan::{CopyAction, Failure, Rules, TargetContent, scan};

use cost::TouchedUnits;

pub use cost::{GranularityCost, SMALL_WRITE};

/// The target of a [`plan`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum PlanTarget<'a> {
    /// It exists and is open.
    Existing(&'a dyn BlockDevice),
    /// It will be created, empty.
    New {
        /// The cluster size it will have in bytes, `None` if its format has no clusters.
        cluster_size: Option<u64>,
        /// The disk that will show through it; `None` if it will read as zeros. It may have any length: zeros
        /// follow where it ends.
        backing: Option<&'a dyn BlockDevice>,
    },
}

/// What a job would do. `Display` gives a few lines for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub struct Plan {
    /// Which part of the source.
    pub sync: SyncMode,
    /// The granularity and why.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub granularity: GranularityChoice,
    /// Length of the disk in bytes.
    pub len: u64,
    /// Bytes to copy as data. Zeros inside data, which only reading can tell, are among them.
    pub copy: u64,
    /// Bytes to make zero on the target.
    pub zero: u64,
    /// Bytes that need nothing: they read as zeros on the target already, or are left to its backing file.
    pub skip: u64,
    /// Separate runs of data.
    pub copy_runs: u64,
    /// The target's cluster size, if it has clusters.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub cluster_size: Option<u64>,
    #[cfg_attr(feature = "serde", serde(skip))]
    touched: TouchedUnits,
}

/// Computes what a job with these `options` would do.
///
/// Takes as long as the source's extents do: hours on a hostile image. [`plan_until`] can be stopped.
///
/// # Errors
/// What [`MirrorJob::start`](crate::MirrorJob::start) would refuse, and failing extent queries.
pub fn plan(
    source: &dyn BlockDevice,
    target: PlanTarget<'_>,
    options: &MirrorOptions,
) -> Result<Plan, Error> {
    plan_until(source, target, options, &mut |_| Visit::Continue(()))
}

/// The same; `progress` gets the offset up to which the extents are known, after each bounded query, and says
/// whether to go on.
///
/// # Errors
/// As [`plan`], and [`Error::Cancelled`] if `progress` stopped it.
pub fn plan_until(
    source: &dyn BlockDevice,
    target: PlanTarget<'_>,
    options: &MirrorOptions,
    progress: &mut dyn FnMut(u64) -> Visit,
) -> Result<Plan, Error> {
    options.check()?;
    if !matches!(options.sync, SyncMode::Full | SyncMode::Top) {
        return Err(Error::NeedsTap);
    }
    let (device, cluster_size, content) = match target {
        PlanTarget::Existing(device) => {
            check_lengths(source, device, options.longer_target)?;
            check_tail(source, device, options)?;
            let geometry = device.geometry();
            (
                Some(device),
                geometry.cluster_size,
                TargetContent::of(source.geometry().backing, geometry.backing, options),
            )
        }
        PlanTarget::New { cluster_size, backing } => (backing, cluster_size, TargetContent::Asked),
    };
    let rules = Rules {
        top_layers: options.counted_layers(),
        seek_zeros: false,
        allocate: options.allocate,
        target: match device {
            Some(_) if !options.target_is_zero => content,
            _ => TargetContent::Zero,
        },
    };
    let len = source.len();
    let mut plan = Plan {
        sync: options.sync,
        granularity: options.choose_granularity(cluster_size)?,
        len,
        copy: 0,
        zero: 0,
        skip: 0,
        copy_runs: 0,
        cluster_size,
        touched: TouchedUnits::default(),
    };
    match &options.only {
        Some(only) => {
            for run in only.runs() {
                let range = ByteRange::new(run.start, run.end.min(len));
                plan.measure(source, device, range, rules, progress)?;
            }
        }
        None => plan.measure(source, device, ByteRange::new(0, len), rules, progress)?,
    }
    Ok(plan)
}

impl Plan {
    /// Adds up what the extents in `range` need.
    fn measure(
        &mut self,
        source: &dyn BlockDevice,
        target: Option<&dyn BlockDevice>,
        range: ByteRange,
        rules: Rules,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<(), Error> {
        let mut at = range.start();
        let mut in_data = false;
        while at < range.end() {
            let extents = scan(source, target, ByteRange::new(at, range.end()), rules).map_err(
                |Failure { operation, error }| match operation {
                    Operation::Read => Error::Source(error),
                    Operation::Write => Error::Target(error),
                },
            )?;
            for extent in extents {
                let bytes = extent.range.len();
                at = extent.range.end();
                let data = matches!(extent.action, CopyAction::Copy { .. } | CopyAction::Clone { .. })
                    && !extent.below;
                match extent.action {
                    _ if extent.below => self.skip += bytes,
                    CopyAction::Copy { .. } | CopyAction::Clone { .. } => {
                        self.copy += bytes;
                        self.copy_runs += u64::from(!in_data);
                        self.touched.add(extent.range, self.len);
                    }
                    CopyAction::Zero => self.zero += bytes,
                    CopyAction::Skip => self.skip += bytes,
                }
                in_data = data;
            }
            if progress(at).is_break() {
                return Err(Error::Cancelled);
            }
        }
        Ok(())
    }
}

/// Refuses a source and a target of different lengths; `longer`: but for a target that is longer.
pub(crate) fn check_lengths(
    source: &dyn BlockDevice,
    target: &dyn BlockDevice,
    longer: bool,
) -> Result<(), Error> {
    if source.len() == target.len() || (longer && source.len() < target.len()) {
        return Ok(());
    }
    Err(Error::size_mismatch(source, target, longer))
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "granularity: {}", self.granularity)?;
        let runs = if self.copy_runs == 1 { "run" } else { "runs" };
        writeln!(f, "copy: {} in {} {runs}", ExactSize(self.copy), self.copy_runs)?;
        writeln!(f, "zero: {}", ExactSize(self.zero))?;
        write!(f, "skip: {}", ExactSize(self.skip))
    }
}

#[cfg(test)]
mod tests;
