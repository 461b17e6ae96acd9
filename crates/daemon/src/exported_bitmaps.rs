//! A dirty bitmap as a meta context of an export: `qemu:dirty-bitmap:NAME`.
//!
//! The bitmap is in use while it is exported. At the pivot of a mirror it stays on its tap, which moves. A
//! snapshot, and the pivot of a commit to its node, move the bitmap all the same, to another tap of its
//! node: they [suspend](ExportedBitmaps::suspend) the export's use of it for that time. Clients wait
//! meanwhile, but for those whose export is removed.

use std::sync::{Arc, Weak};

use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::{ByteRange, Error, ErrorKind, Result, Visit, cancel};
use blockmirror_mirror::{BitmapUse, Tap};
use blockmirror_nbd::server::MetaContext;
use blockmirror_qmp::QmpError;

use crate::Reply;

/// Runs that are asked of a bitmap at a time.
const BATCH: usize = 1024;

#[derive(Debug)]
pub(crate) struct DirtyContext {
    /// On the wire.
    name: String,
    bitmap: String,
    /// *Guards*: where the bitmap is. *Order*: before the tap's state. *Not under it*: I/O, the visitor.
    place: Mutex<Place>,
    moved: Condvar,
}

/// Where an exported bitmap is.
#[derive(Debug)]
enum Place {
    On {
        tap: Arc<Tap>,
        bitmap: BitmapUse,
    },
    /// On its way from one tap to another; clients wait.
    Moving,
    /// It did not arrive.
    Lost,
}

/// The bitmaps that are exported.
#[derive(Debug, Default)]
pub(crate) struct ExportedBitmaps(Mutex<Vec<Weak<DirtyContext>>>);

/// Bitmaps on their way from one tap to another. Dropped, they did not arrive.
#[must_use = "clients lose them unless they are resumed"]
pub(crate) struct SuspendedBitmaps(Vec<Arc<DirtyContext>>);

impl ExportedBitmaps {
    /// The bitmap `name` of `tap` as a context; no command changes it while it is exported.
    pub(crate) fn add(&self, tap: &Arc<Tap>, name: &str, writable: bool) -> Reply<Arc<dyn MetaContext>> {
        let info = tap.bitmaps().into_iter().find(|info| info.name == name);
        let info = info.ok_or_else(|| QmpError::generic(format!("Bitmap '{name}' is not found")))?;
        if info.enabled && !writable {
            return Err(QmpError::generic(format!(
                "Enabled bitmap '{name}' incompatible with readonly export"
            )));
        }
        let bitmap = tap.use_bitmap(name).map_err(|e| QmpError::generic(e.to_string()))?;
        let context = Arc::new(DirtyContext {
            name: format!("qemu:dirty-bitmap:{name}"),
            bitmap: name.to_owned(),
            place: Mutex::new(Place::On { tap: Arc::clone(tap), bitmap }),
            moved: Condvar::new(),
        });
        let mut all = self.0.lock();
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(&context));
        Ok(context)
    }

    /// Whether the bitmap `name` of `tap` is exported.
    pub(crate) fn is_exported(&self, tap: &Arc<Tap>, name: &str) -> bool {
        let all: Vec<_> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        all.iter().any(|context| {
            let place = context.place.lock();
            context.bitmap == name && matches!(&*place, Place::On { tap: at, .. } if Arc::ptr_eq(at, tap))
        })
    }

    /// Releases the bitmaps of `tap`, so that they can move to another one.
    pub(crate) fn suspend(&self, tap: &Arc<Tap>) -> SuspendedBitmaps {
        let all: Vec<_> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        let is_there = |context: &Arc<DirtyContext>| {
            let mut place = context.place.lock();
            let is_there = matches!(&*place, Place::On { tap: at, .. } if Arc::ptr_eq(at, tap));
            if is_there {
                *place = Place::Moving;
            }
            is_there
        };
        SuspendedBitmaps(all.into_iter().filter(is_there).collect())
    }
}

impl SuspendedBitmaps {
    /// They are on `tap` now.
    pub(crate) fn resume(mut self, tap: &Arc<Tap>) {
        for context in self.0.drain(..) {
            let bitmap = tap.use_bitmap(&context.bitmap);
            *context.place.lock() = match bitmap {
                Ok(bitmap) => Place::On { tap: Arc::clone(tap), bitmap },
                Err(_) => Place::Lost,
            };
            context.moved.notify_all();
        }
    }
}

