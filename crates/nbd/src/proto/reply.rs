//! Headers of replies: simple ones, and the chunks of structured and extended ones.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::fields::wire_flags;
use super::handshake::magic;
use super::{Chunk, Errno, ProtoError};

/// What a simple reply begins with; a client reads four bytes to tell it from a chunk.
pub const REPLY_SIMPLE_MAGIC: u32 = 0x6744_6698;
/// What a chunk of a structured reply begins with.
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
/// What a chunk of an extended reply begins with.
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;

wire_flags! {
    /// Where in a reply a chunk stands.
    ChunkFlags: u16 {
        /// It is the last one.
        DONE = 0;
    }
}

/// The format of replies that the two sides have negotiated, the later ones with more features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ReplyFormat {
    /// A header without a length; no sparse reads, no block status.
    Simple,
    /// Structured replies: chunks.
    Structured,
    /// Extended headers: chunks and requests with 64-bit lengths.
    Extended,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireSimple {
    magic: U32,
    error: U32,
    cookie: U64,
}

/// A simple reply. The bytes of a read follow it, if it was one and succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// What went wrong, if something did.
    pub error: Option<Errno>,
    /// The request's.
    pub cookie: u64,
}

impl SimpleReply {
    /// Bytes on the wire.
    pub const LEN: usize = size_of::<WireSimple>();

    /// What a server sent.
    ///
    /// # Errors
    /// [`ProtoError::Magic`].
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, ProtoError> {
        let wire: WireSimple = zerocopy::transmute!(*bytes);
        magic("simple reply", u64::from(REPLY_SIMPLE_MAGIC), u64::from(wire.magic.get()))?;
        Ok(Self { error: Errno::from_wire(wire.error.get()), cookie: wire.cookie.get() })
    }

    /// The bytes.
    pub fn encode(self) -> [u8; Self::LEN] {
        zerocopy::transmute!(WireSimple {
            magic: U32::new(REPLY_SIMPLE_MAGIC),
            error: U32::new(self.error.map_or(0, Errno::to_wire)),
            cookie: U64::new(self.cookie),
        })
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireStructured {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    length: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireExtended {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

/// The header of a chunk; `length` bytes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Where in the reply it stands.
    pub flags: ChunkFlags,
    /// What follows.
    pub kind: Chunk,
    /// The request's.
    pub cookie: u64,
    /// The request's offset; in extended headers only, zero in structured ones.
    pub offset: u64,
    /// Bytes that follow. Chosen by the peer: cap it before making room.
    pub length: u64,
}

impl ChunkHeader {
    /// Bytes of a structured header.
    pub const STRUCTURED_LEN: usize = size_of::<WireStructured>();
    /// Bytes of an extended header.
    pub const EXTENDED_LEN: usize = size_of::<WireExtended>();

    /// Whether it is the last of its reply.
    pub fn is_done(&self) -> bool {
        self.flags.contains(ChunkFlags::DONE)
    }

    /// What a server sent.
    ///
    /// # Errors
    /// [`ProtoError::Magic`].
    pub fn decode_structured(bytes: &[u8; Self::STRUCTURED_LEN]) -> Result<Self, ProtoError> {
        let wire: WireStructured = zerocopy::transmute!(*bytes);
        magic("structured reply", u64::from(STRUCTURED_MAGIC), u64::from(wire.magic.get()))?;
        Ok(Self {
            flags: ChunkFlags::from_bits(wire.flags.get()),
            kind: Chunk::from_wire(wire.kind.get()),
            cookie: wire.cookie.get(),
            offset: 0,
            length: u64::from(wire.length.get()),
        })
    }

    /// What a server with extended headers sent.
    ///
    /// # Errors
    /// [`ProtoError::Magic`].
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_LEN]) -> Result<Self, ProtoError> {
        let wire: WireExtended = zerocopy::transmute!(*bytes);
        magic("extended reply", u64::from(EXTENDED_MAGIC), u64::from(wire.magic.get()))?;
        Ok(Self {
            flags: ChunkFlags::from_bits(wire.flags.get()),
            kind: Chunk::from_wire(wire.kind.get()),
            cookie: wire.cookie.get(),
            offset: wire.offset.get(),
            length: wire.length.get(),
        })
    }

    /// The bytes of a structured header; `None` if the length does not fit 32 bits.
    pub fn encode_structured(&self) -> Option<[u8; Self::STRUCTURED_LEN]> {
        Some(zerocopy::transmute!(WireStructured {
            magic: U32::new(STRUCTURED_MAGIC),
            flags: U16::new(self.flags.bits()),
            kind: U16::new(self.kind.to_wire()),
            cookie: U64::new(self.cookie),
            length: U32::new(u32::try_from(self.length).ok()?),
        }))
    }

    /// The bytes of an extended header.
    pub fn encode_extended(&self) -> [u8; Self::EXTENDED_LEN] {
        zerocopy::transmute!(WireExtended {
            magic: U32::new(EXTENDED_MAGIC),
            flags: U16::new(self.flags.bits()),
            kind: U16::new(self.kind.to_wire()),
            cookie: U64::new(self.cookie),
            offset: U64::new(self.offset),
            length: U64::new(self.length),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simple_reply_is_the_one_of_the_document() {
        let reply = SimpleReply { error: Some(Errno::NOSPC), cookie: 9 };
        let bytes = reply.encode();
        assert_eq!(&bytes, b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x09");
        assert_eq!(SimpleReply::decode(&bytes), Ok(reply));
    }

    #[test]
    fn chunks_come_back_as_they_went() {
        let chunk = ChunkHeader {
            flags: ChunkFlags::DONE,
            kind: Chunk::OffsetHole,
            cookie: 77,
            offset: 0,
            length: 12,
        };
        let bytes = chunk.encode_structured().unwrap();
        assert_eq!(&bytes[..8], b"\x66\x8e\x33\xef\0\x01\0\x02");
        assert_eq!(ChunkHeader::decode_structured(&bytes), Ok(chunk));
        let extended = ChunkHeader { offset: 1 << 50, length: 1 << 40, ..chunk };
        assert_eq!(&extended.encode_extended()[..4], b"\x6e\x8a\x27\x8c");
        assert_eq!(ChunkHeader::decode_extended(&extended.encode_extended()), Ok(extended));
        assert_eq!(extended.encode_structured(), None);
    }

    #[test]
    fn one_kind_is_not_taken_for_another() {
        let simple = SimpleReply { error: None, cookie: 0 }.encode();
        let mut long = [0; 20];
        long[..16].copy_from_slice(&simple);
        assert!(matches!(ChunkHeader::decode_structured(&long), Err(ProtoError::Magic { .. })));
    }
}
