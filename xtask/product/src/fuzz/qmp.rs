//! Monitors that give almost the right commands, to a whole daemon: nodes, jobs and bitmaps in memory.
//!
//! Each turn has a daemon of its own. Nothing it is asked creates a file, whatever the changes make of it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use blockmirror_block::testing::Rng;
use blockmirror_daemon::Daemon;
use blockmirror_qmp::Connection;
use blockmirror_testing::Outcome;
use serde_json::{Value, json};

use super::spoil::spoil_one;
use super::{HANG, Heard, Listener};

/// Commands that lead on from each other when they come in a lucky order.
const COMMANDS: [&str; 32] = [
    r#"{"execute":"blockdev-add","arguments":{"driver":"null-co","node-name":"a","size":1048576,"read-zeroes":true}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"null-co","node-name":"b","size":1048576}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"c","file":{"driver":"null-co","size":1048576}}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"throttle","node-name":"d","throttle-group":"g","file":"a"}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"e","file":{"driver":"null-co","read-zeroes":true},"backing":null}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"blkdebug","node-name":"f","image":"b","inject-error":[{"event":"none","iotype":"write","errno":5,"sector":8}],"set-state":[{"event":"write_aio","new_state":2}]}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"file","node-name":"h","filename":"nothing-here"}}"#,
    r#"{"execute":"blockdev-add","arguments":{"driver":"copy-on-read","node-name":"i","file":"a"}}"#,
    r#"{"execute":"blockdev-del","arguments":{"node-name":"a"}}"#,
    r#"{"execute":"blockdev-del","arguments":{"node-name":"b"}}"#,
    r#"{"execute":"blockdev-del","arguments":{"node-name":"d"}}"#,
    r#"{"execute":"blockdev-del","arguments":{"node-name":"i"}}"#,
    r#"{"execute":"object-add","arguments":{"qom-type":"throttle-group","id":"g","limits":{"iops-total":100}}}"#,
    r#"{"execute":"object-del","arguments":{"id":"g"}}"#,
    r#"{"execute":"blockdev-mirror","arguments":{"job-id":"j","device":"a","target":"b","sync":"full","granularity":65536,"buf-size":1048576,"speed":1000,"on-source-error":"stop","on-target-error":"ignore","copy-mode":"write-blocking"}}"#,
    r#"{"execute":"blockdev-mirror","arguments":{"job-id":"k","device":"c","target":"b","sync":"incremental","bitmap":"m","bitmap-mode":"on-success","copy-mode":"auto"}}"#,
    r#"{"execute":"job-pause","arguments":{"id":"j"}}"#,
    r#"{"execute":"job-resume","arguments":{"id":"j"}}"#,
    r#"{"execute":"job-complete","arguments":{"id":"j"}}"#,
    r#"{"execute":"job-cancel","arguments":{"id":"j"}}"#,
    r#"{"execute":"block-job-cancel","arguments":{"device":"j","force":true}}"#,
    r#"{"execute":"block-job-set-speed","arguments":{"device":"j","speed":0}}"#,
    r#"{"execute":"block-job-change","arguments":{"id":"j","type":"mirror","copy-mode":"write-blocking"}}"#,
    r#"{"execute":"block-dirty-bitmap-add","arguments":{"node":"a","name":"m","granularity":4096,"disabled":false}}"#,
    r#"{"execute":"block-dirty-bitmap-merge","arguments":{"node":"a","target":"m","bitmaps":["m",{"node":"a","name":"m"}]}}"#,
    r#"{"execute":"block-dirty-bitmap-remove","arguments":{"node":"a","name":"m"}}"#,
    r#"{"execute":"transaction","arguments":{"actions":[{"type":"block-dirty-bitmap-clear","data":{"node":"a","name":"m"}},{"type":"block-dirty-bitmap-add","data":{"node":"b","name":"m"}}],"properties":{"completion-mode":"grouped"}}}"#,
    r#"{"execute":"block_resize","arguments":{"node-name":"a","size":2097152}}"#,
    r#"{"execute":"query-named-block-nodes","arguments":{"flat":true}}"#,
    r#"{"execute":"query-jobs"}"#,
    r#"{"execute":"query-blockstats","arguments":{"query-nodes":true}}"#,
    r#"{"execute":"query-block-jobs","id":{"a":[1]}}"#,
];

