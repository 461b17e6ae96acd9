//! Callers that never wait, and what wakes them: each row of the table *Who releases a write that waits* in
//! docs/design/guest-writes.md. Those of the log are in `live_log/queue.rs`.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use blockmirror_block::cancel::CancelSource;
use blockmirror_block::testing::{Fault, MemoryDisk, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags};
use blockmirror_mirror::{
    Begin, CopyMode, Error, Event, GroupEvent, GroupMember, GuestQueue, MirrorGroup, MirrorJob,
    MirrorOptions, OnError, Tap, WriteTicket,
};

use crate::tap::{empty, faulty, filled, until};

const RANGE: ByteRange = ByteRange::new(0, 4096);
/// Long enough that only a hang reaches it.
const FOREVER: Duration = Duration::from_secs(60);

/// A caller that never waits in the tap, but on a channel that its waker sends to.
pub(super) struct Caller {
    queue: GuestQueue,
    /// Whether the waker was called under no lock of the tap and the job.
    woken: Receiver<bool>,
}

/// Whether another thread gets the locks of the tap and its job while this one waits for it.
fn are_free(tap: &Weak<Tap>) -> bool {
    let Some(tap) = tap.upgrade() else { return true };
    let (sent, received) = mpsc::channel();
    thread::spawn(move || sent.send(tap.is_mirrored()));
    received.recv_timeout(FOREVER).is_ok()
}

impl Caller {
    pub(super) fn new(tap: &Arc<Tap>) -> Self {
        let (sent, woken) = mpsc::channel();
        let own = Arc::downgrade(tap);
        let wake = move || {
            let _ = sent.send(are_free(&own));
        };
        Self { queue: tap.queue(wake), woken }
    }

    /// Asks for `range`, which is refused.
    pub(super) fn refused(&self, range: ByteRange) -> Option<Duration> {
        match self.queue.try_begin_write(range).unwrap() {
            Begin::Wait { within } => within,
            go => panic!("{go:?}"),
        }
    }

    /// The same, but asks again in time as well.
    pub(super) fn woken_in_time_by(&self, range: ByteRange, release: impl FnOnce()) -> WriteTicket {
        let mut within = self.refused(range);
        release();
        for _ in 0..10_000 {
            let woken = self.woken.recv_timeout(within.unwrap_or(FOREVER));
            assert!(woken.is_ok() || within.is_some(), "it sleeps for ever");
            match self.queue.try_begin_write(range).unwrap() {
                Begin::Go(ticket) => return ticket,
                Begin::Wait { within: again } => within = again,
            }
        }
        panic!("it is never admitted");
    }

    /// Is refused; after `release`, asks again whenever its waker was called, and at no other time, until it
    /// is admitted.
    pub(super) fn woken_by(&self, range: ByteRange, release: impl FnOnce()) -> WriteTicket {
        self.refused(range);
        release();
        for _ in 0..10_000 {
            let free = self.woken.recv_timeout(FOREVER).unwrap_or_else(|_| panic!("it sleeps for ever"));
            assert!(free, "the waker is called under a lock");
            if let Begin::Go(ticket) = self.queue.try_begin_write(range).unwrap() {
                return ticket;
            }
        }
        panic!("it is woken again and again, and never admitted");
    }
}

fn blocking() -> MirrorOptions {
    MirrorOptions::new().copy_mode(CopyMode::WriteBlocking)
}

fn write(disk: &dyn BlockDevice) -> Result<(), blockmirror_block::Error> {
    disk.write_at(&[200; 4096], 0, WriteFlags::NONE)
}

/// Writes as a holder of a ticket does.
fn perform(ticket: WriteTicket) {
    let source = write(&**ticket.source());
    let target = ticket.target().map(|target| write(&*target));
    ticket.complete(source, target).unwrap();
}

fn finish(job: MirrorJob) {
    job.control().complete().unwrap();
    job.wait().unwrap();
}

