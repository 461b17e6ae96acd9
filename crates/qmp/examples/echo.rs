//! A monitor with one command and one event. Talk to it by hand:
//!
//! ```text
//! $ cargo run --example echo -- /tmp/echo.sock &
//! $ socat - UNIX-CONNECT:/tmp/echo.sock
//! {"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": "echo"}, "capabilities": ["oob"]}}
//! {'execute': 'qmp_capabilities'}
//! {"return": {}}
//! {'execute': 'echo', 'arguments': {'text': 'hello'}, 'id': 1}
//! {"timestamp": {"seconds": 1754000000, "microseconds": 5}, "event": "ECHOED", "data": {"length": 5}}
//! {"return": {"text": "hello"}, "id": 1}
//! ```
//!
//! Without a path it talks on standard input and output.

use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use blockmirror_qmp::schema::{Command, Event, INT, Object, STR, Type, UINT64, opt, req};
use blockmirror_qmp::{Connection, Monitors, Table, Version};
use serde_json::{Map, Value, json};

static ECHO_INFO: Object = Object::new("EchoInfo", "An echo.", &[req("text", STR, "what was said")]);

static ECHO: Command =
    Command::new("echo", "Says it again, and sends `ECHOED`.", &[req("text", STR, "what to say")])
        .returns(Type::Object(&ECHO_INFO), "the echo");

static NAP: Command = Command::new(
    "nap",
    "Sleeps; commands out of band run meanwhile.",
    &[opt("milliseconds", UINT64, "how long, a minute at most").default("1000")],
);

static PING: Command = Command::new("ping", "Does nothing, out of band too.", &[]).oob();

static QUIT: Command = Command::new("quit", "Ends the program.", &[]);

static ECHOED: Event =
    Event::new("ECHOED", "Something was echoed.", &[req("length", INT, "its length in bytes")]);

fn main() -> std::io::Result<()> {
    static MONITORS: OnceLock<Monitors> = OnceLock::new();
    let (quit, asked) = std::sync::mpsc::channel();
    let mut table = Table::new(Version::new(10, 0, 0, "echo"));
    table
        .command(&ECHO, |_, args| {
            let text = args.str("text")?;
            if let Some(monitors) = MONITORS.get() {
                monitors.emit(&ECHOED, Map::from_iter([("length".into(), text.len().into())]));
            }
            Ok(json!({"text": text}))
        })
        .command(&NAP, |_, args| {
            let time = args.opt_u64("milliseconds")?.unwrap_or(1000).min(60_000);
            thread::sleep(Duration::from_millis(time));
            Ok(Value::Null)
        })
        .command(&PING, |_, _| Ok(Value::Null))
        .command(&QUIT, move |_, _| {
            // The receiver is gone only if the program is ending already.
            let _ = quit.send(());
            Ok(Value::Null)
        })
        .event(&ECHOED);
    let monitors = MONITORS.get_or_init(|| Monitors::new(table));
    let listener = match std::env::args_os().nth(1) {
        Some(path) => Some(monitors.listen_unix(path)?),
        None => {
            monitors.serve(Connection::stdio()?)?;
            None
        }
    };
    let _ = asked.recv();
    drop(listener);
    monitors.stop(Duration::from_secs(1));
    Ok(())
}
