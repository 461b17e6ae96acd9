//! Peers that mean harm, or break off anywhere: the server says no or closes, and nothing is left behind.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::testing::{MemoryDisk, Rng};
use blockmirror_nbd::proto::{
    ClientFlags, Command, CommandFlags, InfoRequest, MetaContextRequest, OptionCode, PayloadFilter, Request,
    encode_option,
};
use blockmirror_nbd::server::Server;
use common::{MODES, Mode, Peer, eventually, serve};

const MIB: u64 = 1 << 20;

fn server() -> Arc<Server> {
    serve(Arc::new(MemoryDisk::new(8 * MIB)))
}

/// Sends without minding that the server may have closed, and reads whatever comes until it has nothing more
/// to say.
fn throw(peer: &mut Peer, bytes: &[u8]) {
    peer.stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    peer.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let _ = peer.stream.write_all(bytes);
    let mut sink = [0; 65536];
    while peer.stream.read(&mut sink).is_ok_and(|n| n > 0) {}
}

/// Everything a client says to read a little, cut into what it says at once.
fn conversation(mode: Mode) -> Vec<Vec<u8>> {
    let mut said = vec![(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).encode().to_vec()];
    let mut option = |code, payload: &[u8]| {
        let mut bytes = Vec::new();
        encode_option(&mut bytes, code, payload);
        said.push(bytes);
    };
    match mode {
        Mode::Simple => {}
        Mode::Structured => option(OptionCode::StructuredReply, &[]),
        Mode::Extended => option(OptionCode::ExtendedHeaders, &[]),
    }
    option(OptionCode::List, &[]);
    let contexts = MetaContextRequest { export: "disk", queries: vec!["base:allocation"] };
    option(OptionCode::SetMetaContext, &contexts.encode());
    option(OptionCode::Go, &InfoRequest { export: "disk", infos: vec![] }.encode());
    let mut request = |command, flags, offset, length| {
        let request = Request { flags, command, cookie: 5, offset, length };
        said.push(match mode {
            Mode::Extended => request.encode_extended().to_vec(),
            _ => request.encode_compact().unwrap().to_vec(),
        });
    };
    request(Command::Read, CommandFlags::NONE, 0, MIB);
    request(Command::Write, CommandFlags::NONE, 4096, 8192);
    said.push(vec![3; 8192]);
    let mut request = |command, flags, offset, length| {
        let request = Request { flags, command, cookie: 6, offset, length };
        said.push(match mode {
            Mode::Extended => request.encode_extended().to_vec(),
            _ => request.encode_compact().unwrap().to_vec(),
        });
    };
    request(Command::BlockStatus, CommandFlags::NONE, 0, MIB);
    if mode == Mode::Extended {
        let filter = PayloadFilter { length: MIB, ids: vec![0] }.encode();
        request(Command::BlockStatus, CommandFlags::PAYLOAD_LEN, 0, filter.len() as u64);
        said.push(filter);
    }
    said
}

fn works(server: &Server) {
    let mut peer = Peer::ready(server, Mode::Structured, &[]);
    assert!(peer.read_at(0, 4096).is_ok());
    peer.disconnect();
}

#[test]
fn garbage_from_the_first_byte() {
    let server = server();
    let mut rng = Rng::from_state(1);
    for _ in 0..200 {
        let n = usize::try_from(rng.below(300)).unwrap();
        let bytes = rng.bytes(n);
        throw(&mut Peer::connect(&server), &bytes);
    }
    works(&server);
}

#[test]
fn garbage_in_every_phase() {
    let server = server();
    let mut rng = Rng::from_state(2);
    for mode in MODES {
        let said = conversation(mode);
        for phase in 0..=said.len() {
            for _ in 0..8 {
                let mut bytes = said[..phase].concat();
                let n = usize::try_from(rng.below(100)).unwrap();
                bytes.extend(rng.bytes(n));
                throw(&mut Peer::connect(&server), &bytes);
            }
        }
    }
    works(&server);
    eventually("all gone", || server.connections() == 0 && server.memory_in_use() == 0);
}

#[test]
fn one_bit_wrong_anywhere() {
    let server = server();
    let mut rng = Rng::from_state(3);
    for mode in MODES {
        let said = conversation(mode).concat();
        // The payload of the write is long and means nothing.
        for _ in 0..150 {
            let mut bytes = said.clone();
            let at = usize::try_from(rng.below(300)).unwrap();
            bytes[at] ^= 1 << rng.below(8);
            throw(&mut Peer::connect(&server), &bytes);
        }
    }
    works(&server);
    eventually("all gone", || server.connections() == 0 && server.memory_in_use() == 0);
}

#[test]
fn absurd_lengths_are_refused() {
    let server = server();
    for length in [u32::MAX, 0x8000_0000, (32 << 20) + 1, 65537] {
        for option in 0..13u32 {
            let mut peer = Peer::greeted(&server);
            let mut bytes = b"IHAVEOPT".to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(length.to_be_bytes());
            throw(&mut peer, &bytes);
        }
    }
    for mode in MODES {
        for command in 0..9u16 {
            for length in [u64::MAX, 1 << 63, u64::from(u32::MAX), 1 << 40] {
                let mut peer = Peer::ready(&server, mode, &[]);
                let command = Command::from_wire(command);
                let flags =
                    [CommandFlags::NONE, CommandFlags::PAYLOAD_LEN, CommandFlags::from_bits(u16::MAX)];
                for flags in flags {
                    let request = Request { flags, command, cookie: 1, offset: 1, length };
                    let bytes = match mode {
                        Mode::Extended => request.encode_extended().to_vec(),
                        _ => match request.encode_compact() {
                            Some(bytes) => bytes.to_vec(),
                            None => continue,
                        },
                    };
                    throw(&mut peer, &bytes);
                }
            }
        }
    }
    works(&server);
    eventually("all gone", || server.connections() == 0 && server.memory_in_use() == 0);
}

fn threads_and_descriptors() -> (usize, usize) {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

/// Alone in this process but for the test's own threads, so that what it counts is the server's: see `main`
/// below.
fn ten_thousand_connections_leave_nothing_behind() {
    let server = server();
    works(&server);
    eventually("the first client's threads gone", || server.connections() == 0);
    std::thread::sleep(Duration::from_millis(50));
    let before = threads_and_descriptors();
    let mut rng = Rng::from_state(4);
    let mut open: Vec<UnixStream> = Vec::new();
    for i in 0..10_000 {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        server.serve(theirs).unwrap();
        let said = conversation(MODES[i % 3]).concat();
        // Mostly in the handshake, sometimes in the middle of requests.
        let most = if rng.below(4) == 0 { said.len() as u64 } else { 250 };
        let cut = usize::try_from(rng.below(most)).unwrap();
        let _ = ours.write_all(&said[..cut]);
        open.push(ours);
        // Up to 50 at the same time, closed in random order.
        if open.len() == 50 || rng.below(2) == 0 {
            let which = usize::try_from(rng.below(open.len() as u64)).unwrap();
            drop(open.swap_remove(which));
        }
    }
    drop(open);
    eventually("all connections gone", || server.connections() == 0 && server.memory_in_use() == 0);
    eventually("threads and descriptors as before", || {
        let (threads, descriptors) = threads_and_descriptors();
        threads <= before.0 && descriptors <= before.1
    });
    works(&server);
}

#[test]
fn ten_thousand_connections() {
    // Counting threads and descriptors needs a process without other tests.
    const ALONE: &str = "BLOCKMIRROR_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return ten_thousand_connections_leave_nothing_behind();
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "ten_thousand_connections", "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}
