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

/// Without the second look the overlay would follow the guest to the snapshot's.
#[test]
fn a_snapshot_sees_what_was_opened_while_it_waited_for_the_guest() {
    let client = Client::new();
    let (mut one, mut other) = (client.beside(), client.beside());
    let hung = one.chain_that_hangs(false);
    one.image("ov", 9, None);
    one.add("ov", "ov", Value::Null);
    other.image("x", 5, None);
    let tap = Arc::clone(&one.daemon.graph.lock().find("ht").unwrap().tap);
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
