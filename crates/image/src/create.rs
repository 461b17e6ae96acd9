//! Making images.
//!
//! First what the image will be written into is opened ([`PreparedImage`]), then it is written
//! ([`NewImage`]). A new file gets its name once it is durable ([`NewImage::persist`]); until then what had
//! the name stays as it was, and giving up leaves nothing behind. What else there is ([`Target`]) is written
//! in place.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockmirror_block::{ByteRange, Storage};
use blockmirror_file::{Decision, FileOptions, FileStorage, InPlace, LockMode, TargetOptions};
use blockmirror_qcow2::Preallocation;
use blockmirror_raw::SECTOR;

use crate::blank::is_blank;
use crate::cache::CacheMode;
use crate::chain::{self, Spot};
use crate::disk_image::Image;
use crate::error::{Error, Result};
use crate::format::Format;
#[cfg(feature = "nbd")]
use crate::nbd::NbdOptions;
use crate::open::OpenOptions;
use crate::options::CreateSettings;
use crate::reference::{ReferencePolicy, find_name, join_name};
use crate::stoppable::{self, Stoppable};
use crate::target::Target;

/// What image to make.
#[derive(Clone, Debug)]
pub struct CreateSpec {
    format: Format,
    size: u64,
    settings: CreateSettings,
    policy: Option<ReferencePolicy>,
    /// How the new files are locked and use the page cache, and how a server is connected to.
    access: OpenOptions,
    target: TargetOptions,
    replace_data_file: bool,
    unknown_chain: bool,
    filled: bool,
    compressed: bool,
}

impl CreateSpec {
    /// An image of `format` with `size` bytes, and the other settings as given. The size is rounded up to a
    /// multiple of 512.
    pub fn new(format: Format, size: u64, settings: CreateSettings) -> Self {
        Self {
            format,
            size,
            settings,
            policy: None,
            access: OpenOptions::new(),
            target: TargetOptions::new(),
            replace_data_file: false,
            unknown_chain: false,
            filled: false,
            compressed: false,
        }
    }

    /// Which files the chain below the image may pull in when it is looked at
    /// ([`check_backing`](crate::check_backing)); by default those in or below the directory of the backing
    /// file.
    #[must_use]
    pub fn policy(mut self, policy: ReferencePolicy) -> Self {
        self.policy = Some(policy);
        self
    }

    /// How files and devices that are there already are treated.
    #[must_use]
    pub fn target(mut self, options: TargetOptions) -> Self {
        self.target = options;
        self
    }

    /// How the new files are locked, and what they replace.
    #[must_use]
    pub fn lock(mut self, lock: LockMode) -> Self {
        self.access = self.access.lock(lock);
        self
    }

    /// Whether the contents of a data file that is there already may be lost. By default it is refused
    /// ([`Error::DataFileExists`]): an option that names it might be meant to attach it.
    #[must_use]
    pub fn replace_data_file(mut self, replace: bool) -> Self {
        self.replace_data_file = replace;
        self
    }

    /// Whether files that are there already may be lost although the chain below the image cannot be followed
    /// to its end, so that they might be part of it. By default that is refused ([`Error::ChainUnknown`]).
    #[must_use]
    pub fn unknown_chain(mut self, accept: bool) -> Self {
        self.unknown_chain = accept;
        self
    }

    /// Whether the caller writes the whole disk: then a raw image on a device or in an export is not cleared
    /// first.
    #[must_use]
    pub fn filled(mut self, filled: bool) -> Self {
        self.filled = filled;
        self
    }

    /// Whether the image will be filled with compressed data ([`OpenOptions::compress`]): a format, or an
    /// option, that does not go with that is refused then.
    #[must_use]
    pub fn compressed(mut self, compressed: bool) -> Self {
        self.compressed = compressed;
        self
    }

    /// How the new files use the host's page cache. What is written to them later follows from
    /// [`OpenOptions::cache`].
    #[must_use]
    pub fn cache(mut self, mode: CacheMode) -> Self {
        self.access = self.access.cache(mode);
        self
    }

    /// What [`target`](Self::target) has set.
    pub fn target_options(&self) -> &TargetOptions {
        &self.target
    }

    /// How an NBD server is connected to, if the image is to be made in an export.
    #[cfg(feature = "nbd")]
    #[must_use]
    pub fn nbd(mut self, options: NbdOptions) -> Self {
        self.access = self.access.nbd(options);
        self
    }

