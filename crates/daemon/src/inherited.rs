//! Sockets that whoever started the process has opened for it: given by number (`--chardev socket,fd=7`), or by the name that
//! the service manager gave them (`--nbd-server addr.type=fd,addr.str=nbd` with `FileDescriptorName=nbd`).
//!
//! Called while the command line is carried out, never for a client.
//!
//! The one place with `unsafe` here: a number has to become an owned descriptor. (The kernel's `pidfd_getfd` would give a
//! duplicate without it; but then the original stays open and nobody at its other end learns that it was closed, and many
//! containers forbid the call.)

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use blockmirror_block::sync::Mutex;

/// The first descriptor that a service manager hands over, by convention.
const FIRST: RawFd = 3;

/// Numbers that have been taken.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes a descriptor over that is given by its number, or by its name in `LISTEN_FDNAMES`.
///
/// # Errors
/// There is none of this name, it is not open, is one of the standard streams or has been taken before.
pub(crate) fn take(name: &str) -> io::Result<OwnedFd> {
    let refused =
        |why| io::Error::new(io::ErrorKind::InvalidInput, format!("file descriptor '{name}' {why}"));
    let fd = match name.parse::<RawFd>() {
        Ok(number) => number,
        Err(_) => {
            let listed = |key: &str| std::env::var(key).ok();
            let pid = listed("LISTEN_PID").and_then(|pid| pid.parse().ok());
            if pid != Some(std::process::id()) {
                return Err(refused("is no number, and the service manager has passed none"));
            }
            let names = listed("LISTEN_FDNAMES").unwrap_or_default();
            let count = listed("LISTEN_FDS").and_then(|count| count.parse().ok()).unwrap_or(0);
            numbered(&names, count, name).ok_or_else(|| refused("was not passed by the service manager"))?
        }
    };
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

/// The number of the descriptor `name`, if it is among the first `count` of `names`, which have colons in between. Of equal
/// names the first counts.
fn numbered(names: &str, count: usize, name: &str) -> Option<RawFd> {
    let at = names.split(':').take(count).position(|listed| listed == name)?;
    FIRST.checked_add(RawFd::try_from(at).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_service_manager() {
        assert_eq!(numbered("qmp:nbd", 2, "nbd"), Some(4));
        assert_eq!(numbered("qmp:nbd", 1, "nbd"), None);
        assert_eq!(numbered("", 0, ""), None);
        assert_eq!(numbered("a:a", 2, "a"), Some(3));
    }

    #[test]
    fn what_cannot_be_taken() {
        for (name, why) in [
            ("nbd", "is no number, and the service manager has passed none"),
            ("2", "is a standard stream"),
            ("-1", "is a standard stream"),
            ("1000000", "is not open"),
        ] {
            assert_eq!(take(name).unwrap_err().to_string(), format!("file descriptor '{name}' {why}"));
        }
    }
}
