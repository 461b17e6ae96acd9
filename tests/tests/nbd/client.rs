//! Our NBD client against servers that others wrote: `qemu-nbd`, and `nbdkit` with filters that make life
//! hard.
//!
//! Skipped, visibly, where the servers are not installed (Debian: qemu-utils, nbdkit).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::nbd::{Server, agrees_with_a_vector, noise};
use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Extent, ExtentKind, Visit, WriteFlags, ZeroFlags,
};
use blockmirror_mirror::{JobState, MirrorJob, MirrorOptions, OnError};
use blockmirror_nbd::{ClientError, ClientStorage, NbdAddress, NbdUri, TlsOptions};
use blockmirror_raw::{Raw, RawOptions};
use blockmirror_testing::qemu::{have, run};
use blockmirror_testing::scratch::scratch;

const MIB: u64 = 1 << 20;

fn extents(disk: &dyn BlockDevice) -> Vec<(u64, u64, ExtentKind, u32)> {
    let mut found = Vec::new();
    disk.extents(ByteRange::new(0, disk.len()), &mut |e: Extent| {
        found.push((e.range.start(), e.range.len(), e.kind, e.depth));
        Visit::Continue(())
    })
    .unwrap();
    found
}

fn cause(error: &Error) -> &ClientError {
    error.cause().unwrap().downcast_ref().unwrap()
}

#[test]
fn random_operations_on_qemu_nbd() {
    if !have("random_operations_on_qemu_nbd", &["qemu-nbd", "qemu-img"]) {
        return;
    }
    let server = Server::qemu_raw(4 * MIB, &[]);
    agrees_with_a_vector(&server.open(), 1, 600);
    let dir = scratch().unwrap();
    run("qemu-img", dir.path(), ["create", "-q", "-f", "qcow2", "image", "4M"]).unwrap();
    let server = Server::qemu(dir, "qcow2", "image", &[]);
    agrees_with_a_vector(&server.open(), 2, 400);
}

#[test]
fn random_operations_on_nbdkit_with_filters() {
    if !have("random_operations_on_nbdkit_with_filters", &["nbdkit"]) {
        return;
    }
    let table: [&[&str]; 16] = [
        &[],
        &["--filter=noextents"],
        &["--filter=cow"],
        &["--filter=cache", "cache=writeback"],
        &["--filter=readahead"],
        &["--filter=nozero", "zeromode=none"],
        &["--filter=nozero", "zeromode=notrim"],
        &["--filter=fua", "fuamode=emulate"],
        &["--filter=fua", "fuamode=native"],
        &["--filter=fua", "fuamode=force"],
        &["--filter=multi-conn", "multi-conn-mode=disable"],
        &["--filter=noparallel", "serialize=all-requests"],
        &["--filter=delay", "delay-read=1ms", "delay-write=1ms"],
        &["--no-sr"],
        // A minimum of 4 KiB and a maximum of 64 KiB, and a request outside of it gets an error.
        &[
            "--filter=blocksize-policy",
            "blocksize-minimum=4096",
            "blocksize-preferred=8192",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ],
        &[
            "--filter=blocksize-policy",
            "blocksize-minimum=65536",
            "blocksize-preferred=65536",
            "blocksize-error-policy=error",
        ],
    ];
    for (seed, args) in table.into_iter().enumerate() {
        let server = Server::nbdkit_memory(2 * MIB, args);
        let operations = if args.iter().any(|arg| arg.contains("delay")) { 60 } else { 250 };
        blockmirror_testing::report(format_args!("nbdkit {args:?}"));
        agrees_with_a_vector(&server.open(), seed as u64, operations);
    }
}

#[test]
fn servers_of_every_age_are_understood_or_named() {
    if !have("servers_of_every_age_are_understood_or_named", &["nbdkit"]) {
        return;
    }
    // Newstyle without options, as before 2011's fixed newstyle.
    let server = Server::nbdkit_memory(MIB, &["--mask-handshake=0"]);
    agrees_with_a_vector(&server.open(), 1, 60);
    let server = Server::nbdkit_memory(MIB, &["-o"]);
    let error = server.options().open().unwrap_err();
    assert!(error.to_string().contains("oldstyle handshake"), "{error}");
}

