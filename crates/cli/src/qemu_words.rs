//! What `qemu-img` says of errors of opening, making and using images.
//!
//! Called where a typed error becomes a [`Failure`](crate::failure::Failure). `None` where QEMU has no words
//! that scripts know: our own line serves then.

mod format;

use std::io;
use std::path::Path;

use blockmirror_block::{Error as DiskError, ErrorKind};
use blockmirror_image::{Error, Qcow2Error, ReferenceError, ReferenceRefusal, Role, join_name};

pub(crate) use format::of_option;

/// An error of opening an image, or of making one.
pub(crate) fn of_image(error: &Error) -> Option<String> {
    match error {
        Error::Block(_) if is_missing_snapshot(error) => {
            Some("Failed to load snapshot: Can't find snapshot".to_owned())
        }
        Error::Block(error) => of_disk(error),
        Error::Reference(error) => of_reference(error),
        Error::ForeignFormat { path, format } => {
            let format = format.to_lowercase();
            Some(format!("Could not open '{}': Unknown driver '{format}'", path.display()))
        }
        Error::Incomplete { source } => of_image(source),
        Error::Amend { why, .. } => of_amend(why).map(ToOwned::to_owned),
        _ => None,
    }
}

/// Whether the image has no snapshot that was asked for.
pub(crate) fn is_missing_snapshot(error: &Error) -> bool {
    let cause = error.device_error().and_then(DiskError::cause);
    matches!(cause.and_then(|cause| cause.downcast_ref()), Some(Qcow2Error::NoSnapshot { .. }))
}

/// Why the clusters of a snapshot leak that was deleted, if that is what `error` says.
pub(crate) fn leak_of_snapshot(error: &Error) -> Option<String> {
    let cause = error.device_error()?.cause()?.downcast_ref()?;
    let Qcow2Error::SnapshotLeaks { cause } = cause else { return None };
    Some(reason(cause))
}

/// An error of an open image, or of its file.
pub(crate) fn of_disk(error: &DiskError) -> Option<String> {
    let name = error.name()?;
    if error.kind() == ErrorKind::Locked && error.operation() == "lock" {
        return Some(format!("Could not open '{name}': {}", lock(error)?));
    }
    if let Some(qcow2) = error.cause().and_then(|cause| cause.downcast_ref::<Qcow2Error>()) {
        return Some(format!("Could not open '{name}': {}", format::of_header(qcow2)?));
    }
    match error.operation() {
        "open" => {
            let why = system_text(error.cause()?.downcast_ref()?);
            Some(format!("Could not open '{name}': Could not open '{name}': {why}"))
        }
        _ => None,
    }
}

/// The same of a file that is to be made.
pub(crate) fn of_new(path: &Path, error: &Error) -> Option<String> {
    let Error::Block(error) = error else { return of_image(error) };
    let path = path.display();
    if error.kind() == ErrorKind::Locked {
        return Some(format!("{path}: {}", lock(error)?));
    }
    if let Some(qcow2) = error.cause().and_then(|cause| cause.downcast_ref::<Qcow2Error>()) {
        return Some(format!("{path}: {}", format::of_settings(qcow2)?));
    }
    let why = system_text(error.cause()?.downcast_ref()?);
    match error.operation() {
        "create" | "open" => Some(format!("{path}: Could not create '{path}': {why}")),
        _ => None,
    }
}

/// An error of opening the backing file of the new image `path`.
pub(crate) fn of_backing(path: &Path, error: &Error) -> Option<String> {
    let Error::Block(error) = error else { return None };
    let (name, why) = (error.name()?, system_text(error.cause()?.downcast_ref()?));
    Some(format!("{}: Could not open '{name}': {why}\nCould not open backing image.", path.display()))
}

/// Why options cannot be amended.
fn of_amend(why: &str) -> Option<&'static str> {
    const WORDS: &[(&str, &str)] = &[
        ("a raw image", "Format driver 'raw' does not support option amendment"),
        (
            "option lazy_refcounts:",
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
        ),
        (
            "option refcount_bits: any but 16",
            "Refcount widths other than 16 bits require compatibility level 1.1 or above \
             (use compat=1.1 or greater)",
        ),
        ("option compat: 0.10 needs refcount_bits=16", "compat=0.10 requires refcount_bits=16"),
        ("option data_file_raw:", "data-file-raw cannot be set on existing images"),
        (
            "option data_file: the image has no",
            "data-file can only be set for images that use an external data file",
        ),
        ("option backing_file:", "Cannot amend the backing file"),
    ];
    WORDS.iter().find(|(start, _)| why.starts_with(start)).map(|(_, words)| *words)
}

/// An error of a command that changes a chain.
pub(crate) fn of_chain(error: &blockmirror_ops::Error) -> Option<String> {
    match error {
        blockmirror_ops::Error::NoBacking { .. } => Some("Image does not have a backing file".to_owned()),
        blockmirror_ops::Error::NotInChain { path, base } => {
            Some(format!("Did not find '{}' in the backing chain of '{}'", base.display(), path.display()))
        }
        _ => None,
    }
}

/// An error in the middle of a copy.
pub(crate) fn of_copy(error: &blockmirror_mirror::Error) -> Option<String> {
    use blockmirror_mirror::Error as Copy;
    let verb = match error {
        Copy::Source(_) => "reading",
        Copy::Target(_) => "writing",
        _ => return None,
    };
    let disk = error.device_error()?;
    let (at, why) = (disk.offset()?, system_text(disk.cause()?.downcast_ref()?));
    Some(format!("error while {verb} at byte {at}: {why}"))
}

/// The lock that another user of the image does not leave us.
fn lock(error: &DiskError) -> Option<String> {
    let name = error.name()?;
    // The cause is the conflict, in QEMU's words.
    let conflict = error.cause()?;
    Some(format!("{conflict}\nIs another process using the image [{name}]?"))
}

fn of_reference(error: &ReferenceError) -> Option<String> {
    let path = join_name(&error.image, error.name.as_os_str())?;
    let cause = match &error.reason {
        ReferenceRefusal::Unreachable(cause) => cause,
        ReferenceRefusal::Cycle => {
            return Some(format!("Backing file '{}' creates an infinite loop.", path.display()));
        }
        _ => return None,
    };
    let what = match error.role {
        Role::Data => "Could not open data file",
        _ => "Could not open backing file",
    };
    let (image, path) = (error.image.display(), path.display());
    Some(format!("Could not open '{image}': {what}: Could not open '{path}': {}", system_text(cause)))
}

/// A bitmap that is to be copied and misses writes.
pub(crate) fn inconsistent_bitmap(name: &str) -> String {
    format!(
        "Cannot copy inconsistent bitmap '{name}'\n\
         Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
    )
}

/// What the system says of `error`, or all of it where the system has said nothing.
pub(crate) fn reason(error: &DiskError) -> String {
    error.cause().and_then(|cause| cause.downcast_ref()).map_or_else(|| error.to_string(), system_text)
}

/// What the system says went wrong, without its number.
pub(crate) fn system_text(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error ").map_or(text.clone(), |(words, _)| words.to_owned())
}