    /// Takes locks, cache mode and NBD options from `options`; nothing else of it counts.
    #[must_use]
    pub fn access(mut self, options: &OpenOptions) -> Self {
        self.access = options.clone();
        self
    }

    /// The cluster size that the image will have.
    pub fn cluster_size(&self) -> Option<u64> {
        match self.format {
            Format::Raw => None,
            Format::Qcow2 => Some(self.qcow2().cluster_size),
        }
    }

    /// Whether the image can have persistent bitmaps: qcow2 from version 3 on can.
    pub fn can_have_bitmaps(&self) -> bool {
        self.format == Format::Qcow2 && self.qcow2().version == blockmirror_qcow2::Version::V3
    }

    /// Whether the settings are valid and fit together; looks at no file. `path` is for the message.
    ///
    /// # Errors
    /// What [`NewImage::create`] would say.
    pub fn check(&self, path: &Path) -> Result<()> {
        self.check_compressed(path)?;
        match self.format {
            Format::Raw if self.settings.backing_file.is_some() => Err(Error::Create {
                path: path.to_owned(),
                why: "a raw image cannot have a backing file".into(),
            }),
            Format::Raw if self.size > i64::MAX.cast_unsigned() - (SECTOR - 1) => {
                Err(Error::Create { path: path.to_owned(), why: "no file can be that large".into() })
            }
            Format::Raw => Ok(()),
            Format::Qcow2 => {
                let name = path.display().to_string().into();
                Ok(self.qcow2().check().map_err(|e| e.in_file(&name))?)
            }
        }
    }

    /// Whether compressed data goes with the format and the options, if there is to be some.
    fn check_compressed(&self, path: &Path) -> Result<()> {
        let why = match self.format {
            _ if !self.compressed => return Ok(()),
            Format::Raw => "a raw image holds no compressed data",
            Format::Qcow2 if self.settings.data_file.is_some() => {
                "an image with an external data file has no compressed data"
            }
            Format::Qcow2 if self.settings.preallocation.is_some_and(|mode| mode != Preallocation::Off) => {
                "compressed data takes no preallocated space"
            }
            Format::Qcow2 => return Ok(()),
        };
        Err(Error::Create { path: path.to_owned(), why: why.into() })
    }

    /// Whether the image may be made as `path`, by what has its name and the names in its settings: neither
    /// the image nor its data file may be what the other stands on, and a data file that is there already is
    /// kept. Writes nothing.
    ///
    /// # Errors
    /// What [`PreparedImage::new`] would say about them.
    pub fn check_files(&self, path: &Path) -> Result<()> {
        self.data_path(path).map(drop)
    }

    /// The path of the data file, after the same checks.
    fn data_path(&self, path: &Path) -> Result<Option<PathBuf>> {
        let failed = |why| Error::Create { path: path.to_owned(), why };
        let named = |name: &String| join_name(path, OsStr::new(name));
        let backing = self.settings.backing_file.as_ref().and_then(named);
        let data = match &self.settings.data_file {
            None => None,
            Some(name) => Some(
                find_name(path, OsStr::new(name))
                    .map_err(|why| failed(format!("it would have the data file \"{name}\", {why}")))?,
            ),
        };
        // The new files take the place of what has their names: that must not be what they stand on.
        let backing = backing.as_deref();
        let image = Spot::of(path);
        if backing.is_some_and(|backing| image.is(backing)) {
            return Err(failed("it cannot be its own backing file".into()));
        }
        let taken = |data: &Path| image.is(data) || backing.is_some_and(|backing| Spot::of(backing).is(data));
        if data.as_deref().is_some_and(taken) {
            return Err(failed("its data file must be a file of its own".into()));
        }
        if let Some(backing) = backing {
            let beside = || ReferencePolicy::beside(backing).unwrap_or_else(|_| ReferencePolicy::deny());
            let policy = self.policy.clone().unwrap_or_else(beside);
            let format = self.settings.backing_format;
            chain::check(path, data.as_deref(), backing, format, &policy, self.unknown_chain)?;
        }
        data.as_deref().map_or(Ok(()), |data| self.check_data_file(path, data))?;
        Ok(data)
    }

