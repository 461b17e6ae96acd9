//! `raw`: the bytes of a file as a disk.

use std::sync::Arc;

use blockmirror_block::{BlockDevice, Storage};
use blockmirror_mirror::Tap;
use blockmirror_qmp::Args;
use blockmirror_raw::{Raw, RawOptions};

use super::{Opened, Opening, failed, refuse};
use crate::Reply;

pub(super) fn open(opening: &mut Opening<'_>, args: &Args) -> Reply<Opened> {
    refuse(args, "raw", &["offset", "size"])?;
    let inherited = opening.common.for_file();
    let file = opening.child(args, "file", inherited)?;
    let read_only = opening.common.read_only || file.read_only;
    let device = disk(file.storage.as_ref().filter(|_| file.path.is_some()), &file.tap)?;
    let children = vec![match file.storage {
        Some(_) => file.file_link("file", read_only, opening.common.force_share),
        None => file.filter_link("file", read_only),
    }];
    Ok(Opened {
        path: file.path,
        storage: file.storage,
        read_only,
        children,
        ..Opened::leaf(device, file.filename)
    })
}

/// On a file it is that file once more; on a disk it changes nothing, and what is written shows at the disk's tap. An export
/// is a disk here: as something that a format lives in it would never flush again after a lost connection.
pub(crate) fn disk(file: Option<&Arc<dyn Storage>>, tap: &Arc<Tap>) -> Reply<Arc<dyn BlockDevice>> {
    Ok(match file {
        Some(storage) => Arc::new(Raw::open(Arc::clone(storage), RawOptions::new()).map_err(failed)?),
        None => Arc::clone(tap) as _,
    })
}
