//! The second step of a conversion: everything that can be refused by names, settings and options.
//!
//! [`CheckedConvert`] is also what a dry run asks. What must hold: nothing is made or written here.

use std::fs;
use std::path::{Path, PathBuf};

use blockmirror_block::Visit;
use blockmirror_image::{
    CreateSettings, CreateSpec, Decision, Format, Image, InPlace, OpenOptions, Preallocation, Target,
    directory_of, is_uri, join_name,
};
use blockmirror_mirror::{MirrorOptions, Plan, PlanTarget, Reflink, SyncMode, plan_until};

use super::bitmaps::Selected;
use super::checkpoint::{ONLY_THE_TOP, Place, PlannedCheckpoint};
use super::room::PlannedSpace;
use super::source::in_units;
use super::verify::{Verification, Verify};
use super::{Convert, ConvertError, ConvertSource, identity};

/// A [`Convert`] whose source is open and whose options are valid.
#[derive(Debug)]
pub struct CheckedConvert {
    pub(super) source: ConvertSource,
    pub(super) target: PathBuf,
    pub(super) kind: TargetKind,
    /// How the target, and the backing file of a new one, are opened.
    pub(super) open: OpenOptions,
    pub(super) mirror: MirrorOptions,
    pub(super) bitmaps: Selected,
    pub(super) require_flush: bool,
    /// The target's data is stored compressed.
    pub(super) compress: bool,
    pub(super) checkpoint: Option<PlannedCheckpoint>,
    pub(super) verify: Option<Verification>,
    /// Of a new target whose space can be estimated.
    pub(super) space: Option<PlannedSpace>,
}

/// What is written into.
#[derive(Debug)]
pub(super) enum TargetKind {
    /// An image that exists.
    Existing,
    /// An image that is to be made.
    New {
        spec: Box<CreateSpec>,
        /// The name and the format of the backing file that it will have.
        backing: Option<(String, Option<Format>)>,
    },
}

impl Convert {
    /// Checks the options against each other and against `source`, and decides what is copied.
    ///
    /// # Errors
    /// [`ConvertError`]; nothing has been written.
    pub fn check(&self, source: ConvertSource) -> Result<CheckedConvert, ConvertError> {
        self.check_several()?;
        let sync = match self.sync_mode() {
            // Without a backing file the top image decides everything.
            SyncMode::Top if source.backing().is_none() => SyncMode::Full,
            sync => sync,
        };
        let mirror = self.mirror.clone().sync(sync).longer_target(self.existing);
        let mirror = mirror.target_is_zero(self.target_is_zero).whole_clusters(self.compress);
        let mirror = self.with_reflink(mirror).only(self.only.clone());
        mirror.check().map_err(ConvertError::Start)?;
        if self.only.is_some() && !self.existing {
            return Err(ConvertError::OnlyInto { target: self.target.clone() });
        }
        if let Some(image) = source.user_of(&self.target) {
            return Err(is_source(&self.target, image));
        }
        self.check_verify(&mirror)?;
        let bitmaps = self.select_bitmaps(&source)?;
        let open = self.target_access.clone().claim(!self.target_file.forced());
        let checkpoint = self.plan_checkpoint(&source, sync, &bitmaps)?;
        let open = open.past_cache(self.verify.is_some());
        let (kind, open, space) = if self.existing {
            let policy = self.allowed().policy_for(&self.target)?;
            let open = open.policy(policy).format(self.target_format).node(self.target_node.clone());
            (TargetKind::Existing, open, None)
        } else {
            self.check_new(&source, open, sync, &bitmaps)?
        };
        let verify = self.verify.map(|mode| Verification {
            mode,
            layers: mirror.counted_layers(),
            only: self.only.clone(),
            open: open.clone(),
        });
        Ok(CheckedConvert {
            source,
            target: self.target.clone(),
            kind,
            open,
            mirror,
            bitmaps,
            require_flush: self.require_flush,
            compress: self.compress,
            checkpoint,
            verify,
            space,
        })
    }

    /// The checkpoint that is asked for, if this conversion can have one.
    fn plan_checkpoint(
        &self,
        source: &ConvertSource,
        sync: SyncMode,
        bitmaps: &Selected,
    ) -> Result<Option<PlannedCheckpoint>, ConvertError> {
        let Some(options) = &self.checkpoint else { return Ok(None) };
        let beside = options.place == Place::Beside;
        let why = if options.is_file(&self.target) {
            "it would be the target itself"
        } else if self.existing {
            "it is written into an image that exists"
        } else if self.settings.data_file.is_some() {
            "the target has a data file"
        } else if !bitmaps.copied.is_empty() {
            "bitmaps are copied"
        } else if self.verify == Some(Verify::Readback) {
            "writes of an interrupted run cannot be read back"
        } else if let Some(format) = self.target_format.or(source.format())
            && let Some((identity, source_shows_writes)) =
                identity::of(self, source, format, &self.settle(source, format, sync)?, sync)
        {
            if !source_shows_writes && sync == SyncMode::Top && !beside {
                return Err(self.no_checkpoint(ONLY_THE_TOP));
            }
            // What is no file has a checkpoint only where one is named.
            let planned = !beside || (source_shows_writes && !is_uri(&self.target));
            let (options, lock) = (options.clone(), self.target_access.locked());
            let verifies = self.verify.is_some();
            let checkpoint = PlannedCheckpoint { options, identity, lock, source_shows_writes, verifies };
            return Ok(planned.then_some(checkpoint));
        } else {
            "nothing says which storage the source is"
        };
        if beside { Ok(None) } else { Err(self.no_checkpoint(why)) }
    }

