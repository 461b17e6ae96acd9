//! Sessions as a client sees them: order of answers, commands out of band, events, clients that do not read,
//! ends.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockmirror_qmp::schema::{Command, Event, INT, Object, STR, Type, opt, req};
use blockmirror_qmp::{Connection, ErrorClass, Monitors, QmpError, Table, Version};
use serde_json::{Map, Value, json};

static ECHO: Command = Command::new("echo", "", &[req("text", STR, "")])
    .returns(Type::Object(&Object::new("Echo", "", &[req("text", STR, "")])), "");
static BLOCK: Command = Command::new("block", "", &[]);
static PING: Command = Command::new("ping", "", &[opt("n", INT, "")]).oob();
static FAIL: Command = Command::new("fail", "", &[]);
static PANIC: Command = Command::new("panic", "", &[]);
static LIE: Command = Command::new("lie", "", &[]);
static BLOB: Command = Command::new("blob", "", &[]);
static HUGE: Command = Command::new("huge", "", &[]);
static TICK: Event = Event::new("TICK", "", &[opt("n", INT, ""), opt("text", STR, "")]);

const HOUR: Duration = Duration::from_secs(3600);

/// A monitor with a command that blocks until it is released.
struct Server {
    monitors: Monitors,
    /// Says that `block` has begun.
    blocked: Receiver<()>,
    /// Lets one `block` go.
    release: Sender<()>,
}

impl Server {
    fn new() -> Self {
        let (begun, blocked) = channel();
        let (release, released) = channel::<()>();
        let released = Mutex::new(released);
        let mut table = Table::new(Version::new(10, 0, 0, "test"));
        table
            .command(&ECHO, |_, args| Ok(json!({"text": args.str("text")?})))
            .command(&BLOCK, move |_, _| {
                begun.send(()).unwrap();
                released.lock().unwrap().recv().map_err(|_| QmpError::generic("never released"))?;
                Ok(Value::Null)
            })
            .command(&PING, |_, _| Ok(Value::Null))
            .command(&FAIL, |session, _| {
                let desc = format!("Device 'x{}' not found", session.id());
                Err(QmpError::new(ErrorClass::DeviceNotFound, desc))
            })
            .command(&PANIC, |_, _| panic!("on purpose"))
            .command(&LIE, |_, _| Ok(json!({"surprise": 1})))
            .command(&BLOB, |_, _| Ok(json!({"blob": "x".repeat(100_000)})))
            .command(&HUGE, |_, _| Ok(json!({"blob": "x".repeat(5_000_000)})))
            .event(&TICK);
        Self { monitors: Monitors::new(table), blocked, release }
    }

    fn client(&self) -> Client {
        let (client, server) = UnixStream::pair().unwrap();
        self.monitors.serve(Connection::unix(server).unwrap()).unwrap();
        let mut client = Client::new(client);
        assert!(client.receive().get("QMP").is_some());
        client
    }

    /// A client that has negotiated.
    fn ready(&self) -> Client {
        let mut client = self.client();
        client.send("{'execute': 'qmp_capabilities'}");
        assert_eq!(client.receive(), json!({"return": {}}));
        client
    }

    fn ready_oob(&self) -> Client {
        let mut client = self.client();
        client.send("{'execute': 'qmp_capabilities', 'arguments': {'enable': ['oob']}}");
        assert_eq!(client.receive(), json!({"return": {}}));
        client
    }

