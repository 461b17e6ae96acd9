//! Loop devices and mounts for tests; skipped visibly where the system has none.

use std::fs::{File, OpenOptions as FileOpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use blockmirror_testing::qemu::have;

/// What a command prints; `None`, visibly, if it cannot be done here.
pub(super) fn system(program: &str, args: &[&Path]) -> Option<String> {
    let said = Command::new(program).args(args).output();
    match said {
        Ok(said) if said.status.success() => Some(String::from_utf8(said.stdout).unwrap()),
        Ok(said) => {
            blockmirror_testing::skip_unsupported(format_args!(
                "{program}: {}",
                String::from_utf8_lossy(&said.stderr).trim()
            ));
            None
        }
        Err(error) => {
            blockmirror_testing::skip_unsupported(format_args!("{program}: {error}"));
            None
        }
    }
}

/// A loop device over a file.
pub(super) struct Loop(pub(super) PathBuf);

impl Loop {
    pub(super) fn new(file: &Path) -> Option<Self> {
        let name = system("losetup", &[Path::new("--find"), Path::new("--show"), file])?;
        Some(Self(name.trim().into()))
    }

    /// The same as another holder sees it: refused while it is claimed.
    pub(super) fn claim(&self) -> io::Result<File> {
        let exclusive = rustix::fs::OFlags::EXCL.bits().cast_signed();
        FileOpenOptions::new().read(true).custom_flags(exclusive).open(&self.0)
    }

    pub(super) fn is_claimed(&self) -> bool {
        self.claim().is_err()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// Something mounted at a path.
pub(super) struct Mount(pub(super) PathBuf);

impl Mount {
    /// `options` is one word, as `-oro` or `-osize=1M`.
    pub(super) fn new(options: &str, what: &Path, at: PathBuf) -> Option<Self> {
        let kind = if what == Path::new("tmpfs") { "-ttmpfs" } else { "-tauto" };
        system("mount", &[Path::new(kind), Path::new(options), what, &at])?;
        Some(Self(at))
    }

    /// Changes the size of a tmpfs.
    pub(super) fn resize(&self, size: &str) {
        let options = format!("-oremount,size={size}");
        system("mount", &[Path::new(&options), &self.0]).unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Asks `qemu-img check` about an image, which is to have neither damage nor leaks. Says so where it is not
/// installed.
pub(super) fn qemu_check(path: &Path, what: &str) {
    if have(what, &["qemu-img"]) {
        let said =
            Command::new("qemu-img").args(["check", "-q", "-U", "-f", "qcow2"]).arg(path).output().unwrap();
        assert!(said.status.success(), "{what}: qemu-img check: {said:?}");
    }
}
