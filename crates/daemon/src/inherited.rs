//! Sockets that whoever started the process has opened for it, given by number (`--chardev socket,fd=7`).
//!
//! The one place with `unsafe` here: a number has to become an owned descriptor.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use blockmirror_block::sync::Mutex;

/// Numbers that have been taken.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes the descriptor with the given number over.
///
/// # Errors
/// It is no number, is not open, is one of the standard streams or has been taken before.
pub(crate) fn take(number: &str) -> io::Result<OwnedFd> {
    let refused =
        |why| io::Error::new(io::ErrorKind::InvalidInput, format!("file descriptor '{number}' {why}"));
    let fd: RawFd = number.parse().map_err(|_| refused("is no number"))?;
    if fd <= 2 {
        return Err(refused("is a standard stream"));
    }
    if std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_err() {
        return Err(refused("is not open"));
    }
    if !TAKEN.lock().insert(fd) {
        return Err(refused("is in use already"));
    }
    #[expect(unsafe_code, reason = "there is no other way to own a descriptor that is known by number")]
    // SAFETY: the descriptor is open: that was looked up. That nobody else owns it rests on two things: it is taken once
    // only, here; and the option that names it is carried out at start, for a number that the parent process chose, which is
    // one that was open before this process opened anything of its own.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(owned)
}
