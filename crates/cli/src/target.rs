//! The target of a copy: an existing image, or a new one and what it is to be made like.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::{BlockDevice, Visit};
use blockmirror_image::size::human_size;
use blockmirror_image::{
    CacheMode, CreateSettings, CreateSpec, Decision, Format, Image, InPlace, LockMode, NbdOptions, NewImage,
    OpenOptions, Part, Preallocation, PreparedImage, ReferencePolicy, Target as TargetFile, directory_of,
    is_uri, join_name,
};
use blockmirror_mirror::{MirrorOptions, Plan, PlanTarget, SyncMode, plan_until};

use crate::access;
use crate::args::{CopyArgs, TargetArgs};
use crate::console::Console;
use crate::create::{check_backing, check_spec, set_once};
use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::source::Source;

/// What a copy is to be written into.
pub(crate) struct TargetSpec {
    path: PathBuf,
    kind: Kind,
    policy: ReferencePolicy,
    nbd: NbdOptions,
    lock: LockMode,
    cache: CacheMode,
    existing: TargetArgs,
    require_flush: bool,
}

enum Kind {
    /// An image that is there, or in a part of what is there. `None`: its format is found out.
    Existing(Option<Format>, Part),
    New {
        spec: Box<CreateSpec>,
        /// The name and the format of the backing file that it will have.
        backing: Option<(String, Option<Format>)>,
    },
}

/// A target, open for writing.
pub(crate) struct Target {
    image: Image,
    /// What has to be given its name in the end.
    new: Option<NewImage>,
}

impl TargetSpec {
    /// Puts together what the command line says about the target of a copy of `source`; makes nothing.
    ///
    /// Names in an image are judged by the directory of that image: the source's is nothing to the target.
    pub(crate) fn new(
        args: &CopyArgs,
        source: &Source,
        format: Option<Format>,
        settings: CreateSettings,
        sync: SyncMode,
    ) -> Outcome<Self> {
        let (path, nbd) = (&args.target, access::nbd(&args.access));
        let lock = access::lock(args.access.lock);
        if let Some(image) = source.user_of(path) {
            return Err(is_source(path, image));
        }
        let (kind, policy) = if args.no_create {
            (Kind::Existing(format, args.target_part), allow_typed(access::policy(path, &args.access)?, args))
        } else {
            // Without a format given it is the source's, which has one then.
            let format = format.or(source.format()).unwrap_or(Format::Raw);
            let backing_is_typed = args.backing.is_some() || settings.backing_file.is_some();
            let settings = settle(args, source, format, settings, sync)?;
            let data = settings.data_file.as_ref().and_then(|name| join_name(path, name.as_ref()));
            if let Some((image, data)) = data.and_then(|data| Some((source.user_of(&data)?, data))) {
                return Err(is_source(&data, image));
            }
            // A name that is no plain path fails when the target is opened.
            let backing = settings.backing_file.clone().map(|name| (name, settings.backing_format));
            let named = backing.as_ref().and_then(|(name, _)| join_name(path, name.as_ref()));
            let policy = match named {
                Some(named) if backing_is_typed => {
                    let mut policy = allow_typed(access::policy(&named, &args.access)?, args);
                    policy.allow_file(&named);
                    policy
                }
                // It comes from the source's chain.
                Some(_) => source.policy().clone(),
                None => access::policy(path, &args.access)?,
            };
            let len = source.device().len();
            let space = match settings.preallocation.is_some_and(Preallocation::takes_space) {
                true => Some(len),
                // No more than the disk has, whatever the files below it hold.
                false => source.allocated_bytes().map(|bytes| bytes.min(len)),
            };
            let spec = CreateSpec::new(format, len, settings)
                .target(args.existing.options(space).from_server(source.may_be_served()))
                // An export may be the source by another name: then nothing but its own bytes may be written
                // to it.
                .filled(args.names.iter().any(|source| is_uri(&source.path)) || is_uri(path))
                .replace_data_file(args.existing.force)
                .policy(policy.clone())
                .lock(lock)
                .cache(args.target_cache)
                .nbd(nbd);
            check_spec(&spec, path)?;
            (Kind::New { spec: Box::new(spec), backing }, policy)
        };
        Ok(Self {
            path: path.clone(),
            kind,
            policy,
            nbd,
            lock,
            cache: args.target_cache,
            existing: args.existing,
            require_flush: args.require_flush,
        })
    }

