//! New images that outlive the run that writes them: kept under their temporary name, and taken up again.
//!
//! Called by conversions with a checkpoint. Who goes on with an image must know which part of it holds what
//! was written: until then its contents are those of a crash.

use std::path::PathBuf;

use blockmirror_file::{FileStamp, LockMode};
use blockmirror_qcow2::{Header, Repair};

use crate::create::{NewImage, PreparedImage};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::open::OpenOptions;
use crate::target::Target;

/// The temporary file of a new image, as a later run finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PartialFile {
    /// The number in its name, for [`TargetOptions::resume`](crate::TargetOptions::resume).
    pub number: u32,
    /// Its name.
    pub path: PathBuf,
    /// The name beside it for what says how far it has come.
    pub sidecar: PathBuf,
    /// Which file it is; it is written, so that nothing else of it stays the same.
    pub stamp: FileStamp,
}

impl PreparedImage {
    /// The temporary file that holds all of the image; `None` if there is no such file, because the image is
    /// written in place or has a data file.
    ///
    /// # Errors
    /// The system does not tell which file it is.
    pub fn partial_file(&mut self) -> Result<Option<PartialFile>> {
        let Some(new) = self.sole_file().and_then(Target::new_mut) else { return Ok(None) };
        let Some(stamp) = new.storage().stamp()? else { return Ok(None) };
        Ok(Some(PartialFile {
            number: new.number(),
            path: new.partial_path().to_owned(),
            sidecar: new.sidecar_path(),
            stamp: stamp.identity(),
        }))
    }

    /// The cluster size of the image.
    pub fn cluster_size(&self) -> Option<u64> {
        self.spec().cluster_size()
    }

    /// Whether its file takes space for what was not written.
    pub fn is_preallocated(&self) -> bool {
        self.spec().takes_space()
    }

    /// Makes the temporary name durable: after a power cut a later run finds the file.
    ///
    /// # Errors
    /// If that fails.
    pub fn sync_partial_name(&mut self) -> Result<()> {
        match self.sole_file().and_then(Target::new_mut) {
            Some(new) => Ok(new.sync_name()?),
            None => Ok(()),
        }
    }

    /// Goes on with the image as an interrupted run has left it, instead of [writing](Self::write) it: as it
    /// is on disk, whatever the page cache has of it. What a crash has leaked of a qcow2 image is given back
    /// first.
    ///
    /// # Errors
    /// [`Error::Create`] if it is no such image any more; others as for opening one. The file stays.
    pub fn take_up(self) -> Result<NewImage> {
        let (spec, new) = self.into_written();
        let target = new.targets().next();
        let Some((storage, file)) = target.map(|target| (target.storage(), target.new_file())) else {
            return Ok(new);
        };
        // The run before may have met a failed write: then the page cache shows what the disk does not have.
        storage.flush()?;
        if let Some(file) = file {
            file.recover()?;
        }
        let changed = |why: String| Error::Create { path: storage.name().into(), why };
        match new.format() {
            Format::Raw if storage.len()? != spec.raw_len() => Err(changed(format!(
                "the temporary file has {} bytes, not {}",
                storage.len()?,
                spec.raw_len()
            ))),
            Format::Raw => Ok(new),
            Format::Qcow2 => {
                let name = storage.name().into();
                let header = Header::read(&*storage).map_err(|error| error.in_file(&name))?;
                // With lazy refcounts they may be too low, which the header says.
                let what = if header.is_dirty() { Repair::All } else { Repair::Leaks };
                let report = blockmirror_qcow2::repair(&*storage, what, &mut ());
                let report = report.map_err(|error| error.in_file(&name))?;
                match report.corruptions == 0 && report.check_errors == 0 {
                    true => Ok(new),
                    false => Err(changed("the temporary file is damaged".to_owned())),
                }
            }
        }
    }
}

impl OpenOptions {
    /// What [`lock`](Self::lock) has set, for a file that belongs to the image.
    pub fn locked(&self) -> LockMode {
        self.access(false, false).lock
    }
}

impl NewImage {
    /// The format of the image.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether dropping it leaves its file under the temporary name, for a later run to
    /// [take up](PreparedImage::take_up). By default it does not, unless it was taken up.
    pub fn keep(&mut self, keep: bool) {
        if let Some(new) = self.file_mut().new_mut() {
            new.keep(keep);
        }
    }
}
