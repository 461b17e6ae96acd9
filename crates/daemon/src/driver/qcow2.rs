//! `qcow2`: an image, its data file, and its chain of backing files.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{BlockDevice, Storage};
use blockmirror_file::FileId;
use blockmirror_image::{Detected, Format, PROBE_LEN, Resolved, Role, detect};
use blockmirror_qcow2::{Error as Qcow2Error, Header, OpenOptions, Qcow2};
use blockmirror_qmp::{Args, QmpError};
use serde_json::{Value, json};

use super::{Child, Opened, Opening, is_read_only, qmp_error, refuse};
use crate::Reply;
use crate::daemon::Daemon;
use crate::graph::{BackingLink, Node};

pub(super) fn open(opening: &mut Opening<'_>, args: &Args) -> Reply<Opened> {
    refuse(args, "qcow2", &["encrypt"])?;
    let common = opening.common;
    let file = opening.child(args, "file", common.for_file())?;
    let storage = file.storage()?;
    let read_only = common.read_only || file.read_only;
    if !common.read_only && file.read_only {
        return Err(is_read_only());
    }
    let header = Header::read(&*storage).map_err(|e| unreadable(e, &file))?;

    let mut children = vec![file.file_link("file", read_only, common.force_share)];
    let cache = args.opt_u64("cache-size")?.or(args.opt_u64("l2-cache-size")?);
    let mut options = with_cache(cache).writable(!read_only);
    if let Some(data) = data_file(opening, args, &header, &file)? {
        children.push(data.file_link("data-file", read_only, common.force_share));
        options = options.data_file(data.storage()?);
    }
    if let Some(backing) = backing(opening, args, &header, &file)? {
        let link = BackingLink::for_overlay(Arc::clone(&backing.device) as _);
        children.push(backing.backing_link(Arc::clone(&link)));
        options = options.backing(link);
    }
    let image = options.open(storage).map_err(|e| qmp_error(e.in_file(&file.filename.as_str().into())))?;
    let image = Arc::new(image);
    Ok(Opened {
        qcow2: Some(Arc::clone(&image)),
        path: file.path,
        read_only,
        children,
        ..Opened::leaf(image, file.filename)
    })
}

fn with_cache(bytes: Option<u64>) -> OpenOptions {
    let options = OpenOptions::new();
    match bytes {
        Some(bytes) => options.cache_bytes(usize::try_from(bytes).unwrap_or(usize::MAX)),
        None => options,
    }
}

/// An image that was opened for reading, once more for writing.
pub(super) struct ForWriting {
    image: Arc<Qcow2>,
    options: OpenOptions,
    filename: String,
}

impl ForWriting {
    /// That of `node`, whose data file is `data`; `None` if it is none, or could be written all the time.
    pub(super) fn new(node: &Node, data: Option<Arc<dyn Storage>>) -> Option<Self> {
        let image = node.qcow2.clone().filter(|image| !image.geometry().writable)?;
        let figure = |name: &str| node.options.get(name).and_then(Value::as_u64);
        let cache = figure("cache-size").or_else(|| figure("l2-cache-size"));
        let mut options = with_cache(cache).writable(true);
        if let Some(data) = data {
            options = options.data_file(data);
        }
        Some(Self { image, options, filename: node.filename.clone() })
    }

    pub(super) fn open(self) -> Reply<Arc<Qcow2>> {
        let Self { image, mut options, filename } = self;
        if let Some(backing) = image.backing() {
            options = options.backing(backing);
        }
        let opened = options.open(Arc::clone(image.storage()));
        opened.map(Arc::new).map_err(|e| qmp_error(e.in_file(&filename.as_str().into())))
    }
}

