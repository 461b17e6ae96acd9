//! A loop device on a file, for tests of block devices. Needs root and `losetup`; skipped visibly without.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::skip_unsupported;

/// A loop device, detached when dropped.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Attaches a device to `file`; `None`, which is reported, where that is not possible.
    pub fn on(file: &Path) -> Option<Self> {
        match Command::new("losetup").args(["--find", "--show"]).arg(file).output() {
            Ok(out) if out.status.success() => {
                Some(Self(String::from_utf8_lossy(&out.stdout).trim().to_owned().into()))
            }
            Ok(out) => {
                let said = String::from_utf8_lossy(&out.stderr);
                skip_unsupported(format_args!("losetup: {}", said.trim()));
                None
            }
            Err(error) => {
                skip_unsupported(format_args!("losetup: {error}"));
                None
            }
        }
    }

    /// Its device node.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
