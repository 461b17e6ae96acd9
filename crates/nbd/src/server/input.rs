//! Making requests of the bytes that a client sends.
//!
//! Owned by the worker that reads a connection. Bytes come in through a buffer of the worker, so that a
//! connection that is idle holds none; the payload of a long write goes straight to where the device takes it
//! from.

use std::io;
use std::sync::Arc;

use blockmirror_block::{AlignedBuf, ByteRange};

use crate::proto::{Command, Errno, MAX_PAYLOAD, Request};

use super::connection::{Connection, Task};
use super::execute;
use super::memory::Loan;
use super::options::MAX_DESCRIPTORS;
use super::served::Waiting;
use super::terms::{Failure, Mode};

/// What is received in one go.
const INPUT: usize = 64 << 10;
/// Replies of the reader are sent when they have grown to this.
const OUTPUT: usize = 256 << 10;
/// Longer requests are never done by the reader: two threads move bytes faster than one.
pub(crate) const INLINE: u64 = 64 << 10;

/// Room set aside for the answer to a block status request: descriptors of 16 bytes, and as much again for
/// what stands around them. Not left to the allocator: it keeps what one thread takes and another gives back.
const STATUS_ROOM: u64 = 2 * 16 * MAX_DESCRIPTORS as u64;

/// What a worker uses for whichever connection it reads.
#[derive(Default)]
pub(crate) struct Scratch {
    input: AlignedBuf,
    /// Replies made by the reader, not sent yet.
    pub(crate) out: Vec<u8>,
    /// Requests that the reader leaves to others.
    pub(crate) tasks: Vec<Task>,
}

/// How a turn of reading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// There may be more.
    More,
    /// The socket has nothing more.
    Drained,
    /// A request must wait until something is given back.
    Wait,
    /// The client has gone, or does not speak the protocol.
    End,
}

/// Where in the stream of requests the reader is.
#[derive(Default)]
pub(crate) struct Input {
    stage: Stage,
    /// Bytes received behind a request that has to wait.
    rest: Vec<u8>,
}

enum Stage {
    /// In a header, of which these bytes are there.
    Header { bytes: [u8; Request::EXTENDED_LEN], have: usize },
    /// Before the request can go on there must be room.
    Waiting { request: Request, waits: bool },
    /// In the payload of a request that was admitted.
    Payload { request: Request, buf: Loan, have: usize, held: u64, waits: Option<Waiting> },
    /// In a payload that is thrown away, before the failure is answered.
    Skip { request: Request, left: u64, failure: Failure },
}

impl Default for Stage {
    fn default() -> Self {
        Self::Header { bytes: [0; Request::EXTENDED_LEN], have: 0 }
    }
}

/// What parsing a piece of the stream came to.
enum Step {
    /// So many bytes were used; go on.
    Used(usize),
    Wait,
    End,
}

impl Input {
    /// Whether the rest of a request is awaited.
    pub(crate) fn awaits_payload(&self) -> bool {
        matches!(self.stage, Stage::Payload { .. } | Stage::Skip { .. })
    }

    /// Takes in what is there, and does it or leaves it in `scratch`.
    pub(crate) fn turn(&mut self, connection: &Arc<Connection>, scratch: &mut Scratch) -> Turn {
        if connection.is_cut() {
            return self.end(connection);
        }
        if connection.is_congested() {
            return Turn::Wait;
        }
        if !self.rest.is_empty() || matches!(self.stage, Stage::Waiting { .. }) {
            let rest = std::mem::take(&mut self.rest);
            return self.parse(connection, scratch, &rest).unwrap_or(Turn::More);
        }
        // The rest of a long payload goes straight where it belongs.
        if let Stage::Payload { buf, have, .. } = &mut self.stage
            && buf.len() - *have > INPUT
        {
            let room = buf.len() - *have;
            return match connection.recv(&mut buf[*have..]) {
                Ok(0) => self.end(connection),
                Ok(n) => {
                    *have += n;
                    let drained = n < room && connection.transport.short_means_drained();
                    let otherwise = if drained { Turn::Drained } else { Turn::More };
                    self.parse(connection, scratch, &[]).unwrap_or(otherwise)
                }
                Err(e) => self.failed(connection, &e),
            };
        }
        let mut input = std::mem::take(&mut scratch.input);
        let turn = match connection.recv(input.at_least(INPUT)) {
            Ok(0) => self.end(connection),
            Ok(n) => {
                let drained = n < INPUT && connection.transport.short_means_drained();
                let otherwise = if drained { Turn::Drained } else { Turn::More };
                self.parse(connection, scratch, &input[..n]).unwrap_or(otherwise)
            }
            Err(e) => self.failed(connection, &e),
        };
        scratch.input = input;
        turn
    }

    fn failed(&mut self, connection: &Connection, error: &io::Error) -> Turn {
        if error.kind() == io::ErrorKind::WouldBlock { Turn::Drained } else { self.end(connection) }
    }

    /// Gives up what was begun.
    fn end(&mut self, connection: &Connection) -> Turn {
        self.rest = Vec::new();
        if let Stage::Payload { held, .. } = std::mem::take(&mut self.stage) {
            connection.withdraw(held);
        }
        Turn::End
    }

