//! A connected socket, used without blocking; the caller waits where it has to.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, sockopt};

/// Room that is asked for in the kernel for replies of a local client: a long reply then takes few turns.
const LOCAL_SEND_BUFFER: usize = 1 << 20;
/// A silent remote peer is probed after this time, and again after each of the next intervals.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// A connected stream socket, Unix or TCP.
pub(crate) struct Socket(OwnedFd);

impl Socket {
    /// Takes the socket over and sets what suits its family; options that it has not are left alone.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        if sockopt::set_tcp_nodelay(&fd, true).is_ok() {
            let _ = sockopt::set_socket_keepalive(&fd, true);
            let _ = sockopt::set_tcp_keepidle(&fd, KEEPALIVE_IDLE);
            let _ = sockopt::set_tcp_keepintvl(&fd, KEEPALIVE_INTERVAL);
            let _ = sockopt::set_tcp_keepcnt(&fd, KEEPALIVE_PROBES);
        } else {
            let _ = sockopt::set_socket_send_buffer_size(&fd, LOCAL_SEND_BUFFER);
        }
        Self(fd)
    }

    /// Receives what is there; [`io::ErrorKind::WouldBlock`] if nothing is, zero at the end.
    pub(crate) fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::net::recv(&self.0, &mut *buf, RecvFlags::DONTWAIT) {
                Ok((_, n)) => return Ok(n),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Sends as much as there is room for; [`io::ErrorKind::WouldBlock`] if there is none.
    pub(crate) fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match rustix::net::sendmsg(&self.0, parts, &mut SendAncillaryBuffer::default(), flags) {
                Ok(n) => return Ok(n),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Waits until it can be read (or written), at most until `deadline`.
    pub(crate) fn wait(&self, write: bool, deadline: Instant) -> io::Result<()> {
        let events = if write { PollFlags::OUT } else { PollFlags::IN };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&self.0, events)], timeout.as_ref()) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Ends it in both directions: waiters wake up.
    pub(crate) fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }

    /// Ends what comes in: the reader sees the end, replies still go out.
    pub(crate) fn shutdown_read(&self) {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Read);
    }
}

impl Socket {
    /// Who is at the other end, for the log: an address, or the process that connected to a Unix socket.
    pub(crate) fn peer(&self) -> String {
        let address = rustix::net::getpeername(&self.0).ok().flatten();
        if let Some(address) = address.and_then(|address| SocketAddr::try_from(address).ok()) {
            return address.to_string();
        }
        match sockopt::socket_peercred(&self.0) {
            Ok(peer) => format!("pid {} uid {}", peer.pid.as_raw_pid(), peer.uid.as_raw()),
            Err(_) => "unknown".to_owned(),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