    fn tick(&self, n: i64) {
        self.monitors.emit(&TICK, Map::from_iter([("n".into(), n.into())]));
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn new(socket: UnixStream) -> Self {
        Self(BufReader::new(socket))
    }

    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    fn is_hung_up(&mut self) -> bool {
        let mut rest = Vec::new();
        // A reset is an end as well.
        self.0.read_to_end(&mut rest).map_or(true, |_| rest.is_empty())
    }
}

#[test]
fn answers_come_in_order_and_ids_come_back() {
    let server = Server::new();
    let mut client = server.ready();
    client.send(
        "{'execute':'echo','arguments':{'text':'a'},'id':1}{'execute':'fail','id':[2]}bad {'execute':'ping'}",
    );
    assert_eq!(client.receive(), json!({"return": {"text": "a"}, "id": 1}));
    let error = client.receive();
    assert_eq!(error["error"]["class"], "DeviceNotFound");
    assert_eq!(error["id"], json!([2]));
    assert_eq!(client.receive()["error"]["desc"], "JSON parse error, invalid keyword 'bad'");
    assert_eq!(client.receive(), json!({"return": {}}));
}

#[test]
fn out_of_band_passes_a_blocked_command() {
    let server = Server::new();
    let mut client = server.ready_oob();
    client.send("{'execute':'block','id':1}{'execute':'echo','arguments':{'text':'b'},'id':2}");
    server.blocked.recv().unwrap();
    client.send("{'exec-oob':'ping','id':3}{'exec-oob':'echo','id':4}");
    assert_eq!(client.receive(), json!({"return": {}, "id": 3}));
    assert_eq!(client.receive()["error"]["desc"], "The command echo does not support OOB");
    server.release.send(()).unwrap();
    assert_eq!(client.receive(), json!({"return": {}, "id": 1}));
    assert_eq!(client.receive(), json!({"return": {"text": "b"}, "id": 2}));
}

#[test]
fn eight_commands_may_wait_and_no_more_are_read() {
    let server = Server::new();
    let mut client = server.ready_oob();
    // One runs, seven wait: what is out of band is still read.
    client.send(&"{'execute':'block'}".repeat(8));
    server.blocked.recv().unwrap();
    client.send("{'exec-oob':'ping','id':'past'}");
    assert_eq!(client.receive()["id"], "past");
    // With the eighth that waits, nothing is.
    client.send("{'execute':'block'}{'exec-oob':'ping','id':'stuck'}");
    server.release.send(()).unwrap();
    assert_eq!(client.receive(), json!({"return": {}}), "the first block was not passed");
    // Now there is room.
    server.blocked.recv().unwrap();
    assert_eq!(client.receive()["id"], "stuck");
    for _ in 0..8 {
        server.release.send(()).unwrap();
        assert_eq!(client.receive(), json!({"return": {}}));
    }
}

#[test]
fn without_out_of_band_one_command_is_looked_at() {
    let server = Server::new();
    let mut client = server.ready();
    client.send("{'execute':'block'}{'exec-oob':'ping'}{'execute':'ping','id':1}");
    server.blocked.recv().unwrap();
    server.release.send(()).unwrap();
    assert_eq!(client.receive(), json!({"return": {}}));
    assert_eq!(client.receive()["error"]["desc"], "QMP input member 'exec-oob' is unexpected");
    assert_eq!(client.receive(), json!({"return": {}, "id": 1}));
}

#[test]
fn events_reach_all_who_have_negotiated() {
    let server = Server::new();
    let (mut a, mut b, mut silent) = (server.ready(), server.ready(), server.client());
    server.tick(1);
    server.monitors.emit(&TICK, Map::new());
    for client in [&mut a, &mut b] {
        let event = client.receive();
        assert_eq!(event["event"], "TICK");
        assert_eq!(event["data"], json!({"n": 1}));
        assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
        assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
        assert_eq!(event.as_object().unwrap().keys().collect::<Vec<_>>(), ["timestamp", "event", "data"]);
        assert_eq!(client.receive().get("data"), None);
    }
    silent.send("{'execute':'qmp_capabilities'}");
    assert_eq!(silent.receive(), json!({"return": {}}), "what happened before is not reported");
    server.tick(2);
    assert_eq!(silent.receive()["data"]["n"], 2);
}

#[test]
fn a_client_that_does_not_read_loses_the_oldest_events() {
    let server = Server::new();
    let mut client = server.ready();
    let mut other = server.ready();
    // More than the kernel and the queue hold.
    let text = "x".repeat(1000);
    for n in 0..20_000 {
        server
            .monitors
            .emit(&TICK, Map::from_iter([("n".into(), n.into()), ("text".into(), text.as_str().into())]));
    }
    client.send("{'execute':'ping','id':'after'}");
    let mut seen = Vec::new();
    loop {
        let message = client.receive();
        if message["id"] == "after" {
            break;
        }
        seen.push(message["data"]["n"].as_i64().unwrap());
    }
    assert!(seen.is_sorted());
    assert_eq!(seen.last(), Some(&19_999), "the newest are kept");
    assert!(seen.len() < 20_000 && seen.len() > 500, "{}", seen.len());
    other.send("{'execute':'ping','id':'after'}");
    while other.receive()["id"] != "after" {}
}

#[test]
fn a_client_that_does_not_read_gets_no_more_commands_run() {
    let server = Server::new();
    let mut client = server.ready();
    // Far more answers than any buffer holds; all are there in the end, and in order.
    let mut writer = client.0.get_ref().try_clone().unwrap();
    let sent = std::thread::spawn(move || {
        for n in 0..200 {
            writer.write_all(format!("{{'execute':'blob','id':{n}}}").as_bytes()).unwrap();
        }
    });
    for n in 0..200 {
        let answer = client.receive();
        assert_eq!(answer["id"], n);
        assert_eq!(answer["return"]["blob"].as_str().unwrap().len(), 100_000);
    }
    sent.join().unwrap();
}

#[test]
fn a_panic_is_an_answer() {
    let server = Server::new();
    let mut client = server.ready();
    client.send("{'execute':'panic'}{'execute':'ping'}");
    assert_eq!(client.receive()["error"]["desc"], "Internal error: the command panic panicked");
    assert_eq!(client.receive(), json!({"return": {}}));
}

#[test]
fn answers_can_be_held_against_the_schema() {
    let mut table = Table::new(Version::new(10, 0, 0, "test"));
    table.check_answers(true).command(&LIE, |_, _| Ok(json!({"surprise": 1}))).event(&TICK);
    let monitors = Monitors::new(table);
    let (client, server) = UnixStream::pair().unwrap();
    monitors.serve(Connection::unix(server).unwrap()).unwrap();
    let mut client = Client::new(client);
    client.send("{'execute':'qmp_capabilities'}{'execute':'lie'}{'execute':'query-version'}{'execute':'query-commands'}");
    client.receive();
    assert_eq!(client.receive(), json!({"return": {}}));
    let error = "Internal error: the answer of lie is not as its schema says: nothing was to be answered";
    assert_eq!(client.receive()["error"]["desc"], error);
    assert_eq!(client.receive()["return"]["qemu"]["major"], 10);
    assert!(client.receive()["return"].as_array().unwrap().contains(&json!({"name": "lie"})));
    monitors.emit(&TICK, Map::from_iter([("n".into(), "one".into())]));
    let event = client.receive();
    assert_eq!(event["event"], "SCHEMA_VIOLATION");
    assert_eq!(
        event["data"],
        json!({"event": "TICK", "error": "Invalid parameter type for 'n', expected: integer"})
    );
}

#[test]
fn what_was_sent_before_the_end_is_answered() {
    let server = Server::new();
    let mut client = server.client();
    client.send("{'execute':'qmp_capabilities'}{'execute':'ping','id':1}{'execute':'ping','id':2}");
    client.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.receive(), json!({"return": {}}));
    assert_eq!(client.receive()["id"], 1);
    assert_eq!(client.receive()["id"], 2);
    assert!(client.is_hung_up());
}

