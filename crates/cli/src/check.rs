//! `blockmirror check`.

use blockmirror_block::{ErrorKind, Visit};
use blockmirror_image::{
    CheckObserver, CheckReport, FileId, Finding, LockMode, Mending, OpenOptions, Repair, Severity, check,
    repair,
};

use crate::args::{CheckArgs, Mend, Output};
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::meter::Meter;
use crate::progress::{Phase, Reading};
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
        .node(args.node.clone())
        .lock(lock)
        .claim(!args.force)
        .cache(args.source_cache);
    let options = lock_policy::limited(options, args.limits);
    let what = match args.repair {
        None => None,
        Some(Mend::Leaks) => Some(Repair::Leaks),
        Some(Mend::All) => Some(Repair::All),
    };
    if what.is_some() {
        console.keep_out_of(FileId::of(&args.file));
    }
    let interrupt = Interrupt::watch()?;
    let meter = Meter::new(console, &args.progress, Phase::Check);
    let (mend, has_others) = (args.repair, false);
    let mut watcher = Watcher { console, meter, interrupt, mend, has_others, found: Vec::new(), more: 0 };
    let checked = match what {
        None => check(&args.file, &options, &mut watcher),
        Some(what) => repair(&args.file, &options, what, &mut watcher),
    };
    let Watcher { console, mut meter, interrupt, found, more, .. } = watcher;
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
        return Err(console.voice.nothing_to_check(&args.file).exit(Exit::NoChecks));
    };
    let text = match args.output.output {
        Output::Json => json::pretty(&checked.to_json()) + "\n",
        Output::Human if args.progress.quiet && checked.report.is_clean() => String::new(),
        Output::Human => console.voice.checked(&checked, &found, more),
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
    mend: Option<Mend>,
    /// Something was found but leaks and COPIED flags.
    has_others: bool,
    found: Vec<String>,
    /// Findings that were not kept.
    more: u64,
}

impl CheckObserver for Watcher<'_, '_> {
    fn found(&mut self, finding: &Finding, times: u64) {
        let is_flag = matches!(finding, Finding::CopiedWrong { .. });
        self.has_others |= !is_flag && finding.severity() != Severity::Leak;
        // Where nothing else is wrong a repair of leaks sets flags right, too.
        let mend = match self.mend {
            Some(Mend::Leaks) if is_flag && !self.has_others => Some(Mend::All),
            mend => mend,
        };
        if let Some(text) = self.console.voice.finding(finding, times, mend) {
            self.console.say(&text);
        } else if self.found.len() == MOST {
            self.more += times;
        } else {
            let times = if times > 1 { format!(" ({times} times)") } else { String::new() };
            self.found.push(format!("{finding}{times}"));
        }
    }

    fn mending(&mut self, mending: &Mending) {
        if let Some(text) = self.console.voice.mending(mending) {
            self.console.say(&text);
        }
    }

    fn progress(&mut self, done: u64, total: u64) -> Visit {
        self.meter.show(self.console, &Reading::of_pass(done, total), self.interrupt.progress_wanted());
        if self.interrupt.requested() { Visit::Break(()) } else { Visit::Continue(()) }
    }
}