#[test]
fn what_lies_where_comes_from_the_server() {
    if !have("what_lies_where_comes_from_the_server", &["qemu-nbd", "qemu-img", "qemu-io"]) {
        return;
    }
    let dir = scratch().unwrap();
    let io = |image: &str, command: &str| run("qemu-io", dir.path(), ["-c", command, image]).unwrap();
    run("qemu-img", dir.path(), ["create", "-q", "-f", "qcow2", "base", "1M"]).unwrap();
    io("base", "write 0 128K");
    run("qemu-img", dir.path(), ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"]).unwrap();
    io("top", "write 64K 64K");
    io("top", "write -z 256K 64K");
    let server = Server::qemu(dir, "qcow2", "top", &["-A"]);
    use ExtentKind::{Data, Unallocated, Zero};
    let k = |n: u64| n << 10;
    assert_eq!(extents(&server.open()), [(0, k(128), Data, 0), (k(128), k(896), Zero, 0)]);
    let disk = server.options().allocation_depth(true).open().unwrap();
    assert_eq!(
        extents(&disk),
        [
            (0, k(64), Data, 1),
            (k(64), k(64), Data, 0),
            (k(128), k(128), Unallocated, 0),
            (k(256), k(64), Zero, 0),
            (k(320), k(704), Unallocated, 0),
        ]
    );
}

#[test]
fn errors_of_the_server_have_a_kind() {
    if !have("errors_of_the_server_have_a_kind", &["nbdkit"]) {
        return;
    }
    for (error, kind) in [
        ("EPERM", ErrorKind::ReadOnly),
        ("EIO", ErrorKind::Io),
        ("ENOSPC", ErrorKind::NoSpace),
        ("ESHUTDOWN", ErrorKind::Io),
    ] {
        let words = [format!("error-pwrite={error}"), format!("error-zero={error}")];
        let rate = ["error-pwrite-rate=100%", "error-zero-rate=100%"];
        let args = ["--filter=error", &words[0], &words[1], rate[0], rate[1]];
        let server = Server::nbdkit_memory(MIB, &args);
        let disk = server.open();
        let failed = disk.write_at(&[1; 512], 4096, WriteFlags::NONE).unwrap_err();
        assert_eq!((failed.kind(), failed.offset()), (kind, Some(4096)), "{failed:?}");
        assert!(failed.to_string().contains(error), "{failed}");
        assert!(matches!(cause(&failed), ClientError::Server { .. }), "{failed:?}");
        let failed = disk.write_zeroes(ByteRange::at(0, 4096), ZeroFlags::NONE).unwrap_err();
        assert_eq!(failed.kind(), kind);
        // The connection is none the worse for it.
        disk.read_at(&mut [0; 512], 4096).unwrap();
    }
}

#[test]
fn zeroing_that_must_be_quick_is_not_done_slowly() {
    if !have("zeroing_that_must_be_quick_is_not_done_slowly", &["nbdkit"]) {
        return;
    }
    let range = ByteRange::at(0, MIB);
    let quick = Server::nbdkit_memory(MIB, &[]);
    quick.open().write_zeroes(range, ZeroFlags::NO_FALLBACK).unwrap();
    for mode in ["fastzeromode=slow", "fastzeromode=none"] {
        let slow = Server::nbdkit_memory(MIB, &["--filter=nozero", "zeromode=emulate", mode]);
        let disk = slow.open();
        disk.write_at(&[7; 512], 0, WriteFlags::NONE).unwrap();
        let error = disk.write_zeroes(range, ZeroFlags::NO_FALLBACK).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{mode}: {error}");
        let mut buf = [0; 512];
        disk.read_at(&mut buf, 0).unwrap();
        assert_eq!(buf, [7; 512], "nothing was written");
        disk.write_zeroes(range, ZeroFlags::NONE).unwrap();
        disk.read_at(&mut buf, 0).unwrap();
        assert_eq!(buf, [0; 512]);
    }
}

/// `checkwrite` compares what is written with what is there: all that a copy sends must be the source's
/// bytes, zeroes and trims included.
#[test]
fn a_copy_writes_what_the_source_holds_and_nothing_else() {
    if !have("a_copy_writes_what_the_source_holds_and_nothing_else", &["nbdkit"]) {
        return;
    }
    let dir = scratch().unwrap();
    let mut bytes = noise(5, 3 * MIB as usize);
    bytes[MIB as usize..2 * MIB as usize].fill(0);
    for name in ["source", "same"] {
        fs::write(dir.path().join(name), &bytes).unwrap();
    }
    let server = Server::nbdkit(dir, &["--filter=checkwrite", "file", "@same"]);
    let source = blockmirror_image::OpenOptions::new().open(server.path("source")).unwrap();
    let target = Arc::new(server.open());
    let job = MirrorJob::start(Arc::clone(source.device()), target, MirrorOptions::new()).unwrap();
    let outcome = job.wait().unwrap();
    assert_eq!(outcome.copied, 2 * MIB);
    assert_eq!(outcome.zeroed + outcome.skipped, MIB);
}

#[test]
fn requests_survive_a_server_that_is_killed_and_started_again() {
    if !have("requests_survive_a_server_that_is_killed_and_started_again", &["qemu-nbd"]) {
        return;
    }
    let mut server = Server::qemu_raw(8 * MIB, &[]);
    let disk = server.options().reconnect_delay(Duration::from_secs(600)).open().unwrap();
    let (stop, expected) = (AtomicBool::new(false), noise(9, 4096));
    thread::scope(|scope| {
        let writers: Vec<_> = (0..4_u64)
            .map(|t| {
                let (disk, stop, expected) = (&disk, &stop, &expected);
                scope.spawn(move || {
                    let mut rounds = 0_u64;
                    while !stop.load(Ordering::Relaxed) || rounds < 64 {
                        let offset = t * 2 * MIB + rounds % 64 * 4096;
                        disk.write_at(expected, offset, WriteFlags::NONE).unwrap();
                        let mut back = vec![0; 4096];
                        disk.read_at(&mut back, offset).unwrap();
                        assert!(back == *expected);
                        rounds += 1;
                    }
                })
            })
            .collect();
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(30));
            server.kill();
            server.restart();
        }
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().unwrap();
        }
    });
    let error = disk.flush().unwrap_err();
    assert!(matches!(cause(&error), ClientError::UnflushedLost), "{error:?}");
    disk.flush().unwrap();
    let image = fs::read(server.path("image")).unwrap();
    for t in 0..4 {
        let start = t * 2 * MIB as usize;
        assert!((0..64).all(|i| image[start + i * 4096..][..4096] == expected[..]));
    }
}

