//! A client that says exactly what a test wants, over a socket pair, and shows exactly what comes back.

#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmirror_block::BlockDevice;
use blockmirror_nbd::proto::{
    BlockStatus, Chunk, ChunkHeader, ClientFlags, Command, CommandFlags, Errno, ErrorChunk, ExportNameReply,
    Greeting, Info, InfoCode, InfoRequest, MetaContextReply, MetaContextRequest, OffsetData, OffsetHole,
    OptionCode, OptionReply, OptionReplyHeader, Request, SimpleReply, TransmissionFlags, encode_option,
};
use blockmirror_nbd::server::{Export, Server, ServerOptions};

/// Long enough for any machine, short enough to end a test that hangs.
const HANG: Duration = Duration::from_secs(60);

/// A server with the export `disk`, writable.
pub(crate) fn serve(disk: Arc<dyn BlockDevice>) -> Arc<Server> {
    let server = Server::new(ServerOptions::default()).unwrap();
    server.add(Export::new("disk", disk).writable(true).allocation_depth(true)).unwrap();
    server
}

/// What replies look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Simple,
    Structured,
    Extended,
}

pub(crate) const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// An answer to an option: what it is, and its payload.
pub(crate) type Answer = (OptionReply, Vec<u8>);

/// One chunk of a reply, or a simple one as if it were a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Done,
    Data(u64, Vec<u8>),
    Hole(u64, u32),
    Status(BlockStatus),
    Error(Errno),
}

/// The raw client.
pub(crate) struct Peer {
    pub(crate) stream: UnixStream,
    pub(crate) mode: Mode,
    pub(crate) size: u64,
    pub(crate) flags: TransmissionFlags,
    next_cookie: u64,
}

