//! `raw`: the bytes of a file as a disk.

use std::sync::Arc;

use blockmirror_block::{BlockDevice, Storage};
use blockmirror_qmp::QmpError;
use blockmirror_raw::{Part, Raw, RawOptions};
use serde_json::json;

use super::schema::NodeRef;
use super::{Below, Driver, OpenNode, OpenedAgain, Rebased};
use crate::Reply;
use crate::arguments::{Size, arguments};
use crate::driver::{Opened, Opening};
use crate::errors::qmp_error;
use crate::graph::{BackingLink, Kind, Node};
use crate::object::Objects;

arguments! {
    pub(super) struct RawArgs("BlockdevOptionsRaw", "The bytes of another node.") {
        file: NodeRef = "file", "the node" [reopen];
        offset: Option<Size> = "offset", "the first byte that the disk has of it, which is a file then"
            [default "0"];
        size: Option<Size> = "size", "how many bytes it has, a multiple of 512; all from `offset` on if not \
         given";
    }
}

/// The bytes of another node.
pub(super) struct RawDriver;

impl Driver for RawDriver {
    const NAME: &'static str = "raw";
    const DOC: &'static str = "the bytes of another node";
    type Options = RawArgs;

    /// On a file it is a format.
    fn kind(has_storage: bool) -> Kind {
        if has_storage { Kind::Format } else { Kind::Filter }
    }

    fn open(opening: &mut Opening<'_>, options: RawArgs) -> Reply<Opened> {
        open(opening, &options)
    }

    fn rebase(_: &Objects, _: &RawArgs, below: Below) -> Reply<Rebased> {
        Ok(Rebased { device: disk(below.file.as_ref(), &below.link)?, wrap: None })
    }

    fn reopen_rw(node: &OpenNode) -> Reply<Option<OpenedAgain>> {
        let Some(storage) = &node.storage else { return Ok(None) };
        Ok(Some(OpenedAgain { device: disk_in(storage)?, image: None }))
    }

    fn writes_past_tap(child: &Node) -> bool {
        child.path.is_some()
    }
}

fn open(opening: &mut Opening<'_>, options: &RawArgs) -> Reply<Opened> {
    let part = Part::new(options.offset.map_or(0, |offset| offset.0), options.size.map(|size| size.0));
    let file = opening.child(&options.file, opening.common.for_file())?;
    let read_only = opening.common.read_only || file.read_only;
    let is_file = file.path.is_some();
    let (mut storage, mut filename) = (file.storage.clone(), file.filename.clone());
    if !part.is_all() {
        let Some(whole) = storage.filter(|_| is_file) else {
            return Err(QmpError::generic("'offset' and 'size' are for raw nodes on files"));
        };
        storage = Some(part.of(whole).map_err(qmp_error)?);
        filename = described(part, &filename);
    }
    let link = file.below_filter();
    let device = disk(storage.as_ref().filter(|_| is_file), &link)?;
    let mut child = match file.storage {
        Some(_) => file.file_link("file", read_only, opening.common.force_share),
        None => file.filter_link("file", read_only, &link),
    };
    child.link = Some(link).filter(|_| !is_file);
    let children = vec![child];
    Ok(Opened { path: file.path, storage, read_only, children, ..Opened::leaf(device, filename) })
}

/// What a part of a file is called in answers. No header of an image can name it.
fn described(part: Part, filename: &str) -> String {
    let mut options = json!({ "driver": "raw", "offset": part.offset });
    if let (Some(options), Some(size)) = (options.as_object_mut(), part.size) {
        options.insert("size".to_owned(), size.into());
    }
    if let Some(options) = options.as_object_mut() {
        options.insert("file".to_owned(), json!({ "driver": "file", "filename": filename }));
    }
    format!("json:{options}")
}

/// On a file it is that file once more; on a disk it changes nothing, and what is written shows at the disk's
/// tap. An export is a disk here: as something that a format lives in it would never flush again after a lost
/// connection.
fn disk(file: Option<&Arc<dyn Storage>>, below: &Arc<BackingLink>) -> Reply<Arc<dyn BlockDevice>> {
    file.map_or_else(|| Ok(Arc::clone(below) as _), disk_in)
}

/// The bytes of `storage` as a disk.
fn disk_in(storage: &Arc<dyn Storage>) -> Reply<Arc<dyn BlockDevice>> {
    Ok(Arc::new(Raw::open(Arc::clone(storage), RawOptions::new()).map_err(qmp_error)?))
}
