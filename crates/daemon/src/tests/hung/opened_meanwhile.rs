//! Nodes that another client opens on those of a command that hangs. Opening locks nothing.

use blockmirror_mirror::{Begin, Tap};

use super::*;

impl Client {
    /// The answer to what was sent, past events.
    fn answer(&mut self) -> Value {
        loop {
            let line = self.read();
            if line.get("event").is_none() {
                return line;
            }
        }
    }
}

/// Waits until the guest of `tap` is held.
fn wait_for_drain(tap: &Arc<Tap>) {
    let until = Instant::now() + GUARD;
    while matches!(tap.try_begin_write(ByteRange::new(0, 512)).unwrap(), Begin::Go(_)) {
        assert!(Instant::now() < until, "no guest was held");
        std::thread::yield_now();
    }
}

fn overlay_on(client: &Client, name: &str, backing: &str) -> Value {
    let file = json!({"driver": "file", "filename": client.path(name)});
    json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing})
}

/// Without the second look the overlay would follow the guest to the snapshot's.
#[test]
fn a_snapshot_sees_what_was_opened_while_it_waited_for_the_guest() {
    let client = Client::new();
    let (mut one, mut other) = (client.beside(), client.beside());
    let hung = one.chain_that_hangs(false);
    one.image("ov", 9, None);
    one.add("ov", "ov", Value::Null);
    other.image("x", 5, None);
    let tap = Arc::clone(&one.daemon.services.context.graph.lock().find("ht").unwrap().tap);
    hung[1].set_free(false);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE));
        hung[1].wait_for_caller();
        one.send("blockdev-snapshot", json!({"node": "ht", "overlay": "ov"}));
        wait_for_drain(&tap);
        other.add("x", "x", json!("ht"));
        hung[1].set_free(true);
        guest.join().unwrap().unwrap();
    });
    let said = one.answer();
    assert_eq!(said["error"]["desc"], "Node 'ht' is busy: node is used as backing hd of 'x'", "{said}");
    assert_eq!((one.backing("x").as_deref(), one.backing("ov")), (Some("ht"), None));
    tap.write_at(&[6; 65536], 6 << 16, WriteFlags::NONE).unwrap();
    assert_eq!((one.blocks("ht"), one.blocks("ov")), (vec![1, 2, 4, 6], vec![9]));
}

/// It was put on a node that had been found to be unused, whose end was cut off a moment later.
#[test]
fn no_node_is_put_on_one_that_is_being_resized() {
    let client = Client::new();
    let (mut one, mut other) = (client.beside(), client.beside());
    let hung = one.chain_that_hangs(false);
    other.image("x", 5, None);
    hung[1].set_free(false);
    one.send("block_resize", json!({"node-name": "ht", "size": SIZE / 2}));
    hung[1].wait_for_caller();
    let overlay = overlay_on(&other, "x", "ht");
    let said = other.ask("blockdev-add", overlay.clone());
    hung[1].set_free(true);
    assert_eq!(said.unwrap_err(), "Node 'ht' is busy: a command is changing it");
    assert_eq!(one.answer()["return"], json!({}));
    other.run("blockdev-add", overlay);
}

/// The image stayed in the file that the node had been on.
#[test]
fn no_image_is_put_in_a_node_that_is_being_put_on_another_file() {
    let client = Client::new();
    let (mut one, mut other) = (client.beside(), client.beside());
    let hung = one.chain_that_hangs(true);
    for (name, block) in [("f1", 5), ("f2", 6)] {
        one.image(name, block, None);
        let path = one.path(name);
        one.run("blockdev-add", json!({"driver": "file", "node-name": name, "filename": path}));
    }
    one.run("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f1"}));
    hung[1].set_free(false);
    let raw = json!({"driver": "raw", "node-name": "r", "file": "f2"});
    let slow = json!({"driver": "qcow2", "node-name": "ht", "file": "fht", "backing": "hb"});
    one.send("blockdev-reopen", json!({"options": [raw, slow]}));
    hung[1].wait_for_caller();
    let image = json!({"driver": "qcow2", "node-name": "q", "file": "r"});
    let said = other.ask("blockdev-add", image.clone());
    hung[1].set_free(true);
    assert_eq!(said.unwrap_err(), "Node 'r' is busy: a command is changing it");
    assert_eq!(one.answer()["return"], json!({}));
    other.run("blockdev-add", image);
    assert_eq!(other.blocks("q"), [6]);
}
