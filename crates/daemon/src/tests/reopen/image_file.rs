//! The `file` of an image changes: filters come between, or another file with the same image.

use blockmirror_testing::qemu::{have, run};

use super::*;

impl Client {
    /// The image `d` in the file node `f`, with a throttled and a copied way to it.
    fn image_with_files(&mut self) {
        self.image("d", 1, None);
        self.image("other", 2, None);
        self.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
        for (name, file) in [("f", "d"), ("x", "other")] {
            let path = self.path(file);
            self.run("blockdev-add", json!({"driver": "file", "node-name": name, "filename": path}));
        }
        self.run("blockdev-add", json!({"driver": "qcow2", "node-name": "d", "file": "f"}));
        let throttle = json!({"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "f"});
        self.run("blockdev-add", throttle);
    }

    /// Puts the image on `file`.
    fn move_to(&mut self, file: &str) -> Result<Value, String> {
        self.reopen(json!({"driver": "qcow2", "node-name": "d", "file": file}))
    }

    fn write_block(&self, block: u8) {
        let tap = Arc::clone(&self.daemon.services.context.graph.lock().find("d").unwrap().tap);
        tap.write_at(&[block; 65536], u64::from(block) << 16, WriteFlags::NONE).unwrap();
    }
}

#[test]
fn an_image_is_put_on_a_filter_and_on_a_copy_of_its_file() {
    let mut client = Client::new();
    client.image_with_files();
    client.run("block-dirty-bitmap-add", json!({"node": "d", "name": "p", "persistent": true}));
    // Not flushed: the first image has it in memory.
    client.write_block(3);
    client.move_to("t").unwrap();
    assert_eq!(client.node("d")["file"], json!(client.path("d")));
    client.write_block(4);
    client.move_to("t").unwrap();
    client.move_to("f").unwrap();
    client.write_block(5);
    assert_eq!(client.blocks("d"), [1, 3, 4, 5]);
    client.run("blockdev-del", json!({"node-name": "t"}));
    // As a copy of the file, made while nothing writes.
    client.daemon.services.context.graph.lock().find("d").unwrap().tap.flush().unwrap();
    let reopen_ro = json!({"driver": "qcow2", "node-name": "d", "file": "f", "read-only": true});
    client.reopen(reopen_ro).unwrap();
    std::fs::copy(client.path("d"), client.path("copy")).unwrap();
    client.reopen(json!({"driver": "qcow2", "node-name": "d", "file": "f"})).unwrap();
    let path = client.path("copy");
    client.run("blockdev-add", json!({"driver": "file", "node-name": "c", "filename": path}));
    client.move_to("c").unwrap();
    client.write_block(6);
    assert_eq!(client.node("d")["file"], json!(client.path("copy")));
    client.run("blockdev-del", json!({"node-name": "f"}));
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}));
    let d = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "d").unwrap();
    assert_eq!(d["dirty-bitmaps"][0]["count"], 4 * 65536);
    client.run("blockdev-del", json!({"node-name": "d"}));
    client.run("blockdev-del", json!({"node-name": "c"}));
    client.add("again", "copy", Value::Null);
    assert_eq!(client.blocks("again"), [1, 3, 4, 5, 6]);
    if have("reopen", &["qemu-img"]) {
        run("qemu-img", client.dir.path(), ["check", "-q", "-U", "copy"]).unwrap();
        run("qemu-img", client.dir.path(), ["check", "-q", "d"]).unwrap();
    }
}

