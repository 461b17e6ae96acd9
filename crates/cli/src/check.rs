//! `blockmirror check`.

use blockmirror_block::{ErrorKind, Visit};
use blockmirror_image::{
    CheckObserver, CheckReport, FileId, Finding, ImageCheck, LockMode, OpenOptions, Repair, check, repair,
};

use crate::args::{CheckArgs, Mend, Output};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::interrupt::Interrupt;
use crate::progress::{Meter, Reading};
use crate::{json, lock_policy};

/// Findings that are printed; of the rest the number is.
const MOST: usize = 50;

pub(crate) fn run(console: &mut Console<'_>, args: &CheckArgs) -> Outcome {
    let lock = match lock_policy::lock(args.lock) {
        LockMode::Exclusive if args.force_share => LockMode::Shared,
        lock => lock,
    };
    let options = OpenOptions::new()
        .format(args.format)
        .part(args.part)
        .lock(lock)
        .claim(!args.force)
        .cache(args.source_cache);
    let what = match args.repair {
        None => None,
        Some(Mend::Leaks) => Some(Repair::Leaks),
        Some(Mend::All) => Some(Repair::All),
    };
    if what.is_some() {
        console.keep_out_of(FileId::of(&args.file));
    }
    let interrupt = Interrupt::watch()?;
    let meter = Meter::new(console, &args.progress, "checked");
    let mut watcher = Watcher { console, meter, interrupt, found: Vec::new(), more: 0 };
    let checked = match what {
        None => check(&args.file, &options, &mut watcher),
        Some(what) => repair(&args.file, &options, what, &mut watcher),
    };
    let Watcher { console, mut meter, interrupt, found, more } = watcher;
    meter.finish(console);
    let stopped = |error: &blockmirror_image::Error| {
        error.device_error().is_some_and(|error| error.kind() == ErrorKind::Cancelled)
    };
    let checked = match checked {
        Err(error) if stopped(&error) => {
            return Err(Failure::failed("check: interrupted").exit(interrupt.exit()));
        }
        checked => checked?,
    };
    let Some(checked) = checked else {
        let message = format_args!("check: {}: a raw image has no metadata to check", args.file.display());
        return Err(Failure::failed(message).exit(Exit::NoChecks));
    };
    let text = match args.output.output {
        Output::Json => json::pretty(&checked.to_json()) + "\n",
        Output::Human if args.progress.quiet && checked.report.is_clean() => String::new(),
        Output::Human => human(&checked, &found, more),
    };
    // What was repaired is, whether or not that can be read.
    if what.is_some() {
        console.report(&text);
    } else {
        console.print(&text)?;
    }
    Ok(exit(&checked.report))
}

/// As `qemu-img check` has it.
fn exit(report: &CheckReport) -> Exit {
    match report {
        report if report.check_errors > 0 => Exit::Failed,
        report if report.corruptions > 0 => Exit::Corrupt,
        report if report.leaks > 0 => Exit::Leaks,
        _ => Exit::Done,
    }
}

/// Keeps the first findings, shows progress, and ends the check at a signal.
struct Watcher<'a, 'c> {
    console: &'a mut Console<'c>,
    meter: Meter,
    interrupt: Interrupt,
    found: Vec<String>,
    /// Findings that were not kept.
    more: u64,
}

impl CheckObserver for Watcher<'_, '_> {
    fn found(&mut self, finding: &Finding, times: u64) {
        if self.found.len() == MOST {
            self.more += times;
        } else {
            let times = if times > 1 { format!(" ({times} times)") } else { String::new() };
            self.found.push(format!("{finding}{times}"));
        }
    }

    fn progress(&mut self, done: u64, total: u64) -> Visit {
        self.meter.show(self.console, &Reading::of_pass(done, total), self.interrupt.progress_wanted());
        if self.interrupt.requested() { Visit::Break(()) } else { Visit::Continue(()) }
    }
}

fn human(checked: &ImageCheck, found: &[String], more: u64) -> String {
    let report = &checked.report;
    let mut lines = found.to_vec();
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    let name = checked.path.display();
    let counted = |figures: [(u64, &str); 3]| {
        let some: Vec<_> =
            figures.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{what}: {n}")).collect();
        some.join(", ")
    };
    let fixed = counted([
        (report.corruptions_fixed, "corruptions"),
        (report.leaks_fixed, "leaked clusters"),
        (0, ""),
    ]);
    if !fixed.is_empty() {
        lines.push(format!("{name}: repaired: {fixed}"));
    }
    let wrong = counted([
        (report.corruptions, "corruptions"),
        (report.leaks, "leaked clusters"),
        (report.check_errors, "unreadable refcounts"),
    ]);
    let wrong = if wrong.is_empty() { "no errors".to_owned() } else { wrong };
    lines.push(format!("{name}: {wrong}"));
    let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 };
    let allocated = report.allocated_clusters;
    lines.push(format!(
        "{name}: {allocated} of {} clusters allocated ({:.2} %), {:.2} % of them fragmented, {:.2} % compressed; \
         the image ends at {}",
        report.total_clusters,
        share(allocated, report.total_clusters),
        share(report.fragmented_clusters, allocated),
        share(report.compressed_clusters, allocated),
        report.image_end_offset
    ));
    lines.iter().map(|line| one_line(line) + "\n").collect()
}