impl Peer {
    /// A connection on which nothing has been said.
    pub(crate) fn connect(server: &Server) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        server.serve(theirs).unwrap();
        Self::over(ours)
    }

    /// The same over a stream of the caller's.
    pub(crate) fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream.set_write_timeout(Some(HANG)).unwrap();
        Self { stream, mode: Mode::Simple, size: 0, flags: TransmissionFlags::NONE, next_cookie: 1 }
    }

    /// A connection past greeting and flags.
    pub(crate) fn greeted(server: &Server) -> Self {
        let mut peer = Self::connect(server);
        peer.greet();
        peer
    }

    pub(crate) fn greet(&mut self) {
        Greeting::decode(&self.read_array()).unwrap();
        self.write(&(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).encode());
    }

    /// A connection in the transmission phase on the export `disk`, with these contexts selected.
    pub(crate) fn ready(server: &Server, mode: Mode, contexts: &[&str]) -> Self {
        let mut peer = Self::greeted(server);
        peer.negotiate(mode);
        if !contexts.is_empty() {
            peer.set_contexts("disk", contexts);
        }
        peer.go("disk").unwrap();
        peer
    }

    pub(crate) fn negotiate(&mut self, mode: Mode) {
        let option = match mode {
            Mode::Simple => return,
            Mode::Structured => OptionCode::StructuredReply,
            Mode::Extended => OptionCode::ExtendedHeaders,
        };
        assert_eq!(self.ask(option, &[]), [(OptionReply::Ack, vec![])]);
        self.mode = mode;
    }

    pub(crate) fn set_contexts(&mut self, export: &str, queries: &[&str]) -> Vec<(u32, String)> {
        self.contexts(OptionCode::SetMetaContext, export, queries)
    }

    pub(crate) fn contexts(
        &mut self,
        option: OptionCode,
        export: &str,
        queries: &[&str],
    ) -> Vec<(u32, String)> {
        let payload = MetaContextRequest { export, queries: queries.to_vec() }.encode();
        let mut found = Vec::new();
        for (kind, payload) in self.ask(option, &payload) {
            if kind != OptionReply::Ack {
                assert_eq!(kind, OptionReply::MetaContext);
                let reply = MetaContextReply::decode(&payload).unwrap();
                found.push((reply.id, reply.name.to_owned()));
            }
        }
        found
    }

    /// `GO`; the facts of the answer, or the refusal.
    pub(crate) fn go(&mut self, export: &str) -> Result<Vec<Info>, OptionReply> {
        let infos = vec![InfoCode::Name, InfoCode::BlockSize];
        let payload = InfoRequest { export, infos }.encode();
        let mut facts = Vec::new();
        for (kind, payload) in self.ask(OptionCode::Go, &payload) {
            match kind {
                OptionReply::Ack => {}
                OptionReply::Info => facts.push(Info::decode(&payload).unwrap()),
                other => return Err(other),
            }
        }
        for fact in &facts {
            if let Info::Export { size, flags } = fact {
                (self.size, self.flags) = (*size, *flags);
            }
        }
        Ok(facts)
    }

    /// `EXPORT_NAME`, without the zeros.
    pub(crate) fn export_name(&mut self, export: &str) {
        let mut bytes = Vec::new();
        encode_option(&mut bytes, OptionCode::ExportName, export.as_bytes());
        self.write(&bytes);
        let reply = ExportNameReply::decode(&self.read_array());
        (self.size, self.flags) = (reply.size, reply.flags);
    }

    /// Sends an option and collects the answers up to the last.
    pub(crate) fn ask(&mut self, option: OptionCode, payload: &[u8]) -> Vec<Answer> {
        let mut bytes = Vec::new();
        encode_option(&mut bytes, option, payload);
        self.write(&bytes);
        let mut answers = Vec::new();
        loop {
            let header = OptionReplyHeader::decode(&self.read_array()).unwrap();
            assert_eq!(header.option, option);
            let payload = self.read(header.length as usize);
            answers.push((header.kind, payload));
            if header.kind == OptionReply::Ack || header.kind.is_error() {
                return answers;
            }
        }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn read(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn read_array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server has closed, having said nothing more.
    pub(crate) fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0; 1]) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// Sends a request and returns its cookie.
    pub(crate) fn send(&mut self, command: Command, flags: CommandFlags, offset: u64, length: u64) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let request = Request { flags, command, cookie, offset, length };
        match self.mode {
            Mode::Extended => self.write(&request.encode_extended()),
            _ => self.write(&request.encode_compact().unwrap()),
        }
        cookie
    }

    /// Sends a write and returns its cookie.
    pub(crate) fn send_write(&mut self, flags: CommandFlags, offset: u64, data: &[u8]) -> u64 {
        let flags = if self.mode == Mode::Extended { flags | CommandFlags::PAYLOAD_LEN } else { flags };
        let cookie = self.send(Command::Write, flags, offset, data.len() as u64);
        self.write(data);
        cookie
    }

    /// The next chunk, with its cookie and whether it is the last of its reply. `read` is how many bytes
    /// follow a simple reply without error.
    pub(crate) fn receive(&mut self, read: usize) -> (u64, Piece, bool) {
        if self.mode == Mode::Simple {
            let reply = SimpleReply::decode(&self.read_array()).unwrap();
            let piece = match reply.error {
                Some(errno) => Piece::Error(errno),
                None if read > 0 => Piece::Data(0, self.read(read)),
                None => Piece::Done,
            };
            return (reply.cookie, piece, true);
        }
        let header = match self.mode {
            Mode::Extended => ChunkHeader::decode_extended(&self.read_array()).unwrap(),
            _ => ChunkHeader::decode_structured(&self.read_array()).unwrap(),
        };
        let payload = self.read(usize::try_from(header.length).unwrap());
        let piece = match header.kind {
            Chunk::None => Piece::Done,
            Chunk::OffsetData => {
                let (offset, data) = payload.split_first_chunk().unwrap();
                Piece::Data(OffsetData::decode(*offset).offset, data.to_vec())
            }
            Chunk::OffsetHole => {
                let hole = OffsetHole::decode(&payload).unwrap();
                Piece::Hole(hole.offset, hole.length)
            }
            Chunk::BlockStatus => Piece::Status(BlockStatus::decode_compact(&payload).unwrap()),
            Chunk::BlockStatusExt => Piece::Status(BlockStatus::decode_extended(&payload).unwrap()),
            Chunk::Error => Piece::Error(ErrorChunk::decode(&payload, false).unwrap().error),
            Chunk::ErrorOffset => Piece::Error(ErrorChunk::decode(&payload, true).unwrap().error),
            other => panic!("{other:?}"),
        };
        (header.cookie, piece, header.is_done())
    }

    /// The whole reply to `cookie`, which must be the next one.
    pub(crate) fn reply(&mut self, cookie: u64, read: usize) -> Vec<Piece> {
        let mut pieces = Vec::new();
        loop {
            let (got, piece, done) = self.receive(read);
            assert_eq!(got, cookie);
            pieces.push(piece);
            if done {
                return pieces;
            }
        }
    }

    /// Does a request without payload.
    pub(crate) fn run(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> Vec<Piece> {
        let cookie = self.send(command, flags, offset, length);
        let read = if command == Command::Read { usize::try_from(length).unwrap() } else { 0 };
        self.reply(cookie, read)
    }

    /// Reads; holes are filled in.
    pub(crate) fn read_at(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Errno> {
        let mut data = vec![0; length as usize];
        for piece in self.run(Command::Read, CommandFlags::NONE, offset, u64::from(length)) {
            match piece {
                Piece::Data(at, bytes) => {
                    let at =
                        if self.mode == Mode::Simple { 0 } else { usize::try_from(at - offset).unwrap() };
                    data[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                Piece::Error(errno) => return Err(errno),
                Piece::Hole(..) | Piece::Done => {}
                other @ Piece::Status(_) => panic!("{other:?}"),
            }
        }
        Ok(data)
    }

    pub(crate) fn write_at(&mut self, flags: CommandFlags, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let cookie = self.send_write(flags, offset, data);
        match self.reply(cookie, 0).as_slice() {
            [Piece::Done] => Ok(()),
            [Piece::Error(errno)] => Err(*errno),
            other => panic!("{other:?}"),
        }
    }

    /// The answer to a block status request: `(context, length, flags)` of each run.
    pub(crate) fn status(&mut self, flags: CommandFlags, offset: u64, length: u64) -> Vec<(u32, u64, u64)> {
        let mut found = Vec::new();
        for piece in self.run(Command::BlockStatus, flags, offset, length) {
            match piece {
                Piece::Status(status) => {
                    found.extend(status.descriptors.iter().map(|d| (status.id, d.length, d.flags)));
                }
                other => panic!("{other:?}"),
            }
        }
        found
    }

    pub(crate) fn disconnect(mut self) {
        self.send(Command::Disconnect, CommandFlags::NONE, 0, 0);
        assert!(self.is_closed());
    }
}

/// Waits for something that other threads bring about.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < HANG, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(2));
    }
}
