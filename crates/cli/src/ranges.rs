//! Files of ranges of a disk: written by `compare` and by a verification (`--ranges`), read by `--only`.
//!
//! The format is that of [`blockmirror_ops::read_ranges`].

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use blockmirror_block::ByteRange;
use blockmirror_mirror::DirtyBitmap;
use blockmirror_ops::{read_ranges, write_range};

use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::text_file::TextFile;

/// A file of ranges that gets its name when all of them are in it.
pub(crate) struct RangesFile {
    file: TextFile,
    line: Vec<u8>,
}

impl RangesFile {
    /// Begins `path`, which must not exist.
    pub(crate) fn create(path: &Path, interrupt: &Interrupt) -> Outcome<Self> {
        Ok(Self { file: TextFile::create(path, interrupt)?, line: Vec::new() })
    }

    /// Appends `range`. A failure is that of [`finish`](Self::finish).
    pub(crate) fn push(&mut self, range: ByteRange) {
        self.line.clear();
        // Writing to memory does not fail.
        let _ = write_range(&mut self.line, range);
        self.file.push(&self.line);
    }

    /// Gives it its name.
    pub(crate) fn finish(self) -> Outcome<()> {
        self.file.finish()
    }
}

/// The ranges in the file `path`, of a disk of `len` bytes.
pub(crate) fn read(path: &Path, len: u64) -> Outcome<DirtyBitmap> {
    let failed =
        |why: &dyn std::fmt::Display| Failure::failed(format_args!("read: {}: {why}", path.display()));
    let file = File::open(path).map_err(|error| failed(&error))?;
    read_ranges(&mut BufReader::new(file), len).map_err(|error| failed(&error))
}
