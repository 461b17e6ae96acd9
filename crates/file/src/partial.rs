//! Temporary names, `.NAME.RANDOM.partial`, and the files that interrupted runs have left under them.
//!
//! Used by [`crate::new_file`] and [`crate::leftover`]. The random number names a file across runs.

use std::ffi::{OsStr, OsString};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{Error, ErrorKind, Result};
use rustix::fs::{AtFlags, FileType, OFlags};
use rustix::process::geteuid;

use crate::direct;
use crate::location::Location;
use crate::open::FileOptions;
use crate::storage::FileStorage;

/// More than enough to get past other files of the kind; fewer would do.
pub(crate) const TRIES: usize = 64;

/// Opens a file by a temporary name for `name` that no file has: `open` fails if one has it. A shorter one is
/// tried where the file system takes no longer names.
pub(crate) fn with_partial_name<T>(
    name: &OsStr,
    mut open: impl FnMut(&OsStr) -> io::Result<T>,
) -> io::Result<(OsString, T)> {
    let mut lengths = PARTIAL_LENGTHS.into_iter();
    let mut longest = lengths.next().unwrap_or(SHORT_NAME_MAX);
    for _ in 0..TRIES {
        let random = RandomState::new().hash_one(std::process::id()) as u32;
        let partial = partial_name(name.as_bytes(), longest, random);
        match open(&partial) {
            Ok(file) => return Ok((partial, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) if e.kind() == io::ErrorKind::InvalidFilename => longest = lengths.next().ok_or(e)?,
            Err(e) => return Err(e),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// The longest file name on most file systems.
const NAME_MAX: usize = 255;

/// What other file systems take at least: eCryptfs has 143.
const SHORT_NAME_MAX: usize = 128;

/// The longest temporary names, in the order in which they are tried.
pub(crate) const PARTIAL_LENGTHS: [usize; 2] = [NAME_MAX, SHORT_NAME_MAX];

/// What stands before and after the random part of a temporary name, for the file `name`: NAME is cut where
/// the whole would have more than `longest` bytes.
pub(crate) fn partial_affixes(name: &[u8], longest: usize) -> (Vec<u8>, &'static [u8]) {
    let around = 2 + RANDOM_DIGITS + SUFFIX.len();
    let mut prefix = vec![b'.'];
    prefix.extend_from_slice(&name[..name.len().min(longest - around)]);
    prefix.push(b'.');
    (prefix, SUFFIX)
}

/// What ends a temporary name.
const SUFFIX: &[u8] = b".partial";
/// What takes its place in the name of the file that says how far the temporary one has come: no longer.
pub(crate) const SIDECAR_SUFFIX: &[u8] = b".resume";

/// Hexadecimal digits between the affixes.
pub(crate) const RANDOM_DIGITS: usize = 8;

/// `.NAME.RANDOM.partial`.
fn partial_name(name: &[u8], longest: usize, random: u32) -> OsString {
    let (mut bytes, suffix) = partial_affixes(name, longest);
    bytes.extend_from_slice(format!("{random:08x}").as_bytes());
    bytes.extend_from_slice(suffix);
    OsString::from_vec(bytes)
}

/// The random number in a temporary name, or in that of a sidecar.
pub(crate) fn number(partial: &OsStr) -> u32 {
    let mut parts = partial.as_bytes().rsplit(|byte| *byte == b'.');
    let digits = parts.nth(1).and_then(|digits| std::str::from_utf8(digits).ok());
    digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0)
}

/// Whether a temporary name is that of the file itself, not of its sidecar.
pub(crate) fn is_partial(name: &OsStr) -> bool {
    name.as_bytes().ends_with(SUFFIX)
}

/// The name of the file beside `partial` that says how far it has come.
pub(crate) fn sidecar_name(partial: &OsStr) -> OsString {
    let bytes = partial.as_bytes();
    let stem = bytes.strip_suffix(SUFFIX).unwrap_or(bytes);
    OsString::from_vec([stem, SIDECAR_SUFFIX].concat())
}

/// Whether `name` is a regular file of ours. Looked at before it is opened, which has effects on other
/// kinds of files.
pub(crate) fn is_ours(location: &Location, name: &OsStr) -> bool {
    let there = rustix::fs::statat(location.directory(), name, AtFlags::SYMLINK_NOFOLLOW);
    there.is_ok_and(|there| {
        let is_file = FileType::from_raw_mode(there.st_mode) == FileType::RegularFile;
        is_file && there.st_uid == geteuid().as_raw()
    })
}

/// Opens the temporary file `number` that an interrupted run has left for the file at `location`.
pub(crate) fn reopen(
    location: &Location,
    options: &FileOptions,
    name: &Arc<str>,
    number: u32,
) -> Result<(OsString, FileStorage)> {
    for longest in PARTIAL_LENGTHS {
        let partial = partial_name(location.name().as_bytes(), longest, number);
        if !is_ours(location, &partial) {
            continue;
        }
        let options = options.writable(true);
        let opened = location.open(&partial, options.flags() | OFlags::NONBLOCK, 0);
        let file = opened.map_err(|e| direct::explain(e, options.direct, "open"))?;
        return Ok((partial, options.adopt(file, Path::new(&**name), name)?));
    }
    Err(Error::new(ErrorKind::NotFound, "open")
        .because(format!("the temporary file of the interrupted run, number {number:08x}, is gone")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_leads_back_to_its_name() {
        for (longest, name) in [(255, "disk.raw"), (128, &*"n".repeat(300))] {
            let partial = partial_name(name.as_bytes(), longest, 0xabc);
            assert_eq!(number(&partial), 0xabc);
            let sidecar = sidecar_name(&partial);
            assert!(sidecar.len() <= partial.len() && number(&sidecar) == 0xabc, "{sidecar:?}");
        }
        assert_eq!(sidecar_name(OsStr::new(".d.00000abc.partial")), ".d.00000abc.resume");
    }

    /// A name of 125 to 143 bytes was too long for eCryptfs with what is put around it.
    #[test]
    fn a_temporary_name_is_no_longer_than_the_file_system_takes() {
        for (longest, name_len) in [(255, 255), (255, 1), (143, 143), (143, 125), (143, 10)] {
            let name = OsString::from("n".repeat(name_len));
            let (partial, opened) = with_partial_name(&name, |partial| match partial.len() > longest {
                true => Err(rustix::io::Errno::NAMETOOLONG.into()),
                false => Ok(partial.len()),
            })
            .unwrap();
            assert!(partial.len() <= longest && partial.len() == opened, "{partial:?}");
            assert!(partial.to_str().is_some_and(|partial| partial.ends_with(".partial")), "{partial:?}");
        }
        let always =
            with_partial_name(OsStr::new("n"), |_| Err::<(), _>(rustix::io::Errno::NAMETOOLONG.into()));
        assert_eq!(always.unwrap_err().kind(), io::ErrorKind::InvalidFilename);
    }
}
