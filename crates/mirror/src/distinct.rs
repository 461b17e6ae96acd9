//! Whether source and target of a job are two disks, and whether a job without a tap may copy its source.
//!
//! Called before a job touches anything. A filter or a tap shows the bytes of another device
//! ([`BlockDevice::forwards_to`]), so devices are compared by what they lead to. A device that does not say
//! what it forwards to counts as a disk of its own.

use std::any::Any;
use std::sync::Arc;

use blockmirror_block::BlockDevice;

use crate::error::Error;
use crate::tap::Tap;

/// Filters that are followed; more of them are no stack that anyone builds, and could be a circle.
const MAX_FILTERS: usize = 64;

/// Refuses a target that is the source, or shows the bytes of the same device.
pub(crate) fn check_distinct(
    source: &Arc<dyn BlockDevice>,
    target: &Arc<dyn BlockDevice>,
) -> Result<(), Error> {
    let below: Vec<_> = stack(source).collect();
    match stack(target).find(|device| below.iter().any(|other| Arc::ptr_eq(device, other))) {
        None => Ok(()),
        Some(device) => Err(Error::SameDevice { name: device.name().to_owned() }),
    }
}

/// Refuses a source with a tap in it: what is written through the tap during the copy would be missed.
pub(crate) fn check_no_tap(source: &Arc<dyn BlockDevice>) -> Result<(), Error> {
    match stack(source).find(|device| (&**device as &dyn Any).is::<Tap>()) {
        None => Ok(()),
        Some(tap) => Err(Error::SourceIsTap { name: tap.name().to_owned() }),
    }
}

/// `device` and what it forwards to, from the top down.
fn stack(device: &Arc<dyn BlockDevice>) -> impl Iterator<Item = Arc<dyn BlockDevice>> {
    std::iter::successors(Some(Arc::clone(device)), |device| device.forwards_to()).take(MAX_FILTERS)
}

#[cfg(test)]
mod tests {
    use blockmirror_block::testing::MemoryDisk;

    use super::*;
    use crate::{Event, MirrorJob, MirrorOptions};

    /// A job that was started on a tap, not attached to it, ended well and lacked what was written through
    /// the tap; one disk as source and target was accepted in each of these ways.
    #[test]
    fn a_job_is_refused_a_tap_as_plain_source_and_one_disk_for_both() {
        let empty = || Arc::new(MemoryDisk::new(1 << 20));
        let disk: Arc<dyn BlockDevice> = empty();
        let tap = Tap::new(Arc::clone(&disk));
        let as_device = || Arc::clone(&tap) as Arc<dyn BlockDevice>;
        let over = Tap::new(as_device());
        let start = |source, target| MirrorJob::start(source, target, MirrorOptions::new());
        assert!(matches!(start(as_device(), empty() as _), Err(Error::SourceIsTap { .. })));
        assert!(matches!(start(Arc::clone(&over) as _, empty() as _), Err(Error::SourceIsTap { .. })));
        assert!(matches!(start(Arc::clone(&disk), Arc::clone(&disk)), Err(Error::SameDevice { .. })));
        assert!(matches!(start(Arc::clone(&disk), as_device()), Err(Error::SameDevice { .. })));
        for target in [Arc::clone(&disk), as_device(), Arc::clone(&over) as _] {
            let refused = MirrorJob::attach(&tap, target, MirrorOptions::new());
            assert!(matches!(refused, Err(Error::SameDevice { .. })), "{refused:?}");
        }
        assert!(!tap.is_mirrored());
        let pivot = |target| {
            let job = MirrorJob::attach(&tap, target, MirrorOptions::new()).unwrap();
            while job.control().next_event(None) != Some(Event::Ready) {}
            job.control().complete().unwrap();
            job.wait().unwrap();
        };
        // After the pivot the old disk is another one, and the new one is not.
        let target = empty();
        pivot(Arc::clone(&target) as _);
        let refused = MirrorJob::attach(&tap, target, MirrorOptions::new());
        assert!(matches!(refused, Err(Error::SameDevice { .. })), "{refused:?}");
        pivot(disk);
    }
}
