//! The listening socket of a captive server.
//!
//! It is bound in a fresh directory of mode 0700, and name and directory are removed before anything else
//! happens: what is left is a handle of the socket's inode, and the kernel connects to that by its link below
//! `/proc/self/fd`. So there is nothing to remove when the command ends, in whatever way, and no other user
//! can connect.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use rustix::fs::{CWD, Mode, OFlags};

/// What the URI of such a socket begins with.
pub(super) const URI: &str = "nbd+unix:///?socket=/proc/self/fd/";

/// Names that are tried for the directory.
const NAMES: u32 = 1000;

pub(super) struct Socket {
    /// Until the server has it. Nothing else may keep it open: a client of a server that has gone would wait.
    listener: Option<UnixListener>,
    /// Its inode.
    inode: OwnedFd,
}

impl Socket {
    pub(super) fn new() -> io::Result<Self> {
        let dir = fresh_dir()?;
        let made = Self::bound_in(&dir);
        fs::remove_dir(&dir)?;
        made
    }

    fn bound_in(dir: &PathBuf) -> io::Result<Self> {
        let handle =
            rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        // The path of a socket is short.
        let name = format!("/proc/self/fd/{}/s", handle.as_raw_fd());
        let listener = UnixListener::bind(&name)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let inode = rustix::fs::openat(CWD, &name, flags, Mode::empty());
        fs::remove_file(&name)?;
        Ok(Self { listener: Some(listener), inode: inode? })
    }

    /// The URI of its only export.
    pub(super) fn uri(&self) -> String {
        format!("{URI}{}", self.inode.as_raw_fd())
    }

    /// The socket, for the server; once.
    pub(super) fn hand_over(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }
}

/// A directory that this user alone may use.
fn fresh_dir() -> io::Result<PathBuf> {
    let mut last = None;
    for number in 0..NAMES {
        let dir = std::env::temp_dir().join(format!("blockmirror-{}-{number}", std::process::id()));
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = Some(error),
            Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", dir.display()))),
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::AlreadyExists.into()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_socket_without_a_name_is_connected_to() {
        let mut socket = Socket::new().unwrap();
        let listener = socket.hand_over().unwrap();
        assert!(socket.hand_over().is_none());
        let path = socket.uri().split_once("socket=").unwrap().1.to_owned();
        assert!(UnixStream::connect(&path).is_ok());
        let link = fs::read_link(&path).unwrap();
        assert!(link.to_string_lossy().ends_with("(deleted)"), "{link:?}");
        drop(listener);
        assert!(UnixStream::connect(&path).is_err());
    }
}
