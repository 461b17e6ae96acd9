//! Rebasing: an image is put on another backing file, or on none, and reads as before.
//!
//! [`Rebase`] opens the files, [`OpenRebase`] has what is known before anything changes, [`RebaseJob`] copies
//! into the image what the old chain shows and the new one does not ([`pass`]), and changes the header last.
//! Or the header alone changes, and what the image reads as is the caller's affair.
//!
//! What must hold: at each instant, also after a crash, the image reads as before: what it gets is what it
//! shows already, that is durable before the header changes, and the header names the old file or the new
//! one.

mod pass;

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blockmirror_block::BlockDevice;
use blockmirror_image::{
    AllowedReferences, BackingFormat, FileId, Image, ImageName, Note, OpenOptions, check_backing,
    directory_of, join_name,
};
use blockmirror_qcow2::{CompressFilter, Qcow2};

use crate::error::Error;
use crate::stream::Base;
use crate::{Job, JobControl, JobOptions, JobProgress, Outcome, Worker};

use pass::Pass;

/// How often [`Rebase::run`] reports progress and looks whether it is cancelled.
const TICK: Duration = Duration::from_millis(50);

/// What an image is put on, as its header will name it.
#[derive(Clone, Debug)]
struct NewBacking {
    name: String,
    format: BackingFormat,
}

/// A rebase of an image that is not in use.
///
/// The default puts it on no backing file: it holds all that it reads as then.
///
/// ```
/// use std::sync::atomic::AtomicBool;
/// use blockmirror_image::{CreateSettings, CreateSpec, Format, ImageInfo, NewImage, OpenOptions};
/// use blockmirror_ops::Rebase;
///
/// # let dir = tempfile::tempdir()?;
/// # let (base, overlay) = (dir.path().join("base.raw"), dir.path().join("overlay.qcow2"));
/// std::fs::write(&base, [1; 4096])?;
/// std::fs::write(base.with_file_name("other.raw"), [2; 4096])?;
/// let mut settings = CreateSettings::default();
/// settings.parse(Format::Qcow2, "backing_file=base.raw,backing_fmt=raw")?;
/// NewImage::create(&overlay, &CreateSpec::new(Format::Qcow2, 4096, settings))?.persist()?;
///
/// Rebase::new(&overlay).onto("other.raw", Format::Raw).run(&AtomicBool::new(false), |_| {})?;
/// let image = OpenOptions::new().with_backing(false).open(&overlay)?;
/// let mut read = [0; 4096];
/// image.device().read_at(&mut read, 0)?;
/// assert_eq!(read, [1; 4096]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rebase {
    image: ImageName,
    backing: Option<NewBacking>,
    header_only: bool,
    unchecked: bool,
    compress: bool,
    allocate_zeros: bool,
    access: OpenOptions,
    backing_access: OpenOptions,
    allowed: AllowedReferences,
}

impl Rebase {
    /// Takes the image `image` off its backing file.
    pub fn new(image: impl Into<ImageName>) -> Self {
        Self {
            image: image.into(),
            backing: None,
            header_only: false,
            unchecked: false,
            compress: false,
            allocate_zeros: false,
            access: OpenOptions::new(),
            backing_access: OpenOptions::new(),
            allowed: AllowedReferences::new(),
        }
    }

    /// Puts it on the file `name`, which the header will name so: relative to the image's directory.
    #[must_use]
    pub fn onto(mut self, name: impl Into<String>, format: impl Into<BackingFormat>) -> Self {
        self.backing = Some(NewBacking { name: name.into(), format: format.into() });
        self
    }

    /// Changes the header alone, and opens no backing file: what the image reads as changes wherever the two
    /// differ. For a backing file that was moved or replaced by one with the same contents.
    #[must_use]
    pub fn header_only(mut self, header_only: bool) -> Self {
        self.header_only = header_only;
        self
    }

    /// With [`header_only`](Self::header_only): does not look whether the image is part of the chain that it
    /// is put on. It does not open then until its header names another file, in the same way.
    #[must_use]
    pub fn unchecked(mut self, unchecked: bool) -> Self {
        self.unchecked = unchecked;
        self
    }

    /// Stores the data that the image gets compressed, by whole clusters. The image must be able to.
    #[must_use]
    pub fn compress(mut self, compress: bool) -> Self {
        self.compress = compress;
        self
    }