#[test]
fn stop_lets_answers_out_and_does_not_wait_for_ever() {
    let server = Server::new();
    // Sessions are stopped in the order in which they began: once the second has ended, the first knows of
    // the stop.
    let mut busy = server.ready();
    let mut idle = server.ready();
    busy.send("{'execute':'block','id':'last'}{'execute':'ping'}");
    server.blocked.recv().unwrap();
    let monitors = server.monitors.clone();
    let stopping = std::thread::spawn(move || monitors.stop(HOUR));
    assert!(idle.is_hung_up(), "stop has begun");
    server.release.send(()).unwrap();
    assert_eq!(busy.receive(), json!({"return": {}, "id": "last"}));
    assert!(busy.is_hung_up(), "the next was not begun");
    assert_eq!(stopping.join().unwrap(), 0);
    let (client, end) = UnixStream::pair().unwrap();
    assert!(server.monitors.serve(Connection::unix(end).unwrap()).is_err());
    assert!(Client::new(client).is_hung_up());

    let server = Server::new();
    let mut stuck = server.ready();
    stuck.send("{'execute':'block'}");
    server.blocked.recv().unwrap();
    assert_eq!(server.monitors.stop(Duration::ZERO), 1);
    assert!(stuck.is_hung_up());
}

#[test]
fn stop_does_not_wait_for_a_client_that_does_not_read() {
    let server = Server::new();
    let mut client = server.ready();
    client.send("{'execute':'huge'}");
    // Its beginning has arrived; the rest is not taken.
    assert!(!client.0.fill_buf().unwrap().is_empty());
    assert_eq!(server.monitors.stop(Duration::from_millis(1)), 1, "five megabytes do not fit into a socket");
}

#[test]
fn a_socket_is_private_and_goes_with_its_listener() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    let server = Server::new();
    let listener = server.monitors.listen_unix(&path).unwrap();
    assert_eq!(std::fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut clients: Vec<_> = (0..3).map(|_| Client::new(UnixStream::connect(&path).unwrap())).collect();
    for client in &mut clients {
        client.receive();
        client.send("{'execute':'qmp_capabilities'}{'execute':'ping'}");
        assert_eq!(client.receive(), json!({"return": {}}));
        assert_eq!(client.receive(), json!({"return": {}}));
    }
    listener.wait_first();
    let in_use = server.monitors.listen_unix(&path).unwrap_err();
    assert_eq!(in_use.kind(), io::ErrorKind::AddrInUse);
    drop(listener);
    assert!(!path.exists());
    clients[0].send("{'execute':'ping','id':1}");
    assert_eq!(clients[0].receive()["id"], 1, "sessions go on");
}

