//! Groups on real threads: guests that write to several disks, and copies of one instant. Through the
//! published interface.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryDisk, OpKind, Rng};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags};
use blockmirror_mirror::{
    BitmapMode, CopyMode, Error, Event, GroupControl, GroupEvent, GroupMember, JobState, MirrorControl,
    MirrorGroup, MirrorOptions, OnError, Refused, SyncMode, Tap, Verb,
};

const LEN: u64 = 256 << 10;
/// Long enough that only a hang reaches it.
const FOREVER: Duration = Duration::from_secs(60);

fn disk() -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(LEN))
}

fn put(disk: &dyn BlockDevice, at: u64, n: u64) {
    disk.write_at(&n.to_be_bytes(), at, WriteFlags::NONE).unwrap();
}

fn stamp(disk: &dyn BlockDevice, at: u64) -> u64 {
    let mut bytes = [0; 8];
    disk.read_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// Where the guest that writes to the first disk first leaves its stamps, and where the other does.
const FORTH: u64 = 1000;
const BACK: u64 = LEN - 2000;

/// Both guests' stamps show one instant: what is written second is as new as the first, or one older.
fn assert_one_instant(first: &dyn BlockDevice, second: &dyn BlockDevice, what: &str) {
    let (a, b) = (stamp(first, FORTH), stamp(second, FORTH));
    assert!(a == b || a == b + 1, "{what}: {a} then {b}");
    let (b, a) = (stamp(second, BACK), stamp(first, BACK));
    assert!(b == a || b == a + 1, "{what}: {b} then {a}");
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Two disks, each behind a tap, and where they go.
struct Pair {
    sources: [Arc<MemoryDisk>; 2],
    targets: [Arc<MemoryDisk>; 2],
    faults: [Faults; 2],
    taps: [Arc<Tap>; 2],
}

impl Pair {
    fn new() -> Self {
        let sources = [disk(), disk()];
        let taps = [0, 1].map(|i: usize| Tap::named(Arc::clone(&sources[i]) as _, ["data", "log"][i]));
        let targets = [0, 1].map(|_| Arc::new(MemoryDisk::new(LEN).named("target")));
        Self { sources, targets, faults: [Faults::new(), Faults::new()], taps }
    }

    fn attach(&self, options: impl Fn(usize) -> MirrorOptions) -> MirrorGroup {
        let member = |i: usize| {
            let target = FaultDisk::new(Arc::clone(&self.targets[i]) as _, self.faults[i].clone());
            GroupMember::new(&self.taps[i], Arc::new(target), options(i))
        };
        MirrorGroup::attach(vec![member(0), member(1)]).unwrap()
    }

    /// Two guests, each a thread that writes to both disks until it is stopped; how far each got.
    fn guests(&self, stop: &AtomicBool, both_open: bool) -> [u64; 2] {
        let guest = |order: [usize; 2], at: u64| {
            let mut n: u64 = 0;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                if both_open && n.is_multiple_of(8) {
                    // One write on each disk under way at once, begun by one thread.
                    let tickets = order.map(|i| self.taps[i].begin_write(ByteRange::at(at, 8)).unwrap());
                    for ticket in tickets {
                        let result = ticket.source().write_at(&n.to_be_bytes(), at, WriteFlags::NONE);
                        ticket.complete(result, None).unwrap();
                    }
                } else {
                    order.iter().for_each(|i| put(&*self.taps[*i], at, n));
                }
                // And some more dirt elsewhere, so that there is something to copy.
                put(&*self.taps[order[0]], 4096 + n * 7919 % (LEN - 16_384), n);
                if n.is_multiple_of(16) {
                    thread::yield_now();
                }
            }
            n
        };
        thread::scope(|scope| {
            let forth = scope.spawn(|| guest([0, 1], FORTH));
            let back = scope.spawn(|| guest([1, 0], BACK));
            [forth.join().unwrap(), back.join().unwrap()]
        })
    }
}

fn until(group: &MirrorGroup, wanted: &GroupEvent) {
    loop {
        let event = group.control().next_event(Some(FOREVER)).unwrap_or_else(|| {
            let members: Vec<_> = group.control().members().iter().map(MirrorControl::progress).collect();
            panic!("no {wanted:?}: {members:?}")
        });
        if event == *wanted {
            return;
        }
    }
}

/// What one run asks of its group.
struct Run {
    seed: u64,
    /// The targets are kept as copies in place of a pivot.
    keep: bool,
    /// A member was cancelled, perhaps too late.
    cancel: bool,
    attempts: u64,
}

/// Pauses, copy modes and failed flushes, before the end is asked for.
fn disturb(pair: &Pair, control: &GroupControl, rng: &mut Rng) {
    for _ in 0..rng.below(4) {
        let i = rng.below(2) as usize;
        // A refusal is as good.
        let _ = match rng.below(4) {
            0 => control.members()[i].pause(),
            1 => control.members()[i].change(CopyMode::Background),
            2 => control.members()[i].change(CopyMode::WriteBlocking),
            _ => {
                pair.faults[i].inject(Fault::on(OpKind::Flush));
                Ok(())
            }
        };
        thread::yield_now();
    }
}

/// Asks for the end of the group and waits for it.
fn end(seed: u64, control: &GroupControl, rng: &mut Rng) -> Run {
    let keep = rng.below(2) == 0;
    let _ = control.resume();
    if keep {
        control.keep_copy().unwrap()
    } else {
        control.complete().unwrap()
    }
    let cancel = rng.below(4) == 0;
    if cancel {
        thread::sleep(Duration::from_micros(rng.below(300)));
        let _ = control.members()[rng.below(2) as usize].force_cancel();
    }
    for member in control.members() {
        // Background would wait for guests that write without a pause.
        let _ = member.change(CopyMode::WriteBlocking);
    }
    if seed.is_multiple_of(5) {
        while control.finalize().is_err() && !control.wait_timeout(Duration::from_millis(1)) {}
    }
    assert!(control.wait_timeout(FOREVER), "seed {seed} hangs");
    Run { seed, keep, cancel, attempts: control.attempts() }
}

/// Copies, or what was left behind, show one instant; `last` is what the guests wrote last. Returns how the
/// run ended.
fn judge<T>(pair: &Pair, run: &Run, result: Result<T, Error>, last: [u64; 2]) -> &'static str {
    for (at, stamped) in [(FORTH, last[0]), (BACK, last[1])] {
        for tap in &pair.taps {
            assert_eq!(stamp(&**tap, at), stamped, "seed {}: an acknowledged write is lost", run.seed);
        }
    }
    let on_target = |i: usize| pair.taps[i].device().name() != pair.sources[i].name();
    let what = format!("seed {}, {} attempts", run.seed, run.attempts);
    match result {
        Ok(_) if run.keep => {
            assert_one_instant(&*pair.targets[0], &*pair.targets[1], &what);
            "copy"
        }
        Ok(_) => {
            // What stayed behind is what the disks held at the pivot.
            assert_one_instant(&*pair.sources[0], &*pair.sources[1], &what);
            assert!(on_target(0) && on_target(1), "{what}");
            "pivot"
        }
        Err(Error::Cancelled) => {
            assert!(run.cancel && !on_target(0) && !on_target(1), "{what}");
            for source in &pair.sources {
                let found = [stamp(&**source, FORTH), stamp(&**source, BACK)];
                assert_eq!(found, last, "{what}");
            }
            "cancelled"
        }
        Err(error) => panic!("{what}: {error}"),
    }
}

