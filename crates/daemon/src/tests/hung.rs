//! Files and servers that hang, below one node: QMP answers for the others.

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{ByteRange, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags};

use super::*;
use crate::Startup;

/// A test that hangs fails.
const GUARD: Duration = Duration::from_secs(30);

/// A file of which the host tells nothing until it is let free.
#[derive(Debug)]
struct Hung {
    bytes: MemoryStorage,
    free: Mutex<bool>,
    changed: Condvar,
    asked: AtomicUsize,
}

impl Hung {
    fn new() -> Arc<Self> {
        let bytes = MemoryStorage::new();
        bytes.set_len(SIZE).unwrap();
        Arc::new(Self { bytes, free: Mutex::new(false), changed: Condvar::new(), asked: AtomicUsize::new(0) })
    }

    fn hang(&self) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut free = self.free.lock();
        while !*free {
            free = self.changed.wait(free);
        }
    }
}

impl Storage for Hung {
    fn len(&self) -> Result<u64> {
        self.hang();
        self.bytes.len()
    }

    fn info(&self) -> StorageInfo {
        self.bytes.info()
    }

    fn name(&self) -> &str {
        "hung"
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.hang();
        self.bytes.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.hang();
        self.bytes.write_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.hang();
        self.bytes.set_len(len)
    }

    fn flush(&self) -> Result<()> {
        self.hang();
        self.bytes.flush()
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.bytes.write_zeroes(range, flags)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.bytes.discard(range)
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.bytes.allocate(range)
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.bytes.extents(range, visit)
    }

    fn allocated_bytes(&self) -> Result<Option<u64>> {
        self.hang();
        Ok(Some(4096))
    }
}

impl Client {
    /// Another client of the same daemon.
    fn beside(&self) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(GUARD)).unwrap();
        self.daemon.monitors().serve(Connection::unix(theirs).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let daemon = Arc::clone(&self.daemon);
        let mut client = Self { daemon, socket: BufReader::new(ours), events: Vec::new(), dir };
        client.read();
        client.run("qmp_capabilities", json!({}));
        client
    }

    fn send(&mut self, command: &str, arguments: Value) {
        let request = json!({"execute": command, "arguments": arguments});
        self.socket.get_mut().write_all(request.to_string().as_bytes()).unwrap();
    }

    fn add_file(&mut self, name: &str) {
        std::fs::write(self.path(name), vec![1; SIZE as usize]).unwrap();
        let path = self.path(name);
        self.run("blockdev-add", json!({"driver": "file", "node-name": name, "filename": path}));
    }
}

/// One file was asked for its length after the other, all under the graph's lock: the query hung, and all
/// else with it.
#[test]
fn a_query_answers_beside_a_file_that_hangs() {
    let client = Client::new();
    let mut client = client.beside();
    for name in ["a", "h", "z"] {
        client.add_file(name);
    }
    client.run("query-named-block-nodes", json!({}));
    let hung = Hung::new();
    client.daemon.graph.lock().get_mut("h").unwrap().storage = Some(Arc::clone(&hung) as _);
    for _ in 0..5 {
        let nodes = client.run("query-named-block-nodes", json!({}));
        let nodes = nodes.as_array().unwrap();
        assert_eq!(nodes.len(), 3);
        // Of the one that hangs, too, what it said last.
        assert!(
            nodes
                .iter()
                .all(|node| node["image"]["virtual-size"] == SIZE && node["image"]["actual-size"].is_u64())
        );
    }
    assert_eq!(hung.asked.load(Ordering::SeqCst), 1, "one thread waits for it, however many queries");
    // The others are added, mirrored, deleted meanwhile.
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "t", "size": SIZE}));
    client.run("blockdev-mirror", json!({"job-id": "j", "device": "a", "target": "t", "sync": "full"}));
    client.wait("BLOCK_JOB_READY");
    client.run("job-complete", json!({"id": "j"}));
    client.wait("BLOCK_JOB_COMPLETED");
    client.run("blockdev-del", json!({"node-name": "z"}));
    *hung.free.lock() = true;
    hung.changed.notify_all();
}

