//! Exports that come and go, servers that stop, clients that wait, do not read, or go away.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::{Mode, Peer, Piece, eventually, serve};
use blockmirror_block::sync::Mutex;
use blockmirror_block::testing::{DiskOp, FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_block::{BlockDevice, ByteRange, WriteFlags};
use blockmirror_nbd::proto::{Command, CommandFlags, Errno, Greeting, OptionReply};
use blockmirror_nbd::server::{Export, Listener, Observer, RemoveMode, Server, ServerError, ServerOptions};

const MIB: u64 = 1 << 20;
const NONE: CommandFlags = CommandFlags::NONE;

fn disk() -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(8 * MIB))
}

#[test]
fn requests_of_one_connection_run_at_the_same_time() {
    let faults = Faults::new();
    let server = serve(Arc::new(FaultDisk::new(disk(), faults.clone())));
    let mut peer = Peer::ready(&server, Mode::Structured, &[]);
    peer.write_at(NONE, 0, &vec![1; 8 << 20]).unwrap();
    let gate = faults.hold(OpKind::Read, None);
    // Long ones go to workers at once; 8 of them are held at the same time.
    let mut open: Vec<u64> = (0..8).map(|i| peer.send(Command::Read, NONE, i * MIB, MIB)).collect();
    gate.wait_held(8);
    // Another kind of request is answered meanwhile.
    let flush = peer.send(Command::Flush, NONE, 0, 0);
    assert_eq!(peer.receive(0), (flush, Piece::Done, true));
    gate.open();
    while !open.is_empty() {
        let (cookie, _, done) = peer.receive(0);
        if done {
            open.retain(|c| *c != cookie);
        }
    }
    peer.disconnect();
}

#[test]
fn a_request_that_hangs_holds_up_neither_other_connections_nor_other_exports() {
    let faults = Faults::new();
    let server = serve(Arc::new(FaultDisk::new(disk(), faults.clone())));
    server.add(Export::new("other", disk())).unwrap();
    let mut peer = Peer::ready(&server, Mode::Simple, &[]);
    let gate = faults.hold(OpKind::Read, None);
    // A short read, which the reader of the connection does itself.
    let held = peer.send(Command::Read, NONE, 0, 512);
    gate.wait_held(1);
    let mut second = Peer::ready(&server, Mode::Simple, &[]);
    assert_eq!(second.write_at(NONE, 0, &[1; 512]), Ok(()));
    let mut third = Peer::greeted(&server);
    third.go("other").unwrap();
    assert_eq!(third.read_at(0, 512), Ok(vec![0; 512]));
    gate.open();
    assert_eq!(peer.reply(held, 512), [Piece::Data(0, vec![1; 512])]);
}

#[test]
fn a_flush_covers_the_writes_of_other_connections() {
    let disk = Arc::new(MemoryDisk::new(MIB).logged());
    let server = serve(disk.clone());
    let mut first = Peer::ready(&server, Mode::Simple, &[]);
    let mut second = Peer::ready(&server, Mode::Simple, &[]);
    disk.take_log();
    first.write_at(NONE, 0, &[1; 512]).unwrap();
    second.run(Command::Flush, NONE, 0, 0);
    assert!(matches!(disk.take_log().as_slice(), [DiskOp::Write(..), DiskOp::Flush]));
    assert_eq!(second.read_at(0, 512), Ok(vec![1; 512]));
}

#[test]
fn disconnecting_waits_for_what_runs() {
    let faults = Faults::new();
    let server = serve(Arc::new(FaultDisk::new(disk(), faults.clone())));
    let mut peer = Peer::ready(&server, Mode::Simple, &[]);
    let gate = faults.hold(OpKind::Write, None);
    let cookie = peer.send_write(NONE, 0, &vec![3; 1 << 20]);
    gate.wait_held(1);
    peer.send(Command::Disconnect, NONE, 0, 0);
    gate.open();
    assert_eq!(peer.reply(cookie, 0), [Piece::Done]);
    assert!(peer.is_closed());
    eventually("the end of the connection", || server.connections() == 0);
}

