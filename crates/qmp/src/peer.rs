//! Who is at the other end of a monitor's socket.

use std::io;
use std::os::unix::net::UnixStream;

/// Who is at the other end of a unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// The process that connected.
    pub pid: u32,
    /// The user that connected.
    pub uid: u32,
    /// The group that connected.
    pub gid: u32,
}

impl Peer {
    /// Who connected to `socket`.
    pub(crate) fn of(socket: &UnixStream) -> io::Result<Self> {
        let cred = rustix::net::sockopt::socket_peercred(socket)?;
        Ok(Self {
            pid: cred.pid.as_raw_pid().cast_unsigned(),
            uid: cred.uid.as_raw(),
            gid: cred.gid.as_raw(),
        })
    }

    /// Whether the peer is root or the user that this process runs as.
    pub fn is_trusted(&self) -> bool {
        self.uid == 0 || self.uid == rustix::process::geteuid().as_raw()
    }
}
