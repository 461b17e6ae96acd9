//! Image files that commands create: for `blockdev-create`, and as overlay or target of
//! `blockdev-snapshot-sync` and `drive-mirror`.
//!
//! How a file that exists is written is `blockmirror_image`'s to decide, as for the command line.
//!
//! What must hold: a command that is refused leaves what there was. A new file has its name only once the
//! command cannot be refused any more; one that can only be written in place loses its contents after every
//! check that needs no image.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use blockmirror_block::ErrorKind;
use blockmirror_file::{FileId, TargetOptions};
use blockmirror_image::{CreateSettings, CreateSpec, Error, Format, NewImage, PreparedImage, directory_of};
use blockmirror_nbd::NbdUri;
use blockmirror_qmp::QmpError;
use serde_json::{Map, Value};

use crate::Reply;
use crate::context::Context;
use crate::driver::{Found, is_locked};
use crate::errors::qmp_error;
use crate::graph::Node;

/// What is to be created at a path.
pub(crate) struct NewFileSpec<'a> {
    pub(crate) path: &'a str,
    pub(crate) format: Format,
    pub(crate) size: u64,
    /// The backing file that the header names, with its format.
    pub(crate) backing: Option<(String, Format)>,
}

/// A file that a command creates, and that goes again unless the command succeeds.
#[derive(Debug)]
#[must_use = "dropping it takes the file back"]
pub(crate) struct CreatedFile {
    path: PathBuf,
    /// The image, as long as it does not have its name.
    image: Option<NewImage>,
    /// The file that has got the name, or should have.
    file: Option<FileId>,
    /// Whether another file had the name, which is lost once this one has it.
    replaces: bool,
}

impl CreatedFile {
    /// Creates the image `new` for the contents of the node `source`. It must not take the place of a file
    /// in use, nor of one in the chain of its backing file. `check` comes before a file that can only be
    /// written in place loses its contents.
    ///
    /// # Errors
    /// What cannot be created, and what `check` says; then nothing has changed.
    pub(crate) fn create(
        context: &Context,
        source: &str,
        new: NewFileSpec<'_>,
        check: impl FnOnce() -> Reply<()>,
    ) -> Reply<Self> {
        let NewFileSpec { path, format, size, backing } = new;
        if format == Format::Raw && backing.is_some() {
            return Err(QmpError::generic("Backing file not supported for file format 'raw'"));
        }
        let (name, backing_format) = backing.unzip();
        // Some nodes have names that are no paths.
        let path_of_backing = name.as_deref().map(Path::new).filter(|path| directory_of(path).is_dir());
        let policy = path_of_backing.map(|path| context.policy_for(path)).transpose()?;
        let mut settings = CreateSettings::default();
        settings.backing_file = name;
        settings.backing_format = backing_format;
        let (files, is_remote) = context.graph.lock().all_files_below(source);
        let from_server = is_remote || files.into_iter().any(FileId::may_be_served);
        let target = TargetOptions::new().from_server(from_server);
        let mut spec = CreateSpec::new(format, size, settings).target(target);
        if let Some(policy) = policy {
            spec = spec.policy(policy);
        }
        Self::create_with(context, path, &spec, check)
    }

    /// Creates the image `spec` at `path`, otherwise like [`create`](Self::create).
    pub(crate) fn create_with(
        context: &Context,
        path: &str,
        spec: &CreateSpec,
        check: impl FnOnce() -> Reply<()>,
    ) -> Reply<Self> {
        check_no_node_on(context, path)?;
        let explain = |error| in_words(path, &error);
        let prepared = PreparedImage::new(Path::new(path), spec).map_err(explain)?;
        if prepared.targets().any(|target| target.in_place().is_some()) {
            check()?;
        }
        if prepared.targets().any(|target| target.in_place().is_some()) {
            context.written.note_path(Path::new(path));
        }
        let replaces = Path::new(path).exists();
        let image = prepared.write().map_err(explain)?;
        let image = if image.new_file().is_some() {
            Some(image)
        } else {
            image.persist().map_err(explain)?;
            None
        };
        Ok(Self { path: path.into(), image, file: None, replaces })
    }

    /// What a node on it opens, if its path does not lead there yet.
    pub(crate) fn found(&self) -> Option<Found> {
        self.image.as_ref()?.new_file().map(Found::Created)
    }

    /// Gives the file its name, durably. Until it is [kept](Self::keep) it goes again with `self`, unless it
    /// has taken the place of another.
    ///
    /// # Errors
    /// That fails; another file of its name stays then.
    pub(crate) fn give_name(&mut self) -> Reply<()> {
        let Some(image) = self.image.take() else { return Ok(()) };
        self.file = image.new_file().map(|file| file.id());
        self.check_named(image.persist())
    }

