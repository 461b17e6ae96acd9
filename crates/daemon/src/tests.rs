//! Commands as a client gives them, on images in a directory of their own. Answers are checked against the
//! schema.

mod as_qemu;
mod bitmaps;
mod chain;
mod claims;
mod created;
mod edge;
mod endless;
mod ends;
mod filter_chains;
mod filters;
mod hmp;
mod host;
mod hung;
mod internal_snapshot;
mod live_log;
mod objects;
mod overlap_check;
mod overlay;
mod parts;
mod persistent;
mod references;
mod reflink;
mod reopen;
mod resize;
mod resume;
mod schema;
mod shallow_copy;
mod shared;
mod steps;
mod transaction;
mod windows;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_image::{CreateSettings, CreateSpec, Format, NewImage, OpenOptions, ReferencePolicy};
use blockmirror_qmp::Connection;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Daemon;

const SIZE: u64 = 1 << 20;
/// How long an answer or an event may take.
const GUARD: Duration = Duration::from_secs(120);

struct Client {
    daemon: Arc<Daemon>,
    socket: BufReader<UnixStream>,
    events: Vec<Value>,
    dir: TempDir,
}

impl Client {
    fn new() -> Self {
        let daemon = Daemon::new(Vec::new());
        let (ours, theirs) = UnixStream::pair().unwrap();
        // A test that hangs fails.
        ours.set_read_timeout(Some(GUARD)).unwrap();
        daemon.monitors().serve(Connection::unix(theirs).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut client = Self { daemon, socket: BufReader::new(ours), events: Vec::new(), dir };
        client.read();
        client.run("qmp_capabilities", json!({}));
        client
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.socket.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let request = json!({"execute": command, "arguments": arguments});
        self.socket.get_mut().write_all(request.to_string().as_bytes()).unwrap();
        loop {
            let answer = self.read();
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            } else {
                return Err(answer["error"]["desc"].as_str().unwrap().to_owned());
            }
        }
    }

    fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.ask(command, arguments).unwrap()
    }

    fn refused(&mut self, command: &str, arguments: Value) -> String {
        self.ask(command, arguments).unwrap_err()
    }

    /// Waits for an event and returns its data.
    fn wait(&mut self, event: &str) -> Value {
        loop {
            let found = self.events.iter().position(|e| e["event"] == event);
            if let Some(index) = found {
                return self.events.drain(..=index).next_back().unwrap()["data"].clone();
            }
            let next = self.read();
            self.events.push(next);
        }
    }

    fn wait_for_status(&mut self, status: &str) {
        while self.wait("JOB_STATUS_CHANGE")["status"] != status {}
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image whose block number `block` of 64 KiB is full of that byte.
    fn image(&self, name: &str, block: u8, backing: Option<&str>) {
        self.image_under(ReferencePolicy::beside(&self.path(name)).unwrap(), name, block, backing);
    }

    /// The same, with a chain that `policy` allows.
    fn image_under(&self, policy: ReferencePolicy, name: &str, block: u8, backing: Option<&str>) {
        let mut settings = CreateSettings::default();
        settings.backing_file = backing.map(str::to_owned);
        settings.backing_format = backing.map(|_| Format::Qcow2);
        let spec = CreateSpec::new(Format::Qcow2, SIZE, settings);
        NewImage::create(self.path(name), &spec).unwrap().persist().unwrap();
        let options = OpenOptions::new().writable(true);
        let image = options.policy(policy).open(self.path(name)).unwrap();
        image.device().write_at(&[block; 65536], u64::from(block) << 16, WriteFlags::NONE).unwrap();
        image.device().flush().unwrap();
    }

    fn add(&mut self, name: &str, file: &str, backing: Value) {
        let file = json!({"driver": "file", "filename": self.path(file)});
        self.run(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing}),
        );
    }

    /// base <- mid <- top, each with a block of its own.
    fn chain(&mut self) {
        self.image("base.qcow2", 1, None);
        self.image("mid.qcow2", 2, Some("base.qcow2"));
        self.image("top.qcow2", 3, Some("mid.qcow2"));
        self.add("base", "base.qcow2", Value::Null);
        self.add("mid", "mid.qcow2", json!("base"));
        self.add("top", "top.qcow2", json!("mid"));
    }

    fn blocks(&self, node: &str) -> Vec<u8> {
        let device = Arc::clone(&self.daemon.services.context.graph.lock().find(node).unwrap().device);
        let mut bytes = vec![0; SIZE as usize];
        device.read_at(&mut bytes, 0).unwrap();
        bytes.chunks(65536).map(|block| block[77]).filter(|byte| *byte != 0).collect()
    }

    fn backing(&self, node: &str) -> Option<String> {
        self.daemon.services.context.graph.lock().backing_of(node).map(|node| node.name.clone())
    }
}

