//! Files of ranges of a disk: written by `compare` and by a verification (`--ranges`), read by `--only`.
//!
//! The format is that of [`blockmirror_ops::read_ranges`].

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{self as block, ByteRange, Storage};
use blockmirror_image::{Decision, OpenOptions, Target, TargetOptions};
use blockmirror_mirror::DirtyBitmap;
use blockmirror_ops::{read_ranges, write_range};

use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;

/// Bytes that are written at once.
const BUFFER: usize = 64 << 10;

/// A file of ranges that gets its name when all of them are in it. Dropped before that it is gone: a list
/// that was cut short would pass for a whole one.
pub(crate) struct RangesFile {
    target: Target,
    storage: Arc<dyn Storage>,
    buffer: Vec<u8>,
    /// Where the buffer belongs.
    at: u64,
    failed: Option<block::Error>,
}

impl RangesFile {
    /// Begins `path`, which must not exist: it might be an image.
    pub(crate) fn create(path: &Path, interrupt: &Interrupt) -> Outcome<Self> {
        let options = TargetOptions::new();
        if Target::decide(path, &options)? != Decision::Create {
            return Err(Failure::failed(format_args!("create: {}: it exists", path.display())));
        }
        let target = Target::prepare(path, options, &OpenOptions::new())?;
        interrupt.remove_at_end(target.partial_path());
        let storage = target.storage();
        Ok(Self { target, storage, buffer: Vec::new(), at: 0, failed: None })
    }

    /// Appends `range`. A failure is that of [`finish`](Self::finish).
    pub(crate) fn push(&mut self, range: ByteRange) {
        // Writing to memory does not fail.
        let _ = write_range(&mut self.buffer, range);
        if self.buffer.len() >= BUFFER {
            self.write();
        }
    }

    fn write(&mut self) {
        if self.failed.is_none() {
            self.failed = self.storage.write_at(&self.buffer, self.at).err();
        }
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
    }

    /// Gives it its name.
    pub(crate) fn finish(mut self) -> Outcome<()> {
        self.write();
        match self.failed {
            Some(error) => Err(error.into()),
            None => Ok(self.target.persist()?),
        }
    }
}

/// The ranges in the file `path`, of a disk of `len` bytes.
pub(crate) fn read(path: &Path, len: u64) -> Outcome<DirtyBitmap> {
    let failed =
        |why: &dyn std::fmt::Display| Failure::failed(format_args!("read: {}: {why}", path.display()));
    let file = File::open(path).map_err(|error| failed(&error))?;
    read_ranges(&mut BufReader::new(file), len).map_err(|error| failed(&error))
}
