//! Zeroing and trimming that the server refuses at first, later, or once.

#![allow(clippy::unwrap_used, reason = "in a test a failure is the point")]

use std::sync::Arc;

use crate::fake::{Export, Fake};
use blockmirror_block::sync::Mutex;
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, ZeroFlags};
use blockmirror_nbd::proto::{Command, CommandFlags, Errno, TransmissionFlags};

/// A request of several pieces of which the server refused a later one failed as if nothing had been written.
#[test]
fn zeroing_that_is_quick_at_first_only_is_done_to_its_end() {
    let flags =
        Export::new().flags | TransmissionFlags::SEND_WRITE_ZEROES | TransmissionFlags::SEND_FAST_ZERO;
    let export = Export { flags, blocks: Some((1, 1 << 18)), ..Export::new() };
    let zeroed = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&zeroed);
    let fake = Fake::serving(export, move |peer, request, _| {
        if request.flags.contains(CommandFlags::FAST_ZERO) && request.offset >= 1 << 18 {
            return peer.error(request.cookie, Errno::NOTSUP, true);
        }
        if request.command == Command::WriteZeroes {
            seen.lock().push(request.offset);
        }
        peer.ok(request.cookie);
    });
    let disk = fake.options().open().unwrap();
    disk.write_zeroes(ByteRange::new(0, 1 << 20), ZeroFlags::NO_FALLBACK).unwrap();
    assert_eq!(*zeroed.lock(), [0, 1 << 18, 2 << 18, 3 << 18]);
}

/// Servers answer EINVAL for a timeout of their backend, too. The client wrote zero bytes in place of such a
/// zeroing, and took such a trim for advice that is not taken; behind the server they came after what was
/// written there next.
#[test]
fn a_request_that_the_server_has_done_before_fails_if_it_is_refused() {
    let flags = Export::new().flags | TransmissionFlags::SEND_WRITE_ZEROES | TransmissionFlags::SEND_TRIM;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let fake = Fake::serving(Export { flags, ..Export::new() }, move |peer, request, _| {
        log.lock().push((request.command, request.offset));
        match request.offset {
            0 => peer.ok(request.cookie),
            _ => peer.error(request.cookie, Errno::INVAL, true),
        }
    });
    let disk = fake.options().open().unwrap();
    let (first, later) = (ByteRange::at(0, 4096), ByteRange::at(8192, 4096));
    disk.write_zeroes(first, ZeroFlags::NONE).unwrap();
    disk.discard(first).unwrap();
    for _ in 0..2 {
        for failed in [disk.write_zeroes(later, ZeroFlags::NONE), disk.discard(later)] {
            let error = failed.unwrap_err();
            assert_eq!((error.kind(), error.was_refused()), (ErrorKind::InvalidInput, false));
        }
    }
    let later = [(Command::WriteZeroes, 8192), (Command::Trim, 8192)];
    let expected = [(Command::WriteZeroes, 0), (Command::Trim, 0)].into_iter().chain(later).chain(later);
    assert_eq!(*seen.lock(), expected.collect::<Vec<_>>());
}
