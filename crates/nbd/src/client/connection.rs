//! A connection in the transmission phase, shared by any number of calling threads.
//!
//! It has no thread: of the callers that wait for replies one reads the socket for all of them. It receives a
//! header; if the payload belongs to another caller, it hands the socket over to that one, which receives the
//! payload into its own buffer and then reads on. A caller whose reply is complete leaves the socket to
//! another. So nothing is copied, and the socket is read as long as a caller waits.
//!
//! A caller that is cancelled gives its request up and leaves the connection as it is: what is left of the
//! request is sent by a thread (`send`), and the reply is dropped when it comes (`requests`). The caller
//! leaves between replies; one that has begun to arrive is received to its end.
//!
//! A reply is accepted only as far as it fits a request in flight. The first thing that does not fit fails
//! the connection: after it, the position of the next header is unknown.

mod given_up;
mod send;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use blockmirror_block::cancel;
use blockmirror_block::sync::{Mutex, MutexGuard};

use super::coverage::Coverage;
use super::error::ClientError;
use super::handshake::NegotiatedExport;
use super::link::{Incoming, Link, stream_error};
use super::requests::{Expects, Op, Requests};
use super::send_turn::SendTurn;
use super::status::Status;
use crate::proto::{
    Chunk, ChunkHeader, Errno, ErrorChunk, MAX_STRING, OffsetData, OffsetHole, REPLY_SIMPLE_MAGIC,
    ReplyFormat, SimpleReply,
};

/// Longest payload of an error chunk: a number, a string with its length, an offset.
const MAX_ERROR: u64 = MAX_STRING as u64 + 14;

/// Most error chunks in one reply.
const MAX_ERRORS: u32 = 1024;

