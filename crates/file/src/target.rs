//! What a target file is, and how it is written: the decision, made before anything is copied.
//!
//! Used by `image::Target`. A new file is written under a temporary name. An existing one is replaced the
//! same way where that loses nothing; where it would lose something the file is written in place; where
//! either might surprise its owner the caller must choose. A block device is always written in place. The
//! rules are in [`decide`] alone.

use std::fmt;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{Error, ErrorKind, Result};
use rustix::fs::{Access, AtFlags, IFlags, Mode, OFlags};
use rustix::io::retry_on_intr;
use rustix::process::geteuid;

use crate::exclusive::{self, Turn};
use crate::handle::PathHandle;
use crate::holders::{self, FileHolder, LoopUse};
use crate::id::{FileId, kind_of};
use crate::leftover::{self, Leftover};
use crate::location::{Found, Location};
use crate::mounts;
use crate::new_file::{NewFile, Replaced};
use crate::open::FileOptions;
use crate::storage::FileStorage;

/// How an existing file is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Replacement {
    /// Replaced where that loses nothing, in place where it would, refused where either might surprise.
    #[default]
    Auto,
    /// Replaced at once when the new file is whole, or not at all.
    Atomic,
    /// Emptied and written.
    InPlace,
}

/// How a target is prepared. The default: [`Replacement::Auto`], block devices claimed, old temporary files
/// left alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct TargetOptions {
    pub(crate) replacement: Replacement,
    pub(crate) space: Option<u64>,
    pub(crate) force: bool,
    pub(crate) clean: bool,
    pub(crate) from_server: bool,
    pub(crate) or_in_place: bool,
    pub(crate) no_clobber: bool,
    pub(crate) resume: Option<u32>,
    pub(crate) discard: Option<u32>,
    pub(crate) file: FileOptions,
}

impl TargetOptions {
    /// The default.
    pub fn new() -> Self {
        Self::default()
    }

    /// What [`replacement`](Self::replacement) has set.
    pub fn wanted(&self) -> Replacement {
        self.replacement
    }

    /// How an existing file is to be written.
    #[must_use]
    pub fn replacement(mut self, replacement: Replacement) -> Self {
        self.replacement = replacement;
        self
    }

    /// About how many bytes of storage the new contents take; `None` if that is not known.
    #[must_use]
    pub fn space(mut self, bytes: Option<u64>) -> Self {
        self.space = bytes;
        self
    }

    /// Writes to a block device although it is mounted or held.
    #[must_use]
    pub fn force(mut self, force: bool) -> Self {
        self.force = force;
        self
    }

    /// What [`force`](Self::force) has set.
    pub fn forced(&self) -> bool {
        self.force
    }

    /// Removes temporary files that killed runs left for the same target.
    #[must_use]
    pub fn clean(mut self, clean: bool) -> Self {
        self.clean = clean;
        self
    }

    /// The new contents come from a server, which may have this very file open: nothing is written into a
    /// file that a process has open.
    #[must_use]
    pub fn from_server(mut self, from_server: bool) -> Self {
        self.from_server = from_server;
        self
    }

    /// With [`Replacement::Auto`]: where the caller would have to choose, the file is written in place. Not
    /// if it may be what the contents come from ([`Surprise::MaybeSource`]), or is under a device in use.
    #[must_use]
    pub fn or_in_place(mut self, in_place: bool) -> Self {
        self.or_in_place = in_place;
        self
    }

    /// Refuses a file that exists, and one that another run of the same user with this option is making, with
    /// [`ErrorKind::AlreadyExists`]: of several at once one makes the file. What takes the name later is not
    /// replaced either.
    #[must_use]
    pub fn no_clobber(mut self, no_clobber: bool) -> Self {
        self.no_clobber = no_clobber;
        self
    }

    /// What [`no_clobber`](Self::no_clobber) has set.
    pub fn keeps_existing(&self) -> bool {
        self.no_clobber
    }

    /// Goes on with the temporary file that an interrupted run has left under this number
    /// ([`Leftover::number`]), as it is. A target that is written in place is refused then.
    #[must_use]
    pub fn resume(mut self, number: Option<u32>) -> Self {
        self.resume = number;
        self
    }

    /// Removes the temporary file that an interrupted run has left under this number, and what belongs to it.
    #[must_use]
    pub fn discard(mut self, number: Option<u32>) -> Self {
        self.discard = number;
        self
    }

    /// Lock and cache mode of the file; the rest of `options` does not count.
    #[must_use]
    pub fn file(mut self, options: FileOptions) -> Self {
        self.file = options;
        self
    }
}

