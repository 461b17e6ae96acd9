//! Jobs on chains of images.

use serde_json::json;

use super::*;

impl Client {
    /// The chain of `chain`, of which only the top is opened by name.
    fn implicit_chain(&mut self) -> Vec<String> {
        self.image("base.qcow2", 1, None);
        self.image("mid.qcow2", 2, Some("base.qcow2"));
        self.image("top.qcow2", 3, Some("mid.qcow2"));
        let file = json!({"driver": "file", "filename": self.path("top.qcow2")});
        self.run("blockdev-add", json!({"driver": "qcow2", "node-name": "top", "file": file}));
        self.daemon.graph.lock().chain("top").iter().map(|node| node.name.clone()).collect()
    }

    fn is_read_only(&self, node: &str) -> (bool, bool) {
        let graph = self.daemon.graph.lock();
        let node = graph.find(node).unwrap();
        let file = graph.children(&node.name).find(|(role, _)| *role == "file").unwrap().1;
        assert_eq!(file.read_only, !file.storage.as_ref().unwrap().info().writable);
        (node.read_only, file.read_only)
    }
}

/// A backing file that the chain itself brought along is open for reading. A commit into it was refused; it opens it for
/// writing, for as long as the job runs.
#[test]
fn a_backing_file_is_written_for_the_time_of_a_commit() {
    let mut client = Client::new();
    let names = client.implicit_chain();
    let (mid, base) = (&names[1], &names[2]);
    client.run(
        "block-commit",
        json!({"job-id": "c", "device": "top", "top-node": mid, "auto-finalize": false}),
    );
    client.wait("BLOCK_JOB_PENDING");
    assert_eq!(client.is_read_only(base), (false, false));
    client.run("job-finalize", json!({"id": "c"}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    assert_eq!(client.is_read_only(base), (true, true));
    assert_eq!(client.blocks(base), [1, 2]);
    client.wait_for_status("null");

    client.run("block-commit", json!({"job-id": "c", "device": "top"}));
    client.wait("BLOCK_JOB_READY");
    client.run("block-job-cancel", json!({"device": "c"}));
    client.wait_for_status("null");
    assert_eq!(client.is_read_only(base), (true, true));

    client.run("block-commit", json!({"job-id": "c", "device": "top"}));
    client.wait("BLOCK_JOB_READY");
    let tap = Arc::clone(&client.daemon.graph.lock().find("top").unwrap().tap);
    client.run("job-complete", json!({"id": "c"}));
    client.wait_for_status("null");
    assert_eq!(client.is_read_only(base), (false, false));
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    assert_eq!(client.blocks(base), [1, 2, 3, 4]);
}

/// In the middle of a chain everything is open for reading: the base, and the image whose header changes.
#[test]
fn an_image_above_a_commit_is_written_too() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("mid.qcow2", 2, Some("base.qcow2"));
    client.image("top.qcow2", 3, Some("mid.qcow2"));
    client.image("last.qcow2", 4, Some("top.qcow2"));
    let file = json!({"driver": "file", "filename": client.path("last.qcow2")});
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "last", "file": file}));
    let mid = client.path("mid.qcow2");
    client.run("block-commit", json!({"job-id": "c", "device": "last", "top": mid}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    client.wait_for_status("null");
    let above = client.backing("last").unwrap();
    assert_eq!(client.is_read_only(&above), (true, true));
    assert_eq!(client.blocks("last"), [1, 2, 3, 4]);

    // A stream into an image in the middle.
    client.run("block-stream", json!({"job-id": "s", "device": above}));
    assert!(client.wait("BLOCK_JOB_COMPLETED").get("error").is_none());
    client.wait_for_status("null");
    assert_eq!(client.is_read_only(&above), (true, true));
    assert_eq!(client.backing(&above), None);
    client.run("blockdev-del", json!({"node-name": "last"}));
    client.add("alone", "top.qcow2", Value::Null);
    assert_eq!(client.blocks("alone"), [1, 2, 3]);
}

#[test]
fn a_base_that_somebody_else_holds_is_not_written() {
    let mut client = Client::new();
    let names = client.implicit_chain();
    let other = blockmirror_file::FileOptions::new().open(client.path("base.qcow2")).unwrap();
    let text = client.refused("block-commit", json!({"job-id": "c", "device": "top"}));
    assert!(text.contains("base.qcow2"), "{text}");
    assert_eq!(client.is_read_only(&names[2]), (true, true));
    drop(other);
    client.run("block-commit", json!({"job-id": "c", "device": "top"}));
    client.wait("BLOCK_JOB_READY");
    client.run("block-job-cancel", json!({"device": "c", "force": true}));
    client.wait("BLOCK_JOB_CANCELLED");
    assert_eq!(client.is_read_only(&names[2]), (true, true));
}

/// A node of its own that is read-only stays so.
#[test]
fn a_file_that_was_opened_read_only_by_name_is_not_written() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("top.qcow2", 3, Some("base.qcow2"));
    let path = client.path("base.qcow2");
    let file = json!({"driver": "file", "node-name": "f", "filename": path, "read-only": true});
    client.run("blockdev-add", file);
    client
        .run("blockdev-add", json!({"driver": "qcow2", "node-name": "base", "file": "f", "read-only": true}));
    client.add("top", "top.qcow2", json!("base"));
    let text = client.refused("block-commit", json!({"job-id": "c", "device": "top"}));
    assert_eq!(text, "Block node 'f' is read-only");
}
