//! Listening sockets that the service manager opened before this process began: systemd's socket activation.
//!
//! The one place with `unsafe` in this crate: a number has to become an owned descriptor.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::FdFlags;

use super::ServerError;
use super::listener::Listener;

/// The first descriptor that is handed over, by convention.
const FIRST: RawFd = 3;
/// More than any service has.
const MOST: RawFd = 1024;

/// Whether they have been taken.
static TAKEN: AtomicBool = AtomicBool::new(false);

impl Listener {
    /// The sockets that `LISTEN_FDS` speaks of, if `LISTEN_PID` says that they are meant for this process;
    /// none if not.
    ///
    /// Call it once, early. The variables stay in the environment, with the number of this process, so that
    /// children do not take them as meant for themselves.
    ///
    /// # Errors
    /// The variables make no sense, a descriptor is no listening socket, or they have been taken before.
    pub fn inherited() -> Result<Vec<Self>, ServerError> {
        let refused = |reason: String| ServerError::Activation { reason };
        let number = |name: &str| match std::env::var(name) {
            Ok(text) => match text.parse::<RawFd>() {
                Ok(number) if number >= 0 => Ok(Some(number)),
                _ => Err(refused(format!("{name} is `{text}`"))),
            },
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(e) => Err(refused(format!("{name}: {e}"))),
        };
        let (Some(pid), Some(count)) = (number("LISTEN_PID")?, number("LISTEN_FDS")?) else {
            return Ok(Vec::new());
        };
        if u32::try_from(pid) != Ok(std::process::id()) {
            return Ok(Vec::new());
        }
        if count > MOST {
            return Err(refused(format!("LISTEN_FDS is {count}")));
        }
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err(refused("the sockets have been taken already".into()));
        }
        (FIRST..FIRST + count).map(take).collect()
    }
}

fn take(fd: RawFd) -> Result<Listener, ServerError> {
    let refused = |why: &str| ServerError::Activation { reason: format!("descriptor {fd} {why}") };
    if std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_err() {
        return Err(refused("is not open"));
    }
    #[expect(unsafe_code, reason = "there is no other way to own a descriptor that is known by number")]
    // SAFETY: the descriptor is open, as was just looked up. Nothing else owns it: the variables name this
    // process, so the process that started it opened the descriptor for it before it had any of its own, and
    // they are taken once only.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // Children are not to have it.
    rustix::io::fcntl_setfd(&owned, FdFlags::CLOEXEC)
        .map_err(|e| ServerError::System { what: "use an inherited socket", cause: e.into() })?;
    Listener::from_fd(owned)
}
