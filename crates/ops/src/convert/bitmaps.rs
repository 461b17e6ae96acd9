//! The persistent bitmaps of the source, which a conversion copies to the target if it is asked to.
//!
//! Called by the steps of the conversion: what can be refused is refused by `check` and `prepare`, before the
//! target loses anything; the bits are copied when all data has been.

use std::path::Path;

use blockmirror_image::{self as image, CreateSpec, Format, Image};

use super::Convert;
use super::error::{ConvertError, CopyBitmapsProblem};
use super::source::ConvertSource;

/// Which persistent bitmaps of the source the target gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyBitmaps {
    /// None.
    #[default]
    None,
    /// All; one that is inconsistent is an error.
    All,
    /// All but those that are inconsistent.
    Consistent,
}

/// The names of the bitmaps that are copied, and of those that are left out.
#[derive(Clone, Debug, Default)]
pub(super) struct Selected {
    pub(super) copied: Vec<String>,
    pub(super) skipped: Vec<String>,
}

impl Convert {
    /// Selects the bitmaps of `source`, and reads each of them once: damage is met early.
    pub(super) fn select_bitmaps(&self, source: &ConvertSource) -> Result<Selected, ConvertError> {
        let mut selected = Selected::default();
        if self.bitmaps == CopyBitmaps::None {
            return Ok(selected);
        }
        let problem = |why| problem(&self.target, why);
        let Some(image) = source.single() else {
            return Err(problem(CopyBitmapsProblem::SeveralSources));
        };
        if self.snapshot.is_some() {
            return Err(problem(CopyBitmapsProblem::Snapshot));
        }
        let qcow2 = image.qcow2().ok_or_else(|| problem(CopyBitmapsProblem::Format(image.format())))?;
        if qcow2.header().version < 3 {
            return Err(problem(CopyBitmapsProblem::Version2));
        }
        let named = |error: blockmirror_qcow2::Error| error.in_file(&image.device().name().into());
        // In QEMU's order, which reports the last of the directory first.
        for entry in qcow2.bitmaps().map_err(named)?.into_iter().rev() {
            match (entry.in_use, self.bitmaps) {
                (true, CopyBitmaps::Consistent) => selected.skipped.push(entry.name.to_string()),
                (true, _) => return Err(problem(CopyBitmapsProblem::Inconsistent(entry.name.to_string()))),
                (false, _) => {
                    let name = entry.name.to_string();
                    qcow2.read_bitmap(&name).map_err(named)?;
                    selected.copied.push(name);
                }
            }
        }
        selected.copied.reverse();
        if !self.existing && self.target_format.or(source.format()) == Some(Format::Raw) {
            return Err(problem(CopyBitmapsProblem::Format(Format::Raw)));
        }
        Ok(selected)
    }
}

impl Selected {
    /// Whether a new image can get them.
    pub(super) fn check_new(&self, target: &Path, spec: &CreateSpec) -> Result<(), ConvertError> {
        match self.copied.is_empty() || spec.can_have_bitmaps() {
            true => Ok(()),
            false => Err(problem(target, CopyBitmapsProblem::Version2)),
        }
    }

    /// Whether `image`, a target that exists, can get them.
    pub(super) fn check_existing(&self, source: &ConvertSource, image: &Image) -> Result<(), ConvertError> {
        if self.copied.is_empty() {
            return Ok(());
        }
        let problem = |why| problem(image.path(), why);
        let target = image.qcow2().ok_or_else(|| problem(CopyBitmapsProblem::Format(image.format())))?;
        if target.header().version < 3 {
            return Err(problem(CopyBitmapsProblem::Version2));
        }
        if image.device().len() != source.device().len() {
            return Err(problem(CopyBitmapsProblem::OtherLength));
        }
        let there = target.bitmaps().map_err(|error| error.in_file(&image.device().name().into()))?;
        match self.copied.iter().find(|name| there.iter().any(|entry| entry.name == **name)) {
            Some(name) => Err(problem(CopyBitmapsProblem::Exists(name.clone()))),
            None => Ok(()),
        }
    }

    /// Copies them to `target`, each with its granularity and whether it records.
    pub(super) fn copy(&self, source: &ConvertSource, target: &Image) -> Result<(), image::Error> {
        let (Some(image), Some(to)) = (source.single(), target.qcow2()) else { return Ok(()) };
        let Some(from) = image.qcow2() else { return Ok(()) };
        let from_name = image.device().name().into();
        let to_name = target.device().name().into();
        for entry in from.bitmaps().map_err(|error| error.in_file(&from_name))? {
            let name = entry.name.to_text();
            if !self.copied.iter().any(|copied| *copied == name) {
                continue;
            }
            let bits = from.read_bitmap(&name).map_err(|error| error.in_file(&from_name))?;
            to.insert_bitmap(&name, bits, entry.auto).map_err(|error| error.in_file(&to_name))?;
        }
        Ok(())
    }
}

fn problem(target: &Path, why: CopyBitmapsProblem) -> ConvertError {
    ConvertError::Bitmaps { target: target.to_owned(), why }
}
