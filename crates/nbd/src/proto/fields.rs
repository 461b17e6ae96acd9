//! Taking fields off the front of a payload, one after the other.
//!
//! Used by the decoders of variable-length payloads; the fixed headers are zerocopy structs.

use zerocopy::FromBytes;
use zerocopy::big_endian::{U16, U32, U64};

use super::{MAX_STRING, ProtoError};

/// The rest of a payload, and what it is, for errors.
pub(crate) struct Fields<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(what: &'static str, payload: &'a [u8]) -> Self {
        Self { what, rest: payload }
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], ProtoError> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(ProtoError::Short { what: self.what, len: self.rest.len() })?;
        self.rest = rest;
        Ok(head)
    }

    fn fixed<T: FromBytes>(&mut self) -> Result<T, ProtoError> {
        let bytes = self.bytes(size_of::<T>())?;
        T::read_from_bytes(bytes).map_err(|_| ProtoError::Short { what: self.what, len: bytes.len() })
    }

    pub(crate) fn u16(&mut self) -> Result<u16, ProtoError> {
        Ok(self.fixed::<U16>()?.get())
    }

    pub(crate) fn u32(&mut self) -> Result<u32, ProtoError> {
        Ok(self.fixed::<U32>()?.get())
    }

    pub(crate) fn u64(&mut self) -> Result<u64, ProtoError> {
        Ok(self.fixed::<U64>()?.get())
    }

    /// A string with a 32-bit length before it.
    pub(crate) fn counted_str(&mut self) -> Result<&'a str, ProtoError> {
        let len = self.u32()?;
        self.str(u64::from(len))
    }

    /// A string with a 16-bit length before it.
    pub(crate) fn counted_str16(&mut self) -> Result<&'a str, ProtoError> {
        let len = self.u16()?;
        self.str(u64::from(len))
    }

    /// The rest, as a string.
    pub(crate) fn rest_str(&mut self) -> Result<&'a str, ProtoError> {
        self.str(self.rest.len() as u64)
    }

    fn str(&mut self, len: u64) -> Result<&'a str, ProtoError> {
        let fits = usize::try_from(len)
            .ok()
            .filter(|n| *n <= MAX_STRING)
            .ok_or(ProtoError::StringTooLong { what: self.what, len })?;
        std::str::from_utf8(self.bytes(fits)?).map_err(|_| ProtoError::NotUtf8 { what: self.what })
    }

    /// The rest as it is.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// That nothing is left.
    pub(crate) fn end(self) -> Result<(), ProtoError> {
        match self.rest.len() {
            0 => Ok(()),
            len => Err(ProtoError::Long { what: self.what, len: len as u64 }),
        }
    }
}

/// Adds a length as 32 bits; strings of this crate are far shorter than that.
pub(crate) fn put_counted(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// The length of a payload as its 32-bit field says it.
pub(crate) fn len32(payload: &[u8]) -> u32 {
    u32::try_from(payload.len()).unwrap_or(u32::MAX)
}

/// Declares a set of flags over an integer of the wire. Unknown bits are kept: who receives them decides.
macro_rules! wire_flags {
    ($(#[$m:meta])* $name:ident: $int:ty { $($(#[$fm:meta])* $flag:ident = $bit:expr;)* }) => {
        $(#[$m])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name($int);

        impl $name {
            /// No flag.
            pub const NONE: Self = Self(0);
            $($(#[$fm])* pub const $flag: Self = Self(1 << $bit);)*
            /// Every flag that has a name here.
            pub const ALL: Self = Self(0 $(| (1 << $bit))*);

            /// The flags as they came over the wire, unknown ones included.
            pub const fn from_bits(bits: $int) -> Self {
                Self(bits)
            }

            /// The flags as they go over the wire.
            pub const fn bits(self) -> $int {
                self.0
            }

            /// Whether every flag of `other` is set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Both sets of flags.
            #[must_use]
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// The same flags without those of `other`.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// Whether a flag is set that is not among `known`.
            pub const fn has_beyond(self, known: Self) -> bool {
                self.0 & !known.0 != 0
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                self.union(other)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let mut set = f.debug_set();
                $(if self.contains(Self::$flag) { set.entry(&stringify!($flag)); })*
                let unknown = self.without(Self::ALL);
                if unknown.0 != 0 {
                    set.entry(&format_args!("{:#x}", unknown.0));
                }
                set.finish()
            }
        }
    };
}

pub(crate) use wire_flags;
