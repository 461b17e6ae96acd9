//! What shows whether a block device is the same one later: names that the device has by itself, or its
//! number.
//!
//! Taken of what a copy reads and writes, and compared by a later run that goes on. Unlike a file, a device
//! does not show whether it was written.

use std::fmt;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use blockmirror_block::{Result, Storage};
use rustix::fs::{major, minor};

use crate::below::{Sysfs, backing_file};
use crate::storage::FileStorage;

/// What sysfs has of a disk that no other disk has, in order of preference: the name of a SCSI or NVMe disk,
/// that of a mapped device, that of an array.
const UNIQUE: [&str; 4] = ["wwid", "device/wwid", "dm/uuid", "md/uuid"];
/// What others may have too.
const SERIAL: [&str; 2] = ["serial", "device/serial"];

/// Which block device it is: by a name of its own (world wide name, UUID), else by device number, serial
/// number and the file of a loop device. With it where a partition begins, and the length.
///
/// A device number may be another after a reboot: then the device counts as another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStamp(String);

/// One line, the same for the same device.
impl fmt::Display for DeviceStamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FileStorage {
    /// Which block device it is; `None` of a regular file.
    ///
    /// # Errors
    /// The length is not known.
    pub fn device_stamp(&self) -> Result<Option<DeviceStamp>> {
        let Some(device) = self.id().block_device() else { return Ok(None) };
        Ok(Some(DeviceStamp(describe(Sysfs::of_host(), device, self.len()?))))
    }
}

fn describe(sysfs: Sysfs<'_>, device: u64, len: u64) -> String {
    let own = sysfs.device(device);
    let (disk, start) = match own.join("partition").exists() {
        true => (disk_of(&own), text(&own.join("start"))),
        false => (own.clone(), None),
    };
    let first = |names: &[&str]| names.iter().find_map(|name| text(&disk.join(name)));
    let mut said = match first(&UNIQUE) {
        Some(name) => format!("device {name}"),
        None => {
            let mut said = format!("device {}:{}", major(device), minor(device));
            if let Some(serial) = first(&SERIAL) {
                said += &format!(" serial {serial}");
            }
            if let Some(file) = backing_file(&disk) {
                let offset = text(&disk.join("loop/offset")).unwrap_or_default();
                said += &format!(" file {} offset {offset}", file.display());
                // Another file may have the name by now, and the number too.
                if let Ok(meta) = fs::metadata(&file) {
                    said += &format!(" inode {}", meta.ino());
                    if let Some(made) = made(&meta) {
                        said += &format!(" made {}.{:09}", made.as_secs(), made.subsec_nanos());
                    }
                }
            }
            said
        }
    };
    if let Some(start) = start {
        said += &format!(" start {start}");
    }
    said + &format!(" length {len}")
}

/// The directory of the disk of a partition, in which that of the partition lies.
fn disk_of(partition: &Path) -> PathBuf {
    let real = fs::canonicalize(partition).unwrap_or_default();
    real.parent().unwrap_or(partition).to_owned()
}

/// When a file was made, if its file system keeps that.
fn made(meta: &Metadata) -> Option<Duration> {
    meta.created().ok()?.duration_since(UNIX_EPOCH).ok()
}

/// What a file of sysfs says, if it says something.
fn text(path: &Path) -> Option<String> {
    let text = String::from_utf8_lossy(&fs::read(path).ok()?).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::makedev;

    use super::*;

    /// The stamp of the device 8:1 of a sysfs in which `name` is its directory, with these files.
    fn stamp(name: &str, files: &[(&str, &str)]) -> String {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("block").join(name);
        fs::create_dir_all(root.path().join("dev/block")).unwrap();
        fs::create_dir_all(&own).unwrap();
        symlink(&own, root.path().join("dev/block/8:1")).unwrap();
        for (file, text) in files {
            let path = own.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }
        describe(Sysfs(root.path()), makedev(8, 1), 4096)
    }

    #[test]
    fn a_device_is_known_by_its_own_name_or_by_its_number() {
        for (name, files, want) in [
            ("vda", &[][..], "device 8:1 length 4096"),
            ("sda", &[("device/wwid", "naa.5000")], "device naa.5000 length 4096"),
            ("nvme0n1", &[("wwid", "eui.01"), ("device/serial", "x")], "device eui.01 length 4096"),
            ("dm-0", &[("dm/uuid", "LVM-a")], "device LVM-a length 4096"),
            ("dm-0", &[("dm/uuid", "")], "device 8:1 length 4096"),
            ("vda", &[("serial", "1")], "device 8:1 serial 1 length 4096"),
            (
                "loop0",
                &[("loop/backing_file", "/not/there"), ("loop/offset", "512")],
                "device 8:1 file /not/there offset 512 length 4096",
            ),
            (
                "sda/sda1",
                &[("partition", "1"), ("start", "2048"), ("../device/wwid", "naa.5000")],
                "device naa.5000 start 2048 length 4096",
            ),
        ] {
            assert_eq!(stamp(name, files), want, "{name}");
        }
    }

    /// File systems give the number of a file that is gone to the next one.
    #[test]
    fn a_loop_device_on_another_file_of_the_same_name_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("below");
        let new = || {
            let _ = fs::remove_file(&path);
            fs::write(&path, "").unwrap();
            made(&fs::metadata(&path).unwrap())
        };
        let Some(first) = new() else { return };
        let stamp = || stamp("loop0", &[("loop/backing_file", path.to_str().unwrap())]);
        let before = stamp();
        assert_eq!(stamp(), before);
        // The clock of a file system has ticks of some milliseconds.
        while new() == Some(first) {}
        assert_ne!(stamp(), before);
    }
}
