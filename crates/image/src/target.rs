//! What a new image, or its data file, is written into.
//!
//! Four kinds: a new file, an existing file, a block device, an NBD export. Made by [`crate::PreparedImage`]. How an
//! existing file is treated is decided in `blockmirror_file`; here the decision meets formats and servers: a qcow2 image
//! that is written in place is marked until it is durable.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::Storage;
use blockmirror_file::{
    Decision, FileId, InPlace, Leftover, NewFile, Replacement, TargetFile, TargetOptions, TargetPlan,
};
use blockmirror_qcow2::Unfinished;

use crate::error::{Error, Result};
use crate::place::{Access, Place, is_uri};

/// A place for a new image, open for writing. It holds what it held before until the image is written, and of a
/// [replaced](Self::in_place) file until [`persist`](Self::persist).
#[derive(Debug)]
#[must_use = "dropping it discards a new file"]
pub struct Target {
    kind: Kind,
    place: Place,
    leftovers: Vec<Leftover>,
    /// The mark of a qcow2 image that is written in place.
    unfinished: Option<Arc<Unfinished>>,
}

#[derive(Debug)]
enum Kind {
    /// A file under a temporary name.
    New(NewFile),
    /// A file or a block device that keeps its name.
    InPlace(InPlace),
    /// An export of an NBD server.
    Export,
}

impl Target {
    /// Decides how `path` will be written; touches nothing.
    ///
    /// # Errors
    /// [`Error::TargetUnclear`] if the caller must choose; others as for [`TargetPlan::new`].
    pub fn decide(path: &Path, options: &TargetOptions) -> Result<Decision> {
        if is_uri(path) {
            return match options.wanted() {
                Replacement::Atomic => Err(Error::Create {
                    path: path.to_owned(),
                    why: "an export cannot be replaced atomically".into(),
                }),
                _ => Ok(Decision::InPlace(InPlace::BlockDevice)),
            };
        }
        clear(path, &TargetPlan::new(path, *options)?)
    }

    /// Opens `path` in the way that has been decided.
    pub(crate) fn prepare(path: &Path, options: &TargetOptions, access: Access) -> Result<Self> {
        if is_uri(path) {
            Self::decide(path, options)?;
            let place = Place::open(path, access)?;
            return Ok(Self { kind: Kind::Export, place, leftovers: Vec::new(), unfinished: None });
        }
        let plan = TargetPlan::new(path, *options)?;
        clear(path, &plan)?;
        let (file, leftovers) = plan.open()?;
        let (kind, file) = match file {
            TargetFile::New(new) => {
                let file = Arc::clone(new.storage());
                (Kind::New(new), file)
            }
            TargetFile::InPlace(file, why) => (Kind::InPlace(why), file),
        };
        Ok(Self { kind, place: Place::File(file), leftovers, unfinished: None })
    }

    /// Why it is written in place, unless it is a new file. A failure then leaves neither the old contents nor the new ones.
    pub fn in_place(&self) -> Option<&InPlace> {
        match &self.kind {
            Kind::InPlace(why) => Some(why),
            Kind::New(_) | Kind::Export => None,
        }
    }

    /// The file, unless it is an export.
    pub fn file(&self) -> Option<FileId> {
        self.place.id().file()
    }

    /// What killed runs left of earlier files of its name.
    pub fn leftovers(&self) -> &[Leftover] {
        &self.leftovers
    }

    /// Whether an empty raw image in it reads as zeros: it can be cut to no length and grown again.
    pub(crate) fn can_be_emptied(&self) -> bool {
        !self.storage().info().fixed_len
    }

    /// Its name in messages.
    pub fn name(&self) -> String {
        self.storage().name().to_owned()
    }

    /// Marks it as an unfinished qcow2 image if it is written in place.
    pub(crate) fn mark(&mut self) -> Result<()> {
        if !matches!(self.kind, Kind::New(_)) {
            let unfinished = Arc::new(Unfinished::begin(self.place.storage())?);
            self.place = Place::Unfinished(Box::new(self.place.clone()), Arc::clone(&unfinished));
            self.unfinished = Some(unfinished);
        }
        Ok(())
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        self.place.storage()
    }

    /// Its temporary name, if it has one.
    pub fn partial_path(&self) -> Option<PathBuf> {
        match &self.kind {
            Kind::New(new) => Some(new.partial_path().to_owned()),
            Kind::InPlace(_) | Kind::Export => None,
        }
    }

    /// Makes it durable; a new file gets its name, and the mark of an unfinished image goes.
    ///
    /// # Errors
    /// If that fails. A new file is gone then, or (if only the last step failed) has its name already.
    pub fn persist(self) -> Result<()> {
        let Self { kind, place, unfinished, .. } = self;
        match (kind, unfinished) {
            (Kind::New(new), _) => {
                drop(place);
                new.persist()?;
            }
            (_, Some(unfinished)) => unfinished.finish()?,
            (Kind::InPlace(_) | Kind::Export, None) => place.plain_storage().flush()?,
        }
        Ok(())
    }

    /// Gives it up: a new file is removed, anything else stays as it is by now.
    pub fn discard(self) {
        drop(self);
    }
}

fn clear(path: &Path, plan: &TargetPlan<'_>) -> Result<Decision> {
    match plan.decision() {
        Decision::Refuse(why) => Err(Error::TargetUnclear { path: path.to_owned(), why: why.clone() }),
        decided => Ok(decided.clone()),
    }
}
