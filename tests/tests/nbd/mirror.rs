//! A guest that comes over NBD to a disk that is being mirrored: how requests share threads.

#![allow(clippy::unwrap_used, reason = "in a test a failure is the point")]

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use blockmirror_block::testing::{FaultDisk, Faults, Gate, MemoryDisk, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, Result, WriteFlags, ZeroFlags};
use blockmirror_mirror::{CopyMode, Event, MirrorJob, MirrorOptions, Tap};
use blockmirror_nbd::server::{Export, Listener, Server, ServerOptions};
use blockmirror_nbd::{Client, ClientOptions};
use blockmirror_testing::scratch::scratch;
use tempfile::TempDir;

const LEN: u64 = 8 << 20;
/// Only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(20);

/// A disk whose copy does not get past its first block, exported.
struct Stuck {
    tap: Arc<Tap>,
    target: Arc<MemoryDisk>,
    gate: Gate,
    job: MirrorJob,
    uri: String,
    _server: Arc<Server>,
    _dir: TempDir,
}

impl Stuck {
    fn new() -> Self {
        let dir = scratch().unwrap();
        let faults = Faults::new();
        let target = Arc::new(MemoryDisk::new(LEN));
        let tap = Tap::new(Arc::new(MemoryDisk::with_contents(&vec![7; LEN as usize])));
        let server = Server::new(ServerOptions::default()).unwrap();
        server.add(Export::new("disk", Arc::clone(&tap) as _).writable(true)).unwrap();
        server.listen(Listener::unix(dir.path().join("nbd")).unwrap()).unwrap();
        let uri = format!("nbd+unix:///disk?socket={}", dir.path().join("nbd").display());
        let gate = faults.hold(OpKind::Write, Some(ByteRange::new(0, 4096)));
        let slow = Arc::new(FaultDisk::new(Arc::clone(&target) as _, faults));
        let options = MirrorOptions::new().copy_mode(CopyMode::WriteBlocking);
        let job = MirrorJob::attach(&tap, slow, options).unwrap();
        gate.wait_held(1);
        assert!(tap.write_would_wait(ByteRange::new(0, 4096)));
        while tap.write_would_wait(ByteRange::new(LEN / 2, LEN)) {
            thread::yield_now();
        }
        Self { tap, target, gate, job, uri, _server: server, _dir: dir }
    }

    /// A client with one connection.
    fn client(&self) -> Client {
        ClientOptions::new(self.uri.parse().unwrap()).writable(true).connections(1).open().unwrap()
    }

    fn until_writes_are_under_way(&self, count: usize) {
        while self.tap.writes_under_way() < count {
            thread::yield_now();
        }
    }

    /// Ends the job, and returns what the target holds.
    fn finish(self) -> Vec<u8> {
        while self.job.control().next_event(None).unwrap() != Event::Ready {}
        self.job.control().keep_copy().unwrap();
        self.job.wait().unwrap();
        self.target.contents().unwrap()
    }
}

/// In write-blocking mode a write waits for a copy of its range. The server's reader does quick writes
/// itself; it waited as well, and with it everything that came over the same connection: 99 of 100 of a
/// guest's writes took three times as long.
#[test]
fn a_write_that_waits_for_a_copy_keeps_nobody_else_waiting() {
    let first = ByteRange::new(0, 4096);
    keeps_nobody_waiting(|client| client.write_at(&[0; 4096], 0, WriteFlags::NONE));
    keeps_nobody_waiting(|client| client.write_zeroes(first, ZeroFlags::MAY_UNMAP));
    keeps_nobody_waiting(|client| client.discard(first));
}

/// With a `write` of zeros to the first block, in whatever way.
fn keeps_nobody_waiting(write: impl Fn(&Client) -> Result<()> + Sync) {
    let stuck = Stuck::new();
    let client = stuck.client();
    thread::scope(|scope| {
        let (client, stuck, write) = (&client, &stuck, &write);
        let waits = scope.spawn(|| write(client));
        let (tell, through) = mpsc::channel();
        scope.spawn(move || {
            // Until the first one is on its way there is nothing that could stand behind it.
            stuck.until_writes_are_under_way(1);
            for block in 0..100 {
                let at = LEN / 2 + block * 4096;
                client.write_at(&[2; 4096], at, WriteFlags::NONE).unwrap();
                let mut read = [0; 4096];
                client.read_at(&mut read, at).unwrap();
                assert_eq!(read, [2; 4096]);
            }
            tell.send(()).unwrap();
        });
        let others_are_through = through.recv_timeout(PATIENCE);
        let still_waits = !waits.is_finished();
        stuck.gate.open();
        others_are_through.unwrap();
        assert!(still_waits);
        waits.join().unwrap().unwrap();
    });
    let copy = stuck.finish();
    assert!(copy[..4096] == [0; 4096] && copy[4096..8192] == [7; 4096]);
    assert!(copy[LEN as usize / 2..][..100 * 4096].iter().all(|&byte| byte == 2));
}

/// However many wait: an export has 32 threads, and there is one more write than that.
#[test]
fn writes_that_wait_leave_threads_to_other_connections() {
    let stuck = Stuck::new();
    let (many, other) = (stuck.client(), stuck.client());
    thread::scope(|scope| {
        let (many, other) = (&many, &other);
        for block in 0..33 {
            scope.spawn(move || many.write_at(&[1; 4096], block * 4096, WriteFlags::NONE).unwrap());
        }
        stuck.until_writes_are_under_way(16);
        let (tell, through) = mpsc::channel();
        scope.spawn(move || {
            // As many threads as will wait do so by now or soon.
            for _ in 0..1000 {
                other.read_at(&mut [0; 4096], LEN / 2).unwrap();
            }
            other.flush().unwrap();
            tell.send(()).unwrap();
        });
        let other_is_through = through.recv_timeout(PATIENCE);
        let under_way = stuck.tap.writes_under_way();
        stuck.gate.open();
        other_is_through.unwrap();
        assert!((16..32).contains(&under_way), "{under_way}");
    });
    assert!(stuck.finish()[..33 * 4096].iter().all(|&byte| byte == 1));
}
