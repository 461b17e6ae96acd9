//! Reads that are in flight when another request makes the server hang up.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::net::Shutdown;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use crate::fake::{Export, Fake, Peer};
use blockmirror_block::{BlockDevice, Error};
use blockmirror_nbd::proto::Request;
use blockmirror_nbd::{Client, ClientError};

const READ: usize = 512;

/// A server that hangs up on its first client when `count` reads are in flight, and does as `later` says with
/// each request on other connections, which are numbered from 1.
fn fake(count: usize, later: impl Fn(usize, &mut Peer, Request) + Send + Sync + Clone + 'static) -> Fake {
    Fake::new(move |number, mut peer| {
        if peer.handshake(&Export::new()).is_none() {
            return;
        }
        let mut received = 0;
        while let Some((request, _)) = peer.request() {
            received += 1;
            match number {
                0 if received == count => return hang_up(&peer),
                0 => {}
                _ => later(number, &mut peer, request),
            }
        }
    })
}

fn hang_up(peer: &Peer) {
    let _ = peer.stream.shutdown(Shutdown::Both);
}

fn answer(peer: &mut Peer, request: Request) {
    peer.data(request.cookie, request.offset, &vec![7; request.length as usize], true);
}

/// Reads of `count` blocks from the first on, at the same time.
fn read_all(disk: &Client, count: u64) -> Vec<Result<[u8; READ], Error>> {
    thread::scope(|scope| {
        let read = |block: u64| {
            let mut buf = [0; READ];
            disk.read_at(&mut buf, block * READ as u64).map(|()| buf)
        };
        let reads: Vec<_> = (0..count).map(|block| scope.spawn(move || read(block))).collect();
        reads.into_iter().map(|read| read.join().unwrap()).collect()
    })
}

fn is_lost(error: &Error) -> bool {
    matches!(error.cause().and_then(|cause| cause.downcast_ref()), Some(ClientError::Lost(_)))
}

/// A copy that leaves out failed ranges lost good blocks with bad ones.
#[test]
fn a_read_does_not_fail_because_another_lost_the_connection() {
    const BAD: u64 = 3;
    let fake = fake(8, |_, peer, request| match request.offset / READ as u64 {
        BAD => hang_up(peer),
        _ => answer(peer, request),
    });
    let disk = fake.options().open().unwrap();
    for (block, result) in (0..).zip(read_all(&disk, 8)) {
        match result {
            Ok(data) => assert_eq!((data, block == BAD), ([7; READ], false)),
            Err(error) => assert!(block == BAD && is_lost(&error), "{block}: {error:?}"),
        }
    }
    let mut buf = [0; READ];
    disk.read_at(&mut buf, 0).unwrap();
}

/// There is nothing to find out then.
#[test]
fn a_read_that_was_alone_is_not_repeated() {
    let (sent, received) = mpsc::channel();
    let sent = Arc::new(Mutex::new(sent));
    let fake = fake(1, move |_, peer, request| {
        sent.lock().unwrap().send(request.offset).unwrap();
        answer(peer, request);
    });
    let disk = fake.options().open().unwrap();
    assert!(is_lost(&disk.read_at(&mut [0; READ], 0).unwrap_err()));
    disk.read_at(&mut [0; READ], 4096).unwrap();
    assert_eq!(received.try_iter().collect::<Vec<_>>(), [4096]);
}

#[test]
fn all_fail_if_the_server_does_not_come_back() {
    let fake = Fake::new(|number, mut peer| {
        if number == 0 && peer.handshake(&Export::new()).is_some() {
            while peer.request().is_some_and(|(request, _)| request.offset < 7 * READ as u64) {}
        }
    });
    let disk = fake.options().open().unwrap();
    assert!(read_all(&disk, 8).iter().all(Result::is_err));
}

#[test]
fn a_repetition_that_gets_no_answer_is_cancelled() {
    let (sent, received) = mpsc::channel();
    let over = sent.clone();
    let sent = Arc::new(Mutex::new(sent));
    let fake = fake(2, move |_, _, _| sent.lock().unwrap().send("received").unwrap());
    let disk = fake.options().open().unwrap();
    thread::scope(|scope| {
        let reads = scope.spawn(|| {
            let results = read_all(&disk, 2);
            over.send("over").unwrap();
            results
        });
        assert_eq!(received.recv().unwrap(), "received");
        disk.cancel_in_flight();
        assert!(reads.join().unwrap().iter().all(Result::is_err));
    });
}
