//! Payloads of chunks.
//!
//! The bytes of [`OffsetData`] are not here: they go between socket and buffer without a copy.

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::fields::{Fields, len32};
use super::{Errno, MAX_STRING, ProtoError};

/// What stands before the bytes of an `OFFSET_DATA` chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OffsetData {
    /// Where in the export the bytes lie.
    pub offset: u64,
}

impl OffsetData {
    /// Bytes on the wire, before the data.
    pub const LEN: usize = 8;

    /// What a server sent.
    pub fn decode(bytes: [u8; Self::LEN]) -> Self {
        Self { offset: U64::from_bytes(bytes).get() }
    }

    /// The bytes.
    pub fn encode(self) -> [u8; Self::LEN] {
        U64::new(self.offset).to_bytes()
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireHole {
    offset: U64,
    length: U32,
}

/// The payload of an `OFFSET_HOLE` chunk: zeros that are not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OffsetHole {
    /// Where in the export the zeros lie.
    pub offset: u64,
    /// How many.
    pub length: u32,
}

impl OffsetHole {
    /// Bytes on the wire.
    pub const LEN: usize = size_of::<WireHole>();

    /// What a server sent.
    ///
    /// # Errors
    /// Payloads of another length.
    pub fn decode(payload: &[u8]) -> Result<Self, ProtoError> {
        let wire = WireHole::read_from_bytes(payload).map_err(|_| wrong("hole", payload, Self::LEN))?;
        Ok(Self { offset: wire.offset.get(), length: wire.length.get() })
    }

    /// The bytes.
    pub fn encode(self) -> [u8; Self::LEN] {
        zerocopy::transmute!(WireHole { offset: U64::new(self.offset), length: U32::new(self.length) })
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireDescriptor {
    length: U32,
    flags: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireExtendedDescriptor {
    length: U64,
    flags: U64,
}

/// One run of a block status answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Bytes of the run; never zero.
    pub length: u64,
    /// What the run is, by the rules of its context.
    pub flags: u64,
}

/// The payload of a `BLOCK_STATUS` or `BLOCK_STATUS_EXT` chunk: what one context says, from the request's
/// offset on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// The context.
    pub id: u32,
    /// Its runs, one after the other.
    pub descriptors: Vec<Descriptor>,
}

impl BlockStatus {
    /// What a server sent in a `BLOCK_STATUS` chunk.
    ///
    /// # Errors
    /// No descriptor, a partial one, or one of no bytes.
    pub fn decode_compact(payload: &[u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("block status", payload);
        let id = fields.u32()?;
        let wire = <[WireDescriptor]>::ref_from_bytes(fields.rest())
            .map_err(|_| ProtoError::Short { what: "block status", len: payload.len() })?;
        let runs = wire.iter().map(|d| (u64::from(d.length.get()), u64::from(d.flags.get())));
        Self::checked(id, runs)
    }

    /// What a server sent in a `BLOCK_STATUS_EXT` chunk.
    ///
    /// # Errors
    /// No descriptor, a partial one, one of no bytes, or another number than the payload says.
    pub fn decode_extended(payload: &[u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("extended block status", payload);
        let (id, count) = (fields.u32()?, fields.u32()?);
        let wire = <[WireExtendedDescriptor]>::ref_from_bytes(fields.rest())
            .map_err(|_| ProtoError::Short { what: "extended block status", len: payload.len() })?;
        if u32::try_from(wire.len()) != Ok(count) {
            return Err(ProtoError::Value { what: "count of descriptors", found: u64::from(count) });
        }
        Self::checked(id, wire.iter().map(|d| (d.length.get(), d.flags.get())))
    }

    fn checked(id: u32, runs: impl Iterator<Item = (u64, u64)>) -> Result<Self, ProtoError> {
        let descriptors: Vec<_> = runs.map(|(length, flags)| Descriptor { length, flags }).collect();
        if descriptors.is_empty() || descriptors.iter().any(|d| d.length == 0) {
            return Err(ProtoError::Value { what: "length of a block status descriptor", found: 0 });
        }
        Ok(Self { id, descriptors })
    }

    /// The bytes of a `BLOCK_STATUS` chunk. `None` if a field does not fit 32 bits.
    pub fn encode_compact(&self) -> Option<Vec<u8>> {
        let mut out =
            Vec::with_capacity(4 + self.descriptors.len().saturating_mul(size_of::<WireDescriptor>()));
        out.extend_from_slice(&self.id.to_be_bytes());
        for d in &self.descriptors {
            let wire = WireDescriptor {
                length: U32::new(u32::try_from(d.length).ok()?),
                flags: U32::new(u32::try_from(d.flags).ok()?),
            };
            out.extend_from_slice(wire.as_bytes());
        }
        Some(out)
    }

    /// The bytes of a `BLOCK_STATUS_EXT` chunk.
    pub fn encode_extended(&self) -> Vec<u8> {
        let descriptors = self.descriptors.len().saturating_mul(size_of::<WireExtendedDescriptor>());
        let mut out = Vec::with_capacity(8 + descriptors);
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(&u32::try_from(self.descriptors.len()).unwrap_or(u32::MAX).to_be_bytes());
        for d in &self.descriptors {
            let wire = WireExtendedDescriptor { length: U64::new(d.length), flags: U64::new(d.flags) };
            out.extend_from_slice(wire.as_bytes());
        }
        out
    }
}

/// The payload of an `ERROR` or `ERROR_OFFSET` chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorChunk<'a> {
    /// What went wrong.
    pub error: Errno,
    /// Words for people; may be empty.
    pub message: &'a str,
    /// Where, in an `ERROR_OFFSET` chunk.
    pub offset: Option<u64>,
}

impl<'a> ErrorChunk<'a> {
    /// What a server sent in an `ERROR` chunk, or in an `ERROR_OFFSET` chunk with `with_offset`.
    ///
    /// # Errors
    /// Payloads of the wrong length, bad strings, an error of zero.
    pub fn decode(payload: &'a [u8], with_offset: bool) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("error chunk", payload);
        let error =
            Errno::from_wire(fields.u32()?).ok_or(ProtoError::Value { what: "error number", found: 0 })?;
        let message = fields.counted_str16()?;
        let offset = if with_offset { Some(fields.u64()?) } else { None };
        fields.end()?;
        Ok(Self { error, message, offset })
    }