/// The command ended without saying where they are: clients must not wait for it.
impl Drop for SuspendedBitmaps {
    fn drop(&mut self) {
        for context in self.0.drain(..) {
            *context.place.lock() = Place::Lost;
            context.moved.notify_all();
        }
    }
}

impl DirtyContext {
    fn dirty_runs(&self, range: ByteRange) -> Result<Vec<ByteRange>> {
        let mut place = self.place.lock();
        loop {
            match &*place {
                Place::On { bitmap, .. } => return Ok(bitmap.dirty_runs(range, BATCH)),
                Place::Moving => {}
                Place::Lost => {
                    return Err(Error::new(ErrorKind::InvalidInput, "read bitmap").because("it is gone"));
                }
            }
            if cancel::is_cancelled() {
                return Err(Error::new(ErrorKind::Cancelled, "read bitmap"));
            }
            place = cancel::wait(&self.moved, place, None);
        }
    }
}

impl MetaContext for DirtyContext {
    fn name(&self) -> &str {
        &self.name
    }

    fn visit(&self, range: ByteRange, visit: &mut dyn FnMut(ByteRange, u32) -> Visit) -> Result<()> {
        let mut at = range.start();
        while at < range.end() {
            let runs = self.dirty_runs(ByteRange::new(at, range.end()))?;
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

#[cfg(test)]
mod tests {
    use blockmirror_block::cancel::CancelSource;
    use blockmirror_block::testing::MemoryDisk;
    use blockmirror_block::{BlockDevice, WriteFlags};

    use super::*;

    const SIZE: u64 = 1 << 20;

    /// A disk with the exported bitmap `b`, in which a block is marked; and another tap on the disk.
    fn exported() -> (Arc<Tap>, Arc<Tap>, ExportedBitmaps, Arc<dyn MetaContext>) {
        let disk = Arc::new(MemoryDisk::new(SIZE));
        let (tap, other) = (Tap::new(Arc::clone(&disk) as _), Tap::new(disk));
        tap.add_bitmap("b", 65536).unwrap();
        tap.write_at(&[1; 65536], 3 << 16, WriteFlags::NONE).unwrap();
        let bitmaps = ExportedBitmaps::default();
        let context = bitmaps.add(&tap, "b", true).unwrap();
        (tap, other, bitmaps, context)
    }

    fn dirty_runs(context: &Arc<dyn MetaContext>) -> Result<Vec<ByteRange>> {
        let mut dirty = Vec::new();
        context.visit(ByteRange::new(0, SIZE), &mut |run, value| {
            dirty.extend((value == 1).then_some(run));
            Visit::Continue(())
        })?;
        Ok(dirty)
    }

    /// A client waited for ever for a bitmap that a command had left on its way.
    #[test]
    fn bitmaps_that_are_not_resumed_are_lost() {
        let (tap, _, bitmaps, context) = exported();
        drop(bitmaps.suspend(&tap));
        assert_eq!(dirty_runs(&context).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    /// The worker of an export that was removed stayed until the command had ended.
    #[test]
    fn a_cancelled_client_leaves_its_wait_for_a_bitmap() {
        let (tap, _, bitmaps, context) = exported();
        let suspended = bitmaps.suspend(&tap);
        let source = CancelSource::new();
        {
            let _calls = source.enter();
            source.cancel();
            assert_eq!(dirty_runs(&context).unwrap_err().kind(), ErrorKind::Cancelled);
        }
        suspended.resume(&tap);
        assert_eq!(dirty_runs(&context).unwrap().len(), 1);
    }

    #[test]
    fn clients_read_a_bitmap_wherever_it_moves() {
        let (tap, other, bitmaps, context) = exported();
        let runs = || dirty_runs(&context);
        let expected = vec![ByteRange::at(3 << 16, 65536)];
        assert_eq!(runs().unwrap(), expected);
        let suspended = bitmaps.suspend(&tap);
        std::thread::scope(|scope| {
            let reader = scope.spawn(runs);
            tap.give_bitmaps(&other);
            suspended.resume(&other);
            assert_eq!(reader.join().unwrap().unwrap(), expected);
        });
        assert_eq!((tap.bitmaps().len(), other.bitmaps()[0].busy), (0, true));
        // Not where it was said to be.
        bitmaps.suspend(&other).resume(&tap);
        assert!(runs().is_err());
    }
}
