//! A file system of a chosen kind on a loop device, for tests of what only some file systems do. Needs root,
//! `mount` and the kind's `mkfs`; skipped visibly without.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::scratch::scratch;
use crate::{skip, skip_unsupported};

/// What XFS takes at least, with some room. The file that it lies in is sparse.
const LEN: u64 = 400 << 20;

/// A mounted file system in a file, unmounted when dropped: whatever is open in it must be dropped before.
#[derive(Debug)]
pub struct LoopFs {
    mount: PathBuf,
    _dir: TempDir,
}

impl LoopFs {
    /// The kinds that share blocks between files, as far as they can be mounted here; `test` is skipped for
    /// the others.
    pub fn with_reflinks(test: &str) -> impl Iterator<Item = Self> {
        ["xfs", "btrfs"].into_iter().filter_map(|kind| Self::new(test, kind, &[]))
    }

    /// A new file system of `kind`, made with the `options` of its `mkfs`.
    pub fn new(test: &str, kind: &str, options: &[&str]) -> Option<Self> {
        let dir = match scratch() {
            Ok(dir) => dir,
            Err(error) => return skipped(&format!("{kind}: {error}")),
        };
        let (file, mount) = (dir.path().join("disk"), dir.path().join("mount"));
        let made =
            File::create(&file).and_then(|file| file.set_len(LEN)).and_then(|()| fs::create_dir(&mount));
        if let Err(error) = made {
            return skipped(&format!("{kind}: {error}"));
        }
        let mkfs = format!("mkfs.{kind}");
        match Command::new(&mkfs).arg("-q").args(options).arg(&file).output() {
            Ok(out) if out.status.success() => {}
            Ok(out) => return skipped(&format!("{mkfs}: {}", String::from_utf8_lossy(&out.stderr).trim())),
            Err(error) => {
                skip(test, format_args!("{mkfs}: {error}"));
                return None;
            }
        }
        match Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&mount).output() {
            Ok(out) if out.status.success() => Some(Self { mount, _dir: dir }),
            Ok(out) => skipped(&format!("mount {kind}: {}", String::from_utf8_lossy(&out.stderr).trim())),
            Err(error) => skipped(&format!("mount {kind}: {error}")),
        }
    }

    /// Its root directory.
    pub fn path(&self) -> &Path {
        &self.mount
    }
}

fn skipped(why: &str) -> Option<LoopFs> {
    skip_unsupported(format_args!("{why}"));
    None
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        // Lazily: a child that another test forks may hold a descriptor of it for a moment.
        let _ = Command::new("umount").arg("--lazy").arg(&self.mount).status();
    }
}