#[test]
fn the_end_of_a_drain_wakes_each_refused_caller_once() {
    let tap = Tap::new(filled() as _);
    let (first, second, idle) = (Caller::new(&tap), Caller::new(&tap), Caller::new(&tap));
    let (drained, other) = (tap.drain(), tap.drain());
    for _ in 0..100 {
        assert_eq!(first.refused(RANGE), None);
    }
    drop(other);
    assert!(first.woken.try_recv().is_err(), "the other drain goes on");
    drop(second.woken_by(RANGE, || drop(drained)));
    assert_eq!(first.woken.try_iter().count(), 1);
    assert_eq!(idle.woken.try_iter().count(), 0, "it was not refused");
}

/// A ready job whose end waits for the last flush: the guest is quiesced. `open` lets the flush go on.
fn quiesced(options: MirrorOptions, then: impl FnOnce(&Caller, &MirrorJob, &dyn Fn())) {
    let (source, target) = (filled(), empty());
    let (slow, faults) = faulty(&target);
    let tap = Tap::new(Arc::clone(&source) as _);
    let job = MirrorJob::attach(&tap, slow as _, options.on_target_error(OnError::Ignore)).unwrap();
    until(&job, &Event::Ready);
    let gate = faults.hold(OpKind::Flush, None);
    job.control().complete().unwrap();
    gate.wait_held(1);
    let caller = Caller::new(&tap);
    let open = || {
        faults.inject(Fault::on(OpKind::Flush));
        gate.open();
    };
    then(&caller, &job, &open);
    gate.open();
    drop(job);
}

#[test]
fn a_flush_that_fails_while_the_guest_is_quiesced_wakes_the_caller() {
    quiesced(MirrorOptions::new(), |caller, _, open| perform(caller.woken_by(RANGE, open)));
}

#[test]
fn an_abort_while_the_guest_is_quiesced_wakes_the_caller() {
    quiesced(MirrorOptions::new(), |caller, job, _| {
        let ticket = caller.woken_by(RANGE, || job.control().force_cancel().unwrap());
        assert!(ticket.target().is_none());
        perform(ticket);
    });
}

#[test]
fn the_limit_of_quiescing_is_what_the_caller_sleeps_for() {
    quiesced(MirrorOptions::new(), |caller, _, _| {
        // Nothing wakes it: the flush takes as long as it likes.
        let mut sleeps = 0;
        while let Begin::Wait { within } = caller.queue.try_begin_write(RANGE).unwrap() {
            let within = within.unwrap();
            assert!(within <= Duration::from_secs(1), "{within:?}");
            sleeps += 1;
            assert!(sleeps < 100, "it is never admitted");
            let _ = caller.woken.recv_timeout(within);
        }
    });
}

#[test]
fn a_pivot_wakes_the_caller_which_finds_the_new_disk() {
    let (source, target) = (filled(), Arc::new(MemoryDisk::new(4 << 20).named("new")));
    let (slow, faults) = faulty(&target);
    let tap = Tap::new(Arc::clone(&source) as _);
    let job = MirrorJob::attach(&tap, slow as _, MirrorOptions::new()).unwrap();
    until(&job, &Event::Ready);
    let gate = faults.hold(OpKind::Flush, None);
    job.control().complete().unwrap();
    gate.wait_held(1);
    let caller = Caller::new(&tap);
    let ticket = caller.woken_by(RANGE, || gate.open());
    assert_eq!(ticket.source().name(), "new");
    perform(ticket);
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap()[0], 200);
}

/// The guest of a member waits for the others.
#[test]
fn the_rollback_of_a_group_wakes_the_caller() {
    let (first, second) = (Tap::new(filled() as _), Tap::new(filled() as _));
    let ((fast, _), (slow, faults)) = (faulty(&empty()), faulty(&empty()));
    let options = MirrorOptions::new().on_target_error(OnError::Ignore);
    let group = MirrorGroup::attach(vec![
        GroupMember::new(&first, fast as _, options.clone()),
        GroupMember::new(&second, slow as _, options),
    ])
    .unwrap();
    while group.control().next_event(Some(FOREVER)) != Some(GroupEvent::Ready) {}
    let gate = faults.hold(OpKind::Flush, None);
    group.control().complete().unwrap();
    gate.wait_held(1);
    let caller = Caller::new(&first);
    perform(caller.woken_by(RANGE, || {
        faults.inject(Fault::on(OpKind::Flush));
        gate.open();
    }));
    group.wait().unwrap();
}

