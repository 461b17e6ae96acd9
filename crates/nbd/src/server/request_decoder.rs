//! The decoder of requests: from the bytes that a client sends to requests that are run or queued.
//!
//! One for each connection, locked by the worker that reads it. Bytes are received into a buffer of the
//! worker, so that an idle connection holds none; the payload of a long write is received straight into the
//! buffer that the device writes from.

use std::io;
use std::sync::Arc;

use blockmirror_block::{AlignedBuf, ByteRange};

use crate::proto::{Command, Errno, MAX_PAYLOAD, ReplyFormat, Request};

use super::connection::{Connection, Task};
use super::execute;
use super::export_runtime::BlockedRequest;
use super::memory::PooledBuf;
use super::negotiated_params::Failure;
use super::options::MAX_DESCRIPTORS;

/// Size of one receive.
const RECV_SIZE: usize = 64 << 10;
/// Replies of the reader are sent when they have this many bytes.
const SEND_THRESHOLD: usize = 256 << 10;
/// Longer requests are never run by the reader: two threads move bytes faster than one.
pub(crate) const MAX_INLINE: u64 = 64 << 10;

/// Bytes reserved for the answer to a block status request: descriptors of 16 bytes, and as much again for
/// what stands around them. Not left to the allocator: its arenas keep what one thread allocates and another
/// frees.
const STATUS_ROOM: u64 = 2 * 16 * MAX_DESCRIPTORS as u64;

/// Buffers of a worker, used for whichever connection it reads.
#[derive(Default)]
pub(crate) struct Scratch {
    input: AlignedBuf,
    /// Replies of requests that the reader ran, not sent yet.
    pub(crate) out: Vec<u8>,
    /// Requests for other workers.
    pub(crate) tasks: Vec<Task>,
}

/// What one call of [`RequestDecoder::read_some`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadOutcome {
    /// The socket may have more.
    More,
    /// The socket has no more bytes.
    WouldBlock,
    /// A request waits for memory, for others to end or for replies to be sent.
    Backpressured,
    /// The client has gone, or does not speak the protocol.
    End,
}

/// Decodes the stream of requests of one connection.
#[derive(Default)]
pub(crate) struct RequestDecoder {
    state: DecoderState,
    /// Bytes received behind a request that waits.
    rest: Vec<u8>,
}

enum DecoderState {
    /// In a header, of which `have` bytes have been received.
    Header { bytes: [u8; Request::EXTENDED_LEN], have: usize },
    /// A request that cannot be admitted yet.
    Waiting { request: Request, waits: bool },
    /// In the payload of a request that was admitted.
    Payload { request: Request, buf: PooledBuf, have: usize, held: u64, waits: Option<BlockedRequest> },
    /// In a payload that is discarded before the failure is answered.
    Skip { request: Request, left: u64, failure: Failure },
}

impl Default for DecoderState {
    fn default() -> Self {
        Self::Header { bytes: [0; Request::EXTENDED_LEN], have: 0 }
    }
}

/// What one step of decoding came to.
enum Step {
    /// So many bytes were used; go on.
    Used(usize),
    Backpressured,
    End,
}

impl RequestDecoder {
    /// Whether the rest of a request is awaited, of its header or of its payload.
    pub(crate) fn awaits_rest(&self) -> bool {
        match self.state {
            DecoderState::Header { have, .. } => have > 0,
            DecoderState::Payload { .. } | DecoderState::Skip { .. } => true,
            DecoderState::Waiting { .. } => false,
        }
    }

