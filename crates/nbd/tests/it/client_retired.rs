//! Two connections, one of which is lost: what becomes of a request in flight on the other.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::fake::{Export, Fake, Peer};
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_nbd::Client;
use blockmirror_nbd::proto::{Command, Request, TransmissionFlags};

/// A read there loses its connection.
const LOSES: u64 = 1 << 16;
/// What a write that is held writes, and a later one.
const HELD: u8 = 1;
const LATER: u8 = 2;

/// A server that holds a write until a connection was lost.
#[derive(Clone)]
struct Server {
    disk: Arc<Mutex<Vec<u8>>>,
    /// The second connection has got a request.
    second_is_used: Arc<AtomicBool>,
    is_lost: Arc<AtomicBool>,
    later_is_done: Arc<AtomicBool>,
    /// Reports that a request is held, and that it was performed.
    held: Sender<()>,
}

impl Server {
    fn new() -> (Self, Fake, Receiver<()>) {
        let (held, is_held) = channel();
        let disk = Arc::new(Mutex::new(vec![0; Export::new().size as usize]));
        let flags = [(); 3].map(|()| Arc::new(AtomicBool::new(false)));
        let [second_is_used, is_lost, later_is_done] = flags;
        let server = Self { disk, second_is_used, is_lost, later_is_done, held };
        let theirs = server.clone();
        let fake = Fake::new(move |number, mut peer| theirs.serve(number, &mut peer));
        (server, fake, is_held)
    }

    fn serve(&self, number: usize, peer: &mut Peer) {
        let flags = Export::new().flags | TransmissionFlags::CAN_MULTI_CONN;
        if peer.handshake(&Export { flags, ..Export::new() }).is_none() {
            return;
        }
        while let Some((request, payload)) = peer.request() {
            self.second_is_used.fetch_or(number == 1, Ordering::SeqCst);
            if request.command == Command::Read && request.offset == LOSES && number < 2 {
                self.is_lost.store(true, Ordering::SeqCst);
                return peer.stream.shutdown(Shutdown::Both).unwrap();
            }
            let is_later = payload.first() == Some(&LATER);
            if request.command != Command::Write || number > 1 || is_later {
                self.perform(peer, &request, &payload);
                self.later_is_done.fetch_or(is_later, Ordering::SeqCst);
                continue;
            }
            let _ = self.held.send(());
            let mut peer = Peer { stream: peer.stream.try_clone().unwrap(), ..*peer };
            let server = self.clone();
            thread::spawn(move || server.hold(&mut peer, &request, &payload));
        }
    }

    fn hold(&self, peer: &mut Peer, request: &Request, payload: &[u8]) {
        while !self.is_lost.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        // For as long as a client that does not wait for the answer takes to do the later write. With one
        // that waits this costs time, and changes nothing.
        for _ in 0..500 {
            if self.later_is_done.load(Ordering::SeqCst) {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        self.perform(peer, request, payload);
        let _ = self.held.send(());
    }

    fn perform(&self, peer: &mut Peer, request: &Request, payload: &[u8]) {
        let range = request.offset as usize..(request.offset + request.length) as usize;
        match request.command {
            Command::Read => {
                let bytes = self.disk.lock().unwrap()[range].to_vec();
                peer.data(request.cookie, request.offset, &bytes, true);
            }
            Command::Write => {
                self.disk.lock().unwrap()[range].copy_from_slice(payload);
                peer.ok(request.cookie);
            }
            _ => peer.ok(request.cookie),
        }
    }

    /// Has `client` lose its second connection while `request` is held on the first.
    fn lose_beside(&self, client: &Client, is_held: &Receiver<()>, request: impl FnOnce() + Send) {
        let wait = || is_held.recv_timeout(Duration::from_secs(60)).unwrap();
        thread::scope(|scope| {
            scope.spawn(request);
            wait();
            // With a request in flight on the first connection the client makes another, and prefers that.
            while !self.second_is_used.load(Ordering::SeqCst) {
                client.read_at(&mut [0; 512], 0).unwrap();
            }
            client.read_at(&mut [0; 512], LOSES).unwrap();
        });
        wait();
    }
}

fn open(fake: &Fake) -> Client {
    fake.options().connections(2).reconnect_delay(Duration::from_secs(600)).open().unwrap()
}

/// The write was repeated as well, on a new connection. The server performed the first of the two late: over
/// what a later write had put there.
#[test]
fn a_write_beside_a_lost_connection_does_not_land_on_a_later_one() {
    let (server, fake, is_held) = Server::new();
    let client = open(&fake);
    server.lose_beside(&client, &is_held, || {
        client.write_at(&[HELD; 512], 4096, WriteFlags::NONE).unwrap();
        client.write_at(&[LATER; 512], 4096, WriteFlags::NONE).unwrap();
    });
    assert_eq!(server.disk.lock().unwrap()[4096..4608], [LATER; 512]);
}
