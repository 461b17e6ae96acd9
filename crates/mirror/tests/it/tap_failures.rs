//! What a live job makes of a source or target that fails or hangs, and what the guest sees of it.

use std::sync::Arc;
use std::thread;

use blockmirror_block::testing::{Done, Fault, OpKind};
use blockmirror_block::{BlockDevice, ErrorKind as DiskError, WriteFlags};
use blockmirror_mirror::{
    CopyMode, Error, ErrorAction, Event, IoStatus, JobState, MirrorJob, MirrorOptions, OnError, Tap,
};

use super::tap::{FOREVER, attach, empty, faulty, filled, until, write};

#[test]
fn a_failing_target_never_fails_the_guest() {
    for (mode, policy) in [
        (CopyMode::Background, OnError::Report),
        (CopyMode::WriteBlocking, OnError::Report),
        (CopyMode::WriteBlocking, OnError::Stop),
        (CopyMode::WriteBlocking, OnError::Ignore),
    ] {
        let (source, target) = (filled(), empty());
        let (bad, faults) = faulty(&target);
        let tap = Tap::new(Arc::clone(&source) as _);
        let options = MirrorOptions::new().copy_mode(mode).on_target_error(policy);
        let job = MirrorJob::attach(&tap, bad, options).unwrap();
        until(&job, &Event::Ready);
        faults.inject(Fault::on(OpKind::Write).with(DiskError::NoSpace));
        write(&*tap, 10_000, 5000, 88);
        let error = loop {
            match job.control().next_event(FOREVER).unwrap() {
                Event::Error { action, .. } => break action,
                _ => continue,
            }
        };
        match policy {
            OnError::Stop => {
                assert_eq!(error, ErrorAction::Stop);
                let progress = job.control().progress();
                assert_eq!((progress.state, progress.io_status), (JobState::Standby, IoStatus::NoSpace));
                job.control().resume().unwrap();
            }
            OnError::Ignore => assert_eq!(error, ErrorAction::Ignore),
            _ => {
                assert_eq!(error, ErrorAction::Report);
                assert!(matches!(job.wait(), Err(Error::Target(_))));
                write(&*tap, 0, 4096, 1);
                continue;
            }
        }
        job.control().complete().unwrap();
        job.wait().unwrap();
        assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    }
}

#[test]
fn a_failed_source_write_is_looked_at_again_in_every_mode() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let (source, target) = (filled(), empty());
        let (bad, faults) = faulty(&source);
        let tap = Tap::new(bad);
        let job = attach(&tap, &target, MirrorOptions::new().copy_mode(mode));
        until(&job, &Event::Ready);
        // Half of it happens all the same.
        faults.inject(Fault::on(OpKind::Write).having_done(Done::Half));
        let bytes = [200; 8192];
        assert!(tap.write_at(&bytes, 65_536, WriteFlags::NONE).is_err());
        job.control().complete().unwrap();
        job.wait().unwrap();
        assert_eq!(target.contents().unwrap(), source.contents().unwrap());
        assert_eq!(target.contents().unwrap()[65_536], 200);
    }
}

/// Cancelling a job whose target hangs once made the source end its calls as well, the guest's among them: on
/// a disk over the network that made the guest's writes fail.
#[test]
fn giving_a_job_up_does_not_disturb_what_the_guest_asks_of_its_own_disk() {
    let (source, target) = (filled(), empty());
    let ((slow, faults), (dead, target_faults)) = (faulty(&source), faulty(&target));
    let tap = Tap::new(slow as _);
    let job = MirrorJob::attach(&tap, dead as _, MirrorOptions::new()).unwrap();
    until(&job, &Event::Ready);
    let hanging = target_faults.hold(OpKind::Write, None);
    write(&*tap, 0, 4096, 1);
    hanging.wait_held(1);
    let gate = faults.hold(OpKind::Write, None);
    thread::scope(|scope| {
        let guest = scope.spawn(|| tap.write_at(b"guest", 4096, WriteFlags::NONE));
        gate.wait_held(1);
        job.control().force_cancel().unwrap();
        assert!(matches!(job.wait(), Err(Error::Cancelled)));
        gate.open();
        guest.join().unwrap().unwrap();
    });
    assert_eq!(&source.contents().unwrap()[4096..4101], b"guest");
}
