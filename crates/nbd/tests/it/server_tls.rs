//! TLS: what is said before it, who gets in, and that everything works through it.

#![cfg(feature = "tls")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use crate::common::{Mode, Peer, eventually};
use blockmirror_block::cancel::CancelSource;
use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::testing::{MemoryDisk, Rng};
use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, ExtentKind, Visit, WriteFlags, ZeroFlags};
use blockmirror_nbd::proto::{OptionCode, OptionReply, encode_option};
use blockmirror_nbd::server::{
    Export, Listener, Server, ServerError, ServerOptions, TlsPolicy, x509_credentials,
};
use blockmirror_nbd::{Client, ClientOptions, TlsOptions};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

const MIB: u64 = 1 << 20;

/// An authority, and folders with credentials of it as QEMU lays them out: `server`, `client`, and `stranger`
/// with those of another authority (but this one's own certificate, so that it trusts the server).
fn credentials(dir: &Path) {
    let authority = |name: &str| {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    };
    let (ours, theirs) = (authority("ours"), authority("theirs"));
    for (folder, issuer) in [("server", &ours), ("client", &ours), ("stranger", &theirs)] {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(vec!["localhost".into()]).unwrap().signed_by(&key, issuer).unwrap();
        let folder_path = dir.join(folder);
        std::fs::create_dir(&folder_path).unwrap();
        let kind = if folder == "server" { "server" } else { "client" };
        std::fs::write(folder_path.join("ca-cert.pem"), ours.pem()).unwrap();
        std::fs::write(folder_path.join(format!("{kind}-cert.pem")), cert.pem()).unwrap();
        std::fs::write(folder_path.join(format!("{kind}-key.pem")), key.serialize_pem()).unwrap();
    }
}

fn serve(dir: &Path, tls: TlsPolicy) -> Arc<Server> {
    let mut options = ServerOptions::default();
    options.tls = tls;
    let server = Server::new(options).unwrap();
    let disk = Arc::new(MemoryDisk::new(16 * MIB).with_cluster_size(65536));
    server.add(Export::new("disk", disk).writable(true)).unwrap();
    server.listen(Listener::unix(dir.join("nbd.sock")).unwrap()).unwrap();
    server
}

fn open(dir: &Path, folder: &str) -> blockmirror_block::Result<Client> {
    open_by(dir, folder, "nbd.sock", 2)
}

fn open_by(dir: &Path, folder: &str, socket: &str, connections: u16) -> blockmirror_block::Result<Client> {
    let uri = format!("nbds+unix:///disk?socket={}", dir.join(socket).display());
    let mut tls = TlsOptions::default();
    tls.directory = Some(dir.join(folder));
    tls.server_name = Some("localhost".into());
    ClientOptions::new(uri.parse().unwrap()).writable(true).connections(connections).tls(tls).open()
}

#[test]
fn everything_works_through_it() {
    let dir = tempfile::tempdir().unwrap();
    credentials(dir.path());
    let config = x509_credentials(&dir.path().join("server"), true).unwrap();
    let server = serve(dir.path(), TlsPolicy::Require(config));
    let disk = open(dir.path(), "client").unwrap();
    let mut rng = Rng::from_state(1);
    let data = rng.bytes(3 << 20);
    disk.write_at(&data, 12345, WriteFlags::FUA).unwrap();
    disk.write_zeroes(ByteRange::at(8 * MIB, MIB), ZeroFlags::MAY_UNMAP).unwrap();
    disk.flush().unwrap();
    let mut back = vec![0; data.len()];
    disk.read_at(&mut back, 12345).unwrap();
    assert!(back == data);
    let mut kinds = Vec::new();
    disk.extents(ByteRange::new(0, 16 * MIB), &mut |extent| {
        kinds.push(extent.kind == ExtentKind::Data);
        Visit::Continue(())
    })
    .unwrap();
    assert_eq!(kinds, [true, false]);
    // Many at once, from many threads: replies of workers and of readers mix on one session.
    std::thread::scope(|scope| {
        for t in 0..8u64 {
            let (disk, data) = (&disk, &data);
            scope.spawn(move || {
                let mut rng = Rng::from_state(t);
                for i in 0..60 {
                    let len =
                        usize::try_from(1 + rng.below(if i % 8 == 0 { 1 << 20 } else { 9000 })).unwrap();
                    let at = usize::try_from(rng.below((data.len() - len) as u64)).unwrap();
                    let mut buf = vec![0; len];
                    disk.read_at(&mut buf, 12345 + at as u64).unwrap();
                    assert!(buf == data[at..at + len]);
                    disk.write_at(&buf, 12345 + at as u64, WriteFlags::NONE).unwrap();
                }
            });
        }
    });
    drop(disk);
    eventually("the client gone", || server.connections() == 0 && server.memory_in_use() == 0);
    server.stop().unwrap();
}

