//! Files and servers that hang, below one node: QMP answers for the others.

mod bitmaps;
mod opened_meanwhile;

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{ByteRange, Result, Storage, StorageExtent, StorageInfo, Visit, ZeroFlags};

use super::*;
use crate::Startup;

/// A test that hangs fails.
const GUARD: Duration = Duration::from_secs(300);

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

    /// One that holds `contents` and does not hang yet.
    fn holding(contents: &[u8]) -> Arc<Self> {
        let hung = Self::new();
        hung.set_free(true);
        hung.bytes.write_at(contents, 0).unwrap();
        hung.bytes.set_len(contents.len() as u64).unwrap();
        hung
    }

    fn set_free(&self, free: bool) {
        *self.free.lock() = free;
        self.asked.store(0, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Waits until it keeps a caller waiting.
    fn wait_for_caller(&self) {
        let until = Instant::now() + GUARD;
        while self.asked.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < until, "it was not asked");
            std::thread::yield_now();
        }
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
    client.daemon.services.context.graph.lock().get_mut("h").unwrap().storage = Some(Arc::clone(&hung) as _);
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
    one.daemon.services.context.graph.lock().get_mut("f").unwrap().storage = Some(Arc::clone(&hung) as _);
    one.send("blockdev-del", json!({"node-name": "r"}));
    hung.wait_for_caller();
    other.run("query-block-exports", json!({}));
    other.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": SIZE}));
    other.run("block_resize", json!({"node-name": "f", "size": SIZE}));
    other.run("blockdev-del", json!({"node-name": "n"}));
    *hung.free.lock() = true;
    hung.changed.notify_all();
    assert_eq!(one.read()["return"], json!({}));
}

/// A request was waited for as long as the server's host acknowledged.
#[test]
fn a_server_that_does_not_answer_within_the_io_timeout_counts_as_lost() {
    let client = Client::new();
    let mut client = client.beside();
    let hung = client.chain_that_hangs(true);
    let path = client.path("nbd");
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path}}}));
    client.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "ht"}));
    client.run(
        "blockdev-add",
        json!({
            "driver": "nbd", "node-name": "n", "server": {"type": "unix", "path": path}, "export": "ht",
            "read-only": true, "io-timeout": 1,
        }),
    );
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("n").unwrap().tap);
    hung[1].set_free(false);
    let (failed, has_failed) = mpsc::channel();
    std::thread::spawn(move || failed.send(tap.read_at(&mut [0; 512], 2 << 16)));
    let error = has_failed.recv_timeout(GUARD).expect("it waits for the server").unwrap_err();
    hung[1].set_free(true);
    assert!(error.to_string().contains("did not answer within 1s"), "{error}");
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
    is_done.recv_timeout(GUARD).unwrap();
}

impl Client {
    /// Images hb <- ht in files that can hang. `hb` is read-only, and `ht` too if that is asked for.
    fn chain_that_hangs(&mut self, read_only: bool) -> [Arc<Hung>; 2] {
        self.image("hb", 1, None);
        self.image("ht", 2, Some("hb"));
        [("hb", true, Value::Null), ("ht", read_only, json!("hb"))].map(|(name, read_only, backing)| {
            let file = format!("f{name}");
            let path = self.path(name);
            self.run("blockdev-add", json!({"driver": "file", "node-name": file, "filename": path}));
            let hung = Hung::holding(&std::fs::read(path).unwrap());
            self.daemon.services.context.graph.lock().get_mut(&file).unwrap().storage = Some(Arc::clone(&hung) as _);
            let node = json!({
                "driver": "qcow2", "node-name": name, "file": file, "backing": backing, "read-only": read_only,
            });
            self.run("blockdev-add", node);
            hung
        })
    }