    /// What a job would do; opens an existing target for reading and makes nothing.
    pub(crate) fn plan(
        &self,
        source: &Source,
        options: &MirrorOptions,
        interrupt: &Interrupt,
    ) -> Outcome<Plan> {
        let plan = |source: &Source, target| {
            plan_until(&**source.device(), target, options, &mut |_| match interrupt.requested() {
                true => Visit::Break(()),
                false => Visit::Continue(()),
            })
        };
        let planned = match &self.kind {
            Kind::Existing(format, part) => {
                let image = self.open_existing(source, *part, *format, false)?;
                plan(source, PlanTarget::Existing(&**image.device()))
            }
            Kind::New { spec, backing } => {
                spec.check_files(&self.path)?;
                // What will be replaced must be a file that can be written and is not in use, or what is
                // written in place.
                let decided = TargetFile::decide(&self.path, spec.target_options())?;
                let in_place = matches!(decided, Decision::InPlace(InPlace::BlockDevice));
                let replaced = (decided != Decision::Create)
                    .then(|| self.open_options().format(Format::Raw).writable(!in_place).open(&self.path))
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
                plan(source, target)
            }
        };
        planned.map_err(|error| {
            let failure = Failure::failed(format_args!("copy: {error}"));
            if interrupt.requested() { failure.exit(interrupt.exit()) } else { failure }
        })
    }

    /// Opens or makes the target.
    pub(crate) fn open(
        &self,
        console: &mut Console<'_>,
        source: &Source,
        interrupt: &Interrupt,
    ) -> Outcome<Target> {
        match &self.kind {
            Kind::Existing(format, part) => {
                let image = self.open_existing(source, *part, *format, true)?;
                self.check_flush(image.device().geometry().can_flush)?;
                console.keep_out_of(image.own_files());
                for note in image.notes() {
                    console.note(note);
                }
                let (len, used) = (image.device().len(), source.device().len());
                if len > used {
                    let (target, rest) = (self.path.display(), len - used);
                    console.note(format_args!(
                        "{target}: it is {rest} bytes longer than the source; they stay as they are"
                    ));
                }
                Ok(Target { image, new: None })
            }
            Kind::New { spec, backing } => {
                // Whatever may be refused comes before the old contents of a target that is written in place
                // go.
                let backing =
                    backing.as_ref().map(|(name, format)| self.open_backing(name, *format)).transpose()?;
                let prepared = PreparedImage::new(&self.path, spec)?;
                self.check_flush(prepared.targets().all(TargetFile::can_flush))?;
                let new = write(console, prepared, self.existing.clean, interrupt)?;
                let image = new.open(&self.open_options())?;
                // Its files stay locked until here.
                drop(backing);
                Ok(Target { image, new: Some(new) })
            }
        }
    }

    fn check_flush(&self, can_flush: bool) -> Outcome<()> {
        if can_flush || !self.require_flush {
            return Ok(());
        }
        Err(Failure::failed(format_args!(
            "copy: {}: its server has no command to flush, which --require-flush asks for",
            self.path.display()
        )))
    }

    /// Opens the target that is there. Where the source is opened with `-U` no lock keeps the target off its
    /// files.
    fn open_existing(
        &self,
        source: &Source,
        part: Part,
        format: Option<Format>,
        writable: bool,
    ) -> Outcome<Image> {
        let image = self.open_options().format(format).part(part).writable(writable).open(&self.path)?;
        match source.written_by(&image) {
            Some(part) => Err(is_source(&self.path, part)),
            None => Ok(image),
        }
    }

    /// Opens for reading what the new target will stand on.
    fn open_backing(&self, name: &str, format: Option<Format>) -> Outcome<Image> {
        Ok(self.open_options().claim(false).format(format).open_backing_of(&self.path, name.as_ref())?)
    }

    fn open_options(&self) -> OpenOptions {
        OpenOptions::new()
            .policy(self.policy.clone())
            .lock(self.lock)
            .cache(self.cache)
            .nbd(self.nbd)
            .claim(!self.existing.force)
    }
}

impl Target {
    pub(crate) fn image(&self) -> &Image {
        &self.image
    }

    pub(crate) fn device(&self) -> &Arc<dyn BlockDevice> {
        self.image.device()
    }

    /// Whether all of it reads as zeros, because it is new and empty.
    pub(crate) fn reads_as_zeros(&self) -> bool {
        self.new.as_ref().is_some_and(NewImage::reads_as_zeros)
    }

    /// Whether giving up leaves nothing of it behind.
    pub(crate) fn vanishes(&self) -> bool {
        self.new.as_ref().is_some_and(|new| !new.partial_paths().is_empty())
    }

    /// Closes the image, and gives a new one its name.
    pub(crate) fn finish(self) -> Outcome<()> {
        let Self { image, new } = self;
        image.device().flush()?;
        drop(image);
        if let Some(new) = new {
            new.persist()?;
        }
        Ok(())
    }
}