#[test]
fn a_client_that_does_not_read_holds_a_bounded_amount_and_delays_no_other() {
    let disk = disk();
    disk.write_at(&vec![1; 8 << 20], 0, WriteFlags::NONE).unwrap();
    let options = ServerOptions::default();
    let limit = options.memory;
    let server = Server::new(options).unwrap();
    server.add(Export::new("disk", disk)).unwrap();
    let deaf = deaf(&server, 8 * MIB, limit / 2);
    let mut peer = Peer::ready(&server, Mode::Simple, &[]);
    assert_eq!(peer.read_at(5, 5), Ok(vec![1; 5]));
    assert!(server.memory_in_use() <= limit);
    drop(deaf);
    eventually("their memory given back", || server.memory_in_use() == 0 && server.connections() == 1);
    assert_eq!(peer.read_at(0, 8 << 20), Ok(vec![1; 8 << 20]));
    peer.disconnect();
}

/// 20 clients of `disk` that send 50 reads of `length` and read nothing, once more than `held` is in use.
fn deaf(server: &Server, length: u64, held: u64) -> Vec<Peer> {
    let mut deaf: Vec<Peer> = (0..20).map(|_| Peer::ready(server, Mode::Simple, &[])).collect();
    for peer in &mut deaf {
        for _ in 0..50 {
            peer.send(Command::Read, NONE, 0, length);
        }
    }
    eventually("much memory in use", || server.memory_in_use() > held);
    deaf
}

#[test]
fn long_reads_are_served_on_all_exports_while_twenty_clients_stall() {
    let disk = disk();
    disk.write_at(&vec![1; 8 << 20], 0, WriteFlags::NONE).unwrap();
    let server = serve(disk.clone());
    server.add(Export::new("other", disk)).unwrap();
    let deaf = deaf(&server, 8 * MIB, 256 * MIB);
    for export in ["disk", "other"] {
        let mut peer = Peer::greeted(&server);
        peer.go(export).unwrap();
        // The first would have waited for 60 s, as long as the others may stall.
        assert_eq!(peer.read_at(0, 1 << 20), Ok(vec![1; 1 << 20]));
        let open: Vec<u64> = (0..64).map(|i| peer.send(Command::Read, NONE, i % 8 * MIB, MIB)).collect();
        for _ in open {
            assert_eq!(peer.receive(1 << 20).1, Piece::Data(0, vec![1; 1 << 20]));
        }
        assert_eq!(server.connections(), 21, "no client that stalls has been cut off");
        peer.disconnect();
        eventually("one less", || server.connections() == 20);
    }
    drop(deaf);
}

/// The rate counts only then, and no more are cut off than needed: without it they would all have gone, at
/// the same time, after the limit for a client that stalls.
#[test]
fn slow_clients_make_room_for_one_that_holds_nothing() {
    let disk = Arc::new(MemoryDisk::new(32 * MIB));
    disk.write_at(&vec![1; 32 << 20], 0, WriteFlags::NONE).unwrap();
    let mut options = ServerOptions::default();
    options.stall_limit = Duration::from_secs(12);
    // Of which 128 MiB are the clients' own.
    options.memory = 256 * MIB;
    let server = Server::new(options).unwrap();
    server.add(Export::new("disk", disk)).unwrap();
    // Short reads are served at once, so that none of them waits for another.
    let deaf = deaf(&server, 2 * MIB, 100 * MIB);
    let mut peer = Peer::ready(&server, Mode::Simple, &[]);
    assert_eq!(server.connections(), 21);
    assert_eq!(peer.read_at(0, 32 << 20), Ok(vec![1; 32 << 20]));
    let left = server.connections();
    assert!((11..21).contains(&left), "{left} left");
    drop(deaf);
}

/// Others would have been cut off for it.
#[test]
fn the_end_of_a_client_that_waits_for_room_is_noticed() {
    let disk = Arc::new(MemoryDisk::new(32 * MIB));
    disk.write_at(&vec![1; 32 << 20], 0, WriteFlags::NONE).unwrap();
    let mut options = ServerOptions::default();
    options.memory = 256 * MIB;
    let server = Server::new(options).unwrap();
    server.add(Export::new("disk", disk)).unwrap();
    let deaf = deaf(&server, 2 * MIB, 100 * MIB);
    let mut peer = Peer::ready(&server, Mode::Simple, &[]);
    peer.send(Command::Read, NONE, 0, 32 * MIB);
    drop(peer);
    eventually("one less", || server.connections() == 20);
    let mut second = Peer::ready(&server, Mode::Simple, &[]);
    assert_eq!(second.read_at(0, 2 << 20), Ok(vec![1; 2 << 20]));
    assert_eq!(server.connections(), 21);
    drop(deaf);
}

