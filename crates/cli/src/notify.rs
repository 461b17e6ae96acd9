//! What is sent to the service manager that started this process: the protocol of `sd_notify`.
//!
//! A datagram to the socket that `NOTIFY_SOCKET` names has a line `NAME=VALUE`, or several. Used by the
//! daemon and by `serve` (ready, jobs or clients, stopping), and by [`Console`](crate::console::Console)
//! (where a command stands). What must hold: it never waits and never fails a command; a datagram that the
//! manager does not take, or that a sandbox forbids, is lost. The only child process here is the daemon
//! itself in the background, which is the service then and inherits the variable; no other is started.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::failure::one_line;

/// How often the status is sent.
const INTERVAL: Duration = Duration::from_secs(1);

/// The way to the service manager.
pub(crate) struct Notifier {
    socket: UnixDatagram,
    to: SocketAddr,
    /// The last status, and when it was sent.
    said: Option<(Instant, String)>,
}

impl Notifier {
    /// That of this process, if it has one that can be reached.
    pub(crate) fn of_process() -> Option<Self> {
        Self::to(&std::env::var_os("NOTIFY_SOCKET")?).ok()
    }

    /// To the socket `name`: a path, or with an `@` a name without a file.
    fn to(name: &OsStr) -> io::Result<Self> {
        let to = match name.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None if Path::new(name).is_absolute() => SocketAddr::from_pathname(name)?,
            None => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, to, said: None })
    }

    /// Sends that the service is ready; `moved`, if this is not the process that the manager has started.
    pub(crate) fn ready(&self, moved: bool) {
        match moved {
            true => self.send(&format!("READY=1\nMAINPID={}", std::process::id())),
            false => self.send("READY=1"),
        }
    }

    /// Sends that the service ends.
    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// Sends `message` at once.
    fn send(&self, message: &str) {
        let _ = self.socket.send_to_addr(message.as_bytes(), &self.to);
    }

    /// Sends `text` as the status, if it is another one and the last is old enough.
    pub(crate) fn status(&mut self, text: &str) {
        let is_due = self.said.as_ref().is_none_or(|(at, said)| at.elapsed() >= INTERVAL && said != text);
        if is_due {
            self.last_status(text);
        }
    }

    /// Sends `text` as the status.
    pub(crate) fn last_status(&mut self, text: &str) {
        self.send(&format!("STATUS={}", one_line(text)));
        self.said = Some((Instant::now(), text.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_kinds_of_addresses_are_left_alone() {
        for name in ["", "notify", "vsock:2:1234", "@"] {
            let found = Notifier::to(OsStr::new(name));
            assert_eq!(found.is_ok(), name == "@", "{name}");
        }
        // No socket is there: what is sent is lost.
        let mut lost = Notifier::to(OsStr::new("/nonexistent/notify")).unwrap();
        lost.status("copy");
    }
}