/// Why a target is written in place.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InPlace {
    /// The caller asked for it.
    Asked,
    /// It is a block device.
    BlockDevice,
    /// It was named by a descriptor of a process, or has no name any more.
    Descriptor,
    /// Something is mounted on its name.
    MountPoint,
    /// New names cannot be made beside it.
    Directory,
    /// It is another user's file, in a directory whose files only their owners may replace.
    Sticky,
    /// A holder would keep the old file.
    Held(FileHolder),
    /// What cannot be carried over to a new file.
    Attributes(String),
}

impl fmt::Display for InPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("as asked"),
            Self::BlockDevice => f.write_str("it is a block device"),
            Self::Descriptor => f.write_str("it is an open descriptor"),
            Self::MountPoint => f.write_str("it is a mount point"),
            Self::Directory => f.write_str("its directory is not writable"),
            Self::Sticky => f.write_str("it is another user's file in a sticky directory"),
            Self::Held(holder) => holder.fmt(f),
            Self::Attributes(what) => f.write_str(what),
        }
    }
}

/// Why the caller must choose between [`Replacement::Atomic`] and [`Replacement::InPlace`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Surprise {
    /// Replacing it parts it from its other names; writing it changes what they show.
    HardLinks {
        /// How many names it has.
        links: u64,
    },
    /// The file and its successor do not fit at once.
    NoRoom {
        /// About how many bytes the new file takes.
        needed: u64,
        /// How many are free.
        free: u64,
    },
    /// A loop device in use stands on it: it would keep the old file, or have its contents changed under it.
    HeldDevice(FileHolder),
    /// Another user has made it, in a sticky directory in which others may make files: it may be a trap for
    /// the new contents.
    Foreign {
        /// The user's number.
        owner: u32,
    },
    /// The new contents come from a server, which may be what has it open: written in place it would be
    /// emptied first.
    MaybeSource(FileHolder),
}

impl fmt::Display for Surprise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HardLinks { links } => write!(f, "it has {links} hard links"),
            Self::NoRoom { needed, free } => {
                write!(f, "the old and the new file do not fit at once: {needed} bytes needed, {free} free")
            }
            Self::HeldDevice(holder) => holder.fmt(f),
            Self::Foreign { owner } => {
                write!(
                    f,
                    "it is a file of another user (number {owner}) in a sticky directory that others may write"
                )
            }
            Self::MaybeSource(holder) => {
                write!(f, "{holder}, and may be the server that the source comes from")
            }
        }
    }
}

/// How a target will be written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Decision {
    /// It does not exist; it gets its name when it is whole.
    Create,
    /// It is replaced at once when the new file is whole.
    Replace,
    /// It is written in place.
    InPlace(InPlace),
    /// The caller must choose.
    Refuse(Surprise),
}

/// A target that has been looked at and not touched.
#[derive(Debug)]
pub struct TargetPlan<'a> {
    given: &'a Path,
    name: Arc<str>,
    location: Location,
    found: Found,
    decision: Decision,
    leftovers: Vec<Leftover>,
    options: TargetOptions,
}

/// A target that is open for writing.
#[derive(Debug)]
pub enum TargetFile {
    /// It gets its name by [`NewFile::persist`].
    New(NewFile),
    /// It has its name.
    InPlace(Arc<FileStorage>, InPlace),
}

impl<'a> TargetPlan<'a> {
    /// Decides how `path` will be written.
    ///
    /// # Errors
    /// Its directory cannot be searched; it is neither a regular file nor a block device; it cannot be
    /// replaced although [`Replacement::Atomic`] asks for it.
    pub fn new(path: &'a Path, options: TargetOptions) -> Result<Self> {
        let name: Arc<str> = path.display().to_string().into();
        Self::find(path, &name, options).map_err(|e| e.or_in_file(&name))
    }

    fn find(given: &'a Path, name: &Arc<str>, options: TargetOptions) -> Result<Self> {
        if options.no_clobber {
            exclusive::check_name(given)?;
        }
        Self::of_found(given, name, options, Location::find(given)?)
    }

    /// The plan for what `given` was found to lead to, which is what is decided about: a name that is looked
    /// at twice may lead to another file.
    fn of_found(
        given: &'a Path,
        name: &Arc<str>,
        options: TargetOptions,
        (location, found): (Location, Found),
    ) -> Result<Self> {
        if options.no_clobber && !matches!(found, Found::Nothing) {
            return Err(exclusive::exists());
        }
        let decision = match decide(&location, &found, &options).map_err(|e| Error::io("create", e))?? {
            Decision::Refuse(why)
                if options.or_in_place
                    && !matches!(why, Surprise::MaybeSource(_) | Surprise::HeldDevice(_)) =>
            {
                in_place_instead(&found, &options)
            }
            decided => decided,
        };
        let leftovers = match found {
            Found::Descriptor(_) => Vec::new(),
            _ => leftover::find(&location),
        };
        Ok(Self { given, name: Arc::clone(name), location, found, decision, leftovers, options })
    }

