//! Files that commands create: a command that is refused leaves what there was, and no command takes the file
//! of a node.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;

use serde_json::json;

use super::*;

impl Client {
    /// The names in the directory, each with what it holds.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(self.dir.path()).unwrap().map(Result::unwrap);
        let name = |entry: &fs::DirEntry| entry.file_name().into_string().unwrap();
        entries.map(|entry| (name(&entry), fs::read(entry.path()).unwrap())).collect()
    }

    /// `drive-mirror` of `top` to `target`, with `more` arguments.
    fn drive(&mut self, target: &std::path::Path, more: &Value) -> Result<Value, String> {
        let mut args = json!({"job-id": "m", "device": "top", "target": target, "sync": "full"});
        args.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.ask("drive-mirror", args)
    }
}

/// Arguments that `drive-mirror` refuses, some of them only by the job itself.
fn refusals() -> Vec<Value> {
    vec![
        json!({"filter-node-name": "top"}),
        json!({"filter-node-name": "0"}),
        json!({"sync": "incremental", "bitmap": "none"}),
        json!({"sync": "bitmap", "bitmap": "none"}),
        json!({"granularity": 3}),
        json!({"buf-size": -1}),
        json!({"speed": -1}),
        json!({"node-name": "base"}),
        json!({"job-id": "0"}),
        json!({"device": "mid"}),
        json!({"sync": "top", "format": "raw"}),
        json!({"format": "vdi"}),
    ]
}

/// A target that was there had been replaced by an empty image when the job was refused.
#[test]
fn a_refused_drive_mirror_leaves_the_target_as_it_was() {
    for old in [None, Some(b"precious".as_slice())] {
        let mut client = Client::new();
        client.chain();
        let target = client.path("target");
        if let Some(old) = old {
            fs::write(&target, old).unwrap();
        }
        let before = client.files();
        for more in refusals() {
            for format in ["qcow2", "raw"] {
                let mut args = json!({"format": format});
                args.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
                client.drive(&target, &args).unwrap_err();
                assert!(client.files() == before, "{args}, {old:?}");
            }
        }
        assert_eq!(client.run("query-jobs", json!({})), json!([]));
        assert_eq!(client.run("query-named-block-nodes", json!({})).as_array().unwrap().len(), 6);
        client.drive(&target, &json!({})).unwrap();
        client.wait("BLOCK_JOB_READY");
        client.run("block-job-cancel", json!({"device": "m"}));
        client.wait_for_status("null");
        client.add("t", "target", Value::Null);
        assert_eq!(client.blocks("t"), [1, 2, 3]);
        assert_eq!(client.files().len(), before.len() + usize::from(old.is_none()), "no file is left over");
    }
}

/// The same where a target can only be written in place: it was emptied before the job was refused.
#[test]
fn a_refused_drive_mirror_leaves_a_target_that_is_written_in_place() {
    let mut client = Client::new();
    client.chain();
    let target = client.path("target");
    fs::write(&target, b"precious").unwrap();
    let open = File::options().read(true).write(true).open(&target).unwrap();
    let named = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
    for more in refusals() {
        for format in ["qcow2", "raw"] {
            let mut args = json!({"format": format});
            args.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            client.drive(&named, &args).unwrap_err();
            assert_eq!(fs::read(&target).unwrap(), b"precious", "{args}");
        }
    }
    client.drive(&named, &json!({})).unwrap();
    client.wait("BLOCK_JOB_READY");
    client.run("block-job-cancel", json!({"device": "m"}));
    client.wait_for_status("null");
    client.add("t", "target", Value::Null);
    assert_eq!(client.blocks("t"), [1, 2, 3]);
}

/// A job whose disks differ in length ends as soon as it starts.
#[test]
fn a_drive_mirror_that_fails_at_its_start_leaves_the_target_as_it_was() {
    let mut client = Client::new();
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "top", "size": 1000}));
    let target = client.path("target");
    fs::write(&target, b"precious").unwrap();
    client.drive(&target, &json!({"format": "raw"})).unwrap();
    let error = client.wait("BLOCK_JOB_COMPLETED")["error"].clone();
    assert_eq!(error, "Source and target image have different sizes");
    client.wait_for_status("null");
    assert_eq!(client.files().into_iter().collect::<Vec<_>>(), [("target".to_owned(), b"precious".to_vec())]);
}

