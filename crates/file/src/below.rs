//! What a block device stands on: the disk of a partition, the file of a loop device, the devices below a
//! mapped one.
//!
//! Asked by [`FileId::overlaps`]: two names that lead to different files may lead to the same bytes all the
//! same. All of it is read from sysfs, which every user may read. A loop device whose file has no name here
//! is taken to stand on nothing.

use std::ffi::OsStr;
use std::fs;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{major, makedev, minor};

use crate::id::FileId;
use crate::mounts;

/// The unit of sizes in sysfs.
const SECTOR: u64 = 512;

/// More than any stack of devices has.
const MAX_PARTS: usize = 1024;

impl FileId {
    /// Whether a write to one of the two may change what the other reads as: they are one file, or one is a
    /// block device that stands on the other, or both show the same bytes of a third (partitions, loop
    /// devices, mapped devices).
    pub fn overlaps(self, other: Self) -> bool {
        Sysfs::of_host().overlaps(self, other)
    }

    /// Whether the bytes come from a server that may run on this host and have them in a file that is known
    /// by another name: a network filesystem, one in user space, a network block device.
    pub fn may_be_served(self) -> bool {
        match self.block_device() {
            Some(device) => Sysfs::of_host().is_served(device),
            None => mounts::is_served(self.device()),
        }
    }
}

/// Where sysfs is mounted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sysfs<'a>(pub(crate) &'a Path);

impl Sysfs<'static> {
    pub(crate) fn of_host() -> Self {
        Self(Path::new("/sys"))
    }
}

/// Bytes of a file that another file shows.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    file: FileId,
    range: Range<u64>,
    /// It is reached by a mapping (dm, md), which says which devices it uses and not where.
    mapped: bool,
}

impl Part {
    /// The bytes of `lower` from `start` on, `len` at most, that this part shows.
    fn within(&self, lower: FileId, start: u64, len: u64) -> Self {
        let end = start.saturating_add(len.min(self.range.end));
        let range = start.saturating_add(self.range.start).min(end)..end;
        Self { file: lower, range, mapped: self.mapped }
    }

    fn overlaps(&self, other: &Self) -> bool {
        // Volumes of one group use the same devices, each its own bytes.
        let is_known = !(self.mapped && other.mapped);
        let meets = self.range.start < other.range.end && other.range.start < self.range.end;
        self.file == other.file && meets && is_known
    }
}

impl<'a> Sysfs<'a> {
    /// Whether a write to one of the files may change what the other reads as.
    pub(crate) fn overlaps(self, a: FileId, b: FileId) -> bool {
        if a == b {
            return true;
        }
        if a.block_device().is_none() && b.block_device().is_none() {
            return false;
        }
        let (a, b) = (self.parts(a), self.parts(b));
        a.iter().any(|a| b.iter().any(|b| a.overlaps(b)))
    }

    /// The file and what it stands on, down to the last.
    fn parts(self, file: FileId) -> Vec<Part> {
        let mut parts = vec![Part { file, range: 0..u64::MAX, mapped: false }];
        let mut next = 0;
        while next < parts.len() && parts.len() < MAX_PARTS {
            for lower in self.below(&parts[next]) {
                if !parts.contains(&lower) {
                    parts.push(lower);
                }
            }
            next += 1;
        }
        parts
    }

    fn below(self, part: &Part) -> Vec<Part> {
        let Some(device) = part.file.block_device() else { return Vec::new() };
        let sysfs = self.device(device);
        if let Some(file) = backing_file(&sysfs).and_then(FileId::of) {
            let start = number(&sysfs.join("loop/offset")).unwrap_or(0);
            let limit = number(&sysfs.join("loop/sizelimit")).filter(|limit| *limit > 0);
            return vec![part.within(file, start, limit.unwrap_or(u64::MAX))];
        }
        if sysfs.join("partition").exists() {
            // Partitions lie in the directory of their disk.
            let disk = fs::canonicalize(&sysfs).ok().and_then(|own| device_of(own.parent()?));
            let start = number(&sysfs.join("start")).unwrap_or(0).saturating_mul(SECTOR);
            let len = number(&sysfs.join("size")).map_or(u64::MAX, |sectors| sectors.saturating_mul(SECTOR));
            return disk.map(|disk| part.within(disk, start, len)).into_iter().collect();
        }
        let slaves = entries(&sysfs.join("slaves")).filter_map(|slave| device_of(&slave));
        slaves.map(|file| Part { file, range: 0..u64::MAX, mapped: true }).collect()
    }

    /// The directory of a block device.
    pub(crate) fn device(self, device: u64) -> PathBuf {
        self.0.join(format!("dev/block/{}:{}", major(device), minor(device)))
    }

    /// Whether the device, or one that it stands on, is the client of a server.
    pub(crate) fn is_served(self, device: u64) -> bool {
        let parts = self.parts(FileId::of_block_device(device));
        parts.iter().filter_map(|part| part.file.block_device()).any(|device| {
            let real = fs::canonicalize(self.device(device)).unwrap_or_default();
            let name = real.file_name().unwrap_or_default().as_bytes();
            name.starts_with(b"nbd") || name.starts_with(b"ublkb")
        })
    }

