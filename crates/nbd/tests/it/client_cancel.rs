//! Calls of one caller that are cancelled, on a connection that others use.

#![allow(clippy::unwrap_used, reason = "in a test a failure is the point")]

use std::io::Read;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use crate::fake::{Export, Fake, Peer};
use blockmirror_block::cancel::CancelSource;
use blockmirror_block::{BlockDevice, ErrorKind, WriteFlags};
use blockmirror_nbd::proto::{Command, Request};

/// Answers `request`: each byte of a read is 7.
fn answer(server: &mut Peer, structured: bool, request: Request) {
    let Request { cookie, offset, .. } = request;
    match (request.command, structured) {
        (Command::Read, true) => server.data(cookie, offset, &[7; 512], true),
        (_, true) => server.ok(cookie),
        (command, false) => {
            server.simple(cookie, None);
            if command == Command::Read {
                server.send(&[7; 512]);
            }
        }
    }
}

/// Cancelling whatever was in flight dropped the connection, with the requests of others and the writes that
/// no flush had covered.
#[test]
fn a_cancelled_call_is_given_up_alone() {
    for structured in [true, false] {
        let (asked, is_asked) = mpsc::channel();
        let (connected, is_connected) = mpsc::channel();
        let fake = Fake::new(move |_, mut peer| {
            if peer.handshake(&Export { structured, ..Export::new() }).is_some() {
                connected.send(Peer { stream: peer.stream.try_clone().unwrap(), extended: false }).unwrap();
                while let Some((request, _)) = peer.request() {
                    let _ = asked.send(request);
                }
            }
        });
        let disk = &fake.options().connections(1).open().unwrap();
        let mut server = is_connected.recv().unwrap();
        let next = || is_asked.recv_timeout(Duration::from_secs(60)).unwrap();
        let mut answer = |request| answer(&mut server, structured, request);
        let job = CancelSource::new();
        thread::scope(|scope| {
            let write = |at| scope.spawn(move || disk.write_at(&[1; 512], at, WriteFlags::NONE));
            let first = write(0);
            answer(next());
            first.join().unwrap().unwrap();
            let calls = [
                scope.spawn(|| {
                    let _calls = job.enter();
                    disk.read_at(&mut [0; 512], 0)
                }),
                scope.spawn(|| {
                    let _calls = job.enter();
                    disk.write_at(&[2; 512], 4096, WriteFlags::NONE)
                }),
            ];
            let given_up = [next(), next()];
            job.cancel();
            for call in calls {
                assert_eq!(call.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
            }
            // The server may still do the write: one to the same bytes is not sent before it has answered,
            // nor is a read, which might be older than the write.
            let same = write(4000);
            let read = scope.spawn(|| {
                let mut seen = [0; 512];
                disk.read_at(&mut seen, 4200).map(|()| seen)
            });
            let other = write(8192);
            let request = next();
            assert_eq!(request.offset, 8192);
            answer(request);
            other.join().unwrap().unwrap();
            given_up.into_iter().for_each(&mut answer);
            let mut waited = [next(), next()];
            waited.sort_by_key(|request| request.offset);
            assert_eq!(waited.map(|request| request.offset), [4000, 4200]);
            waited.into_iter().for_each(&mut answer);
            same.join().unwrap().unwrap();
            assert_eq!(read.join().unwrap().unwrap(), [7; 512]);
            let flush = scope.spawn(|| disk.flush());
            answer(next());
            flush.join().unwrap().unwrap();
        });
        assert!(is_connected.try_recv().is_err(), "it is the connection of before");
    }
}

/// The caller stayed until the server read on, which it may never do, and a job that was cancelled with it.
#[test]
fn a_cancelled_caller_leaves_a_server_that_does_not_take_its_request() {
    // More than any socket holds.
    const WRITE: usize = 16 << 20;
    let (connected, is_connected) = mpsc::channel();
    let fake = Fake::new(move |_, mut peer| {
        if peer.handshake(&Export { size: WRITE as u64, ..Export::new() }).is_some() {
            connected.send(peer).unwrap();
        }
    });
    let disk = fake.options().connections(1).open().unwrap();
    let disk = Arc::new(disk);
    let mut server = is_connected.recv().unwrap();
    let job = CancelSource::new();
    let (left, has_left) = mpsc::channel();
    let (calls, writer) = (job.clone(), Arc::clone(&disk));
    thread::spawn(move || {
        let _calls = calls.enter();
        let data: Vec<u8> = (0..WRITE).map(|at| at as u8 ^ (at >> 8) as u8).collect();
        left.send(writer.write_at(&data, 0, WriteFlags::NONE)).unwrap();
    });
    // Once its header is here, the request is being sent.
    let mut header = [0; Request::COMPACT_LEN];
    server.stream.read_exact(&mut header).unwrap();
    job.cancel();
    let result = has_left.recv_timeout(Duration::from_secs(60)).expect("the caller stays");
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    // The request of another comes behind it, on the connection of before.
    let flush = thread::spawn(move || disk.flush());
    let mut payload = vec![0; WRITE];
    server.stream.read_exact(&mut payload).unwrap();
    assert!((0..WRITE).all(|at| payload[at] == at as u8 ^ (at >> 8) as u8));
    let (request, _) = server.request().unwrap();
    assert_eq!(request.command, Command::Flush);
    server.ok(Request::decode_compact(&header).unwrap().cookie);
    server.ok(request.cookie);
    flush.join().unwrap().unwrap();
    assert!(is_connected.try_recv().is_err(), "it is the connection of before");
}

/// Nothing read the replies to requests that were given up unless another call was in flight: they filled the
/// socket, and the server cut the client off, with what it had written and not flushed.
#[test]
fn replies_to_what_was_given_up_are_received_without_another_call() {
    const READ: usize = 8 << 20;
    let (asked, is_asked) = mpsc::channel();
    let (connected, is_connected) = mpsc::channel();
    let (answered, is_answered) = mpsc::channel();
    let fake = Fake::new(move |_, mut peer| {
        if peer.handshake(&Export { size: READ as u64, ..Export::new() }).is_some() {
            connected.send(Peer { stream: peer.stream.try_clone().unwrap(), extended: false }).unwrap();
            while let Some((request, _)) = peer.request() {
                let _ = asked.send(request);
            }
        }
    });
    let disk = &fake.options().connections(1).open().unwrap();
    let mut server = is_connected.recv().unwrap();
    let job = CancelSource::new();
    let request = thread::scope(|scope| {
        let read = scope.spawn(|| {
            let _calls = job.enter();
            disk.read_at(&mut vec![0; READ], 0)
        });
        let request = is_asked.recv().unwrap();
        job.cancel();
        assert_eq!(read.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
        request
    });
    thread::spawn(move || {
        server.data(request.cookie, 0, &vec![7; READ], true);
        answered.send(server).unwrap();
    });
    let mut server = is_answered.recv_timeout(Duration::from_secs(60)).expect("the client does not read");
    thread::scope(|scope| {
        let flush = scope.spawn(|| disk.flush());
        server.ok(is_asked.recv().unwrap().cookie);
        flush.join().unwrap().unwrap();
    });
}
