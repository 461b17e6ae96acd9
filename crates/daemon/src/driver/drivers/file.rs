//! `file` and `host_device`: a host file or block device.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::{BlockDevice, ErrorKind, Storage};
use blockmirror_file::{FileOptions, FileStorage, LockMode, PathHandle};
use blockmirror_qmp::QmpError;
use blockmirror_raw::{Raw, RawOptions};

use super::{Driver, OpenNode, OpenedAgain};
use crate::Reply;
use crate::arguments::{arguments, choice};
use crate::driver::{Found, Opened, Opening};
use crate::errors::{qmp_error, refuse, system_text};
use crate::graph::Kind;

choice! {
    pub(super) enum Locking("OnOffAuto", "Yes, no, or what serves.") {
        Auto = "auto", "what serves";
        On = "on", "yes";
        Off = "off", "no";
    }
}

choice! {
    pub(super) enum Aio(
        "BlockdevAioOptions",
        "How requests are given to the host. Accepted and without effect: requests run on threads."
    ) {
        Threads = "threads", "threads";
        Native = "native", "Linux AIO";
        IoUring = "io_uring", "io_uring";
    }
}

arguments! {
    pub(super) struct FileArgs("BlockdevOptionsFile", "A file or device of the host.") {
        filename: String = "filename", "path";
        pr_manager: Option<String> = "pr-manager", "refused";
        locking: Option<Locking> = "locking", "whether the image is locked against other \
         users" [default "auto"];
        _aio: Option<Aio> = "aio", "without effect" [default "threads"];
        _aio_max_batch: Option<i64> = "aio-max-batch", "without effect";
        _drop_cache: Option<bool> = "drop-cache", "without effect" [reopen];
        _x_check_cache_dropped: Option<bool> = "x-check-cache-dropped", "without effect" [reopen];
    }
}

/// A regular file.
pub(super) struct File;

/// A block device of the host.
pub(super) struct HostDevice;

impl Driver for File {
    const NAME: &'static str = "file";
    const DOC: &'static str = "a regular file";
    type Options = FileArgs;

    fn kind(_: bool) -> Kind {
        Kind::Protocol
    }

    fn open(opening: &mut Opening<'_>, options: FileArgs) -> Reply<Opened> {
        open(opening, &options, false)
    }

    fn reopen_rw(node: &OpenNode) -> Reply<Option<OpenedAgain>> {
        reopen_rw(node)
    }
}

impl Driver for HostDevice {
    const NAME: &'static str = "host_device";
    const DOC: &'static str = "a block device of the host";
    type Options = FileArgs;

    fn kind(_: bool) -> Kind {
        Kind::Protocol
    }

    fn open(opening: &mut Opening<'_>, options: FileArgs) -> Reply<Opened> {
        open(opening, &options, true)
    }

    fn reopen_rw(node: &OpenNode) -> Reply<Option<OpenedAgain>> {
        reopen_rw(node)
    }
}

/// The open file itself becomes writable, whatever its name leads to by now.
fn reopen_rw(node: &OpenNode) -> Reply<Option<OpenedAgain>> {
    let Some(file) = &node.file else { return Ok(None) };
    file.set_writable(true).map_err(|error| match error.kind() {
        ErrorKind::Locked => is_locked(&error, true, &node.filename),
        _ => qmp_error(error),
    })?;
    Ok(Some(OpenedAgain { device: disk(file)?, image: None }))
}

fn open(opening: &mut Opening<'_>, options: &FileArgs, host_device: bool) -> Reply<Opened> {
    refuse(options.pr_manager.is_some(), "file", "pr-manager")?;
    let filename = options.filename.clone();
    let path = PathBuf::from(&filename);
    let (storage, read_only) = match opening.found.take() {
        Some(Found::Created(storage)) => (storage, opening.common.read_only),
        Some(Found::Handle(handle)) => open_found(opening, options, &handle, host_device)?,
        Some(Found::Export(_)) | None => {
            let handle = PathHandle::find(&path).map_err(|error| not_opened(&filename, &error))?;
            open_found(opening, options, &handle, host_device)?
        }
    };
    let device = disk(&storage)?;
    Ok(Opened {
        storage: Some(Arc::clone(&storage) as _),
        file: Some(storage),
        path: Some(path),
        read_only,
        ..Opened::leaf(device, filename)
    })
}

/// Opens a file that exists; also says whether it is open for reading only.
fn open_found(
    opening: &Opening<'_>,
    options: &FileArgs,
    handle: &PathHandle,
    host_device: bool,
) -> Reply<(Arc<FileStorage>, bool)> {
    let filename = &*options.filename;
    let path = Path::new(filename);
    check_kind(handle, path, host_device)?;
    let common = opening.common;
    let lock = match options.locking {
        Some(Locking::Off) => LockMode::Off,
        _ if common.force_share => LockMode::Shared,
        _ => LockMode::Exclusive,
    };
    let options = FileOptions::new().direct(common.direct).lock(lock);
    let mut read_only = common.read_only;
    let opened = match options.writable(!read_only).open_handle(handle, path) {
        Err(error)
            if !read_only
                && common.auto_read_only
                && matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly) =>
        {
            read_only = true;
            options.writable(false).open_handle(handle, path)
        }
        result => result,
    };
    let storage = opened.map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            QmpError::generic(format!("Could not open '{filename}': No such file or directory"))
        }
        ErrorKind::PermissionDenied => {
            QmpError::generic(format!("Could not open '{filename}': Permission denied"))
        }
        ErrorKind::Locked => is_locked(&error, !read_only, filename),
        _ => qmp_error(error),
    })?;
    Ok((Arc::new(storage), read_only))
}

fn not_opened(filename: &str, error: &io::Error) -> QmpError {
    QmpError::generic(format!("Could not open '{filename}': {}", system_text(error)))
}

/// Whether the path leads to what the driver is for.
fn check_kind(found: &PathHandle, path: &Path, host_device: bool) -> Reply<()> {
    let shown = path.display();
    let text = match (host_device, found.file_type()) {
        (_, kind) if kind.is_dir() => format!("Could not open '{shown}': Is a directory"),
        (true, kind) if !kind.is_block_device() => {
            format!("'host_device' driver requires '{shown}' to be either a character or block device")
        }
        (false, kind) if !kind.is_file() => format!("'file' driver requires '{shown}' to be a regular file"),
        _ => return Ok(()),
    };
    Err(QmpError::generic(text))
}

/// Another user of the file keeps this one out, in the words that scripts know.
pub(crate) fn is_locked(error: &dyn std::fmt::Display, writes: bool, filename: &str) -> QmpError {
    // What a client shares it asks the system for in the same words.
    let shared = if writes { "" } else { "shared " };
    QmpError::generic(format!(
        "Failed to get {shared}\"write\" lock: {error}. Is another process using the image [{filename}]?"
    ))
}

/// The file as a disk, with what it can do at present.
pub(super) fn disk(file: &Arc<FileStorage>) -> Reply<Arc<dyn BlockDevice>> {
    let storage: Arc<dyn Storage> = Arc::clone(file) as _;
    Ok(Arc::new(Raw::open(storage, RawOptions::new()).map_err(qmp_error)?))
}
