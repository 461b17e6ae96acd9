//! QEMU's cache modes, as `-t` and `-T` name them.
//!
//! [`OpenOptions::cache`](crate::OpenOptions::cache) and [`CreateSpec::cache`](crate::CreateSpec::cache) take
//! one. What must hold: no mode leaves a flush out. `unsafe`, with which QEMU ignores flushes, is `writeback`
//! here.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// How the files of an image use the host's page cache, and when what is written is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CacheMode {
    /// Past the page cache (`O_DIRECT`); durable after a flush.
    None,
    /// Through the page cache; durable after a flush.
    #[default]
    Writeback,
    /// Through the page cache; each write is durable when it returns.
    Writethrough,
    /// Past the page cache; each write is durable when it returns.
    Directsync,
    /// As [`Writeback`](Self::Writeback).
    Unsafe,
}

/// A text that names no cache mode.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("unknown cache mode \"{0}\": must be none, writeback, writethrough, directsync or unsafe")]
pub struct UnknownCacheMode(String);

impl CacheMode {
    /// Whether files are opened for direct I/O.
    pub const fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether each write is durable when it returns.
    pub const fn writes_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
            Self::Directsync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }
}

impl fmt::Display for CacheMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for CacheMode {
    type Err = UnknownCacheMode;

    /// Reads a name; `off` is another one of `none`.
    fn from_str(text: &str) -> Result<Self, UnknownCacheMode> {
        Ok(match text {
            "none" | "off" => Self::None,
            "writeback" => Self::Writeback,
            "writethrough" => Self::Writethrough,
            "directsync" => Self::Directsync,
            "unsafe" => Self::Unsafe,
            other => return Err(UnknownCacheMode(other.to_owned())),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_qemus() {
        for (name, direct, through) in [
            ("none", true, false),
            ("writeback", false, false),
            ("writethrough", false, true),
            ("directsync", true, true),
            ("unsafe", false, false),
        ] {
            let mode: CacheMode = name.parse().unwrap();
            assert_eq!((mode.as_str(), mode.is_direct(), mode.writes_through()), (name, direct, through));
        }
        assert_eq!("off".parse(), Ok(CacheMode::None));
        for name in ["", "None", "writeback ", "on", "direct"] {
            assert!(name.parse::<CacheMode>().is_err(), "{name}");
        }
    }
}