/// A job in write-blocking mode that has `kind` in flight at the first bytes of its target.
fn in_flight(kind: OpKind, options: MirrorOptions, then: impl FnOnce(&Caller, &MirrorJob, &dyn Fn())) {
    let (source, target) = match kind {
        OpKind::WriteZeroes => (empty(), filled()),
        _ => (filled(), empty()),
    };
    let (slow, faults) = faulty(&target);
    let tap = Tap::new(Arc::clone(&source) as _);
    let gate = faults.hold(kind, None);
    let job = MirrorJob::attach(&tap, slow as _, options).unwrap();
    gate.wait_held(1);
    let caller = Caller::new(&tap);
    then(&caller, &job, &|| gate.open());
    gate.open();
    if job.control().failure().is_none() {
        let _ = job.control().resume();
        until(&job, &Event::Ready);
        finish(job);
        assert_eq!(target.contents().unwrap(), source.contents().unwrap());
    }
}

#[test]
fn the_end_of_a_copy_or_zeroing_wakes_the_caller() {
    for kind in [OpKind::Write, OpKind::WriteZeroes] {
        in_flight(kind, blocking(), |caller, _, open| {
            assert_eq!(caller.refused(RANGE), None, "no time alone admits it");
            perform(caller.woken_by(RANGE, open));
        });
    }
}

#[test]
fn a_pause_an_abort_and_a_change_of_mode_wake_the_caller() {
    for how in 0..3 {
        in_flight(OpKind::Write, blocking(), |caller, job, _| {
            let ticket = caller.woken_by(RANGE, || match how {
                0 => job.control().pause().unwrap(),
                1 => job.control().force_cancel().unwrap(),
                _ => job.control().change(CopyMode::Background).unwrap(),
            });
            assert!(ticket.target().is_none(), "the job copies it later");
            perform(ticket);
        });
    }
}

#[test]
fn the_latency_budget_is_what_the_caller_sleeps_for() {
    let options = blocking().latency_budget(Duration::from_millis(20));
    in_flight(OpKind::Write, options, |caller, _, _| {
        let mut sleeps = 0;
        let ticket = loop {
            match caller.queue.try_begin_write(RANGE).unwrap() {
                Begin::Go(ticket) => break ticket,
                Begin::Wait { within } => {
                    let within = within.unwrap();
                    assert!(within <= Duration::from_millis(20), "{within:?}");
                    let _ = caller.woken.recv_timeout(within);
                }
            }
            sleeps += 1;
            assert!(sleeps < 1000, "it is never admitted");
        };
        assert!(ticket.target().is_none());
        perform(ticket);
    });
}

/// A refusal that is not followed by another for a second is void, so a caller may not sleep for so long.
#[test]
fn a_long_latency_budget_is_slept_for_in_parts() {
    let options = blocking().latency_budget(Duration::from_secs(30));
    in_flight(OpKind::Write, options, |caller, _, _| {
        let within = caller.refused(RANGE).unwrap();
        assert!(within <= Duration::from_millis(500), "{within:?}");
    });
}

/// The example: one thread with 32 requests in flight that blocks nowhere, and a disk that moves twice.
#[test]
fn a_queue_thread_that_never_blocks_sees_its_disk_move() {
    crate::queue_thread::main().unwrap();
}

fn ready() -> (Arc<Tap>, MirrorJob) {
    let tap = Tap::new(filled() as _);
    let job = MirrorJob::attach(&tap, empty() as _, blocking()).unwrap();
    until(&job, &Event::Ready);
    (tap, job)
}

fn go(caller: &Caller, range: ByteRange) -> WriteTicket {
    match caller.queue.try_begin_write(range).unwrap() {
        Begin::Go(ticket) => ticket,
        wait => panic!("{wait:?}"),
    }
}

