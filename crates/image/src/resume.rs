//! New images that outlive the run that writes them: kept under their temporary name, or in place, and taken
//! up again.
//!
//! Called by conversions with a checkpoint. Who goes on with an image must know which part of it holds what
//! was written: until then its contents are those of a crash. What is written in place does not show that it
//! is incomplete, but for a qcow2 image, which is marked.

use std::path::PathBuf;

use blockmirror_file::{FileStamp, LockMode};
use blockmirror_qcow2::{Header, Repair, Version};

use crate::create::{CreateSpec, NewImage, PreparedImage};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::open::OpenOptions;
use crate::storage_stamp::StorageStamp;
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

/// Where an image is until it is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyPlace {
    /// In a file under a temporary name.
    Partial(PartialFile),
    /// In the file, block device or export that keeps its name.
    InPlace(StorageStamp),
}

impl PreparedImage {
    /// Where the image is until it is complete; `None` if it is in two files, one of them for its data.
    ///
    /// # Errors
    /// The system does not tell which file or device it is.
    pub fn place(&mut self) -> Result<Option<CopyPlace>> {
        if let Some(partial) = self.partial_file()? {
            return Ok(Some(CopyPlace::Partial(partial)));
        }
        let stamp = self.sole_file().map(|target| target.protocol().stamp()).transpose()?.flatten();
        Ok(stamp.map(|stamp| CopyPlace::InPlace(stamp.identity())))
    }

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
    /// is on disk, whatever the page cache has of it. A qcow2 image that is written in place must have its
    /// mark still. Nothing in it is changed: it can be [read](NewImage::read_back), and must be
    /// [mended](NewImage::mend_crash) before it is written.
    ///
    /// # Errors
    /// [`Error::Create`] if it is no such image any more; others as for opening one. The file stays.
    pub fn take_up(self) -> Result<NewImage> {
        let (spec, mut new) = self.into_written();
        let target = new.file_mut();
        // The run before may have met a failed write: then the page cache shows what the disk does not have.
        target.storage().flush()?;
        if let Some(file) = target.host_file() {
            file.recover()?;
        }
        if let Some(head) = head(&spec) {
            target.mark_again(head)?;
        }
        let (storage, len) = (target.storage(), spec.raw_len());
        match new.format() {
            Format::Raw if storage.len()? != len => Err(Error::Create {
                path: storage.name().into(),
                why: format!("what the interrupted run has written has {} bytes, not {len}", storage.len()?),
            }),
            _ => Ok(new),
        }
    }
}

/// The first bytes of a qcow2 image, which an unfinished one does not have.
fn head(spec: &CreateSpec) -> Option<[u8; 8]> {
    // A raw image has no clusters.
    spec.cluster_size()?;
    let version: u32 = match spec.qcow2().version {
        Version::V2 => 2,
        Version::V3 => 3,
        // One that is not known here is not taken up: its mark stays.
        _ => return None,
    };
    let mut head = *b"QFI\xfb\0\0\0\0";
    head[4..].copy_from_slice(&version.to_be_bytes());
    Some(head)
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

    /// Gives back what a crash has leaked of a qcow2 image that was [taken up](PreparedImage::take_up).
    ///
    /// # Errors
    /// [`Error::Create`] if the image is damaged; others as for opening one.
    pub fn mend_crash(&self) -> Result<()> {
        let Some(target) = self.targets().next().filter(|_| self.format == Format::Qcow2) else {
            return Ok(());
        };
        let storage = target.storage();
        let name = storage.name().into();
        let header = Header::read(&*storage).map_err(|error| error.in_file(&name))?;
        // With lazy refcounts they may be too low, which the header says.
        let what = if header.is_dirty() { Repair::All } else { Repair::Leaks };
        let report = blockmirror_qcow2::repair(&*storage, what, &mut ());
        let report = report.map_err(|error| error.in_file(&name))?;
        match report.corruptions == 0 && report.check_errors == 0 {
            true => Ok(()),
            false => {
                let why = "what the interrupted run has written is damaged".to_owned();
                Err(Error::Create { path: storage.name().into(), why })
            }
        }
    }

    /// Whether dropping it leaves its file under the temporary name, for a later run to
    /// [take up](PreparedImage::take_up). By default it does not, unless it was taken up.
    pub fn keep(&mut self, keep: bool) {
        if let Some(new) = self.file_mut().new_mut() {
            new.keep(keep);
        }
    }
}
