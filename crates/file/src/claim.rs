//! Why a block device cannot be claimed: who holds it.
//!
//! Called by [`crate::open`] when an open with a claim was refused. What the kernel keeps in sysfs and in its table of
//! mounts is read for the message; what cannot be read is left out.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use blockmirror_block::{Error, ErrorKind};
use rustix::fs::{major, minor};

/// The error for `path`, which is mounted or held.
pub(crate) fn refused(path: &Path, e: std::io::Error) -> Error {
    let holder = fs::metadata(path).ok().and_then(|meta| holder(meta.rdev()));
    let holder = holder.unwrap_or_else(|| "it is claimed by another device or program".to_owned());
    Error::new(ErrorKind::Locked, "open")
        .because(format!("the block device is in use: {holder}"))
        .caused_by(e)
}

fn holder(device: u64) -> Option<String> {
    let number = format!("{}:{}", major(device), minor(device));
    if let Some(mount) = mounted_on(&number) {
        return Some(format!("it is mounted on {mount}"));
    }
    let sysfs = Path::new("/sys/dev/block").join(&number);
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    if let Some(holder) = entries(&sysfs.join("holders")).next() {
        return Some(format!("{} stands on it", holder.file_name().to_string_lossy()));
    }
    // A partition in use claims the whole disk.
    entries(&sysfs).filter(|entry| entry.path().join("partition").exists()).find_map(|partition| {
        let name = partition.file_name();
        let number = fs::read_to_string(partition.path().join("dev")).ok()?;
        let mount = mounted_on(number.trim())?;
        Some(format!("its partition {} is mounted on {mount}", name.to_string_lossy()))
    })
}

/// Where the device `major:minor` is mounted.
fn mounted_on(number: &str) -> Option<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    table.lines().find_map(|line| {
        let mut words = line.split(' ');
        (words.nth(2)? == number).then(|| words.nth(1).map(str::to_owned))?
    })
}