#[test]
fn only_clients_of_the_authority_get_in_if_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    credentials(dir.path());
    let folder = dir.path().join("server");
    let server = serve(dir.path(), TlsPolicy::Require(x509_credentials(&folder, true).unwrap()));
    assert!(open(dir.path(), "stranger").is_err());
    assert!(open(dir.path(), "client").is_ok());
    server.stop().unwrap();
    // Where the server asks for no certificate, each client connects.
    let server = serve(dir.path(), TlsPolicy::Allow(x509_credentials(&folder, false).unwrap()));
    assert!(open(dir.path(), "stranger").is_ok());
    server.stop().unwrap();
}

#[test]
fn where_it_is_required_nothing_else_is_said_before_it() {
    let dir = tempfile::tempdir().unwrap();
    credentials(dir.path());
    let config = x509_credentials(&dir.path().join("server"), true).unwrap();
    let server = serve(dir.path(), TlsPolicy::Require(config));
    let mut peer = Peer::greeted(&server);
    for option in [OptionCode::List, OptionCode::Go, OptionCode::StructuredReply, OptionCode::Other(77)] {
        assert_eq!(peer.ask(option, &[])[0].0, OptionReply::ErrTlsReqd);
    }
    // The other side speaks no TLS after all.
    assert_eq!(peer.ask(OptionCode::StartTls, &[])[0].0, OptionReply::Ack);
    peer.write(&[0x55; 200]);
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut peer.stream, &mut rest);
    assert!(rest.len() < 100, "an alert at most");

    let mut peer = Peer::greeted(&server);
    let mut bytes = Vec::new();
    encode_option(&mut bytes, OptionCode::ExportName, b"disk");
    peer.write(&bytes);
    assert!(peer.is_closed());
    eventually("both gone", || server.connections() == 0);
    server.stop().unwrap();
}

#[test]
fn where_it_is_allowed_one_may_go_without() {
    let dir = tempfile::tempdir().unwrap();
    credentials(dir.path());
    let config = x509_credentials(&dir.path().join("server"), false).unwrap();
    let server = serve(dir.path(), TlsPolicy::Allow(config));
    let mut peer = Peer::ready(&server, Mode::Structured, &[]);
    assert!(peer.read_at(0, 512).is_ok());
    peer.disconnect();
    server.stop().unwrap();
}

#[test]
fn stopping_does_not_wait_for_a_deaf_client() {
    let dir = tempfile::tempdir().unwrap();
    credentials(dir.path());
    let config = x509_credentials(&dir.path().join("server"), false).unwrap();
    let server = serve(dir.path(), TlsPolicy::Require(config));
    let mut half = Peer::greeted(&server);
    assert_eq!(half.ask(OptionCode::StartTls, &[])[0].0, OptionReply::Ack);
    server.stop().unwrap();
    assert!(half.is_closed());
}