/// Daemons, one a turn.
pub(super) struct QmpListener {
    commands: Vec<Value>,
}

impl QmpListener {
    pub(super) fn new() -> Outcome<Self> {
        let commands = COMMANDS.into_iter().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(Self { commands })
    }

    /// One of the commands, as it is, with a value changed, or with bytes changed.
    fn command(&self, rng: &mut Rng) -> Vec<u8> {
        let mut command = rng.pick(&self.commands);
        let change = rng.below(20);
        if change >= 10 {
            let other = rng.pick(&self.commands);
            match command.get_mut("arguments") {
                Some(arguments) if change < 18 => change_value(rng, arguments, &other),
                _ => change_value(rng, &mut command, &other),
            }
        }
        let mut bytes = command.to_string().into_bytes();
        if change == 19 {
            spoil_one(rng, &mut bytes);
            // Whatever was left open does not swallow what comes next.
            bytes.push(0xff);
        }
        bytes
    }
}

impl Listener for QmpListener {
    fn speak(&self, seed: u64, count: u64) -> Outcome<Heard> {
        let mut rng = Rng::new(seed, 3);
        let daemon = Daemon::new(Vec::new());
        let (mut ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(HANG))?;
        daemon.monitors().serve(Connection::unix(theirs)?)?;
        let lines = BufReader::new(ours.try_clone()?);
        let listener = thread::spawn(move || listen(lines));
        ours.write_all(br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#)?;
        for _ in 0..count {
            ours.write_all(&self.command(&mut rng))?;
            ours.write_all(b"\n")?;
        }
        ours.write_all(b"{\"execute\":\"query-version\",\"id\":\"the end\"}")?;
        let heard = listener.join().map_err(|_| "the listener panicked")??;
        daemon.quit();
        daemon.run();
        Ok(heard)
    }

    fn left(&self) -> Outcome {
        Ok(())
    }
}

/// Counts answers until the last command has its own.
fn listen(mut lines: BufReader<UnixStream>) -> Outcome<Heard> {
    let mut heard = Heard::default();
    let mut line = String::new();
    loop {
        line.clear();
        if lines.read_line(&mut line)? == 0 {
            return Err(format!("the daemon hung up: {heard:?}").into());
        }
        let said: Value = serde_json::from_str(&line)?;
        if said.get("id") == Some(&json!("the end")) {
            heard.honest += 1;
            return Ok(heard);
        }
        heard.done += u64::from(said.get("return").is_some());
        heard.refused += u64::from(said.get("error").is_some());
    }
}

/// Puts something else in the place of a value somewhere in `value`.
fn change_value(rng: &mut Rng, value: &mut Value, other: &Value) {
    let len = match value {
        Value::Object(members) => members.len(),
        Value::Array(items) => items.len(),
        _ => 0,
    };
    if len == 0 || rng.chance(10) {
        *value = another(rng, other);
        return;
    }
    let index = rng.index(len);
    match value {
        Value::Array(items) if rng.chance(80) => change_value(rng, &mut items[index], other),
        Value::Array(items) => items.push(another(rng, other)),
        Value::Object(members) => {
            let key = members.keys().nth(index).cloned().unwrap_or_default();
            if rng.chance(85) {
                change_value(rng, &mut members[&key], other);
            } else if let Some(moved) = members.remove(&key)
                && rng.chance(50)
            {
                members.insert(rng.pick(&["id", "device", "node-name", "x", "file", ""]).into(), moved);
            }
        }
        _ => {}
    }
}

fn another(rng: &mut Rng, other: &Value) -> Value {
    match rng.below(12) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(rng.next()),
        3 => json!(-1),
        4 => json!(512u64 << rng.below(56)),
        5 => json!(1.5),
        6 => json!("x".repeat(rng.below(300) as usize)),
        7 => json!([]),
        8 => json!({}),
        9 => other["arguments"].clone(),
        10 => other.clone(),
        _ => json!(rng.pick(&["a", "b", "c", "d", "j", "m", "g", "null-co", "raw", "qcow2", "top", "none"])),
    }
}
