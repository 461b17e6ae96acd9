//! A server that does what a test tells it, lies included.

#![allow(dead_code, clippy::unwrap_used, reason = "shared by several test programs")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use blockmirror_nbd::proto::{
    Chunk, ChunkFlags, ChunkHeader, ClientFlags, Command, Errno, ExportNameReply, Greeting, HandshakeFlags,
    Info, MetaContextReply, OptionCode, OptionHeader, OptionReply, Request, SimpleReply, TransmissionFlags,
    encode_option_reply,
};
use blockmirror_nbd::{ClientOptions, NbdUri};
use tempfile::TempDir;

/// What the server says of its export.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Export {
    pub(crate) size: u64,
    pub(crate) flags: TransmissionFlags,
    /// Minimum and maximum.
    pub(crate) blocks: Option<(u32, u32)>,
    pub(crate) structured: bool,
    pub(crate) extended: bool,
    /// Whether `GO` is known.
    pub(crate) go: bool,
    pub(crate) no_zeroes: bool,
    /// It is added after the first question about it.
    pub(crate) comes_late: bool,
}

/// The id of `base:allocation`.
pub(crate) const BASE: u32 = 7;

impl Export {
    /// A megabyte with structured replies and all that is needed to write.
    pub(crate) fn new() -> Self {
        Self {
            size: 1 << 20,
            flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_FUA,
            blocks: Some((1, 32 << 20)),
            structured: true,
            extended: false,
            go: true,
            no_zeroes: true,
            comes_late: false,
        }
    }
}

/// A connection, seen from the server.
pub(crate) struct Peer {
    pub(crate) stream: UnixStream,
    pub(crate) extended: bool,
}

