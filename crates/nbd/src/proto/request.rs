//! Requests of the transmission phase.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::fields::{Fields, wire_flags};
use super::handshake::magic;
use super::{Command, ProtoError};

/// What a compact request begins with.
const REQUEST_MAGIC: u32 = 0x2560_9513;
/// What an extended request begins with.
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;

wire_flags! {
    /// How a request is to be done.
    CommandFlags: u16 {
        /// Durable before the answer.
        FUA = 0;
        /// Zeros must be allocated.
        NO_HOLE = 1;
        /// The answer must be one chunk.
        DF = 2;
        /// One descriptor is enough.
        REQ_ONE = 3;
        /// Zeros quickly or not at all.
        FAST_ZERO = 4;
        /// `length` says how long the payload is, not the effect (extended headers only).
        PAYLOAD_LEN = 5;
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRequest {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireExtendedRequest {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How.
    pub flags: CommandFlags,
    /// What.
    pub command: Command,
    /// What the answer carries, so that the client knows it; without meaning for the server.
    pub cookie: u64,
    /// First byte of the export.
    pub offset: u64,
    /// Bytes of the export; with [`CommandFlags::PAYLOAD_LEN`], and for writes, bytes that follow.
    pub length: u64,
}

impl Request {
    /// Bytes of a compact header.
    pub const COMPACT_LEN: usize = size_of::<WireRequest>();
    /// Bytes of an extended header.
    pub const EXTENDED_LEN: usize = size_of::<WireExtendedRequest>();

    /// Whether it changes what the export holds.
    pub fn writes(&self) -> bool {
        matches!(self.command, Command::Write | Command::Trim | Command::WriteZeroes)
    }

    /// What a client sent.
    ///
    /// # Errors
    /// [`ProtoError::Magic`]: the connection has lost step and can only be closed.
    pub fn decode_compact(bytes: &[u8; Self::COMPACT_LEN]) -> Result<Self, ProtoError> {
        let wire: WireRequest = zerocopy::transmute!(*bytes);
        magic("request", u64::from(REQUEST_MAGIC), u64::from(wire.magic.get()))?;
        Ok(Self {
            flags: CommandFlags::from_bits(wire.flags.get()),
            command: Command::from_wire(wire.command.get()),
            cookie: wire.cookie.get(),
            offset: wire.offset.get(),
            length: u64::from(wire.length.get()),
        })
    }

    /// What a client with extended headers sent.
    ///
    /// # Errors
    /// [`ProtoError::Magic`]: the connection has lost step and can only be closed.
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_LEN]) -> Result<Self, ProtoError> {
        let wire: WireExtendedRequest = zerocopy::transmute!(*bytes);
        magic("extended request", u64::from(EXTENDED_REQUEST_MAGIC), u64::from(wire.magic.get()))?;
        Ok(Self {
            flags: CommandFlags::from_bits(wire.flags.get()),
            command: Command::from_wire(wire.command.get()),
            cookie: wire.cookie.get(),
            offset: wire.offset.get(),
            length: wire.length.get(),
        })
    }

    /// The bytes; `None` if the length does not fit 32 bits.
    pub fn encode_compact(&self) -> Option<[u8; Self::COMPACT_LEN]> {
        Some(zerocopy::transmute!(WireRequest {
            magic: U32::new(REQUEST_MAGIC),
            flags: U16::new(self.flags.bits()),
            command: U16::new(self.command.to_wire()),
            cookie: U64::new(self.cookie),
            offset: U64::new(self.offset),
            length: U32::new(u32::try_from(self.length).ok()?),
        }))
    }

    /// The bytes with an extended header.
    pub fn encode_extended(&self) -> [u8; Self::EXTENDED_LEN] {
        zerocopy::transmute!(WireExtendedRequest {
            magic: U32::new(EXTENDED_REQUEST_MAGIC),
            flags: U16::new(self.flags.bits()),
            command: U16::new(self.command.to_wire()),
            cookie: U64::new(self.cookie),
            offset: U64::new(self.offset),
            length: U64::new(self.length),
        })
    }
}

/// The payload of a block status request with [`CommandFlags::PAYLOAD_LEN`]: which contexts are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PayloadFilter {
    /// Bytes of the export that are asked about.
    pub length: u64,
    /// Ids of contexts.
    pub ids: Vec<u32>,
}

impl PayloadFilter {
    /// What a client sent.
    ///
    /// # Errors
    /// Payloads that are not a length and whole ids.
    pub fn decode(payload: &[u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("block status filter", payload);
        let length = fields.u64()?;
        let ids = <[U32]>::ref_from_bytes(fields.rest())
            .map_err(|_| ProtoError::Short { what: "block status filter", len: payload.len() })?;
        Ok(Self { length, ids: ids.iter().map(|id| id.get()).collect() })
    }

    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.length.to_be_bytes().to_vec();
        for id in &self.ids {
            out.extend_from_slice(&id.to_be_bytes());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_is_the_one_of_the_document() {
        let request = Request {
            flags: CommandFlags::FUA,
            command: Command::Write,
            cookie: 0x0102_0304_0506_0708,
            offset: 4096,
            length: 512,
        };
        let bytes = request.encode_compact().unwrap();
        assert_eq!(&bytes[..16], b"\x25\x60\x95\x13\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08");
        assert_eq!(&bytes[16..], b"\0\0\0\0\0\0\x10\0\0\0\x02\0");
        assert_eq!(Request::decode_compact(&bytes), Ok(request));
        assert_eq!(Request::decode_extended(&request.encode_extended()), Ok(request));
        assert_eq!(Request { length: 1 << 32, ..request }.encode_compact(), None);
    }

    #[test]
    fn a_filter_is_a_length_and_whole_ids() {
        let filter = PayloadFilter { length: 1 << 40, ids: vec![1, 7] };
        let mut bytes = filter.encode();
        assert_eq!(PayloadFilter::decode(&bytes), Ok(filter));
        bytes.pop();
        assert!(PayloadFilter::decode(&bytes).is_err());
        assert!(PayloadFilter::decode(&[0; 7]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes: [u8; 32], right_magic: bool) {
            let mut bytes = bytes;
            if right_magic {
                bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            }
            let compact = Request::decode_compact(bytes.first_chunk().unwrap());
            prop_assert!(compact.is_ok() == (bytes[..4] == REQUEST_MAGIC.to_be_bytes()));
            if let Ok(request) = compact {
                prop_assert_eq!(&request.encode_compact().unwrap()[..], &bytes[..28]);
                prop_assert_eq!(Request::decode_extended(&request.encode_extended()), Ok(request));
            }
        }
    }
}