    /// Writes zeros that the image shows of its old backing file as data, as QEMU does; otherwise the image
    /// says that they are zeros. What is [compressed](Self::compress) does not, nor what lies past the end of
    /// the old backing file.
    #[must_use]
    pub fn allocate_zeros(mut self, allocate: bool) -> Self {
        self.allocate_zeros = allocate;
        self
    }

    /// Locks, cache mode and claims of the image; nothing else of `options` counts.
    #[must_use]
    pub fn access(mut self, options: OpenOptions) -> Self {
        self.access = options;
        self
    }

    /// Locks and cache mode of the new backing file; nothing else of `options` counts.
    #[must_use]
    pub fn backing_access(mut self, options: OpenOptions) -> Self {
        self.backing_access = options;
        self
    }

    /// The files that images may name, besides those below their own directory and those named here.
    #[must_use]
    pub fn allow(mut self, allowed: AllowedReferences) -> Self {
        self.allowed = allowed;
        self
    }

    /// Opens the image with its chain, and the new backing file with its own, and checks that the header can
    /// name it.
    ///
    /// # Errors
    /// [`Error::Image`]; [`Error::NotLayered`] for an image of a format without backing files;
    /// [`Error::Relink`] if the header cannot name it; [`Error::Write`] if the image holds nothing
    /// compressed. Nothing has changed.
    pub fn open(&self) -> Result<OpenRebase, Error> {
        let path = &self.image.path;
        let options = self.access.clone().format(self.image.format);
        let options = options.node(self.image.node.clone()).writable(true);
        let policy = self.allowed.policy_for(path)?;
        let image = options.policy(policy).with_backing(!self.header_only).open(path)?;
        let Some(qcow2) = image.qcow2().map(Arc::clone) else {
            return Err(Error::NotLayered { path: path.clone(), format: image.format() });
        };
        let (name, format) = (self.name(), self.backing.as_ref().map(|new| new.format.as_str()));
        qcow2.check_backing_file(name, format).map_err(Error::Relink)?;
        if self.compress && !self.header_only {
            // Whether it can.
            CompressFilter::new(Arc::clone(&qcow2)).map_err(Error::Write)?;
        }
        let new = match &self.backing {
            Some(new) => self.open_new(new)?,
            None => None,
        };
        Ok(OpenRebase { image, qcow2, new, rebase: self.clone() })
    }

    fn name(&self) -> Option<&[u8]> {
        self.backing.as_ref().map(|new| new.name.as_bytes())
    }

    /// Opens the new backing file, unless only the header changes; a cycle is refused, unless that is not
    /// looked at.
    fn open_new(&self, new: &NewBacking) -> Result<Option<Image>, Error> {
        if self.header_only && self.unchecked {
            return Ok(None);
        }
        let path = &self.image.path;
        let found = join_name(path, OsStr::new(&new.name));
        let policy = match &found {
            // A directory that is not there holds nothing to look at.
            Some(found) if directory_of(found).is_dir() => {
                let policy = self.allowed.clone().file(found).policy_for(found)?;
                check_backing(path, None, found, Some(new.format.format()), &policy)?;
                policy
            }
            _ => self.allowed.policy_for(path)?,
        };
        if self.header_only {
            return Ok(None);
        }
        let options = self.backing_access.clone().format(new.format.format()).policy(policy);
        Ok(Some(options.open_backing_of(path, OsStr::new(&new.name))?))
    }

    /// Rebases: all steps, one after the other. `progress` is called some times a second; once `cancel` is
    /// true, the rebase ends with an error.
    ///
    /// # Errors
    /// [`Error`]. The image reads as before.
    pub fn run(&self, cancel: &AtomicBool, mut progress: impl FnMut(&JobProgress)) -> Result<Outcome, Error> {
        let job = self.open()?.start()?;
        loop {
            let over = job.control().wait_timeout(TICK);
            progress(&job.control().progress());
            if over {
                return job.wait();
            }
            if cancel.load(Ordering::Relaxed) {
                // Refused if it is over, which is as good.
                let _ = job.control().force_cancel();
            }
        }
    }
}

/// How the image gets what it lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Data as data, zeros by its own statement.
    Plain,
    /// Data and zeros as data.
    AllocateZeros,
    /// Data compressed, zeros by its own statement.
    Compress,
}

/// A rebase whose files are open. Nothing has changed.
#[derive(Debug)]
pub struct OpenRebase {
    image: Image,
    qcow2: Arc<Qcow2>,
    new: Option<Image>,
    rebase: Rebase,
}

