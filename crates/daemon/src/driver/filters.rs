//! `null-co`, `throttle` and `copy-on-read`.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_filter::{CopyOnRead, DEFAULT_NULL_SIZE, NullDisk, Throttle, ThrottleStorage};
use blockmirror_qmp::{Args, QmpError};

use super::{Opened, Opening, is_read_only, refuse};
use crate::Reply;

pub(super) fn open_null(args: &Args) -> Reply<Opened> {
    let size = args.opt_i64("size")?.map_or(Ok(DEFAULT_NULL_SIZE), u64::try_from);
    let size = size.map_err(|_| QmpError::generic("Invalid size"))?;
    let latency = args.opt_u64("latency-ns")?.unwrap_or(0);
    let disk = NullDisk::new(size)
        .latency(Duration::from_nanos(latency))
        .read_zeroes(args.opt_bool("read-zeroes")?.unwrap_or(false));
    Ok(Opened::leaf(Arc::new(disk), "null-co://".to_owned()))
}

pub(super) fn open_throttle(opening: &mut Opening<'_>, args: &Args) -> Reply<Opened> {
    let group = opening.daemon.objects.throttle_group(args.str("throttle-group")?)?;
    let inherited = opening.common.for_file();
    let file = opening.child(args, "file", inherited)?;
    let read_only = opening.common.read_only || file.read_only;
    let link = file.below_filter();
    let device = Arc::new(Throttle::new(Arc::clone(&link) as _, &group));
    let storage = file.storage.clone().map(|storage| Arc::new(ThrottleStorage::new(storage, &group)) as _);
    let children = vec![file.filter_link("file", read_only, &link)];
    Ok(Opened { storage, path: file.path, read_only, children, ..Opened::leaf(device, file.filename) })
}

pub(super) fn open_copy_on_read(opening: &mut Opening<'_>, args: &Args) -> Reply<Opened> {
    refuse(args, "copy-on-read", &["bottom"])?;
    let inherited = opening.common.for_file();
    let file = opening.child(args, "file", inherited)?;
    if file.read_only {
        return Err(is_read_only());
    }
    let read_only = opening.common.read_only;
    let link = file.below_filter();
    let device = Arc::new(CopyOnRead::new(Arc::clone(&link) as _));
    let children = vec![file.filter_link("file", false, &link)];
    Ok(Opened { path: file.path, read_only, children, ..Opened::leaf(device, file.filename) })
}
