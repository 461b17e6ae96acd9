//! Whether a conversion shares blocks with the source's files in place of copying them (reflinks).
//!
//! The option of [`Convert`], and the refusal of a target that must share and cannot: asked before a target
//! that is written in place loses its contents.

use blockmirror_block::{CloneUnits, Storage};
use blockmirror_image::{PreparedImage, Target};
use blockmirror_mirror::{MirrorOptions, Reflink, check_shared};

use super::{Convert, ConvertError, ConvertSource};

impl Convert {
    /// Whether the target shares blocks with the source's files. Zeros that were written are then shared as
    /// they are: a caller to whom the shortest run of them matters says [`Reflink::Never`]. Default:
    /// [`Reflink::Auto`], which shares nothing with a target that is to be preallocated, nor with
    /// [`Verify::Hash`](super::Verify::Hash) and [`Verify::Readback`](super::Verify::Readback), which see
    /// only what is copied. [`Reflink::Always`] is refused with these two.
    #[must_use]
    pub fn reflink(mut self, reflink: Reflink) -> Self {
        self.reflink = reflink;
        self
    }

    /// The options of the job with what is asked about reflinks.
    pub(super) fn with_reflink(&self, mirror: MirrorOptions) -> MirrorOptions {
        let takes_space =
            self.settings.preallocation.is_some_and(blockmirror_image::Preallocation::takes_space);
        mirror.reflink(match self.reflink {
            // Blocks of its own are what was asked for.
            Reflink::Auto if takes_space => Reflink::Never,
            reflink => reflink,
        })
    }
}

/// Refuses a new target that must share blocks with `source` and cannot; `copies`: all bytes pass through a
/// compressor or a verification. It still holds what it held.
pub(super) fn check_new(
    source: &ConvertSource,
    new: &PreparedImage,
    mirror: &MirrorOptions,
    copies: bool,
) -> Result<(), ConvertError> {
    let Some(target) = new.targets().next().map(Target::name) else { return Ok(()) };
    let shares = |file: &dyn Storage| units(new, file).filter(|_| !copies);
    check_shared(&**source.device(), &target, mirror, &shares).map_err(ConvertError::Start)
}

/// The units in which the image will share blocks with `file`, as it will say itself.
fn units(new: &PreparedImage, file: &dyn Storage) -> Option<CloneUnits> {
    // The data file, if there is one, holds the data.
    let block = new.targets().last()?.storage().clone_block(file)?;
    let device = new.cluster_size().unwrap_or(block);
    (block <= device).then_some(CloneUnits { device, file: block })
}
