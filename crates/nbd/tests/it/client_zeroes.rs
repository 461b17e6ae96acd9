//! Zeroing that takes several requests.

#![allow(clippy::unwrap_used, reason = "in a test a failure is the point")]

use std::sync::Arc;

use crate::fake::{Export, Fake};
use blockmirror_block::sync::Mutex;
use blockmirror_block::{BlockDevice, ByteRange, ZeroFlags};
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
