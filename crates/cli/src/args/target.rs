//! Options about the target file of the commands that make an image: `create`, `mirror`, `convert`.

use blockmirror_image::{Replacement, TargetOptions};
use clap::Args;

/// How an existing target is treated.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct TargetArgs {
    /// Overwrite an existing file in place; a failure leaves it unusable
    #[arg(long, help_heading = "Existing targets", conflicts_with = "atomic")]
    pub(crate) in_place: bool,

    /// Replace an existing file atomically once the new one is complete, or fail. By default a file is
    /// replaced where that loses nothing, and overwritten in place where it would
    #[arg(long, help_heading = "Existing targets")]
    pub(crate) atomic: bool,

    /// Refuse a target that exists, or that another run with this option is making, before anything is copied
    #[arg(long, help_heading = "Existing targets", conflicts_with_all = ["in_place", "atomic", "force"])]
    pub(crate) no_clobber: bool,

    /// An existing file for which one of the two would have to be given is written in place.
    #[arg(skip)]
    pub(crate) or_in_place: bool,

    /// A new file takes the space that QEMU gives it.
    #[arg(skip)]
    pub(crate) allocated_as_qemu: bool,

    /// An existing data file that holds nothing but zeros is taken.
    #[arg(skip)]
    pub(crate) blank_data_file: bool,

    /// Write to a block device that is mounted or in use; overwrite an existing data file (`-o data_file`)
    #[arg(long, help_heading = "Existing targets")]
    pub(crate) force: bool,

    /// Remove temporary files that interrupted runs left for the same target
    #[arg(long, help_heading = "Existing targets")]
    pub(crate) clean: bool,
}

impl TargetArgs {
    /// The same for the library; the new contents take about `space` bytes.
    pub(crate) fn options(self, space: Option<u64>) -> TargetOptions {
        let replacement = match (self.atomic, self.in_place) {
            (true, _) => Replacement::Atomic,
            (false, true) => Replacement::InPlace,
            (false, false) => Replacement::Auto,
        };
        TargetOptions::new()
            .replacement(replacement)
            .or_in_place(self.or_in_place)
            .no_clobber(self.no_clobber)
            .space(space)
            .force(self.force)
            .clean(self.clean)
    }
}
