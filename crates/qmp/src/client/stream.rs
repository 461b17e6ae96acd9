//! A socket that values come from and text goes to, both until a deadline. Owned by the client.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::Value;

use super::error::ClientError;
use crate::json::Parser;

const BUFFER: usize = 16 << 10;

/// Until when, and how long that was from the start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// `limit` from now; one too far away for the clock is an hour from now.
    pub(super) fn after(limit: Duration) -> Self {
        let now = Instant::now();
        Self { at: now.checked_add(limit).unwrap_or(now + Duration::from_secs(3600)), limit }
    }

    /// Time left, as sockets take it: not zero, which would mean no limit.
    fn left(self) -> Option<Duration> {
        let left = self.at.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left.max(Duration::from_millis(1)))
    }

    fn over(self, what: &str) -> ClientError {
        ClientError::Timeout { what: what.into(), limit: self.limit }
    }

    fn failed(self, error: io::Error, what: &str) -> ClientError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.over(what),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
            _ => ClientError::Io { what: what.into(), cause: error },
        }
    }
}

#[derive(Debug)]
pub(super) struct Stream {
    socket: UnixStream,
    parser: Parser,
    /// Bytes that were read; those from `taken` on have not been parsed.
    buffer: Vec<u8>,
    taken: usize,
}

impl Stream {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, parser: Parser::default(), buffer: Vec::new(), taken: 0 }
    }

    pub(super) fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let connect = || -> io::Result<UnixStream> {
            let address = SocketAddrUnix::new(path)?;
            let socket = rustix::net::socket_with(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC,
                None,
            )?;
            // It bounds connecting too, where the server has let as many wait as it cares to.
            set_socket_timeout(&socket, Timeout::Send, Some(timeout.max(Duration::from_millis(1))))?;
            rustix::net::connect(&socket, &address)?;
            Ok(socket.into())
        };
        match connect() {
            Ok(socket) => Ok(Self::new(socket)),
            Err(source) if source.kind() == io::ErrorKind::WouldBlock => {
                Err(ClientError::Timeout { what: "connecting".into(), limit: timeout })
            }
            Err(cause) => Err(ClientError::Connect { path: path.into(), cause }),
        }
    }

    /// Ends the session from this side.
    pub(super) fn hang_up(&mut self) {
        // If it is over already, so much the better.
        let _ = self.socket.shutdown(Shutdown::Both);
        self.buffer.clear();
        self.taken = 0;
    }

    /// Sends all of `bytes`. If time is over in the middle of it the session is.
    pub(super) fn send(
        &mut self,
        mut bytes: &[u8],
        what: &str,
        deadline: Deadline,
    ) -> Result<(), ClientError> {
        while !bytes.is_empty() {
            let written = match deadline.left() {
                Some(left) => {
                    self.socket.set_write_timeout(Some(left)).and_then(|()| self.socket.write(bytes))
                }
                None => Err(io::ErrorKind::WouldBlock.into()),
            };
            match written {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.hang_up();
                    return Err(deadline.failed(e, what));
                }
            }
        }
        Ok(())
    }

    /// The next value.
    pub(super) fn value(&mut self, what: &str, deadline: Deadline) -> Result<Value, ClientError> {
        loop {
            let mut input = self.buffer.get(self.taken..).unwrap_or_default();
            let value = self.parser.next(&mut input);
            self.taken = self.buffer.len() - input.len();
            match value {
                Some(Ok(value)) => return Ok(value),
                Some(Err(error)) => {
                    self.hang_up();
                    return Err(ClientError::Protocol { what: error.to_string() });
                }
                None => {}
            }
            // Looked at before each read: a server that sends without end what is not waited for gains
            // nothing.
            let Some(left) = deadline.left() else {
                return Err(deadline.over(what));
            };
            self.buffer.resize(BUFFER, 0);
            self.taken = 0;
            let read =
                self.socket.set_read_timeout(Some(left)).and_then(|()| self.socket.read(&mut self.buffer));
            self.buffer.truncate(*read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Err(ClientError::Closed),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(deadline.failed(e, what)),
            }
        }
    }
}