    /// Receives once, and runs the requests or leaves them in `scratch`.
    pub(crate) fn read_some(&mut self, connection: &Arc<Connection>, scratch: &mut Scratch) -> ReadOutcome {
        if connection.is_ending() {
            return self.end(connection);
        }
        if connection.is_backpressured() {
            return ReadOutcome::Backpressured;
        }
        if !self.rest.is_empty() || matches!(self.state, DecoderState::Waiting { .. }) {
            let rest = std::mem::take(&mut self.rest);
            return self.parse(connection, scratch, &rest).unwrap_or(ReadOutcome::More);
        }
        // The rest of a long payload is received in place.
        if let DecoderState::Payload { buf, have, .. } = &mut self.state
            && buf.len() - *have > RECV_SIZE
        {
            let room = buf.len() - *have;
            return match connection.recv(&mut buf[*have..]) {
                Ok(0) => self.end(connection),
                Ok(n) => {
                    *have += n;
                    let is_empty = n < room && connection.transport.short_means_drained();
                    let otherwise = if is_empty { ReadOutcome::WouldBlock } else { ReadOutcome::More };
                    self.parse(connection, scratch, &[]).unwrap_or(otherwise)
                }
                Err(e) => self.failed(connection, &e),
            };
        }
        let mut input = std::mem::take(&mut scratch.input);
        let outcome = match connection.recv(input.at_least(RECV_SIZE)) {
            Ok(0) => self.end(connection),
            Ok(n) => {
                let is_empty = n < RECV_SIZE && connection.transport.short_means_drained();
                let otherwise = if is_empty { ReadOutcome::WouldBlock } else { ReadOutcome::More };
                self.parse(connection, scratch, &input[..n]).unwrap_or(otherwise)
            }
            Err(e) => self.failed(connection, &e),
        };
        scratch.input = input;
        outcome
    }

    fn failed(&mut self, connection: &Connection, error: &io::Error) -> ReadOutcome {
        if error.kind() == io::ErrorKind::WouldBlock { ReadOutcome::WouldBlock } else { self.end(connection) }
    }

    /// Abandons what was begun.
    fn end(&mut self, connection: &Connection) -> ReadOutcome {
        self.rest = Vec::new();
        connection.account.withdraw();
        if let DecoderState::Payload { held, .. } = std::mem::take(&mut self.state) {
            connection.withdraw(held);
        }
        ReadOutcome::End
    }

