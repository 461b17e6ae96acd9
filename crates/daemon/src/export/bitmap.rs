//! A dirty bitmap as a meta context of an export: `qemu:dirty-bitmap:NAME`.

use std::sync::Arc;

use blockmirror_block::{ByteRange, Result, Visit};
use blockmirror_mirror::{BitmapUse, Tap};
use blockmirror_nbd::server::MetaContext;
use blockmirror_qmp::QmpError;

use crate::Reply;

/// Runs that are asked of a bitmap at a time.
const BATCH: usize = 1024;

#[derive(Debug)]
struct DirtyContext {
    name: String,
    bitmap: BitmapUse,
}

/// The bitmap `name` of `tap` as a context; it does not change while it is exported.
pub(super) fn context(tap: &Arc<Tap>, name: &str, writable: bool) -> Reply<Arc<dyn MetaContext>> {
    let info = tap.bitmaps().into_iter().find(|info| info.name == name);
    let info = info.ok_or_else(|| QmpError::generic(format!("Bitmap '{name}' is not found")))?;
    if info.enabled && !writable {
        return Err(QmpError::generic(format!("Enabled bitmap '{name}' incompatible with readonly export")));
    }
    let bitmap = tap.use_bitmap(name).map_err(|e| QmpError::generic(e.to_string()))?;
    Ok(Arc::new(DirtyContext { name: format!("qemu:dirty-bitmap:{name}"), bitmap }))
}

impl MetaContext for DirtyContext {
    fn name(&self) -> &str {
        &self.name
    }

    fn visit(&self, range: ByteRange, visit: &mut dyn FnMut(ByteRange, u32) -> Visit) -> Result<()> {
        let mut at = range.start();
        while at < range.end() {
            let runs = self.bitmap.dirty_runs(ByteRange::new(at, range.end()), BATCH);
            let last = runs.len() < BATCH;
            for run in runs {
                if run.start() > at && visit(ByteRange::new(at, run.start()), 0).is_break() {
                    return Ok(());
                }
                if visit(run, 1).is_break() {
                    return Ok(());
                }
                at = run.end();
            }
            if last {
                if at < range.end() {
                    // The last run: whether to go on does not matter any more.
                    let _ = visit(ByteRange::new(at, range.end()), 0);
                }
                return Ok(());
            }
        }
        Ok(())
    }
}
