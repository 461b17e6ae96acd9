//! The NBD wire format: pure bytes in, typed values out.
//!
//! No I/O, no sockets, no state: server and client read whole headers and payloads and hand the bytes here.
//! Hostile bytes give a [`ProtoError`], never a panic; nothing is allocated from a number that the peer
//! chose, only from bytes that it sent.
//!
//! Source: the protocol document of the NBD project (`doc/proto.md`). All numbers on the wire are big-endian.
//! Names are those of the document without their `NBD_` prefixes.
//!
//! | file | part of a conversation |
//! |---|---|
//! | `handshake` | greeting, client flags, the end of `EXPORT_NAME` |
//! | `option` | options a client sends, and the headers of the answers |
//! | `info` | what `INFO`, `GO`, `LIST` and meta context options are answered with |
//! | `request` | commands, compact and extended |
//! | `reply` | simple replies, and structured and extended chunks |
//! | `chunk` | payloads of chunks: data, holes, block status, errors |
//! | `errno` | error numbers, and what they are on our side |

mod chunk;
mod codes;
mod errno;
mod error;
mod fields;
mod handshake;
mod info;
mod option;
mod reply;
mod request;

pub use chunk::{BlockStatus, Descriptor, ErrorChunk, OffsetData, OffsetHole};
pub use codes::{Chunk, Command, InfoCode, OptionCode, OptionReply};
pub use errno::Errno;
pub use error::ProtoError;
pub use handshake::{ClientFlags, ExportNameReply, Greeting, HandshakeFlags, TransmissionFlags};
pub use info::{Info, MetaContextReply, ServerEntry};
pub use option::{
    InfoRequest, MetaContextRequest, OptionHeader, OptionReplyHeader, encode_option, encode_option_reply,
};
pub use reply::{ChunkFlags, ChunkHeader, REPLY_SIMPLE_MAGIC, ReplyFormat, SimpleReply};
pub use request::{CommandFlags, PayloadFilter, Request};

/// Longest name, description, query or message that the protocol allows, in bytes.
pub const MAX_STRING: usize = 4096;

/// Longest payload of a read or a write that every peer takes unless block sizes were negotiated.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// The name of the one meta context that the protocol itself defines.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Bits of [`Descriptor::flags`] in the context `base:allocation`.
pub mod allocation {
    /// Nothing is allocated here.
    pub const HOLE: u64 = 1;
    /// The bytes read as zeros.
    pub const ZERO: u64 = 2;
}