    /// What killed runs left of earlier files of its name.
    pub fn leftovers(&self) -> &[Leftover] {
        &self.leftovers
    }

    /// How it will be written. Only what a file carries is found out later, when there is a new one to carry
    /// it to.
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// Opens the target for writing, once what killed runs left is removed, if that is wanted; also gives
    /// what they left. A target that is written in place still has its contents; a block device is claimed,
    /// unless forced.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the caller must choose; [`ErrorKind::Locked`] if it is in use;
    /// [`ErrorKind::PermissionDenied`] if it may not be written; and whatever creating a file gives.
    pub fn open(self) -> Result<(TargetFile, Vec<Leftover>)> {
        let name = Arc::clone(&self.name);
        self.start().map_err(|e| e.or_in_file(&name))
    }

    fn start(self) -> Result<(TargetFile, Vec<Leftover>)> {
        let Self { given, name, location, found, decision, mut leftovers, options } = self;
        leftovers.retain(|leftover| Some(leftover.number()) != options.resume);
        for leftover in &mut leftovers {
            if options.clean || Some(leftover.number()) == options.discard {
                leftover.remove(&location);
            }
        }
        if options.resume.is_some() && matches!(decision, Decision::InPlace(_)) {
            return Err(Error::new(ErrorKind::InvalidInput, "create")
                .because("it would be written in place, and the interrupted copy was not"));
        }
        let in_place = |handle: &PathHandle, why| {
            // Loop devices on a regular file have been decided about.
            let claim = why == InPlace::BlockDevice && !options.force;
            let file = options.file.writable(true).claim(claim).open_found(handle, given, &name)?;
            Ok(TargetFile::InPlace(Arc::new(file), why))
        };
        let target = match (decision, found) {
            (Decision::Refuse(why), _) => {
                Err(Error::new(ErrorKind::InvalidInput, "create").because(why.to_string()))
            }
            (Decision::InPlace(why), Found::Descriptor(handle)) => in_place(&handle, why),
            (Decision::InPlace(why), Found::File(handle)) => {
                let file = in_place(&handle, why)?;
                location.check_leads_to(handle.metadata(), "create")?;
                Ok(file)
            }
            (Decision::Replace, Found::File(handle)) => {
                let sole = options.replacement == Replacement::Auto;
                let replaced = Replaced::hold(&location, &handle, given, &options.file)?.sole(sole);
                let new = NewFile::begin(
                    location,
                    Arc::clone(&name),
                    Some(replaced),
                    &options.file,
                    options.resume,
                )?;
                match new.take_after_replaced() {
                    Ok(()) => Ok(TargetFile::New(new)),
                    Err(what) if options.replacement == Replacement::Atomic => Err(not_atomic(&what)),
                    Err(what) if options.resume.is_some() => {
                        Err(Error::new(ErrorKind::Unsupported, "create").because(what))
                    }
                    Err(what) => {
                        // Its lock goes with it, and would be in the way.
                        drop(new);
                        in_place(&handle, InPlace::Attributes(what))
                    }
                }
            }
            // Nothing has the name: what takes it meanwhile is not replaced.
            (Decision::Create | Decision::InPlace(_) | Decision::Replace, _) => {
                let turn = options.no_clobber.then(|| Turn::take(&location, given, options.resume));
                let _turn = turn.transpose()?;
                let new = NewFile::begin(location, Arc::clone(&name), None, &options.file, options.resume)?;
                Ok(TargetFile::New(new))
            }
        };
        Ok((target?, leftovers))
    }
}

/// The decision about a file that is written in place because nothing better is clear, unless the process
/// that has it open may be the server that the contents come from.
fn in_place_instead(found: &Found, options: &TargetOptions) -> Decision {
    if options.from_server
        && let Found::File(handle) | Found::Descriptor(handle) = found
        && let Some(holder) = handle.id().and_then(holders::process)
    {
        return Decision::Refuse(Surprise::MaybeSource(holder));
    }
    Decision::InPlace(InPlace::Asked)
}

fn not_atomic(why: &dyn fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidInput, "create").because(format!("it cannot be replaced atomically: {why}"))
}

