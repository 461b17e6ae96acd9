//! What has a file open: loop devices by sysfs, processes by `/proc`, mounts of the file itself.
//!
//! Asked by [`crate::target`] before a file is replaced: such a holder would keep the old one. What may not
//! be read (another user's processes, without privilege) is not seen; but a loop device counts as in use
//! unless it is certain that it is not.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::below::{self, Sysfs};
use crate::id::FileId;
use crate::mounts;

/// What has a file open.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileHolder {
    /// The system swaps to it.
    Swap,
    /// A loop device stands on it.
    Loop {
        /// The device.
        device: PathBuf,
        /// Whether that is used in turn.
        usage: LoopUse,
    },
    /// A process has it open, possibly this one.
    Process {
        /// Its id.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// It is mounted by itself under another name, possibly in a container.
    Mount {
        /// Where, as its own mount namespace sees it.
        on: PathBuf,
    },
}

/// Whether a loop device is used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LoopUse {
    /// Neither mounted, nor held by another device, nor open in a process.
    Free,
    /// This process may not find that out.
    Unknown,
    /// It is used, as the text says.
    Used(String),
}

impl FileHolder {
    /// What has `file` open; the first that is found, and one that forbids writing before others. For a
    /// process that gives up seeing it: what is opened later by others is not known.
    pub fn of(file: FileId) -> Option<Self> {
        match loop_device(file) {
            _ if mounts::is_swap(file) => Some(Self::Swap),
            Some(device) => Some(device),
            None => besides_loops(file),
        }
    }

    /// Whether the file must not be written, in whatever way: it is swap space, or the loop device on it is
    /// used, or may be.
    pub fn forbids_writing(&self) -> bool {
        match self {
            Self::Swap => true,
            Self::Loop { usage, .. } => *usage != LoopUse::Free,
            Self::Process { .. } | Self::Mount { .. } => false,
        }
    }
}

impl fmt::Display for FileHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Swap => f.write_str("the system swaps to it"),
            Self::Loop { device, usage } => {
                write!(f, "the loop device {}", device.display())?;
                match usage {
                    LoopUse::Free => {}
                    LoopUse::Unknown => f.write_str(", which may be in use,")?,
                    LoopUse::Used(how) => write!(f, ", which is in use ({how}),")?,
                }
                f.write_str(" stands on it")
            }
            Self::Process { pid, name } => write!(f, "{name} (pid {pid}) has it open"),
            Self::Mount { on } => write!(f, "it is mounted on {}", on.display()),
        }
    }
}

/// How often is looked at what is open. A child that has just been forked holds all descriptors of its parent
/// until it calls `exec`.
const LOOKS: u32 = 3;
/// The same for loop devices: the system's device manager opens each that is set up or was written, to see
/// what is on it.
const LOOKS_AT_DEVICES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(20);

/// What has the file open besides a loop device; the first that is found.
pub(crate) fn besides_loops(file: FileId) -> Option<FileHolder> {
    process(file).or_else(|| mounts::of_file(file).map(|on| FileHolder::Mount { on }))
}

/// Those of `files` that processes have open.
pub(crate) fn open_files(files: &HashSet<FileId>) -> HashSet<FileId> {
    processes(files, LOOKS).into_keys().collect()
}

/// The process that has the file open; the first that is found.
pub(crate) fn process(file: FileId) -> Option<FileHolder> {
    processes(&HashSet::from([file]), LOOKS).remove(&file)
}

/// The loop device on the file; one that is in use before one that is not.
pub(crate) fn loop_device(file: FileId) -> Option<FileHolder> {
    let mut free = None;
    for sysfs in Sysfs::of_host().loops_on(file) {
        let device = Path::new("/dev").join(sysfs.file_name()?);
        match usage(&sysfs, &device) {
            LoopUse::Free => free = Some(FileHolder::Loop { device, usage: LoopUse::Free }),
            usage => return Some(FileHolder::Loop { device, usage }),
        }
    }
    free
}

