//! Calls of one caller that are cancelled, on a connection that others use.

#![allow(clippy::unwrap_used, reason = "in a test a failure is the point")]

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::fake::{Export, Fake, Peer};
use blockmirror_block::cancel::CancelSource;
use blockmirror_block::{BlockDevice, ErrorKind, WriteFlags};
use blockmirror_nbd::proto::Command;

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
        let ok = |server: &mut Peer, cookie| {
            if structured { server.ok(cookie) } else { server.simple(cookie, None) }
        };
        let job = CancelSource::new();
        thread::scope(|scope| {
            let write = |at| scope.spawn(move || disk.write_at(&[1; 512], at, WriteFlags::NONE));
            let first = write(0);
            ok(&mut server, next().cookie);
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
            // The server may still do the write: one to the same bytes is not sent before it has answered.
            let same = write(4000);
            let other = write(8192);
            let request = next();
            assert_eq!(request.offset, 8192);
            ok(&mut server, request.cookie);
            other.join().unwrap().unwrap();
            for request in given_up {
                match request.command {
                    Command::Read if structured => server.data(request.cookie, 0, &[7; 512], true),
                    Command::Read => {
                        server.simple(request.cookie, None);
                        server.send(&[7; 512]);
                    }
                    _ => ok(&mut server, request.cookie),
                }
            }
            let request = next();
            assert_eq!(request.offset, 4000);
            ok(&mut server, request.cookie);
            same.join().unwrap().unwrap();
            let flush = scope.spawn(|| disk.flush());
            ok(&mut server, next().cookie);
            flush.join().unwrap().unwrap();
        });
        assert!(is_connected.try_recv().is_err(), "it is the connection of before");
    }
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