/// The table of rules, in order; LIMITS has the same one.
fn decide(location: &Location, found: &Found, options: &TargetOptions) -> io::Result<Result<Decision>> {
    let (Found::File(handle) | Found::Descriptor(handle)) = found else { return Ok(Ok(Decision::Create)) };
    let meta = handle.metadata();
    let id = match kind_of(meta) {
        Ok(kind) => FileId::from_metadata(meta, kind),
        Err(e) => return Ok(Err(e)),
    };
    if mounts::is_swap(id) {
        let why = FileHolder::Swap.to_string();
        return Ok(Err(Error::new(ErrorKind::Locked, "create").because(why)));
    }
    let is_auto = options.replacement == Replacement::Auto;
    // A device that has to be written in place is claimed for that.
    let loop_device = if is_auto && meta.is_file() { holders::loop_device(id) } else { None };
    let loop_device = match loop_device {
        Some(holder @ FileHolder::Loop { usage: LoopUse::Used(_) | LoopUse::Unknown, .. }) => {
            return Ok(Ok(Decision::Refuse(Surprise::HeldDevice(holder))));
        }
        other => other,
    };
    if is_auto && matches!(found, Found::File(_)) && is_foreign(location, meta)? {
        return Ok(Ok(Decision::Refuse(Surprise::Foreign { owner: meta.uid() })));
    }
    let decided = match (only_in_place(location, found, meta)?, options.replacement) {
        (Some(why), Replacement::Atomic) => return Ok(Err(not_atomic(&why))),
        (Some(why), _) => Decision::InPlace(why),
        (None, Replacement::InPlace) => Decision::InPlace(InPlace::Asked),
        (None, Replacement::Atomic) => Decision::Replace,
        (None, Replacement::Auto) => by_circumstances(location, id, meta, loop_device, options)?,
    };
    if options.from_server
        && is_auto
        && matches!(decided, Decision::InPlace(_))
        && let Some(holder) = holders::process(id)
    {
        return Ok(Ok(Decision::Refuse(Surprise::MaybeSource(holder))));
    }
    Ok(Ok(decided))
}

/// Why a rename over the file is not possible, or would not give what was named its contents.
fn only_in_place(location: &Location, found: &Found, meta: &Metadata) -> io::Result<Option<InPlace>> {
    if meta.file_type().is_block_device() {
        return Ok(Some(InPlace::BlockDevice));
    }
    if matches!(found, Found::Descriptor(_)) || meta.nlink() == 0 {
        return Ok(Some(InPlace::Descriptor));
    }
    if location.is_mount_point() {
        return Ok(Some(InPlace::MountPoint));
    }
    if !may_rename_in(location) {
        return Ok(Some(InPlace::Directory));
    }
    let directory = location.stat()?;
    let ours = |uid| uid == geteuid().as_raw();
    let sticky = Mode::from_raw_mode(directory.st_mode).contains(Mode::SVTX);
    if sticky && !ours(meta.uid()) && !ours(directory.st_uid) && !holders::may_act_as_owner() {
        return Ok(Some(InPlace::Sticky));
    }
    Ok(None)
}

/// Whether the file was put by another user where others may make files: the kernel's `fs.protected_regular`
/// does not open it for a new file, whatever the privilege.
fn is_foreign(location: &Location, meta: &Metadata) -> io::Result<bool> {
    let directory = location.stat()?;
    let mode = Mode::from_raw_mode(directory.st_mode);
    let is_shared = mode.contains(Mode::SVTX) && mode.intersects(Mode::WGRP | Mode::WOTH);
    let is_known = meta.uid() == geteuid().as_raw() || meta.uid() == directory.st_uid;
    Ok(meta.is_file() && is_shared && !is_known && !location.is_mount_point())
}

fn may_rename_in(location: &Location) -> bool {
    let directory = location.directory();
    let access = Access::WRITE_OK | Access::EXEC_OK;
    if rustix::fs::accessat(directory, ".", access, AtFlags::EACCESS).is_err() {
        return false;
    }
    // In one that only takes new names nothing is replaced. One that cannot be read does not say.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = retry_on_intr(|| rustix::fs::openat(directory, ".", flags, Mode::empty()));
    !opened.and_then(rustix::fs::ioctl_getflags).is_ok_and(|flags| flags.contains(IFlags::APPEND))
}

fn by_circumstances(
    location: &Location,
    id: FileId,
    meta: &Metadata,
    loop_device: Option<FileHolder>,
    options: &TargetOptions,
) -> io::Result<Decision> {
    if meta.nlink() > 1 {
        return Ok(Decision::Refuse(Surprise::HardLinks { links: meta.nlink() }));
    }
    if let Some(holder) = loop_device.or_else(|| holders::besides_loops(id)) {
        return Ok(Decision::InPlace(InPlace::Held(holder)));
    }
    if let Some(needed) = options.space {
        let space = rustix::fs::fstatvfs(location.directory())?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        // Where not even the old file's space would do, writing in place would lose it for nothing.
        if needed > free && needed <= free.saturating_add(meta.blocks().saturating_mul(512)) {
            return Ok(Decision::Refuse(Surprise::NoRoom { needed, free }));
        }
    }
    Ok(Decision::Replace)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that took the name after a first look at it was replaced.
    #[test]
    fn a_file_that_appears_before_the_decision_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let options = TargetOptions::new().no_clobber(true);
        exclusive::check_name(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let planned = TargetPlan::of_found(&path, &"disk".into(), options, Location::find(&path).unwrap());
        assert_eq!(planned.unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
