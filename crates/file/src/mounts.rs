//! The kernel's tables of mounts and of swap space.
//!
//! Asked by [`crate::claim`], [`crate::holders`] and [`crate::target`]. Filesystems of servers are not asked:
//! one may hang.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, major, makedev, minor};

use crate::id::FileId;

/// A line of a table of mounts.
struct Mount {
    /// `MAJOR:MINOR` of its filesystem.
    device: String,
    /// What of the filesystem is mounted.
    root: PathBuf,
    /// Where.
    on: PathBuf,
    kind: String,
}

/// The mounts that `process` (a directory of `/proc`) sees.
fn seen_by(process: &Path) -> Vec<Mount> {
    let table = fs::read(process.join("mountinfo")).unwrap_or_default();
    let read = |line: &[u8]| {
        let mut words = line.split(|byte| *byte == b' ');
        let device = String::from_utf8(words.nth(2)?.to_vec()).ok()?;
        let (root, on) = (unescaped(words.next()?), unescaped(words.next()?));
        let kind = words.skip_while(|word| *word != b"-").nth(1)?;
        Some(Mount { device, root, on, kind: String::from_utf8_lossy(kind).into_owned() })
    };
    table.split(|byte| *byte == b'\n').filter_map(read).collect()
}

fn ours() -> Vec<Mount> {
    seen_by(Path::new("/proc/self"))
}

/// Where the block device is mounted.
pub(crate) fn of_device(device: u64) -> Option<PathBuf> {
    let number = format!("{}:{}", major(device), minor(device));
    ours().into_iter().find(|mount| mount.device == number).map(|mount| mount.on)
}

/// Whether the filesystem with the device number `device` is one that a server stands behind, which may run
/// on this host.
pub(crate) fn is_served(device: u64) -> bool {
    let number = format!("{}:{}", major(device), minor(device));
    let mount = ours().into_iter().find(|mount| mount.device == number);
    mount.is_some_and(|mount| {
        let kind = &*mount.kind;
        matches!(kind, "fuse" | "nfs" | "nfs4" | "cifs" | "smb3" | "9p") || kind.starts_with("fuse.")
    })
}

/// Where the regular file `file` is mounted by itself, for this process or another: it is the file of a
/// container, say.
pub(crate) fn of_file(file: FileId) -> Option<PathBuf> {
    let find = |process: &Path, root: &Path| {
        let mounts = seen_by(process).into_iter().filter(|mount| mount.root != Path::new("/"));
        mounts.map(|mount| mount.on).find(|on| {
            let seen = root.join(on.strip_prefix("/").unwrap_or(on));
            without_asking(&seen) == Some(file)
        })
    };
    let own = Path::new("/proc/self");
    if let Some(on) = find(own, Path::new("/")) {
        return Some(on);
    }
    let namespace = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
    let mut known: HashSet<_> = namespace(own).into_iter().collect();
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        entry.file_name().to_str()?.parse::<u32>().ok()?;
        let process = entry.path();
        if !known.insert(namespace(&process)?) {
            return None;
        }
        find(&process, &process.join("root"))
    })
}

/// Whether the kernel swaps to the file or block device.
pub(crate) fn is_swap(file: FileId) -> bool {
    let table = fs::read("/proc/swaps").unwrap_or_default();
    let mut names = table.split(|byte| *byte == b'\n').skip(1).filter_map(|line| {
        let end = line.iter().position(|byte| matches!(byte, b' ' | b'\t'))?;
        Some(unescaped(&line[..end]))
    });
    names.any(|name| without_asking(&name) == Some(file))
}

/// Which file `path` leads to, by what the kernel knows; no server is asked.
pub(crate) fn without_asking(path: &Path) -> Option<FileId> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let found = rustix::fs::statx(CWD, path, flags, StatxFlags::BASIC_STATS).ok()?;
    match FileType::from_raw_mode(found.stx_mode.into()) {
        FileType::RegularFile => {
            Some(FileId::of_regular_file(makedev(found.stx_dev_major, found.stx_dev_minor), found.stx_ino))
        }
        FileType::BlockDevice => {
            Some(FileId::of_block_device(makedev(found.stx_rdev_major, found.stx_rdev_minor)))
        }
        _ => None,
    }
}

/// The kernel writes blanks and the like as three octal digits.
fn unescaped(word: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, more @ ..] = rest {
        let code = more.get(..3).filter(|_| *first == b'\\');
        let code = code.and_then(|code| u8::from_str_radix(str::from_utf8(code).ok()?, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &more[3..] } else { more };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_the_kernel_writes_them() {
        for (word, name) in [("/a", "/a"), (r"/a\040b\134", r"/a b\"), (r"\04", r"\04"), (r"\999", r"\999")] {
            assert_eq!(unescaped(word.as_bytes()), Path::new(name), "{word}");
        }
    }

    #[test]
    fn the_table_of_mounts_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let line = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime shared:1 master:2 - fuse.sshfs /dev/root rw\n";
        fs::write(dir.path().join("mountinfo"), format!("{line}short 1\n\n")).unwrap();
        let [mount] = &*seen_by(dir.path()) else { panic!() };
        assert_eq!((&*mount.device, &*mount.kind), ("98:0", "fuse.sshfs"));
        assert_eq!((&*mount.root, &*mount.on), (Path::new("/mnt1"), Path::new("/mnt 2")));
        assert!(ours().iter().any(|mount| mount.on == Path::new("/")));
    }
}
