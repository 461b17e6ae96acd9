//! `raw`: the bytes of a file as a disk.

use std::sync::Arc;

use blockmirror_block::{BlockDevice, Storage};
use blockmirror_qmp::{Args, QmpError};
use blockmirror_raw::{Part, Raw, RawOptions};
use serde_json::json;

use super::{Opened, Opening, qmp_error};
use crate::Reply;
use crate::graph::BackingLink;

pub(super) fn open(opening: &mut Opening<'_>, args: &Args) -> Reply<Opened> {
    let part = Part::new(args.opt_u64("offset")?.unwrap_or(0), args.opt_u64("size")?);
    let inherited = opening.common.for_file();
    let file = opening.child(args, "file", inherited)?;
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
pub(crate) fn disk(file: Option<&Arc<dyn Storage>>, below: &Arc<BackingLink>) -> Reply<Arc<dyn BlockDevice>> {
    file.map_or_else(|| Ok(Arc::clone(below) as _), disk_in)
}

/// The bytes of `storage` as a disk.
pub(super) fn disk_in(storage: &Arc<dyn Storage>) -> Reply<Arc<dyn BlockDevice>> {
    Ok(Arc::new(Raw::open(Arc::clone(storage), RawOptions::new()).map_err(qmp_error)?))
}
