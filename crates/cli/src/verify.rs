//! How `mirror` and `convert` finish a copy that is verified, and what they say of one that is not equal.

use blockmirror_block::{ByteRange, Visit};
use blockmirror_image::Kept;
use blockmirror_ops::{ConvertError, ConvertJob, ConvertOutcome, Mismatch, Verify};

use crate::args::{CopyArgs, VerifyMode};
use crate::console::Console;
use crate::failure::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::meter::Meter;
use crate::progress::{Phase, Reading};
use crate::ranges::RangesFile;

/// Ranges that are listed; a program reads all of them elsewhere.
const MOST_LISTED: usize = 16;

/// The mode for the library.
pub(crate) fn mode(args: &CopyArgs) -> Option<Verify> {
    args.verify.verify.map(|mode| match mode {
        VerifyMode::Readback => Verify::Readback,
        VerifyMode::Hash => Verify::Hash,
        VerifyMode::Full => Verify::Full,
    })
}

/// Finishes `job`, and shows how far the verification is, if there is one.
pub(crate) fn finish(
    console: &mut Console<'_>,
    args: &CopyArgs,
    job: ConvertJob,
    interrupt: &Interrupt,
) -> Result<ConvertOutcome, ConvertError> {
    if !job.verifies() {
        return job.finish();
    }
    let len = job.disk_len();
    let mut meter = Meter::new(console, &args.progress, Phase::Verify);
    let finished = job.finish_with(&mut |done| {
        meter.show(console, &Reading::of_pass(done, len), interrupt.progress_wanted());
        if interrupt.requested() { Visit::Break(()) } else { Visit::Continue(()) }
    });
    meter.finish(console);
    finished
}

/// Lists where the target differs from the source, and writes all of it to `file`. A signal does not remove
/// the copy from now on.
pub(crate) fn failed(
    console: &mut Console<'_>,
    mismatch: &Mismatch,
    file: Option<RangesFile>,
    interrupt: &Interrupt,
) -> Failure {
    if let Kept::Partial(paths) = &mismatch.kept {
        interrupt.keep(paths);
    }
    let target = mismatch.target.display();
    let mut runs = mismatch.ranges.runs();
    for run in runs.by_ref().take(MOST_LISTED) {
        console.complain(format_args!("differing range: {target}: bytes {} to {}", run.start, run.end));
    }
    let more = runs.count();
    if more > 0 {
        console.complain(format_args!("differing range: {target}: {more} more"));
    }
    if let Some(mut file) = file {
        mismatch.ranges.runs().for_each(|run| file.push(ByteRange::new(run.start, run.end)));
        if let Err(Failure { message: Some(message), .. }) = file.finish() {
            console.complain(message);
        }
    }
    Failure::failed(mismatch).exit(Exit::Mismatch)
}
