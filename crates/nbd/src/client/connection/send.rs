//! Sending: one request at a time, each as a whole.
//!
//! Called by the connection. Must hold: what was begun is sent to its end, for the next request comes behind
//! it, and the requests of other callers must not fail because one is cancelled. So the rest of a request
//! whose caller is cancelled is copied (it is at most one payload) and sent by a thread, `nbd-send`, that has
//! the turn until then.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::ByteRange;

use super::{ClientConnection, Sink};
use crate::client::error::ClientError;
use crate::client::link::{Sent, Unsent, stream_error};
use crate::client::requests::{Expects, Op};
use crate::client::send_turn::Sending;
use crate::proto::{Command, CommandFlags, ReplyFormat, Request};

/// How long sending the disconnect request may take.
const GOODBYE: Duration = Duration::from_millis(200);

impl ClientConnection {
    /// Sends a disconnect request, if no other caller is using the socket.
    pub(crate) fn close(&self) {
        if let Some(_sending) = self.sending.try_take()
            && self.is_alive()
        {
            let op =
                Op { command: Command::Disconnect, flags: CommandFlags::NONE, range: ByteRange::default() };
            // There is no reply to this.
            let _ = self.write(op, 0, &[], Instant::now().checked_add(GOODBYE));
        }
        Self::fail_locked(&mut self.shared.lock(), &self.link, ClientError::Cancelled, true);
    }

    /// Sends a request; its cookie.
    pub(super) fn send(
        self: &Arc<Self>,
        op: Op,
        payload: &[u8],
        sink: &Sink<'_>,
        deadline: Option<Instant>,
    ) -> Result<u64, ClientError> {
        let cookie = {
            let mut shared = self.shared.lock();
            if let Some(error) = &shared.dead {
                return Err(error.clone());
            }
            let expects = match sink {
                Sink::Nothing => Expects::Nothing,
                Sink::Bytes(_) => Expects::Bytes,
                Sink::Status(_) => Expects::Status,
            };
            shared.requests.add(expects, deadline)
        };
        let Some(sending) = self.sending.take() else { return Err(self.withdraw(cookie)) };
        match self.write(op, cookie, payload, deadline) {
            Ok(Sent::Whole) => {}
            Ok(Sent::Nothing) => return Err(self.withdraw(cookie)),
            Ok(Sent::Part(rest)) => self.send_rest(sending, rest, deadline),
            Err(error) => self.fail(self.or_timed_out(error)),
        }
        Ok(cookie)
    }

    /// Takes back a request of which nothing was sent.
    fn withdraw(&self, cookie: u64) -> ClientError {
        let mut shared = self.shared.lock();
        if shared.handed_over.is_some_and(|(owner, _)| owner == cookie) {
            let why = ClientError::Violation(format!("a reply to request {cookie}, which was not sent"));
            Self::fail_locked(&mut shared, &self.link, why, false);
        }
        Self::remove(&mut shared, cookie);
        ClientError::Cancelled
    }

    fn send_rest(self: &Arc<Self>, sending: Sending, rest: Unsent, deadline: Option<Instant>) {
        let connection = Arc::clone(self);
        let send = move || {
            let _sending = sending;
            if let Err(error) = connection.link.send_rest(&rest, deadline) {
                connection.fail(connection.or_timed_out(stream_error(error)));
            }
        };
        if let Err(error) = thread::Builder::new().name("nbd-send".into()).spawn(send) {
            // A request that is cut off ends all that come behind it.
            self.fail(ClientError::lost(error));
        }
    }

    fn write(
        &self,
        op: Op,
        cookie: u64,
        payload: &[u8],
        deadline: Option<Instant>,
    ) -> Result<Sent, ClientError> {
        let extended = self.negotiated.format == ReplyFormat::Extended;
        let mut flags = op.flags;
        if extended && op.command == Command::Write {
            flags = flags | CommandFlags::PAYLOAD_LEN;
        }
        let request =
            Request { flags, command: op.command, cookie, offset: op.range.start(), length: op.range.len() };
        if extended {
            self.link.send(&request.encode_extended(), payload, deadline)
        } else {
            let Some(header) = request.encode_compact() else {
                return Err(ClientError::Unsuitable("takes no request that long".into()));
            };
            self.link.send(&header, payload, deadline)
        }
        .map_err(stream_error)
    }

    /// The error of a socket that would block after the deadline.
    pub(super) fn or_timed_out(&self, error: ClientError) -> ClientError {
        match (&error, self.io_timeout) {
            (ClientError::Lost(io), Some(limit)) if io.kind() == io::ErrorKind::WouldBlock => {
                ClientError::NoAnswer(limit)
            }
            _ => error,
        }
    }
}