#[test]
fn requests_of_a_client_that_has_gone_are_dropped() {
    let workers = ServerOptions::default().workers;
    // With 200, the end of the client is not read: so many requests do not run at the same time.
    for n in [100, 200] {
        let faults = Faults::new();
        let server = serve(Arc::new(FaultDisk::new(disk(), faults.clone())));
        let mut peer = Peer::ready(&server, Mode::Simple, &[]);
        let first = faults.hold(OpKind::Read, Some(ByteRange::at(0, 512)));
        let others = faults.hold(OpKind::Read, Some(ByteRange::at(MIB, 512)));
        for i in 0..n {
            peer.send(Command::Read, NONE, if i == 0 { 0 } else { MIB }, 100 << 10);
        }
        first.wait_held(1);
        others.wait_held(workers - 1);
        drop(peer);
        // The worker that fails to send this reply is the only one that is not held. It drops what is queued:
        // then only the requests that are held have buffers.
        first.open();
        let held = (workers as u64 - 1) * (128 << 10);
        eventually("the end of queued requests", || server.memory_in_use() == held);
        others.open();
        eventually("the end of the connection", || server.connections() == 0);
        assert_eq!(faults.seen(OpKind::Read), workers, "of {n}");
        eventually("their memory given back", || server.memory_in_use() == 0);
    }
}

#[test]
fn replies_wait_for_a_slow_reader_and_all_arrive() {
    let disk = disk();
    disk.write_at(&vec![9; 8 << 20], 0, WriteFlags::NONE).unwrap();
    // Room for one long request at a time.
    let mut options = ServerOptions::default();
    options.memory = 8 << 20;
    let server = Server::new(options).unwrap();
    server.add(Export::new("disk", disk)).unwrap();
    let mut peers: Vec<Peer> = (0..3).map(|_| Peer::ready(&server, Mode::Simple, &[])).collect();
    for peer in &mut peers {
        for i in 0..20 {
            // Short and long ones mixed.
            peer.send(Command::Read, NONE, 0, if i % 2 == 0 { 8 * MIB } else { 4096 });
        }
    }
    // All at the same time: the room of one that does not read at all is not the others' until it is
    // disconnected.
    std::thread::scope(|scope| {
        for peer in &mut peers {
            scope.spawn(|| {
                let mut total = 0;
                while total < 10 * (8 * MIB + 4096) + 20 * 16 {
                    let mut buf = vec![0; 100_000];
                    let n = peer.stream.read(&mut buf).unwrap();
                    assert_ne!(n, 0);
                    total += n as u64;
                }
            });
        }
    });
}

#[derive(Default)]
struct Log(Mutex<Vec<(char, String, usize)>>);

impl Observer for Log {
    fn connected(&self, export: &str, clients: usize) {
        self.0.lock().push(('+', export.into(), clients));
    }
    fn disconnected(&self, export: &str, clients: usize) {
        self.0.lock().push(('-', export.into(), clients));
    }
}

/// It was once notified of the second client before the first, and of the last one's end while another
/// connected.
#[test]
fn the_observer_is_notified_of_first_and_last_clients() {
    let log = Arc::new(Log::default());
    let mut options = ServerOptions::default();
    options.observer = Some(log.clone());
    let server = Server::new(options).unwrap();
    server.add(Export::new("disk", disk())).unwrap();
    let first = Peer::ready(&server, Mode::Simple, &[]);
    let second = Peer::ready(&server, Mode::Simple, &[]);
    assert_eq!(server.exports()[0].clients, 2);
    first.disconnect();
    eventually("one gone", || log.0.lock().len() == 3);
    drop(second);
    eventually("both gone", || log.0.lock().len() == 4);
    let disk = |what, n| (what, "disk".to_owned(), n);
    assert_eq!(*log.0.lock(), [disk('+', 1), disk('+', 2), disk('-', 1), disk('-', 0)]);
}