fn one_run(seed: u64) -> (&'static str, u64) {
    let mut rng = Rng::new(seed, 0);
    let pair = Pair::new();
    let stop = AtomicBool::new(false);
    let granularity = 512 << rng.below(10);
    let group = pair.attach(|_| {
        MirrorOptions::new()
            .copy_mode(CopyMode::WriteBlocking)
            .granularity(granularity)
            .on_target_error(OnError::Ignore)
            .auto_finalize(!seed.is_multiple_of(5))
    });
    let both_open = rng.below(8) == 0;
    thread::scope(|scope| {
        let guests = scope.spawn(|| pair.guests(&stop, both_open));
        let stop = Stop(&stop);
        until(&group, &GroupEvent::Ready);
        disturb(&pair, group.control(), &mut rng);
        let run = end(seed, group.control(), &mut rng);
        let result = group.wait();
        drop(stop);
        (judge(&pair, &run, result, guests.join().unwrap()), run.attempts)
    })
}

#[test]
fn copies_and_pivots_of_two_disks_show_one_instant() {
    let (mut copies, mut pivots, mut cancelled, mut repeated) = (0, 0, 0, 0);
    for seed in 0..120 {
        let (end, attempts) = one_run(seed);
        match end {
            "copy" => copies += 1,
            "pivot" => pivots += 1,
            _ => cancelled += 1,
        }
        repeated += u32::from(attempts > 1);
    }
    assert!(copies > 20 && pivots > 20 && cancelled > 0, "{copies} {pivots} {cancelled} {repeated}");
}

