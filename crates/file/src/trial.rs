//! Whether a file can become longer, and whether there is space for that, without a change of its length.
//!
//! Asked by `image::Target` before the old contents of a file go. A process that ends in the middle of a
//! trial leaves a file of the same length and contents; space that is reserved past its end goes with the
//! next change of its length.

use blockmirror_block::{ByteRange, Error, ErrorKind, Result, Storage};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::storage::FileStorage;
use crate::zeroes::{self, Outcome};

impl FileStorage {
    /// Reserves space for `range`; the length of the file stays. Setting the length that it has gives back
    /// what lies past it.
    ///
    /// # Errors
    /// There is no space; [`ErrorKind::Unsupported`] if it is a block device, or the file system cannot.
    pub fn reserve(&self, range: ByteRange) -> Result<()> {
        let outcome = match self.is_block_device() {
            true => Ok(Outcome::Unsupported),
            false => zeroes::reserve(self.file(), range),
        };
        let reserved = outcome.and_then(|outcome| match outcome {
            Outcome::Done => Ok(()),
            Outcome::Unsupported => Err(Error::new(ErrorKind::Unsupported, "allocate").at(range.start())),
        });
        reserved.map_err(|e| e.or_in_file(&self.name().into()))
    }

    /// Fails if the file system, or the limit that the process has for file sizes, does not allow the file
    /// to grow to `len` bytes. Changes nothing.
    ///
    /// # Errors
    /// It is not allowed; [`ErrorKind::Unsupported`] if that shows only when the file grows.
    pub fn check_len(&self, len: u64) -> Result<()> {
        let too_long = || Error::io("set length", Errno::FBIG.into());
        let checked = if getrlimit(Resource::Fsize).current.is_some_and(|limit| len > limit) {
            Err(too_long())
        } else if len <= self.len()? {
            // It has that length already; a hole there would be one in the contents.
            Ok(())
        } else {
            // There is nothing past the end that it could make a hole of, but the range must be possible.
            match zeroes::punch(self.file(), ByteRange::at(len - 1, 1), "set length") {
                Ok(Outcome::Done) => Ok(()),
                Ok(Outcome::Unsupported) => Err(Error::new(ErrorKind::Unsupported, "set length")),
                Err(error) => Err(error),
            }
        };
        checked.map_err(|e| e.or_in_file(&self.name().into()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use blockmirror_testing::skip_unsupported;

    use super::*;
    use crate::FileOptions;

    #[test]
    fn a_trial_changes_neither_length_nor_contents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"contents").unwrap();
        let file = FileOptions::new().writable(true).open(&path).unwrap();
        for len in [0, 4, 8, 1 << 30] {
            match file.check_len(len) {
                Err(error) if error.kind() == ErrorKind::Unsupported => {
                    skip_unsupported(format_args!("the temporary directory punches no holes"));
                }
                checked => checked.unwrap(),
            }
            assert_eq!(fs::read(&path).unwrap(), b"contents", "{len}");
        }
        match file.reserve(ByteRange::new(8, 1 << 20)) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                return skip_unsupported(format_args!("the temporary directory reserves no space"));
            }
            reserved => reserved.unwrap(),
        }
        let held = || fs::metadata(&path).unwrap().blocks() * 512;
        assert!(held() >= 1 << 20);
        assert_eq!(fs::read(&path).unwrap(), b"contents");
        file.set_len(8).unwrap();
        if held() >= 1 << 20 {
            skip_unsupported(format_args!("the temporary directory keeps what is reserved past the end"));
        }
        assert_eq!(fs::read(&path).unwrap(), b"contents");
    }
}