#[test]
fn a_node_grows_unless_somebody_uses_it() {
    let mut client = Client::new();
    client.chain();
    client.run("block_resize", json!({"node-name": "top", "size": 2 * SIZE}));
    assert_eq!(client.daemon.services.context.graph.lock().find("top").unwrap().device.len(), 2 * SIZE);
    let text = client.refused("block_resize", json!({"node-name": "mid", "size": 2 * SIZE}));
    assert_eq!(text, "Node 'mid' is busy: node is used as backing hd of 'top'");
}

#[test]
fn a_file_and_an_image_in_it_are_created() {
    let mut client = Client::new();
    let path = client.path("new.qcow2");
    let file = json!({"driver": "file", "filename": path, "size": 0});
    client.run("blockdev-create", json!({"job-id": "c", "options": file}));
    client.wait_for_status("concluded");
    client.run("job-dismiss", json!({"id": "c"}));
    client.run("blockdev-add", json!({"driver": "file", "node-name": "f", "filename": path}));
    let bad = json!({"driver": "qcow2", "file": "f", "size": SIZE, "cluster-size": 1000});
    client.run("blockdev-create", json!({"job-id": "c", "options": bad}));
    client.wait_for_status("concluded");
    assert_eq!(
        client.run("query-jobs", json!({}))[0]["error"],
        "Cluster size must be a power of two between 512 and 2048k"
    );
    client.run("job-dismiss", json!({"id": "c"}));
    let good = json!({"driver": "qcow2", "file": "f", "size": SIZE});
    client.run("blockdev-create", json!({"job-id": "c", "options": good}));
    client.wait_for_status("concluded");
    client.run("job-dismiss", json!({"id": "c"}));
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "n", "file": "f"}));
    assert!(client.blocks("n").is_empty());
}

/// It was emptied.
#[test]
fn a_data_file_keeps_what_it_holds() {
    const MIB: usize = 1 << 20;
    for (raw, more, held, len, shown) in [
        (true, json!({}), 4096, MIB, 4096),
        (true, json!({}), MIB, MIB, MIB),
        (true, json!({}), 3 * MIB, 3 * MIB, MIB),
        (true, json!({"preallocation": "falloc"}), MIB, MIB, MIB),
        (true, json!({"preallocation": "full"}), 4096, MIB, 4096),
        (true, json!({"preallocation": "full"}), 3 * MIB, 3 * MIB, MIB),
        (false, json!({}), 4096, MIB, 0),
        (false, json!({}), 3 * MIB, MIB, 0),
        (false, json!({"preallocation": "metadata"}), MIB, MIB, MIB),
        (false, json!({"preallocation": "full"}), 4096, MIB, 4096),
    ] {
        let mut client = Client::new();
        let case = format!("data-file-raw={raw}, {more}, {held} bytes");
        std::fs::write(client.path("i"), []).unwrap();
        std::fs::write(client.path("d"), vec![b'Z'; held]).unwrap();
        for file in ["i", "d"] {
            let path = client.path(file);
            client.run("blockdev-add", json!({"driver": "file", "node-name": file, "filename": path}));
        }
        let mut options =
            json!({"driver": "qcow2", "file": "i", "data-file": "d", "data-file-raw": raw, "size": SIZE});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.run("blockdev-create", json!({"job-id": "c", "options": options}));
        client.wait_for_status("concluded");
        assert_eq!(client.run("query-jobs", json!({}))[0].get("error"), None, "{case}");
        client.run("job-dismiss", json!({"id": "c"}));
        let bytes = std::fs::read(client.path("d")).unwrap();
        let count = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'Z').count();
        assert_eq!((bytes.len(), count(&bytes)), (len, held.min(len)), "{case}");
        client
            .run("blockdev-add", json!({"driver": "qcow2", "node-name": "n", "file": "i", "data-file": "d"}));
        let device = Arc::clone(&client.daemon.services.context.graph.lock().find("n").unwrap().device);
        let mut guest = vec![0; MIB];
        device.read_at(&mut guest, 0).unwrap();
        assert_eq!(count(&guest), shown, "{case}");
    }
}

