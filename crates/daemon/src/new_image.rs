//! Image files that commands make: for `blockdev-create`, and as overlay or target of
//! `blockdev-snapshot-sync` and `drive-mirror`.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use blockmirror_block::ErrorKind;
use blockmirror_file::{FileId, TargetOptions};
use blockmirror_image::{CreateSettings, CreateSpec, Error, Format, NewImage, directory_of};
use blockmirror_nbd::NbdUri;
use blockmirror_qmp::QmpError;
use serde_json::{Value, json};

use crate::Reply;
use crate::daemon::Daemon;
use crate::driver::failed;

/// A file that was made for a command, and goes again unless the command succeeds.
#[derive(Debug)]
#[must_use = "dropping it removes the file"]
pub(crate) struct Made {
    /// What is to be removed. Nothing once it is kept, or if there was a file before.
    remove: Option<PathBuf>,
}

impl Made {
    /// Makes an image at `path` for the contents of the node `source`, with a header that names the backing
    /// file `backing` if that is given. A file that is there already is replaced; it must not be in use, nor
    /// be part of the chain of `backing`.
    pub(crate) fn create(
        daemon: &Daemon,
        source: &str,
        path: &str,
        format: Format,
        size: u64,
        backing: Option<(String, Format)>,
    ) -> Reply<Self> {
        if format == Format::Raw && backing.is_some() {
            return Err(QmpError::generic("Backing file not supported for file format 'raw'"));
        }
        let (name, backing_format) = backing.unzip();
        // Some nodes have names that are no paths.
        let path_of_backing = name.as_deref().map(Path::new).filter(|path| directory_of(path).is_dir());
        let policy = path_of_backing.map(|path| daemon.policy_for(path)).transpose()?;
        let mut settings = CreateSettings::default();
        settings.backing_file = name;
        settings.backing_format = backing_format;
        let (files, is_remote) = daemon.graph.lock().all_files_below(source);
        let from_server = is_remote || files.into_iter().any(FileId::may_be_served);
        let target = TargetOptions::new().from_server(from_server);
        let mut spec = CreateSpec::new(format, size, settings).target(target);
        if let Some(policy) = policy {
            spec = spec.policy(policy);
        }
        Self::create_with(path, &spec)
    }

    /// Makes the image `spec` at `path`.
    pub(crate) fn create_with(path: &str, spec: &CreateSpec) -> Reply<Self> {
        let existed = Path::new(path).exists();
        let image = NewImage::create(path, spec).and_then(NewImage::persist);
        image.map_err(|error| in_words(path, &error))?;
        Ok(Self { remove: (!existed).then(|| path.into()) })
    }

    /// The file stays.
    pub(crate) fn keep(mut self) {
        self.remove = None;
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(path) = self.remove.take() {
            // If it cannot be removed, an empty image stays: the client gets an error anyway.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn in_words(path: &str, error: &Error) -> QmpError {
    let reason = match error {
        Error::Block(error) => match error.kind() {
            ErrorKind::NotFound => "No such file or directory",
            ErrorKind::PermissionDenied => "Permission denied",
            ErrorKind::NoSpace => "No space left on device",
            _ => return failed(error),
        },
        other => return failed(other),
    };
    QmpError::generic(format!("Could not create '{path}': {reason}"))
}

/// The image format `name` of a new file.
pub(crate) fn format_named(name: &str) -> Reply<Format> {
    match name {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        other => Err(QmpError::generic(format!("Unknown file format '{other}'"))),
    }
}

/// The options of the node for what a client names by a path, or by the URI of an export.
pub(crate) fn protocol_node(path: &str) -> Value {
    if NbdUri::is_meant(Path::new(path)) {
        return json!({"driver": "nbd", "uri": path});
    }
    let is_device = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    json!({"driver": if is_device { "host_device" } else { "file" }, "filename": path})
}
