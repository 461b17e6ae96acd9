//! The first bytes of a connection, and the last of a handshake that used `EXPORT_NAME`.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ProtoError;
use super::fields::wire_flags;

/// `NBDMAGIC`: every server begins with it.
const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: the server speaks newstyle.
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What stands there in an oldstyle server.
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;

wire_flags! {
    /// What a server offers in its first bytes.
    HandshakeFlags: u16 {
        /// Options can be refused without closing.
        FIXED_NEWSTYLE = 0;
        /// The 124 zeros after `EXPORT_NAME` can be left out.
        NO_ZEROES = 1;
    }
}

wire_flags! {
    /// What a client takes of [`HandshakeFlags`].
    ClientFlags: u32 {
        /// It speaks fixed newstyle.
        FIXED_NEWSTYLE = 0;
        /// It wants no zeros after `EXPORT_NAME`.
        NO_ZEROES = 1;
    }
}

wire_flags! {
    /// What an export can do.
    TransmissionFlags: u16 {
        /// Always set.
        HAS_FLAGS = 0;
        /// Writes fail.
        READ_ONLY = 1;
        /// `FLUSH` is served.
        SEND_FLUSH = 2;
        /// The flag `FUA` is served.
        SEND_FUA = 3;
        /// A rotating disk.
        ROTATIONAL = 4;
        /// `TRIM` is served.
        SEND_TRIM = 5;
        /// `WRITE_ZEROES` is served.
        SEND_WRITE_ZEROES = 6;
        /// The flag `DF` is served.
        SEND_DF = 7;
        /// A flush on one connection covers writes of all.
        CAN_MULTI_CONN = 8;
        /// `RESIZE` is served (an extension that is not used here).
        SEND_RESIZE = 9;
        /// `CACHE` is served.
        SEND_CACHE = 10;
        /// The flag `FAST_ZERO` is served.
        SEND_FAST_ZERO = 11;
        /// `BLOCK_STATUS` takes a [`PayloadFilter`](super::PayloadFilter).
        BLOCK_STAT_PAYLOAD = 12;
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireGreeting {
    init: U64,
    option: U64,
    flags: U16,
}

/// The first 18 bytes of a newstyle server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// What the server offers.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Bytes on the wire.
    pub const LEN: usize = size_of::<WireGreeting>();

    /// What a server begins with.
    ///
    /// # Errors
    /// [`ProtoError::Value`] for an oldstyle server, [`ProtoError::Magic`] for what is no NBD server.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, ProtoError> {
        let wire: WireGreeting = zerocopy::transmute!(*bytes);
        magic("greeting", INIT_MAGIC, wire.init.get())?;
        if wire.option.get() == OLDSTYLE_MAGIC {
            return Err(ProtoError::Value { what: "oldstyle handshake", found: OLDSTYLE_MAGIC });
        }
        magic("greeting", OPTION_MAGIC, wire.option.get())?;
        Ok(Self { flags: HandshakeFlags::from_bits(wire.flags.get()) })
    }

    /// The bytes.
    pub fn encode(self) -> [u8; Self::LEN] {
        zerocopy::transmute!(WireGreeting {
            init: U64::new(INIT_MAGIC),
            option: U64::new(OPTION_MAGIC),
            flags: U16::new(self.flags.bits()),
        })
    }
}

impl ClientFlags {
    /// Bytes on the wire.
    pub const LEN: usize = 4;

    /// What a client answers the greeting with.
    pub fn decode(bytes: [u8; Self::LEN]) -> Self {
        Self::from_bits(U32::from_bytes(bytes).get())
    }

    /// The bytes.
    pub fn encode(self) -> [u8; Self::LEN] {
        U32::new(self.bits()).to_bytes()
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireExport {
    size: U64,
    flags: U16,
}

/// What a server answers `EXPORT_NAME` with; [`ZEROES`](Self::ZEROES) zeros follow unless both sides agreed
/// on none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportNameReply {
    /// Bytes of the export.
    pub size: u64,
    /// What it can do.
    pub flags: TransmissionFlags,
}

impl ExportNameReply {
    /// Bytes on the wire, without the zeros.
    pub const LEN: usize = size_of::<WireExport>();
    /// How many zeros may follow.
    pub const ZEROES: usize = 124;

    /// What the server said.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let wire: WireExport = zerocopy::transmute!(*bytes);
        Self { size: wire.size.get(), flags: TransmissionFlags::from_bits(wire.flags.get()) }
    }

    /// The bytes, without the zeros.
    pub fn encode(self) -> [u8; Self::LEN] {
        zerocopy::transmute!(WireExport { size: U64::new(self.size), flags: U16::new(self.flags.bits()) })
    }
}

/// That a magic number is the right one.
pub(crate) fn magic(what: &'static str, expected: u64, found: u64) -> Result<(), ProtoError> {
    if expected == found { Ok(()) } else { Err(ProtoError::Magic { what, expected, found }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_is_the_one_of_the_document() {
        let greeting = Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES };
        let bytes = greeting.encode();
        assert_eq!(&bytes, b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(Greeting::decode(&bytes), Ok(greeting));
    }

    #[test]
    fn other_servers_are_told_apart() {
        let mut bytes = Greeting { flags: HandshakeFlags::NONE }.encode();
        bytes[8..16].copy_from_slice(&OLDSTYLE_MAGIC.to_be_bytes());
        assert!(matches!(Greeting::decode(&bytes), Err(ProtoError::Value { .. })));
        bytes[0] = b'X';
        assert!(matches!(Greeting::decode(&bytes), Err(ProtoError::Magic { .. })));
    }

    #[test]
    fn flags_print_by_name_and_keep_unknown_bits() {
        let flags = TransmissionFlags::from_bits(0x8003);
        assert_eq!(format!("{flags:?}"), r#"{"HAS_FLAGS", "READ_ONLY", 0x8000}"#);
        assert!(flags.has_beyond(TransmissionFlags::ALL));
        let reply = ExportNameReply { size: 1 << 40, flags };
        assert_eq!(ExportNameReply::decode(&reply.encode()), reply);
        assert_eq!(ClientFlags::decode(ClientFlags::NO_ZEROES.encode()), ClientFlags::NO_ZEROES);
    }
}
