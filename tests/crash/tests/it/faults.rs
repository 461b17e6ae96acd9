//! A write or a flush fails while tables move or the header changes, the guest goes on, and then the power
//! fails: nothing that a header points at, written for certain or perhaps, was given back or used again.

use std::io::Write as _;
use std::sync::Arc;

use blockmirror_block::testing::{Done, Fault, FaultStorage, Faults, OpKind, RecordingStorage};
use blockmirror_block::{BlockDevice, ErrorKind, WriteFlags};
use blockmirror_qcow2::Version;

use crate::resize::{Format, State, Step, contents, image, open, verify};

/// What fails, with which error, and how much of it is done all the same.
const FAILURES: [(OpKind, ErrorKind, Done); 5] = [
    (OpKind::Write, ErrorKind::NoSpace, Done::Nothing),
    (OpKind::Write, ErrorKind::NoSpace, Done::Half),
    (OpKind::Write, ErrorKind::Io, Done::Everything),
    (OpKind::Flush, ErrorKind::NoSpace, Done::Nothing),
    (OpKind::Flush, ErrorKind::Io, Done::Nothing),
];

const FORMAT: Format = Format { version: Version::V3, cluster: 512, extended: false, backed: false };

/// Plays `steps` on `image`; something fails while the first of them runs, or the flush after it.
fn play(
    format: Format,
    image: &[u8],
    steps: &[Step],
    fault: Fault,
) -> (Arc<RecordingStorage>, Vec<State>, bool) {
    let recording = Arc::new(RecordingStorage::with_contents(image));
    let faults = Faults::new();
    let disk = open(format, Arc::new(FaultStorage::new(recording.clone(), faults.clone())), true);
    let mut now = contents(&disk);
    let mut states = vec![State { begun: 0, durable: 0, contents: now.clone() }];
    faults.inject(fault);
    for (index, step) in steps.iter().copied().chain([Step::Flush]).enumerate() {
        if index == 2 {
            faults.heal();
        }
        let begun = recording.position();
        let mut wanted = now.clone();
        let result = step.apply(&disk, index, &mut wanted);
        let durable = if result.is_ok() && step.is_durable() { recording.position() } else { usize::MAX };
        states.push(State { begun, durable, contents: wanted });
        // Of what failed any part may be there.
        now = contents(&disk);
        if result.is_err() {
            states.push(State { begun, durable: usize::MAX, contents: now.clone() });
        } else {
            assert!(
                states[states.len() - 1].contents == now,
                "{format:?}: wrong without any crash, after {step:?}"
            );
        }
    }
    (recording, states, faults.failed() > 0)
}

/// Fails each operation of the first two of `steps` in turn, and looks at one of `thin` crash points.
fn replay(what: &str, format: Format, image: &[u8], steps: &[Step], thin: usize) {
    let (mut plays, mut points) = (0, 0);
    for (kind, error, done) in FAILURES {
        for n in 0.. {
            let fault = Fault::on(kind).after(n).with(error).having_done(done);
            let (recording, states, failed) = play(format, image, steps, fault);
            plays += 1;
            let all = recording.crash_points();
            for point in all.skip(n as usize % thin).step_by(thin) {
                points += 1;
                if let Err(why) = verify(format, &states, &point) {
                    panic!("{what}: {kind:?} {n} fails, {error:?} {done:?}: {point:?}: {why}");
                }
            }
            if !failed {
                assert!(n > 1, "{what}: {kind:?}: {n} operations only");
                break;
            }
        }
    }
    // Past the capture of the test runner: the count is part of what is claimed.
    let _ = writeln!(std::io::stderr(), "crash replay with faults, {what}: {points} points of {plays} plays");
    assert!(points >= 100, "{what}: only {points} points");
}

/// An image of which the first `written` bytes were written.
fn filled(format: Format, len: u64, written: usize) -> Vec<u8> {
    let recording = Arc::new(RecordingStorage::with_contents(&image(format, len)));
    let disk = open(format, recording.clone(), true);
    disk.write_at(&vec![0x77; written], 0, WriteFlags::FUA).unwrap();
    drop(disk);
    recording.to_vec()
}

#[test]
fn an_l1_table_that_moves() {
    let image = filled(FORMAT, 100_352, 20_000);
    let steps =
        [Step::Resize(2_200_064), Step::Write(10_000, 30_000), Step::Flush, Step::Write(60_000, 10_000)];
    replay("an L1 table that moves", FORMAT, &image, &steps, 5);
}

#[test]
fn a_disk_that_becomes_shorter() {
    for cluster in [512, 4096] {
        let format = Format { cluster, ..FORMAT };
        let image = filled(format, 100_352, 100_000);
        let steps = [Step::Resize(20_480), Step::Write(1000, 15_000), Step::Flush, Step::Write(3000, 10_000)];
        replay("a disk that becomes shorter", format, &image, &steps, 3);
    }
}

#[test]
fn a_refcount_table_that_moves() {
    let image = filled(FORMAT, 2_029_568 + (80 << 10), 2_029_568);
    let steps = [Step::Write(2_029_568, 2000), Step::Flush, Step::Write(2_040_000, 20_000), Step::Flush];
    replay("a refcount table that moves", FORMAT, &image, &steps, 7);
}

#[test]
fn a_header_that_changes() {
    let format = Format { backed: true, ..FORMAT };
    let image = filled(format, 50_176, 10_000);
    let steps = [Step::Name("another"), Step::Write(5000, 20_000), Step::Flush, Step::Name("base.raw")];
    replay("a header that changes", format, &image, &steps, 1);
}
