//! The modes of a verification, and what is said of a copy that has failed one.

use std::fmt;
use std::path::PathBuf;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_image::Kept;

/// How a copy is verified. In each mode the target is flushed first, and read past the host's page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verify {
    /// Each write is read back after a flush, through what has written it. Proves that the medium took what
    /// was written; not that the source was read rightly, nor that the target's metadata is found again.
    Readback,
    /// The source is hashed while it is copied, the target once it is opened anew. Proves that the target
    /// holds what the copy has read of the source. Needs 66 bytes of memory for each MiB of the runs of
    /// 256 MiB that have data, and 32 MiB; of the whole disk only: not with sync mode top, nor where
    /// failed ranges are left out.
    Hash,
    /// Source and target are both read again, the target once it is opened anew, and compared. Proves that
    /// they are equal when the copy ends.
    Full,
}

impl Verify {
    /// Its name on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Readback => "readback",
            Self::Hash => "hash",
            Self::Full => "full",
        }
    }
}

/// A copy that does not hold what the source does. The target is kept, and marked as far as it can be.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Mismatch {
    /// The target.
    pub target: PathBuf,
    /// What became of it.
    pub kept: Kept,
    /// Where it differs: in sectors of 512 bytes on disks of up to 128 GiB, in coarser units on longer ones.
    pub ranges: DirtyBitmap,
    /// Why `ranges` is not all: a failure, or a stop, came before the rest was compared.
    pub incomplete: Option<String>,
    /// A checkpoint that leads to the copy and could not be made invalid: it must be removed.
    pub checkpoint: Option<PathBuf>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, bytes) = (self.ranges.runs().count(), self.ranges.dirty_bytes());
        let first = self.ranges.next_dirty(0, 1).map_or(0, |run| run.start);
        let plural = if count == 1 { "" } else { "s" };
        write!(
            f,
            "verify: {}: {bytes} bytes in {count} range{plural} differ from the source, the first at {first}",
            self.target.display()
        )?;
        if let Some(why) = &self.incomplete {
            write!(f, "; there may be more, the rest was not compared: {why}")?;
        }
        if let Some(checkpoint) = &self.checkpoint {
            write!(f, "; remove its checkpoint, which cannot be written: {}", checkpoint.display())?;
        }
        match &self.kept {
            Kept::Partial(paths) => {
                f.write_str("; the copy is kept as ")?;
                for (index, path) in paths.iter().enumerate() {
                    let comma = if index == 0 { "" } else { ", " };
                    write!(f, "{comma}{}", path.display())?;
                }
                Ok(())
            }
            Kept::Corrupt => f.write_str("; it is marked corrupt"),
            Kept::Unfinished => f.write_str("; it stays marked as unfinished"),
            _ => f.write_str("; it is kept, and nothing in it says so"),
        }
    }
}
