//! A guest that comes over NBD to a disk that is being mirrored: how requests share threads.

#![allow(clippy::unwrap_used, reason = "in a test a failure is the point")]

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use blockmirror_block::testing::{FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags};
use blockmirror_mirror::{CopyMode, Event, MirrorJob, MirrorOptions, Tap};
use blockmirror_nbd::ClientOptions;
use blockmirror_nbd::server::{Export, Listener, Server, ServerOptions};
use blockmirror_tests::scratch::scratch;

const LEN: u64 = 8 << 20;

/// In write-blocking mode a write waits for a copy of its range. The server's reader does quick writes itself; it waited as
/// well, and with it everything that came over the same connection: 99 of 100 of a guest's writes took three times as long.
#[test]
fn a_write_that_waits_for_a_copy_keeps_nobody_else_waiting() {
    let dir = scratch().unwrap();
    let faults = Faults::new();
    let contents = vec![7; LEN as usize];
    let source = Arc::new(MemoryDisk::with_contents(&contents));
    let target = Arc::new(MemoryDisk::new(LEN));
    let tap = Tap::new(source);

    let server = Server::new(ServerOptions::default()).unwrap();
    server.add(Export::new("disk", Arc::clone(&tap) as _).writable(true)).unwrap();
    server.listen(Listener::unix(dir.path().join("nbd")).unwrap()).unwrap();
    let uri = format!("nbd+unix:///disk?socket={}", dir.path().join("nbd").display());
    let client = ClientOptions::new(uri.parse().unwrap()).writable(true).connections(1).open().unwrap();

    let gate = faults.hold(OpKind::Write, Some(ByteRange::new(0, 4096)));
    let slow = Arc::new(FaultDisk::new(Arc::clone(&target) as _, faults.clone()));
    let options = MirrorOptions::new().copy_mode(CopyMode::WriteBlocking);
    let job = MirrorJob::attach(&tap, slow, options).unwrap();
    gate.wait_held(1);
    assert!(tap.write_would_wait(ByteRange::new(0, 4096)));
    while tap.write_would_wait(ByteRange::new(LEN / 2, LEN)) {
        thread::yield_now();
    }
    thread::scope(|scope| {
        let client = &client;
        let waits = scope.spawn(|| client.write_at(&[1; 4096], 0, WriteFlags::NONE));
        let (tell, told) = mpsc::channel();
        scope.spawn(move || {
            // Until the first one is on its way there is nothing that could stand behind it.
            while tap.writes_under_way() == 0 {
                thread::yield_now();
            }
            for block in 0..100 {
                let at = LEN / 2 + block * 4096;
                client.write_at(&[2; 4096], at, WriteFlags::NONE).unwrap();
                let mut read = [0; 4096];
                client.read_at(&mut read, at).unwrap();
                assert_eq!(read, [2; 4096]);
            }
            tell.send(()).unwrap();
        });
        let others_are_through = told.recv_timeout(Duration::from_secs(20));
        let still_waits = !waits.is_finished();
        gate.open();
        others_are_through.unwrap();
        assert!(still_waits);
        waits.join().unwrap().unwrap();
    });
    while job.control().next_event(None).unwrap() != Event::Ready {}
    job.control().keep_copy().unwrap();
    job.wait().unwrap();
    let copy = target.contents().unwrap();
    assert!(copy[..4096] == [1; 4096] && copy[4096..8192] == [7; 4096]);
    assert!(copy[LEN as usize / 2..][..100 * 4096].iter().all(|&byte| byte == 2));
}