#[test]
fn an_export_in_use_is_removed_only_by_force() {
    let server = serve(disk());
    let mut peer = Peer::ready(&server, Mode::Simple, &[]);
    assert!(matches!(
        server.remove("disk", RemoveMode::Safe),
        Err(ServerError::ExportInUse { clients: 1, .. })
    ));
    assert_eq!(peer.read_at(0, 1), Ok(vec![0]));
    server.remove("disk", RemoveMode::Hard).unwrap();
    assert!(peer.is_closed());
    assert!(server.exports().is_empty());
    assert!(matches!(server.remove("disk", RemoveMode::Hard), Err(ServerError::NoSuchExport { .. })));
    server.add(Export::new("disk", disk())).unwrap();
    assert!(matches!(server.add(Export::new("disk", disk())), Err(ServerError::ExportExists { .. })));
    server.remove("disk", RemoveMode::Safe).unwrap();
    assert_eq!(Peer::greeted(&server).go("disk"), Err(OptionReply::ErrUnknown));
}

#[test]
fn a_removed_export_releases_its_device() {
    let server = serve(disk());
    let device: Arc<dyn BlockDevice> = disk();
    server.add(Export::new("gone", Arc::clone(&device))).unwrap();
    let mut peer = Peer::greeted(&server);
    peer.go("gone").unwrap();
    assert_eq!(peer.read_at(0, 1), Ok(vec![0]));
    server.remove("gone", RemoveMode::Hard).unwrap();
    eventually("the device was released", || Arc::strong_count(&device) == 1);
}

/// A hard removal cancelled whatever the device had in flight: requests of other exports of it failed with
/// ESHUTDOWN.
#[test]
fn a_removed_export_leaves_other_users_of_its_device_alone() {
    let faults = Faults::new();
    let device: Arc<dyn BlockDevice> = Arc::new(FaultDisk::new(disk(), faults.clone()));
    let server = serve(Arc::clone(&device));
    server.add(Export::new("gone", device)).unwrap();
    let mut stays = Peer::ready(&server, Mode::Simple, &[]);
    let mut gone = Peer::greeted(&server);
    gone.go("gone").unwrap();
    let gate = faults.hold(OpKind::Read, None);
    let held = stays.send(Command::Read, NONE, 0, 512);
    gone.send(Command::Read, NONE, 512, 512);
    gate.wait_held(2);
    server.remove("gone", RemoveMode::Hard).unwrap();
    eventually("the request of the removed export has ended", || gate.held() < 2);
    assert_eq!(gate.held(), 1);
    gate.open();
    assert_eq!(stays.reply(held, 512), [Piece::Data(0, vec![0; 512])]);
    stays.disconnect();
}

#[test]
fn a_read_only_device_is_no_writable_export() {
    let server = Server::new(ServerOptions::default()).unwrap();
    let read_only = Arc::new(MemoryDisk::new(MIB).read_only());
    let refused = server.add(Export::new("disk", read_only.clone()).writable(true));
    assert!(matches!(refused, Err(ServerError::ReadOnlyDevice { .. })));
    server.add(Export::new("disk", read_only)).unwrap();
    let long = "x".repeat(4097);
    assert!(matches!(server.add(Export::new(long, disk())), Err(ServerError::NameTooLong { .. })));
}

#[test]
fn stopping_answers_what_runs_and_closes() {
    let faults = Faults::new();
    let server = serve(Arc::new(FaultDisk::new(disk(), faults.clone())));
    let mut peer = Peer::ready(&server, Mode::Simple, &[]);
    let mut half = Peer::greeted(&server);
    let gate = faults.hold(OpKind::Write, None);
    let cookie = peer.send_write(NONE, 0, &vec![3; 1 << 20]);
    gate.wait_held(1);
    let stopping = std::thread::spawn({
        let server = Arc::clone(&server);
        move || server.stop()
    });
    assert!(half.is_closed());
    gate.open();
    assert_eq!(peer.reply(cookie, 0), [Piece::Done]);
    assert!(peer.is_closed());
    stopping.join().unwrap().unwrap();
    assert_eq!(server.connections(), 0);
    assert!(matches!(server.add(Export::new("disk", disk())), Err(ServerError::Stopped)));
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(matches!(server.serve(theirs), Err(ServerError::Stopped)));
    drop(ours);
}

