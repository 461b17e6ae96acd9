//! Logs of live mirrors in files: the argument `x-log` of `blockdev-mirror`.
//!
//! A log belongs to the tap of its source from the first mirror on, also when that is over. [`LiveLogs`]
//! finds it there for another mirror with the same file. The rules of the log are `blockmirror_mirror`'s
//! ([`RegionLog`]), its format is `blockmirror_checkpoint`'s.
//!
//! What must hold: a log is gone on with only between the same two disks; a disk that was written past the
//! log, as far as this process knows, counts as different everywhere. So the log is emptied before the target
//! is written by others once the job is over, and before a job writes the source past its tap.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::UNIX_EPOCH;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{self as block, BlockDevice, ErrorKind, Storage};
use blockmirror_checkpoint::{self as checkpoint, ActivityLog, Identity, region_size};
use blockmirror_file::{FileId, FileOptions, FileStamp, FileStorage};
use blockmirror_mirror::{LogStart, RegionLog, Tap};
use blockmirror_qmp::QmpError;
use tracing::error;

use crate::Reply;
use crate::context::{Context, Place, WrittenPlaces};
use crate::graph::{Graph, NodeDevice};

/// The logs that are attached to taps of this process.
///
/// *Guards* which there are. *Order*: leaf. *Not under it*: I/O.
#[derive(Debug, Default)]
pub(crate) struct LiveLogs(Mutex<Vec<Weak<FileLog>>>);

/// A log in a file, between two disks of this process.
#[derive(Debug)]
pub(crate) struct FileLog {
    name: String,
    path: PathBuf,
    file: FileId,
    storage: Arc<FileStorage>,
    region: u64,
    /// Its file was made for this mirror, which has not begun.
    is_new: AtomicBool,
    /// *Guards* the log. *Order*: leaf. *Not under it*: other I/O than the log's.
    log: Mutex<ActivityLog>,
    tap: Weak<Tap>,
    written: Arc<WrittenPlaces>,
    /// *Guards* the nodes that the disks consist of, which are not kept open. *Order*: leaf. *Not under it*:
    /// anything.
    parts: Mutex<OpenParts>,
}

/// The nodes of both disks.
#[derive(Debug, Default)]
struct OpenParts {
    places: Vec<Place>,
    /// What is written when either disk is.
    devices: Vec<Weak<NodeDevice>>,
    /// Those of the target.
    target: Vec<Weak<NodeDevice>>,
}

impl OpenParts {
    fn of(from: &Disk, to: &Disk) -> Self {
        let all = || from.parts.iter().chain(&to.parts);
        let devices: Vec<_> = all().map(|part| Arc::downgrade(&part.device)).collect();
        devices.iter().filter_map(Weak::upgrade).for_each(|device| device.watch().log_comes(true));
        Self {
            places: all().map(|part| Place::of(part.file.as_deref(), &part.filename)).collect(),
            target: devices[from.parts.len()..].to_vec(),
            devices,
        }
    }

    fn open_devices(&self) -> impl Iterator<Item = Arc<NodeDevice>> + '_ {
        self.devices.iter().filter_map(Weak::upgrade)
    }
}

impl Drop for OpenParts {
    fn drop(&mut self) {
        self.open_devices().for_each(|device| device.watch().log_comes(false));
    }
}

/// One disk of a mirror.
struct Disk {
    parts: Vec<Part>,
    device: Arc<NodeDevice>,
}

/// A node that a disk consists of.
struct Part {
    driver: &'static str,
    filename: String,
    file: Option<Arc<FileStorage>>,
    device: Arc<NodeDevice>,
}

impl Disk {
    fn of(graph: &Graph, name: &str) -> Reply<Self> {
        let nodes = graph.all_below(name).into_iter().filter_map(|name| graph.get(name));
        let parts = nodes.map(|node| Part {
            driver: node.driver.name,
            filename: node.filename.clone(),
            file: node.file.clone(),
            device: Arc::clone(&node.device),
        });
        Ok(Self { parts: parts.collect(), device: Arc::clone(&graph.find(name)?.device) })
    }

    /// Adds what it consists of to `identity`, as `key`.
    fn identify(&self, identity: &mut Identity, key: &str, path: &str) -> Reply<()> {
        for part in &self.parts {
            if part.device.options().no_flush {
                return Err(refused(path, "a node with cache.no-flush has nothing durable"));
            }
            let place = match &part.file {
                Some(file) => match file.stamp().map_err(|error| refused(path, error))? {
                    Some(stamp) => format!("{} born {}", FileStamp::identity(stamp), birth(file)),
                    None => {
                        let device = "a block device may be another one under the same name";
                        return Err(refused(path, device));
                    }
                },
                None => part.filename.clone(),
            };
            identity.push(key, format!("{} {place}", part.driver));
        }
        Ok(())
    }
}

