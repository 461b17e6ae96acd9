//! The named bitmaps of a tap, verb by verb. Through the published interface.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags};
use blockmirror_mirror::{
    BitmapMode, Error, Event, MAX_BITMAPS, MirrorJob, MirrorOptions, OnError, SyncMode, Tap,
};

const LEN: u64 = 1 << 20;
const K64: u64 = 65_536;

fn tap() -> Arc<Tap> {
    Tap::new(Arc::new(MemoryDisk::new(LEN)))
}

fn put(tap: &Tap, offset: u64) {
    tap.write_at(&[1; 512], offset, WriteFlags::NONE).unwrap();
}

fn dirty(tap: &Tap, name: &str) -> Vec<(u64, u64)> {
    let runs = tap.dirty_runs(name, ByteRange::new(0, u64::MAX), usize::MAX).unwrap();
    runs.iter().map(|run| (run.start(), run.end())).collect()
}

#[test]
fn a_bitmap_records_while_it_is_enabled() {
    let tap = tap();
    tap.add_disabled_bitmap("b", K64).unwrap();
    put(&tap, 0);
    tap.enable_bitmap("b").unwrap();
    put(&tap, K64);
    tap.disable_bitmap("b").unwrap();
    put(&tap, 2 * K64);
    assert_eq!(dirty(&tap, "b"), [(K64, 2 * K64)]);
    let old = tap.clear_bitmap("b").unwrap();
    assert!(dirty(&tap, "b").is_empty());
    // What was forgotten by mistake comes back.
    tap.enable_bitmap("b").unwrap();
    put(&tap, 4 * K64);
    tap.merge_bitmap("b", &[&old]).unwrap();
    assert_eq!(dirty(&tap, "b"), [(K64, 2 * K64), (4 * K64, 5 * K64)]);
    assert_eq!(tap.remove_bitmap("b").unwrap().dirty_bytes(), 2 * K64);
    assert!(matches!(tap.enable_bitmap("b"), Err(Error::NoBitmap { .. })));
}

#[test]
fn bitmaps_of_other_granularities_and_disks_merge_and_those_of_other_lengths_do_not() {
    let tap = tap();
    tap.add_disabled_bitmap("all", 4096).unwrap();
    tap.add_bitmap("fine", 512).unwrap();
    put(&tap, 10_000);
    let mut elsewhere = DirtyBitmap::new(LEN, K64).unwrap();
    elsewhere.set(LEN - 1..LEN);
    let fine = tap.bitmap("fine").unwrap();
    let short = DirtyBitmap::new(LEN - 1, K64).unwrap();
    let refused = tap.merge_bitmap("all", &[&fine, &elsewhere, &short]);
    assert!(matches!(refused, Err(Error::SyncBitmap { .. })));
    assert!(dirty(&tap, "all").is_empty(), "all or nothing");
    tap.merge_bitmap("all", &[&fine, &elsewhere]).unwrap();
    assert_eq!(dirty(&tap, "all"), [(8192, 12_288), (LEN - K64, LEN)]);
}

#[test]
fn the_list_says_what_each_is_and_what_it_holds() {
    let tap = Tap::new(Arc::new(MemoryDisk::new(LEN + 512)));
    tap.add_bitmap("a", K64).unwrap();
    tap.add_disabled_bitmap("b", 512).unwrap();
    put(&tap, LEN);
    let user = tap.use_bitmap("b").unwrap();
    let list = |tap: &Tap| {
        let line = |b: blockmirror_mirror::BitmapInfo| {
            let (enabled, busy) = (b.enabled, b.busy);
            format!("{} {} {} {} {enabled} {busy}", b.name, b.granularity, b.dirty_granules, b.dirty_bytes)
        };
        tap.bitmaps().into_iter().map(line).collect::<Vec<_>>()
    };
    assert_eq!(list(&tap), ["a 65536 1 512 true false", "b 512 0 0 false true"]);
    drop(user);
    assert_eq!(list(&tap)[1], "b 512 0 0 false false");
}

#[test]
fn a_bitmap_in_use_is_changed_by_writes_only() {
    let tap = tap();
    tap.add_bitmap("b", K64).unwrap();
    let options = || MirrorOptions::new().sync(SyncMode::Bitmap).bitmap("b", BitmapMode::OnSuccess);
    let all_refused = || {
        let nothing = DirtyBitmap::new(LEN, K64).unwrap();
        let answers = [
            tap.remove_bitmap("b").map(drop),
            tap.clear_bitmap("b").map(drop),
            tap.enable_bitmap("b"),
            tap.disable_bitmap("b"),
            tap.merge_bitmap("b", &[&nothing]),
            tap.use_bitmap("b").map(drop),
        ];
        answers.iter().all(|answer| matches!(answer, Err(Error::BitmapBusy { .. })))
    };
    let user = tap.use_bitmap("b").unwrap();
    assert!(all_refused());
    put(&tap, 0);
    assert_eq!(user.dirty_runs(ByteRange::new(100, 200), 9), [ByteRange::new(100, 200)]);
    let job = MirrorJob::attach(&tap, Arc::new(MemoryDisk::new(LEN)), options());
    assert!(matches!(job, Err(Error::BitmapBusy { .. })));
    drop(user);
    let job = MirrorJob::attach(&tap, Arc::new(MemoryDisk::new(LEN)), options()).unwrap();
    assert!(all_refused());
    while job.control().next_event(Some(Duration::from_secs(60))).unwrap() != Event::Ready {}
    job.control().keep_copy().unwrap();
    job.wait().unwrap();
    assert!(dirty(&tap, "b").is_empty() && !all_refused());
}

