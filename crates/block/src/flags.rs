//! How writes and zeroing are to be done.

use bitflags::bitflags;

bitflags! {
    /// How a write is to be done.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct WriteFlags: u8 {
        /// Durable before the call returns.
        const FUA = 1 << 0;
        /// A guest's write: where it is part of a unit of the format, and the rest of that unit lies in a
        /// file that was cut short, the rest becomes zeros, as the guest reads it. Without the flag such a
        /// write fails with
        /// [`ErrorKind::CutShort`](crate::ErrorKind::CutShort): a job must not turn a loss into zeros.
        const LOST_AS_ZEROS = 1 << 1;
    }
}

bitflags! {
    /// How zeros are to be written.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ZeroFlags: u8 {
        /// Space may be given back.
        const MAY_UNMAP = 1 << 0;
        /// Fail rather than write zero bytes.
        const NO_FALLBACK = 1 << 1;
        /// Durable before the call returns.
        const FUA = 1 << 2;
        /// By statement of the device itself, also where it reads as zeros already because it holds nothing:
        /// what is attached below it later must not show. Devices without layers need nothing for it.
        const EXPLICIT = 1 << 3;
        /// As [`WriteFlags::LOST_AS_ZEROS`].
        const LOST_AS_ZEROS = 1 << 4;
    }
}

impl WriteFlags {
    /// No flag.
    pub const NONE: Self = Self::empty();
}

impl ZeroFlags {
    /// No flag.
    pub const NONE: Self = Self::empty();
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
        assert_eq!(format!("{f:?}"), "ZeroFlags(MAY_UNMAP | FUA)");
        assert_eq!(f.difference(ZeroFlags::FUA), ZeroFlags::MAY_UNMAP);
        assert_eq!(WriteFlags::from(f), WriteFlags::FUA);
        let both = WriteFlags::FUA | WriteFlags::LOST_AS_ZEROS;
        assert_eq!(WriteFlags::from(ZeroFlags::from(both) | ZeroFlags::EXPLICIT), both);
    }
}