    /// Fails if `data`, to be the data file of `image`, cannot be written, or exists and is to be kept.
    fn check_data_file(&self, image: &Path, data: &Path) -> Result<()> {
        match Target::decide(data, &self.target) {
            Ok(Decision::Create) => return Ok(()),
            decided if self.replace_data_file => return decided.map(drop),
            // A device that is mounted or held is refused as such first: one option of the command line
            // overrides both.
            Ok(Decision::InPlace(InPlace::BlockDevice)) => {
                Target::prepare(data, self.target, &self.access)?.discard();
            }
            Ok(_) if self.settings.blank_data_file && is_blank_file(data)? => return Ok(()),
            Ok(_) | Err(Error::TargetUnclear { .. }) => {}
            Err(error) => return Err(error),
        }
        Err(Error::DataFileExists { path: data.to_owned(), image: image.to_owned() })
    }

    /// Opens what the data of `image` will be written into. A file that has come into being since the check
    /// is kept, too.
    fn prepare_data(&self, image: &Path, data: &Path) -> Result<Target> {
        let target = Target::prepare(data, self.target, &self.access)?;
        if self.replace_data_file || target.loses_nothing() || self.loses_zeros(&target, data)? {
            return Ok(target);
        }
        Err(Error::DataFileExists { path: data.to_owned(), image: image.to_owned() })
    }

    /// Whether the file `data`, which `target` overwrites or replaces, holds zeros and may be lost.
    fn loses_zeros(&self, target: &Target, data: &Path) -> Result<bool> {
        match target.in_place() {
            _ if !self.settings.blank_data_file => Ok(false),
            Some(InPlace::BlockDevice) => Ok(false),
            // It is open, and locked.
            Some(_) => is_blank(&*target.storage()),
            None => is_blank_file(data),
        }
    }

    /// Fails if the files cannot become as long as they must, or have no room for what is preallocated,
    /// before they lose anything. `stop` is asked between pieces.
    fn try_len(
        &self,
        path: &Path,
        file: &Target,
        data: Option<&Target>,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        let size = self.size.next_multiple_of(SECTOR);
        let space = self.settings.preallocation.unwrap_or_default();
        if self.format == Format::Raw {
            let storage = file.storage();
            let len = storage.len()?;
            if !storage.info().fixed_len {
                return file.try_len(size, space, stop);
            }
            if len == size {
                return Ok(());
            }
            return Err(Error::Create {
                path: storage.name().into(),
                why: format!("it has {len} bytes and cannot be resized; the image needs {size}"),
            });
        }
        let name = path.display().to_string().into();
        let len = self.qcow2().storage_len().map_err(|e| e.in_file(&name))?;
        match data {
            Some(data) => {
                file.try_len(len, Preallocation::Off, stop)?;
                data.try_len(size, if size == 0 { Preallocation::Off } else { space }, stop)
            }
            None => file.try_len(len, if size == 0 { Preallocation::Off } else { space }, stop),
        }
    }

    /// Writes the empty image into `file` and `data`.
    fn lay_out(
        &self,
        path: &Path,
        file: &Target,
        data: Option<&Target>,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        let inner = file.storage();
        let storage = Stoppable { inner: &*inner, stop, changed: file.changed() };
        match self.format {
            Format::Raw => write_raw(&storage, self),
            Format::Qcow2 => {
                let data = data.map(|data| (data.storage(), data.changed()));
                let data = data.as_ref().map(|(inner, changed)| Stoppable { inner: &**inner, stop, changed });
                let data = data.as_ref().map(|data| data as &dyn Storage);
                let name = path.display().to_string().into();
                Ok(self.qcow2().create(&storage, data).map_err(|e| e.in_file(&name))?)
            }
        }
    }

    /// Whether space is preallocated.
    pub(crate) fn takes_space(&self) -> bool {
        self.settings.preallocation.is_some_and(Preallocation::takes_space)
    }

    /// The length of a raw image.
    pub(crate) fn raw_len(&self) -> u64 {
        self.size.next_multiple_of(SECTOR)
    }

    /// What a qcow2 image is made with.
    pub(crate) fn qcow2(&self) -> blockmirror_qcow2::CreateOptions {
        self.settings.qcow2(self.size)
    }
}

/// What a new image will be written into, open, with its old contents.
#[derive(Debug)]
#[must_use = "dropping it discards new files"]
pub struct PreparedImage {
    path: PathBuf,
    spec: CreateSpec,
    file: Target,
    data: Option<Target>,
}

