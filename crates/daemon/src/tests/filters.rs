//! Filters pass on what their users need, and stand for what they are on now; lengths follow what lies below.

use serde_json::json;

use super::*;

impl Client {
    /// A file of `len` bytes as a node of its name.
    fn file(&mut self, name: &str, len: u64) {
        std::fs::write(self.path(name), vec![0; len as usize]).unwrap();
        let path = self.path(name);
        self.run("blockdev-add", json!({"driver": "file", "node-name": name, "filename": path}));
    }

    fn filter(&mut self, name: &str, file: &str) {
        self.run("blockdev-add", throttle(name, file));
    }

    fn group(&mut self) {
        self.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
    }

    fn tap_of(&self, name: &str) -> Arc<blockmirror_mirror::Tap> {
        Arc::clone(&self.daemon.services.context.graph.lock().find(name).unwrap().tap)
    }

    fn create_in(&mut self, node: &str) {
        let options = json!({"driver": "qcow2", "file": node, "size": SIZE});
        self.run("blockdev-create", json!({"job-id": "c", "options": options}));
        self.wait_for_status("concluded");
    }
}

fn throttle(name: &str, file: &str) -> Value {
    json!({"driver": "throttle", "node-name": name, "throttle-group": "g", "file": file})
}

fn raw(name: &str, file: &str) -> Value {
    json!({"driver": "raw", "node-name": name, "file": file})
}

/// Through two filters one file was two images at once, or an image and a mirror's target; each destroyed the
/// other.
#[test]
fn what_filters_users_need_is_checked_below() {
    let mut client = Client::new();
    client.group();
    client.file("f", SIZE);
    client.file("source", SIZE);
    for filter in ["one", "two", "three"] {
        client.filter(filter, "f");
    }
    client.run("blockdev-add", raw("image", "one"));
    for refused in [
        client.refused("blockdev-add", raw("other", "two")),
        client.refused(
            "blockdev-mirror",
            json!({"job-id": "j", "device": "source", "target": "two", "sync": "full"}),
        ),
        client.run("human-monitor-command", json!({"command-line": "qemu-io f \"write 0 512\""})).to_string(),
    ] {
        assert!(refused.contains("Permission conflict on node 'one'"), "{refused}");
    }
    client.run("blockdev-del", json!({"node-name": "image"}));
    client
        .run("blockdev-mirror", json!({"job-id": "j", "device": "source", "target": "two", "sync": "full"}));
    let refused = client.refused("blockdev-add", raw("image", "one"));
    assert!(refused.contains("Permission conflict on node 'two'"), "{refused}");
}

/// A filter went on standing for the file that it was opened on: an image that was put in it later lived in
/// the abandoned source, and headers named that.
#[test]
fn filters_stand_for_the_target_after_the_pivot() {
    let mut client = Client::new();
    client.group();
    client.file("source", SIZE);
    client.file("target", SIZE);
    client.filter("lower", "source");
    client.filter("upper", "lower");
    client.run("blockdev-del", json!({"node-name": "upper"}));
    client.run("blockdev-del", json!({"node-name": "lower"}));
    client.run(
        "blockdev-mirror",
        json!({"job-id": "j", "device": "source", "target": "target", "sync": "full"}),
    );
    client.filter("lower", "source");
    client.filter("upper", "lower");
    client.wait("BLOCK_JOB_READY");
    client.run("job-complete", json!({"id": "j"}));
    client.wait_for_status("null");
    client.run("blockdev-add", raw("image", "upper"));
    client.tap_of("image").write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!((client.blocks("target"), client.blocks("source")), (vec![5], vec![]));
    client.run("blockdev-del", json!({"node-name": "source"}));
    let path = client.daemon.services.context.graph.lock().find("upper").unwrap().path.clone();
    assert_eq!(path, Some(client.path("target")));
}

/// A format that only reads went on reading the source after the pivot, though the graph had it on the
/// target.
#[test]
fn no_format_is_put_on_a_disk_that_is_mirrored() {
    let mut client = Client::new();
    client.group();
    client.file("source", SIZE);
    client.file("target", SIZE);
    client.run(
        "blockdev-mirror",
        json!({"job-id": "j", "device": "source", "target": "target", "sync": "full"}),
    );
    client.filter("t", "source");
    for file in ["source", "t"] {
        let reader = json!({"driver": "raw", "node-name": "r", "file": file, "read-only": true});
        let refused = client.refused("blockdev-add", reader);
        assert_eq!(refused, "Node 'source' is busy: block device is in use by block job: mirror");
    }
}