/// Why a log is not used.
fn refused(path: &str, why: impl std::fmt::Display) -> QmpError {
    QmpError::generic(format!("Cannot use the log '{path}': {why}"))
}

/// When the file was made, as far as the file system tells: a new file may get the inode of one that is gone.
fn birth(file: &FileStorage) -> String {
    let file = file.host_fd().and_then(|fd| fd.try_clone_to_owned().ok()).map(fs::File::from);
    let made = file.and_then(|file| file.metadata().ok()?.created().ok());
    let since = made.and_then(|made| made.duration_since(UNIX_EPOCH).ok());
    since.map_or_else(
        || "unknown".to_owned(),
        |since| format!("{}.{:09}", since.as_secs(), since.subsec_nanos()),
    )
}

impl LiveLogs {
    /// The log in the file `path` for a mirror from the node `source`, behind `tap`, to `target`: the one
    /// that is attached to the tap already, or that an earlier process has left, or a new one.
    ///
    /// # Errors
    /// It is no log, or that of another mirror, or has ended; its file is in use.
    pub(crate) fn open(
        &self,
        context: &Context,
        path: &str,
        (source, target): (&str, &str),
        tap: &Arc<Tap>,
    ) -> Reply<Arc<FileLog>> {
        let (from, to) = {
            let graph = context.graph.lock();
            (Disk::of(&graph, source)?, Disk::of(&graph, target)?)
        };
        let len = tap.len();
        let mut identity = Identity::new();
        identity.push("length", len.to_string());
        from.identify(&mut identity, "source", path)?;
        to.identify(&mut identity, "target", path)?;
        // One that has failed, or ended, leaves its file free.
        tap.log_name();
        if let Some(attached) = self.attached(path)
            && let Some(log) = attached.again(tap, &identity, (&from, &to))?
        {
            return Ok(log);
        }
        // The job is about to write there.
        to.parts.iter().for_each(|part| part.device.watch().disarm());
        let cluster = to.device.geometry().cluster_size.unwrap_or(1);
        let opened = Opened::open(Path::new(path), len, region_size(len, cluster), identity);
        let Opened { storage, log, is_new } = opened.map_err(|error| refused(path, error))?;
        let log = Arc::new(FileLog {
            name: path.to_owned(),
            path: path.into(),
            file: storage.id(),
            storage,
            region: log.region_size(),
            is_new: AtomicBool::new(is_new),
            log: Mutex::new(log),
            tap: Arc::downgrade(tap),
            written: Arc::clone(&context.written),
            parts: Mutex::new(OpenParts::of(&from, &to)),
        });
        let mut logs = self.0.lock();
        logs.retain(|log| log.strong_count() > 0);
        logs.push(Arc::downgrade(&log));
        Ok(log)
    }

    /// The log that is in use in the file `path`.
    fn attached(&self, path: &str) -> Option<Arc<FileLog>> {
        let file = FileId::of(path)?;
        self.0.lock().iter().filter_map(Weak::upgrade).find(|log| log.file == file)
    }
}

/// A log as it was found or made.
struct Opened {
    storage: Arc<FileStorage>,
    log: ActivityLog,
    is_new: bool,
}

impl Opened {
    fn open(path: &Path, len: u64, region: u64, identity: Identity) -> Result<Self, String> {
        let in_words = |error: block::Error| error.to_string();
        let is_there = match fs::symlink_metadata(path) {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error.to_string()),
        };
        let options = FileOptions::new().writable(true).create_new(!is_there);
        let storage = Arc::new(options.open(path).map_err(in_words)?);
        // What it says of the target is believed: another user must not have made it.
        if !storage.is_own().map_err(in_words)? || storage.is_block_device() {
            return Err("it is a file of another user, has several names, or is a device".to_owned());
        }
        let found = match is_there && storage.len().map_err(in_words)? > 0 {
            false => None,
            true => match ActivityLog::open(Arc::clone(&storage) as _) {
                Err(checkpoint::Error::NotBegun { .. }) => None,
                found => Some(found.map_err(|error| error.to_string())?),
            },
        };
        if let Some(log) = found {
            Self::check(&log, &identity)?;
            return Ok(Self { storage, log, is_new: false });
        }
        // All is marked in it.
        let made = ActivityLog::create(Arc::clone(&storage) as _, len, region, identity);
        // A later process must find it by its name.
        let made = made.map_err(|error| error.to_string());
        let made = made.and_then(|log| storage.sync_name(path).map(|()| log).map_err(in_words));
        match made {
            // A file that was there may be the log of an earlier mirror that was emptied.
            Ok(log) => Ok(Self { storage, log, is_new: !is_there }),
            Err(error) => {
                if !is_there {
                    // It was made above.
                    let _ = fs::remove_file(path);
                }
                Err(error)
            }
        }
    }

    /// Refuses a log that another mirror has left, or this one at its end.
    fn check(log: &ActivityLog, identity: &Identity) -> Result<(), String> {
        if let Some(key) = log.identity().first_difference(identity, &[]) {
            return Err(format!("it is the log of another mirror ({key})"));
        }
        if log.is_ended() {
            return Err(
                "its mirror has moved the users of the source to the target, which is newer than the \
                 source now; remove the log to mirror anew"
                    .to_owned(),
            );
        }
        Ok(())
    }
}