#[test]
fn credentials_that_cannot_be_used_say_which_file() {
    let dir = tempfile::tempdir().unwrap();
    credentials(dir.path());
    let folder = dir.path().join("server");
    let says = |file: &str| {
        let refused = x509_credentials(&folder, true).unwrap_err();
        assert!(matches!(refused, ServerError::Credentials { .. }));
        assert!(refused.to_string().contains(file), "{refused}");
    };
    std::fs::write(folder.join("ca-crl.pem"), "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")
        .unwrap();
    says("ca-");
    std::fs::write(folder.join("ca-cert.pem"), "nothing").unwrap();
    says("ca-cert.pem");
    std::fs::write(folder.join("server-key.pem"), "nothing").unwrap();
    says("server-key.pem");
    std::fs::remove_file(folder.join("server-cert.pem")).unwrap();
    says("server-cert.pem");
}

/// Passes bytes between a client and the server, those to the server only while it is open.
#[derive(Default)]
struct Passage {
    closed: Mutex<bool>,
    changed: Condvar,
}

impl Passage {
    fn set_closed(&self, closed: bool) {
        *self.closed.lock() = closed;
        self.changed.notify_all();
    }

    /// Serves one client at `at`; `stopped` is sent a message for each piece that has to wait.
    fn serve(self: &Arc<Self>, at: &Path, server: &Path, stopped: mpsc::Sender<()>) {
        let listener = UnixListener::bind(at).unwrap();
        let (passage, server) = (Arc::clone(self), server.to_owned());
        thread::spawn(move || {
            let client = listener.accept().unwrap().0;
            let server = UnixStream::connect(server).unwrap();
            let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut from, &mut to));
            let (mut from, mut to) = (client, server);
            let mut piece = vec![0; 4096];
            while let Ok(got @ 1..) = from.read(&mut piece) {
                let mut closed = passage.closed.lock();
                if *closed {
                    let _ = stopped.send(());
                }
                while *closed {
                    closed = passage.changed.wait(closed);
                }
                drop(closed);
                if to.write_all(&piece[..got]).is_err() {
                    return;
                }
            }
        });
    }
}

/// What the session has encrypted is sent as it is, and what comes after it is encrypted then: the server
/// gets the request as a whole.
#[test]
fn the_rest_of_a_request_whose_caller_is_cancelled_is_sent_by_a_thread() {
    let dir = tempfile::tempdir().unwrap();
    credentials(dir.path());
    let config = x509_credentials(&dir.path().join("server"), true).unwrap();
    let server = serve(dir.path(), TlsPolicy::Require(config));
    let passage = Arc::new(Passage::default());
    let (stopped, is_stopped) = mpsc::channel();
    passage.serve(&dir.path().join("passage"), &dir.path().join("nbd.sock"), stopped);
    let disk = Arc::new(open_by(dir.path(), "client", "passage", 1).unwrap());
    // More than any socket holds.
    let data = Rng::from_state(7).bytes(12 << 20);
    passage.set_closed(true);
    let job = CancelSource::new();
    let (left, has_left) = mpsc::channel();
    let (calls, writer, written) = (job.clone(), Arc::clone(&disk), data.clone());
    thread::spawn(move || {
        let _calls = calls.enter();
        left.send(writer.write_at(&written, 0, WriteFlags::NONE)).unwrap();
    });
    // It is being sent.
    is_stopped.recv_timeout(Duration::from_secs(60)).unwrap();
    job.cancel();
    let result = has_left.recv_timeout(Duration::from_secs(60)).expect("the caller stays");
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
    passage.set_closed(false);
    // Behind it, on the one connection that the passage takes.
    let (read, is_read) = mpsc::channel();
    let mut back = vec![0; data.len()];
    thread::spawn(move || {
        let result = disk.read_at(&mut back, 0).and_then(|()| disk.flush());
        read.send(result.map(|()| back)).unwrap();
    });
    let back = is_read.recv_timeout(Duration::from_secs(60)).expect("the rest was not sent");
    assert!(back.unwrap() == data);
    server.stop().unwrap();
}
