//! A small write of the guest makes a small copy, however coarse the granularity: on real files, by the job's
//! own figures.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_image::{CreateSettings, CreateSpec, Format, NewImage, OpenOptions};
use blockmirror_mirror::{Event, MirrorControl, MirrorJob, MirrorOptions, Tap};
use blockmirror_testing::content::noise;
use blockmirror_testing::report;
use blockmirror_testing::scratch::scratch;

/// Not a multiple of 64 MiB.
const LEN: u64 = 96 << 20;
const BLOCK: u64 = 4096;
/// Blocks written while the first pass is under way, and again once the job is ready.
const WRITES: u64 = 1000;

/// Writes blocks spread over the disk, `shift` bytes beside whole blocks.
fn write_blocks(tap: &Tap, salt: u64, shift: u64) {
    let mut block = vec![0; BLOCK as usize];
    for i in 0..WRITES {
        noise(&mut block, salt << 32 | i);
        // A stride without a common divisor with the number of blocks reaches all of them.
        let at = (salt + i * 7919) % (LEN / BLOCK - 1) * BLOCK + shift;
        tap.write_at(&block, at, WriteFlags::NONE).unwrap();
    }
}

fn wait_until_clean(control: &MirrorControl) {
    loop {
        let progress = control.progress();
        if progress.offset == progress.len {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn at_most_two_bytes_are_copied_again_for_one_that_was_written() {
    let dir = scratch().unwrap();
    for (granularity, format) in [
        (64 << 10, Format::Qcow2),
        (1 << 20, Format::Qcow2),
        (64 << 20, Format::Qcow2),
        (64 << 20, Format::Raw),
    ] {
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
        // Slow enough that most of what is written was copied before or is copied after.
        let options = MirrorOptions::new().granularity(granularity).speed(LEN * 2);
        let job = MirrorJob::attach(&tap, Arc::clone(target.device()), options).unwrap();
        write_blocks(&tap, 1, 0);
        while job.control().next_event(None) != Some(Event::Ready) {}
        let bulk = job.control().progress().copied;
        job.control().set_speed(0).unwrap();

        // One by one, so that nothing is written twice before it is copied.
        let written = WRITES * BLOCK;
        write_blocks(&tap, 2, 0);
        wait_until_clean(job.control());
        let aligned = job.control().progress().copied;
        write_blocks(&tap, 3, 1000);
        wait_until_clean(job.control());
        let odd = job.control().progress().copied;

        let ratio = |bytes: u64| bytes as f64 / written as f64;
        let ratios = [bulk - LEN, aligned - bulk, odd - aligned].map(ratio);
        report(format_args!(
            "copied again per byte written, {format} at {} KiB: {:.2} in the first pass, {:.2} when ready, {:.2} beside \
             whole blocks",
            granularity >> 10,
            ratios[0],
            ratios[1],
            ratios[2]
        ));
        assert!(ratios.iter().all(|&ratio| ratio <= 2.0), "{granularity}: {ratios:?}");
        // The figures are no trick: all of it did arrive.
        assert!(ratios[1] > 0.0, "nothing was copied again: {ratios:?}");
        job.control().keep_copy().unwrap();
        job.wait().unwrap();
        let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for at in (0..LEN).step_by(ours.len()) {
            source.device().read_at(&mut ours, at).unwrap();
            target.device().read_at(&mut theirs, at).unwrap();
            assert!(ours == theirs, "source and target differ in the MiB at {at}");
        }
    }
}
