//! What a new image, or its data file, is written into.
//!
//! Four kinds: a new file, an existing file, a block device, an NBD export. Made by [`crate::PreparedImage`],
//! and by callers that write the bytes themselves.
//! How an existing file is treated is decided in `blockmirror_file`; here the decision meets formats and
//! servers: a qcow2 image that is written in place is marked until it is durable.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockmirror_block::{ByteRange, ErrorKind, Storage};
use blockmirror_file::{
    Decision, FileId, FileOptions, FileStorage, InPlace, Leftover, NewFile, Replacement, TargetFile,
    TargetOptions, TargetPlan,
};
use blockmirror_qcow2::{Preallocation, Unfinished};
use blockmirror_raw::SECTOR;

use crate::error::{Error, Result};
use crate::open::OpenOptions;
use crate::protocol_id::is_uri;
use crate::protocol_layer::ProtocolLayer;
use crate::stoppable::{self, PIECE};

/// A place for a new image, open for writing. It holds what it held before until the image is written, and of
/// a [replaced](Self::in_place) file until [`persist`](Self::persist).
///
/// [`NewImage`](crate::NewImage) writes an image into one; a caller that has the bytes already does without:
///
/// ```
/// use blockmirror_image::{OpenOptions, Target, TargetOptions};
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("disk.raw");
/// let target = Target::prepare(&path, TargetOptions::new(), &OpenOptions::new())?;
/// target.storage().write_at(&[1; 512], 0)?;
/// assert!(!path.exists());
/// target.persist()?;
/// assert_eq!(std::fs::metadata(&path)?.len(), 512);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[must_use = "dropping it discards a new file"]
pub struct Target {
    kind: Kind,
    protocol: ProtocolLayer,
    leftovers: Vec<Leftover>,
    /// The mark of a qcow2 image that is written in place.
    unfinished: Option<Arc<Unfinished>>,
    /// Whether the image has been written into it.
    changed: AtomicBool,
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
                _ if options.keeps_existing() => Err(Error::Create {
                    path: path.to_owned(),
                    why: "an export exists, it cannot be made".into(),
                }),
                Replacement::Atomic => Err(Error::Create {
                    path: path.to_owned(),
                    why: "an export cannot be replaced atomically".into(),
                }),
                _ => Ok(Decision::InPlace(InPlace::BlockDevice)),
            };
        }
        clear(path, &TargetPlan::new(path, *options)?)
    }

    /// Opens `path` for writing, in the way that [`decide`](Self::decide) says. Locks, cache mode and NBD
    /// options are those of `access`; nothing else of it counts.
    ///
    /// # Errors
    /// As for [`decide`](Self::decide); and if it is in use, or cannot be opened or created.
    pub fn prepare(path: &Path, options: TargetOptions, access: &OpenOptions) -> Result<Self> {
        let access = access.access(true, false);
        if is_uri(path) {
            Self::decide(path, &options)?;
            return Ok(Self::new(Kind::Export, ProtocolLayer::open(path, access)?, Vec::new()));
        }
        let files = FileOptions::new().lock(access.lock).direct(access.direct).no_sync(access.no_sync);
        let plan = TargetPlan::new(path, options.file(files))?;
        clear(path, &plan)?;
        let (file, leftovers) = plan.open()?;
        let (kind, file) = match file {
            TargetFile::New(new) => {
                let file = Arc::clone(new.storage());
                (Kind::New(new), file)
            }
            TargetFile::InPlace(file, why) => (Kind::InPlace(why), file),
        };
        if access.past_cache {
            file.read_past_cache()?;
        }
        Ok(Self::new(kind, ProtocolLayer::File(file), leftovers))
    }

    fn new(kind: Kind, protocol: ProtocolLayer, leftovers: Vec<Leftover>) -> Self {
        Self { kind, protocol, leftovers, unfinished: None, changed: AtomicBool::new(false) }
    }

    /// Why it is written in place, unless it is a new file. A failure then leaves neither the old contents
    /// nor the new ones.
    pub fn in_place(&self) -> Option<&InPlace> {
        match &self.kind {
            Kind::InPlace(why) => Some(why),
            Kind::New(_) | Kind::Export => None,
        }
    }

    /// The file, unless it is an export.
    pub fn file(&self) -> Option<FileId> {
        self.protocol.id().file()
    }

    /// What killed runs left of earlier files of its name.
    pub fn leftovers(&self) -> &[Leftover] {
        &self.leftovers
    }

    /// What killed runs have left of earlier files of the name `path`; nothing where that is not known.
    pub fn leftovers_of(path: &Path) -> Vec<Leftover> {
        if is_uri(path) {
            return Vec::new();
        }
        TargetPlan::new(path, TargetOptions::new())
            .map_or_else(|_| Vec::new(), |plan| plan.leftovers().to_vec())
    }

    /// A new file, under its temporary name.
    pub(crate) fn new_mut(&mut self) -> Option<&mut NewFile> {
        match &mut self.kind {
            Kind::New(new) => Some(new),
            Kind::InPlace(_) | Kind::Export => None,
        }
    }

    /// Whether it has a way to make writes durable. A server may have none.
    pub fn can_flush(&self) -> bool {
        self.storage().info().can_flush
    }

    /// Whether giving it up leaves what there was.
    fn is_new(&self) -> bool {
        matches!(self.kind, Kind::New(_))
    }

    /// Whether the image has been written into it. The caller that writes sets it before the first change.
    pub(crate) fn changed(&self) -> &AtomicBool {
        &self.changed
    }

    /// Whether what it held is lost, or part of that: it is written in place, and has been written into.
    pub(crate) fn has_lost_contents(&self) -> bool {
        !self.is_new() && self.changed.load(Ordering::Relaxed)
    }

    /// Whether it takes the place of no other file, nor of one that comes into being meanwhile.
    pub(crate) fn loses_nothing(&self) -> bool {
        matches!(&self.kind, Kind::New(new) if !new.replaces())
    }

    /// Fails if it cannot hold `len` bytes, or has no room for those of them that are preallocated as `space`
    /// says. What it held stays, and so does its length. `stop` is asked between pieces.
    pub(crate) fn try_len(
        &self,
        len: u64,
        space: Preallocation,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        if self.is_new() {
            return Ok(());
        }
        let storage = self.protocol.plain_storage();
        let old = storage.len()?;
        let ProtocolLayer::File(file) = &self.protocol else { return fits(&*storage, len, space) };
        if storage.info().fixed_len {
            return fits(&*storage, len, space);
        }
        if old < len {
            match file.check_len(len) {
                // Then only a change of the length says whether it is possible.
                Err(error) if error.kind() == ErrorKind::Unsupported => {
                    let tried = file.set_len(len);
                    file.set_len(old)?;
                    tried?;
                }
                checked => checked?,
            }
        }
        if !space.takes_space() || len == 0 {
            return Ok(());
        }
        // Of a file that is long enough a part that it has: whether space can be reserved at all.
        let range = if old < len { ByteRange::new(old, len) } else { ByteRange::at(len - 1, 1) };
        let reserved = range.pieces(PIECE).try_for_each(|piece| {
            stoppable::go_on(stop, storage.name())?;
            file.reserve(piece)
        });
        if old < len {
            // Gives back what lies past the end.
            file.set_len(old)?;
        }
        match reserved {
            // Written space needs no reservation.
            Err(error) if space == Preallocation::Full && error.kind() == ErrorKind::Unsupported => Ok(()),
            // The old contents make room for the new ones.
            Err(error) if old >= len && error.kind() == ErrorKind::NoSpace => Ok(()),
            reserved => Ok(reserved?),
        }
    }

    /// Gives the space back of an image that could not be written into a file in place. The mark stays.
    pub(crate) fn cut(&self) {
        let storage = self.protocol.plain_storage();
        if !self.is_new() && !storage.info().fixed_len {
            // A failure changes nothing for the caller, who has an error already.
            let _ = storage.set_len(if self.unfinished.is_some() { SECTOR } else { 0 });
        }
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
        if !self.is_new() {
            let storage = self.protocol.storage();
            let begun = Unfinished::begin(Arc::clone(&storage));
            self.changed.store(begun.is_ok() || Unfinished::marks(&*storage), Ordering::Relaxed);
            let unfinished = Arc::new(begun?);
            self.protocol =
                ProtocolLayer::Unfinished(Box::new(self.protocol.clone()), Arc::clone(&unfinished));
            self.unfinished = Some(unfinished);
        }
        Ok(())
    }

    /// Goes on with a qcow2 image that an interrupted run has written in place, which must have its mark. It
    /// begins with `head` when it is finished. Without effect on a new file.
    pub(crate) fn mark_again(&mut self, head: [u8; 8]) -> Result<()> {
        if self.is_new() {
            return Ok(());
        }
        let storage = self.storage();
        if !Unfinished::marks(&*storage) {
            let why = "it does not hold what the interrupted run has written".to_owned();
            return Err(Error::Create { path: storage.name().into(), why });
        }
        self.mark()?;
        // Seen by the image alone, while the mark stands.
        Ok(self.storage().write_at(&head, 0)?)
    }

    /// The host file that it is, whatever is between.
    pub(crate) fn host_file(&self) -> Option<&Arc<FileStorage>> {
        self.protocol.host_file()
    }

    pub(crate) fn protocol(&self) -> &ProtocolLayer {
        &self.protocol
    }

    /// What its contents are written to.
    pub fn storage(&self) -> Arc<dyn Storage> {
        self.protocol.storage()
    }

    /// Its temporary name, if it has one.
    pub fn partial_path(&self) -> Option<PathBuf> {
        match &self.kind {
            Kind::New(new) => Some(new.partial_path().to_owned()),
            Kind::InPlace(_) | Kind::Export => None,
        }
    }

    /// The open file, if it is a new one.
    pub(crate) fn new_file(&self) -> Option<Arc<FileStorage>> {
        match &self.kind {
            Kind::New(new) => Some(Arc::clone(new.storage())),
            Kind::InPlace(_) | Kind::Export => None,
        }
    }

    /// Makes what was written to it durable. A new file then only lacks its name, an unfinished image keeps
    /// its mark.
    pub(crate) fn make_durable(&self) -> Result<()> {
        match &self.kind {
            Kind::New(new) => new.make_durable()?,
            Kind::InPlace(_) | Kind::Export => self.protocol.plain_storage().flush()?,
        }
        Ok(())
    }

    /// Fails if another file has taken the name of the one to replace.
    pub(crate) fn check_name(&self) -> Result<()> {
        match &self.kind {
            Kind::New(new) => Ok(new.check_name()?),
            Kind::InPlace(_) | Kind::Export => Ok(()),
        }
    }

    /// A new file gets its name; the mark of an unfinished image goes.
    pub(crate) fn take_name(&mut self) -> Result<()> {
        match (&mut self.kind, &self.unfinished) {
            (Kind::New(new), _) => new.take_name()?,
            (_, Some(unfinished)) => unfinished.finish()?,
            (Kind::InPlace(_) | Kind::Export, None) => {}
        }
        Ok(())
    }

    /// Takes the name back that a new file has taken, unless it has replaced another.
    pub(crate) fn take_back_name(&mut self) {
        if let Kind::New(new) = &mut self.kind {
            new.take_back_name();
        }
    }

    /// Makes the name of a new file durable.
    pub(crate) fn sync_name(&self) -> Result<()> {
        match &self.kind {
            Kind::New(new) => Ok(new.sync_name()?),
            Kind::InPlace(_) | Kind::Export => Ok(()),
        }
    }

    /// Makes it durable; a new file gets its name, and the mark of an unfinished image goes.
    ///
    /// # Errors
    /// If that fails. A new file is gone then, or (if only the last step failed) has its name already.
    pub fn persist(mut self) -> Result<()> {
        self.make_durable()?;
        self.take_name()?;
        self.sync_name()
    }

    /// Leaves it as it is: a new file under its temporary name, which is returned.
    pub(crate) fn leave(self) -> Option<PathBuf> {
        match self.kind {
            Kind::New(new) => Some(new.leave()),
            Kind::InPlace(_) | Kind::Export => None,
        }
    }

    /// Gives it up: a new file is removed, anything else stays as it is by now.
    pub fn discard(self) {
        drop(self);
    }
}

/// Fails if `storage`, a block device or an export, has less than `len` bytes, or is to reserve space: those
/// do not.
fn fits(storage: &dyn Storage, len: u64, space: Preallocation) -> Result<()> {
    let old = storage.len()?;
    if old < len {
        return Err(Error::Create {
            path: storage.name().into(),
            why: format!("it has {old} bytes and cannot grow; the image needs {len}"),
        });
    }
    if space == Preallocation::Falloc {
        storage.allocate(ByteRange::new(0, len))?;
    }
    Ok(())
}

fn clear(path: &Path, plan: &TargetPlan<'_>) -> Result<Decision> {
    match plan.decision() {
        Decision::Refuse(why) => Err(Error::TargetUnclear { path: path.to_owned(), why: why.clone() }),
        decided => Ok(decided.clone()),
    }
}
