//! What is known of the space that a new target takes by its options, before its source is looked at.
//!
//! Made by [`super::check`], used by [`super::space`].

use blockmirror_image::{CreateSettings, Format, Measurement, Preallocation, is_uri};
use blockmirror_mirror::Reflink;

use super::{Convert, Verify};

/// What is known of the space that a new target takes, by its options.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlannedSpace {
    /// What the image takes without data.
    pub(super) tables: u64,
    /// With data everywhere.
    pub(super) whole: u64,
    /// Blocks may be shared with files of the same file system.
    pub(super) shares: bool,
    /// Zeros take space.
    pub(super) allocates: bool,
}

impl Convert {
    /// What is known of a new target of `format` with `settings` and `len` bytes. `None` where the space is
    /// tried when the image is laid out, or lies in two places, or is a server's.
    pub(super) fn plan_space(
        &self,
        format: Format,
        settings: &CreateSettings,
        len: u64,
    ) -> Option<PlannedSpace> {
        let takes_space = settings.preallocation.is_some_and(Preallocation::takes_space);
        if takes_space || settings.data_file.is_some() || is_uri(&self.target) {
            return None;
        }
        let measured = Measurement::of_size(len, format, settings).ok()?;
        let sees_all = self.compress || matches!(self.verify, Some(Verify::Hash | Verify::Readback));
        Some(PlannedSpace {
            tables: if format == Format::Raw { 0 } else { measured.required },
            whole: measured.fully_allocated,
            shares: self.reflink != Reflink::Never && !sees_all,
            allocates: self.mirror.sparseness().1,
        })
    }
}