    /// Uses up `bytes`; `None` if nothing stands against reading on.
    fn parse(
        &mut self,
        connection: &Arc<Connection>,
        scratch: &mut Scratch,
        mut bytes: &[u8],
    ) -> Option<Turn> {
        loop {
            if scratch.out.len() >= OUTPUT {
                connection.send_scratch(scratch);
                if connection.is_congested() {
                    self.rest = bytes.to_vec();
                    return Some(Turn::Wait);
                }
            }
            match self.step(connection, scratch, bytes) {
                Step::Used(0) if bytes.is_empty() => return None,
                Step::Used(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Step::Wait => {
                    self.rest = bytes.to_vec();
                    return Some(Turn::Wait);
                }
                Step::End => return Some(self.end(connection)),
            }
        }
    }

    fn step(&mut self, connection: &Arc<Connection>, scratch: &mut Scratch, bytes: &[u8]) -> Step {
        match &mut self.stage {
            Stage::Header { bytes: header, have } => {
                let extended = connection.terms.mode == Mode::Extended;
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
            Stage::Waiting { request, waits } => {
                let (request, waits) = (*request, *waits);
                self.stage = Stage::default();
                self.admit(connection, scratch, &request, waits)
            }
            Stage::Payload { buf, have, .. } => {
                let n = bytes.len().min(buf.len() - *have);
                buf[*have..*have + n].copy_from_slice(&bytes[..n]);
                *have += n;
                if *have == buf.len()
                    && let Stage::Payload { request, buf, held, waits, .. } = std::mem::take(&mut self.stage)
                {
                    let connection = Arc::clone(connection);
                    scratch.tasks.push(Task { connection, request, buf: Some(buf), held, waits });
                }
                Step::Used(n)
            }
            Stage::Skip { request, left, failure } => {
                let n = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= n as u64;
                if *left == 0 {
                    connection.encoder().failure(&mut scratch.out, request, failure);
                    self.stage = Stage::default();
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
        let terms = &connection.terms;
        let payload = terms.payload_len(request);
        if let Err(failure) = terms.check(request) {
            if payload == 0 {
                connection.encoder().failure(&mut scratch.out, request, &failure);
            } else if payload > u64::from(MAX_PAYLOAD) {
                connection.encoder().failure(&mut scratch.out, request, &failure);
                return Step::End;
            } else {
                self.stage = Stage::Skip { request: *request, left: payload, failure };
            }
            return Step::Used(used);
        }
        if payload > u64::from(MAX_PAYLOAD) {
            let failure = Failure::new(Errno::INVAL, "longer than 32 MiB");
            connection.encoder().failure(&mut scratch.out, request, &failure);
            return Step::End;
        }
        // What is left to others would be done after what the reader does now; both are in flight, so any
        // order is right.
        let pace = connection.served.pace(request.command);
        let quick = pace.is_quick() && scratch.out.len() <= OUTPUT;
        let moved = if request.command == Command::Read { request.length } else { payload };
        // `moved` is at most 32 MiB.
        let len = usize::try_from(moved).unwrap_or(usize::MAX);
        let waits = matches!(request.command, Command::Write | Command::WriteZeroes | Command::Trim)
            && connection.device().write_would_wait(ByteRange::at(request.offset, request.length));
        if quick && !waits && moved <= INLINE && (payload == 0 || after.len() >= len) {
            let watch = pace.start_alone();
            if request.command == Command::Read {
                execute::read_inline(connection, request, &mut scratch.out, len);
                watch.stop(moved);
                return Step::Used(used);
            }
            let data = if payload == 0 { &[] } else { &after[..len] };
            execute::run(connection, request, data, &mut scratch.out);
            watch.stop(moved);
            return Step::Used(used + data.len());
        }
        // If it has to wait, the next step says so: the header is used up all the same.
        let _ = self.admit(connection, scratch, request, waits);
        Step::Used(used)
    }

    /// Finds room for a request, or has it wait.
    fn admit(
        &mut self,
        connection: &Arc<Connection>,
        scratch: &mut Scratch,
        request: &Request,
        waits: bool,
    ) -> Step {
        let payload = connection.terms.payload_len(request);
        let held = match request.command {
            Command::Read => request.length,
            // How much will be said is not known yet.
            Command::BlockStatus => STATUS_ROOM.max(payload),
            _ => payload,
        };
        if !connection.admit(held, waits) {
            self.stage = Stage::Waiting { request: *request, waits };
            return Step::Wait;
        }
        let mut buf = None;
        if held > 0 {
            // Lengths are limited to 32 MiB where requests are checked.
            let len = usize::try_from(held).unwrap_or(usize::MAX);
            buf = connection.account.borrow(len, connection);
            if buf.is_none() {
                connection.withdraw(held);
                self.stage = Stage::Waiting { request: *request, waits };
                return Step::Wait;
            }
        }
        let waits = waits.then(|| connection.served.one_waits());
        match buf {
            Some(mut buf) if payload > 0 => {
                buf.shorten(usize::try_from(payload).unwrap_or(usize::MAX));
                self.stage = Stage::Payload { request: *request, buf, have: 0, held, waits };
            }
            buf => {
                let connection = Arc::clone(connection);
                scratch.tasks.push(Task { connection, request: *request, buf, held, waits });
            }
        }
        Step::Used(0)
    }
}
