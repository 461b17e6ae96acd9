//! Connections that are lost: what is waited for, what is done again, and which flush has to fail.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::io::Write;
use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use crate::fake::{BASE, Export, Fake, Peer};
use blockmirror_block::cancel::CancelSource;
use blockmirror_block::{BlockDevice, ByteRange, Error, ErrorKind, Storage, Visit, WriteFlags, ZeroFlags};
use blockmirror_nbd::proto::{Chunk, Command, Errno, TransmissionFlags};
use blockmirror_nbd::{ClientError, ClientStorage};

/// Far longer than any test takes.
const LONG: Duration = Duration::from_secs(600);

fn cause(error: &Error) -> &ClientError {
    error.cause().unwrap_or_else(|| panic!("{error:?}")).downcast_ref().unwrap()
}

type Disk = Arc<Mutex<Vec<u8>>>;

/// Serves `disk` until `fuel` requests were answered, over all connections; then hangs up at each request
/// until there is more.
fn serve(peer: &mut Peer, disk: &Disk, fuel: &AtomicU64) {
    while let Some((request, payload)) = peer.request() {
        if fuel.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err() {
            let _ = peer.stream.shutdown(Shutdown::Both);
            return;
        }
        let range = request.offset as usize..(request.offset + request.length) as usize;
        let mut disk = disk.lock().unwrap();
        match request.command {
            Command::Read => peer.data(request.cookie, request.offset, &disk[range], true),
            Command::BlockStatus => {
                let mut payload = BASE.to_be_bytes().to_vec();
                payload.extend_from_slice(&u32::try_from(request.length).unwrap().to_be_bytes());
                payload.extend_from_slice(&[0; 4]);
                peer.chunk(request.cookie, Chunk::BlockStatus, true, &payload);
            }
            command => {
                match command {
                    Command::Write => disk[range].copy_from_slice(&payload),
                    Command::WriteZeroes => disk[range].fill(0),
                    _ => {}
                }
                peer.ok(request.cookie);
            }
        }
    }
}

struct Served {
    fake: Fake,
    disk: Disk,
    fuel: Arc<AtomicU64>,
    connections: Arc<AtomicUsize>,
}

/// An honest server with `export(number)` for each connection.
fn served(fuel: u64, export: impl Fn(usize) -> Export + Send + Sync + Clone + 'static) -> Served {
    let size = export(0).size as usize;
    let (disk, fuel) = (Disk::new(Mutex::new(vec![0; size])), Arc::new(AtomicU64::new(fuel)));
    let connections = Arc::new(AtomicUsize::new(0));
    let (theirs, gauge, counter) = (Arc::clone(&disk), Arc::clone(&fuel), Arc::clone(&connections));
    let fake = Fake::new(move |number, mut peer| {
        counter.fetch_add(1, Ordering::SeqCst);
        if peer.handshake(&export(number)).is_some() {
            serve(&mut peer, &theirs, &gauge);
        }
    });
    Served { fake, disk, fuel, connections }
}

#[test]
fn without_a_delay_what_was_under_way_fails_and_the_next_request_reconnects() {
    let served = served(1, |_| Export::new());
    let disk = served.fake.options().open().unwrap();
    disk.write_at(&[1; 8], 0, WriteFlags::NONE).unwrap();
    let error = disk.write_at(&[2; 8], 0, WriteFlags::NONE).unwrap_err();
    assert!(matches!(cause(&error), ClientError::Lost(_)), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::Io);
    served.fuel.store(u64::MAX, Ordering::SeqCst);
    disk.write_at(&[3; 8], 0, WriteFlags::NONE).unwrap();
    assert_eq!(served.disk.lock().unwrap()[..8], [3; 8]);
    assert_eq!(served.connections.load(Ordering::SeqCst), 2);
}