/// The file that an overlay was to replace was lost.
#[test]
fn a_snapshot_that_is_taken_back_leaves_the_file_that_was_there() {
    let mut client = Client::new();
    client.chain();
    let (one, two) = (client.path("one"), client.path("two"));
    fs::write(&one, b"precious").unwrap();
    let before = client.files();
    let snapshot = |node: &str, file: &PathBuf, name: &str| {
        let data = json!({"node-name": node, "snapshot-file": file, "snapshot-node-name": name});
        json!({"type": "blockdev-snapshot-sync", "data": data})
    };
    let both = [snapshot("top", &one, "s"), snapshot("s", &two, "t")];
    for last in [
        json!({"type": "abort", "data": {}}),
        json!({"type": "blockdev-mirror", "data": {"job-id": "m", "device": "base", "target": "zz", "sync": "full"}}),
        snapshot("base", &one, "u"),
    ] {
        let actions = json!([both[0], both[1], last]);
        client.refused("transaction", json!({"actions": actions}));
        assert!(client.files() == before, "{last}");
        assert!(client.daemon.services.context.graph.lock().get("s").is_none());
    }
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    client.run("transaction", json!({"actions": both}));
    tap.write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    tap.flush().unwrap();
    assert_eq!((client.blocks("s"), client.blocks("t")), (vec![1, 2, 3], vec![1, 2, 3, 5]));
    let names: Vec<_> = client.files().into_keys().collect();
    assert_eq!(names, ["base.qcow2", "mid.qcow2", "one", "top.qcow2", "two"]);
}

/// A node opened without a lock lost its file: it went on with one that had no name any more.
#[test]
fn the_file_of_a_node_is_never_created_anew() {
    let mut client = Client::new();
    client.chain();
    let (free, link) = (client.path("free"), client.path("link"));
    fs::write(&free, vec![7; SIZE as usize]).unwrap();
    std::os::unix::fs::symlink("free", &link).unwrap();
    for read_only in [false, true] {
        let node = json!({
            "driver": "file", "node-name": "free", "filename": free, "locking": "off", "read-only": read_only,
        });
        client.run("blockdev-add", node);
        let before = client.files();
        for path in [&free, &link] {
            let phrase = format!("Is another process using the image [{}]?", path.display());
            for format in ["raw", "qcow2"] {
                let said = client.drive(path, &json!({"format": format})).unwrap_err();
                assert!(said.ends_with(&phrase), "{said}");
            }
            let snapshot = json!({"node-name": "top", "snapshot-file": path, "snapshot-node-name": "s"});
            let said = client.refused("blockdev-snapshot-sync", snapshot);
            assert!(said.ends_with(&phrase), "{said}");
            let options = json!({"driver": "file", "filename": path, "size": 512});
            client.run("blockdev-create", json!({"job-id": "c", "options": options}));
            client.wait_for_status("concluded");
            let said = client.run("query-jobs", json!({}))[0]["error"].as_str().unwrap().to_owned();
            assert!(said.ends_with(&phrase), "{said}");
            client.run("job-dismiss", json!({"id": "c"}));
        }
        assert!(client.files() == before);
        client.run("blockdev-del", json!({"node-name": "free"}));
    }
    client.drive(&free, &json!({})).unwrap();
}

/// It was called by the name of the node that had been opened for it.
#[test]
fn a_file_in_use_is_said_to_be_that_of_the_node_that_the_client_knows() {
    let mut client = Client::new();
    client.chain();
    let target = client.path("mid.qcow2");
    assert_eq!(
        client.drive(&target, &json!({})).unwrap_err(),
        format!(
            "Failed to get \"write\" lock: node 'mid' is on it. Is another process using the image [{}]?",
            target.display()
        )
    );
}
