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
use blockmirror_block::cancel::CancelSource;
use blockmirror_block::{BlockDevice, Error, ErrorKind};
use blockmirror_nbd::proto::{Request, TransmissionFlags};
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

/// The request that was given up may be the one that the server did not like.
#[test]
fn a_read_was_not_alone_beside_one_that_was_given_up() {
    let (sent, received) = mpsc::channel();
    let fake = Fake::new(move |number, mut peer| {
        if peer.handshake(&Export::new()).is_none() {
            return;
        }
        while let Some((request, _)) = peer.request() {
            match (number, request.offset) {
                (0, 0) => return hang_up(&peer),
                (0, _) => sent.send(()).unwrap(),
                _ => answer(&mut peer, request),
            }
        }
    });
    let disk = &fake.options().connections(1).open().unwrap();
    let job = CancelSource::new();
    thread::scope(|scope| {
        let given_up = scope.spawn(|| {
            let _calls = job.enter();
            disk.read_at(&mut [0; READ], 4096)
        });
        received.recv().unwrap();
        job.cancel();
        assert_eq!(given_up.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    });
    let mut buf = [0; READ];
    disk.read_at(&mut buf, 0).unwrap();
    assert_eq!(buf, [7; READ]);
}

/// Of two reads that were lost together one is repeated, and given up; the other is not to blame if the
/// server hangs up then.
#[test]
fn a_repeated_read_is_not_blamed_for_one_that_was_given_up() {
    let (sent, received) = mpsc::channel();
    let sent = Arc::new(Mutex::new(sent));
    let given_up = Arc::new(Mutex::new(false));
    let fake = fake(2, move |number, peer, request| match number {
        1 if std::mem::replace(&mut *given_up.lock().unwrap(), true) => hang_up(peer),
        1 => sent.lock().unwrap().send(request.offset as usize / READ).unwrap(),
        _ => answer(peer, request),
    });
    let disk = &fake.options().connections(1).open().unwrap();
    let jobs = [CancelSource::new(), CancelSource::new()];
    thread::scope(|scope| {
        let read = |block: usize| {
            let _calls = jobs[block].enter();
            disk.read_at(&mut [0; READ], (block * READ) as u64)
        };
        let reads = [0, 1].map(|block| scope.spawn(move || read(block)));
        let first = received.recv().unwrap();
        jobs[first].cancel();
        for (block, read) in reads.into_iter().enumerate() {
            let kind = read.join().unwrap().map_err(|error| error.kind());
            assert_eq!(kind, if block == first { Err(ErrorKind::Cancelled) } else { Ok(()) }, "{block}");
        }
    });
}

/// The client asks the first connection for a block before it uses a second.
#[test]
fn a_read_is_not_blamed_for_what_a_further_connection_is_tried_with() {
    let (sent, received) = mpsc::channel();
    let fake = Fake::new(move |number, mut peer| {
        let mut export = Export::new();
        export.flags = export.flags | TransmissionFlags::CAN_MULTI_CONN;
        if peer.handshake(&export).is_none() {
            return;
        }
        let mut first = None;
        while let Some((request, _)) = peer.request() {
            match (number, request.length as usize, first.take()) {
                (0, READ, None) => first = Some(request),
                (0, READ, Some(first)) => [first, request].into_iter().for_each(|r| answer(&mut peer, r)),
                (0, ..) => {
                    hang_up(&peer);
                    return sent.send(()).unwrap();
                }
                _ => answer(&mut peer, request),
            }
        }
    });
    let disk = fake.options().connections(2).open().unwrap();
    assert!(read_all(&disk, 2).iter().all(Result::is_ok));
    received.recv().unwrap();
    disk.read_at(&mut [0; READ], 0).unwrap();
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