/// A file that is asked for its length when its user goes hangs that command alone.
#[test]
fn lengths_are_asked_for_under_no_lock() {
    let client = Client::new();
    let (mut one, mut other) = (client.beside(), client.beside());
    one.add_file("f");
    one.run("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"}));
    let hung = Hung::new();
    one.daemon.graph.lock().get_mut("f").unwrap().storage = Some(Arc::clone(&hung) as _);
    one.send("blockdev-del", json!({"node-name": "r"}));
    let until = Instant::now() + GUARD;
    while hung.asked.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < until, "it was not asked");
        std::thread::yield_now();
    }
    other.run("query-block-exports", json!({}));
    other.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": SIZE}));
    other.run("block_resize", json!({"node-name": "f", "size": SIZE}));
    other.run("blockdev-del", json!({"node-name": "n"}));
    *hung.free.lock() = true;
    hung.changed.notify_all();
    assert_eq!(one.read()["return"], json!({}));
}

/// Opening what hangs took the lock that all commands take.
#[test]
fn a_server_that_never_answers_keeps_only_who_opens_it_waiting() {
    let client = Client::new();
    let (mut one, mut other) = (client.beside(), client.beside());
    let path = client.path("silent");
    let _silent = UnixListener::bind(&path).unwrap();
    let node = json!({"driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": path}});
    one.send("blockdev-add", node);
    for round in 0..20 {
        other.add_file(&format!("f{round}"));
        other.run("query-named-block-nodes", json!({}));
        other.run("blockdev-del", json!({"node-name": format!("f{round}")}));
    }
    // It takes the name; the second is refused, and closed.
    other.run("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
}

/// The same at the start, with the end.
#[test]
fn a_daemon_serves_and_ends_beside_a_server_that_never_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (silent, monitor) = (dir.path().join("silent"), dir.path().join("qmp"));
    let _silent = UnixListener::bind(&silent).unwrap();
    let mut startup = Startup::default();
    startup.blockdevs.push("null-co,node-name=before,size=1048576".to_owned());
    startup.blockdevs.push(format!("nbd,node-name=n,server.type=unix,server.path={}", silent.display()));
    startup.chardevs.push(format!("socket,id=c,path={},server=on,wait=off", monitor.display()));
    startup.monitors.push("c".to_owned());
    let daemon = Daemon::new(Vec::new());
    startup.apply(&daemon).unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let run = {
        let (daemon, ended) = (Arc::clone(&daemon), Arc::clone(&ended));
        std::thread::spawn(move || {
            daemon.run();
            ended.store(true, Ordering::SeqCst);
        })
    };
    let socket = UnixStream::connect(&monitor).unwrap();
    socket.set_read_timeout(Some(GUARD)).unwrap();
    let mut client = Client { daemon, socket: BufReader::new(socket), events: Vec::new(), dir };
    client.read();
    client.run("qmp_capabilities", json!({}));
    let nodes = client.run("query-named-block-nodes", json!({}));
    assert_eq!(nodes[0]["node-name"], "before");
    client.run("quit", json!({}));
    run.join().unwrap();
    assert!(ended.load(Ordering::SeqCst));
}

/// At the end a disk that hangs is waited for as long as is said, whatever uses it.
#[test]
fn a_daemon_ends_beside_a_disk_that_hangs() {
    let client = Client::new();
    let mut client = client.beside();
    let hour = 3_600_000_000_000_u64;
    client.run(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "slow", "size": SIZE, "latency-ns": hour}),
    );
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "t", "size": SIZE}));
    client.run("blockdev-mirror", json!({"job-id": "j", "device": "slow", "target": "t", "sync": "full"}));
    let (done, is_done) = std::sync::mpsc::channel();
    let daemon = Arc::clone(&client.daemon);
    std::thread::spawn(move || {
        daemon.run();
        let _ = done.send(());
    });
    client.run("quit", json!({}));
    is_done.recv_timeout(Duration::from_secs(10)).unwrap();
}
