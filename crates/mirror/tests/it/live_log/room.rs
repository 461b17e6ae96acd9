//! A log with as many active regions as it may have: who waits for room, and until when.

use super::*;

/// A job whose log has as many active regions as there may be, all of which wait for the target.
pub(super) struct Full {
    pub(super) tap: Arc<Tap>,
    pub(super) job: MirrorJob,
    log: Arc<Log>,
    pub(super) gate: blockmirror_block::testing::Gate,
    source: Arc<MemoryDisk>,
    target: Arc<MemoryDisk>,
}

pub(super) fn full() -> Full {
    let (source, target, (log, _)) = (filled(), empty(), Log::new());
    let (held, faults) = faulty(&target);
    let tap = tap(&source, &log);
    let live = LiveLog::new(Arc::clone(&log) as _).active_regions(2);
    let job = attach(&tap, &held, MirrorOptions::new().live_log(live));
    until(&job, &Event::Ready);
    let gate = faults.hold(OpKind::Write, None);
    write(&*tap, 0, 10, 200);
    write(&*tap, REGION, 10, 200);
    gate.wait_held(1);
    Full { tap, job, log, gate, source, target }
}

impl Full {
    /// A write to another region, by a thread of its own, that is seen to wait.
    fn writer(&self) -> mpsc::Receiver<()> {
        let (sent, received) = mpsc::channel();
        let tap = Arc::clone(&self.tap);
        thread::spawn(move || {
            write(&*tap, 9 * REGION, 10, 200);
            sent.send(()).unwrap();
        });
        while self.tap.writes_under_way() == 0 {
            thread::yield_now();
        }
        assert!(self.tap.write_would_wait(ByteRange::at(9 * REGION, 10)));
        received
    }
}

fn returns(writer: &mpsc::Receiver<()>) {
    writer.recv_timeout(FOREVER.unwrap()).unwrap();
}

#[test]
fn a_write_to_one_region_too_many_waits_until_another_is_cleared() {
    let full = full();
    let writer = full.writer();
    // One to a marked region does not.
    write(&*full.tap, 4096, 10, 200);
    assert!(!full.log.marked().contains(&9));
    full.gate.open();
    returns(&writer);
    assert!(full.log.marked().contains(&9) && full.log.marked().len() <= 2);
    full.job.control().complete().unwrap();
    full.job.wait().unwrap();
    assert!(full.target.contents().unwrap() == full.source.contents().unwrap());
}

#[test]
fn a_job_that_is_paused_or_cancelled_keeps_no_write_waiting() {
    for cancel in [false, true] {
        let full = full();
        let writer = full.writer();
        let control = full.job.control();
        if cancel {
            control.cancel()
        } else {
            control.pause().unwrap()
        }
        returns(&writer);
        assert!(full.log.marked().contains(&9) || full.log.kept.lock().ended);
        full.gate.open();
        end(full.job);
    }
}

#[test]
fn a_caller_that_is_cancelled_does_not_wait_for_room() {
    let full = full();
    let source = CancelSource::new();
    let (sent, received) = mpsc::channel();
    let (tap, scope) = (Arc::clone(&full.tap), source.clone());
    thread::spawn(move || {
        let _calls = scope.enter();
        sent.send(None).unwrap();
        sent.send(Some(tap.write_at(&[1], 9 * REGION, WriteFlags::NONE))).unwrap();
    });
    let next = || received.recv_timeout(FOREVER.unwrap()).unwrap();
    assert!(next().is_none());
    source.cancel();
    assert_eq!(next().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(full.tap.writes_under_way(), 0);
    full.gate.open();
    end(full.job);
}

/// The guest of a mirror whose target is gone goes on, as the policy wants it to.
#[test]
fn a_target_that_is_gone_keeps_no_write_waiting_for_good() {
    let (source, target, (log, _)) = (filled(), empty(), Log::new());
    let (gone, faults) = faulty(&target);
    let tap = tap(&source, &log);
    let live = LiveLog::new(Arc::clone(&log) as _).active_regions(2);
    let options = MirrorOptions::new().on_target_error(OnError::Ignore).live_log(live);
    let job = attach(&tap, &gone, options);
    until(&job, &Event::Ready);
    faults.inject(Fault::on(OpKind::Write).forever());
    faults.inject(Fault::on(OpKind::Flush).forever());
    for region in 0..4 {
        write(&*tap, region * REGION, 10, 200);
    }
    assert_eq!(log.marked(), [0, 1, 2, 3]);
    faults.heal();
    job.control().complete().unwrap();
    job.wait().unwrap();
    assert!(target.contents().unwrap() == source.contents().unwrap());
}