    /// The directories of the loop devices on `file`.
    pub(crate) fn loops_on(self, file: FileId) -> impl Iterator<Item = PathBuf> + use<> {
        let loops = entries(&self.0.join("block"))
            .filter(|entry| entry.file_name().is_some_and(|name| name.as_bytes().starts_with(b"loop")));
        loops.filter(move |entry| backing_file(entry).and_then(FileId::of) == Some(file))
    }
}

/// What the directory of a block device says is the file of a loop device.
pub(crate) fn backing_file(sysfs: &Path) -> Option<PathBuf> {
    let name = fs::read(sysfs.join("loop/backing_file")).ok()?;
    Some(OsStr::from_bytes(name.strip_suffix(b"\n").unwrap_or(&name)).into())
}

/// The device that the directory `sysfs` is of.
pub(crate) fn device_of(sysfs: &Path) -> Option<FileId> {
    let text = fs::read_to_string(sysfs.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(FileId::of_block_device(makedev(major.parse().ok()?, minor.parse().ok()?)))
}

/// The directories of the partitions of the disk in `sysfs`.
pub(crate) fn partitions(sysfs: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    entries(sysfs).filter(|entry| entry.join("partition").exists())
}

/// What is in a directory; nothing, if that may not be read.
pub(crate) fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs of our own: `lines` are `NAME NUMBER`, or `NAME NUMBER FILE=TEXT..`.
    fn sysfs(lines: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("dev/block")).unwrap();
        fs::create_dir(root.path().join("block")).unwrap();
        for line in lines {
            let mut words = line.split(' ');
            let (name, number) = (words.next().unwrap(), words.next().unwrap());
            let own = root.path().join("block").join(name);
            fs::create_dir(&own).unwrap();
            fs::write(own.join("dev"), format!("{number}\n")).unwrap();
            symlink(&own, root.path().join("dev/block").join(number)).unwrap();
            for (file, text) in words.map(|word| word.split_once('=').unwrap()) {
                let path = own.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                match file.starts_with("slaves/") {
                    true => symlink(root.path().join("block").join(text), path).unwrap(),
                    false => fs::write(path, format!("{text}\n")).unwrap(),
                }
            }
        }
        root
    }

    fn device(minor: u32) -> FileId {
        FileId::of_block_device(makedev(8, minor))
    }

    #[test]
    fn devices_overlap_with_what_they_stand_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let file = |name: &str| FileId::of(path(name)).unwrap();
        for name in ["disk", "other"] {
            fs::write(path(name), "").unwrap();
        }
        let disk = path("disk").display().to_string();
        let own = sysfs(&[
            "sda 8:0",
            "sda/sda1 8:1 partition=1 start=2048 size=2048",
            "sda/sda2 8:2 partition=2 start=4096 size=2048",
            "dm-0 8:10 slaves/sda2=sda/sda2",
            "dm-1 8:11 slaves/sda2=sda/sda2",
            "dm-2 8:12 slaves/dm-0=dm-0",
            "dm-3 8:13 slaves/x=dm-3",
            &format!("loop0 8:20 loop/backing_file={disk}"),
            &format!("loop1 8:21 loop/backing_file={disk} loop/offset=1048576 loop/sizelimit=1048576"),
            &format!("loop2 8:22 loop/backing_file={disk} loop/offset=2097152 loop/sizelimit=0"),
            "loop0/loop0p1 8:23 partition=1 start=2048 size=1",
            "loop3 8:24 loop/backing_file=/nowhere/at/all",
        ]);
        let sysfs = Sysfs(own.path());
        let overlaps = |a, b| {
            assert_eq!(sysfs.overlaps(a, b), sysfs.overlaps(b, a));
            sysfs.overlaps(a, b)
        };
        for (a, b, expected) in [
            (0, 1, true),
            (1, 2, false),
            (10, 2, true),
            (10, 0, true),
            (10, 1, false),
            // Two volumes of one group.
            (10, 11, false),
            (12, 10, true),
            (12, 11, false),
            (13, 0, false),
            (20, 21, true),
            (21, 22, false),
            (20, 23, true),
            (21, 23, true),
            (22, 23, false),
            (24, 20, false),
        ] {
            assert_eq!(overlaps(device(a), device(b)), expected, "{a} and {b}");
        }
        for loop_device in [20, 21, 22, 23] {
            assert!(overlaps(device(loop_device), file("disk")), "{loop_device}");
            assert!(!overlaps(device(loop_device), file("other")), "{loop_device}");
        }
        assert!(!overlaps(file("disk"), file("other")));
        assert!(!overlaps(device(24), file("disk")));
        let found: Vec<_> = sysfs.loops_on(file("disk")).collect();
        assert_eq!(found.len(), 3, "{found:?}");
    }
}