impl PreparedImage {
    /// Opens what the image `path` and its data file will be written into, after [`CreateSpec::check_files`].
    ///
    /// A data file is named relative to the image's directory, as for opening.
    ///
    /// # Errors
    /// [`Error`]; then no file has been left behind.
    pub fn new(path: &Path, spec: &CreateSpec) -> Result<Self> {
        spec.check(path)?;
        let data = spec.data_path(path)?;
        let file = Target::prepare(path, spec.target, &spec.access)?;
        let data = data.map(|data| spec.prepare_data(path, &data)).transpose()?;
        Ok(Self { path: path.to_owned(), spec: spec.clone(), file, data })
    }

    /// The format that the image will have.
    pub fn format(&self) -> Format {
        self.spec.format
    }

    /// What the image and its data file will be written into.
    pub fn targets(&self) -> impl Iterator<Item = &Target> {
        std::iter::once(&self.file).chain(&self.data)
    }

    /// Writes the image, empty. What is written in place loses its old contents.
    ///
    /// # Errors
    /// [`Error`]; then no new file has been left behind. [`Error::Incomplete`] if what is written in place
    /// has lost what it held.
    pub fn write(self) -> Result<NewImage> {
        self.write_until(&|| false)
    }

    /// The same until `stop` says so, which is asked at least every 64 MiB.
    ///
    /// # Errors
    /// As for [`write`](Self::write); an error of the kind
    /// [`Cancelled`](blockmirror_block::ErrorKind::Cancelled) if it was stopped.
    pub fn write_until(self, stop: &(dyn Fn() -> bool + Sync)) -> Result<NewImage> {
        let Self { path, spec, mut file, data } = self;
        stoppable::go_on(stop, &file.name())?;
        spec.try_len(&path, &file, data.as_ref(), stop)?;
        stoppable::go_on(stop, &file.name())?;
        if spec.format == Format::Qcow2 {
            file.mark().map_err(|error| error.incomplete_if(file.has_lost_contents()))?;
        }
        if let Err(error) = spec.lay_out(&path, &file, data.as_ref(), stop) {
            let both = [Some(&file), data.as_ref()].into_iter().flatten();
            let lost: Vec<_> = both.filter(|target| target.has_lost_contents()).collect();
            lost.iter().for_each(|target| target.cut());
            return Err(error.incomplete_if(!lost.is_empty()));
        }
        let reads_as_zeros = match spec.format {
            Format::Raw => file.can_be_emptied(),
            Format::Qcow2 => spec.settings.backing_file.is_none(),
        };
        let whole_tables = spec.settings.allocated_as_qemu;
        Ok(NewImage { path, format: spec.format, reads_as_zeros, whole_tables, file, data })
    }

    pub(crate) fn spec(&self) -> &CreateSpec {
        &self.spec
    }

    /// The only file that is written, if the image has no other.
    pub(crate) fn sole_file(&mut self) -> Option<&mut Target> {
        if self.data.is_some() { None } else { Some(&mut self.file) }
    }

    /// Takes what an interrupted run has written as the image ([`crate::resume`]).
    pub(crate) fn into_written(self) -> (CreateSpec, NewImage) {
        let Self { path, spec, file, data } = self;
        let whole_tables = spec.settings.allocated_as_qemu;
        let image = NewImage { path, format: spec.format, reads_as_zeros: false, whole_tables, file, data };
        (spec, image)
    }
}

/// A new image that does not have its name yet, or is not durable. Dropped without [`persist`](Self::persist)
/// it is gone.
#[derive(Debug)]
#[must_use = "dropping it removes the image"]
pub struct NewImage {
    path: PathBuf,
    pub(crate) format: Format,
    reads_as_zeros: bool,
    /// It takes as much space as QEMU gives it, also for what is written later.
    whole_tables: bool,
    file: Target,
    data: Option<Target>,
}

impl NewImage {
    /// Writes a new, empty image that will be called `path`. A file that has the name now must not be in use:
    /// it is replaced by [`persist`](Self::persist), or overwritten at once where it cannot be
    /// ([`Target::in_place`]); so is a block device or an export, and a raw image needs one of its own size.
    ///
    /// # Errors
    /// [`Error`]; then no file has been left behind.
    pub fn create(path: impl AsRef<Path>, spec: &CreateSpec) -> Result<Self> {
        PreparedImage::new(path.as_ref(), spec)?.write()
    }

    /// Whether the whole disk reads as zeros until something is written, whatever its extents say:
    /// preallocated clusters are data to them. A raw image on a block device shows what was there, an overlay
    /// its backing file.
    pub fn reads_as_zeros(&self) -> bool {
        self.reads_as_zeros
    }

