//! What is timed side by side with `qemu-img`: a source, both programs' words, and the judge of what they
//! did.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;

/// One scenario.
pub(super) trait Case {
    /// Its name, in the table and for `--only`.
    fn name(&self) -> &'static str;

    /// Makes the source in `dir`.
    fn make_source(&self, qemu: Qemu, dir: &Path) -> Outcome<PathBuf>;

    /// Our words. `program` knows the command as well as the product itself does.
    fn our_words(&self, program: &Path, source: &Path, target: &Path) -> Vec<OsString>;

    /// The peer's words; `program` as for ours, which may be its own peer.
    fn peer_words(&self, program: &Path, source: &Path, target: &Path) -> Vec<OsString>;

    /// The fewest rounds that say anything.
    fn rounds(&self) -> usize {
        1
    }

    /// Whether both did what they should, outside of the timing.
    fn judge(&self, qemu: Qemu, source: &Path, targets: [&Path; 2]) -> Outcome;
}
