//! Servers that almost keep to the protocol, to the NBD client. What such a server says is written at once,
//! before it is asked: a client asks in an order that is known.

use std::collections::VecDeque;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use blockmirror_block::testing::Rng;
use blockmirror_block::{BlockDevice, ByteRange, Error, Visit, WriteFlags, ZeroFlags};
use blockmirror_nbd::proto::{
    BASE_ALLOCATION, BlockStatus, Chunk, ChunkFlags, ChunkHeader, Descriptor, Errno, ErrorChunk,
    ExportNameReply, Greeting, HandshakeFlags, Info, MetaContextReply, OffsetData, OffsetHole, OptionCode,
    OptionReply, SimpleReply, TransmissionFlags, encode_option_reply,
};
use blockmirror_nbd::{ClientOptions, NbdUri};
use blockmirror_testing::Outcome;
use tempfile::TempDir;

use super::spoil::spoil;
use super::{HANG, Heard, Listener};

/// Length of the export.
const DISK: u64 = 1 << 20;
/// Bytes of a read.
const READ: u64 = 8192;
/// What an honest server answers reads with.
const BYTE: u8 = 0xa5;
/// Clients that a server remembers, so that it need not wait until they have gone.
const REMEMBERED: usize = 64;
/// The id of `base:allocation`.
const BASE: u32 = 7;

/// Servers, one for each thread that speaks through it.
pub(super) struct ClientListener {
    _dir: TempDir,
    free: Mutex<Vec<Server>>,
}

/// A socket, and the way to what the next client hears there.
struct Server {
    path: PathBuf,
    says: Sender<Vec<u8>>,
}

impl ClientListener {
    pub(super) fn new(threads: usize) -> Outcome<Self> {
        let dir = blockmirror_testing::scratch::scratch()?;
        let mut free = Vec::new();
        for n in 0..threads.max(1) {
            let path = dir.path().join(n.to_string());
            let listener = UnixListener::bind(&path)?;
            let (says, said) = channel();
            // It ends with the process.
            thread::spawn(move || serve(&listener, &said));
            free.push(Server { path, says });
        }
        Ok(Self { _dir: dir, free: Mutex::new(free) })
    }
}

/// Says to each client what there is to say; to one that comes again, what was said before.
fn serve(listener: &UnixListener, said: &Receiver<Vec<u8>>) {
    let mut clients: VecDeque<UnixStream> = VecDeque::new();
    let mut say = Vec::new();
    for client in listener.incoming() {
        let Ok(mut client) = client else { continue };
        if let Ok(next) = said.try_recv() {
            say = next;
        }
        // It may have gone.
        let _ = client.set_write_timeout(Some(HANG));
        let _ = client.write_all(&say);
        let _ = client.shutdown(Shutdown::Write);
        clients.push_back(client);
        if clients.len() > REMEMBERED {
            clients.pop_front();
        }
    }
}

impl Listener for ClientListener {
    fn speak(&self, seed: u64, count: u64) -> Outcome<Heard> {
        let server =
            self.free.lock().unwrap_or_else(PoisonError::into_inner).pop().ok_or("too few servers")?;
        let mut rng = Rng::new(seed, 2);
        let mut heard = Heard::default();
        for _ in 0..count {
            let honest = rng.chance(2);
            let mut says = Script::new(&mut rng, honest).messages;
            if !honest {
                spoil(&mut rng, &mut says);
            }
            server.says.send(says.concat())?;
            let uri = NbdUri::unix(&server.path, "disk");
            match session(uri, &mut rng, honest, &mut heard) {
                Ok(()) => heard.honest += u64::from(honest),
                Err(error) if honest => return Err(format!("an honest server: {error}").into()),
                Err(_) => heard.refused += 1,
            }
        }
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(server);
        Ok(heard)
    }

    fn left(&self) -> Outcome {
        Ok(())
    }
}

/// Opens the export and uses it, up to the first error or, sometimes, past it.
fn session(uri: NbdUri, rng: &mut Rng, honest: bool, heard: &mut Heard) -> Result<(), Error> {
    let client = ClientOptions::new(uri).writable(true).connections(1).handshake_timeout(HANG).open()?;
    let mut result = Ok(());
    let mut buf = [0; READ as usize];
    let (block, all) = (ByteRange::new(READ, READ), ByteRange::new(0, DISK));
    let steps: [&mut dyn FnMut() -> Result<(), Error>; 5] = [
        &mut || {
            client.read_at(&mut buf, 0)?;
            assert!(!honest || buf == [BYTE; READ as usize], "an honest server's bytes");
            Ok(())
        },
        &mut || client.extents(all, &mut |_| Visit::Continue(())),
        &mut || client.write_at(&[1; 4096], 0, WriteFlags::NONE),
        &mut || client.write_zeroes(block, ZeroFlags::NONE),
        &mut || client.flush(),
    ];
    for step in steps {
        match step() {
            Ok(()) => heard.done += 1,
            Err(error) => {
                result = Err(error);
                // The next request makes another connection.
                if !rng.chance(10) {
                    break;
                }
            }
        }
    }
    result
}

#[derive(Clone, Copy, PartialEq)]
enum Style {
    /// Before `GO` and structured replies.
    Old,
    Simple,
    Structured,
    Extended,
}

/// All that a server says to the client of [`session`], message by message.
struct Script {
    style: Style,
    cookie: u64,
    messages: Vec<Vec<u8>>,
}