#[test]
fn stopping_ends_with_deaf_clients_and_devices_that_hang() {
    let faults = Faults::new();
    let disk = disk();
    disk.write_at(&vec![1; 8 << 20], 0, WriteFlags::NONE).unwrap();
    let server = serve(Arc::new(FaultDisk::new(disk, faults.clone())));
    let mut deaf = Peer::ready(&server, Mode::Simple, &[]);
    for _ in 0..20 {
        deaf.send(Command::Read, NONE, 0, 8 * MIB);
    }
    let mut hangs = Peer::ready(&server, Mode::Simple, &[]);
    // Ends only by `cancel_in_flight`.
    let gate = faults.hold(OpKind::Flush, None);
    hangs.send(Command::Flush, NONE, 0, 0);
    gate.wait_held(1);
    server.stop().unwrap();
    assert_eq!(server.connections(), 0);
}

#[test]
fn a_client_too_slow_with_its_handshake_is_aborted() {
    let mut options = ServerOptions::default();
    options.handshake_limit = Duration::from_millis(200);
    let server = Server::new(options).unwrap();
    server.add(Export::new("disk", disk())).unwrap();
    let mut silent = Peer::connect(&server);
    let mut talkative = Peer::greeted(&server);
    let _: [u8; Greeting::LEN] = silent.read_array();
    assert!(silent.is_closed());
    // Talking all the time does not help.
    let started = Instant::now();
    while talkative.stream.write_all(b"IHAVEOPT\0\0\0\x63\0\0\0\0").is_ok() {
        assert!(started.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(10));
    }
    eventually("both gone", || server.connections() == 0);
}

#[test]
fn a_client_that_stalls_in_a_request_is_aborted() {
    let mut options = ServerOptions::default();
    options.stall_limit = Duration::from_millis(100);
    let server = Server::new(options).unwrap();
    server.add(Export::new("disk", disk()).writable(true)).unwrap();
    let mut idle = Peer::ready(&server, Mode::Simple, &[]);
    let mut stalled = Peer::ready(&server, Mode::Simple, &[]);
    stalled.send(Command::Write, NONE, 0, MIB);
    assert!(stalled.is_closed());
    // One that owes nothing may be silent as long as it likes.
    assert_eq!(idle.read_at(0, 1), Ok(vec![0]));
    eventually("memory given back", || server.memory_in_use() == 0);
}

/// Only half a payload was cut off.
#[test]
fn a_client_that_stalls_in_a_header_is_aborted() {
    let mut options = ServerOptions::default();
    options.stall_limit = Duration::from_millis(100);
    let server = Server::new(options).unwrap();
    server.add(Export::new("disk", disk())).unwrap();
    let mut stalled = Peer::ready(&server, Mode::Simple, &[]);
    stalled.write(&[0x25, 0x60, 0x95]);
    assert!(stalled.is_closed());
}

#[test]
fn more_clients_than_allowed_wait_outside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let mut options = ServerOptions::default();
    options.max_connections = 2;
    let server = Server::new(options).unwrap();
    server.add(Export::new("disk", disk())).unwrap();
    server.listen(Listener::unix(&path).unwrap()).unwrap();
    let connect = || Peer::over(UnixStream::connect(&path).unwrap());
    let mut inside = [connect(), connect()];
    // One that comes before they are in gets as far as they do ...
    let mut third = connect();
    third.greet();
    for peer in &mut inside {
        peer.greet();
        peer.go("disk").unwrap();
    }
    // ... and waits for its place; one that comes later waits for the greeting.
    let outside = UnixStream::connect(&path).unwrap();
    outside.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!((&outside).read_exact(&mut [0; Greeting::LEN]).is_err());
    let waiting = std::thread::spawn(move || {
        third.go("disk").unwrap();
        third
    });
    let [first, second] = inside;
    first.disconnect();
    let mut third = waiting.join().unwrap();
    assert_eq!(third.read_at(0, 1), Ok(vec![0]));
    second.disconnect();
    outside.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    (&outside).read_exact(&mut [0; Greeting::LEN]).unwrap();
}

