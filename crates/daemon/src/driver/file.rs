//! `file` and `host_device`: a host file or block device.

use std::path::PathBuf;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, ErrorKind, Storage};
use blockmirror_file::{FileOptions, FileStorage, LockMode};
use blockmirror_qmp::{Args, QmpError};
use blockmirror_raw::{Raw, RawOptions};

use super::{Opened, Opening, failed, refuse};
use crate::Reply;

pub(super) fn open(opening: &Opening<'_>, args: &Args, host_device: bool) -> Reply<Opened> {
    refuse(args, "file", &["pr-manager"])?;
    let filename = args.str("filename")?.to_owned();
    let path = PathBuf::from(&filename);
    let common = opening.common;
    let lock = match args.opt_str("locking")? {
        Some("off") => LockMode::Off,
        _ if common.force_share => LockMode::Shared,
        _ => LockMode::Exclusive,
    };
    let options = FileOptions::new().direct(common.direct).lock(lock);
    let mut read_only = common.read_only;
    let opened = match options.writable(!read_only).open(&path) {
        Err(error)
            if !read_only
                && common.auto_read_only
                && matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly) =>
        {
            read_only = true;
            options.writable(false).open(&path)
        }
        result => result,
    };
    let storage = Arc::new(opened.map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            QmpError::generic(format!("Could not open '{filename}': No such file or directory"))
        }
        ErrorKind::PermissionDenied => {
            QmpError::generic(format!("Could not open '{filename}': Permission denied"))
        }
        _ => failed(error),
    })?);
    if storage.is_block_device() != host_device {
        let expected = if host_device { "host_device" } else { "file" };
        let needed = if host_device { "a block device" } else { "a regular file" };
        return Err(QmpError::generic(format!("'{expected}' driver requires '{filename}' to be {needed}")));
    }
    let device = disk(&storage)?;
    Ok(Opened {
        storage: Some(Arc::clone(&storage) as _),
        file: Some(storage),
        path: Some(path),
        read_only,
        ..Opened::leaf(device, filename)
    })
}

/// The file as a disk, with what it can do at present.
pub(super) fn disk(file: &Arc<FileStorage>) -> Reply<Arc<dyn BlockDevice>> {
    let storage: Arc<dyn Storage> = Arc::clone(file) as _;
    Ok(Arc::new(Raw::open(storage, RawOptions::new()).map_err(failed)?))
}