/// What holds the block device with the directory `sysfs`, or one of its partitions: a filesystem or swap
/// space on it, or another device.
pub(crate) fn claimer_of(sysfs: &Path) -> Option<String> {
    with_partitions(sysfs).into_iter().find_map(|(device, id)| {
        let part = match device == sysfs {
            true => "it".to_owned(),
            false => format!("its partition {}", device.file_name()?.display()),
        };
        if let Some(on) = id.block_device().and_then(mounts::of_device) {
            return Some(format!("{part} is mounted on {}", on.display()));
        }
        if mounts::is_swap(id) {
            return Some(format!("{part} is swap space"));
        }
        let holder = below::entries(&device.join("holders")).chain(Sysfs::of_host().loops_on(id)).next()?;
        Some(format!("{} stands on {part}", holder.file_name()?.display()))
    })
}

fn with_partitions(sysfs: &Path) -> Vec<(PathBuf, FileId)> {
    let all = std::iter::once(sysfs.to_owned()).chain(below::partitions(sysfs));
    all.filter_map(|device| below::device_of(&device).map(|id| (device, id))).collect()
}

/// The user of the loop device with the directory `sysfs`: its holder, or a process that has it or one of its
/// partitions open.
fn user_of(sysfs: &Path) -> Option<String> {
    claimer_of(sysfs).or_else(|| {
        let devices = with_partitions(sysfs).into_iter().map(|(_, id)| id).collect();
        processes(&devices, LOOKS_AT_DEVICES).into_values().next().map(|holder| holder.to_string())
    })
}

fn usage(sysfs: &Path, device: &Path) -> LoopUse {
    if let Some(user) = user_of(sysfs) {
        return LoopUse::Used(user);
    }
    let claimed = OpenOptions::new().read(true).custom_flags(OFlags::EXCL.bits().cast_signed()).open(device);
    match claimed.map_err(|e| e.raw_os_error().map(Errno::from_raw_os_error)) {
        Ok(_) => LoopUse::Free,
        Err(Some(Errno::BUSY)) => LoopUse::Used("another device or program has claimed it".to_owned()),
        // It has been detached since.
        Err(_) if below::backing_file(sysfs).is_none() => LoopUse::Free,
        Err(_) => LoopUse::Unknown,
    }
}

/// Which of `files` processes have open, each time of `looks`: of each the first that is found.
fn processes(files: &HashSet<FileId>, looks: u32) -> HashMap<FileId, FileHolder> {
    let mut found = scan(files);
    for _ in 1..looks {
        if found.is_empty() {
            break;
        }
        std::thread::sleep(PAUSE);
        found = scan(&found.into_keys().collect());
    }
    found
}

/// One look at all that is open.
fn scan(files: &HashSet<FileId>) -> HashMap<FileId, FileHolder> {
    let mut found = HashMap::new();
    if files.is_empty() {
        return found;
    }
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let process = entry.path();
        let Ok(open) = fs::read_dir(process.join("fd")) else { continue };
        for file in open.flatten().filter_map(|link| open_file(&process, &link, files)) {
            found.entry(file).or_insert_with(|| {
                let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
                FileHolder::Process { pid, name: name.trim_end().to_owned() }
            });
        }
    }
    found
}

/// The one of `files` that `link` of a process leads to.
fn open_file(process: &Path, link: &fs::DirEntry, files: &HashSet<FileId>) -> Option<FileId> {
    // Sockets, pipes and the like have no path.
    if !fs::read_link(link.path()).is_ok_and(|path| path.is_absolute()) {
        return None;
    }
    let info = fs::read_to_string(process.join("fdinfo").join(link.file_name())).unwrap_or_default();
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    // A handle that only names the file reads and writes nothing.
    let flags = field("flags:").and_then(|flags| u32::from_str_radix(flags, 8).ok()).unwrap_or(0);
    if OFlags::from_bits_retain(flags).contains(OFlags::PATH) {
        return None;
    }
    // Looked up first because it asks no filesystem, which might hang. Kernels before 5.14 do not say; of a
    // device it is the number of a node.
    let inode = field("ino:").and_then(|inode| inode.parse::<u64>().ok());
    let may_be =
        |file: &FileId| file.inode().is_none() || inode.is_none_or(|inode| file.inode() == Some(inode));
    if !files.iter().any(may_be) {
        return None;
    }
    mounts::without_asking(&link.path()).filter(|file| files.contains(file))
}

/// Whether this process may rename over a file of another user in a sticky directory.
pub(crate) fn may_act_as_owner() -> bool {
    const CAP_FOWNER: u32 = 3;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(0);
    effective >> CAP_FOWNER & 1 == 1
}
