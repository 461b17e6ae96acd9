//! State, lists and events of jobs change in one step: a client that acts on an event at once finds what it
//! says.

use std::collections::BTreeMap;

use super::*;

const ROUNDS: usize = 200;

impl Client {
    fn null(&mut self, name: &str, size: u64) {
        self.run("blockdev-add", json!({"driver": "null-co", "node-name": name, "size": size}));
    }

    fn mirror(&mut self, more: Value) {
        let mut arguments = json!({"job-id": "j", "device": "a", "target": "b", "sync": "full"});
        for (key, value) in more.as_object().unwrap() {
            arguments[key] = value.clone();
        }
        self.run("blockdev-mirror", arguments);
    }

    /// The states of `job` that were sent so far, and forgets them.
    fn states(&mut self, job: &str) -> Vec<String> {
        let (mine, others) = std::mem::take(&mut self.events)
            .into_iter()
            .partition(|event: &Value| event["event"] == "JOB_STATUS_CHANGE" && event["data"]["id"] == job);
        self.events = others;
        mine.into_iter().map(|event| event["data"]["status"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits for an event of which `matches` is true of name and data. It stays among the events.
    fn until(&mut self, matches: impl Fn(&str, &Value) -> bool) {
        let mut seen = 0;
        loop {
            for event in &self.events[seen..] {
                if matches(event["event"].as_str().unwrap(), &event["data"]) {
                    return;
                }
            }
            seen = self.events.len();
            let event = self.read();
            self.events.push(event);
        }
    }

    fn nothing_is_left(&mut self, nodes: &[&str]) {
        assert_eq!(self.run("query-jobs", json!({})), json!([]));
        // The whole end was one step: its last event was sent before that answer.
        assert_eq!(self.states("j").last().unwrap(), "null");
        assert_eq!(self.run("query-block-jobs", json!({})), json!([]));
        let there = self.run("query-named-block-nodes", json!({}));
        let there: Vec<_> = there.as_array().unwrap().iter().map(|node| &node["node-name"]).collect();
        assert!(nodes.iter().all(|node| there.iter().any(|name| *name == node)), "{there:?}");
        for node in nodes {
            self.run("blockdev-del", json!({"node-name": node}));
        }
        self.events.clear();
    }
}

/// A job was still listed when its last event was there already, now and then.
#[test]
fn on_the_event_of_its_end_a_job_is_gone_and_its_nodes_are_free() {
    let mut client = Client::new();
    for round in 0..ROUNDS {
        client.null("a", SIZE);
        client.null("b", if round % 5 == 4 { SIZE / 2 } else { SIZE });
        client.mirror(json!({}));
        if round % 5 != 4 {
            client.until(|event, _| event == "BLOCK_JOB_READY");
        }
        match round % 5 {
            0 => client.run("job-complete", json!({"id": "j"})),
            1 => client.run("block-job-cancel", json!({"device": "j"})),
            2 => client.run("job-cancel", json!({"id": "j"})),
            3 => client.run("block-job-cancel", json!({"device": "j", "force": true})),
            _ => Value::Null,
        };
        client.until(|event, _| matches!(event, "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED"));
        client.nothing_is_left(&["a", "b"]);
    }
}

/// The same for jobs on chains, and a bitmap that was busy.
#[test]
fn on_the_event_of_its_end_a_chain_is_free() {
    let mut client = Client::new();
    client.chain();
    client.run("block-dirty-bitmap-add", json!({"node": "base", "name": "m"}));
    for round in 0..ROUNDS / 4 {
        let (command, arguments) = match round % 2 {
            0 => ("block-stream", json!({"job-id": "j", "device": "top", "base-node": "mid"})),
            _ => ("block-commit", json!({"job-id": "j", "device": "top", "top-node": "top"})),
        };
        client.run(command, arguments);
        if round % 2 == 1 {
            client.until(|event, _| event == "BLOCK_JOB_READY");
            client.run("job-cancel", json!({"id": "j"}));
        }
        client.until(|event, _| matches!(event, "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED"));
        client.run("block-dirty-bitmap-clear", json!({"node": "base", "name": "m"}));
        // Its name is free.
        let again = json!({"job-id": "j", "device": "top", "auto-finalize": false});
        client.events.clear();
        client.run("block-stream", again);
        client.run("job-cancel", json!({"id": "j"}));
        client.until(|event, _| event == "BLOCK_JOB_CANCELLED");
        client.nothing_is_left(&[]);
    }
}

/// The reason came with the last event only.
#[test]
fn a_job_that_is_aborting_says_why() {
    let mut client = Client::new();
    client.null("a", SIZE);
    client.null("short", SIZE / 2);
    let aborting = |event: &str, data: &Value| event == "JOB_STATUS_CHANGE" && data["status"] == "aborting";
    for round in 0..ROUNDS / 4 {
        let (wanted, cancel) = match round % 3 {
            0 => ("different sizes", false),
            1 => ("No such file or directory", false),
            _ => ("Operation canceled", true),
        };
        match round % 3 {
            0 => client.mirror(json!({"target": "short", "auto-dismiss": false})),
            1 => {
                let file = json!({"driver": "file", "filename": client.path("no/such"), "size": 512});
                client.run("blockdev-create", json!({"job-id": "j", "options": file}));
            }
            _ => {
                client.null("c", SIZE);
                client.mirror(json!({"target": "c", "auto-dismiss": false}));
            }
        }
        if cancel {
            client.run("job-cancel", json!({"id": "j"}));
        }
        client.until(aborting);
        let jobs = client.run("query-jobs", json!({}));
        assert!(jobs[0]["error"].as_str().unwrap().contains(wanted), "round {round}: {jobs}");
        client.until(|_, data| data["status"] == "concluded");
        client.run("job-dismiss", json!({"id": "j"}));
        if cancel {
            client.run("blockdev-del", json!({"node-name": "c"}));
        }
        client.events.clear();
    }
}

/// What jobs that `quit` ends say arrives before the connection ends.
#[test]
fn the_events_of_jobs_that_quit_ends_arrive() {
    for _ in 0..ROUNDS / 10 {
        let mut client = Client::new();
        let daemon = Arc::clone(&client.daemon);
        let run = std::thread::spawn(move || daemon.run());
        let ids = ["one", "two", "three"];
        for (id, target) in ids.iter().zip(["b", "d", "f"]) {
            let source = format!("s{target}");
            client.null(&source, SIZE);
            client.null(target, SIZE);
            client.mirror(json!({"job-id": id, "device": source, "target": target}));
        }
        client.run("quit", json!({}));
        let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut lines = std::mem::take(&mut client.events);
        let mut text = String::new();
        while client.socket.read_line(&mut text).unwrap() > 0 {
            lines.push(serde_json::from_str(&text).unwrap());
            text.clear();
        }
        run.join().unwrap();
        for event in lines {
            let data = &event["data"];
            let id = data["id"].as_str().or(data["device"].as_str()).unwrap().to_owned();
            let what = data["status"].as_str().unwrap_or_else(|| event["event"].as_str().unwrap());
            seen.entry(id).or_default().push(what.to_owned());
        }
        for id in ids {
            let last: Vec<_> = seen[id].iter().rev().take(4).rev().map(String::as_str).collect();
            assert_eq!(last, ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"], "{id}: {seen:?}");
        }
    }
}

/// As in QEMU: a start that is refused once there is a job shows as a short life of it.
#[test]
fn a_refused_start_is_seen() {
    let mut client = Client::new();
    client.chain();
    client.null("a", SIZE);
    client.null("b", SIZE);
    client.run("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": client.path("nbd")}}}));
    client.run("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "b", "writable": true}));
    let null = json!({"driver": "null-co", "node-name": "r", "size": SIZE, "read-only": true});
    client.run("blockdev-add", null);
    for (target, sync, seen) in
        [("b", "full", true), ("r", "full", true), ("a", "full", false), ("no", "full", false)]
    {
        let arguments = json!({"job-id": "j", "device": "a", "target": target, "sync": sync});
        client.refused("blockdev-mirror", arguments);
        assert_eq!(client.states("j"), if seen { vec!["created", "null"] } else { vec![] }, "{target}");
        assert_eq!(client.run("query-jobs", json!({})), json!([]));
    }
    // The name is free, and the nodes are.
    client.run("blockdev-del", json!({"node-name": "r"}));
    client.run("block-stream", json!({"job-id": "j", "device": "top"}));
    client.wait("BLOCK_JOB_COMPLETED");
}

/// What is to be copied, as QEMU counts it: what the layers above decide, and not what lies below them.
#[test]
fn progress_counts_what_is_to_be_copied() {
    const BLOCK: u64 = 65536;
    let mut client = Client::new();
    client.image("over.qcow2", 4, None);
    client.chain();
    client.add("over", "over.qcow2", json!("top"));
    client.run("human-monitor-command", json!({"command-line": "qemu-io over \"write -z 512k 128k\""}));
    for (command, more, len) in [
        ("blockdev-mirror", json!({"sync": "full", "target": "t"}), SIZE),
        ("blockdev-mirror", json!({"sync": "top", "target": "t"}), 3 * BLOCK),
        ("blockdev-mirror", json!({"sync": "none", "target": "t"}), 0),
        ("block-commit", json!({"base-node": "top"}), 3 * BLOCK),
        ("block-commit", json!({"base-node": "mid"}), 4 * BLOCK),
        ("block-commit", json!({"base-node": "base"}), 5 * BLOCK),
    ] {
        if command == "blockdev-mirror" {
            client.null("t", SIZE);
        }
        let mut arguments = json!({"job-id": "j", "device": "over"});
        for (key, value) in more.as_object().unwrap() {
            arguments[key] = value.clone();
        }
        client.run(command, arguments);
        let data = client.wait("BLOCK_JOB_READY");
        assert_eq!((&data["len"], &data["offset"]), (&json!(len), &json!(len)), "{command} {more}");
        client.run("job-cancel", json!({"id": "j"}));
        client.wait_for_status("null");
        if command == "blockdev-mirror" {
            client.run("blockdev-del", json!({"node-name": "t"}));
        }
    }
    // Nothing allocated, nothing to do.
    client.run(
        "blockdev-snapshot-sync",
        json!({"node-name": "over", "snapshot-node-name": "new", "snapshot-file": client.path("new")}),
    );
    client.run("block-commit", json!({"job-id": "j", "device": "new", "base-node": "over"}));
    assert_eq!(client.wait("BLOCK_JOB_READY")["len"], 0);
}
