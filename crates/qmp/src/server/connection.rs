//! A way to a client: a reader, a writer, and how to wake up a thread that is blocked in either.
//! Made by the listeners and by callers of [`Monitors::serve`](super::Monitors::serve).

use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};

use crate::peer::Peer;
use crate::sync::Mutex;

/// A way to a client.
pub struct Connection {
    pub(super) reader: Box<dyn Read + Send>,
    pub(super) writer: Box<dyn Write + Send>,
    pub(super) close: Arc<dyn Fn() + Send + Sync>,
    pub(super) peer: Option<Peer>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Connection {
    /// Any stream. `close` is called when the session ends, more than once perhaps, and must make blocked
    /// reads and writes return.
    pub fn new(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        close: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        Self { reader: Box::new(reader), writer: Box::new(writer), close: Arc::new(close), peer: None }
    }

    /// A connected unix socket. The caller vouches for the peer.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn unix(socket: UnixStream) -> io::Result<Self> {
        let peer = Peer::of(&socket).ok();
        let reader = socket.try_clone()?;
        let writer = socket.try_clone()?;
        // A socket that is shut down already is what was wanted.
        let close = move || drop(socket.shutdown(Shutdown::Both));
        Ok(Self { peer, ..Self::new(reader, writer, close) })
    }

    /// A descriptor that can be read and written: a socket, a terminal.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn fd(fd: OwnedFd) -> io::Result<Self> {
        let writer = fd.try_clone()?;
        Self::fds(fd, writer)
    }

    /// A descriptor to read and one to write: two pipes.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn fds(reader: OwnedFd, writer: OwnedFd) -> io::Result<Self> {
        let (read_wake, end) = io::pipe()?;
        let write_wake = read_wake.try_clone()?;
        let end: Mutex<Option<PipeWriter>> = Mutex::new(Some(end));
        let close = move || drop(end.lock().take());
        Ok(Self::new(Polled { fd: reader, wake: read_wake }, Polled { fd: writer, wake: write_wake }, close))
    }

    /// Standard input and output.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn stdio() -> io::Result<Self> {
        Self::fds(io::stdin().as_fd().try_clone_to_owned()?, io::stdout().as_fd().try_clone_to_owned()?)
    }
}

/// A descriptor whose blocking calls end when the other end of `wake` is closed.
struct Polled {
    fd: OwnedFd,
    wake: PipeReader,
}

impl Polled {
    /// Waits for `what`; an error if the connection was closed meanwhile.
    fn ready(&self, what: PollFlags) -> io::Result<()> {
        loop {
            let mut fds =
                [PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN), PollFd::new(&self.fd, what)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !fds[0].revents().is_empty() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if !fds[1].revents().is_empty() {
                return Ok(());
            }
        }
    }
}

impl Read for Polled {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.ready(PollFlags::IN)?;
            match rustix::io::read(&self.fd, &mut *buffer) {
                // Another process reads the same terminal.
                Err(rustix::io::Errno::AGAIN) => {}
                result => return Ok(result?),
            }
        }
    }
}

impl Write for Polled {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A pipe that is ready takes this much without blocking.
        const PIPE_BUF: usize = 4096;
        let bytes = bytes.get(..PIPE_BUF).unwrap_or(bytes);
        loop {
            self.ready(PollFlags::OUT)?;
            match rustix::io::write(&self.fd, bytes) {
                Err(rustix::io::Errno::AGAIN) => {}
                result => return Ok(result?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