#[test]
fn with_a_delay_every_kind_of_request_is_done_again() {
    let flags = Export::new().flags | TransmissionFlags::SEND_WRITE_ZEROES | TransmissionFlags::SEND_TRIM;
    let export = Export { flags, ..Export::new() };
    let served = served(0, move |_| export);
    let disk = Arc::new(served.fake.options().reconnect_delay(LONG).open().unwrap());
    // Each is hung up on at first; another thread gives the server its fuel back meanwhile.
    let again = |what: &dyn Fn()| {
        served.fuel.store(0, Ordering::SeqCst);
        let before = served.connections.load(Ordering::SeqCst);
        thread::scope(|scope| {
            scope.spawn(|| {
                while served.connections.load(Ordering::SeqCst) < before + 2 {
                    thread::yield_now();
                }
                served.fuel.store(u64::MAX, Ordering::SeqCst);
            });
            what();
        });
        assert!(served.connections.load(Ordering::SeqCst) >= before + 2);
    };
    again(&|| disk.write_at(&[7; 1000], 10, WriteFlags::FUA).unwrap());
    again(&|| {
        let mut buf = [0; 1000];
        disk.read_at(&mut buf, 10).unwrap();
        assert_eq!(buf, [7; 1000]);
    });
    again(&|| disk.write_zeroes(ByteRange::at(10, 500), ZeroFlags::FUA).unwrap());
    again(&|| disk.discard(ByteRange::at(0, 4096)).unwrap());
    again(&|| disk.extents(ByteRange::at(0, 4096), &mut |_| Visit::Continue(())).unwrap());
    // The discard was not flushed, so a flush has to fail; the next one is done.
    assert!(disk.flush().is_err());
    again(&|| disk.flush().unwrap());
    let disk = served.disk.lock().unwrap();
    assert!(disk[10..510] == [0; 500] && disk[510..1010] == [7; 500]);
}

/// A server of ours that was stopped answered what was under way like this, and the request failed though the
/// next server was about to come.
#[test]
fn a_server_that_says_it_is_going_down_is_as_good_as_gone() {
    let fake = Fake::new(move |number, mut peer| {
        if peer.handshake(&Export::new()).is_some() {
            while let Some((request, _)) = peer.request() {
                if number == 0 {
                    peer.error(request.cookie, Errno::SHUTDOWN, true);
                } else {
                    peer.ok(request.cookie);
                }
            }
        }
    });
    let disk = fake.options().reconnect_delay(LONG).open().unwrap();
    disk.write_at(&[1; 8], 0, WriteFlags::NONE).unwrap();
}

#[test]
fn one_flush_fails_after_unflushed_writes_went_with_the_connection() {
    let served = served(u64::MAX, |_| Export::new());
    let disk = served.fake.options().reconnect_delay(LONG).open().unwrap();
    let lose = || {
        served.fuel.store(0, Ordering::SeqCst);
        thread::scope(|scope| {
            let before = served.connections.load(Ordering::SeqCst);
            scope.spawn(|| disk.read_at(&mut [0; 8], 0).unwrap());
            while served.connections.load(Ordering::SeqCst) == before {
                thread::yield_now();
            }
            served.fuel.store(u64::MAX, Ordering::SeqCst);
        });
    };
    // Flushed, durable by itself, or nothing at all: nothing is lost.
    disk.write_at(&[1; 8], 0, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    lose();
    disk.flush().unwrap();
    disk.write_at(&[1; 8], 0, WriteFlags::FUA).unwrap();
    lose();
    disk.flush().unwrap();
    // Not flushed: one flush says so.
    disk.write_at(&[2; 8], 0, WriteFlags::NONE).unwrap();
    lose();
    let error = disk.flush().unwrap_err();
    assert!(matches!(cause(&error), ClientError::UnflushedLost), "{error:?}");
    disk.flush().unwrap();
}

#[test]
fn a_flush_that_loses_the_connection_itself_does_not_vouch_for_what_was_before() {
    let served = served(1, |_| Export::new());
    let disk = served.fake.options().reconnect_delay(LONG).open().unwrap();
    disk.write_at(&[2; 8], 0, WriteFlags::NONE).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            while served.connections.load(Ordering::SeqCst) < 2 {
                thread::yield_now();
            }
            served.fuel.store(u64::MAX, Ordering::SeqCst);
        });
        let error = disk.flush().unwrap_err();
        assert!(matches!(cause(&error), ClientError::UnflushedLost), "{error:?}");
    });
    disk.flush().unwrap();
}

#[test]
fn a_storage_does_not_believe_in_flushes_after_a_failed_one() {
    let served = served(1, |_| Export::new());
    let client = Arc::new(served.fake.options().open().unwrap());
    let storage = ClientStorage::new(Arc::clone(&client));
    storage.write_at(&[1; 8], 0).unwrap();
    assert!(storage.flush().is_err());
    served.fuel.store(u64::MAX, Ordering::SeqCst);
    assert_eq!(storage.flush().unwrap_err().kind(), ErrorKind::Poisoned);
    let plain = ClientStorage::plain(client);
    assert!(plain.flush().is_err(), "the writes are lost to the device, too");
    plain.flush().unwrap();
}

