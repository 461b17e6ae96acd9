//! A TCP or Unix domain socket to a server: connecting within a time limit, and whole reads and writes.
//!
//! `&self` everywhere: one thread may read while another writes and a third shuts it down, which ends the
//! calls of the first two.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::cancel::{self, POLL_INTERVAL};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, connect_unspec, socket_with, sockopt,
};

use crate::NbdAddress;

/// How often a connection attempt checks whether it was cancelled.
const SLICE: Duration = Duration::from_millis(50);

/// What a Unix domain socket may hold, if the system allows it.
const UNIX_BUFFER: usize = 2 << 20;

#[derive(Debug)]
pub(crate) enum ClientSocket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

macro_rules! either {
    ($socket:expr, $stream:ident => $do:expr) => {
        match $socket {
            ClientSocket::Tcp($stream) => $do,
            ClientSocket::Unix($stream) => $do,
        }
    };
}

impl ClientSocket {
    /// Connects before `deadline`, unless it is cancelled meanwhile.
    ///
    /// `peer_timeout` is how long a TCP peer may keep silent before the connection counts as broken.
    pub(crate) fn connect(
        address: &NbdAddress,
        deadline: Instant,
        peer_timeout: Option<Duration>,
        is_cancelled: &dyn Fn() -> bool,
    ) -> io::Result<Self> {
        match address {
            NbdAddress::Unix(path) => connect_unix(path, deadline, is_cancelled).map(Self::Unix),
            NbdAddress::Tcp { host, port } => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match connect_tcp(address, deadline, is_cancelled) {
                        Ok(stream) => {
                            tune_tcp(&stream, peer_timeout)?;
                            return Ok(Self::Tcp(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    /// Ends every read and write on it, now and later.
    pub(crate) fn shut_down(&self) {
        // It may be shut down already.
        let _ = either!(self, stream => stream.shutdown(Shutdown::Both));
    }

    /// The same, and what was written and has not reached the peer's host never will.
    ///
    /// The kernel goes on sending what a TCP socket that was shut down has queued. Where a network comes back
    /// after the connection was lost, the server would take old writes from it, after newer ones that
    /// came by another connection.
    pub(crate) fn abort(&self) {
        if let Self::Tcp(stream) = self {
            // Where the kernel does not disconnect while other threads wait, closing the socket does.
            let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
            let _ = connect_unspec(stream);
        }
        self.shut_down();
    }

    /// How long one read or write waits before it fails with `WouldBlock`.
    pub(crate) fn set_timeout(&self, limit: Duration) -> io::Result<()> {
        either!(self, stream => {
            stream.set_read_timeout(Some(limit))?;
            stream.set_write_timeout(Some(limit))
        })
    }

    /// Reads into `dest`, and what else has arrived into `spill`.
    pub(crate) fn read(&self, dest: &mut [u8], spill: &mut [u8]) -> io::Result<usize> {
        let mut slices = [IoSliceMut::new(dest), IoSliceMut::new(spill)];
        loop {
            match either!(self, stream => (&mut &*stream).read_vectored(&mut slices)) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Writes all of `left`, from which it takes what was written. Fails with `WouldBlock` if that is not
    /// done at `deadline`, and with `Interrupted` if it waits and the calling thread is cancelled.
    pub(crate) fn write_all(
        &self,
        left: &mut &mut [IoSlice<'_>],
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        IoSlice::advance_slices(left, 0);
        while !left.is_empty() {
            match either!(self, stream => (&mut &*stream).write_vectored(left)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(left, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
            if !left.is_empty() && cancel::is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if !left.is_empty() && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(())
    }
}

/// A socket during the handshake: every call ends at one deadline, or when the calling thread is cancelled.
pub(crate) struct Timed<'a> {
    pub(crate) socket: &'a ClientSocket,
    pub(crate) deadline: Instant,
}

impl Timed<'_> {
    fn arm(&self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || cancel::is_cancelled() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_timeout(left.min(POLL_INTERVAL))
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            self.arm()?;
            match self.socket.read(buf, &mut []) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        loop {
            self.arm()?;
            match either!(self.socket, stream => (&mut &*stream).write(buf)) {
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn check(deadline: Instant, is_cancelled: &dyn Fn() -> bool) -> io::Result<()> {
    if is_cancelled() {
        return Err(io::ErrorKind::Interrupted.into());
    }
    if Instant::now() >= deadline { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
}

fn stream_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(family, SocketType::STREAM, flags, None)?)
}

fn connect_unix(path: &Path, deadline: Instant, is_cancelled: &dyn Fn() -> bool) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    let address = match bytes.strip_prefix(b"\0") {
        Some(name) => SocketAddrUnix::new_abstract_name(name),
        None => SocketAddrUnix::new(bytes),
    }?;
    let fd = stream_socket(AddressFamily::UNIX)?;
    loop {
        check(deadline, is_cancelled)?;
        match connect(&fd, &address) {
            Ok(()) => break,
            Err(Errno::INTR) => {}
            // The server's queue is full; there is nothing to poll for.
            Err(Errno::AGAIN) => thread::sleep(SLICE / 5),
            Err(error) => return Err(error.into()),
        }
    }
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    // A larger buffer saves switches between the two ends; without it things work as well.
    let _ = sockopt::set_socket_send_buffer_size(&stream, UNIX_BUFFER);
    Ok(stream)
}

fn connect_tcp(
    address: SocketAddr,
    deadline: Instant,
    is_cancelled: &dyn Fn() -> bool,
) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = stream_socket(family)?;
    match connect(&fd, &address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => loop {
            check(deadline, is_cancelled)?;
            let slice = SLICE.min(deadline.saturating_duration_since(Instant::now()));
            let slice = Timespec { tv_sec: 0, tv_nsec: i64::from(slice.subsec_nanos()) };
            match poll(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(&slice)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => break sockopt::socket_error(&fd)??,
                Err(error) => return Err(error.into()),
            }
        },
        Err(error) => return Err(error.into()),
    }
    let stream = TcpStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn tune_tcp(stream: &TcpStream, peer_timeout: Option<Duration>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let Some(limit) = peer_timeout else { return Ok(()) };
    let fd = stream.as_fd();
    // Probes while nothing is under way, and a limit for what is sent and never acknowledged.
    let third = (limit / 3).max(Duration::from_secs(1));
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, third)?;
    sockopt::set_tcp_keepintvl(fd, third)?;
    sockopt::set_tcp_keepcnt(fd, 2)?;
    sockopt::set_tcp_user_timeout(fd, u32::try_from(limit.as_millis()).unwrap_or(u32::MAX))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use blockmirror_block::cancel::CancelSource;

    use super::*;

    /// A socket whose peer has read nothing of what fills it, and that peer.
    fn filled() -> (ClientSocket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = ClientSocket::Tcp(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let (peer, _) = listener.accept().unwrap();
        socket.set_timeout(Duration::from_millis(100)).unwrap();
        while socket.write_all(&mut &mut [IoSlice::new(&[1; 65_536])][..], Some(Instant::now())).is_ok() {}
        (socket, peer)
    }

    fn read_to_end(mut peer: &TcpStream) -> io::Result<u64> {
        io::copy(&mut peer, &mut io::sink())
    }

    /// Old writes reached a server after the network had come back, and after newer ones.
    #[test]
    fn what_is_queued_in_an_aborted_socket_is_not_delivered() {
        let (socket, peer) = filled();
        socket.abort();
        assert_eq!(read_to_end(&peer).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let (socket, peer) = filled();
        socket.shut_down();
        read_to_end(&peer).unwrap();
    }

    #[test]
    fn a_cancelled_caller_takes_a_request_back_of_which_nothing_was_sent() {
        let (ours, _peer) = UnixStream::pair().unwrap();
        let socket = ClientSocket::Unix(ours);
        socket.set_timeout(Duration::from_millis(10)).unwrap();
        let send = |bytes: &[u8]| socket.write_all(&mut &mut [IoSlice::new(bytes)][..], Some(Instant::now()));
        while send(&[1; 65_536]).is_ok() {}
        while send(&[1]).is_ok() {}
        let calls = CancelSource::new();
        let _calls = calls.enter();
        calls.cancel();
        let mut slices = [IoSlice::new(&[1; 28]), IoSlice::new(&[2; 512])];
        let mut left = &mut slices[..];
        assert_eq!(socket.write_all(&mut left, None).unwrap_err().kind(), io::ErrorKind::Interrupted);
        assert_eq!(left.iter().map(|slice| slice.len()).sum::<usize>(), 540);
    }

    #[test]
    fn a_read_that_waits_ends_when_its_socket_is_aborted() {
        let (socket, _peer) = filled();
        socket.set_timeout(Duration::from_secs(3600)).unwrap();
        thread::scope(|scope| {
            let read = scope.spawn(|| socket.read(&mut [0; 16], &mut []));
            // Whether it waits already or not, it must end.
            thread::yield_now();
            socket.abort();
            assert!(!read.join().unwrap().is_ok_and(|bytes| bytes > 0));
        });
    }
}
