//! `blockmirror snapshot`, and the list of snapshots that `info` shows too.

use std::time::Duration;

use blockmirror_block::ErrorKind;
use blockmirror_block::size::human_size;
use blockmirror_image::{
    Error, FileId, LockMode, NewSnapshot, OpenOptions, Snapshot, SnapshotRef, apply_snapshot,
    create_snapshot, delete_snapshot, snapshots,
};

use crate::args::SnapshotArgs;
use crate::console::Console;
use crate::failure::{Exit, Failure, Outcome, one_line};
use crate::voice::Finished;
use crate::{lock_policy, qemu_words};

pub(crate) fn run(console: &mut Console<'_>, args: &SnapshotArgs) -> Outcome {
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
    let (done, snapshot) = if let Some(name) = &args.create {
        console.keep_out_of(FileId::of(&args.file));
        // No instructions are counted; qemu-img stores a zero.
        let new = NewSnapshot::new(name).icount(0);
        ("created", create_snapshot(&args.file, &options, &new).map_err(|e| failure("create", name, e))?)
    } else if let Some(wanted) = &args.apply {
        console.keep_out_of(FileId::of(&args.file));
        let snapshot = SnapshotRef::IdOrName(wanted.clone());
        let applied = apply_snapshot(&args.file, &options, &snapshot);
        ("applied", applied.map_err(|error| failure("apply", wanted, error))?)
    } else if let Some(name) = &args.delete {
        console.keep_out_of(FileId::of(&args.file));
        let deleted = delete_snapshot(&args.file, &options, &SnapshotRef::Name(name.clone()));
        if let Err(error) = &deleted
            && let Some(why) = qemu_words::leak_of_snapshot(error)
        {
            console.say(&console.voice.not_freed(&why));
        }
        ("deleted", deleted.map_err(|error| failure("delete", name, error))?)
    } else {
        let mut text = String::new();
        list(&snapshots(&args.file, &options)?, &mut |line| {
            text.push_str(&one_line(&line));
            text.push('\n');
        });
        console.print(&text)?;
        return Ok(Exit::Done);
    };
    if !args.quiet {
        let line = format!("{done} snapshot {} ({}) of {}", snapshot.id, snapshot.name, args.file.display());
        let text = console.voice.finished(Finished::Other, one_line(&line) + "\n");
        console.report(&text);
    }
    Ok(Exit::Done)
}

/// `error` of what `verb` was to do with the snapshot `name`.
fn failure(verb: &str, name: &str, error: Error) -> Failure {
    let is_missing = qemu_words::is_missing_snapshot(&error);
    let is_full = error.device_error().is_some_and(|error| error.kind() == ErrorKind::LimitExceeded);
    if let Some(why) = qemu_words::leak_of_snapshot(&error) {
        return Failure::failed(format_args!("{error}; check -r leaks frees them")).in_qemu(format_args!(
            "Could not delete snapshot '{name}': Failed to free the cluster and L1 table: {why}"
        ));
    }
    let why = match (verb, &error) {
        ("delete", Error::NoSnapshots { .. }) => "snapshot not found",
        ("delete", _) if is_missing => "snapshot not found",
        ("apply", Error::NoSnapshots { .. }) => "Block driver does not support snapshots",
        ("apply", _) if is_missing => "Failed to load snapshot: No such file or directory",
        ("create", Error::NoSnapshots { .. }) => "Operation not supported",
        ("create", _) if is_full => "Invalid argument",
        _ => return error.into(),
    };
    Failure::from(error).in_qemu(format_args!("Could not {verb} snapshot '{name}': {why}"))
}

/// The list of snapshots, line by line; nothing if there are none.
pub(crate) fn list(snapshots: &[Snapshot], line: &mut dyn FnMut(String)) {
    if snapshots.is_empty() {
        return;
    }
    line("Snapshot list:".to_owned());
    let row = |[id, tag, size, date, clock, icount]: [&str; 6]| {
        format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}")
    };
    line(row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]));
    for snapshot in snapshots {
        let clock = snapshot.vm_clock;
        let seconds = clock.as_secs();
        line(row([
            &snapshot.id,
            &snapshot.name,
            &human_size(snapshot.vm_state_size),
            &utc(snapshot.date),
            &format!(
                "{:04}:{:02}:{:02}.{:03}",
                seconds / 3600,
                seconds / 60 % 60,
                seconds % 60,
                clock.subsec_millis()
            ),
            &snapshot.icount.map_or_else(String::new, |count| count.to_string()),
        ]));
    }
}

/// Date and time of day in UTC of a time since 1970.
fn utc(since_1970: Duration) -> String {
    let seconds = since_1970.as_secs();
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    // Days are counted from 0000-03-01, so that a leap day is the last of its year. 400 years have 146,097
    // days.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Five months from March on have 153 days.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (era * 400 + year + u64::from(month >= 10), (month + 2) % 12 + 1);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (951_868_799, "2000-02-29 23:59:59"),
            (951_868_800, "2000-03-01 00:00:00"),
            (1_795_391_579, "2026-11-22 23:52:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
            (u64::from(u32::MAX), "2106-02-07 06:28:15"),
        ] {
            assert_eq!(utc(Duration::from_secs(seconds)), text);
        }
    }
}