/// nbdkit's cache filter holds writes back until a flush. Killed, it forgets them: with a client that said
/// nothing, a mirror across the kill would end well with a target that lacks what it had copied before.
#[test]
fn a_mirror_copies_again_what_a_killed_server_forgot() {
    if !have("a_mirror_copies_again_what_a_killed_server_forgot", &["nbdkit"]) {
        return;
    }
    let dir = scratch().unwrap();
    let len = 24 * MIB as usize;
    fs::write(dir.path().join("source"), noise(11, len)).unwrap();
    fs::File::create(dir.path().join("target")).unwrap().set_len(len as u64).unwrap();
    let args = ["--filter=cache", "--filter=delay", "file", "@target", "cache=writeback", "delay-write=2ms"];
    let mut server = Server::nbdkit(dir, &args);
    let source = blockmirror_image::OpenOptions::new().open(server.path("source")).unwrap();
    let client = Arc::new(server.options().reconnect_delay(Duration::from_secs(600)).open().unwrap());
    let options = MirrorOptions::new().buf_size(MIB).max_in_flight(4).on_target_error(OnError::Stop);
    let job = MirrorJob::start(Arc::clone(source.device()), client, options).unwrap();
    let control = job.control();
    while control.progress().copied < len as u64 / 3 {
        assert!(!control.wait_timeout(Duration::from_millis(1)), "it was too quick to be disturbed");
    }
    server.kill();
    let on_disk = fs::read(server.path("target")).unwrap();
    assert!(on_disk.iter().all(|b| *b == 0), "the server forgot nothing, so this shows nothing");
    server.restart();
    // The policy is not asked: the server is there again, and what it may have forgotten is copied again.
    while !control.wait_timeout(Duration::from_millis(5)) {
        assert_ne!(control.progress().state, JobState::Paused);
    }
    let outcome = job.wait().unwrap();
    assert!(outcome.copied > len as u64);
    assert!(fs::read(server.path("target")).unwrap() == fs::read(server.path("source")).unwrap());
}

/// Also where the disk is taken for a file with a raw image, as the command does.
#[test]
fn who_mirrors_to_an_export_knows_that_it_may_forget() {
    if !have("who_mirrors_to_an_export_knows_that_it_may_forget", &["nbdkit"]) {
        return;
    }
    let server = Server::nbdkit_memory(MIB, &[]);
    let client = Arc::new(server.open());
    assert!(client.geometry().forgetful);
    let raw = Raw::open(Arc::new(ClientStorage::plain(client)), RawOptions::new()).unwrap();
    assert!(raw.geometry().forgetful);
}

/// Without waiting, the policy `stop` holds the job until it is resumed.
#[test]
fn a_mirror_stops_when_the_server_goes_and_goes_on_when_told() {
    if !have("a_mirror_stops_when_the_server_goes_and_goes_on_when_told", &["qemu-nbd"]) {
        return;
    }
    let mut server = Server::qemu_raw(32 * MIB, &[]);
    let bytes = noise(12, 32 * MIB as usize);
    fs::write(server.path("source"), &bytes).unwrap();
    let source = blockmirror_image::OpenOptions::new().open(server.path("source")).unwrap();
    let target = Arc::new(server.open());
    let options = MirrorOptions::new().speed(64 * MIB).on_target_error(OnError::Stop);
    let job = MirrorJob::start(Arc::clone(source.device()), target, options).unwrap();
    let control = job.control();
    while control.progress().copied < 4 * MIB {
        assert!(!control.wait_timeout(Duration::from_millis(1)));
    }
    server.kill();
    while control.progress().state != JobState::Paused {
        assert!(!control.wait_timeout(Duration::from_millis(1)));
    }
    server.restart();
    control.set_speed(0).unwrap();
    loop {
        if control.progress().state == JobState::Paused {
            control.resume().unwrap();
        }
        if control.wait_timeout(Duration::from_millis(5)) {
            break;
        }
    }
    job.wait().unwrap();
    assert!(fs::read(server.path("image")).unwrap() == bytes);
}