impl FileLog {
    /// The same log for another mirror behind `tap`; none if it was given up, as the target was written by
    /// others.
    fn again(
        self: Arc<Self>,
        tap: &Arc<Tap>,
        identity: &Identity,
        (from, to): (&Disk, &Disk),
    ) -> Reply<Option<Arc<Self>>> {
        if !Weak::ptr_eq(&self.tap, &Arc::downgrade(tap)) {
            return Err(refused(&self.name, "another mirror has it"));
        }
        Opened::check(&self.log.lock(), identity).map_err(|why| refused(&self.name, why))?;
        let is_known = |part: &Part| {
            let device = &part.device;
            device.watch().armed_for().as_ref() == Some(&self.name) || !device.was_written()
        };
        if !to.parts.iter().all(is_known) {
            tap.give_up_log();
            return Ok(None);
        }
        to.parts.iter().for_each(|part| part.device.watch().disarm());
        let parts = OpenParts::of(from, to);
        let _before = std::mem::replace(&mut *self.parts.lock(), parts);
        Ok(Some(self))
    }

    /// A job that had it is over: before others write to the target, the log is given up.
    pub(crate) fn job_ended(&self) {
        let target: Vec<_> = self.parts.lock().target.iter().filter_map(Weak::upgrade).collect();
        for device in target {
            let (tap, path, file) = (Weak::clone(&self.tap), self.path.clone(), self.file);
            let give_up = move || match tap.upgrade() {
                Some(tap) => tap.give_up_log(),
                None => empty(&path, file),
            };
            device.watch().arm(&self.name, Box::new(give_up));
        }
    }

    /// Whether either disk was written without the log since it was opened.
    fn was_written_past(&self) -> bool {
        let parts = self.parts.lock();
        parts.open_devices().any(|device| device.was_written())
            || parts.places.iter().any(|place| self.written.is_unknown_to(&self.name, place))
    }

    /// Removes the file, durably.
    fn remove(&self) -> block::Result<()> {
        fs::remove_file(&self.path)
            .map_err(|error| block::Error::io("remove log", error).in_file(&*self.name))?;
        self.storage.sync_name(&self.path)
    }
}

/// Empties the log in `path`, which is in no use, if it is still this `file`.
fn empty(path: &Path, file: FileId) {
    if FileId::of(path) != Some(file) {
        return;
    }
    let emptied = fs::File::options().write(true).open(path).and_then(|log| {
        log.set_len(0)?;
        log.sync_all()
    });
    if let Err(error) = emptied {
        let log = path.display();
        error!(%log, %error, "the log of a live job is outdated; it must be removed");
    }
}

fn in_words(error: checkpoint::Error) -> block::Error {
    match error {
        checkpoint::Error::Storage(error) => error,
        error => block::Error::new(ErrorKind::Io, "write log").because(error.to_string()),
    }
}

impl RegionLog for FileLog {
    fn name(&self) -> &str {
        &self.name
    }

    fn region_size(&self) -> u64 {
        self.region
    }

    fn attach(&self) -> block::Result<LogStart> {
        let written = self.was_written_past();
        let mut log = self.log.lock();
        if self.is_new.swap(false, Ordering::AcqRel) {
            return Ok(LogStart::new_log(log.disk_len()));
        }
        if written {
            let count = log.regions().len();
            let marked = log.update(&[Range { start: 0, end: count }], &[]);
            drop(log);
            // A later process must not believe it.
            marked.map_err(in_words).inspect_err(|_| drop(self.invalidate()))?;
            log = self.log.lock();
        }
        Ok(LogStart::resumed(log.marked().collect()))
    }

    fn update(&self, mark: &[Range<u64>], clear: &[Range<u64>]) -> block::Result<()> {
        self.log.lock().update(mark, clear).map_err(in_words)
    }

    fn end(&self) -> block::Result<()> {
        self.log.lock().end().map_err(in_words)
    }

    fn invalidate(&self) -> block::Result<()> {
        let emptied = self.log.lock().invalidate();
        emptied.or_else(|_| self.remove())
    }
}