#[test]
fn users_move_to_an_overlay_and_back_if_a_transaction_fails() {
    let mut client = Client::new();
    client.chain();
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    let path = client.path("snap.qcow2");
    let snapshot = json!({"node-name": "top", "snapshot-file": path, "snapshot-node-name": "snap"});
    let actions = json!([
        {"type": "blockdev-snapshot-sync", "data": snapshot},
        {"type": "abort", "data": {}},
    ]);
    client.refused("transaction", json!({"actions": actions}));
    assert!(!path.exists());
    assert!(client.daemon.services.context.graph.lock().get("snap").is_none());
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.blocks("top"), [1, 2, 3, 4]);

    client.run("blockdev-snapshot-sync", snapshot);
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.blocks("top"), [1, 2, 3, 4]);
    assert_eq!(client.blocks("snap"), [1, 2, 3, 4, 5]);
    let again = json!({"node": "top", "overlay": "snap"});
    assert_eq!(
        client.refused("blockdev-snapshot", again),
        "Node 'top' is busy: node is used as backing hd of 'snap'"
    );
}

#[test]
fn a_chain_is_streamed() {
    let mut client = Client::new();
    client.chain();
    client.run("block-stream", json!({"job-id": "s", "device": "top", "base-node": "base"}));
    assert_eq!(client.wait("BLOCK_JOB_COMPLETED")["type"], "stream");
    client.wait_for_status("null");
    assert_eq!(client.backing("top").as_deref(), Some("base"));
    assert_eq!(client.blocks("top"), [1, 2, 3]);
    let text = client.refused("block-stream", json!({"job-id": "s", "device": "top", "base-node": "mid"}));
    assert_eq!(text, "Node 'mid' is not a backing image of 'top'");
}

#[test]
fn the_middle_of_a_chain_is_committed_and_then_its_top() {
    let mut client = Client::new();
    client.chain();
    client.run("block-commit", json!({"job-id": "c", "device": "top", "top-node": "mid"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    client.wait_for_status("null");
    assert_eq!(client.backing("top").as_deref(), Some("base"));
    client.run("blockdev-del", json!({"node-name": "mid"}));

    client.run("block-commit", json!({"job-id": "c", "device": "top"}));
    client.wait("BLOCK_JOB_READY");
    assert_eq!(client.run("query-block-jobs", json!({}))[0]["type"], "commit");
    client.run("job-complete", json!({"id": "c"}));
    client.wait_for_status("null");
    client.run("blockdev-del", json!({"node-name": "top"}));
    assert_eq!(client.blocks("base"), [1, 2, 3]);
    assert_eq!(
        client.refused("block-commit", json!({"job-id": "c", "device": "base"})),
        "cannot commit an image into itself"
    );
}

#[test]
fn a_drive_is_mirrored_to_a_file_that_is_made() {
    for (sync, own) in [("full", vec![1, 2, 3]), ("top", vec![1, 2, 3]), ("none", vec![1, 2, 3])] {
        let mut client = Client::new();
        client.chain();
        let path = client.path("target.qcow2");
        let mut args =
            json!({"job-id": "m", "device": "top", "target": path, "sync": sync, "granularity": 3});
        client.refused("drive-mirror", args.clone());
        assert!(!path.exists());
        args["granularity"] = json!(4096);
        client.run("drive-mirror", args);
        client.wait("BLOCK_JOB_READY");
        client.run("block-job-cancel", json!({"device": "m"}));
        client.wait_for_status("null");
        client.add(
            "t",
            "target.qcow2",
            match sync {
                "full" => Value::Null,
                "top" => json!("mid"),
                _ => json!("top"),
            },
        );
        assert_eq!(client.blocks("t"), own, "{sync}");
    }
}