fn plain(_: usize) -> MirrorOptions {
    MirrorOptions::new()
}

fn rest(control: &MirrorControl) -> Vec<Event> {
    std::iter::from_fn(|| control.next_event(Some(FOREVER))).collect()
}

/// What a management layer sees that drives the members as jobs of their own.
#[test]
fn members_can_be_driven_one_by_one_and_tell_their_own_events() {
    use Event::Status;
    let pair = Pair::new();
    let group = pair.attach(|i| MirrorOptions::new().auto_finalize(i != 0).auto_dismiss(false));
    until(&group, &GroupEvent::Ready);
    let (control, jobs) = group.into_jobs();
    for member in control.members() {
        member.events();
    }
    jobs[0].control().complete().unwrap();
    assert!(!control.wait_timeout(Duration::from_millis(5)));
    let refused = Err(Refused::State { verb: Verb::Finalize, state: JobState::Ready });
    assert_eq!((control.finalize(), jobs[0].control().finalize()), (refused, refused));
    put(&*pair.taps[0], 0, 7);
    jobs[1].control().complete().unwrap();
    assert_eq!(control.next_event(Some(FOREVER)), Some(GroupEvent::Pending));
    put(&*pair.taps[1], 0, 8);
    let waits = [Status(JobState::Waiting), Status(JobState::Pending)];
    assert_eq!(jobs[0].control().events(), [&waits[..], &[Event::Pending]].concat());
    assert_eq!(jobs[1].control().events(), waits);
    jobs[1].control().finalize().unwrap();
    assert_eq!(control.next_event(Some(FOREVER)), Some(GroupEvent::Completed));
    assert_eq!(control.next_event(None), None, "there will be none any more");
    for job in jobs {
        let end = [Event::Completed { error: None }, Status(JobState::Concluded)];
        assert_eq!(job.control().events(), end);
        job.control().dismiss().unwrap();
        job.wait().unwrap();
    }
    assert!(control.force_cancel().is_err() && control.complete().is_err());
    assert_eq!((stamp(&*pair.targets[0], 0), stamp(&*pair.targets[1], 0)), (7, 8));
    assert_eq!(pair.taps[0].device().name(), "target");
}

#[test]
fn a_member_that_fails_takes_the_others_with_it_and_says_why() {
    let pair = Pair::new();
    let group = pair.attach(plain);
    until(&group, &GroupEvent::Ready);
    pair.faults[1].inject(Fault::on(OpKind::Write).forever());
    put(&*pair.taps[1], 0, 1);
    let (control, jobs) = group.into_jobs();
    let Some(GroupEvent::Failed { member: 1, error }) = control.next_event(Some(FOREVER)) else {
        panic!("the second failed")
    };
    assert!(error.starts_with("cannot write the target: "), "{error}");
    assert!(rest(jobs[0].control()).contains(&Event::Cancelled));
    let ends: Vec<_> = jobs.into_iter().map(|job| job.wait().unwrap_err().to_string()).collect();
    assert_eq!(ends, [format!("cancelled with its group: log: {error}"), error]);
    assert_eq!(control.keep_copy().is_err(), control.complete().is_err());
    assert!(!pair.taps[0].is_mirrored());
}

