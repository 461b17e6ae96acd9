//! The numbers that say what something is: options, their replies, infos, commands and chunks.
//!
//! Every one of them keeps a number it does not know as `Other`, because a peer may send it and must get an
//! answer.

macro_rules! codes {
    ($(#[$m:meta])* $name:ident: $int:ty { $($(#[$vm:meta])* $variant:ident = $value:expr;)* }) => {
        $(#[$m])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$vm])* $variant,)*
            /// A number that has no name here.
            Other($int),
        }

        impl $name {
            /// What a number of the wire means.
            pub const fn from_wire(value: $int) -> Self {
                match value {
                    $(v if v == $value => Self::$variant,)*
                    other => Self::Other(other),
                }
            }

            /// The number on the wire.
            pub const fn to_wire(self) -> $int {
                match self {
                    $(Self::$variant => $value,)*
                    Self::Other(value) => value,
                }
            }
        }
    };
}

codes! {
    /// What a client asks for before the transmission phase.
    OptionCode: u32 {
        /// Begin transmission; cannot be refused but by closing.
        ExportName = 1;
        /// Give up.
        Abort = 2;
        /// Which exports there are.
        List = 3;
        /// Change to TLS.
        StartTls = 5;
        /// Tell about an export.
        Info = 6;
        /// Tell about an export and begin transmission.
        Go = 7;
        /// Replies in chunks.
        StructuredReply = 8;
        /// Which meta contexts an export has.
        ListMetaContext = 9;
        /// Select meta contexts.
        SetMetaContext = 10;
        /// Headers with 64-bit lengths; implies structured replies.
        ExtendedHeaders = 11;
    }
}

/// The bit that makes an option reply an error.
const ERR: u32 = 1 << 31;

codes! {
    /// What an answer to an option is.
    OptionReply: u32 {
        /// Done, or the end of a list.
        Ack = 1;
        /// One export of a list.
        Server = 2;
        /// One [`Info`](super::Info).
        Info = 3;
        /// One meta context.
        MetaContext = 4;
        /// The option is not known.
        ErrUnsup = ERR | 1;
        /// Not allowed by the server's policy.
        ErrPolicy = ERR | 2;
        /// The request makes no sense.
        ErrInvalid = ERR | 3;
        /// Not on this platform.
        ErrPlatform = ERR | 4;
        /// Only after TLS.
        ErrTlsReqd = ERR | 5;
        /// No such export.
        ErrUnknown = ERR | 6;
        /// The server is going down.
        ErrShutdown = ERR | 7;
        /// Only for clients that ask for block sizes.
        ErrBlockSizeReqd = ERR | 8;
        /// The request is too long.
        ErrTooBig = ERR | 9;
        /// Only with extended headers.
        ErrExtHeaderReqd = ERR | 10;
    }
}

impl OptionReply {
    /// Whether it refuses the option.
    pub const fn is_error(self) -> bool {
        self.to_wire() & ERR != 0
    }
}

codes! {
    /// A fact about an export.
    InfoCode: u16 {
        /// Size and transmission flags.
        Export = 0;
        /// The name to use.
        Name = 1;
        /// Words for people.
        Description = 2;
        /// Which request sizes are legal.
        BlockSize = 3;
    }
}

codes! {
    /// What a request of the transmission phase does.
    Command: u16 {
        /// Read bytes.
        Read = 0;
        /// Write the payload.
        Write = 1;
        /// End the connection; has no answer.
        Disconnect = 2;
        /// Make completed writes durable.
        Flush = 3;
        /// The bytes are not needed any more.
        Trim = 4;
        /// Fetch bytes ahead of a read.
        Cache = 5;
        /// Make bytes zero.
        WriteZeroes = 6;
        /// What lies where, in each selected meta context.
        BlockStatus = 7;
    }
}

/// The bit that makes a chunk an error.
const CHUNK_ERR: u16 = 1 << 15;

codes! {
    /// What a chunk of a structured or extended reply holds.
    Chunk: u16 {
        /// Nothing.
        None = 0;
        /// An offset and bytes.
        OffsetData = 1;
        /// An offset and a count of zeros.
        OffsetHole = 2;
        /// Descriptors of one context, with 32-bit fields.
        BlockStatus = 5;
        /// Descriptors of one context, with 64-bit fields.
        BlockStatusExt = 6;
        /// An error for the whole request.
        Error = CHUNK_ERR | 1;
        /// An error at an offset.
        ErrorOffset = CHUNK_ERR | 2;
    }
}

impl Chunk {
    /// Whether it says that the request failed; holds for unknown ones too.
    pub const fn is_error(self) -> bool {
        self.to_wire() & CHUNK_ERR != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_survives_the_way_there_and_back() {
        for n in 0..=12 {
            assert_eq!(OptionCode::from_wire(n).to_wire(), n);
            assert_eq!(OptionReply::from_wire(ERR | n).to_wire(), ERR | n);
        }
        for n in (0..20).chain(CHUNK_ERR..CHUNK_ERR + 5) {
            assert_eq!(Command::from_wire(n).to_wire(), n);
            assert_eq!(Chunk::from_wire(n).to_wire(), n);
            assert_eq!(InfoCode::from_wire(n).to_wire(), n);
        }
    }

    #[test]
    fn errors_are_told_by_their_bit_even_if_unknown() {
        assert!(OptionReply::ErrUnknown.is_error() && OptionReply::from_wire(ERR | 77).is_error());
        assert!(!OptionReply::MetaContext.is_error());
        assert!(Chunk::from_wire(CHUNK_ERR | 99).is_error() && !Chunk::BlockStatusExt.is_error());
    }
}
