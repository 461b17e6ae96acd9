//! The granularity of the dirty bitmap: what is valid, what is chosen, and why.
//!
//! Asked once per job (and by a dry run, which may have no target yet). The default comes from the *target's*
//! cluster size and never from the source: copying in units no larger than a cluster of the target allocates
//! nothing there that the source's data does not touch. Subclusters do not count, the cluster does.

use std::fmt;

use blockmirror_block::size::ExactSize;

/// The smallest granularity: one sector.
pub const MIN_GRANULARITY: u64 = 512;
/// The largest granularity, 64 MiB.
pub const MAX_GRANULARITY: u64 = 64 << 20;
/// The smallest granularity chosen by default, 4 KiB.
pub const MIN_DEFAULT_GRANULARITY: u64 = 4 << 10;
/// The largest granularity chosen by default, 64 KiB; also the choice for targets without clusters.
pub const MAX_DEFAULT_GRANULARITY: u64 = 64 << 10;

/// A number of bytes that cannot be a granularity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GranularityError {
    /// Below 512 bytes or above 64 MiB. Tested first.
    #[error("granularity {0}: must be between {MIN_GRANULARITY} and {MAX_GRANULARITY} (64 MiB)")]
    OutOfRange(u64),
    /// In range, but not a power of two.
    #[error("granularity {0}: must be a power of two")]
    NotPowerOfTwo(u64),
}

/// Tests that `bytes` is a power of two from 512 bytes to 64 MiB.
///
/// # Errors
/// The range is tested before the power of two, so 511 is out of range and 513 is not a power of two.
pub const fn check_granularity(bytes: u64) -> Result<u64, GranularityError> {
    if bytes < MIN_GRANULARITY || bytes > MAX_GRANULARITY {
        return Err(GranularityError::OutOfRange(bytes));
    }
    if !bytes.is_power_of_two() {
        return Err(GranularityError::NotPowerOfTwo(bytes));
    }
    Ok(bytes)
}

/// A granularity and where it came from. `Display` gives both: `64 KiB (the target has no clusters)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub struct GranularityChoice {
    /// The granularity in bytes; valid.
    #[cfg_attr(feature = "serde", serde(rename = "granularity"))]
    pub bytes: u64,
    /// Why this one.
    #[cfg_attr(feature = "serde", serde(rename = "granularity-reason"))]
    pub reason: GranularityReason,
}

/// Why a granularity was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "kind"))]
#[non_exhaustive]
pub enum GranularityReason {
    /// The caller asked for it.
    Explicit,
    /// It follows from the target's cluster size.
    #[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
    TargetCluster {
        /// The target's cluster size in bytes.
        cluster_size: u64,
        /// Whether the cluster size lies outside 4 KiB..64 KiB and the nearer bound was taken.
        clamped: bool,
    },
    /// The target has no clusters: 64 KiB.
    NoClusters,
}

impl GranularityChoice {
    /// Takes `explicit` if there is one and it is not 0; otherwise follows the target's cluster size.
    ///
    /// # Errors
    /// `explicit` is not a valid granularity.
    pub fn new(explicit: Option<u64>, target_cluster: Option<u64>) -> Result<Self, GranularityError> {
        if let Some(bytes) = explicit.filter(|&bytes| bytes != 0) {
            return Ok(Self { bytes: check_granularity(bytes)?, reason: GranularityReason::Explicit });
        }
        let Some(cluster_size) = target_cluster else {
            return Ok(Self { bytes: MAX_DEFAULT_GRANULARITY, reason: GranularityReason::NoClusters });
        };
        let near = cluster_size.clamp(MIN_DEFAULT_GRANULARITY, MAX_DEFAULT_GRANULARITY);
        // Clusters are powers of two in every format known here; a stranger's are rounded down to one.
        let bytes = 1 << near.ilog2();
        Ok(Self {
            bytes,
            reason: GranularityReason::TargetCluster { cluster_size, clamped: bytes != cluster_size },
        })
    }
}

impl fmt::Display for GranularityChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", ExactSize(self.bytes))?;
        match self.reason {
            GranularityReason::Explicit => f.write_str("(as asked)"),
            GranularityReason::TargetCluster { clamped: false, .. } => {
                f.write_str("(the target's cluster size)")
            }
            GranularityReason::TargetCluster { cluster_size, clamped: true } => write!(
                f,
                "(the target's cluster size is {}; the default stays between {} and {})",
                ExactSize(cluster_size),
                ExactSize(MIN_DEFAULT_GRANULARITY),
                ExactSize(MAX_DEFAULT_GRANULARITY)
            ),
            GranularityReason::NoClusters => f.write_str("(the target has no clusters)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_is_tested_before_the_power_of_two() {
        let message = |n| check_granularity(n).unwrap_err().to_string();
        assert_eq!(message(511), "granularity 511: must be between 512 and 67108864 (64 MiB)");
        assert_eq!(message(513), "granularity 513: must be a power of two");
        assert_eq!(message(3000), "granularity 3000: must be a power of two");
        assert_eq!(message(0), "granularity 0: must be between 512 and 67108864 (64 MiB)");
        assert_eq!(check_granularity(128 << 20), Err(GranularityError::OutOfRange(128 << 20)));
        assert_eq!(check_granularity((64 << 20) + 1), Err(GranularityError::OutOfRange((64 << 20) + 1)));
        for shift in 9..=26 {
            assert_eq!(check_granularity(1 << shift), Ok(1 << shift));
        }
    }

    #[test]
    fn the_default_is_the_targets_cluster_between_4k_and_64k() {
        for (cluster, expected) in [
            (512, 4096),
            (1024, 4096),
            (2048, 4096),
            (4096, 4096),
            (8 << 10, 8 << 10),
            (16 << 10, 16 << 10),
            (32 << 10, 32 << 10),
            (64 << 10, 64 << 10),
            (128 << 10, 64 << 10),
            (512 << 10, 64 << 10),
            (1 << 20, 64 << 10),
            (2 << 20, 64 << 10),
        ] {
            let choice = GranularityChoice::new(None, Some(cluster)).unwrap();
            assert_eq!(choice.bytes, expected, "cluster {cluster}");
            assert_eq!(
                choice.reason,
                GranularityReason::TargetCluster { cluster_size: cluster, clamped: cluster != expected }
            );
            assert_eq!(GranularityChoice::new(Some(0), Some(cluster)), Ok(choice), "0 means choose");
        }
        assert_eq!(GranularityChoice::new(None, None).unwrap().bytes, 65536);
    }

    #[test]
    fn the_choice_explains_itself() {
        let say = |explicit, cluster| GranularityChoice::new(explicit, cluster).unwrap().to_string();
        assert_eq!(say(Some(512), Some(65536)), "512 bytes (as asked)");
        assert_eq!(say(None, Some(16384)), "16 KiB (the target's cluster size)");
        assert_eq!(
            say(None, Some(2 << 20)),
            "64 KiB (the target's cluster size is 2 MiB; the default stays between 4 KiB and 64 KiB)"
        );
        assert_eq!(say(None, None), "64 KiB (the target has no clusters)");
    }

    #[test]
    fn an_odd_cluster_size_still_gives_a_valid_granularity() {
        for cluster in [0, 1, 5000, u64::MAX] {
            let choice = GranularityChoice::new(None, Some(cluster)).unwrap();
            assert!(check_granularity(choice.bytes).is_ok(), "cluster {cluster}");
        }
    }
}
