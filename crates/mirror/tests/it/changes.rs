//! Zeroes and discards of holders of tickets: what the target gets.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::Arc;

use blockmirror_block::testing::{MemoryDisk, OpKind};
use blockmirror_block::{ByteRange, ErrorKind, ZeroFlags};
use blockmirror_mirror::{Begin, Change, CopyMode, Event, MirrorJob, MirrorOptions, Tap, WriteTicket};

use crate::tap::{empty, faulty, filled, until};

const RANGE: ByteRange = ByteRange::new(4096, 12_288);

/// The change of the source, as its holder makes it.
fn perform(ticket: &WriteTicket) {
    let source = ticket.source();
    match ticket.change() {
        Change::Zeroes => source.write_zeroes(ticket.range(), ZeroFlags::NONE).unwrap(),
        Change::Discard => source.discard(ticket.range()).unwrap(),
        change => panic!("{change:?}"),
    }
}

#[test]
fn the_target_gets_zeroes_and_what_a_discard_leaves_at_once() {
    for change in [Change::Zeroes, Change::Discard] {
        let (source, target) = (filled(), empty());
        let (watched, faults) = faulty(&target);
        let tap = Tap::new(Arc::clone(&source) as _);
        let options = MirrorOptions::new().copy_mode(CopyMode::WriteBlocking);
        let job = MirrorJob::attach(&tap, watched as _, options).unwrap();
        until(&job, &Event::Ready);
        let discards = faults.seen(OpKind::Discard);
        let ticket = tap.begin_change(change, RANGE).unwrap();
        perform(&ticket);
        let at_target = ticket.repeat_at_target();
        assert!(matches!(at_target, Some(Ok(()))), "{change:?}");
        assert_eq!(target.contents().unwrap(), source.contents().unwrap());
        ticket.complete(Ok(()), at_target).unwrap();
        let progress = job.control().progress();
        assert_eq!((progress.mirrored, progress.dirtied), (RANGE.len(), 0), "nothing is left to the job");
        assert_eq!(
            faults.seen(OpKind::Discard),
            discards,
            "what it reads as then would be the target's choice"
        );
        job.control().complete().unwrap();
        job.wait().unwrap();
    }
}

/// Where nothing mirrors at once, and for data, which the ticket does not have.
#[test]
fn nothing_is_repeated_that_is_the_jobs_or_the_callers() {
    let (source, target) = (filled(), empty());
    let tap = Tap::new(Arc::clone(&source) as _);
    let Begin::Go(ticket) = tap.try_begin_change(Change::Zeroes, RANGE).unwrap() else { panic!() };
    assert!(ticket.repeat_at_target().is_none(), "there is no job");
    perform(&ticket);
    ticket.complete(Ok(()), None).unwrap();
    let job = MirrorJob::attach(&tap, Arc::clone(&target) as _, MirrorOptions::new()).unwrap();
    until(&job, &Event::Ready);
    let ticket = tap.begin_change(Change::Discard, RANGE).unwrap();
    perform(&ticket);
    assert!(ticket.repeat_at_target().is_none(), "the job copies it later");
    ticket.complete(Ok(()), None).unwrap();
    job.control().change(CopyMode::WriteBlocking).unwrap();
    let ticket = tap.begin_write(RANGE).unwrap();
    assert!(ticket.target().is_some() && ticket.repeat_at_target().is_none(), "it has no bytes");
    drop(ticket);
    job.control().complete().unwrap();
    job.wait().unwrap();
    assert_eq!(target.contents().unwrap(), source.contents().unwrap());
}

#[test]
fn errors_name_the_change() {
    let tap = Tap::new(Arc::new(MemoryDisk::new(4096)));
    for (change, name) in [(Change::Data, "write"), (Change::Zeroes, "write"), (Change::Discard, "discard")] {
        let error = tap.begin_change(change, RANGE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfBounds);
        assert!(error.to_string().contains(name), "{error}");
    }
}