/// The same where a filter below is put on another file; and what lives above a filter keeps it where it is.
#[test]
fn filters_stand_for_what_is_below_after_a_reopen() {
    let mut client = Client::new();
    client.group();
    client.file("first", SIZE);
    client.file("second", SIZE);
    client.filter("lower", "first");
    client.filter("upper", "lower");
    client.run("blockdev-reopen", json!({"options": [throttle("lower", "second")]}));
    client.run("blockdev-add", raw("image", "upper"));
    client.tap_of("image").write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!((client.blocks("first"), client.blocks("second")), (vec![], vec![5]));

    client.filter("other", "first");
    client.run("blockdev-add", raw("r", "other"));
    let refused = client.refused("blockdev-reopen", json!({"options": [throttle("other", "second")]}));
    assert_eq!(refused, "Node 'other' is busy: an image lives in it, node 'r'");
    client.filter("free", "second");
    client.file("third", SIZE);
    let both = json!({"options": [raw("r", "free"), throttle("free", "third")]});
    let refused = client.refused("blockdev-reopen", both);
    assert_eq!(refused, "'r' cannot be put on 'free' in one step with a change of 'free'");
}

/// A `file` node kept the length with which it was opened. What an image had written behind it was not in a
/// mirror of it.
#[test]
fn a_file_is_as_long_as_what_lived_in_it_made_it() {
    let mut client = Client::new();
    client.group();
    client.file("f", 0);
    client.filter("t", "f");
    client.create_in("t");
    let len = std::fs::metadata(client.path("f")).unwrap().len();
    assert_eq!(
        (client.tap_of("f").len(), client.tap_of("t").len()),
        (len.next_multiple_of(512), len.next_multiple_of(512))
    );
    client.run("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "file": "t"}));
    client.tap_of("q").write_at(&[1; 1 << 19], 0, WriteFlags::NONE).unwrap();
    client.run("blockdev-del", json!({"node-name": "q"}));
    let grown = std::fs::metadata(client.path("f")).unwrap().len();
    assert!(grown > len);
    assert_eq!((client.tap_of("f").len(), client.tap_of("t").len()), (grown, grown));
}

/// A filter showed the first half of the longer disk that it was put on.
#[test]
fn a_filter_is_as_long_as_what_it_is_put_on() {
    let mut client = Client::new();
    client.group();
    client.file("short", SIZE / 2);
    client.file("long", SIZE);
    client.filter("t", "short");
    client.filter("above", "t");
    client.run("blockdev-reopen", json!({"options": [throttle("t", "long")]}));
    assert_eq!((client.tap_of("t").len(), client.tap_of("above").len()), (SIZE, SIZE));
}

/// An image on a filter was said to stand on a raw file, and showed the qcow2 file's own bytes when it was
/// opened again.
#[test]
fn headers_name_the_image_below_a_filter() {
    let mut client = Client::new();
    client.group();
    client.image("base.qcow2", 3, None);
    client.add("base", "base.qcow2", Value::Null);
    client.filter("t", "base");
    let path = client.path("snap.qcow2");
    let snapshot = json!({"node-name": "t", "snapshot-file": path, "snapshot-node-name": "snap"});
    client.run("blockdev-snapshot-sync", snapshot);
    let image = client.daemon.services.context.graph.lock().find("snap").unwrap().qcow2.clone().unwrap();
    let backing = image.header().backing.clone().unwrap();
    assert_eq!(backing.format.as_deref(), Some("qcow2"));
    assert_eq!(backing.name.as_bytes(), client.path("base.qcow2").to_str().unwrap().as_bytes());
}

/// A command looked a disk up, a mirror pivoted, and the command put its node on the disk's old place in the
/// graph: it led to the target, which could be removed, or mirrored to the node itself.
#[test]
fn a_node_that_is_opened_during_a_pivot_stands_on_the_disk_that_it_names() {
    let mut client = Client::new();
    client.file("source", SIZE);
    client.file("target", SIZE);
    let (fifo, daemon) = (client.path("config"), Arc::clone(&client.daemon));
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let options = json!({"driver": "blkdebug", "node-name": "n", "image": "source", "config": &fifo});
    let adding = std::thread::spawn(move || {
        client.run("blockdev-add", options);
        client
    });
    // Goes on when the other side is open, which is when the disk has been looked up.
    let config = std::fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    daemon.services.context.graph.lock().pivot("source", "target", &[], false);
    drop(config);
    let client = adding.join().unwrap();
    client.tap_of("n").write_at(&[5; 65536], 5 << 16, WriteFlags::NONE).unwrap();
    assert_eq!((client.blocks("source"), client.blocks("target")), (vec![5], vec![]));
}

/// With a source that stood on less than the target the target was held first: a write to the source waited
/// for it with the source's place taken, and their holders waited half a minute and gave up.
#[test]
fn a_source_is_held_before_its_target() {
    let mut client = Client::new();
    client.group();
    client.file("source", SIZE);
    client.file("f", SIZE);
    client.filter("lower", "f");
    client.filter("target", "lower");
    client.run(
        "blockdev-mirror",
        json!({"job-id": "j", "device": "source", "target": "target", "sync": "none"}),
    );
    let taps = client
        .daemon
        .services
        .context
        .graph
        .lock()
        .taps_from_top(vec!["lower".to_owned(), "source".to_owned()]);
    assert!(Arc::ptr_eq(&taps[0], &client.tap_of("source")));
}

/// A filter on a mirror's target kept the tap that the pivot threw away: what was written through it no
/// bitmap saw. Then none could be put there.
#[test]
fn a_filter_on_what_takes_anothers_place_sees_what_bitmaps_see() {
    let mirror = json!({"job-id": "j", "device": "top", "target": "target", "sync": "full"});
    let commit = json!({"job-id": "j", "device": "top"});
    for (command, arguments, target) in
        [("blockdev-mirror", mirror, "target"), ("block-commit", commit, "base")]
    {
        let mut client = Client::new();
        client.chain();
        client.image("target.qcow2", 9, None);
        client.add("target", "target.qcow2", Value::Null);
        client.group();
        client.run("block-dirty-bitmap-add", json!({"node": "top", "name": "b"}));
        client.filter("before", target);
        client.run(command, arguments);
        client.wait("BLOCK_JOB_READY");
        client.filter("during", target);
        client.run("job-complete", json!({"id": "j"}));
        client.wait_for_status("null");
        for (filter, block) in [("before", 4), ("during", 5)] {
            client
                .tap_of(filter)
                .write_at(&[block; 65536], u64::from(block) << 16, WriteFlags::NONE)
                .unwrap();
        }
        assert_eq!(client.blocks(target), [1, 2, 3, 4, 5], "{command}");
        let bitmap = client.tap_of(target).bitmaps().into_iter().find(|bitmap| bitmap.name == "b").unwrap();
        assert_eq!(bitmap.dirty_bytes, 2 << 16, "{command}");
    }
}

/// What reads such a filter during the job is refused as what reads the node itself.
#[test]
fn users_of_a_filter_on_a_target_are_users_of_the_target() {
    let mut client = Client::new();
    client.file("source", SIZE);
    client.file("target", SIZE);
    client.group();
    let mirror = json!({"job-id": "j", "device": "source", "target": "target", "sync": "full"});
    client.run("blockdev-mirror", mirror);
    client.filter("t", "target");
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": client.path("nbd")}}}));
    for node in ["target", "t"] {
        let export = json!({"type": "nbd", "id": "e", "node-name": node, "name": node});
        let said = client.refused("block-export-add", export);
        assert!(said.starts_with("Permission conflict on node '"), "{said}");
    }
}

/// What is written goes to both, and a difference fails the read.
#[test]
fn blkverify_compares_an_image_with_a_file() {
    let mut client = Client::new();
    client.file("raw", SIZE);
    client.image("test.qcow2", 1, None);
    let file = json!({"driver": "file", "filename": client.path("test.qcow2")});
    let test = json!({"driver": "qcow2", "node-name": "test", "file": file});
    client.run("blockdev-add", json!({"driver": "blkverify", "node-name": "v", "raw": "raw", "test": test}));
    let tap = client.tap_of("v");
    let mut seen = vec![0; 4096];
    tap.write_at(&[5; 65_536], 3 << 16, WriteFlags::FUA).unwrap();
    tap.read_at(&mut seen, 3 << 16).unwrap();
    assert_eq!(seen, [5; 4096]);
    // The image has had this block from the start.
    let error = tap.read_at(&mut seen, 1 << 16).unwrap_err();
    assert_eq!(error.offset(), Some(1 << 16), "{error}");
    let said = client.refused("blockdev-del", json!({"node-name": "raw"}));
    assert_eq!(said, "Node raw is in use by node 'v' (as 'raw' child)");
    drop(tap);
    client.run("blockdev-del", json!({"node-name": "v"}));
    client.run("blockdev-del", json!({"node-name": "raw"}));
    client.file("short", SIZE / 2);
    let two = json!({"driver": "blkverify", "node-name": "w", "raw": "short", "test": "short2"});
    client.file("short2", SIZE);
    assert!(client.refused("blockdev-add", two).contains("bytes"));
}
