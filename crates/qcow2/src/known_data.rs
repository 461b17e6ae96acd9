//! Where the data storage was last seen to hold data, so that it need not be asked for holes again. Kept in
//! the image's context, used by `holes`.

use blockmirror_block::ByteRange;
use blockmirror_block::sync::Mutex;

/// Data that the storage was last found to hold. It may have become a hole since, which only costs the
/// shortcut; a hole is never remembered, because it may have become data. Leaf lock.
#[derive(Debug, Default)]
pub(crate) struct KnownData(Mutex<ByteRange>);

impl KnownData {
    /// Part of the storage may have become a hole.
    pub(crate) fn forget(&self) {
        *self.0.lock() = ByteRange::default();
    }

    /// The storage was found to hold data in `range`.
    pub(crate) fn set(&self, range: ByteRange) {
        *self.0.lock() = range;
    }

    /// Bytes that are known to be data, if they lie behind `at`.
    pub(crate) fn len_behind(&self, at: u64) -> u64 {
        let known = *self.0.lock();
        if at < known.start() { known.len() } else { 0 }
    }

    /// Whether all of `range` is known to be data.
    pub(crate) fn holds(&self, range: ByteRange) -> bool {
        let known = *self.0.lock();
        known.start() <= range.start() && range.end() <= known.end()
    }
}
