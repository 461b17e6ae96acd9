//! The chain that an image is about to stand on, looked at before anything is written.
//!
//! Called by whatever writes the name of a backing file into a header: a new image must not take the place of
//! a file that it stands on, and a chain must end.
//!
//! What must hold: files are compared by device and inode and by what block devices stand on, those that are
//! not there yet by directory and name; headers are read only as far as the policy goes; nothing is locked
//! and nothing is written.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blockmirror_block::ErrorKind;
use blockmirror_file::LockMode;
use blockmirror_qcow2::Header;

use crate::error::{Error, Result};
use crate::format::Format;
use crate::open::{BackingRef, OpenOptions};
use crate::probe::probe;
use crate::protocol_id::ProtocolId;
use crate::protocol_layer::ProtocolLayer;
use crate::reference::{ReferencePolicy, ReferenceRefusal, Role, directory_of, join_name, os_str};

/// Checks that the image `image`, whose data lies in `data` if that is given, may stand on `backing`: none of
/// the two is part of that chain, and the chain is neither a cycle nor too deep. A chain that cannot be
/// followed to its end passes, unless `policy` is the reason and one of the two is there to be lost.
///
/// # Errors
/// [`Error::Create`] if a file would stand on itself; [`Error::Reference`] for a cycle, a chain that is too
/// deep, or one that the policy hides.
pub fn check_backing(
    image: &Path,
    data: Option<&Path>,
    backing: &Path,
    format: Option<Format>,
    policy: &ReferencePolicy,
) -> Result<()> {
    check(image, data, backing, format, policy, true)
}

/// The same for an image that is to be made. Unless `unknown` chains are accepted, one that cannot be
/// followed to its end is an error if one of the files is there to be lost; a plain name that leads to
/// nothing is an end.
///
/// # Errors
/// As for [`check_backing`]; [`Error::ChainUnknown`].
pub(crate) fn check(
    image: &Path,
    data: Option<&Path>,
    backing: &Path,
    format: Option<Format>,
    policy: &ReferencePolicy,
    unknown: bool,
) -> Result<()> {
    let own: Vec<_> = [Some(image), data].into_iter().flatten().map(Spot::of).collect();
    let options = OpenOptions::new().lock(LockMode::Off).policy(policy.clone());
    let part = |path: &Path| match own.iter().find(|spot| spot.is(path)) {
        Some(spot) => Err(Error::Create {
            path: spot.path.clone(),
            why: format!("it is part of the chain of {}, which it would stand on", backing.display()),
        }),
        None => Ok(()),
    };
    let lost = own.iter().find(|spot| spot.exists());
    let cut = |error: Error| match lost {
        Some(spot) if !unknown && !is_missing(&error) => Err(Error::ChainUnknown {
            path: spot.path.clone(),
            backing: backing.to_owned(),
            source: Box::new(error),
        }),
        _ => Ok(()),
    };
    part(backing)?;
    let mut protocol = match options.open_protocol(backing, false) {
        Ok(protocol) => protocol,
        Err(error) => return cut(error),
    };
    let options = options.for_opened(backing, &protocol);
    let (mut path, mut format) = (backing.to_owned(), format);
    let mut files = vec![protocol.id()];
    loop {
        let header = match header(&protocol, &path, format) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(()),
            Err(error) => return cut(error),
        };
        let data = header.data_file.as_ref().and_then(|data| data.name.as_ref());
        let names = [data, header.backing.as_ref().map(|backing| &backing.name)];
        for named in names.into_iter().flatten().filter_map(|name| join_name(&path, os_str(name))) {
            part(&named)?;
        }
        if let Some(name) = data.filter(|name| join_name(&path, os_str(name)).is_none()) {
            policy.resolve(&path, Role::Data, os_str(name)).map(drop).or_else(|error| cut(error.into()))?;
        }
        let below = match BackingRef::authorize(&options, &path, &header) {
            Ok(Some(below)) => below,
            Ok(None) => return Ok(()),
            Err(error) if is_hidden(&error) && lost.is_some() => return Err(error),
            Err(error) => return cut(error),
        };
        // The image itself is not in `files`.
        protocol = match below.open(&options, files.len() + 1, &mut files, false) {
            Ok(protocol) => protocol,
            Err(error) if never_ends(&error) => return Err(error),
            Err(error) => return cut(error),
        };
        // Under a protocol the name is not the file's.
        if own.iter().any(|spot| spot.id.as_ref().is_some_and(|id| id.overlaps(&protocol.id()))) {
            part(below.target.path())?;
        }
        (path, format) = (below.target.path().to_owned(), below.format);
    }
}

/// The header of the image in `protocol`; `None` if it is raw, where a chain ends.
fn header(protocol: &ProtocolLayer, path: &Path, format: Option<Format>) -> Result<Option<Header>> {
    let storage = protocol.storage();
    let format = match format {
        Some(format) => format,
        None => probe(&*storage, path)?,
    };
    match format {
        Format::Raw => Ok(None),
        Format::Qcow2 => Ok(Some(Header::read(&*storage).map_err(|e| e.in_file(&storage.name().into()))?)),
    }
}

/// Whether a plain name leads to nothing.
fn is_missing(error: &Error) -> bool {
    match error {
        Error::Block(error) => error.kind() == ErrorKind::NotFound,
        Error::Reference(refused) => matches!(&refused.reason,
            ReferenceRefusal::Unreachable(error) if error.kind() == io::ErrorKind::NotFound),
        _ => false,
    }
}

fn is_hidden(error: &Error) -> bool {
    matches!(error, Error::Reference(refused)
        if matches!(refused.reason, ReferenceRefusal::Outside { .. } | ReferenceRefusal::Denied))
}

fn never_ends(error: &Error) -> bool {
    matches!(error, Error::Reference(refused)
        if matches!(refused.reason, ReferenceRefusal::Cycle | ReferenceRefusal::TooDeep(_)))
}

/// A file that will be written, there already or not.
pub(crate) struct Spot {
    path: PathBuf,
    id: Option<ProtocolId>,
    entry: Option<(u64, u64, OsString)>,
}

impl Spot {
    pub(crate) fn of(path: &Path) -> Self {
        Self { path: path.to_owned(), id: ProtocolId::of(path), entry: entry(path) }
    }

    /// Whether `path` leads to the same file, or would.
    pub(crate) fn is(&self, path: &Path) -> bool {
        let same_entry = self.entry.is_some() && entry(path) == self.entry;
        same_entry
            || self
                .id
                .as_ref()
                .is_some_and(|id| ProtocolId::of(path).is_some_and(|other| id.overlaps(&other)))
    }

    fn exists(&self) -> bool {
        self.id.is_some()
    }
}

/// Device and inode of the directory of `path`, and the name in it, after all links: a new file comes into
/// being where the last link leads.
fn entry(path: &Path) -> Option<(u64, u64, OsString)> {
    let mut path = path.to_owned();
    // As many as the kernel follows.
    for _ in 0..40 {
        let Ok(target) = fs::read_link(&path) else { break };
        path = directory_of(&path).join(target);
    }
    let directory = fs::metadata(directory_of(&path)).ok()?;
    Some((directory.dev(), directory.ino(), path.file_name().map(OsStr::to_owned)?))
}