    /// Decodes all of `bytes`; `None` if reading may go on.
    fn parse(
        &mut self,
        connection: &Arc<Connection>,
        scratch: &mut Scratch,
        mut bytes: &[u8],
    ) -> Option<ReadOutcome> {
        loop {
            if scratch.out.len() >= SEND_THRESHOLD {
                connection.send_scratch(scratch);
                if connection.is_backpressured() {
                    self.rest = bytes.to_vec();
                    return Some(ReadOutcome::Backpressured);
                }
            }
            match self.step(connection, scratch, bytes) {
                Step::Used(0) if bytes.is_empty() => return None,
                Step::Used(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Step::Backpressured => {
                    self.rest = bytes.to_vec();
                    return Some(ReadOutcome::Backpressured);
                }
                Step::End => return Some(self.end(connection)),
            }
        }
    }

    fn step(&mut self, connection: &Arc<Connection>, scratch: &mut Scratch, bytes: &[u8]) -> Step {
        match &mut self.state {
            DecoderState::Header { bytes: header, have } => {
                let extended = connection.params.format == ReplyFormat::Extended;
                let len = if extended { Request::EXTENDED_LEN } else { Request::COMPACT_LEN };
                let n = bytes.len().min(len - *have);
                header[*have..*have + n].copy_from_slice(&bytes[..n]);
                *have += n;
                if *have < len {
                    return Step::Used(n);
                }
                let decoded = match header.first_chunk() {
                    Some(compact) if !extended => Request::decode_compact(compact),
                    _ => Request::decode_extended(header),
                };
                *have = 0;
                match decoded {
                    Ok(request) => self.begin(connection, scratch, &request, &bytes[n..], n),
                    Err(_) => Step::End,
                }
            }
            DecoderState::Waiting { request, waits } => {
                let (request, waits) = (*request, *waits);
                self.state = DecoderState::default();
                self.admit(connection, scratch, &request, waits)
            }
            DecoderState::Payload { buf, have, .. } => {
                let n = bytes.len().min(buf.len() - *have);
                buf[*have..*have + n].copy_from_slice(&bytes[..n]);
                *have += n;
                if *have == buf.len()
                    && let DecoderState::Payload { request, buf, held, waits, .. } =
                        std::mem::take(&mut self.state)
                {
                    let connection = Arc::clone(connection);
                    scratch.tasks.push(Task { connection, request, buf: Some(buf), held, waits });
                }
                Step::Used(n)
            }
            DecoderState::Skip { request, left, failure } => {
                let n = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= n as u64;
                if *left == 0 {
                    connection.encoder().failure(&mut scratch.out, request, failure);
                    self.state = DecoderState::default();
                }
                Step::Used(n)
            }
        }
    }

    /// A header is complete; `after` is what was received behind it, and `used` bytes were taken up to here.
    fn begin(
        &mut self,
        connection: &Arc<Connection>,
        scratch: &mut Scratch,
        request: &Request,
        after: &[u8],
        used: usize,
    ) -> Step {
        if request.command == Command::Disconnect {
            return Step::End;
        }
        let params = &connection.params;
        let payload = params.payload_len(request);
        if let Err(failure) = params.check(request) {
            if payload == 0 {
                connection.encoder().failure(&mut scratch.out, request, &failure);
            } else if payload > u64::from(MAX_PAYLOAD) {
                connection.encoder().failure(&mut scratch.out, request, &failure);
                return Step::End;
            } else {
                self.state = DecoderState::Skip { request: *request, left: payload, failure };
            }
            return Step::Used(used);
        }
        if payload > u64::from(MAX_PAYLOAD) {
            let failure = Failure::new(Errno::INVAL, "longer than 32 MiB");
            connection.encoder().failure(&mut scratch.out, request, &failure);
            return Step::End;
        }
        // Requests for other workers run after those that the reader runs now. All are in flight, so any
        // order is right.
        let policy = connection.runtime.dispatch_policy(request.command);
        let inline = policy.runs_inline() && scratch.out.len() <= SEND_THRESHOLD;
        let moved = if request.command == Command::Read { request.length } else { payload };
        // `moved` is at most 32 MiB.
        let len = usize::try_from(moved).unwrap_or(usize::MAX);
        let waits = matches!(request.command, Command::Write | Command::WriteZeroes | Command::Trim)
            && connection.device().write_would_wait(ByteRange::at(request.offset, request.length));
        if inline && !waits && moved <= MAX_INLINE && (payload == 0 || after.len() >= len) {
            let timer = policy.start_inline();
            if request.command == Command::Read {
                execute::read_inline(connection, request, &mut scratch.out, len);
                timer.stop(moved);
                return Step::Used(used);
            }
            let data = if payload == 0 { &[] } else { &after[..len] };
            execute::run(connection, request, data, &mut scratch.out);
            timer.stop(moved);
            return Step::Used(used + data.len());
        }
        // If it has to wait, the next step says so: the header has been consumed all the same.
        let _ = self.admit(connection, scratch, request, waits);
        Step::Used(used)
    }

    /// Admits a request, or has it wait.
    fn admit(
        &mut self,
        connection: &Arc<Connection>,
        scratch: &mut Scratch,
        request: &Request,
        waits: bool,
    ) -> Step {
        let payload = connection.params.payload_len(request);
        let held = match request.command {
            Command::Read => request.length,
            // The length of the answer is not known yet.
            Command::BlockStatus => STATUS_ROOM.max(payload),
            _ => payload,
        };
        if !connection.admit(held, waits) {
            self.state = DecoderState::Waiting { request: *request, waits };
            return Step::Backpressured;
        }
        let mut buf = None;
        if held > 0 {
            // Lengths are limited to 32 MiB where requests are checked.
            let len = usize::try_from(held).unwrap_or(usize::MAX);
            buf = connection.account.alloc(len, connection);
            if buf.is_none() {
                connection.withdraw(held);
                self.state = DecoderState::Waiting { request: *request, waits };
                return Step::Backpressured;
            }
        }
        let waits = waits.then(|| connection.runtime.note_blocked());
        match buf {
            Some(mut buf) if payload > 0 => {
                buf.shorten(usize::try_from(payload).unwrap_or(usize::MAX));
                self.state = DecoderState::Payload { request: *request, buf, have: 0, held, waits };
            }
            buf => {
                let connection = Arc::clone(connection);
                scratch.tasks.push(Task { connection, request: *request, buf, held, waits });
            }
        }
        Step::Used(0)
    }
}
