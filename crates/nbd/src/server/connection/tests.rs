//! Connections that are read by the test itself, without an epoll set and workers.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use blockmirror_block::testing::{FaultDisk, Faults, MemoryDisk, OpKind};

use super::*;
use crate::proto::{CommandFlags, ReplyFormat};
use crate::server::connection_limit::ConnectionLimit;
use crate::server::memory::Memory;
use crate::server::socket::Socket;
use crate::server::{Export, ServerOptions};

const MIB: usize = 1 << 20;

struct Ignored;

impl Waiter for Ignored {
    fn resume(self: Arc<Self>) {}
}

/// A client, and its connection to an export of `device` with buffers from `memory`.
fn connected(device: Arc<dyn BlockDevice>, memory: &Arc<Memory>) -> (UnixStream, Arc<Connection>) {
    let size = device.len();
    let params =
        NegotiatedParams { format: ReplyFormat::Simple, size, writable: false, contexts: Vec::new() };
    let export = Export::new("disk", device);
    let workers = ServerOptions::default().workers;
    let runtime = ExportRuntime::new(export, Arc::clone(memory), workers, None).unwrap();
    let permit = ConnectionLimit::new(1, Box::new(|| {})).acquire(Instant::now()).unwrap();
    let (client, theirs) = UnixStream::pair().unwrap();
    let transport = Transport::plain(Arc::new(Socket::new(theirs.into())));
    (client, Connection::new(1, transport, params, runtime, permit))
}

fn send_read(client: &mut UnixStream, length: usize) {
    let (flags, command) = (CommandFlags::NONE, Command::Read);
    let request = Request { flags, command, cookie: 1, offset: 0, length: length as u64 };
    client.write_all(&request.encode_compact().unwrap()).unwrap();
}

/// Its end was once read only when memory was freed.
#[test]
fn a_connection_that_fails_while_it_is_being_read_is_not_left_backpressured() {
    let memory = Memory::new(4 * MIB as u64, 1);
    let all = Account::new(&memory).alloc(2 * MIB, &Arc::new(Ignored));
    let faults = Faults::new();
    let disk = FaultDisk::new(Arc::new(MemoryDisk::new(4 * MIB as u64)), faults.clone());
    let (mut client, connection) = connected(Arc::new(disk), &memory);
    // Keeps it from closing: it is in no epoll set.
    assert!(connection.admit(0, false));
    // The reader runs the first itself, and finds no room for the second.
    send_read(&mut client, 512);
    send_read(&mut client, 4 * MIB);
    let gate = faults.hold(OpKind::Read, None);
    std::thread::scope(|scope| {
        scope.spawn(|| connection.read(&mut Scratch::default()));
        gate.wait_held(1);
        connection.fail();
        gate.open();
    });
    assert_eq!(connection.state.lock().reading, Reading::Ended);
    drop(all);
}

#[test]
fn nothing_is_reserved_for_a_connection_that_has_ended() {
    let memory = Memory::new(4 * MIB as u64, 1);
    let all = Account::new(&memory).alloc(2 * MIB, &Arc::new(Ignored));
    let (mut client, connection) = connected(Arc::new(MemoryDisk::new(4 * MIB as u64)), &memory);
    send_read(&mut client, 4 * MIB);
    let (mut decoder, mut scratch) = (RequestDecoder::default(), Scratch::default());
    assert_eq!(decoder.read_some(&connection, &mut scratch), ReadOutcome::Backpressured);
    assert!(memory.lacking(Instant::now()).is_some());
    connection.fail();
    assert_eq!(decoder.read_some(&connection, &mut scratch), ReadOutcome::End);
    assert_eq!(memory.lacking(Instant::now()), None);
    drop(all);
}