    fn no_checkpoint(&self, why: &'static str) -> ConvertError {
        ConvertError::NoCheckpoint { target: self.target.clone(), why }
    }

    /// A hash is one of the whole disk. What is shared passes by what hashes or reads back.
    fn check_verify(&self, mirror: &MirrorOptions) -> Result<(), ConvertError> {
        if let Some(mode @ (Verify::Hash | Verify::Readback)) = self.verify
            && self.reflink == Reflink::Always
        {
            return Err(ConvertError::NotSharedVerified { target: self.target.clone(), mode });
        }
        let why = match self.verify {
            Some(Verify::Hash) if mirror.counted_layers().is_some() => "only the top of the source is copied",
            Some(Verify::Hash) if self.only.is_some() => "a part of the source is copied",
            Some(Verify::Hash) if mirror.may_leave_gaps() => "ranges that fail are left out",
            _ => return Ok(()),
        };
        Err(ConvertError::NoWholeHash { target: self.target.clone(), why })
    }

    /// Several sources have no backing file in common with a target.
    pub(super) fn check_several(&self) -> Result<(), ConvertError> {
        let with_backing = self.settings.backing_file.is_some();
        if self.sources.len() > 1 && (with_backing || self.sync == Some(SyncMode::Top)) {
            return Err(ConvertError::SeveralSources { target: self.target.clone(), with_backing });
        }
        if self.sources.len() > 1 && self.snapshot.is_some() {
            return Err(ConvertError::SnapshotOfSeveral { target: self.target.clone() });
        }
        Ok(())
    }

    /// The sync mode that is asked for: without one it follows from the target's backing file.
    fn sync_mode(&self) -> SyncMode {
        let has_backing = self.settings.backing_file.is_some();
        self.sync.unwrap_or(if has_backing { SyncMode::Top } else { SyncMode::Full })
    }

    /// The new target. Names in an image are judged by the directory of that image: the source's is nothing
    /// to the target.
    fn check_new(
        &self,
        source: &ConvertSource,
        open: OpenOptions,
        sync: SyncMode,
        bitmaps: &Selected,
    ) -> Result<(TargetKind, OpenOptions, Option<PlannedSpace>), ConvertError> {
        let target = &self.target;
        let no_format = || ConvertError::NoFormat { target: target.clone() };
        let format = self.target_format.or(source.format()).ok_or_else(no_format)?;
        let settings = self.settle(source, format, sync)?;
        let data = settings.data_file.as_ref().and_then(|name| join_name(target, name.as_ref()));
        if let Some((image, data)) = data.and_then(|data| Some((source.user_of(&data)?, data))) {
            return Err(is_source(&data, image));
        }
        // A name that is no plain path fails when the target is opened.
        let backing = settings.backing_file.clone().map(|name| (name, settings.backing_format));
        let named = backing.as_ref().and_then(|(name, _)| join_name(target, name.as_ref()));
        let policy = match named {
            Some(named) if self.settings.backing_file.is_some() => {
                self.allowed().file(&named).policy_for(&named)?
            }
            // It comes from the source's chain.
            Some(_) => source.policy().clone(),
            None => self.allowed().policy_for(target)?,
        };
        let len = source.device().len();
        let space = match settings.preallocation.is_some_and(Preallocation::takes_space) {
            true => Some(len),
            // No more than the disk has, whatever the files below it hold.
            false => source.allocated_bytes().map(|bytes| bytes.min(len)),
        };
        let planned = self.plan_space(format, &settings, len);
        let spec = CreateSpec::new(format, len, settings)
            .target(self.target_file.space(space).from_server(source.may_be_served()))
            // An export may be the source by another name: then nothing but its own bytes may be written to
            // it.
            .compressed(self.compress)
            .filled(self.sources.iter().any(|source| is_uri(&source.path)) || is_uri(target))
            .replace_data_file(self.target_file.forced())
            .policy(policy.clone())
            .access(&open);
        spec.check(target).map_err(ConvertError::Settings)?;
        bitmaps.check_new(target, &spec)?;
        Ok((TargetKind::New { spec: Box::new(spec), backing }, open.policy(policy), planned))
    }

