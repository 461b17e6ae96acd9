//! Internal snapshots of an image: one file, no chain. They hold what the image itself has, so what lies
//! below it is not opened.
//!
//! Called by the command. To read what a snapshot holds is
//! [`OpenOptions::snapshot`](crate::OpenOptions::snapshot).

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::Storage;
use blockmirror_qcow2::format::snapshot::Snapshots;
use blockmirror_qcow2::{Header, NewSnapshot, Qcow2, Snapshot, SnapshotRef};

use crate::error::{Error, Result};
use crate::format::Format;
use crate::open::OpenOptions;
use crate::probe::probe;

/// The snapshots of the image `path`, in order of its table; none if its format has none. Works on an image
/// that is in use as far as the locks of `options` do.
///
/// ```
/// use blockmirror_image::{
///     CreateSpec, CreateSettings, Format, NewImage, NewSnapshot, OpenOptions, create_snapshot, snapshots,
/// };
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("disk.qcow2");
/// NewImage::create(&path, &CreateSpec::new(Format::Qcow2, 1 << 20, CreateSettings::default()))?.persist()?;
/// create_snapshot(&path, &OpenOptions::new(), &NewSnapshot::new("before"))?;
/// let found = snapshots(&path, &OpenOptions::new())?;
/// assert_eq!((found[0].id.as_str(), found[0].name.as_str()), ("1", "before"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// If it cannot be opened or read, or the table is damaged.
pub fn snapshots(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Vec<Snapshot>> {
    let (format, storage) = open(path.as_ref(), options, false)?;
    if format == Format::Raw {
        return Ok(Vec::new());
    }
    let read = || -> blockmirror_qcow2::Result<Vec<Snapshot>> {
        Snapshots::new(&*storage, &Header::read(&*storage)?)?.collect()
    };
    Ok(read().map_err(|error| error.in_file(&storage.name().into()))?)
}

/// Takes a snapshot of the disk of the image `path`, which nothing else may have open.
///
/// # Errors
/// If it cannot be opened or written, or its format has no snapshots; as for
/// [`Qcow2::create_snapshot`].
pub fn create_snapshot(path: impl AsRef<Path>, options: &OpenOptions, new: &NewSnapshot) -> Result<Snapshot> {
    change(path.as_ref(), options, |image| image.create_snapshot(new))
}

/// Makes the disk of the image `path`, which nothing else may have open, what a snapshot shows.
///
/// # Errors
/// If it cannot be opened or written, or its format has no snapshots; as for [`Qcow2::apply_snapshot`].
pub fn apply_snapshot(
    path: impl AsRef<Path>,
    options: &OpenOptions,
    wanted: &SnapshotRef,
) -> Result<Snapshot> {
    change(path.as_ref(), options, |image| image.apply_snapshot(wanted))
}

/// Deletes a snapshot of the image `path`, which nothing else may have open.
///
/// # Errors
/// If it cannot be opened or written, or its format has no snapshots; as for [`Qcow2::delete_snapshot`].
pub fn delete_snapshot(
    path: impl AsRef<Path>,
    options: &OpenOptions,
    wanted: &SnapshotRef,
) -> Result<Snapshot> {
    change(path.as_ref(), options, |image| image.delete_snapshot(wanted))
}

fn change(
    path: &Path,
    options: &OpenOptions,
    operation: impl FnOnce(&Qcow2) -> blockmirror_qcow2::Result<Snapshot>,
) -> Result<Snapshot> {
    let (format, storage) = open(path, options, true)?;
    let name = storage.name().into();
    let changed = || -> blockmirror_qcow2::Result<Option<Snapshot>> {
        if format == Format::Raw || Header::read(&*storage)?.data_file.is_some() {
            return Ok(None);
        }
        let open = blockmirror_qcow2::OpenOptions::new().writable(true);
        let image = open.overlap_checks(options.given_node().overlap_checks).open(Arc::clone(&storage))?;
        operation(&image).map(Some)
    };
    let changed = changed().map_err(|error| error.in_file(&name))?;
    changed.ok_or_else(|| Error::NoSnapshots { path: path.to_owned() })
}

fn open(path: &Path, options: &OpenOptions, writable: bool) -> Result<(Format, Arc<dyn Storage>)> {
    let protocol = options.open_protocol(path, writable)?;
    let storage: Arc<dyn Storage> = options.given_node().part.of(protocol.storage())?;
    let format = match options.given_format() {
        Some(format) => format,
        None => probe(&*storage, path)?,
    };
    Ok((format, storage))
}
