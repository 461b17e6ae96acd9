//! How much can be written to a target before its space is used up.
//!
//! Asked before a copy begins, by a caller that knows how much it will write, and when space has run out. The
//! answer is that of a moment: others write too.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use blockmirror_block::{Error, Result};
use rustix::process::geteuid;

use crate::location::{Found, Location};

/// The space for a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FreeSpace {
    /// The bytes that are free in its file system; of a block device its length.
    pub bytes: u64,
    /// Why more may fit, or less, if that is so.
    pub guess: Option<&'static str>,
    /// Whether files of the file system can share blocks.
    pub shares_blocks: bool,
    /// The bytes that a regular file of that name occupies.
    pub occupied: u64,
    /// The file system, as `st_dev` names it; `None` of a block device.
    pub device: Option<u64>,
}

impl FreeSpace {
    /// That for the file `path`, whether it exists or not; `None` if its file system does not say.
    ///
    /// # Errors
    /// Its directory cannot be searched, or the system does not answer.
    pub fn of(path: &Path) -> Result<Option<Self>> {
        let (location, found) = Location::find(path)?;
        let failed = |e: io::Error| Error::io("look up space", e).in_file(path.display().to_string());
        let (device, occupied) = match &found {
            Found::File(file) | Found::Descriptor(file) if file.metadata().file_type().is_block_device() => {
                return Self::of_device(path).map(Some).map_err(failed);
            }
            Found::File(file) | Found::Descriptor(file) => {
                (file.metadata().dev(), file.metadata().blocks().saturating_mul(512))
            }
            Found::Nothing => (location.stat().map_err(failed)?.st_dev, 0),
        };
        let file = match &found {
            Found::File(file) | Found::Descriptor(file) => {
                rustix::fs::fstatvfs(file).and_then(|space| Ok((space, rustix::fs::fstatfs(file)?.f_type)))
            }
            Found::Nothing => rustix::fs::fstatvfs(location.directory())
                .and_then(|space| Ok((space, rustix::fs::fstatfs(location.directory())?.f_type))),
        };
        let (space, kind) = file.map_err(|e| failed(e.into()))?;
        // One without a limit, or without an answer.
        if space.f_blocks == 0 {
            return Ok(None);
        }
        // What is set aside for root is free to root.
        let blocks = if geteuid().is_root() { space.f_bfree } else { space.f_bavail };
        let kind = Kind::of(u32::try_from(kind).unwrap_or(0));
        Ok(Some(Self {
            bytes: blocks.saturating_mul(space.f_frsize),
            guess: kind.guess(),
            shares_blocks: kind.shares_blocks(),
            occupied,
            device: Some(device),
        }))
    }

    fn of_device(path: &Path) -> io::Result<Self> {
        let bytes = File::open(path)?.seek(SeekFrom::End(0))?;
        Ok(Self { bytes, guess: None, shares_blocks: false, occupied: 0, device: None })
    }
}

/// File systems whose figures are not all there is to say: the numbers are those of `statfs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// They may compress, or write twice: btrfs, ZFS, bcachefs, F2FS.
    Transforms {
        reflinks: bool,
    },
    /// A server or a program says what is free: NFS, SMB, 9p, Ceph, FUSE.
    Remote,
    /// Another one lies below, which may do any of that: overlayfs.
    Layered,
    /// XFS, OCFS2.
    Reflinks,
    Other,
}

impl Kind {
    fn of(number: u32) -> Self {
        match number {
            0x9123_683e | 0xca45_1a4e | 0x2fc1_2fc1 => Self::Transforms { reflinks: true },
            0xf2f5_2010 => Self::Transforms { reflinks: false },
            0x0000_6969 | 0x0000_517b | 0xfe53_4d42 | 0xff53_4d42 | 0x0102_1997 | 0x00c3_6400
            | 0x6573_5546 => Self::Remote,
            0x794c_7630 => Self::Layered,
            0x5846_5342 | 0x7461_636f => Self::Reflinks,
            _ => Self::Other,
        }
    }

    fn guess(self) -> Option<&'static str> {
        match self {
            Self::Transforms { .. } => {
                Some("the file system may compress what is written, or store it twice")
            }
            Self::Remote => Some("the server of the file system may have other limits than it says"),
            Self::Layered => Some("the file system below may share or compress what is written"),
            Self::Reflinks | Self::Other => None,
        }
    }

    /// Of a server, and of what lies below another one, it is not known.
    fn shares_blocks(self) -> bool {
        matches!(self, Self::Reflinks | Self::Layered | Self::Remote | Self::Transforms { reflinks: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_and_its_place_have_the_same_space() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let before = FreeSpace::of(&path).unwrap();
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let after = FreeSpace::of(&path).unwrap();
        let Some((before, after)) = before.zip(after) else { return };
        assert_eq!((before.device, before.occupied), (after.device, 0));
        assert!(after.occupied >= 1 << 20 || after.guess.is_some(), "{after:?}");
        let error = FreeSpace::of(&dir.path().join("missing/disk")).unwrap_err();
        assert_eq!(error.kind(), blockmirror_block::ErrorKind::NotFound);
    }

    #[test]
    fn file_systems_are_told_apart() {
        let guesses = |number| Kind::of(number).guess().is_some();
        let shares = |number| Kind::of(number).shares_blocks();
        let (ext4, tmpfs, xfs, btrfs, nfs) = (0xef53, 0x0102_1994, 0x5846_5342, 0x9123_683e, 0x6969);
        assert_eq!([ext4, tmpfs, xfs, btrfs, nfs].map(guesses), [false, false, false, true, true]);
        assert_eq!([ext4, tmpfs, xfs, btrfs, nfs].map(shares), [false, false, true, true, true]);
    }
}