    /// Whether a file that is written in place has lost what it held. Each has once the image was
    /// [open](Self::open).
    pub fn has_lost_contents(&self) -> bool {
        self.targets().any(Target::has_lost_contents)
    }

    pub(crate) fn targets(&self) -> impl Iterator<Item = &Target> {
        std::iter::once(&self.file).chain(&self.data)
    }

    pub(crate) fn file_mut(&mut self) -> &mut Target {
        &mut self.file
    }

    /// What the image and its data file were written into.
    pub(crate) fn into_targets(self) -> (Target, Option<Target>) {
        (self.file, self.data)
    }

    /// Opens the image for writing, with its backing file under the policy of `options`.
    ///
    /// # Errors
    /// As for [`OpenOptions::open`].
    pub fn open(&self, options: &OpenOptions) -> Result<Image> {
        let image = self.open_laid_out(options)?;
        for target in self.targets() {
            target.changed().store(true, Ordering::Relaxed);
        }
        Ok(image)
    }

    fn open_laid_out(&self, options: &OpenOptions) -> Result<Image> {
        let data = self.data.as_ref().map(Target::protocol);
        let mut node = options.given_node().clone();
        node.whole_tables = self.whole_tables;
        options.clone().format(self.format).node(node).open_on(self.file.protocol(), &self.path, data)
    }

    /// The open file of an image that does not have its name yet, for a caller that opens images by its own
    /// means. `None` for an image that is written in place: it opens once it is [persisted](Self::persist).
    pub fn new_file(&self) -> Option<Arc<FileStorage>> {
        self.file.new_file()
    }

    /// The temporary files, for callers that must clean up without running destructors.
    pub fn partial_paths(&self) -> Vec<PathBuf> {
        self.targets().filter_map(Target::partial_path).collect()
    }

    /// Makes the image durable and gives it its name.
    ///
    /// The names of an image and its data file change one right after the other, not at once: what ends in
    /// between leaves the new data file and the old image, and so does what fails if the data file has
    /// replaced another.
    ///
    /// # Errors
    /// If that fails; the image is gone then, or (if only the last step failed) has its name already.
    /// [`Error::Incomplete`] if what is written in place has lost what it held.
    pub fn persist(self) -> Result<()> {
        let lost = self.has_lost_contents();
        // The image last: it is what makes the data file reachable.
        let mut targets: Vec<_> = self.data.into_iter().chain([self.file]).collect();
        take_names(&mut targets).map_err(|error| error.incomplete_if(lost))?;
        targets.iter().try_for_each(Target::sync_name)
    }
}

/// Whether the file `path` holds nothing but zeros.
fn is_blank_file(path: &Path) -> Result<bool> {
    is_blank(&FileOptions::new().lock(LockMode::Off).open(path)?)
}

/// Makes all of `targets` durable and gives them their names; a name that was free is so again if one fails.
fn take_names(targets: &mut [Target]) -> Result<()> {
    targets.iter().try_for_each(Target::make_durable)?;
    targets.iter().try_for_each(Target::check_name)?;
    let taken = targets.iter_mut().try_for_each(Target::take_name);
    if taken.is_err() {
        targets.iter_mut().for_each(Target::take_back_name);
    }
    taken
}

/// Zero bytes that are written at a time for `preallocation=full`.
const FILL: u64 = 1 << 20;

/// The first block of a file, as QEMU allocates it.
const BLOCK: u64 = 4096;

fn write_raw(storage: &dyn Storage, spec: &CreateSpec) -> Result<()> {
    let size = spec.size.next_multiple_of(SECTOR);
    if storage.info().fixed_len {
        // What the device held must not say what format the new image is in.
        let head = vec![0; if spec.filled { 0 } else { size.min(SECTOR) as usize }];
        return Ok(storage.write_at(&head, 0)?);
    }
    // What the file held before, if it is written in place.
    storage.set_len(0)?;
    match spec.settings.preallocation.unwrap_or_default() {
        Preallocation::Falloc => {
            if size > 0 {
                storage.allocate(ByteRange::at(0, size))?;
            }
        }
        Preallocation::Full => {
            let zeros = vec![0; FILL as usize];
            for piece in ByteRange::at(0, size).pieces(FILL) {
                storage.write_at(&zeros[..piece.len() as usize], piece.start())?;
            }
        }
        _ => storage.set_len(size)?,
    }
    if spec.settings.allocated_as_qemu {
        storage.write_at(&vec![0; size.min(BLOCK) as usize], 0)?;
    }
    Ok(())
}
