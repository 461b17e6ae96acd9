//! A text file that a command writes beside its work: it must not exist, since it might be an image, and gets
//! its name when all of it is there.
//!
//! Used for lists of ranges and for pages about copies. Dropped before its end it is gone: one that was cut
//! short would pass for a whole one.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{self as block, Storage};
use blockmirror_image::{Decision, OpenOptions, Target, TargetOptions};

use crate::failure::{Failure, Outcome};
use crate::interrupt::Interrupt;

/// Bytes that are written at once.
const BUFFER: usize = 64 << 10;

/// A file that has no name yet.
pub(crate) struct TextFile {
    target: Target,
    storage: Arc<dyn Storage>,
    buffer: Vec<u8>,
    /// Where the buffer belongs.
    at: u64,
    failed: Option<block::Error>,
}

impl TextFile {
    /// Begins `path`, which must not exist.
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

    /// Appends `bytes`. A failure is that of [`finish`](Self::finish).
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
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