/// Each of them once had a client's place for 10 s, and 100 of them were all there were.
#[test]
fn silent_connections_do_not_keep_others_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let server = serve(disk());
    server.listen(Listener::unix(&path).unwrap()).unwrap();
    let silent: Vec<UnixStream> = (0..500).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let mut peer = Peer::over(UnixStream::connect(&path).unwrap());
    peer.greet();
    peer.go("disk").unwrap();
    assert_eq!(peer.read_at(0, 1), Ok(vec![0]));
    let still = silent.iter().filter(|stream| {
        let mut stream: &UnixStream = stream;
        // The greeting may come later than the good client is served.
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.read_exact(&mut [0; Greeting::LEN]).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream.read(&mut [0]).is_err()
    });
    assert_eq!(still.count(), 500, "all are still in their handshake");
    // With many more of them, the oldest make room.
    let more: Vec<UnixStream> = (0..500).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let mut peer = Peer::over(UnixStream::connect(&path).unwrap());
    peer.greet();
    peer.go("disk").unwrap();
    assert!(server.connections() <= 2 + 512);
    assert!(Peer::over(silent.into_iter().next().unwrap()).is_closed());
    drop(more);
}

#[test]
fn listeners_of_all_kinds_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let server = serve(disk());
    server.listen(Listener::unix(&path).unwrap()).unwrap();
    let tcp = Listener::tcp("127.0.0.1", 0).unwrap();
    let address = tcp.tcp_address().unwrap();
    server.listen(tcp).unwrap();
    let inherited = dir.path().join("inherited.sock");
    server.listen(Listener::from_fd(UnixListener::bind(&inherited).unwrap().into()).unwrap()).unwrap();

    let mut greeting = [0; Greeting::LEN];
    UnixStream::connect(&path).unwrap().read_exact(&mut greeting).unwrap();
    UnixStream::connect(&inherited).unwrap().read_exact(&mut greeting).unwrap();
    TcpStream::connect(address).unwrap().read_exact(&mut greeting).unwrap();
    assert!(matches!(Listener::unix(&path), Err(ServerError::SocketInUse { .. })));
    server.stop().unwrap();
    assert!(!path.exists(), "a socket file of our own goes");
    assert!(inherited.exists(), "one that was inherited stays");
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_stale_socket_is_replaced_and_anything_else_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    drop(UnixListener::bind(&path).unwrap());
    let first = Listener::unix(&path).unwrap();
    // Another server's socket in its place is left alone.
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(other);
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(Listener::unix(&file), Err(ServerError::NotASocket { .. })));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let (stream, _other) = UnixStream::pair().unwrap();
    assert!(matches!(Listener::from_fd(stream.into()), Err(ServerError::Activation { .. })));
}

#[test]
fn a_server_going_down_answers_the_handshake_with_an_error() {
    let server = serve(disk());
    let mut peer = Peer::ready(&server, Mode::Structured, &[]);
    // Reading is ended from outside while a request is half sent.
    peer.send(Command::Write, NONE, 0, MIB);
    drop(server);
    assert!(peer.is_closed());
    assert_eq!(Errno::SHUTDOWN.to_wire(), 108);
}

#[test]
fn sockets_of_the_service_manager_are_taken_once() {
    const CHILD: &str = "BLOCKMIRROR_TEST_ACTIVATED";
    if std::env::var_os(CHILD).is_some() {
        let listeners = Listener::inherited().unwrap();
        assert_eq!(listeners.len(), 1);
        assert!(matches!(Listener::inherited(), Err(ServerError::Activation { .. })));
        let server = serve(disk());
        for listener in listeners {
            server.listen(listener).unwrap();
        }
        // Until the parent says that it has seen enough, by killing this process.
        loop {
            std::thread::park();
        }
    }
    // Meant for another process, or for none: none.
    assert!(Listener::inherited().unwrap().is_empty());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("activated.sock");
    let listening = std::os::fd::OwnedFd::from(UnixListener::bind(&path).unwrap());
    let mut child = std::process::Command::new("sh")
        .arg("-c")
        .arg("LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" --exact server_life::sockets_of_the_service_manager_are_taken_once 3<&0")
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, "1")
        .stdin(listening)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut peer = Peer::over(UnixStream::connect(&path).unwrap());
    peer.greet();
    peer.go("disk").unwrap();
    assert_eq!(peer.read_at(0, 1), Ok(vec![0]));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(peer.is_closed());
}