#[test]
fn a_storage_does_not_grow() {
    let served = served(u64::MAX, |_| Export::new());
    let storage = ClientStorage::new(Arc::new(served.fake.options().open().unwrap()));
    let len = storage.len().unwrap();
    storage.write_at(&[1; 8], len - 8).unwrap();
    assert_eq!(storage.write_at(&[1; 8], len - 7).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(storage.set_len(len + 1).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(storage.set_len(len - 1).unwrap_err().kind(), ErrorKind::Unsupported);
    storage.set_len(len).unwrap();
    let mut buf = [9; 16];
    storage.read_at(&mut buf, len - 8).unwrap();
    assert_eq!(buf, [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    storage.read_at(&mut buf, u64::MAX).unwrap();
    assert_eq!(buf, [0; 16]);
}

#[test]
fn another_export_after_reconnecting_is_an_error_until_the_old_one_is_back() {
    let other = |change: fn(&mut Export)| {
        let served = served(0, move |number| {
            let mut export = Export::new();
            if number == 1 {
                change(&mut export);
            }
            export
        });
        let disk = served.fake.options().reconnect_delay(LONG).open().unwrap();
        let error = disk.read_at(&mut [0; 8], 0).unwrap_err();
        assert!(matches!(cause(&error), ClientError::Changed(_)), "{error:?}");
        served.fuel.store(u64::MAX, Ordering::SeqCst);
        disk.read_at(&mut [0; 8], 0).unwrap();
        error.to_string()
    };
    assert!(other(|e| e.size = 512).contains("has 512 bytes and no longer 1048576"));
    assert!(other(|e| e.flags = e.flags | TransmissionFlags::READ_ONLY).contains("is read-only"));
    assert!(other(|e| e.blocks = Some((512, 4096))).contains("has blocks of 512 bytes"));
    assert!(other(|e| e.flags = TransmissionFlags::HAS_FLAGS).contains("can no longer do"));
    assert!(other(|e| e.structured = false).contains("smaller protocol"));
}

#[test]
fn blocked_calls_are_let_go() {
    let (asked, wait) = mpsc::channel();
    let (gone, fresh) = (Arc::new(AtomicUsize::new(0)), Disk::new(Mutex::new(vec![0; 1 << 20])));
    let dead = Arc::clone(&gone);
    let fake = Fake::new(move |_, mut peer| {
        if peer.handshake(&Export::new()).is_none() {
            return;
        }
        // Dead: it takes requests and never answers. Later ones live.
        if dead.load(Ordering::SeqCst) == 0 {
            while peer.request().is_some() {
                let _ = asked.send(());
            }
        }
        serve(&mut peer, &fresh, &AtomicU64::new(u64::MAX));
    });
    let disk = fake.options().reconnect_delay(LONG).open().unwrap();
    thread::scope(|scope| {
        let calls = [
            scope.spawn(|| disk.read_at(&mut [0; 512], 0)),
            scope.spawn(|| disk.write_at(&[0; 512], 4096, WriteFlags::NONE)),
            scope.spawn(|| disk.flush()),
        ];
        for _ in 0..3 {
            wait.recv().unwrap();
        }
        gone.store(1, Ordering::SeqCst);
        disk.cancel_in_flight();
        for call in calls {
            assert_eq!(call.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
        }
    });
    // It can be used again.
    disk.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
}

#[test]
fn a_wait_for_a_server_that_is_away_can_be_cancelled() {
    let served = served(0, |_| Export::new());
    let disk = served.fake.options().reconnect_delay(LONG).open().unwrap();
    thread::scope(|scope| {
        let call = scope.spawn(|| disk.read_at(&mut [0; 512], 0));
        while served.connections.load(Ordering::SeqCst) < 3 {
            thread::yield_now();
        }
        disk.cancel_in_flight();
        assert_eq!(call.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    });
    // No call waits for it any more until it has been there again.
    let error = disk.read_at(&mut [0; 512], 0).unwrap_err();
    assert!(matches!(cause(&error), ClientError::Lost(_)), "{error:?}");
    served.fuel.store(u64::MAX, Ordering::SeqCst);
    disk.read_at(&mut [0; 512], 0).unwrap();
}

#[test]
fn opening_waits_for_a_server_that_is_not_there_yet() {
    let served = served(u64::MAX, |number| {
        // At first the export is not there.
        Export {
            flags: if number < 2 { TransmissionFlags::NONE } else { Export::new().flags },
            ..Export::new()
        }
    });
    let error = served.fake.options().open_timeout(LONG).open().unwrap_err();
    assert!(error.to_string().contains("without flags"), "what is broken is not tried again: {error}");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late");
    let options = blockmirror_nbd::ClientOptions::new(blockmirror_nbd::NbdUri::unix(&path, ""));
    assert_eq!(options.clone().open().unwrap_err().kind(), ErrorKind::NotFound);
    thread::scope(|scope| {
        let opened = scope.spawn(|| options.open_timeout(LONG).open());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (stream, _) = listener.accept().unwrap();
        Peer { stream, extended: false }.handshake(&Export::new()).unwrap();
        assert_eq!(opened.join().unwrap().unwrap().len(), 1 << 20);
    });
}

#[test]
fn many_threads_on_many_connections_get_their_own_replies() {
    let flags = Export::new().flags | TransmissionFlags::CAN_MULTI_CONN;
    let export = Export { flags, ..Export::new() };
    let served = served(u64::MAX, move |_| export);
    {
        let mut disk = served.disk.lock().unwrap();
        for (i, byte) in disk.iter_mut().enumerate() {
            *byte = (i / 509 % 251) as u8;
        }
    }
    let expected = served.disk.lock().unwrap().clone();
    let disk = served.fake.options().connections(3).open().unwrap();
    thread::scope(|scope| {
        for t in 0..8_usize {
            let (disk, expected) = (&disk, &expected);
            scope.spawn(move || {
                for i in 0..300_usize {
                    let offset = (t * 131_071 + i * 7919) % (1 << 19);
                    let mut buf = vec![0; 1 + (i * 613) % 40_000];
                    disk.read_at(&mut buf, offset as u64).unwrap();
                    assert!(buf == expected[offset..offset + buf.len()]);
                }
            });
        }
    });
    assert_eq!(served.connections.load(Ordering::SeqCst), 3);
}

/// One of those that are counted, until its end.
struct Running<'a>(&'a AtomicUsize);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[test]
fn connections_are_lost_under_many_threads_and_every_byte_is_right() {
    let flags = Export::new().flags | TransmissionFlags::CAN_MULTI_CONN;
    let export = Export { flags, ..Export::new() };
    let served = served(u64::MAX, move |_| export);
    let disk = served.fake.options().reconnect_delay(LONG).open().unwrap();
    let running = AtomicUsize::new(6);
    thread::scope(|scope| {
        for t in 0..6_u64 {
            let (disk, running) = (&disk, &running);
            scope.spawn(move || {
                // Also if an assertion fails, so that the test ends.
                let _running = Running(running);
                for i in 0..200_u64 {
                    let offset = t * 100_000 + i * 497 % 90_000;
                    let data = vec![(t * 31 + i) as u8; 700];
                    disk.write_at(&data, offset, WriteFlags::NONE).unwrap();
                    let mut back = vec![0; 700];
                    disk.read_at(&mut back, offset).unwrap();
                    assert!(back == data);
                }
            });
        }
        // Hangs up now and then, wherever the others are.
        while running.load(Ordering::SeqCst) > 0 {
            let before = served.connections.load(Ordering::SeqCst);
            served.fuel.store(50, Ordering::SeqCst);
            while running.load(Ordering::SeqCst) > 0 && served.connections.load(Ordering::SeqCst) == before {
                thread::yield_now();
            }
            served.fuel.store(u64::MAX, Ordering::SeqCst);
            thread::yield_now();
        }
    });
    assert!(disk.flush().is_err());
    disk.flush().unwrap();
}

/// The first connection fell silent, a further one led to another run of the server, and that one's answer to
/// a flush was believed for what the first had written.
#[test]
fn a_connection_made_while_the_first_is_silent_answers_no_flush() {
    #[derive(Debug, PartialEq)]
    enum Seen {
        Greeted(usize),
        Asked(usize, Command),
    }
    let flags = Export::new().flags | TransmissionFlags::CAN_MULTI_CONN;
    let (seen, is_seen) = mpsc::channel();
    let fake = Fake::new(move |number, mut peer| {
        if peer.handshake(&Export { flags, ..Export::new() }).is_none() {
            return;
        }
        let _ = seen.send(Seen::Greeted(number));
        let mut answers = 1;
        while let Some((request, _)) = peer.request() {
            if number > 0 || answers > 0 {
                peer.ok(request.cookie);
            }
            answers = 0;
            let _ = seen.send(Seen::Asked(number, request.command));
        }
    });
    let disk = fake.options().open().unwrap();
    disk.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap();
    thread::scope(|scope| {
        let wait_for = |wanted: &dyn Fn(&Seen) -> bool| loop {
            let seen = is_seen.recv_timeout(Duration::from_secs(60)).unwrap();
            if wanted(&seen) {
                return seen;
            }
        };
        let disk = &disk;
        for at in [4096, 8192] {
            scope.spawn(move || disk.write_at(&[2; 512], at, WriteFlags::NONE));
        }
        // The first of the further connections is in use, or is not as long as the first does not answer.
        wait_for(&|seen| matches!(seen, Seen::Greeted(2) | Seen::Asked(0, Command::Read)));
        let flush = scope.spawn(|| disk.flush());
        let asked = wait_for(&|seen| matches!(seen, Seen::Asked(_, Command::Flush)));
        disk.cancel_in_flight();
        assert_eq!(asked, Seen::Asked(0, Command::Flush));
        assert!(flush.join().unwrap().is_err());
    });
}

/// The limit began anew with each byte, and only callers that did not read looked at it.
#[test]
fn a_reply_that_drips_is_as_late_as_none() {
    let fake = Fake::serving(Export::new(), |peer, request, _| {
        let payload = [&request.offset.to_be_bytes()[..], &vec![0; request.length as usize]].concat();
        peer.chunk_of(request.cookie, Chunk::OffsetData, true, payload.len() as u64, &[]);
        for byte in payload {
            if peer.stream.write_all(&[byte]).is_err() {
                return;
            }
            // The pace of the server, which would take 20 minutes.
            thread::sleep(Duration::from_millis(20));
        }
    });
    let disk = Arc::new(fake.options().io_timeout(Some(Duration::from_millis(200))).open().unwrap());
    let (done, is_done) = mpsc::channel();
    let reader = Arc::clone(&disk);
    thread::spawn(move || {
        let _ = done.send(reader.read_at(&mut [0; 65536], 0).unwrap_err());
    });
    let error = is_done.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(matches!(cause(&error), ClientError::NoAnswer(_)), "{error:?}");
}

/// A caller that was cancelled while it connected, or waited to, is no failure of the server.
#[test]
fn a_cancelled_wait_for_a_connection_concerns_one_caller() {
    let served = served(0, |_| Export::new());
    let disk = served.fake.options().reconnect_delay(LONG).open().unwrap();
    let job = CancelSource::new();
    thread::scope(|scope| {
        let cancelled = scope.spawn(|| {
            let _calls = job.enter();
            disk.read_at(&mut [0; 512], 0)
        });
        let other = scope.spawn(|| disk.read_at(&mut [0; 512], 0));
        while served.connections.load(Ordering::SeqCst) < 3 {
            thread::yield_now();
        }
        job.cancel();
        assert_eq!(cancelled.join().unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
        served.fuel.store(u64::MAX, Ordering::SeqCst);
        other.join().unwrap().unwrap();
    });
}

/// Space was taken out of use where the server was full, as if it might still do what it has refused; and was
/// used again after a write that had timed out behind the server.
#[test]
fn only_what_has_no_space_is_not_done_later() {
    let errors = [
        (Errno::NOSPC, true),
        // Behind the server there may be a network as well. Servers answer EINVAL for each error of theirs
        // that the protocol does not have, a timeout among them.
        (Errno::INVAL, false),
        (Errno::IO, false),
        (Errno::PERM, false),
        (Errno::OVERFLOW, false),
        (Errno::NOTSUP, false),
    ];
    for (errno, refused) in errors {
        for lost_before in [false, true] {
            let fake = Fake::new(move |number, mut peer| {
                if peer.handshake(&Export::new()).is_none() {
                    return;
                }
                while let Some((request, _)) = peer.request() {
                    if lost_before && number == 0 {
                        // The server may do it although this connection is gone.
                        return;
                    }
                    peer.error(request.cookie, errno, true);
                }
            });
            let disk = fake.options().connections(1).reconnect_delay(LONG).open().unwrap();
            let error = disk.write_at(&[1; 512], 0, WriteFlags::NONE).unwrap_err();
            assert_eq!(error.was_refused(), refused && !lost_before, "{error}");
        }
    }
}

/// A server that has just started adds its export while the client connects: the answer to the question for
/// contexts was that there is no such export, the next one found it, and what was served counted as another
/// export for good.
#[test]
fn an_export_that_comes_during_the_handshake_is_the_same() {
    let fake = Fake::new(|number, mut peer| {
        let export = Export { comes_late: number == 1, ..Export::new() };
        if peer.handshake(&export).is_none() {
            return;
        }
        while let Some((request, _)) = peer.request() {
            peer.ok(request.cookie);
            if number == 0 {
                return;
            }
        }
    });
    let client = fake.options().connections(1).reconnect_delay(LONG).open().unwrap();
    for _ in 0..2 {
        client.write_at(&[7; 512], 0, WriteFlags::NONE).unwrap();
    }
}