#[test]
fn the_end_of_an_earlier_write_wakes_the_caller() {
    let (tap, job) = ready();
    let caller = Caller::new(&tap);
    let first = go(&caller, RANGE);
    let second = caller.woken_by(RANGE, || perform(first));
    // One that is dropped has ended, too; what it left is copied first.
    let third = caller.woken_by(RANGE, || drop(second));
    perform(third);
    finish(job);
}

/// A write that waits keeps later ones waiting; it may be given up.
#[test]
fn a_write_that_is_cancelled_while_it_waits_wakes_the_caller() {
    let (tap, job) = ready();
    let caller = Caller::new(&tap);
    let first = go(&caller, RANGE);
    let source = CancelSource::new();
    let blocked = thread::spawn({
        let (tap, source) = (Arc::clone(&tap), source.clone());
        move || {
            let _calls = source.enter();
            tap.begin_write(ByteRange::new(2048, 6144)).map(drop)
        }
    });
    let range = ByteRange::new(4096, 8192);
    // Until it waits, behind the first.
    while matches!(caller.queue.try_begin_write(range).unwrap(), Begin::Go(_)) {
        thread::yield_now();
    }
    let own = caller.woken_by(range, || source.cancel());
    assert!(blocked.join().unwrap().is_err());
    own.complete(Ok(()), None).unwrap();
    perform(first);
    finish(job);
}

/// Callers that are refused do not wake each other: they would ask for ever, and no thread would rest.
#[test]
fn refused_callers_let_each_other_sleep() {
    let (tap, job) = ready();
    let (first, second) = (Caller::new(&tap), Caller::new(&tap));
    let open = go(&first, RANGE);
    for _ in 0..100 {
        first.refused(RANGE);
        second.refused(ByteRange::new(2048, 4096));
        // Nor does a look at the job.
        job.control().progress();
        job.control().events();
    }
    let wakes = first.woken.try_iter().chain(second.woken.try_iter()).count();
    assert_eq!(wakes, 0);
    perform(open);
    assert!(first.woken.recv_timeout(FOREVER).is_ok() && second.woken.recv_timeout(FOREVER).is_ok());
    finish(job);
}

#[test]
fn a_queue_that_is_dropped_is_not_woken() {
    let tap = Tap::new(filled() as _);
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let queue = tap.queue(move || {
        counted.fetch_add(1, Ordering::SeqCst);
    });
    let drained = tap.drain();
    assert!(matches!(queue.try_begin_write(RANGE).unwrap(), Begin::Wait { within: None }));
    drop(queue);
    drop(drained);
    assert_eq!((calls.load(Ordering::SeqCst), Arc::strong_count(&calls)), (0, 1), "nor is its waker kept");
}

/// Many requests in flight, none of which is asked for again before all others were: each has its latency
/// budget all the same.
#[test]
fn the_latency_budget_of_256_refused_writes_ends() {
    let options = blocking().latency_budget(Duration::from_millis(20));
    let (source, target) = (filled(), empty());
    let (slow, faults) = faulty(&target);
    let tap = Tap::new(Arc::clone(&source) as _);
    let gate = faults.hold(OpKind::Write, None);
    let job = MirrorJob::attach(&tap, slow as _, options.max_in_flight(1)).unwrap();
    gate.wait_held(1);
    let caller = Caller::new(&tap);
    let mut refused: Vec<ByteRange> = (0..256).map(|i| ByteRange::at(i * 16, 16)).collect();
    let limit = std::time::Instant::now() + FOREVER;
    while !refused.is_empty() {
        assert!(std::time::Instant::now() < limit, "{} are never admitted", refused.len());
        refused.retain(|range| match caller.queue.try_begin_write(*range).unwrap() {
            Begin::Go(ticket) => ticket.complete(Ok(()), None).is_err(),
            Begin::Wait { .. } => true,
        });
    }
    gate.open();
    job.control().force_cancel().unwrap();
    assert!(matches!(job.wait(), Err(Error::Cancelled)));
}
