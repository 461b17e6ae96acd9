//! [An image of 512 TiB](hostile::one_l2_table) whose L1 entries all lead to one L2 table. To find out what
//! lies where takes minutes; nothing waits for that.

use std::sync::mpsc;
use std::thread;

use blockmirror_block::{ByteRange, Visit};
use blockmirror_nbd::{ClientOptions, NbdUri};
use blockmirror_testing::hostile::{self, ENDLESS};

use super::*;

impl Client {
    /// With the image as the node `huge`, which is read-only.
    fn with_endless() -> Self {
        let mut client = Self::new();
        hostile::one_l2_table(&client.path("huge")).unwrap();
        let file = json!({"driver": "file", "filename": client.path("huge")});
        client.run(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "huge", "read-only": true, "file": file}),
        );
        client
    }

    fn serve_endless(&mut self) -> NbdUri {
        let path = self.path("nbd");
        self.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path}}}));
        self.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "huge", "name": "e"}));
        NbdUri::unix(path, "e")
    }
}

#[test]
fn a_mirror_of_it_is_cancelled() {
    for force in [true, false] {
        let mut client = Client::with_endless();
        let null = json!({"driver": "null-co", "node-name": "null", "size": ENDLESS, "read-zeroes": true});
        client.run("blockdev-add", null);
        client.run(
            "blockdev-mirror",
            json!({"job-id": "m", "device": "huge", "target": "null", "sync": "full"}),
        );
        let jobs = client.run("query-block-jobs", json!({}));
        assert_eq!(jobs[0]["ready"], false, "it has hours to do: {jobs}");
        if force {
            client.run("job-cancel", json!({"id": "m"}));
        } else {
            client.run("block-job-cancel", json!({"device": "m"}));
        }
        client.wait("BLOCK_JOB_CANCELLED");
        client.wait_for_status("null");
        client.run("blockdev-del", json!({"node-name": "null"}));
    }
}

/// Answers may be short, and each says something.
#[test]
fn its_block_status_is_answered() {
    let mut client = Client::with_endless();
    let uri = client.serve_endless();
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || {
        let disk = ClientOptions::new(uri).connections(1).open().unwrap();
        for _ in 0..40 {
            let mut first = None;
            disk.extents(ByteRange::new(0, ENDLESS), &mut |extent| {
                first = Some(extent.range);
                Visit::Break(())
            })
            .unwrap();
            let first = first.unwrap();
            assert!(first.start() == 0 && !first.is_empty());
        }
        done.send(()).unwrap();
    });
    is_done.recv_timeout(GUARD).unwrap();
}

/// While a client asks about the whole disk 40 times at once.
#[test]
fn an_export_of_it_is_deleted() {
    let mut client = Client::with_endless();
    let uri = client.serve_endless();
    let disk = Arc::new(ClientOptions::new(uri).connections(1).open().unwrap());
    let (asked, is_asked) = mpsc::channel();
    let (done, is_done) = mpsc::channel();
    for _ in 0..40 {
        let (disk, asked, done) = (Arc::clone(&disk), asked.clone(), done.clone());
        thread::spawn(move || {
            let mut first = true;
            // To its end, which it does not come to.
            let result = disk.extents(ByteRange::new(0, ENDLESS), &mut |_| {
                if std::mem::take(&mut first) {
                    asked.send(()).unwrap();
                }
                Visit::Continue(())
            });
            done.send(result.is_err()).unwrap();
        });
    }
    // All of them are at it.
    for _ in 0..40 {
        is_asked.recv_timeout(GUARD).unwrap();
    }
    client.run("block-export-del", json!({"id": "e", "mode": "hard"}));
    client.wait("BLOCK_EXPORT_DELETED");
    for _ in 0..40 {
        assert!(is_done.recv_timeout(GUARD).unwrap(), "no answer covered the whole disk");
    }
    assert_eq!(client.run("query-block-exports", json!({})), json!([]));
}