    /// Judges `given`, the attempt to give the file its name. The name may be there and not be durable. Where
    /// another file had it, which is gone, the command goes on all the same: nothing could be taken back.
    fn check_named(&self, given: Result<(), Error>) -> Reply<()> {
        let Err(error) = given else { return Ok(()) };
        if self.replaces && self.has_name() {
            tracing::warn!(target: crate::NOTICE, "{error}; the name may not survive a crash");
            return Ok(());
        }
        Err(in_words(&self.path.display().to_string(), &error))
    }

    fn has_name(&self) -> bool {
        self.file.is_some() && FileId::of(&self.path) == self.file
    }

    /// The file stays.
    pub(crate) fn keep(mut self) {
        self.replaces = true;
    }
}

impl Drop for CreatedFile {
    fn drop(&mut self) {
        // Without a name it goes with its image.
        if self.has_name() && !self.replaces {
            // A link that led nowhere stays. If the file cannot be removed, an empty image stays: the client
            // gets an error anyway.
            let _ = std::fs::canonicalize(&self.path).and_then(std::fs::remove_file);
        }
    }
}

/// Refuses `path` for a new file if a node is on the file that it leads to. The file's lock refuses that
/// too, unless the node was opened without.
fn check_no_node_on(context: &Context, path: &str) -> Reply<()> {
    let Some(file) = FileId::of(Path::new(path)) else { return Ok(()) };
    let graph = context.graph.lock();
    let is_on_it = |node: &&&Node| node.file.as_ref().is_some_and(|own| own.id() == file);
    match graph.nodes().iter().find(is_on_it) {
        Some(node) => {
            let user = graph.known_as(&node.name);
            Err(is_locked(&format_args!("node '{user}' is on it"), true, path))
        }
        None => Ok(()),
    }
}

fn in_words(path: &str, error: &Error) -> QmpError {
    let reason = match error {
        Error::Block(error) => match error.kind() {
            ErrorKind::NotFound => "No such file or directory",
            ErrorKind::PermissionDenied => "Permission denied",
            ErrorKind::NoSpace => "No space left on device",
            _ => return qmp_error(error),
        },
        other => return qmp_error(other),
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

/// The options of the node for what a client names by a path, or by the URI of an export, and what decides
/// which that is if `created` does not.
pub(crate) fn protocol_node(
    path: &str,
    created: Option<Found>,
) -> Reply<(Map<String, Value>, Option<Found>)> {
    let mut options = Map::new();
    let mut option = |name: &str, value: &str| options.insert(name.to_owned(), value.into());
    if NbdUri::looks_like_uri(Path::new(path)) {
        option("driver", "nbd");
        let uri = path.parse().map_err(qmp_error)?;
        return Ok((options, Some(Found::Export(uri))));
    }
    let is_device = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    option("driver", if is_device { "host_device" } else { "file" });
    option("filename", path);
    Ok((options, created))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A name that was there and not durable stayed although the command was refused.
    #[test]
    fn a_name_that_is_not_durable_is_taken_back_if_that_brings_the_old_file_back() {
        for (old, stays) in [(None, false), (Some("old"), true)] {
            let context = Context::new(Vec::new(), Vec::new());
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("new");
            if let Some(old) = old {
                fs::write(&path, old).unwrap();
            }
            let spec = CreateSpec::new(Format::Raw, 4096, CreateSettings::default());
            let shown = path.to_str().unwrap();
            let mut created = CreatedFile::create_with(&context, shown, &spec, || Ok(())).unwrap();
            created.give_name().unwrap();
            let failed = blockmirror_block::Error::new(ErrorKind::Io, "sync directory");
            assert_eq!(created.check_named(Err(failed.into())).is_ok(), stays);
            drop(created);
            assert_eq!(fs::metadata(&path).ok().map(|meta| meta.len()), stays.then_some(4096));
        }
    }

    /// The link was removed, and the file stayed.
    #[test]
    fn a_file_that_is_taken_back_leaves_the_link_that_led_to_it() {
        let context = Context::new(Vec::new(), Vec::new());
        let dir = tempfile::tempdir().unwrap();
        let (link, file) = (dir.path().join("link"), dir.path().join("file"));
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let spec = CreateSpec::new(Format::Raw, 4096, CreateSettings::default());
        let created = CreatedFile::create_with(&context, link.to_str().unwrap(), &spec, || Ok(()));
        let mut created = created.unwrap();
        created.give_name().unwrap();
        assert!(file.exists());
        drop(created);
        assert!(!file.exists() && link.is_symlink());
    }
}
