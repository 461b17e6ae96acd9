//! Commits and streams in chains with filters. What is left of the graph is what qemu-storage-daemon 10.0
//! leaves, where it was given the same commands.

use serde_json::json;

use super::*;

/// A driver of a filter: its name, and the role of its child.
const KINDS: [(&str, &str); 3] = [("throttle", "file"), ("blkdebug", "image"), COPY_ON_READ];
const COPY_ON_READ: (&str, &str) = ("copy-on-read", "file");

impl Client {
    /// The chain of `layout`, from the top: names that begin with `F` are filters of the given kind, the
    /// lowest image holds block 1, the next one block 2 and so on. The top is exported.
    fn layered(&mut self, (driver, role): (&str, &str), layout: &[&str]) {
        self.run("object-add", json!({"qom-type": "throttle-group", "id": "g"}));
        let mut backing: Option<String> = None;
        for (name, block) in layout.iter().rev().filter(|name| !name.starts_with('F')).zip(1..) {
            let file = format!("{name}.qcow2");
            self.image(&file, block, backing.as_deref());
            backing = Some(file);
        }
        let mut below: Option<&str> = None;
        for name in layout.iter().rev() {
            if name.starts_with('F') {
                let mut node = json!({"driver": driver, "node-name": name, role: below});
                if driver == "throttle" {
                    node["throttle-group"] = json!("g");
                }
                self.run("blockdev-add", node);
            } else {
                self.add(name, &format!("{name}.qcow2"), json!(below));
            }
            below = Some(name);
        }
        self.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": self.path("nbd")}}}));
        let export = json!({"type": "nbd", "id": "e", "node-name": layout[0], "name": "e", "writable": true});
        self.run("block-export-add", export);
    }

    /// Which node stands on which, and what is exported.
    fn edges(&mut self, layout: &[&str]) -> Vec<String> {
        let exported = self.run("query-block-exports", json!({}))[0]["node-name"].clone();
        let graph = self.daemon.services.context.graph.lock();
        let mut edges = vec![format!("e {}", exported.as_str().unwrap())];
        for name in layout {
            let below = graph.children(name).filter(|(_, child)| layout.contains(&child.name.as_str()));
            edges.extend(below.map(|(_, child)| format!("{name} {}", child.name)));
        }
        edges
    }

    /// Runs a job to its end, completing it if it becomes ready, while a guest writes block 9.
    fn run_job(&mut self, command: &str, mut arguments: Value) {
        arguments["job-id"] = json!("j");
        let node = self.run("query-block-exports", json!({}))[0]["node-name"].clone();
        let tap =
            Arc::clone(&self.daemon.services.context.graph.lock().find(node.as_str().unwrap()).unwrap().tap);
        self.run(command, arguments);
        loop {
            let event = if self.events.is_empty() { self.read() } else { self.events.remove(0) };
            match event["event"].as_str() {
                Some("BLOCK_JOB_READY") => {
                    tap.write_at(&[9; 65536], 9 << 16, WriteFlags::NONE).unwrap();
                    self.run("job-complete", json!({"id": "j"}));
                }
                Some("BLOCK_JOB_COMPLETED") => {
                    assert_eq!(event["data"].get("error"), None);
                    break;
                }
                _ => {}
            }
        }
        tap.write_at(&[9; 65536], 9 << 16, WriteFlags::NONE).unwrap();
        tap.write_at(&[10; 65536], 10 << 16, WriteFlags::NONE).unwrap();
    }
}

/// A layout, the arguments of the job, and which node stands on which afterwards.
type Case = (&'static [&'static str], Value, &'static [&'static str]);

fn check(command: &str, kind: (&str, &str), (layout, arguments, edges): &Case) {
    let mut client = Client::new();
    client.layered(kind, layout);
    client.run_job(command, arguments.clone());
    let case = format!("{command} {arguments}, {}, {layout:?}", kind.0);
    assert_eq!(client.edges(layout), *edges, "{case}");
    let images = layout.iter().filter(|name| !name.starts_with('F')).count() as u8;
    let exported = client.run("query-block-exports", json!({}))[0]["node-name"].clone();
    let shown: Vec<_> = (1..=images).chain([9, 10]).collect();
    assert_eq!(client.blocks(exported.as_str().unwrap()), shown, "{case}");
}

/// One right before the base, or one on the base that had another on it, was refused, and so was a filter on
/// the guest's image as the device.
#[test]
fn an_active_commit_passes_filters_wherever_they_stand() {
    let device = |device, base| json!({"device": device, "base-node": base});
    let cases: [Case; 10] = [
        (&["top", "F", "base"], device("top", "base"), &["e base", "top F", "F base"]),
        (&["top", "F", "base"], device("top", "F"), &["e F", "top F", "F base"]),
        (&["top", "F", "mid", "base"], device("top", "base"), &["e base", "top F", "F mid", "mid base"]),
        (&["top", "mid", "F", "base"], device("top", "base"), &["e base", "top mid", "mid F", "F base"]),
        (&["top", "mid", "F", "base"], device("top", "F"), &["e F", "top mid", "mid F", "F base"]),
        (&["top", "F2", "F", "base"], device("top", "base"), &["e base", "top F2", "F2 F", "F base"]),
        (&["top", "F2", "F", "base"], device("top", "F"), &["e F", "top F2", "F2 F", "F base"]),
        (&["F", "top", "base"], device("F", "base"), &["e base", "F top", "top base"]),
        (&["F2", "F", "top", "base"], device("F2", "base"), &["e base", "F2 F", "F top", "top base"]),
        (
            &["F", "top", "base"],
            json!({"device": "F", "top-node": "top", "base-node": "base"}),
            &["e base", "F top", "top base"],
        ),
    ];
    for kind in KINDS {
        cases.iter().for_each(|case| check("block-commit", kind, case));
    }
}

