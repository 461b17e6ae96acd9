//! Sockets that the parent process has opened for it: given by number (`--chardev socket,fd=7`), or by the
//! name that the service manager gave them (`--nbd-server addr.type=fd,addr.str=nbd` with
//! `FileDescriptorName=nbd`).
//!
//! Called before anything else of the command line is carried out, never for a client. Only a stream socket
//! that the process was started with is taken: what it opened itself since has the flag close-on-exec, which
//! nothing that was inherited has.
//!
//! The one place with `unsafe` here: a number has to become an owned descriptor. (The kernel's `pidfd_getfd`
//! would give a duplicate without it; but then the original stays open and its peer does not learn that it
//! was closed, and many containers forbid the call.)

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use blockmirror_block::sync::Mutex;
use rustix::io::FdFlags;
use rustix::net::{SocketType, getpeername, sockopt};

/// The first descriptor that a service manager hands over, by convention.
const FIRST: RawFd = 3;

/// Numbers that have been taken.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// What an inherited socket is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketState {
    Listening,
    Connected,
}

/// Takes a socket over that is given by its number, or by its name in `LISTEN_FDNAMES`.
///
/// # Errors
/// There is none of this name, it is not open, is one of the standard streams, was opened by this process, is
/// not what is `wanted`, or has been taken before.
pub(crate) fn take(name: &str, wanted: SocketState) -> io::Result<OwnedFd> {
    let refused =
        |why: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("file descriptor '{name}' {why}"));
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
    if !TAKEN.lock().insert(fd) {
        return Err(refused("is in use already"));
    }
    match std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")) {
        Ok(info) if is_close_on_exec(&info) => return Err(refused("was not inherited")),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(refused("is not open")),
        Err(e) => return Err(refused(&format!("cannot be looked at: {e}"))),
    }
    #[expect(unsafe_code, reason = "there is no other way to own a descriptor that is known by number")]
    // SAFETY: the descriptor is open: that was looked up. Nothing else in this process owns it: it is taken
    // once only, here; and it was inherited, as it has no close-on-exec, which whatever is opened in this
    // process has.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    check(&owned, wanted).map_err(refused)?;
    // Children are not to have it.
    rustix::io::fcntl_setfd(&owned, FdFlags::CLOEXEC)?;
    Ok(owned)
}

/// Whether the flags in the text of `/proc/self/fdinfo` have it.
fn is_close_on_exec(info: &str) -> bool {
    const CLOEXEC: u32 = 0o2_000_000;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok()).is_none_or(|flags| flags & CLOEXEC != 0)
}

fn check(socket: &OwnedFd, wanted: SocketState) -> Result<(), &'static str> {
    match sockopt::socket_type(socket) {
        Ok(SocketType::STREAM) => {}
        Ok(_) => return Err("is not a stream socket"),
        Err(_) => return Err("is not a socket"),
    }
    let listens = sockopt::socket_acceptconn(socket).unwrap_or(false);
    match wanted {
        SocketState::Listening if !listens => Err("is not a listening socket"),
        SocketState::Connected if getpeername(socket).is_err() => Err("is not a connected socket"),
        _ => Ok(()),
    }
}

/// The number of the descriptor `name`, if it is among the first `count` of `names`, which have colons in
/// between. Of equal names the first counts.
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
            let error = take(name, SocketState::Listening).unwrap_err();
            assert_eq!(error.to_string(), format!("file descriptor '{name}' {why}"));
        }
        // What this process opened itself, whatever it is.
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&socket).to_string();
        let error = take(&number, SocketState::Connected).unwrap_err();
        assert_eq!(error.to_string(), format!("file descriptor '{number}' was not inherited"));
        assert!(getpeername(&socket).is_ok(), "it is still open");
    }

    #[test]
    fn only_flags_without_close_on_exec_are_inherited() {
        assert!(is_close_on_exec("pos:\t0\nflags:\t02000002\nmnt_id:\t15\n"));
        assert!(!is_close_on_exec("pos:\t0\nflags:\t02\nmnt_id:\t15\n"));
        assert!(is_close_on_exec(""));
    }
}