/// An authority, a server's certificate for localhost and a client's, in `dir`.
fn certificates(dir: &Path) {
    let openssl = |line: &str| drop(run("openssl", dir, line.split(' ')).unwrap());
    openssl(
        "req -x509 -newkey rsa:2048 -nodes -keyout ca-key.pem -out ca-cert.pem -days 30 -subj /CN=authority",
    );
    for (name, usage) in [("server", "serverAuth"), ("client", "clientAuth")] {
        fs::write(
            dir.join("extensions"),
            format!("subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage={usage}\n"),
        )
        .unwrap();
        openssl(&format!(
            "req -newkey rsa:2048 -nodes -keyout {name}-key.pem -out {name}.csr -subj /CN={name}"
        ));
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -out {name}-cert.pem -days 30 -extfile extensions"
        ));
    }
}

fn with_tls(server: &Server, directory: &Path, name: &str) -> NbdUri {
    let mut uri = server.uri();
    uri.tls = true;
    uri.tls_certificates = Some(directory.to_owned());
    uri.tls_hostname = Some(name.to_owned());
    uri
}

#[test]
fn tls_with_certificates() {
    if !have("tls_with_certificates", &["qemu-nbd", "nbdkit"]) {
        return;
    }
    if run("openssl", Path::new("."), ["version"]).is_err() {
        blockmirror_testing::skip("tls_with_certificates", format_args!("openssl cannot be run"));
        return;
    }
    let pki = scratch().unwrap();
    certificates(pki.path());
    let directory = pki.path().display();
    let creds = format!("tls-creds-x509,id=tls0,endpoint=server,verify-peer=on,dir={directory}");
    let tls = format!("--tls-certificates={directory}");
    let servers = [
        Server::qemu_raw(2 * MIB, &["--object", &creds, "--tls-creds", "tls0"]),
        Server::nbdkit_memory(2 * MIB, &["--tls=require", &tls, "--tls-verify-peer"]),
    ];
    for (seed, server) in servers.iter().enumerate() {
        let open = |uri: NbdUri| blockmirror_nbd::ClientOptions::new(uri).writable(true).open();
        let disk = open(with_tls(server, pki.path(), "localhost")).unwrap();
        agrees_with_a_vector(&disk, seed as u64, 150);
        let disk = &disk;
        thread::scope(|scope| {
            for t in 0..4_u64 {
                scope.spawn(move || {
                    let data = noise(t, 300_000);
                    disk.write_at(&data, t * 400_000, WriteFlags::NONE).unwrap();
                    let mut back = vec![0; data.len()];
                    disk.read_at(&mut back, t * 400_000).unwrap();
                    assert!(back == data);
                });
            }
        });
        // Another name, no TLS, another authority, no certificate of our own.
        let error = open(with_tls(server, pki.path(), "elsewhere")).unwrap_err();
        assert!(matches!(cause(&error), ClientError::Tls(_)), "{error:?}");
        let error = open(server.uri()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error:?}");
        let other = scratch().unwrap();
        certificates(other.path());
        let error = open(with_tls(server, other.path(), "localhost")).unwrap_err();
        assert!(matches!(cause(&error), ClientError::Tls(_)), "{error:?}");
        let mut bare = TlsOptions::default();
        bare.accept_any_server = true;
        let mut uri = server.uri();
        uri.tls = true;
        let unnamed = blockmirror_nbd::ClientOptions::new(uri).tls(bare).open();
        assert!(unnamed.is_err(), "the server asks for a certificate");
    }
}

#[test]
fn tcp() {
    if !have("tcp", &["nbdkit"]) {
        return;
    }
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut child = std::process::Command::new("nbdkit")
        .args(["-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", &port.to_string(), "memory", "2M"])
        .spawn()
        .unwrap();
    let uri = NbdUri::tcp("127.0.0.1", port, "");
    assert_eq!(uri.address, NbdAddress::Tcp { host: "127.0.0.1".into(), port });
    let options = blockmirror_nbd::ClientOptions::new(uri).writable(true);
    let disk = options.open_timeout(Duration::from_secs(60)).open();
    let disk = disk.inspect_err(|_| drop(child.kill())).unwrap();
    agrees_with_a_vector(&disk, 3, 200);
    drop(disk);
    child.kill().unwrap();
    child.wait().unwrap();
}