    /// The bytes; a message too long for the protocol is cut.
    pub fn encode(&self) -> Vec<u8> {
        let mut cut = self.message.len().min(MAX_STRING);
        while !self.message.is_char_boundary(cut) {
            cut -= 1;
        }
        let message = &self.message.as_bytes()[..cut];
        let mut out = self.error.to_wire().to_be_bytes().to_vec();
        // At most MAX_STRING, so it fits 16 bits.
        out.extend_from_slice(&len32(message).to_be_bytes()[2..]);
        out.extend_from_slice(message);
        if let Some(offset) = self.offset {
            out.extend_from_slice(&offset.to_be_bytes());
        }
        out
    }
}

fn wrong(what: &'static str, payload: &[u8], right: usize) -> ProtoError {
    if payload.len() < right {
        ProtoError::Short { what, len: payload.len() }
    } else {
        ProtoError::Long { what, len: payload.len() as u64 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn holes_and_data_come_back_as_they_went() {
        let hole = OffsetHole { offset: 1 << 33, length: 65536 };
        assert_eq!(OffsetHole::decode(&hole.encode()), Ok(hole));
        assert!(OffsetHole::decode(&[0; 11]).is_err() && OffsetHole::decode(&[0; 13]).is_err());
        let data = OffsetData { offset: 42 };
        assert_eq!(OffsetData::decode(data.encode()), data);
    }

    #[test]
    fn status_comes_back_as_it_went() {
        let mut status = BlockStatus { id: 1, descriptors: vec![Descriptor { length: 4096, flags: 3 }; 3] };
        assert_eq!(BlockStatus::decode_compact(&status.encode_compact().unwrap()), Ok(status.clone()));
        status.descriptors[1].length = 1 << 40;
        assert_eq!(status.encode_compact(), None);
        assert_eq!(BlockStatus::decode_extended(&status.encode_extended()), Ok(status));
    }

    #[test]
    fn status_without_runs_or_with_another_count_is_refused() {
        assert!(BlockStatus::decode_compact(&[0; 4]).is_err());
        assert!(BlockStatus::decode_compact(&[0; 12]).is_err());
        let status = BlockStatus { id: 1, descriptors: vec![Descriptor { length: 1, flags: 0 }] };
        let mut bytes = status.encode_extended();
        bytes[7] = 2;
        assert!(matches!(BlockStatus::decode_extended(&bytes), Err(ProtoError::Value { .. })));
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let message = "ä".repeat(MAX_STRING);
        let chunk = ErrorChunk { error: Errno::IO, message: &format!("x{message}"), offset: Some(3) };
        let bytes = chunk.encode();
        let back = ErrorChunk::decode(&bytes, true).unwrap();
        assert_eq!(back.message.len(), MAX_STRING - 1);
        assert_eq!((back.error, back.offset), (Errno::IO, Some(3)));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(payload in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(status) = BlockStatus::decode_compact(&payload) {
                prop_assert_eq!(status.encode_compact().unwrap(), payload.clone());
            }
            if let Ok(status) = BlockStatus::decode_extended(&payload) {
                prop_assert_eq!(status.encode_extended(), payload.clone());
            }
            for with_offset in [false, true] {
                if let Ok(chunk) = ErrorChunk::decode(&payload, with_offset) {
                    prop_assert_eq!(chunk.encode(), payload.clone());
                }
            }
        }
    }
}