/// A filter on the highest image that is committed was refused: it goes to the base.
#[test]
fn a_commit_from_the_middle_passes_filters_wherever_they_stand() {
    let nodes = |device, top, base| json!({"device": device, "top-node": top, "base-node": base});
    let cases: [Case; 7] = [
        (&["F", "top", "mid", "base"], nodes("F", "mid", "base"), &["e F", "F top", "top base", "mid base"]),
        (
            &["top", "F", "mid", "base"],
            nodes("top", "F", "base"),
            &["e top", "top base", "F mid", "mid base"],
        ),
        (
            &["top", "mid", "F", "base"],
            nodes("top", "mid", "base"),
            &["e top", "top base", "mid F", "F base"],
        ),
        (&["top", "mid", "F", "base"], nodes("top", "mid", "F"), &["e top", "top F", "mid F", "F base"]),
        (
            &["top", "F", "mid", "base"],
            nodes("top", "mid", "base"),
            &["e top", "top F", "F base", "mid base"],
        ),
        (
            &["top", "F2", "F", "mid", "base"],
            nodes("top", "mid", "base"),
            &["e top", "top F2", "F2 F", "F base", "mid base"],
        ),
        (
            &["top", "F2", "F", "mid", "base"],
            nodes("top", "F", "base"),
            &["e top", "top F2", "F2 base", "F mid", "mid base"],
        ),
    ];
    for kind in KINDS.into_iter().filter(|kind| *kind != COPY_ON_READ) {
        cases.iter().for_each(|case| check("block-commit", kind, case));
    }
    cases[..4].iter().for_each(|case| check("block-commit", COPY_ON_READ, case));
    // It would write the base when that is read-only again.
    let (layout, arguments, _) = &cases[4];
    let mut client = Client::new();
    client.layered(COPY_ON_READ, layout);
    let mut arguments = arguments.clone();
    arguments["job-id"] = json!("j");
    assert_eq!(client.refused("block-commit", arguments), "Block node is read-only");
}

#[test]
fn a_stream_passes_filters_wherever_they_stand() {
    let device = |device, base| json!({"device": device, "base-node": base});
    let cases: [Case; 11] = [
        (&["top", "F", "base"], device("top", "base"), &["e top", "top base", "F base"]),
        (&["top", "F", "base"], device("top", "F"), &["e top", "top F", "F base"]),
        (&["top", "F", "base"], json!({"device": "top"}), &["e top", "F base"]),
        (&["top", "F", "mid", "base"], device("top", "base"), &["e top", "top base", "F mid", "mid base"]),
        (&["top", "mid", "F", "base"], device("top", "base"), &["e top", "top base", "mid F", "F base"]),
        (&["top", "mid", "F", "base"], device("top", "F"), &["e top", "top F", "mid F", "F base"]),
        (
            &["top", "mid", "F", "base"],
            json!({"device": "top", "bottom": "mid"}),
            &["e top", "top F", "mid F", "F base"],
        ),
        (
            &["top", "mid", "F2", "F", "base"],
            device("top", "F"),
            &["e top", "top F", "mid F2", "F2 F", "F base"],
        ),
        (
            &["top", "mid", "F2", "F", "base"],
            device("top", "F2"),
            &["e top", "top F2", "mid F2", "F2 F", "F base"],
        ),
        (
            &["top", "F2", "F", "mid", "base"],
            device("top", "base"),
            &["e top", "top base", "F2 F", "F mid", "mid base"],
        ),
        (&["F", "top", "mid", "base"], device("top", "base"), &["e F", "F top", "top base", "mid base"]),
    ];
    for kind in KINDS {
        cases.iter().for_each(|case| check("block-stream", kind, case));
    }
    let mut client = Client::new();
    client.layered(KINDS[0], &["F", "top", "mid", "base"]);
    let said = client.refused("block-stream", json!({"job-id": "j", "device": "F", "base-node": "base"}));
    assert!(said.starts_with("Permission conflict on node"), "{said}");
}

/// The header of the image above filters names the base as well: opened anew, the chain is what it was.
#[test]
fn headers_above_filters_name_the_base() {
    let mut client = Client::new();
    client.layered(KINDS[0], &["top", "F", "mid", "base"]);
    client.run_job("block-commit", json!({"device": "top", "top-node": "mid", "base-node": "base"}));
    let image = client.daemon.services.context.graph.lock().find("top").unwrap().qcow2.clone().unwrap();
    let backing = image.header().backing.clone().unwrap();
    assert_eq!(backing.name.as_bytes(), b"base.qcow2");
}
