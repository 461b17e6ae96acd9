//! Replies: their encoding, and the part of each that is not sent yet.

use std::io::IoSlice;
use std::ops::Range;

use crate::proto::{
    BlockStatus, Chunk, ChunkFlags, ChunkHeader, ErrorChunk, OffsetData, OffsetHole, ReplyFormat, Request,
    SimpleReply,
};

use super::memory::PooledBuf;
use super::negotiated_params::Failure;

/// Puts replies to one connection into bytes.
#[derive(Clone, Copy)]
pub(crate) struct Encoder(pub(crate) ReplyFormat);

impl Encoder {
    /// Bytes that stand before the data of a read that is answered in one piece.
    pub(crate) fn data_head_len(self) -> usize {
        match self.0 {
            ReplyFormat::Simple => SimpleReply::LEN,
            ReplyFormat::Structured => ChunkHeader::STRUCTURED_LEN + OffsetData::LEN,
            ReplyFormat::Extended => ChunkHeader::EXTENDED_LEN + OffsetData::LEN,
        }
    }

    /// What stands before `len` bytes of data that lie at `offset`. In simple replies there is only one such
    /// piece.
    pub(crate) fn data_head(self, out: &mut Vec<u8>, request: &Request, offset: u64, len: usize, done: bool) {
        if self.0 == ReplyFormat::Simple {
            out.extend_from_slice(&SimpleReply { error: None, cookie: request.cookie }.encode());
            return;
        }
        self.chunk(out, request, Chunk::OffsetData, (OffsetData::LEN + len) as u64, done);
        out.extend_from_slice(&OffsetData { offset }.encode());
    }

    /// Zeros that are not sent; not in simple replies.
    pub(crate) fn hole(self, out: &mut Vec<u8>, request: &Request, offset: u64, length: u32, done: bool) {
        self.chunk(out, request, Chunk::OffsetHole, OffsetHole::LEN as u64, done);
        out.extend_from_slice(&OffsetHole { offset, length }.encode());
    }

    /// Success, with nothing more to say.
    pub(crate) fn done(self, out: &mut Vec<u8>, request: &Request) {
        match self.0 {
            ReplyFormat::Simple => {
                out.extend_from_slice(&SimpleReply { error: None, cookie: request.cookie }.encode());
            }
            _ => self.chunk(out, request, Chunk::None, 0, true),
        }
    }

    /// Failure.
    pub(crate) fn failure(self, out: &mut Vec<u8>, request: &Request, failure: &Failure) {
        if self.0 == ReplyFormat::Simple {
            let reply = SimpleReply { error: Some(failure.errno), cookie: request.cookie };
            out.extend_from_slice(&reply.encode());
            return;
        }
        let chunk = ErrorChunk { error: failure.errno, message: &failure.message, offset: None };
        let payload = chunk.encode();
        self.chunk(out, request, Chunk::Error, payload.len() as u64, true);
        out.extend_from_slice(&payload);
    }

    /// What one context says.
    pub(crate) fn status(self, out: &mut Vec<u8>, request: &Request, status: &BlockStatus, done: bool) {
        let (kind, payload) = match self.0 {
            ReplyFormat::Extended => (Chunk::BlockStatusExt, status.encode_extended()),
            // Runs are clipped to a range with a 32-bit length, and flags of compact contexts have 32 bits.
            _ => (Chunk::BlockStatus, status.encode_compact().unwrap_or_default()),
        };
        out.reserve_exact(ChunkHeader::EXTENDED_LEN + payload.len());
        self.chunk(out, request, kind, payload.len() as u64, done);
        out.extend_from_slice(&payload);
    }

    fn chunk(self, out: &mut Vec<u8>, request: &Request, kind: Chunk, length: u64, done: bool) {
        let flags = if done { ChunkFlags::DONE } else { ChunkFlags::NONE };
        let header = ChunkHeader { flags, kind, cookie: request.cookie, offset: request.offset, length };
        match self.0 {
            ReplyFormat::Extended => out.extend_from_slice(&header.encode_extended()),
            // Chunks are at most a little longer than 32 MiB, so the length fits.
            _ => out.extend(header.encode_structured().into_iter().flatten()),
        }
    }
}

/// Bytes on their way to a client: headers, and the parts of a buffer that follow each.
pub(crate) struct Reply {
    heads: Vec<u8>,
    data: Option<PooledBuf>,
    /// For each piece, how far in `heads` it goes, and which part of `data` follows.
    pieces: Vec<(usize, Range<usize>)>,
    /// The first piece that is not wholly sent, and how much of it is.
    at: usize,
    sent: usize,
}

impl Reply {
    /// Bytes without a buffer.
    pub(crate) fn bytes(bytes: Vec<u8>) -> Self {
        let end = bytes.len();
        Self { heads: bytes, data: None, pieces: vec![(end, 0..0)], at: 0, sent: 0 }
    }

    /// Bytes in a buffer, headers and all.
    pub(crate) fn in_room(room: PooledBuf) -> Self {
        let len = room.len();
        Self::with_data(Vec::new(), room, vec![(0, 0..len)])
    }

    /// Headers, and the parts of `data` that follow each.
    pub(crate) fn with_data(heads: Vec<u8>, data: PooledBuf, pieces: Vec<(usize, Range<usize>)>) -> Self {
        Self { heads, data: Some(data), pieces, at: 0, sent: 0 }
    }

    /// Bytes that it holds in memory.
    pub(crate) fn held(&self) -> usize {
        self.heads.len() + self.data.as_ref().map_or(0, |d| d.len())
    }

    /// Those of them that are in no pooled buffer.
    pub(crate) fn loose(&self) -> usize {
        self.heads.len()
    }

    fn piece(&self, i: usize) -> Option<(&[u8], &[u8])> {
        let (end, data) = self.pieces.get(i)?;
        let start = i.checked_sub(1).and_then(|p| self.pieces.get(p)).map_or(0, |p| p.0);
        let data = self.data.as_ref().and_then(|d| d.get(data.clone())).unwrap_or_default();
        Some((self.heads.get(start..*end).unwrap_or_default(), data))
    }

    /// Adds what is left to `parts`, up to `most` of them.
    pub(crate) fn gather<'a>(&'a self, parts: &mut Vec<IoSlice<'a>>, most: usize) {
        let mut skip = self.sent;
        for i in self.at.. {
            let Some((head, data)) = self.piece(i) else { return };
            for part in [head, data] {
                let left = part.get(skip..).unwrap_or_default();
                skip = skip.saturating_sub(part.len());
                if !left.is_empty() {
                    if parts.len() >= most {
                        return;
                    }
                    parts.push(IoSlice::new(left));
                }
            }
        }
    }

    /// Counts `n` bytes as sent; returns how many of them belong to the next reply, or `None` if bytes are
    /// left here.
    pub(crate) fn advance(&mut self, n: usize) -> Option<usize> {
        let mut left = self.sent + n;
        while let Some((head, data)) = self.piece(self.at) {
            let len = head.len() + data.len();
            if left < len {
                self.sent = left;
                return None;
            }
            left -= len;
            self.at += 1;
        }
        Some(left)
    }
}
