//! Who has a file open: loop devices by sysfs, processes by `/proc`.
//!
//! Asked by [`crate::target`] before a file is replaced: such a holder would keep the old one. What may not be read
//! (another user's processes, without privilege) is not seen.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, Metadata, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;

/// What has a file open.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileHolder {
    /// A loop device stands on it.
    Loop {
        /// The device.
        device: PathBuf,
        /// Whether that is mounted or held in turn.
        in_use: bool,
    },
    /// A process has it open, possibly this one.
    Process {
        /// Its id.
        pid: u32,
        /// Its name.
        name: String,
    },
}

impl fmt::Display for FileHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loop { device, in_use } => {
                let state = if *in_use { ", which is in use," } else { "" };
                write!(f, "the loop device {}{state} stands on it", device.display())
            }
            Self::Process { pid, name } => write!(f, "process {pid} ({name}) has it open"),
        }
    }
}

/// What has the file `meta` open; the first that is found.
pub(crate) fn find(meta: &Metadata) -> Option<FileHolder> {
    // A child that has just been forked holds all descriptors of its parent until it calls `exec`.
    const LOOKS: u32 = 3;
    const PAUSE: Duration = Duration::from_millis(20);
    if let Some(holder) = loop_device(meta) {
        return Some(holder);
    }
    let mut found = process(meta);
    for _ in 1..LOOKS {
        found.as_ref()?;
        std::thread::sleep(PAUSE);
        found = process(meta);
    }
    found
}

fn is_file(path: &Path, meta: &Metadata) -> bool {
    fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (meta.dev(), meta.ino()))
}

fn loop_device(meta: &Metadata) -> Option<FileHolder> {
    let devices = fs::read_dir("/sys/block").ok()?;
    devices.flatten().filter(|entry| entry.file_name().as_bytes().starts_with(b"loop")).find_map(|entry| {
        let below = fs::read(entry.path().join("loop/backing_file")).ok()?;
        let below = below.strip_suffix(b"\n").unwrap_or(&below);
        is_file(Path::new(OsStr::from_bytes(below)), meta).then(|| {
            let device = Path::new("/dev").join(entry.file_name());
            let in_use = is_claimed(&device);
            FileHolder::Loop { device, in_use }
        })
    })
}

/// Whether a filesystem or another device holds the block device.
fn is_claimed(device: &Path) -> bool {
    let claimed = OpenOptions::new().read(true).custom_flags(OFlags::EXCL.bits().cast_signed()).open(device);
    matches!(claimed, Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()))
}

fn process(meta: &Metadata) -> Option<FileHolder> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let directory = entry.path();
        let open = fs::read_dir(directory.join("fd")).ok()?;
        open.flatten().find(|link| is_open_file(&directory, link, meta))?;
        let name = fs::read_to_string(directory.join("comm")).unwrap_or_default();
        Some(FileHolder::Process { pid, name: name.trim_end().to_owned() })
    })
}

fn is_open_file(process: &Path, link: &fs::DirEntry, meta: &Metadata) -> bool {
    // Sockets, pipes and the like have no path.
    if !fs::read_link(link.path()).is_ok_and(|path| path.is_absolute()) {
        return false;
    }
    let info = fs::read_to_string(process.join("fdinfo").join(link.file_name())).unwrap_or_default();
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    // A handle that only names the file reads and writes nothing.
    let flags = field("flags:").and_then(|flags| u32::from_str_radix(flags, 8).ok()).unwrap_or(0);
    if OFlags::from_bits_retain(flags).contains(OFlags::PATH) {
        return false;
    }
    // Looked up first because it asks no filesystem, which might hang. Kernels before 5.14 do not say.
    let inode = field("ino:").and_then(|inode| inode.parse::<u64>().ok());
    inode.is_none_or(|inode| inode == meta.ino()) && is_file(&link.path(), meta)
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
