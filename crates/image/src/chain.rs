//! The chain that an image is about to stand on, looked at before anything is written.
//!
//! Called by whatever writes the name of a backing file into a header: a new image must not take the place of a file that
//! it stands on, and a chain must end.
//!
//! What must hold: files are compared by device and inode and by what block devices stand on, those that are not there yet by directory and name; headers are
//! read only as far as the policy goes; nothing is locked and nothing is written.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blockmirror_file::LockMode;
use blockmirror_qcow2::Header;

use crate::error::{Error, Result};
use crate::format::Format;
use crate::open::{Below, OpenOptions, os_str, probe};
use crate::place::{Place, PlaceId};
use crate::reference::{ReferencePolicy, ReferenceRefusal, directory_of, join_name};

/// Checks that the image `image`, whose data lies in `data` if that is given, may stand on `backing`: none of the two is
/// part of that chain, and the chain is neither a cycle nor too deep. A chain that cannot be followed to its end passes,
/// unless `policy` is the reason and one of the two is there to be lost.
///
/// # Errors
/// [`Error::Create`] if a file would stand on itself; [`Error::Reference`] for a cycle, a chain that is too deep, or one
/// that the policy hides.
pub fn check_backing(
    image: &Path,
    data: Option<&Path>,
    backing: &Path,
    format: Option<Format>,
    policy: &ReferencePolicy,
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
    part(backing)?;
    let Ok(mut place) = options.open_place(backing, false) else { return Ok(()) };
    let options = options.for_opened(backing, &place);
    let (mut path, mut format) = (backing.to_owned(), format);
    let mut files = vec![place.id()];
    loop {
        let Some(header) = header(&place, &path, format) else { return Ok(()) };
        let data = header.data_file.as_ref().and_then(|data| data.name.as_ref());
        let names = [data, header.backing.as_ref().map(|backing| &backing.name)];
        for named in names.into_iter().flatten().filter_map(|name| join_name(&path, os_str(name))) {
            part(&named)?;
        }
        let below = match Below::judge(&options, &path, &header) {
            Ok(Some(below)) => below,
            Ok(None) => return Ok(()),
            Err(error) if is_hidden(&error) && own.iter().any(Spot::exists) => return Err(error),
            Err(_) => return Ok(()),
        };
        // The image itself is not in `files`.
        place = match below.open(&options, files.len() + 1, &mut files) {
            Ok(place) => place,
            Err(error) if never_ends(&error) => return Err(error),
            Err(_) => return Ok(()),
        };
        (path, format) = (below.target.path().to_owned(), below.format);
    }
}

fn header(place: &Place, path: &Path, format: Option<Format>) -> Option<Header> {
    let storage = place.storage();
    let format = match format {
        Some(format) => format,
        None => probe(&*storage, path).ok()?,
    };
    (format == Format::Qcow2).then(|| Header::read(&*storage).ok()).flatten()
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
struct Spot {
    path: PathBuf,
    id: Option<PlaceId>,
    entry: Option<(u64, u64, OsString)>,
}

impl Spot {
    fn of(path: &Path) -> Self {
        Self { path: path.to_owned(), id: PlaceId::of(path), entry: entry(path) }
    }

    fn is(&self, path: &Path) -> bool {
        let same_entry = self.entry.is_some() && entry(path) == self.entry;
        same_entry
            || self.id.as_ref().is_some_and(|id| PlaceId::of(path).is_some_and(|other| id.overlaps(&other)))
    }

    fn exists(&self) -> bool {
        self.id.is_some()
    }
}

/// Device and inode of the directory of `path`, and the name in it.
fn entry(path: &Path) -> Option<(u64, u64, OsString)> {
    let directory = fs::metadata(directory_of(path)).ok()?;
    Some((directory.dev(), directory.ino(), path.file_name().map(OsStr::to_owned)?))
}