/// One that does not record must not learn of writes by way of a failed job.
#[test]
fn after_a_failure_a_disabled_bitmap_keeps_at_most_what_it_had() {
    for enabled in [false, true] {
        let tap = tap();
        tap.add_bitmap("b", K64).unwrap();
        put(&tap, 0);
        put(&tap, 4 * K64);
        if !enabled {
            tap.disable_bitmap("b").unwrap();
        }
        let options = MirrorOptions::new().sync(SyncMode::Bitmap).bitmap("b", BitmapMode::Always);
        let job = MirrorJob::attach(&tap, Arc::new(MemoryDisk::new(LEN)), options).unwrap();
        while job.control().next_event(Some(Duration::from_secs(60))).unwrap() != Event::Ready {}
        job.control().pause().unwrap();
        put(&tap, 4 * K64);
        put(&tap, 8 * K64);
        job.control().force_cancel().unwrap();
        assert!(job.wait().is_err());
        let again = (4 * K64, 5 * K64);
        let news = (8 * K64, 9 * K64);
        let expected = if enabled { vec![again, news] } else { vec![again] };
        assert_eq!(dirty(&tap, "b"), expected);
    }
}

/// Nothing had been flushed when a job was cancelled before it was ready, and its bitmap kept all of it: the
/// next job copied again what the target had.
#[test]
fn a_cancelled_job_flushes_so_that_its_bitmap_keeps_what_is_missing() {
    enum Flush {
        Good,
        Fails,
        Hangs,
        Not,
    }
    let (first, second) = ((0, K64), (8 * K64, 9 * K64));
    for (flush, kept) in [
        (Flush::Good, vec![second]),
        (Flush::Fails, vec![first, second]),
        (Flush::Hangs, vec![first, second]),
        (Flush::Not, vec![first, second]),
    ] {
        let tap = tap();
        tap.add_bitmap("b", K64).unwrap();
        for (offset, _) in [first, second] {
            tap.write_at(&[1; 65_536], offset, WriteFlags::NONE).unwrap();
        }
        let faults = Faults::new();
        faults.inject(Fault::on(OpKind::Write).within(ByteRange::new(second.0, second.1)).forever());
        faults.inject(Fault::on(OpKind::WriteZeroes).within(ByteRange::new(second.0, second.1)).forever());
        let target = FaultDisk::new(Arc::new(MemoryDisk::new(LEN)), faults.clone());
        let options = MirrorOptions::new()
            .sync(SyncMode::Bitmap)
            .bitmap("b", BitmapMode::Always)
            // With more threads the second copy may fail, and stop the job, before the first has begun.
            .threads(NonZeroUsize::MIN)
            .on_target_error(OnError::Stop);
        let options = match flush {
            Flush::Hangs => options.final_flush_timeout(Duration::from_millis(20)),
            Flush::Not => options.final_flush_timeout(Duration::ZERO),
            Flush::Good | Flush::Fails => options,
        };
        let job = MirrorJob::attach(&tap, Arc::new(target), options).unwrap();
        let control = job.control().clone();
        while !matches!(control.next_event(Some(Duration::from_secs(60))).unwrap(), Event::Error { .. }) {}
        // The job has stopped; what is in flight is finished.
        while control.progress().dirty_left + control.progress().in_flight != K64 {
            control.wait_timeout(Duration::from_millis(1));
        }
        let gate = matches!(flush, Flush::Hangs).then(|| faults.hold(OpKind::Flush, None));
        if matches!(flush, Flush::Fails) {
            faults.inject(Fault::on(OpKind::Flush).forever());
        }
        control.force_cancel().unwrap();
        assert!(matches!(job.wait(), Err(Error::Cancelled)));
        assert_eq!(dirty(&tap, "b"), kept);
        assert_eq!(faults.seen(OpKind::Flush), usize::from(!matches!(flush, Flush::Not)));
        drop(gate);
    }
}

#[test]
fn a_tap_keeps_so_many_bitmaps_and_no_more() {
    let tap = tap();
    for i in 0..MAX_BITMAPS {
        tap.add_disabled_bitmap(&i.to_string(), K64).unwrap();
    }
    assert!(matches!(tap.add_bitmap("one more", K64), Err(Error::BitmapExists { .. })));
    assert!(matches!(tap.add_bitmap("odd", 1000), Err(Error::Granularity(_))));
    let short = DirtyBitmap::new(1, K64).unwrap();
    assert!(matches!(tap.adopt_bitmap("short", short, true), Err(Error::SyncBitmap { .. })));
}