#[test]
fn stop_ends_the_wait_for_a_first_client() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    let server = Server::new();
    let listener = server.monitors.listen_unix(&path).unwrap();
    let waiting = std::thread::spawn(move || {
        listener.wait_first();
        listener
    });
    assert_eq!(server.monitors.stop(HOUR), 0);
    let listener = waiting.join().unwrap();
    assert!(path.exists(), "until it is dropped");
    drop(listener);
    assert!(!path.exists());
    // One that comes too late ends at once.
    server.monitors.listen_unix(&path).unwrap().wait_first();
}

#[test]
fn only_a_dead_socket_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::new();
    let path = folder.path().join("dead.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(server.monitors.listen_unix(&path).unwrap());
    let file = folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert_eq!(server.monitors.listen_unix(&file).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let long = folder.path().join("x".repeat(120));
    assert!(server.monitors.listen_unix(&long).is_err());
    assert!(server.monitors.listen_unix(Path::new("/nonexistent/a.sock")).is_err());
    // Another process's file at the same path is not ours to remove.
    let path = folder.path().join("moved.sock");
    let listener = server.monitors.listen_unix(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    drop(listener);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn clients_are_served_on_pipes() {
    let server = Server::new();
    let (from_client, mut to_server) = io::pipe().unwrap();
    let (to_client, from_server) = io::pipe().unwrap();
    server.monitors.serve(Connection::fds(from_client.into(), from_server.into()).unwrap()).unwrap();
    let mut lines = BufReader::new(to_client).lines();
    to_server.write_all(b"{'execute':'qmp_capabilities'}{'execute':'blob'}").unwrap();
    assert!(lines.next().unwrap().unwrap().starts_with("{\"QMP\""));
    assert_eq!(lines.next().unwrap().unwrap(), "{\"return\": {}}");
    assert!(lines.next().unwrap().unwrap().len() > 100_000, "more than a pipe holds");
    assert_eq!(server.monitors.stop(HOUR), 0);
    assert!(lines.next().is_none());
    // The thread that reads closes its end a moment later.
    let is_closed = (0..10_000).any(|_| {
        std::thread::sleep(Duration::from_millis(1));
        to_server.write_all(b"x").is_err()
    });
    assert!(is_closed, "the reader is gone");
}

#[test]
fn any_stream_will_do() {
    /// What was written, for the test.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);
    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let server = Server::new();
    let written = Written::default();
    let (closed, is_closed) = channel();
    let closed = Mutex::new(closed);
    let close = move || {
        let _ = closed.lock().unwrap().send(());
    };
    let input: &[u8] = b"{'execute':'qmp_capabilities'}{'execute':'echo','arguments':{'text':'x'}}";
    server.monitors.serve(Connection::new(input, written.clone(), close)).unwrap();
    is_closed.recv().unwrap();
    let written = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    assert_eq!(
        written.lines().skip(1).collect::<Vec<_>>(),
        ["{\"return\": {}}", "{\"return\": {\"text\": \"x\"}}"]
    );
}

#[test]
fn a_reader_that_panics_ends_its_session() {
    // It once left the session waiting for input for ever: the end was not signalled.
    struct Bad;
    impl Read for Bad {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            panic!("on purpose")
        }
    }
    let server = Server::new();
    let (closed, is_closed) = channel();
    let closed = Mutex::new(closed);
    let close = move || {
        let _ = closed.lock().unwrap().send(());
    };
    server.monitors.serve(Connection::new(Bad, io::sink(), close)).unwrap();
    assert_eq!(is_closed.recv(), Ok(()));
}

#[test]
fn a_thousand_connections_that_drop_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp.sock");
    let server = Server::new();
    let listener = server.monitors.listen_unix(&path).unwrap();
    let script = b"{'execute':'qmp_capabilities'}{'execute':'echo','arguments':{'text':'x'}}\xff{'a':";
    for n in 0..1000 {
        let mut client = UnixStream::connect(&path).unwrap();
        // Anywhere in the script, with the greeting read or not. The server may have hung up first.
        let _ = client.write_all(&script[..n % script.len()]);
        if n % 3 == 0 {
            let _ = client.read(&mut [0; 10]).unwrap();
        }
    }
    drop(listener);
    assert_eq!(server.monitors.stop(HOUR), 0, "all ended by themselves");
    assert_eq!(server.monitors.sessions(), 0);
}