impl Script {
    fn new(rng: &mut Rng, honest: bool) -> Self {
        let style = rng.pick(&[Style::Old, Style::Simple, Style::Structured, Style::Extended]);
        let mut script = Self { style, cookie: 0, messages: Vec::new() };
        script.handshake();
        // The read.
        script.cookie += 1;
        script.read(rng, honest);
        if matches!(style, Style::Structured | Style::Extended) {
            script.cookie += 1;
            script.status(rng);
        }
        // The write, the zeros, the flush.
        for _ in 0..3 {
            script.cookie += 1;
            if honest || rng.chance(80) { script.done() } else { script.error(rng) }
        }
        script
    }

    fn answer(&mut self, option: OptionCode, kind: OptionReply, payload: &[u8]) {
        let mut bytes = Vec::new();
        encode_option_reply(&mut bytes, option, kind, payload);
        self.messages.push(bytes);
    }

    fn handshake(&mut self) {
        let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        self.messages.push(Greeting { flags }.encode().to_vec());
        let can = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_WRITE_ZEROES;
        let (ack, unsup) = (OptionReply::Ack, OptionReply::ErrUnsup);
        if self.style == Style::Extended {
            self.answer(OptionCode::ExtendedHeaders, ack, &[]);
        } else {
            self.answer(OptionCode::ExtendedHeaders, unsup, b"what?");
            let known = if self.style == Style::Structured { ack } else { unsup };
            self.answer(OptionCode::StructuredReply, known, &[]);
        }
        if matches!(self.style, Style::Structured | Style::Extended) {
            let context = MetaContextReply { id: BASE, name: BASE_ALLOCATION }.encode();
            self.answer(OptionCode::SetMetaContext, OptionReply::MetaContext, &context);
            self.answer(OptionCode::SetMetaContext, ack, &[]);
        }
        if self.style == Style::Old {
            self.answer(OptionCode::Go, unsup, &[]);
            self.messages.push(ExportNameReply { size: DISK, flags: can }.encode().to_vec());
            return;
        }
        self.answer(OptionCode::Go, OptionReply::Info, &Info::Export { size: DISK, flags: can }.encode());
        let blocks = Info::BlockSize { minimum: 1, preferred: 4096, maximum: 1 << 20 };
        self.answer(OptionCode::Go, OptionReply::Info, &blocks.encode());
        self.answer(OptionCode::Go, ack, &[]);
    }

    fn chunk(&mut self, kind: Chunk, done: bool, payload: &[u8]) {
        let flags = if done { ChunkFlags::DONE } else { ChunkFlags::NONE };
        let header =
            ChunkHeader { flags, kind, cookie: self.cookie, offset: 0, length: payload.len() as u64 };
        let header = match self.style {
            Style::Extended => header.encode_extended().to_vec(),
            _ => header.encode_structured().map(Vec::from).unwrap_or_default(),
        };
        self.messages.push(header);
        if !payload.is_empty() {
            self.messages.push(payload.to_vec());
        }
    }

    fn in_chunks(&self) -> bool {
        matches!(self.style, Style::Structured | Style::Extended)
    }

    fn done(&mut self) {
        if self.in_chunks() {
            self.chunk(Chunk::None, true, &[]);
        } else {
            self.messages.push(SimpleReply { error: None, cookie: self.cookie }.encode().to_vec());
        }
    }

    fn error(&mut self, rng: &mut Rng) {
        let error = rng.pick(&[Errno::IO, Errno::NOSPC, Errno::INVAL, Errno::SHUTDOWN]);
        if self.in_chunks() {
            let payload = ErrorChunk { error, message: "no", offset: None }.encode();
            self.chunk(Chunk::Error, true, &payload);
        } else {
            self.messages.push(SimpleReply { error: Some(error), cookie: self.cookie }.encode().to_vec());
        }
    }

    fn read(&mut self, rng: &mut Rng, honest: bool) {
        if !self.in_chunks() {
            self.done();
            self.messages.push(vec![BYTE; READ as usize]);
            return;
        }
        // In pieces, in any order, with or without a chunk for the end alone; holes are zeros.
        let cut = rng.range(1, READ - 1);
        let mut pieces = [(0, cut), (cut, READ - cut)];
        if rng.chance(50) {
            pieces.reverse();
        }
        let last = rng.chance(50);
        for (n, (offset, length)) in pieces.into_iter().enumerate() {
            let ends = n == 1 && last;
            if !honest && rng.chance(20) {
                self.chunk(Chunk::OffsetHole, ends, &OffsetHole { offset, length: length as u32 }.encode());
                continue;
            }
            let mut payload = OffsetData { offset }.encode().to_vec();
            payload.resize(payload.len() + length as usize, BYTE);
            self.chunk(Chunk::OffsetData, ends, &payload);
        }
        if !last {
            self.done();
        }
    }

    fn status(&mut self, rng: &mut Rng) {
        let first = rng.range(1, DISK / 4096 - 1) * 4096;
        let descriptors = vec![
            Descriptor { length: first, flags: rng.below(4) },
            Descriptor { length: DISK - first, flags: rng.below(4) },
        ];
        let status = BlockStatus { id: BASE, descriptors };
        match self.style {
            Style::Extended => self.chunk(Chunk::BlockStatusExt, true, &status.encode_extended()),
            _ => self.chunk(Chunk::BlockStatus, true, &status.encode_compact().unwrap_or_default()),
        }
    }
}
