//! Logs of live mirrors in files: the argument `x-log` of `blockdev-mirror`.
//!
//! A log is for a process that dies, or is made to quit, while its job runs; the next one goes on with it.
//! A job that ends otherwise has ended its log. The rules of the log are `blockmirror_mirror`'s
//! ([`RegionLog`]), its format is `blockmirror_checkpoint`'s.
//!
//! What must hold: a log is gone on with only between the same two disks, and only if it says that its job
//! has not ended. A disk that this process has written before the log is attached counts as different
//! everywhere.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::UNIX_EPOCH;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{self as block, BlockDevice, ErrorKind, Storage};
use blockmirror_checkpoint::{self as checkpoint, ActivityLog, Identity, region_size};
use blockmirror_file::{FileId, FileOptions, FileStamp, FileStorage};
use blockmirror_mirror::{LogStart, RegionLog, Tap};
use blockmirror_qmp::QmpError;

use crate::Reply;
use crate::context::{Context, Place, WrittenPlaces};
use crate::graph::{Graph, NodeDevice};

/// Why a log that has ended is refused.
const ENDED: &str = "it has ended with its job, which may have moved the users of the source to the target; if \
                     the source is what is to be mirrored, remove the log to mirror anew";
/// Why a log that says nothing is refused.
const GIVEN_UP: &str = "it was given up, or never begun; if the source is what is to be mirrored, remove the log \
                        to mirror anew";

/// A log in a file, between two disks of this process.
#[derive(Debug)]
pub(crate) struct FileLog {
    name: String,
    path: PathBuf,
    file: FileId,
    storage: Arc<FileStorage>,
    region: u64,
    /// Its file was made for this mirror.
    is_new: bool,
    /// *Guards* the log. *Order*: leaf. *Not under it*: other I/O than the log's.
    log: Mutex<ActivityLog>,
    written: Arc<WrittenPlaces>,
    parts: OpenParts,
}

/// The nodes of both disks, which are not kept open.
#[derive(Debug, Default)]
struct OpenParts {
    places: Vec<Place>,
    /// What is written when either disk is.
    devices: Vec<Weak<NodeDevice>>,
}

impl OpenParts {
    fn of(from: &Disk, to: &Disk) -> Self {
        let all = || from.parts.iter().chain(&to.parts);
        let devices: Vec<_> = all().map(|part| Arc::downgrade(&part.device)).collect();
        devices.iter().filter_map(Weak::upgrade).for_each(|device| device.watch().log_comes(true));
        Self { places: all().map(|part| Place::of(part.file.as_deref(), &part.filename)).collect(), devices }
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
        if is_there {
            if storage.len().map_err(in_words)? == 0 {
                return Err(GIVEN_UP.to_owned());
            }
            match ActivityLog::open(Arc::clone(&storage) as _) {
                // Its creation was interrupted: no mirror has had it.
                Err(checkpoint::Error::NotBegun { .. }) => {}
                found => {
                    let log = found.map_err(|error| error.to_string())?;
                    Self::check(&log, &identity)?;
                    return Ok(Self { storage, log, is_new: false });
                }
            }
        }
        // All is marked in it.
        let made = ActivityLog::create(Arc::clone(&storage) as _, len, region, identity);
        // A later process must find it by its name.
        let made = made.map_err(|error| error.to_string());
        let made = made.and_then(|log| storage.sync_name(path).map(|()| log).map_err(in_words));
        let log = made.inspect_err(|_| drop(fs::remove_file(path)))?;
        Ok(Self { storage, log, is_new: true })
    }

    /// Refuses a log that another mirror has left, or this one at its end.
    fn check(log: &ActivityLog, identity: &Identity) -> Result<(), String> {
        if let Some(key) = log.identity().first_difference(identity, &[]) {
            return Err(format!("it is the log of another mirror ({key})"));
        }
        if log.is_ended() {
            return Err(ENDED.to_owned());
        }
        Ok(())
    }
}

impl FileLog {
    /// The log in the file `path` for a mirror from the node `source`, behind `tap`, to `target`: the one
    /// that an earlier process has left, or a new one.
    ///
    /// # Errors
    /// It is no log, or that of another mirror, or has ended; its file is in use.
    pub(crate) fn open(
        context: &Context,
        path: &str,
        (source, target): (&str, &str),
        tap: &Tap,
    ) -> Reply<Self> {
        let (from, to) = {
            let graph = context.graph.lock();
            (Disk::of(&graph, source)?, Disk::of(&graph, target)?)
        };
        let len = tap.len();
        let mut identity = Identity::new();
        identity.push("length", len.to_string());
        from.identify(&mut identity, "source", path)?;
        to.identify(&mut identity, "target", path)?;
        // One that has failed leaves its file free.
        tap.log_name();
        let cluster = to.device.geometry().cluster_size.unwrap_or(1);
        let opened = Opened::open(Path::new(path), len, region_size(len, cluster), identity);
        let Opened { storage, log, is_new } = opened.map_err(|error| refused(path, error))?;
        Ok(Self {
            name: path.to_owned(),
            path: path.into(),
            file: storage.id(),
            storage,
            region: log.region_size(),
            is_new,
            log: Mutex::new(log),
            written: Arc::clone(&context.written),
            parts: OpenParts::of(&from, &to),
        })
    }

    /// Whether either disk was written without the log since it was opened.
    fn was_written_past(&self) -> bool {
        self.parts.open_devices().any(|device| device.was_written())
            || self.parts.places.iter().any(|place| self.written.has(place))
    }

    /// Removes the file, durably, if it still has its name.
    fn remove(&self) -> block::Result<()> {
        if FileId::of(&self.path) != Some(self.file) {
            let error = block::Error::new(ErrorKind::NotFound, "remove log").in_file(&*self.name);
            return Err(error.because("another file has its name"));
        }
        fs::remove_file(&self.path)
            .map_err(|error| block::Error::io("remove log", error).in_file(&*self.name))?;
        self.storage.sync_name(&self.path)
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
        if self.is_new {
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
