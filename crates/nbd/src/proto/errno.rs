//! The error numbers of the protocol, and what they are on our side.
//!
//! Few numbers may travel; the server maps every [`ErrorKind`] onto one, the client maps them back.

use std::fmt;

use blockmirror_block::ErrorKind;

/// An error number of a reply. Never zero: zero is success.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(u32);

impl Errno {
    /// Not permitted: a write to a read-only export.
    pub const PERM: Self = Self(1);
    /// The device failed.
    pub const IO: Self = Self(5);
    /// Out of memory.
    pub const NOMEM: Self = Self(12);
    /// The request makes no sense.
    pub const INVAL: Self = Self(22);
    /// No space, or a write past the end.
    pub const NOSPC: Self = Self(28);
    /// The answer does not fit in one chunk.
    pub const OVERFLOW: Self = Self(75);
    /// Fast zeroing is not possible here.
    pub const NOTSUP: Self = Self(95);
    /// The server is going down.
    pub const SHUTDOWN: Self = Self(108);

    /// The error in a reply's field; `None` for zero, which is success.
    pub const fn from_wire(value: u32) -> Option<Self> {
        if value == 0 { None } else { Some(Self(value)) }
    }

    /// The number on the wire.
    pub const fn to_wire(self) -> u32 {
        self.0
    }

    /// The error number for `kind`.
    pub const fn from_kind(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::ReadOnly | ErrorKind::PermissionDenied => Self::PERM,
            ErrorKind::NoSpace => Self::NOSPC,
            ErrorKind::OutOfBounds | ErrorKind::InvalidInput => Self::INVAL,
            ErrorKind::Unsupported => Self::NOTSUP,
            ErrorKind::LimitExceeded => Self::NOMEM,
            _ => Self::IO,
        }
    }

    /// What the number means for the device that a client is.
    pub const fn kind(self) -> ErrorKind {
        match self {
            Self::PERM => ErrorKind::ReadOnly,
            Self::NOSPC => ErrorKind::NoSpace,
            Self::INVAL | Self::OVERFLOW => ErrorKind::InvalidInput,
            Self::NOTSUP => ErrorKind::Unsupported,
            Self::NOMEM => ErrorKind::LimitExceeded,
            _ => ErrorKind::Io,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::PERM => "EPERM",
            Self::IO => "EIO",
            Self::NOMEM => "ENOMEM",
            Self::INVAL => "EINVAL",
            Self::NOSPC => "ENOSPC",
            Self::OVERFLOW => "EOVERFLOW",
            Self::NOTSUP => "ENOTSUP",
            Self::SHUTDOWN => "ESHUTDOWN",
            Self(other) => return write!(f, "error {other}"),
        })
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_that_scripts_act_on_survive_the_way() {
        for kind in [ErrorKind::ReadOnly, ErrorKind::NoSpace, ErrorKind::Io, ErrorKind::Unsupported] {
            assert_eq!(Errno::from_kind(kind).kind(), kind);
        }
        assert_eq!(Errno::from_wire(0), None);
        assert_eq!(Errno::from_wire(4711).map(|e| e.to_string()), Some("error 4711".into()));
    }
}
