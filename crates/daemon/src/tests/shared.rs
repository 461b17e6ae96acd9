//! A job that is cancelled: beside a guest of the same disk, and with a target that does not answer.

use blockmirror_block::testing::{FaultDisk, Faults, MemoryDisk, OpKind};
use blockmirror_nbd::server::{Export, Listener, Server, ServerOptions};

use super::*;

impl Client {
    /// The image in the file `name` as the qcow2 node `name`, over NBD. Its server does as the plan says.
    fn add_remote(&mut self, name: &str, backing: Value) -> (Arc<Server>, Faults) {
        let disk = Arc::new(MemoryDisk::new(4 * SIZE));
        disk.write_at(&std::fs::read(self.path(name)).unwrap(), 0, WriteFlags::NONE).unwrap();
        let faults = Faults::new();
        let server = Server::new(ServerOptions::default()).unwrap();
        let export = Export::new("e", Arc::new(FaultDisk::new(disk, faults.clone()))).writable(true);
        server.add(export).unwrap();
        let path = self.path(&format!("{name}.socket"));
        server.listen(Listener::unix(&path).unwrap()).unwrap();
        let file = json!({"driver": "nbd", "server": {"type": "unix", "path": path}, "export": "e"});
        self.run(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing}),
        );
        (server, faults)
    }
}

/// A cancelled stream dropped the connections below the guest's own disk: what the guest had written and not
/// flushed counted as lost, its flush failed, and the image refused all writes from then on.
#[test]
fn a_guests_disk_outlives_the_cancel_of_a_job_on_it() {
    let mut client = Client::new();
    client.image("base.qcow2", 1, None);
    client.image("top", 2, Some("base.qcow2"));
    client.add("base", "base.qcow2", Value::Null);
    let (_server, faults) = client.add_remote("top", json!("base"));
    let tap = Arc::clone(&client.daemon.services.context.graph.lock().find("top").unwrap().tap);
    tap.write_at(&[3; 65536], 3 << 16, WriteFlags::NONE).unwrap();
    // The first write of the job is under way when it is cancelled.
    let gate = faults.hold(OpKind::Write, None);
    client.run("block-stream", json!({"job-id": "j", "device": "top"}));
    gate.wait_held(1);
    client.run("job-cancel", json!({"id": "j"}));
    client.wait("BLOCK_JOB_CANCELLED");
    assert_eq!(gate.held(), 1, "the server has not answered yet");
    gate.open();
    tap.flush().unwrap();
    tap.write_at(&[4; 65536], 4 << 16, WriteFlags::NONE).unwrap();
    tap.flush().unwrap();
    assert_eq!(client.blocks("top"), [1, 2, 3, 4]);
}

/// A write-back is not cancelled with one of its callers. The target as a whole is: it is the job's own.
#[test]
fn a_target_that_does_not_answer_a_flush_is_given_up() {
    let mut client = Client::new();
    client.image("s", 1, None);
    client.image("t", 2, None);
    client.add("s", "s", Value::Null);
    let (_server, faults) = client.add_remote("t", Value::Null);
    let gate = faults.hold(OpKind::Flush, None);
    client.run("blockdev-mirror", json!({"job-id": "m", "device": "s", "target": "t", "sync": "full"}));
    gate.wait_held(1);
    client.run("job-cancel", json!({"id": "m"}));
    client.wait("BLOCK_JOB_CANCELLED");
    gate.open();
}