#[test]
fn what_does_not_hold_the_image_is_refused() {
    let mut client = Client::new();
    client.image_with_files();
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "n"}));
    let path = client.path("other");
    let file = json!({"driver": "file", "node-name": "ro", "filename": path, "read-only": true});
    client.write_block(3);
    for (file, said) in [
        ("n", "Node 'n' cannot hold an image: only files and filters on files can"),
        ("d", "Making 'd' a file child of 'd' would create a cycle"),
        ("nope", "Cannot find device='' nor node-name='nope'"),
    ] {
        assert_eq!(client.move_to(file).unwrap_err(), said);
    }
    let both = json!({"driver": "qcow2", "node-name": "d", "file": "t", "read-only": true});
    let said = "The 'file' and 'read-only' of 'd' cannot change in one step";
    assert_eq!(client.cannot_reopen(both), said);
    let both = json!({"driver": "qcow2", "node-name": "d", "file": "t", "backing": "n"});
    let said = "The 'file' and 'backing' of 'd' cannot change in one step";
    assert_eq!(client.cannot_reopen(both), said);
    // An image of another length.
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("x").unwrap().tap);
    tap.write_at(&(2 * SIZE).to_be_bytes(), 24, WriteFlags::NONE).unwrap();
    let said = "Node 'x' does not hold the image of 'd'";
    assert_eq!(client.move_to("x").unwrap_err(), said);
    client.run("blockdev-del", json!({"node-name": "x"}));
    client.run("blockdev-add", file);
    assert_eq!(client.move_to("ro").unwrap_err(), "Block node is read-only");
    client.write_block(4);
    assert_eq!(client.blocks("d"), [1, 3, 4]);
    assert_eq!(client.node("d")["file"], json!(client.path("d")));
    let mirror = json!({"job-id": "j", "device": "d", "target": "n", "sync": "full", "speed": 1});
    client.run("blockdev-del", json!({"node-name": "n"}));
    client.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": SIZE}));
    client.run("blockdev-mirror", mirror);
    let said = client.move_to("t").unwrap_err();
    assert_eq!(said, "Node 'd' is busy: block device is in use by block job: mirror");
}

/// It was repaired, and lost the bits that only its own program knows, before it was refused.
#[test]
fn an_image_that_is_refused_is_not_changed() {
    let mut client = Client::new();
    client.image_with_files();
    let mut other = std::fs::read(client.path("other")).unwrap();
    other[24..32].copy_from_slice(&(2 * SIZE).to_be_bytes());
    // Dirty, and an autoclear bit without a meaning.
    other[79] |= 1;
    other[95] |= 0x80;
    std::fs::write(client.path("other"), &other).unwrap();
    assert_eq!(client.move_to("x").unwrap_err(), "Node 'x' does not hold the image of 'd'");
    assert!(std::fs::read(client.path("other")).unwrap() == other, "it was changed");
    client.write_block(3);
    assert_eq!(client.blocks("d"), [1, 3]);
}

/// A reader of the first image would see clusters that the second gives to others.
#[test]
fn an_image_stays_where_it_is_while_a_reader_does_not_end() {
    let mut client = Client::new();
    client.image_with_files();
    let device = client.daemon.services.context.graph.lock().find("d").unwrap().device.device();
    assert_eq!(client.move_to("t").unwrap_err(), "A request to node 'd' does not end");
    client.write_block(3);
    assert!(Arc::ptr_eq(
        &device,
        &client.daemon.services.context.graph.lock().find("d").unwrap().device.device()
    ));
    drop(device);
    client.move_to("t").unwrap();
    assert_eq!(client.blocks("d"), [1, 3]);
}

/// The guest writes while the image goes to and fro: nothing is lost.
#[test]
fn a_guest_notices_nothing_of_it() {
    let mut client = Client::new();
    client.image_with_files();
    client.run("block-dirty-bitmap-add", json!({"node": "d", "name": "p", "persistent": true}));
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("d").unwrap().tap);
    let rounds = 16;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for at in 0..SIZE / 4096 {
                tap.write_at(&at.to_be_bytes().repeat(512), at * 4096, WriteFlags::NONE).unwrap();
                let mut back = [0; 4096];
                tap.read_at(&mut back, at * 4096).unwrap();
                assert_eq!(back[..8], at.to_be_bytes());
            }
        });
        for round in 0..rounds {
            client.move_to(if round % 2 == 0 { "t" } else { "f" }).unwrap();
        }
        writer.join().unwrap();
    });
    for at in 0..SIZE / 4096 {
        let mut back = [0; 4096];
        tap.read_at(&mut back, at * 4096).unwrap();
        assert_eq!(back[..8], at.to_be_bytes());
    }
    drop(tap);
    client.run("blockdev-del", json!({"node-name": "t"}));
    client.run("blockdev-del", json!({"node-name": "d"}));
    client.run("blockdev-del", json!({"node-name": "f"}));
    if have("reopen", &["qemu-img"]) {
        run("qemu-img", client.dir.path(), ["check", "-q", "d"]).unwrap();
    }
    client.add("again", "d", Value::Null);
    assert_eq!(client.node("again")["dirty-bitmaps"][0]["count"], SIZE);
}