fn is_source(path: &Path, source: &Image) -> Failure {
    Failure::failed(format_args!(
        "copy: {}: it is part of the source {}",
        path.display(),
        source.path().display()
    ))
}

/// Settings of a new target: what the command line says, and the source's backing file where that is to shine
/// through.
fn settle(
    args: &CopyArgs,
    source: &Source,
    format: Format,
    mut settings: CreateSettings,
    sync: SyncMode,
) -> Outcome<CreateSettings> {
    let len = source.device().len();
    if settings.size.is_some_and(|size| size != len) {
        return Err(Failure::usage(format_args!(
            "-o size: the target has the size of the source, {len} bytes"
        )));
    }
    set_once(&mut settings.backing_file, args.backing.clone(), "backing_file", "-B")?;
    set_once(&mut settings.backing_format, args.backing_format, "backing_fmt", "-F")?;
    if let (SyncMode::Top, None, Some(backing)) = (sync, &settings.backing_file, source.backing()) {
        let together = same_directory(source.path(), &args.target);
        if !together && join_name(source.path(), backing.name.as_os_str()).is_none() {
            return Err(Failure::failed(format_args!(
                "copy: {}: the source's backing file \"{}\" has no name that leads there from here; name another with -B",
                args.target.display(),
                backing.name.display()
            )));
        }
        let name = if together { backing.name.clone() } else { absolute(&backing.path)? };
        let Some(name) = name.to_str() else {
            return Err(Failure::failed(format_args!(
                "copy: {}: the name of the source's backing file is not UTF-8; name another with -B",
                args.target.display()
            )));
        };
        settings.backing_file = Some(name.to_owned());
        settings.backing_format = Some(backing.format);
    }
    check_backing(&settings, &args.target, format)?;
    Ok(settings)
}

fn absolute(path: &Path) -> Outcome<PathBuf> {
    std::path::absolute(path).map_err(|e| Failure::failed(format_args!("look up: {}: {e}", path.display())))
}

fn same_directory(a: &Path, b: &Path) -> bool {
    let real = |path| fs::canonicalize(directory_of(path)).ok();
    real(a).is_some_and(|a| Some(a) == real(b))
}

/// Also allows what the user has named on the command line of a copy.
pub(crate) fn allow_typed(mut policy: ReferencePolicy, args: &CopyArgs) -> ReferencePolicy {
    for source in &args.names {
        policy.allow_file(&source.path);
    }
    policy.allow_file(&args.target);
    if let Some(backing) = args.backing.as_ref().and_then(|name| join_name(&args.target, name.as_ref())) {
        policy.allow_file(&backing);
    }
    policy
}

/// Writes an empty image for a command, which says how its files are written where that is not as usual, and
/// what earlier runs left. What is printed later goes into none of them; a signal ends it.
pub(crate) fn write(
    console: &mut Console<'_>,
    prepared: PreparedImage<'_>,
    clean: bool,
    interrupt: &Interrupt,
) -> Outcome<NewImage> {
    console.keep_out_of(prepared.targets().filter_map(TargetFile::file));
    interrupt.remove_at_end(prepared.targets().filter_map(TargetFile::partial_path));
    note_targets(console, &prepared, clean);
    prepared.write_until(&|| interrupt.requested()).map_err(|error| {
        let failure = Failure::from(error);
        if interrupt.requested() { failure.exit(interrupt.exit()) } else { failure }
    })
}

/// Says how the files of a new image are written where that is not as usual, and what earlier runs left.
fn note_targets(console: &mut Console<'_>, prepared: &PreparedImage<'_>, clean: bool) {
    for (index, target) in prepared.targets().enumerate() {
        let name = target.name();
        if let Some(why) = target.in_place() {
            let why = match why {
                InPlace::Asked => String::new(),
                why => format!(" ({why})"),
            };
            // The image is the first; its data file has no header.
            let meanwhile = match prepared.format() {
                Format::Qcow2 if index == 0 => "until it is complete it opens nowhere",
                _ => "a failure leaves it unusable",
            };
            console.note(format_args!("{name}: written in place{why}: {meanwhile}"));
        }
        for left in target.leftovers() {
            let (path, size) = (left.path().display(), human_size(left.allocated()));
            let what = match left.failure() {
                Some(why) => format!("cannot be removed ({why})"),
                None if clean => "has been removed".to_owned(),
                None => "stays; --clean removes it".to_owned(),
            };
            console.note(format_args!("{name}: {path} of an interrupted run ({size}) {what}"));
        }
    }
}
