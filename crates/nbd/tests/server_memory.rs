//! What clients can make the server hold, measured in a process of its own: one test only in this file, one
//! thing after the other.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::sync::Arc;

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{BlockDevice, ByteRange, Result, Visit, WriteFlags};
use blockmirror_nbd::proto::{Command, CommandFlags, Request};
use blockmirror_nbd::server::{Export, MetaContext, Server, ServerOptions};
use common::{Mode, Peer, Piece, eventually};

const MIB: u64 = 1 << 20;

/// Every other sector is dirty.
struct Sectors;

impl MetaContext for Sectors {
    fn name(&self) -> &'static str {
        "x:sectors"
    }

    fn visit(&self, range: ByteRange, visit: &mut dyn FnMut(ByteRange, u32) -> Visit) -> Result<()> {
        for (i, piece) in (0..).zip(range.pieces(512)) {
            if visit(piece, i % 2).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// Pages of this process in memory, in bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn what_clients_make_the_server_hold_is_bounded() {
    a_flood_of_status_requests_holds_a_bounded_amount();
    clients_that_do_not_read_hold_a_bounded_amount_and_leave_nothing_behind();
}

/// 100 clients that ask for 6400 MiB and read nothing. It once held 1409 MiB, and 304 MiB when they had gone:
/// the allocator has arenas for each thread, and kept what it got back.
fn clients_that_do_not_read_hold_a_bounded_amount_and_leave_nothing_behind() {
    let options = ServerOptions::default();
    let limit = options.memory;
    let server = Server::new(options).unwrap();
    let disk = MemoryDisk::new(64 * MIB);
    for i in 0..64 {
        disk.write_at(&vec![1; 1 << 20], i * MIB, WriteFlags::NONE).unwrap();
    }
    server.add(Export::new("disk", Arc::new(disk))).unwrap();
    let before = resident();
    for round in 0..3 {
        let mut peers: Vec<Peer> = (0..100).map(|_| Peer::ready(&server, Mode::Simple, &[])).collect();
        for peer in &mut peers {
            for i in 0..64 {
                peer.send(Command::Read, CommandFlags::NONE, i * MIB, MIB);
            }
        }
        let mut most = 0;
        let (mut last, mut same) = (0, 0);
        // Until no request gets on any more.
        eventually("all of it in use", || {
            most = most.max(resident());
            same = if server.memory_in_use() == last { same + 1 } else { 0 };
            last = server.memory_in_use();
            same == 200 && last > limit / 2
        });
        assert!(last <= limit, "round {round}: {last} bytes lent");
        let held = most.saturating_sub(before);
        assert!(held <= limit + 64 * MIB, "round {round}: {} MiB resident", held / MIB);
        drop(peers);
        eventually("all gone", || server.connections() == 0);
        eventually("memory given back", || resident() < before + 64 * MIB);
    }
}

/// Short requests for long answers, which are read slowly: a server that answered them all at once would hold
/// 768 MiB. (With answers of up to a megabyte, made by one thread and freed by another, it held 250 of the
/// first 1000: the allocator kept most of what it got back.)
fn a_flood_of_status_requests_holds_a_bounded_amount() {
    let server = Server::new(ServerOptions::default()).unwrap();
    server.add(Export::new("disk", Arc::new(MemoryDisk::new(64 * MIB))).context(Arc::new(Sectors))).unwrap();
    let mut peer = Peer::ready(&server, Mode::Extended, &["x:sectors"]);
    let request = |cookie| {
        let command = Command::BlockStatus;
        let request = Request { flags: CommandFlags::NONE, command, cookie, offset: 0, length: 64 * MIB };
        request.encode_extended()
    };
    let mut sender = peer.stream.try_clone().unwrap();
    // As fast as the server takes them.
    let sending = std::thread::spawn(move || {
        let bytes: Vec<u8> = (0..6000).flat_map(request).collect();
        std::io::Write::write_all(&mut sender, &bytes).unwrap();
    });
    let before = resident();
    for _ in 0..6000 {
        let (_, piece, _) = peer.receive(0);
        assert!(matches!(piece, Piece::Status(status) if status.descriptors.len() == 8192));
        assert!(resident() < before + 300 * MIB);
    }
    sending.join().unwrap();
    peer.disconnect();
}
