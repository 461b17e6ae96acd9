//! Our client on our server: many threads with a model each, and a server that goes and comes back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use blockmirror_block::testing::{MemoryDisk, Rng};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Visit, WriteFlags, ZeroFlags};
use blockmirror_nbd::proto::Errno;
use blockmirror_nbd::server::{Export, Listener, Server, ServerOptions};
use blockmirror_nbd::{Client, ClientOptions, NbdUri};

use crate::fake;

const THREADS: usize = 6;

/// Bytes that one thread has to itself.
const OWN: u64 = 300_000;

fn serve(dir: &Path, disk: &Arc<MemoryDisk>) -> Arc<Server> {
    serve_device(dir, Arc::clone(disk) as _)
}

fn serve_device(dir: &Path, device: Arc<dyn BlockDevice>) -> Arc<Server> {
    let server = Server::new(ServerOptions::default()).unwrap();
    server.add(Export::new("disk", device).writable(true)).unwrap();
    server.listen(Listener::unix(dir.join("socket")).unwrap()).unwrap();
    server
}

fn options(dir: &Path) -> ClientOptions {
    ClientOptions::new(NbdUri::unix(dir.join("socket"), "disk")).writable(true)
}

/// Random operations in the part of thread `t`, each checked against a vector; `done` goes up with each.
fn work(disk: &Client, t: usize, operations: u32, done: &AtomicUsize) {
    let start = t as u64 * OWN;
    let mut model = vec![0; OWN as usize];
    let mut rng = Rng::from_state(t as u64);
    for _ in 0..operations {
        let at = rng.below(OWN);
        let limit = if rng.below(8) == 0 { OWN } else { 9000 };
        let len = 1 + rng.below((OWN - at).min(limit));
        let (range, own) = (ByteRange::at(start + at, len), at as usize..(at + len) as usize);
        match rng.below(5) {
            0 => {
                let bytes = rng.bytes(len as usize);
                disk.write_at(&bytes, range.start(), WriteFlags::NONE).unwrap();
                model[own].copy_from_slice(&bytes);
            }
            1 => {
                disk.write_zeroes(range, ZeroFlags::MAY_UNMAP).unwrap();
                model[own].fill(0);
            }
            2 => {
                let mut at = range.start();
                disk.extents(range, &mut |extent| {
                    assert_eq!(extent.range.start(), at);
                    at = extent.range.end();
                    let own = (extent.range.start() - start) as usize..(at - start) as usize;
                    assert!(!extent.reads_as_zero() || model[own].iter().all(|b| *b == 0));
                    Visit::Continue(())
                })
                .unwrap();
                assert_eq!(at, range.end());
            }
            _ => {
                let mut back = vec![0xcc; len as usize];
                disk.read_at(&mut back, range.start()).unwrap();
                assert!(back == model[own], "thread {t}: {range:?}");
            }
        }
        done.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn many_threads_agree_with_their_models() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(MemoryDisk::new(THREADS as u64 * OWN));
    let server = serve(dir.path(), &disk);
    for connections in [1, 4] {
        disk.write_zeroes(ByteRange::new(0, disk.len()), ZeroFlags::NONE).unwrap();
        let client = options(dir.path()).connections(connections).open().unwrap();
        let done = AtomicUsize::new(0);
        thread::scope(|scope| {
            for t in 0..THREADS {
                let (client, done) = (&client, &done);
                scope.spawn(move || work(client, t, 300, done));
            }
        });
        client.flush().unwrap();
        assert_eq!(done.into_inner(), THREADS * 300);
    }
    server.stop().unwrap();
}

/// The server ends in the middle and another takes its place, several times; no request fails, and no byte is
/// wrong.
#[test]
fn a_server_goes_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(MemoryDisk::new(THREADS as u64 * OWN));
    let mut server = serve(dir.path(), &disk);
    let client = options(dir.path()).reconnect_delay(Duration::from_secs(600)).open().unwrap();
    let done = AtomicUsize::new(0);
    thread::scope(|scope| {
        for t in 0..THREADS {
            let (client, done) = (&client, &done);
            scope.spawn(move || work(client, t, 400, done));
        }
        for life in 1..=3 {
            while done.load(Ordering::SeqCst) < life * THREADS * 80 {
                thread::sleep(Duration::from_millis(1));
            }
            server.stop().unwrap();
            server = serve(dir.path(), &disk);
        }
    });
    assert!(client.flush().is_err(), "what was written before a server ended was not flushed");
    client.flush().unwrap();
    server.stop().unwrap();
}

/// A client on our server, which is a client of a third one that has no space. What that one does with a
/// request of a connection that was lost is not known; in the middle this was forgotten.
#[test]
fn a_write_in_doubt_is_in_doubt_for_the_client_of_our_server() {
    for lost_before in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let full = fake::Fake::new(move |number, mut peer| {
            if peer.handshake(&fake::Export::new()).is_none() {
                return;
            }
            while let Some((request, _)) = peer.request() {
                if lost_before && number == 0 {
                    return;
                }
                peer.error(request.cookie, Errno::NOSPC, true);
            }
        });
        let middle = full.options().connections(1).reconnect_delay(Duration::from_secs(600)).open().unwrap();
        let server = serve_device(dir.path(), Arc::new(middle));
        let client = options(dir.path()).connections(1).open().unwrap();
        let error = client.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap_err();
        let kind = if lost_before { ErrorKind::Io } else { ErrorKind::NoSpace };
        assert_eq!((error.kind(), error.was_refused()), (kind, !lost_before), "{error}");
        drop(client);
        server.stop().unwrap();
    }
}