    /// Settings of a new target: those given, and the source's backing file where that is to be shared.
    fn settle(
        &self,
        source: &ConvertSource,
        format: Format,
        sync: SyncMode,
    ) -> Result<CreateSettings, ConvertError> {
        let mut settings = self.settings.clone();
        let len = source.device().len();
        if settings.size.is_some_and(|size| size != len) {
            return Err(ConvertError::Size { target: self.target.clone(), len });
        }
        if sync == SyncMode::Top && settings.backing_file.is_none() && source.backing().is_some() {
            self.share_backing(source, &mut settings)?;
        }
        match settings.check_backing(format) {
            Ok(()) => Ok(settings),
            Err(why) => Err(ConvertError::Backing { target: self.target.clone(), why }),
        }
    }

    /// Names the source's backing file in `settings`.
    fn share_backing(
        &self,
        source: &ConvertSource,
        settings: &mut CreateSettings,
    ) -> Result<(), ConvertError> {
        let Some(backing) = source.backing() else { return Ok(()) };
        let failed = |why| ConvertError::BackingName { target: self.target.clone(), why };
        if !source.images().all(Image::can_share_backing) {
            let why = "no header says of the source's backing file what is typed of it".to_owned();
            return Err(failed(why));
        }
        let together = same_directory(source.path(), &self.target);
        if !together && join_name(source.path(), backing.name.as_os_str()).is_none() {
            let name = backing.name.display();
            let why = format!("the source's backing file \"{name}\" has no name that leads there from here");
            return Err(failed(why));
        }
        let name = if together { backing.name.clone() } else { absolute(&backing.path)? };
        let Some(name) = name.to_str() else {
            return Err(failed("the name of the source's backing file is not UTF-8".to_owned()));
        };
        settings.backing_file = Some(name.to_owned());
        settings.backing_format = Some(backing.format);
        Ok(())
    }
}

impl CheckedConvert {
    /// The names of the source's bitmaps that are not copied, because they are inconsistent.
    pub fn skipped_bitmaps(&self) -> &[String] {
        &self.bitmaps.skipped
    }

    /// A dry run: what would be copied. An existing target is opened for reading. `stop` is asked between
    /// bounded queries of the source's extents.
    ///
    /// # Errors
    /// What the steps that follow would refuse, as far as it can be seen without writing.
    pub fn plan(&self, stop: &dyn Fn() -> bool) -> Result<Plan, ConvertError> {
        let plan = |target: PlanTarget<'_>| {
            let clusters = match target {
                PlanTarget::Existing(device) => device.geometry().cluster_size,
                PlanTarget::New { cluster_size, .. } => cluster_size,
                _ => None,
            };
            let source = in_units(self.source.device(), clusters.filter(|_| self.compress));
            plan_until(&*source, target, &self.mirror, &mut |_| match stop() {
                true => Visit::Break(()),
                false => Visit::Continue(()),
            })
        };
        let planned = match &self.kind {
            TargetKind::Existing => {
                let image = self.open_existing(false)?;
                let planned = plan(PlanTarget::Existing(&**image.device()));
                return planned.map_err(|error| ConvertError::refused(error, image.format()));
            }
            TargetKind::New { spec, backing } => {
                spec.check_files(&self.target)?;
                // What will be replaced must be a file that can be written and is not in use, or what is
                // written in place.
                let decided = Target::decide(&self.target, spec.target_options())?;
                let in_place = matches!(decided, Decision::InPlace(InPlace::BlockDevice));
                let replaced = (decided != Decision::Create)
                    .then(|| self.open.clone().format(Format::Raw).writable(!in_place).open(&self.target))
                    .transpose()?;
                let backing =
                    backing.as_ref().map(|(name, format)| self.open_backing(name, *format)).transpose()?;
                let target = match &replaced {
                    Some(device) if spec.cluster_size().is_none() && in_place => {
                        PlanTarget::Existing(&**device.device())
                    }
                    _ => PlanTarget::New {
                        cluster_size: spec.cluster_size(),
                        backing: backing.as_ref().map(|image| &**image.device()),
                    },
                };
                plan(target)
            }
        };
        planned.map_err(ConvertError::Start)
    }

    /// Opens a target that exists. Where the source is not locked no lock keeps the target off its files.
    pub(super) fn open_existing(&self, writable: bool) -> Result<Image, ConvertError> {
        let options = self.open.clone().writable(writable).compress(self.compress);
        let image = options.open(&self.target)?;
        match self.source.written_by(&image) {
            Some(part) => Err(is_source(&self.target, part)),
            None => Ok(image),
        }
    }

    /// Opens the backing file of a new target for reading.
    pub(super) fn open_backing(&self, name: &str, format: Option<Format>) -> Result<Image, ConvertError> {
        let options = self.open.clone().claim(false).format(format);
        Ok(options.open_backing_of(&self.target, name.as_ref())?)
    }
}

fn is_source(target: &Path, source: &Image) -> ConvertError {
    ConvertError::IsSource { target: target.to_owned(), source_path: source.path().to_owned() }
}

fn absolute(path: &Path) -> Result<PathBuf, ConvertError> {
    std::path::absolute(path).map_err(|cause| ConvertError::LookUp { path: path.to_owned(), cause })
}

fn same_directory(a: &Path, b: &Path) -> bool {
    let real = |path| fs::canonicalize(directory_of(path)).ok();
    real(a).is_some_and(|a| Some(a) == real(b))
}