impl OpenRebase {
    /// The files that will be written.
    pub fn files(&self) -> impl Iterator<Item = FileId> {
        self.image.own_files()
    }

    /// What the owner of the images should know.
    pub fn notes(&self) -> impl Iterator<Item = &Note> {
        self.image.notes().iter().chain(self.new.iter().flat_map(Image::notes))
    }

    /// Starts.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub fn start(self) -> Result<RebaseJob, Error> {
        let Self { image, qcow2, new, rebase } = self;
        let name = rebase.name().map(<[u8]>::to_vec);
        let format = rebase.backing.as_ref().map(|new| new.format.as_str().to_owned());
        if rebase.header_only {
            let work = move |worker: &mut Worker| {
                let _open = image;
                worker.last_step()?;
                qcow2.set_backing_file(name.as_deref(), format.as_deref()).map_err(Error::Relink)
            };
            return Ok(RebaseJob { job: Job::start("rebase", 0, JobOptions::default(), work)? });
        }
        let shared = new.as_ref().and_then(|new| image.depth_of(new));
        let base = new.zip(name).map(|(new, name)| Base { device: Arc::clone(new.device()), name, format });
        let way = match rebase.allocate_zeros {
            _ if rebase.compress => Way::Compress,
            true => Way::AllocateZeros,
            false => Way::Plain,
        };
        RebaseJob::start_with(qcow2, base, shared, way, JobOptions::default())
    }
}

/// A rebase that runs. Dropping it cancels it; the image reads as before.
#[derive(Debug)]
#[must_use = "dropping it cancels the rebase"]
pub struct RebaseJob {
    job: Job,
}

impl RebaseJob {
    /// Starts to bring up into `image`, which has no other writer, what it shows of the layers below and
    /// would not show of `new`; then puts it on `new`, or on nothing. If `new` is a layer of its chain
    /// already, `shared` may say how deep it lies (1 is the backing file): then only what the layers above it
    /// decide is looked at.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::NoLayers`] for a depth of 0; [`Error::Thread`].
    pub fn start(
        image: Arc<Qcow2>,
        new: Option<Base>,
        shared: Option<u32>,
        options: JobOptions,
    ) -> Result<Self, Error> {
        Self::start_with(image, new, shared, Way::Plain, options)
    }

    /// The same with data stored compressed.
    ///
    /// # Errors
    /// As for [`start`](Self::start); [`Error::Write`] if the image holds nothing compressed.
    pub fn start_compressed(
        image: Arc<Qcow2>,
        new: Option<Base>,
        shared: Option<u32>,
        options: JobOptions,
    ) -> Result<Self, Error> {
        Self::start_with(image, new, shared, Way::Compress, options)
    }

    fn start_with(
        image: Arc<Qcow2>,
        new: Option<Base>,
        shared: Option<u32>,
        way: Way,
        options: JobOptions,
    ) -> Result<Self, Error> {
        if !image.geometry().writable {
            return Err(Error::ReadOnly { name: image.name().to_owned() });
        }
        if shared == Some(0) {
            return Err(Error::NoLayers { layers: 0 });
        }
        let filter = (way == Way::Compress).then(|| CompressFilter::new(Arc::clone(&image)));
        let filter = filter.transpose().map_err(Error::Write)?;
        let old_len = image.backing().filter(|_| way == Way::AllocateZeros).map_or(0, |old| old.len());
        let len = image.len();
        let work = move |worker: &mut Worker| {
            Pass::new(&*image, filter.as_ref(), new.as_ref().map(|new| &*new.device), shared)
                .allocate_zeros_below(old_len)
                .run(worker)?;
            worker.last_step()?;
            Base::relink(new.as_ref(), &image)?;
            let stored = image.store_bitmaps();
            stored.map_err(|error| Error::Write(error.in_file(&image.name().into())))
        };
        Ok(Self { job: Job::start("rebase", len, options, work)? })
    }

    /// The handle of the job: progress, cancel.
    pub fn control(&self) -> &JobControl {
        self.job.control()
    }

    /// Waits until the image stands on its new backing file, durably.
    ///
    /// # Errors
    /// Why it failed, or [`Error::Cancelled`]. The image reads as before, and stands on its old backing file,
    /// unless the reason is [`Error::Relink`], or only its persistent bitmaps could not be stored.
    pub fn wait(self) -> Result<Outcome, Error> {
        self.job.wait()
    }
}

#[cfg(test)]
mod tests;
