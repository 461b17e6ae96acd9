//! Sharing of blocks between source and target: which parts of the source's extents can be cloned.
//!
//! A scan asks it what to clone, the mover once more when it does so: in between the source may have changed.
//! Whether the two sides can share at all is asked once for each file of the source's chain.

use std::sync::{Arc, Weak};

use blockmirror_block::sync::Mutex;
use blockmirror_block::{BlockDevice, ByteRange, CloneUnits, Extent, ExtentKind, HostRun, Storage, Visit};

use crate::error::Error;
use crate::options::{MirrorOptions, Reflink};

/// Extents that [`check_shared`] looks at.
const MAX_CHECKED: usize = 65_536;

/// What is known of the files that the target of a job may share blocks with.
#[derive(Debug, Default)]
pub(crate) struct Clones {
    /// *Guards* the answers. *Order*: leaf. *Not under it*: the question, which takes as long as a flush.
    known: Mutex<Vec<Known>>,
}

#[derive(Debug)]
struct Known {
    /// Handles of a job that is over keep no file open.
    file: Weak<dyn Storage>,
    units: Option<CloneUnits>,
}

impl Clones {
    /// For a job with these options, `live` if it is attached to a tap; `None` if it clones nothing.
    ///
    /// # Errors
    /// [`Error::NothingShared`] if the two must share blocks and cannot; [`Error::Source`] if the extents
    /// cannot be read.
    pub(crate) fn checked(
        options: &MirrorOptions,
        live: bool,
        source: &dyn BlockDevice,
        target: &dyn BlockDevice,
    ) -> Result<Option<Self>, Error> {
        let clones = match options.reflink {
            _ if options.allocate => None,
            Reflink::Never => None,
            // Each guest write to a shared block would allocate a new one.
            Reflink::Auto if live => None,
            Reflink::Auto => Some(Self::default()),
            Reflink::Always => {
                let shares = |file: &dyn Storage| target.clone_units(file);
                check_shared(source, target.name(), options, &shares)?;
                Some(Self::default())
            }
        };
        Ok(clones)
    }

    /// The part of `extent` that can be cloned to `target`, and where it lies.
    pub(crate) fn part_of(&self, target: &dyn BlockDevice, extent: &Extent) -> Option<(ByteRange, HostRun)> {
        self.part_for(extent, &|file| target.clone_units(file))
    }

    /// The same for a target that can share blocks with a file in the units that `shares` answers.
    fn part_for(&self, extent: &Extent, shares: &UnitsWith<'_>) -> Option<(ByteRange, HostRun)> {
        if extent.kind != ExtentKind::Data || extent.compressed {
            return None;
        }
        let run = extent.host.clone()?.in_file();
        let units = self.units(&run.storage, shares)?;
        let located = extent.clone().in_host(run);
        let part = located.clip(units.part_of(&located))?;
        Some((part.range, part.host?))
    }

    fn units(&self, file: &Arc<dyn Storage>, shares: &UnitsWith<'_>) -> Option<CloneUnits> {
        let file_is = Arc::downgrade(file);
        let known =
            self.known.lock().iter().find(|known| known.file.ptr_eq(&file_is)).map(|known| known.units);
        if let Some(units) = known {
            return units;
        }
        let units = shares(&**file);
        self.known.lock().push(Known { file: file_is, units });
        units
    }
}

/// The units in which a target can share blocks with a file, if it can.
type UnitsWith<'a> = dyn Fn(&dyn Storage) -> Option<CloneUnits> + 'a;

/// Refuses, for [`Reflink::Always`], a source with data none of which a target named `target` can share, as
/// far as the source's first extents tell. `shares` answers the units in which the target can share blocks
/// with a file, if it can.
///
/// # Errors
/// [`Error::NothingShared`]; [`Error::Source`] if the extents cannot be read.
pub fn check_shared(
    source: &dyn BlockDevice,
    target: &str,
    options: &MirrorOptions,
    shares: &dyn Fn(&dyn Storage) -> Option<CloneUnits>,
) -> Result<(), Error> {
    if options.reflink != Reflink::Always {
        return Ok(());
    }
    let known = Clones::default();
    let (mut seen, mut data, mut shared) = (0, false, false);
    let answer = source.extents(ByteRange::new(0, source.len()), &mut |extent| {
        seen += 1;
        data |= extent.kind == ExtentKind::Data;
        shared = known.part_for(&extent, shares).is_some();
        if shared || seen == MAX_CHECKED { Visit::Break(()) } else { Visit::Continue(()) }
    });
    answer.map_err(Error::Source)?;
    if shared || !data || seen == MAX_CHECKED {
        return Ok(());
    }
    Err(Error::NothingShared { source_name: source.name().into(), target_name: target.into() })
}
