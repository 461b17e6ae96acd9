//! How writes and zeroing are to be done.

use std::fmt;

macro_rules! flags {
    ($(#[$m:meta])* $name:ident { $($(#[$fm:meta])* $flag:ident = $bit:expr;)* }) => {
        $(#[$m])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(u8);

        impl $name {
            /// No flag.
            pub const NONE: Self = Self(0);
            $($(#[$fm])* pub const $flag: Self = Self(1 << $bit);)*

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
        }

        impl std::ops::BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                self.union(other)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut set = f.debug_set();
                $(if self.contains(Self::$flag) { set.entry(&stringify!($flag)); })*
                set.finish()
            }
        }
    };
}

flags! {
    /// How a write is to be done.
    WriteFlags {
        /// Durable before the call returns.
        FUA = 0;
        /// A guest's write: where it is part of a unit of the format, and the rest of that unit lies in a
        /// file that was cut short, the rest becomes zeros, as the guest reads it. Without the flag such a
        /// write fails with
        /// [`ErrorKind::CutShort`](crate::ErrorKind::CutShort): a job must not turn a loss into zeros.
        LOST_AS_ZEROS = 1;
    }
}

flags! {
    /// How zeros are to be written.
    ZeroFlags {
        /// Space may be given back.
        MAY_UNMAP = 0;
        /// Fail rather than write zero bytes.
        NO_FALLBACK = 1;
        /// Durable before the call returns.
        FUA = 2;
        /// By statement of the device itself, also where it reads as zeros already because it holds nothing:
        /// what is attached below it later must not show. Devices without layers need nothing for it.
        EXPLICIT = 3;
        /// As [`WriteFlags::LOST_AS_ZEROS`].
        LOST_AS_ZEROS = 4;
    }
}

/// What the two kinds of writing have in common.
const IN_COMMON: [(WriteFlags, ZeroFlags); 2] =
    [(WriteFlags::FUA, ZeroFlags::FUA), (WriteFlags::LOST_AS_ZEROS, ZeroFlags::LOST_AS_ZEROS)];

/// For zero bytes that are written in place of zeroing.
impl From<ZeroFlags> for WriteFlags {
    fn from(flags: ZeroFlags) -> Self {
        let set = IN_COMMON.into_iter().filter(|(_, zero)| flags.contains(*zero));
        set.fold(Self::NONE, |all, (write, _)| all | write)
    }
}

/// For zeroing in place of a write of zero bytes.
impl From<WriteFlags> for ZeroFlags {
    fn from(flags: WriteFlags) -> Self {
        let set = IN_COMMON.into_iter().filter(|(write, _)| flags.contains(*write));
        set.fold(Self::NONE, |all, (_, zero)| all | zero)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_combine_and_print_by_name() {
        let f = ZeroFlags::MAY_UNMAP | ZeroFlags::FUA;
        assert!(f.contains(ZeroFlags::FUA) && !f.contains(ZeroFlags::NO_FALLBACK));
        assert_eq!(format!("{f:?}"), r#"{"MAY_UNMAP", "FUA"}"#);
        assert_eq!(f.without(ZeroFlags::FUA), ZeroFlags::MAY_UNMAP);
        assert_eq!(WriteFlags::from(f), WriteFlags::FUA);
        let both = WriteFlags::FUA | WriteFlags::LOST_AS_ZEROS;
        assert_eq!(WriteFlags::from(ZeroFlags::from(both) | ZeroFlags::EXPLICIT), both);
    }
}