fn data_file(opening: &mut Opening<'_>, args: &Args, header: &Header, file: &Child) -> Reply<Option<Child>> {
    let inherited = opening.common.for_file();
    if let Some(reference) = args.get("data-file") {
        if header.data_file.is_none() {
            return Err(QmpError::generic(
                "'data-file' can only be set for images with an external data file",
            ));
        }
        return opening.child_from(reference, inherited).map(Some);
    }
    let Some(data) = &header.data_file else { return Ok(None) };
    let Some(name) = &data.name else {
        return Err(QmpError::generic("'data-file' is required for this image"));
    };
    let found = resolve(opening.daemon, file, Role::Data, name.as_path())?;
    opening.child_on(found, inherited).map(Some)
}

fn backing(opening: &mut Opening<'_>, args: &Args, header: &Header, file: &Child) -> Reply<Option<Child>> {
    let inherited = opening.common.for_backing();
    match args.get("backing") {
        Some(Value::Null) => return Ok(None),
        Some(reference) => return opening.child_from(reference, inherited).map(Some),
        None => {}
    }
    let Some(backing) = &header.backing else { return Ok(None) };
    let found = resolve(opening.daemon, file, Role::Backing, backing.name.as_path())?;
    let given = backing.format.as_deref().map(Format::in_header).transpose().map_err(qmp_error)?;
    let file = opening.child_on(found, inherited)?;
    let format = match given {
        Some(format) => format,
        None => probe_format(&*file.storage()?, &file.filename)?,
    };
    // Read-only because backing files are, not because the user says so: a job may open it for writing.
    let node = json!({"driver": format.as_str(), "file": file.name});
    opening.child_from(&node, inherited).map(Some)
}

/// A backing file that a header names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NamedBacking {
    pub(crate) file: FileId,
    /// Its format, if the header says that too.
    pub(crate) format: Option<Format>,
}

/// The backing file that the header of the image in the node `file` names, if the policy lets it be opened;
/// `None` if the header names none.
pub(crate) fn backing_in_header(daemon: &Daemon, file: &str) -> Reply<Option<NamedBacking>> {
    let file = Child::named(daemon, file.to_owned())?;
    let header = Header::read(&*file.storage()?).map_err(|e| unreadable(e, &file))?;
    let Some(backing) = &header.backing else { return Ok(None) };
    let found = resolve(daemon, &file, Role::Backing, backing.name.as_path())?;
    let format = backing.format.as_deref().map(Format::in_header).transpose().map_err(qmp_error)?;
    Ok(found.handle.id().map(|file| NamedBacking { file, format }))
}

/// Why the header of the image in `file` cannot be read.
fn unreadable(error: Qcow2Error, file: &Child) -> QmpError {
    match error {
        Qcow2Error::NotQcow2 { .. } => QmpError::generic("Image is not in qcow2 format"),
        error => qmp_error(error.in_file(&file.filename.as_str().into())),
    }
}

/// The file that `name` in the header of the image in `file` leads to, if the policy lets it be opened.
fn resolve(daemon: &Daemon, file: &Child, role: Role, name: &Path) -> Reply<Resolved> {
    let Some(image) = &file.path else {
        return Err(QmpError::generic(format!(
            "{}: names the {} '{}', which has to be given as an option, for the image is no file",
            file.filename,
            role.as_str(),
            name.display(),
        )));
    };
    let mut policy = daemon.policy_for(image)?;
    if let Some(id) = file.file {
        policy = policy.for_opened_file(image, id);
    }
    // A node that is read-only now may be written later.
    if role == Role::Data {
        policy = policy.for_writing();
    }
    policy.resolve(image, role, OsStr::new(name)).map_err(|e| {
        QmpError::generic(format!("{e}; give it as an option, or allow its directory with --allow-backing"))
    })
}

/// The format of the image in `storage`.
pub(crate) fn probe_format(storage: &dyn Storage, filename: &str) -> Reply<Format> {
    let mut head = [0; PROBE_LEN];
    storage.read_at(&mut head, 0).map_err(qmp_error)?;
    match detect(&head) {
        Detected::Known(format) => Ok(format),
        Detected::Foreign(format) => {
            Err(QmpError::generic(format!("{filename}: the format {format} is not supported")))
        }
        _ => Err(QmpError::generic(format!("{filename}: its format is not known"))),
    }
}