#[test]
fn keeping_before_ready_or_dropping_a_member_aborts_the_group() {
    for how in 0..3 {
        let pair = Pair::new();
        pair.sources.iter().for_each(|source| source.write_at(&[1; 100_000], 0, WriteFlags::NONE).unwrap());
        let group = pair.attach(|_| MirrorOptions::new().speed(1));
        let control = group.control().clone();
        match how {
            0 => control.keep_copy().unwrap(),
            1 => control.members()[1].keep_copy().unwrap(),
            _ => drop(group.into_jobs().1.pop()),
        }
        assert!(control.wait_timeout(FOREVER));
        assert_eq!(control.next_event(None), Some(GroupEvent::Cancelled));
    }
}

/// A peer that never answers again: the others, and the group, are free within moments all the same.
#[test]
fn calls_of_a_blocked_member_are_cancelled_when_another_is() {
    let pair = Pair::new();
    let group = pair.attach(plain);
    until(&group, &GroupEvent::Ready);
    let gate = pair.faults[1].hold(OpKind::Write, None);
    put(&*pair.taps[1], 0, 1);
    gate.wait_held(1);
    let control = group.control().clone();
    control.complete().unwrap();
    control.members()[0].force_cancel().unwrap();
    assert!(control.wait_timeout(FOREVER), "the blocked call was not ended");
    assert!(matches!(group.wait(), Err(Error::Cancelled)));
}

#[test]
fn what_cannot_be_a_group_is_refused_and_leaves_the_taps_alone() {
    let pair = Pair::new();
    assert!(matches!(MirrorGroup::attach(Vec::new()), Err(Error::InvalidOption { .. })));
    pair.taps[0].add_bitmap("b", 4096).unwrap();
    put(&*pair.taps[0], 0, 1);
    // Were the first left with no thread, this bitmap would be in use for ever.
    let options = MirrorOptions::new().sync(SyncMode::Bitmap).bitmap("b", BitmapMode::Always);
    let first = || GroupMember::new(&pair.taps[0], Arc::clone(&pair.targets[0]) as _, options.clone());
    let second = |i: usize, target: &Arc<MemoryDisk>| {
        GroupMember::new(&pair.taps[i], Arc::clone(target) as _, MirrorOptions::new())
    };
    let attach = |other| MirrorGroup::attach(vec![first(), other]).unwrap_err();
    assert!(matches!(attach(second(1, &pair.targets[0])), Error::SharedTarget { .. }));
    assert!(matches!(attach(second(0, &pair.targets[1])), Error::Busy { .. }));
    let short = Arc::new(MemoryDisk::new(1));
    assert!(matches!(attach(second(1, &short)), Error::SizeMismatch { .. }));
    for tap in &pair.taps {
        assert!(!tap.is_mirrored());
    }
    assert_eq!(pair.taps[0].remove_bitmap("b").unwrap().dirty_bytes(), 4096, "as if it had not been");
    let group = pair.attach(plain);
    until(&group, &GroupEvent::Ready);
    group.control().complete().unwrap();
    assert_eq!(group.wait().unwrap().len(), 2);
}

#[test]
fn the_whole_pauses_and_resumes() {
    let pair = Pair::new();
    let group = pair.attach(plain);
    until(&group, &GroupEvent::Ready);
    let control = group.control();
    assert_eq!(control.resume(), Err(Refused::NotPaused));
    control.members()[1].pause().unwrap();
    control.pause().unwrap();
    assert_eq!(control.pause(), Err(Refused::Paused { verb: Verb::Pause }));
    assert_eq!(control.keep_copy(), Err(Refused::Paused { verb: Verb::Cancel }));
    control.complete().unwrap();
    assert!(!control.wait_timeout(Duration::from_millis(5)));
    assert_eq!(control.attempts(), 0);
    control.resume().unwrap();
    group.wait().unwrap();
}
