//! Options: what a client asks during the handshake, and the header of each answer.

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::fields::{Fields, len32, put_counted};
use super::handshake::{OPTION_MAGIC, magic};
use super::{InfoCode, OptionCode, OptionReply, ProtoError};

/// What every answer to an option begins with.
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireOption {
    magic: U64,
    option: U32,
    length: U32,
}

/// The header of an option; `length` bytes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// What is asked.
    pub option: OptionCode,
    /// Bytes that follow. Chosen by the peer: cap it before making room.
    pub length: u32,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const LEN: usize = size_of::<WireOption>();

    /// What a client sent.
    ///
    /// # Errors
    /// [`ProtoError::Magic`].
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, ProtoError> {
        let wire: WireOption = zerocopy::transmute!(*bytes);
        magic("option", OPTION_MAGIC, wire.magic.get())?;
        Ok(Self { option: OptionCode::from_wire(wire.option.get()), length: wire.length.get() })
    }
}

/// Adds an option with its payload to `out`.
pub fn encode_option(out: &mut Vec<u8>, option: OptionCode, payload: &[u8]) {
    let header = WireOption {
        magic: U64::new(OPTION_MAGIC),
        option: U32::new(option.to_wire()),
        length: U32::new(len32(payload)),
    };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(payload);
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireOptionReply {
    magic: U64,
    option: U32,
    kind: U32,
    length: U32,
}

/// The header of an answer to an option; `length` bytes follow. The payload of an error is text for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// Which option it answers.
    pub option: OptionCode,
    /// What the answer is.
    pub kind: OptionReply,
    /// Bytes that follow. Chosen by the peer: cap it before making room.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire.
    pub const LEN: usize = size_of::<WireOptionReply>();

    /// What a server sent.
    ///
    /// # Errors
    /// [`ProtoError::Magic`].
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, ProtoError> {
        let wire: WireOptionReply = zerocopy::transmute!(*bytes);
        magic("option reply", OPTION_REPLY_MAGIC, wire.magic.get())?;
        Ok(Self {
            option: OptionCode::from_wire(wire.option.get()),
            kind: OptionReply::from_wire(wire.kind.get()),
            length: wire.length.get(),
        })
    }
}

/// Adds an answer to `option` with its payload to `out`.
pub fn encode_option_reply(out: &mut Vec<u8>, option: OptionCode, kind: OptionReply, payload: &[u8]) {
    let header = WireOptionReply {
        magic: U64::new(OPTION_REPLY_MAGIC),
        option: U32::new(option.to_wire()),
        kind: U32::new(kind.to_wire()),
        length: U32::new(len32(payload)),
    };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(payload);
}

/// The payload of `INFO` and `GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export; empty for the default one.
    pub export: &'a str,
    /// What is asked for beside what always comes.
    pub infos: Vec<InfoCode>,
}

impl<'a> InfoRequest<'a> {
    /// What a client sent.
    ///
    /// # Errors
    /// Payloads that end early, go on, or hold a bad name.
    pub fn decode(payload: &'a [u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("info request", payload);
        let export = fields.counted_str()?;
        let count = fields.u16()?;
        // Pushed one by one: nothing is allocated for the announced count.
        let mut infos = Vec::new();
        for _ in 0..count {
            infos.push(InfoCode::from_wire(fields.u16()?));
        }
        fields.end()?;
        Ok(Self { export, infos })
    }

    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_counted(&mut out, self.export);
        out.extend_from_slice(&u16::try_from(self.infos.len()).unwrap_or(u16::MAX).to_be_bytes());
        for info in self.infos.iter().take(usize::from(u16::MAX)) {
            out.extend_from_slice(&info.to_wire().to_be_bytes());
        }
        out
    }
}

/// The payload of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextRequest<'a> {
    /// The export; empty for the default one.
    pub export: &'a str,
    /// `namespace:leaf`, or `namespace:` when listing.
    pub queries: Vec<&'a str>,
}

impl<'a> MetaContextRequest<'a> {
    /// What a client sent.
    ///
    /// # Errors
    /// Payloads that end early, go on, or hold a bad name.
    pub fn decode(payload: &'a [u8]) -> Result<Self, ProtoError> {
        let mut fields = Fields::new("meta context request", payload);
        let export = fields.counted_str()?;
        let count = fields.u32()?;
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(fields.counted_str()?);
        }
        fields.end()?;
        Ok(Self { export, queries })
    }

    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_counted(&mut out, self.export);
        out.extend_from_slice(&u32::try_from(self.queries.len()).unwrap_or(u32::MAX).to_be_bytes());
        for query in &self.queries {
            put_counted(&mut out, query);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_option_is_the_one_of_the_document() {
        let mut bytes = Vec::new();
        encode_option(&mut bytes, OptionCode::Go, b"abc");
        assert_eq!(&bytes, b"IHAVEOPT\0\0\0\x07\0\0\0\x03abc");
        let header = OptionHeader::decode(bytes.first_chunk().unwrap()).unwrap();
        assert_eq!(header, OptionHeader { option: OptionCode::Go, length: 3 });
    }

    #[test]
    fn an_answer_comes_back_as_it_went() {
        let mut bytes = Vec::new();
        encode_option_reply(&mut bytes, OptionCode::List, OptionReply::ErrPolicy, b"no");
        let header = OptionReplyHeader::decode(bytes.first_chunk().unwrap()).unwrap();
        let expected =
            OptionReplyHeader { option: OptionCode::List, kind: OptionReply::ErrPolicy, length: 2 };
        assert_eq!(header, expected);
        bytes[7] ^= 1;
        assert!(OptionReplyHeader::decode(bytes.first_chunk().unwrap()).is_err());
    }

    #[test]
    fn requests_come_back_as_they_went() {
        let info = InfoRequest { export: "disk", infos: vec![InfoCode::BlockSize, InfoCode::Other(99)] };
        assert_eq!(InfoRequest::decode(&info.encode()), Ok(info));
        let meta = MetaContextRequest { export: "", queries: vec!["base:allocation", "qemu:"] };
        assert_eq!(MetaContextRequest::decode(&meta.encode()), Ok(meta));
    }

    #[test]
    fn counts_and_lengths_are_not_believed() {
        // A count of 2^32-1 queries with none behind it.
        let mut bytes = MetaContextRequest { export: "a", queries: vec![] }.encode();
        bytes.truncate(5);
        bytes.extend_from_slice(&[0xff; 4]);
        assert!(matches!(MetaContextRequest::decode(&bytes), Err(ProtoError::Short { .. })));
        // A name that claims more than the protocol allows.
        let long = InfoRequest { export: &"x".repeat(4097), infos: vec![] }.encode();
        assert!(matches!(InfoRequest::decode(&long), Err(ProtoError::StringTooLong { .. })));
        let mut trailing = InfoRequest { export: "x", infos: vec![] }.encode();
        trailing.push(0);
        assert!(matches!(InfoRequest::decode(&trailing), Err(ProtoError::Long { .. })));
        assert_eq!(
            InfoRequest::decode(b"\0\0\0\x01\xff\0\0"),
            Err(ProtoError::NotUtf8 { what: "info request" })
        );
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(payload in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(info) = InfoRequest::decode(&payload) {
                prop_assert_eq!(info.encode(), payload.clone());
            }
            if let Ok(meta) = MetaContextRequest::decode(&payload) {
                prop_assert_eq!(meta.encode(), payload);
            }
        }
    }
}
