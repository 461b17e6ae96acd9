//! Auto mode on real files and real threads: a guest that never rests, and READY all the same, at every
//! granularity.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_image::{CreateSettings, CreateSpec, Format, NewImage, OpenOptions};
use blockmirror_mirror::{CopyMode, Event, JobState, MirrorJob, MirrorOptions, Tap};
use blockmirror_testing::content::noise;
use blockmirror_testing::report;
use blockmirror_testing::scratch::scratch;

/// Not a multiple of 64 MiB.
const LEN: u64 = 40 << 20;
const BLOCK: u64 = 4096;
const WRITERS: u64 = 16;
/// Only a hang takes so long.
const FOREVER: Duration = Duration::from_secs(300);

/// Writes to every sixteenth block, in no order, until it is stopped; the last stamp in each.
fn write_without_a_rest(tap: &Tap, writer: u64, stop: &AtomicBool) -> Vec<u64> {
    let mut stamps = vec![0; (LEN / BLOCK / WRITERS) as usize];
    let mut block = vec![0; BLOCK as usize];
    for stamp in 1.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let index = (stamp as usize * 7919) % stamps.len();
        noise(&mut block, writer << 48 | stamp);
        let at = (index as u64 * WRITERS + writer) * BLOCK;
        tap.write_at(&block, at, WriteFlags::NONE).unwrap();
        stamps[index] = stamp;
    }
    stamps
}

#[test]
fn a_guest_that_never_rests_is_mirrored_at_every_granularity() {
    let dir = scratch().unwrap();
    for (granularity, format) in
        [(64 << 10, Format::Qcow2), (1 << 20, Format::Raw), (64 << 20, Format::Qcow2)]
    {
        let open = |name: &str| {
            let path = dir.path().join(name);
            let spec = CreateSpec::new(format, LEN, CreateSettings::default());
            NewImage::create(&path, &spec).unwrap().persist().unwrap();
            OpenOptions::new().format(format).writable(true).open(&path).unwrap()
        };
        let (source, target) = (open("source"), open("target"));
        let mut piece = vec![0; 1 << 20];
        for at in (0..LEN).step_by(piece.len()) {
            noise(&mut piece, at);
            source.device().write_at(&piece, at, WriteFlags::NONE).unwrap();
        }

        let tap = Tap::new(Arc::clone(source.device()));
        let stop = AtomicBool::new(false);
        let stamps = thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    scope.spawn({
                        let (tap, stop) = (&tap, &stop);
                        move || write_without_a_rest(tap, writer, stop)
                    })
                })
                .collect();
            let options = MirrorOptions::new().granularity(granularity).copy_mode(CopyMode::Auto);
            let job = MirrorJob::attach(&tap, Arc::clone(target.device()), options).unwrap();
            let began = Instant::now();
            let mut switches = Vec::new();
            let ready = loop {
                match job.control().next_event(Some(FOREVER.saturating_sub(began.elapsed()))) {
                    Some(Event::Ready) => break true,
                    Some(Event::CopyMode { mode, reason }) => switches.push(format!("{mode}: {reason}")),
                    Some(Event::Status(JobState::Running | JobState::Created | JobState::Ready)) => {}
                    // Let the writers stop before the test fails.
                    _ => break false,
                }
            };
            let progress = job.control().progress();
            let completed = ready && job.control().complete().is_ok() && job.wait().is_ok();
            stop.store(true, Ordering::Relaxed);
            let stamps: Vec<_> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
            assert!(completed, "ready: {ready}, {switches:?}, {progress:?}");
            report(format_args!(
                "auto mode, {format} at {} KiB: {} MiB copied, {} MiB written through, {switches:?}",
                granularity >> 10,
                progress.copied >> 20,
                progress.mirrored >> 20
            ));
            stamps
        });

        // Every acknowledged write is in the survivor.
        let (mut found, mut expected) = (vec![0; BLOCK as usize], vec![0; BLOCK as usize]);
        let mut written = 0;
        for (writer, stamps) in (0..).zip(&stamps) {
            for (index, &stamp) in (0..).zip(stamps).filter(|&(_, &stamp)| stamp > 0) {
                target.device().read_at(&mut found, (index * WRITERS + writer) * BLOCK).unwrap();
                noise(&mut expected, writer << 48 | stamp);
                assert!(found == expected, "writer {writer}, block {index}, stamp {stamp}");
                written += 1;
            }
        }
        assert!(written > 0, "the guest did not write");
    }
}