    /// Commands of every kind that changes something, about nodes of its own.
    fn change_all_kinds(&mut self) {
        self.chain();
        self.run("query-named-block-nodes", json!({}));
        let snapshot = |client: &Client, node: &str, name: &str| {
            let path = client.path(&format!("{name}.qcow2"));
            json!({"node-name": node, "snapshot-file": path, "snapshot-node-name": name})
        };
        let first = snapshot(self, "top", "s1");
        self.run("blockdev-snapshot-sync", first);
        let second = json!({"type": "blockdev-snapshot-sync", "data": snapshot(self, "s1", "s2")});
        self.run("transaction", json!({"actions": [second]}));
        self.image("s3.qcow2", 9, None);
        self.add("s3", "s3.qcow2", Value::Null);
        self.run("blockdev-snapshot", json!({"node": "s2", "overlay": "s3"}));
        self.run("block-stream", json!({"job-id": "s", "device": "s3", "base-node": "s1"}));
        self.wait_for_status("null");
        self.run("block-commit", json!({"job-id": "c", "device": "s3", "top-node": "top"}));
        self.wait_for_status("null");
        self.run("block-commit", json!({"job-id": "a", "device": "s3", "base-node": "base"}));
        self.wait("BLOCK_JOB_READY");
        self.run("job-complete", json!({"id": "a"}));
        self.wait_for_status("null");
        self.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": self.path("nbd")}}}));
        self.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "base", "name": "e"}));
        self.run("block-export-del", json!({"id": "e"}));
        self.run("nbd-server-stop", json!({}));
        self.run("block-dirty-bitmap-add", json!({"node": "base", "name": "b"}));
        self.image("own.qcow2", 5, None);
        self.add("own", "own.qcow2", Value::Null);
        self.run("block_resize", json!({"node-name": "own", "size": 2 * SIZE}));
        let target = self.path("d.qcow2");
        self.run("drive-mirror", json!({"job-id": "d", "device": "own", "target": target, "sync": "full"}));
        self.wait("BLOCK_JOB_READY");
        self.run("block-job-cancel", json!({"device": "d"}));
        self.wait_for_status("null");
        let file = json!({"driver": "file", "filename": self.path("own.qcow2")});
        let options = json!({"driver": "qcow2", "node-name": "own", "file": file, "read-only": true});
        self.run("blockdev-reopen", json!({"options": [options]}));
        self.run("human-monitor-command", json!({"command-line": "qemu-io base \"read 0 512\""}));
        let create = json!({"driver": "file", "filename": self.path("new"), "size": 512});
        self.run("blockdev-create", json!({"job-id": "n", "options": create}));
        self.wait_for_status("concluded");
        self.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
        self.run("object-del", json!({"id": "g"}));
        self.run("blockdev-del", json!({"node-name": "s3"}));
        self.run("query-named-block-nodes", json!({}));
        self.run("query-jobs", json!({}));
    }
}

/// A command about a node whose file hangs kept every command waiting that changes something.
#[test]
fn a_command_that_hangs_keeps_no_others_nodes_waiting() {
    type Hanging = (&'static str, fn(&Client) -> Value);
    let commands: [Hanging; 9] = [
        ("block-stream", |_| json!({"job-id": "j", "device": "ht"})),
        ("block-commit", |_| json!({"job-id": "j", "device": "ht"})),
        ("change-backing-file", |_| json!({"device": "ht", "image-node-name": "ht", "backing-file": "hb"})),
        ("blockdev-reopen", |_| {
            let options = json!({"driver": "qcow2", "node-name": "ht", "file": "fht", "backing": "hb"});
            json!({"options": [options]})
        }),
        ("block_resize", |_| json!({"node-name": "ht", "size": 2 * SIZE})),
        ("blockdev-snapshot", |_| json!({"node": "ht", "overlay": "ov"})),
        (
            "blockdev-snapshot-sync",
            |client| json!({"node-name": "ht", "snapshot-file": client.path("os"), "snapshot-node-name": "os"}),
        ),
        ("transaction", |_| {
            let data = json!({"node": "ht", "overlay": "ov"});
            json!({"actions": [{"type": "blockdev-snapshot", "data": data}]})
        }),
        ("human-monitor-command", |_| json!({"command-line": "qemu-io ht flush"})),
    ];
    for (command, arguments) in commands {
        let client = Client::new();
        let (mut one, mut other) = (client.beside(), client.beside());
        // A read-only image is opened for writing.
        let read_only = matches!(command, "block-stream" | "change-backing-file" | "blockdev-reopen");
        let hung = one.chain_that_hangs(read_only);
        one.image("ov", 9, None);
        one.add("ov", "ov", Value::Null);
        if !read_only {
            let tap = Arc::clone(&one.daemon.services.context.graph.lock().find("ht").unwrap().tap);
            tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
        }
        hung.iter().for_each(|file| file.set_free(false));
        one.send(command, arguments(&one));
        let base_hangs = command == "block-commit";
        hung[usize::from(!base_hangs)].wait_for_caller();
        other.change_all_kinds();
        hung.iter().for_each(|file| file.set_free(true));
        let answer = loop {
            let line = one.read();
            if line.get("event").is_none() {
                break line;
            }
        };
        assert!(answer.get("return").is_some(), "{command}: {answer}");
    }
}

/// Two commands with one job's name, about nodes that have nothing to do with each other.
#[test]
fn a_name_of_a_job_is_taken_while_its_command_hangs() {
    let client = Client::new();
    let (mut one, mut other) = (client.beside(), client.beside());
    let hung = one.chain_that_hangs(true);
    other.chain();
    hung[1].set_free(false);
    one.send("block-stream", json!({"job-id": "j", "device": "ht"}));
    hung[1].wait_for_caller();
    let said = other.refused("block-stream", json!({"job-id": "j", "device": "top"}));
    assert_eq!(said, "Job ID 'j' already in use");
    hung[1].set_free(true);
}
