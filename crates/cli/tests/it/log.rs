//! The log of a daemon: its spans and their ids with `RUST_LOG`, in both formats; nothing without.
//!
//! What is looked for was logged before its effect was seen: a command before its answer, a job's end before
//! its event, a connection before its first reply.

#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is the point")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use blockmirror_qmp::Client;
use serde_json::{Value, json};

use crate::common::Place;

const OURS: &str = env!("CARGO_BIN_EXE_blockmirror");
/// Nothing here takes longer, on a machine that works at all.
const LIMIT: Duration = Duration::from_secs(60);

/// What a daemon prints to standard error that serves a client, mirrors a disk and ends, with this `RUST_LOG`
/// and `--log-format`. Its monitor is on its standard streams, which hold nothing else.
fn log_of(level: Option<&str>, format: Option<&str>) -> String {
    let place = Place::new();
    for name in ["disk", "same"] {
        fs::write(place.path(name), vec![7; 1 << 20]).unwrap();
    }
    fs::write(place.path("copy"), vec![0; 1 << 20]).unwrap();
    let mut command = Command::new(OURS);
    command.current_dir(place.path(".")).arg("daemon").env_remove("RUST_LOG");
    command.envs(level.map(|level| ("RUST_LOG", level)));
    command.args(format.map(|format| format!("--log-format={format}")));
    for name in ["disk", "copy"] {
        let node = format!("driver=raw,node-name={name},file.driver=file,file.filename={name}");
        command.args(["--blockdev", &node]);
    }
    command.args(["--nbd-server", "addr.type=unix,addr.path=nbd", "--export", "nbd,id=e,node-name=disk"]);
    command.args(["--chardev", "socket,id=c,path=qmp,server=on,wait=off", "--monitor", "chardev=c"]);
    command.args(["--chardev", "stdio,id=s", "--monitor", "chardev=s"]);
    let err = File::create(place.path("err")).unwrap();
    let mut daemon = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(err).spawn().unwrap();
    // The greeting: both monitors are there.
    let mut out = BufReader::new(daemon.stdout.take().unwrap());
    let mut said = String::new();
    out.read_line(&mut said).unwrap();
    assert!(said.starts_with(r#"{"QMP""#), "{said:?}");

    let read = place.ours("compare -f raw -F raw @same nbd+unix:///disk?socket=@nbd");
    assert_eq!((read.code, read.err.as_str()), (0, ""), "{read:?}");
    let mut client = Client::connect(place.path("qmp"), LIMIT).unwrap();
    let mirror = json!({"job-id": "m", "device": "disk", "target": "copy", "sync": "full"});
    client.execute("blockdev-mirror", mirror).unwrap();
    wait_for(&mut client, "BLOCK_JOB_READY");
    client.execute("job-complete", json!({"id": "m"})).unwrap();
    wait_for(&mut client, "BLOCK_JOB_COMPLETED");
    client.execute("object-del", json!({"id": "none"})).unwrap_err();
    client.execute("quit", json!({})).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
    for line in out.lines() {
        serde_json::from_str::<Value>(&line.unwrap()).unwrap();
    }
    fs::read_to_string(place.path("err")).unwrap()
}

fn wait_for(client: &mut Client, name: &str) {
    let since = Instant::now();
    while client.next_event(LIMIT).unwrap().is_none_or(|event| event.name != name) {
        assert!(since.elapsed() < LIMIT, "no {name}");
    }
}

#[test]
fn a_daemon_is_silent_by_default() {
    assert_eq!(log_of(None, None), "");
    assert_eq!(log_of(None, Some("json")), "");
}

#[test]
fn spans_carry_the_ids_of_command_connection_and_job() {
    let log = log_of(Some("info"), None);
    for (span, event) in [
        (r#"command{session="#, r#"command="blockdev-mirror"}"#),
        (r#"command{session="#, r#"command="object-del"}: blockmirror_qmp::protocol: failed"#),
        (r#"connection{peer="pid "#, r#"export="disk""#),
        (r#"job{id="m" kind="mirror"}:mirror: "#, "begins"),
        (r#"job{id="m" kind="mirror"}: "#, "ready"),
        (r#"job{id="m" kind="mirror"}: "#, "completed"),
    ] {
        assert!(
            log.lines().any(|line| line.contains(span) && line.contains(event)),
            "{span} {event}:\n{log}"
        );
    }
    assert!(log.lines().all(|line| line.contains(" INFO ") || line.contains(" WARN ")), "{log}");
}

#[test]
fn json_is_an_object_a_line_with_its_spans() {
    let log = log_of(Some("blockmirror=info"), Some("json"));
    let events: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let has = |span: Value, message: &str| {
        events.iter().any(|event| event["span"] == span && event["fields"]["message"] == message)
    };
    assert!(has(json!({"name": "job", "id": "m", "kind": "mirror"}), "completed"), "{log}");
    let command =
        |event: &Value| event["span"]["command"] == "job-complete" && event["span"]["session"].is_u64();
    assert!(events.iter().any(command), "{log}");
    let connected =
        |event: &Value| event["fields"]["message"] == "connected" && event["spans"][0]["export"] == "disk";
    assert!(events.iter().any(connected), "{log}");
}

#[test]
fn a_filter_that_is_not_valid_is_named_and_ignored() {
    let log = log_of(Some("blockmirror=loud"), None);
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.starts_with("blockmirror: note: RUST_LOG is ignored: "), "{log}");
}