impl Peer {
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        // The client may have gone, which is often what the test wants.
        let _ = self.stream.write_all(bytes);
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).ok()?;
        Some(bytes)
    }

    pub(crate) fn greet(&mut self, flags: HandshakeFlags) -> Option<ClientFlags> {
        self.send(&Greeting { flags }.encode());
        Some(ClientFlags::decode(self.take()?))
    }

    /// The next option and its payload.
    pub(crate) fn option(&mut self) -> Option<(OptionCode, Vec<u8>)> {
        let header = OptionHeader::decode(&self.take()?).unwrap();
        let mut payload = vec![0; header.length as usize];
        self.stream.read_exact(&mut payload).ok()?;
        Some((header.option, payload))
    }

    pub(crate) fn answer(&mut self, option: OptionCode, kind: OptionReply, payload: &[u8]) {
        let mut out = Vec::new();
        encode_option_reply(&mut out, option, kind, payload);
        self.send(&out);
    }

    /// An honest handshake; `None` if the client went away.
    pub(crate) fn handshake(&mut self, export: &Export) -> Option<()> {
        let mut flags = HandshakeFlags::FIXED_NEWSTYLE;
        if export.no_zeroes {
            flags = flags | HandshakeFlags::NO_ZEROES;
        }
        let taken = self.greet(flags)?;
        let mut is_there = !export.comes_late;
        loop {
            let (option, _) = self.option()?;
            match option {
                OptionCode::SetMetaContext if !is_there => {
                    self.answer(option, OptionReply::ErrUnknown, &[]);
                    is_there = true;
                }
                OptionCode::ExtendedHeaders if export.extended => {
                    self.extended = true;
                    self.answer(option, OptionReply::Ack, &[]);
                }
                OptionCode::StructuredReply if export.structured => {
                    self.answer(option, OptionReply::Ack, &[]);
                }
                OptionCode::SetMetaContext if export.structured || export.extended => {
                    let context = MetaContextReply { id: BASE, name: "base:allocation" };
                    self.answer(option, OptionReply::MetaContext, &context.encode());
                    self.answer(option, OptionReply::Ack, &[]);
                }
                OptionCode::Go | OptionCode::Info if export.go => {
                    let info = Info::Export { size: export.size, flags: export.flags };
                    self.answer(option, OptionReply::Info, &info.encode());
                    if let Some((minimum, maximum)) = export.blocks {
                        let info = Info::BlockSize { minimum, preferred: 4096.max(minimum), maximum };
                        self.answer(option, OptionReply::Info, &info.encode());
                    }
                    self.answer(option, OptionReply::Ack, &[]);
                    if option == OptionCode::Go {
                        return Some(());
                    }
                }
                OptionCode::ExportName => {
                    self.send(&ExportNameReply { size: export.size, flags: export.flags }.encode());
                    if !taken.contains(ClientFlags::NO_ZEROES) {
                        self.send(&[0; ExportNameReply::ZEROES]);
                    }
                    return Some(());
                }
                _ => self.answer(option, OptionReply::ErrUnsup, &[]),
            }
        }
    }

    /// The next request with its payload; `None` if the client went away.
    pub(crate) fn request(&mut self) -> Option<(Request, Vec<u8>)> {
        let request = if self.extended {
            Request::decode_extended(&self.take()?)
        } else {
            Request::decode_compact(&self.take()?)
        }
        .unwrap();
        let mut payload = Vec::new();
        if request.command == Command::Write {
            payload.resize(request.length as usize, 0);
            self.stream.read_exact(&mut payload).ok()?;
        }
        (request.command != Command::Disconnect).then_some((request, payload))
    }

    pub(crate) fn simple(&mut self, cookie: u64, error: Option<Errno>) {
        self.send(&SimpleReply { error, cookie }.encode());
    }

    /// A chunk that says it is `length` bytes long, and `payload`.
    pub(crate) fn chunk_of(&mut self, cookie: u64, kind: Chunk, done: bool, length: u64, payload: &[u8]) {
        let flags = if done { ChunkFlags::DONE } else { ChunkFlags::NONE };
        let header = ChunkHeader { flags, kind, cookie, offset: 0, length };
        if self.extended {
            self.send(&header.encode_extended());
        } else {
            self.send(&header.encode_structured().unwrap());
        }
        self.send(payload);
    }

    pub(crate) fn chunk(&mut self, cookie: u64, kind: Chunk, done: bool, payload: &[u8]) {
        self.chunk_of(cookie, kind, done, payload.len() as u64, payload);
    }

    /// Bytes of a read.
    pub(crate) fn data(&mut self, cookie: u64, offset: u64, bytes: &[u8], done: bool) {
        let mut payload = offset.to_be_bytes().to_vec();
        payload.extend_from_slice(bytes);
        self.chunk(cookie, Chunk::OffsetData, done, &payload);
    }

    /// Answers that it was done.
    pub(crate) fn ok(&mut self, cookie: u64) {
        self.chunk(cookie, Chunk::None, true, &[]);
    }

    pub(crate) fn error(&mut self, cookie: u64, error: Errno, done: bool) {
        let mut payload = error.to_wire().to_be_bytes().to_vec();
        payload.extend_from_slice(&[0, 0]);
        self.chunk(cookie, Chunk::Error, done, &payload);
    }
}

/// A server; `script` is run for each connection, with its number, in a thread of its own.
pub(crate) struct Fake {
    _dir: TempDir,
    path: PathBuf,
}

impl Fake {
    pub(crate) fn new(script: impl Fn(usize, Peer) + Send + Sync + Clone + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        // It ends with the test's process.
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let script = script.clone();
                thread::spawn(move || script(number, Peer { stream: stream.unwrap(), extended: false }));
            }
        });
        Self { _dir: dir, path }
    }

    /// A server that shakes hands honestly and then does as `script` says with each request.
    pub(crate) fn serving(
        export: Export,
        script: impl Fn(&mut Peer, Request, Vec<u8>) + Send + Sync + Clone + 'static,
    ) -> Self {
        Self::new(move |_, mut peer| {
            if peer.handshake(&export).is_some() {
                while let Some((request, payload)) = peer.request() {
                    script(&mut peer, request, payload);
                }
            }
        })
    }

    pub(crate) fn options(&self) -> ClientOptions {
        ClientOptions::new(NbdUri::unix(&self.path, "x")).writable(true)
    }
}
