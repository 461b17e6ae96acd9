//! `blockmirror bench`: the work is that of [`Bench`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use blockmirror_block::size::human_size;
use blockmirror_image::{FileId, LockMode};
use blockmirror_ops::{Bench, BenchError, BenchOutcome};

use crate::args::BenchArgs;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome};
use crate::interrupt::Interrupt;
use crate::lock_policy;

const TICK: Duration = Duration::from_millis(20);

pub(crate) fn run(console: &mut Console<'_>, args: &BenchArgs) -> Outcome {
    if args.write && args.access.force_share {
        return Err(Failure::usage("bench: -U is for reading; it cannot be combined with -w"));
    }
    let bench = bench(args);
    bench.check().map_err(|error| Failure::usage(format_args!("bench: {error}")))?;
    if args.write {
        console.keep_out_of(FileId::of(&args.file));
    }
    let lock = match lock_policy::lock(args.access.lock) {
        LockMode::Exclusive if args.access.force_share => LockMode::Shared,
        lock => lock,
    };
    let image = lock_policy::limited(lock_policy::of_target(&args.access), args.access.limits)
        .lock(lock)
        .format(args.format)
        .node(args.node.clone())
        .cache(args.cache)
        .writable(args.write)
        .claim(args.write && !args.force)
        .policy(lock_policy::policy(&args.file, &args.access)?)
        .open(&args.file)?;
    if args.write {
        console.keep_out_of(image.own_files());
    }
    for note in image.notes() {
        console.note(note);
    }
    let interrupt = Interrupt::watch()?;
    if !args.quiet {
        let text = console.voice.benchmark(args, bench.step_bytes(), plan(args, &bench));
        console.print(&text)?;
    }
    let cancel = AtomicBool::new(false);
    let outcome = thread::scope(|scope| {
        let runner = scope.spawn(|| bench.run(image.device(), &cancel));
        while !runner.is_finished() {
            thread::sleep(TICK);
            cancel.fetch_or(interrupt.requested(), Ordering::Relaxed);
        }
        runner.join()
    });
    let Ok(outcome) = outcome else { return Err(Failure::failed("bench: a thread panicked")) };
    let outcome = outcome.map_err(|error| match error {
        BenchError::Cancelled => Failure::failed("bench: interrupted").exit(interrupt.exit()),
        error => Failure::failed(format_args!("bench: {error}")),
    })?;
    image.close()?;
    if !args.quiet {
        let text = console.voice.benchmarked(outcome.elapsed, result(args, &outcome));
        console.print(&text)?;
    }
    Ok(Exit::Done)
}

fn bench(args: &BenchArgs) -> Bench {
    Bench::new()
        .count(args.count)
        .depth(args.depth)
        .request_bytes(args.buffer_size)
        .offset(args.offset)
        .step(args.step_size)
        .write(args.write.then_some(args.pattern))
        .flush_interval(args.flush_interval, !args.no_drain)
}

fn plan(args: &BenchArgs, bench: &Bench) -> String {
    let what = if args.write { "writes" } else { "reads" };
    let mut text = format!(
        "{} {what} of {} bytes, {} at a time, from offset {} in steps of {}\n",
        args.count,
        args.buffer_size,
        args.depth,
        args.offset,
        bench.step_bytes()
    );
    if args.flush_interval > 0 {
        let drained = if args.no_drain { "without" } else { "after" };
        text += &format!("a flush every {} writes, {drained} waiting for them\n", args.flush_interval);
    }
    text
}

fn result(args: &BenchArgs, outcome: &BenchOutcome) -> String {
    let seconds = outcome.elapsed.as_secs_f64();
    let each_second = f64::from(outcome.requests) / seconds.max(f64::EPSILON);
    format!(
        "done in {seconds:.3} seconds: {each_second:.0} requests and {} a second\n",
        human_size((each_second * f64::from(args.buffer_size)) as u64)
    )
}