/// Where the payload of the reply goes.
#[derive(Debug)]
pub(crate) enum Sink<'a> {
    Nothing,
    /// The bytes of a read; as long as the range.
    Bytes(&'a mut [u8]),
    Status(&'a mut Status),
}

impl Sink<'_> {
    /// The same place, for a request that is performed again.
    pub(crate) fn again(&mut self) -> Sink<'_> {
        match self {
            Self::Nothing => Sink::Nothing,
            Self::Bytes(buf) => Sink::Bytes(buf),
            Self::Status(status) => {
                **status = Status::default();
                Sink::Status(status)
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Header {
    Simple(SimpleReply),
    Chunk(ChunkHeader),
}

impl Header {
    fn cookie(&self) -> u64 {
        match self {
            Self::Simple(reply) => reply.cookie,
            Self::Chunk(chunk) => chunk.cookie,
        }
    }
}

#[derive(Debug)]
struct Shared {
    /// The reading side; `None` while a caller reads.
    incoming: Option<Incoming>,
    /// A header whose payload comes next, and the request that it belongs to.
    handed_over: Option<(u64, Header)>,
    requests: Requests,
    dead: Option<ClientError>,
    /// A thread receives the replies to requests that were given up.
    receiving: bool,
}

#[derive(Debug)]
pub(crate) struct ClientConnection {
    link: Arc<Link>,
    negotiated: NegotiatedExport,
    /// The epoch of the pool that it belongs to.
    pub(crate) epoch: u64,
    /// How long one request may take.
    io_timeout: Option<Duration>,
    sending: Arc<SendTurn>,
    /// *Guards* the requests in flight and the turn of reading. *Order*: after `sending`. *Not under it*:
    /// I/O.
    shared: Mutex<Shared>,
    in_flight: AtomicU32,
}

impl ClientConnection {
    pub(crate) fn new(
        link: Link,
        negotiated: NegotiatedExport,
        epoch: u64,
        io_timeout: Option<Duration>,
    ) -> Self {
        let link = Arc::new(link);
        Self {
            shared: Mutex::new(Shared {
                incoming: Some(Incoming::new(Arc::clone(&link))),
                handed_over: None,
                requests: Requests::default(),
                dead: None,
                receiving: false,
            }),
            link,
            negotiated,
            epoch,
            io_timeout,
            sending: Arc::default(),
            in_flight: AtomicU32::new(0),
        }
    }

    pub(crate) fn negotiated(&self) -> &NegotiatedExport {
        &self.negotiated
    }

    /// Requests in flight.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Requests that their callers have given up, and that the server has not answered.
    pub(crate) fn given_up(&self) -> usize {
        self.shared.lock().requests.given_up()
    }

    /// Sends one request and waits for its whole reply.
    ///
    /// # Errors
    /// [`ClientError::Server`] if the server says that it failed; [`ClientError::Cancelled`] if the caller
    /// gave it up, the connection being good. All others: the connection is dead, and what the server has
    /// done is unknown.
    pub(crate) fn call(self: &Arc<Self>, op: Op, payload: &[u8], sink: Sink<'_>) -> Result<(), ClientError> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let deadline = self.deadline();
        let result = self
            .send(op, payload, &sink, deadline)
            .and_then(|cookie| self.await_reply(cookie, op, sink, deadline));
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        if matches!(result, Err(ClientError::Cancelled)) {
            self.receive_given_up();
        }
        result
    }

    /// When a request that is sent now counts as not answered.
    fn deadline(&self) -> Option<Instant> {
        self.io_timeout.and_then(|limit| Instant::now().checked_add(limit))
    }

    /// Whether it can still be used.
    pub(crate) fn is_alive(&self) -> bool {
        self.shared.lock().dead.is_none()
    }

    /// Fails the connection: every call in flight fails with `why`.
    pub(crate) fn fail(&self, why: ClientError) {
        Self::fail_locked(&mut self.shared.lock(), &self.link, why, false);
    }

    /// With `is_polite` what was sent still reaches the server.
    fn fail_locked(shared: &mut Shared, link: &Link, why: ClientError, is_polite: bool) {
        if shared.dead.is_none() {
            shared.dead = Some(why);
            if is_polite {
                link.socket().shut_down();
            } else {
                link.socket().abort();
            }
            shared.requests.wake_all();
        }
    }

    /// Waits for the reply to `cookie` until `deadline`, and reads for other callers if no other does.
    fn await_reply(
        &self,
        cookie: u64,
        op: Op,
        mut sink: Sink<'_>,
        deadline: Option<Instant>,
    ) -> Result<(), ClientError> {
        let mut coverage = Coverage::new(op.range);
        let mut shared = self.shared.lock();
        loop {
            let state = &mut *shared;
            let Some(request) = state.requests.get_mut(cookie) else {
                return Err(ClientError::Cancelled);
            };
            let is_mine = |(owner, _): (u64, Header)| owner == cookie;
            if request.done {
                let error = request.error.take();
                let expects = request.expects;
                Self::remove(&mut shared, cookie);
                return match error {
                    Some(error) => Err(error),
                    None => self.check_whole(shared, expects, &coverage, &sink),
                };
            }
            if let Some(error) = state.dead.clone() {
                Self::remove(&mut shared, cookie);
                return Err(error);
            }
            if cancel::is_cancelled() && !state.handed_over.is_some_and(is_mine) {
                state.requests.give_up(cookie, op);
                Self::wake_reader(&shared);
                return Err(ClientError::Cancelled);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if let (Some(limit), Some(Duration::ZERO)) = (self.io_timeout, left) {
                Self::fail_locked(&mut shared, &self.link, ClientError::NoAnswer(limit), false);
                continue;
            }
            let free = if state.handed_over.is_none_or(is_mine) { state.incoming.take() } else { None };
            let Some(mut incoming) = free else {
                let wake = state.requests.sleep(cookie);
                shared = cancel::wait(&wake, shared, left);
                if let Some(request) = shared.requests.get_mut(cookie) {
                    request.waiting = false;
                }
                continue;
            };
            let handed_over = state.handed_over.take();
            incoming.deadline = state.requests.first_deadline();
            drop(shared);
            let taken = self.read_one(&mut incoming, handed_over, cookie, &mut coverage, &mut sink);
            shared = self.shared.lock();
            shared.incoming = Some(incoming);
            if let Some((owner, _)) = shared.handed_over
                && let Some(request) = shared.requests.get_mut(owner)
            {
                request.wake.notify_one();
            }
            match taken {
                Ok(false) => {}
                Ok(true) => {
                    if let Some(request) = shared.requests.get_mut(cookie) {
                        request.done = true;
                    }
                }
                Err(error) => Self::fail_locked(&mut shared, &self.link, self.or_timed_out(error), false),
            }
        }
    }

    /// Handles the header that was handed over, or receives one. Whether the reply to `mine` ends with it.
    fn read_one(
        &self,
        incoming: &mut Incoming,
        handed_over: Option<(u64, Header)>,
        mine: u64,
        coverage: &mut Coverage,
        sink: &mut Sink<'_>,
    ) -> Result<bool, ClientError> {
        let header = match handed_over {
            Some((_, header)) => Some(header),
            None => match self.step(incoming, mine) {
                // The caller was cancelled before anything of a reply had come.
                Err(ClientError::Lost(error)) if error.kind() == io::ErrorKind::Interrupted => None,
                step => step?,
            },
        };
        header.map_or(Ok(false), |header| self.take(incoming, header, coverage, sink))
    }

    /// Removes the request, and wakes a waiting caller to read if none does.
    fn remove(shared: &mut Shared, cookie: u64) {
        shared.requests.remove(cookie);
        Self::wake_reader(shared);
    }

    /// Wakes a waiting caller to read if none does.
    fn wake_reader(shared: &Shared) {
        if shared.incoming.is_some() && shared.handed_over.is_none() {
            shared.requests.wake_one();
        }
    }

    /// Fails if a reply without an error did not bring all of the bytes.
    fn check_whole(
        &self,
        mut shared: MutexGuard<'_, Shared>,
        expects: Expects,
        coverage: &Coverage,
        sink: &Sink<'_>,
    ) -> Result<(), ClientError> {
        let whole = match (expects, sink) {
            (Expects::Bytes, _) => coverage.is_complete(),
            (Expects::Status, Sink::Status(status)) => status.is_complete(&self.negotiated),
            _ => true,
        };
        if whole {
            return Ok(());
        }
        let error = ClientError::Violation("a reply ends before all of it was sent".into());
        Self::fail_locked(&mut shared, &self.link, error.clone(), false);
        Err(error)
    }

    /// Receives one header and handles what needs no payload. Returns the header if its payload is for
    /// `mine`; one for another request is handed over.
    fn step(&self, incoming: &mut Incoming, mine: u64) -> Result<Option<Header>, ClientError> {
        let header = self.header(incoming)?;
        let cookie = header.cookie();
        let mut shared = self.shared.lock();
        let Some(request) = shared.requests.unanswered(cookie) else {
            return Err(ClientError::Violation(format!("a reply to request {cookie}, which waits for none")));
        };
        if let Some(len) = request.given_up() {
            let len = if request.expects == Expects::Bytes { len } else { 0 };
            drop(shared);
            return self.drop_reply(incoming, header, len).map(|()| None);
        }
        let surprise =
            |what: &str| Err(ClientError::Violation(format!("{what} in answer to request {cookie}")));
        match header {
            Header::Simple(SimpleReply { error: Some(error), .. }) => {
                request.error.get_or_insert(ClientError::Server {
                    error,
                    message: String::new(),
                    repeated: false,
                });
            }
            Header::Simple(_) => match request.expects {
                Expects::Nothing => {}
                Expects::Bytes if self.negotiated.format == ReplyFormat::Simple => {
                    return Ok(Self::hand_over(&mut shared, mine, cookie, header));
                }
                Expects::Bytes | Expects::Status => return surprise("a simple reply"),
            },
            Header::Chunk(chunk) if chunk.kind.is_error() => {
                request.errors += 1;
                if request.errors > MAX_ERRORS || chunk.length > MAX_ERROR {
                    return surprise("too many errors");
                }
                drop(shared);
                let error = error_chunk(incoming, chunk)?;
                shared = self.shared.lock();
                let Some(request) = shared.requests.get_mut(cookie) else { return Ok(None) };
                request.error.get_or_insert(error);
                if !chunk.is_done() {
                    return Ok(None);
                }
            }
            Header::Chunk(chunk) => {
                return match (chunk.kind, request.expects) {
                    (Chunk::None, _) if chunk.length == 0 && chunk.is_done() => {
                        shared.requests.answered(mine, cookie);
                        Ok(None)
                    }
                    (Chunk::OffsetData | Chunk::OffsetHole, Expects::Bytes)
                    | (Chunk::BlockStatus | Chunk::BlockStatusExt, Expects::Status) => {
                        Ok(Self::hand_over(&mut shared, mine, cookie, header))
                    }
                    (kind, _) => surprise(&format!("a chunk {kind:?} of {} bytes", chunk.length)),
                };
            }
        }
        shared.requests.answered(mine, cookie);
        Ok(None)
    }

    /// Receives what follows `header`, which answers a request that was given up; `len` bytes follow a simple
    /// reply without an error.
    fn drop_reply(&self, incoming: &mut Incoming, header: Header, len: u64) -> Result<(), ClientError> {
        let (bytes, is_last) = match header {
            Header::Simple(SimpleReply { error: None, .. }) => (len, true),
            Header::Simple(_) => (0, true),
            Header::Chunk(chunk) => (chunk.length, chunk.is_done()),
        };
        self.shared.lock().requests.drop_bytes(header.cookie(), bytes)?;
        incoming.skip(bytes).map_err(stream_error)?;
        if is_last {
            // No caller has this cookie.
            self.shared.lock().requests.answered(0, header.cookie());
        }
        Ok(())
    }

    fn hand_over(shared: &mut Shared, mine: u64, cookie: u64, header: Header) -> Option<Header> {
        if cookie == mine {
            return Some(header);
        }
        // Its caller is woken once the socket is released.
        shared.handed_over = Some((cookie, header));
        None
    }

    fn header(&self, incoming: &mut Incoming) -> Result<Header, ClientError> {
        if self.negotiated.format == ReplyFormat::Extended {
            let mut bytes = [0; ChunkHeader::EXTENDED_LEN];
            incoming.begin(&mut bytes).map_err(stream_error)?;
            return Ok(Header::Chunk(ChunkHeader::decode_extended(&bytes)?));
        }
        let mut bytes = [0; ChunkHeader::STRUCTURED_LEN];
        let (simple, rest) = bytes.split_at_mut(SimpleReply::LEN);
        incoming.begin(simple).map_err(stream_error)?;
        if simple[..4] == REPLY_SIMPLE_MAGIC.to_be_bytes() || self.negotiated.format == ReplyFormat::Simple {
            let mut reply = [0; SimpleReply::LEN];
            reply.copy_from_slice(simple);
            return Ok(Header::Simple(SimpleReply::decode(&reply)?));
        }
        incoming.read_exact(rest).map_err(stream_error)?;
        Ok(Header::Chunk(ChunkHeader::decode_structured(&bytes)?))
    }

    /// Receives the payload that follows `header`, which is the caller's own. Whether the reply ends with it.
    fn take(
        &self,
        incoming: &mut Incoming,
        header: Header,
        coverage: &mut Coverage,
        sink: &mut Sink<'_>,
    ) -> Result<bool, ClientError> {
        let chunk = match (header, &mut *sink) {
            (Header::Simple(_), Sink::Bytes(buf)) => {
                coverage.add_all()?;
                incoming.read_exact(buf).map_err(stream_error)?;
                return Ok(true);
            }
            (Header::Chunk(chunk), _) => chunk,
            (Header::Simple(_), _) => return Ok(true),
        };
        match (chunk.kind, sink) {
            (Chunk::OffsetData, Sink::Bytes(buf)) => {
                let len = chunk.length.checked_sub(OffsetData::LEN as u64).ok_or_else(|| {
                    ClientError::Violation(format!("a data chunk of {} bytes", chunk.length))
                })?;
                let data = OffsetData::decode(incoming.array().map_err(stream_error)?);
                let piece = coverage.add(data.offset, len)?;
                incoming.read_exact(coverage.slice(buf, piece)).map_err(stream_error)?;
            }
            (Chunk::OffsetHole, Sink::Bytes(buf)) => {
                if chunk.length != OffsetHole::LEN as u64 {
                    return Err(ClientError::Violation(format!("a hole chunk of {} bytes", chunk.length)));
                }
                let bytes: [u8; OffsetHole::LEN] = incoming.array().map_err(stream_error)?;
                let hole = OffsetHole::decode(&bytes)?;
                let piece = coverage.add(hole.offset, u64::from(hole.length))?;
                coverage.slice(buf, piece).fill(0);
            }
            (kind, Sink::Status(status)) => {
                let extended = kind == Chunk::BlockStatusExt;
                if extended != (self.negotiated.format == ReplyFormat::Extended) {
                    return Err(ClientError::Violation(format!("a chunk {kind:?}, which was not agreed on")));
                }
                status.read(incoming, extended, chunk.length, &self.negotiated)?;
            }
            (kind, _) => return Err(ClientError::Violation(format!("a chunk {kind:?}"))),
        }
        Ok(chunk.is_done())
    }
}

/// What an error chunk says.
fn error_chunk(incoming: &mut Incoming, chunk: ChunkHeader) -> Result<ClientError, ClientError> {
    // The caller has checked the length.
    let mut payload = vec![0; chunk.length as usize];
    incoming.read_exact(&mut payload).map_err(stream_error)?;
    let (error, message) = match chunk.kind {
        Chunk::Error | Chunk::ErrorOffset => {
            let decoded = ErrorChunk::decode(&payload, chunk.kind == Chunk::ErrorOffset)?;
            (decoded.error, decoded.message.chars().filter(|c| !c.is_control()).collect())
        }
        _ => (Errno::IO, String::new()),
    };
    Ok(ClientError::Server { error, message, repeated: false })
}
