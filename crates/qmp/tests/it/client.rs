//! The client against our own monitors, and against servers that do not mean well.

#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is the point")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use blockmirror_qmp::schema::{Command, Event, INT, Object, STR, Type, req};
use blockmirror_qmp::{Client, ClientError, Connection, ErrorClass, Monitors, QmpError, Table, Version};
use proptest::prelude::*;
use serde_json::{Value, json};

static SAID: Object = Object::new("Said", "What was said.", &[req("text", STR, "the text")]);
static SAY: Command = Command::new("say", "Says it again.", &[req("text", STR, "the text")])
    .returns(Type::Object(&SAID), "the same");
static FAIL: Command = Command::new("fail", "Fails.", &[]);
static PANIC: Command = Command::new("panic", "Breaks.", &[]);
static DONE: Event = Event::new("DONE", "It is done.", &[req("number", INT, "which")]);

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);

fn monitors() -> Monitors {
    let mut table = Table::new(Version::new(10, 0, 2, "a test"));
    table
        .command(&SAY, |_, args| Ok(json!({"text": args.str("text")?})))
        .command(&FAIL, |_, _| Err(QmpError::new(ErrorClass::DeviceNotActive, "Block job 'x' not found")))
        .event(&DONE);
    Monitors::new(table)
}

fn client(monitors: &Monitors) -> Client {
    let (ours, theirs) = UnixStream::pair().unwrap();
    monitors.serve(Connection::unix(theirs).unwrap()).unwrap();
    Client::new(ours, LONG).unwrap()
}

#[test]
fn commands_answers_and_events() {
    let monitors = monitors();
    let mut client = client(&monitors);
    assert_eq!((client.version().triple(), client.version().package()), ((10, 0, 2), "a test"));
    monitors.emit(&DONE, [("number".into(), 1.into())].into_iter().collect());
    assert_eq!(client.execute("say", json!({"text": "é\n"})).unwrap(), json!({"text": "é\n"}));
    monitors.emit(&DONE, [("number".into(), 2.into())].into_iter().collect());
    let refused = client.execute("fail", Value::Null).unwrap_err();
    assert_eq!(refused.to_string(), "fail: Block job 'x' not found");
    assert_eq!(refused.refusal().unwrap().class, ErrorClass::DeviceNotActive);
    let unknown = client.execute(PANIC.name, json!({})).unwrap_err();
    assert_eq!(unknown.refusal().unwrap().class, ErrorClass::CommandNotFound);
    for number in [1, 2] {
        let event = client.next_event(LONG).unwrap().unwrap();
        assert_eq!((event.name.as_str(), &event.data["number"]), ("DONE", &json!(number)));
        assert!(event.time.is_some());
    }
    assert_eq!(client.next_event(Duration::ZERO).unwrap(), None);
    assert_eq!(monitors.stop(LONG), 0);
    assert!(matches!(client.next_event(LONG), Err(ClientError::Closed)));
    assert!(matches!(client.execute("say", json!({"text": ""})), Err(ClientError::Closed)));
}

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \
                        \"package\": \"\"}, \"capabilities\": []}}\r\n";

/// A client of a server that says `lines` after the greeting and the answer to the negotiation, whatever it
/// is asked, and then nothing.
fn scripted(lines: impl Into<Vec<u8>>) -> Client {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let lines = lines.into();
    thread::spawn(move || {
        // The peer may be gone.
        let _ = theirs.write_all(GREETING.as_bytes());
        let _ = theirs.write_all(b"{\"return\": {}, \"id\": 1}\r\n");
        let _ = theirs.write_all(&lines);
        let _ = theirs.read_to_end(&mut Vec::new());
    });
    Client::new(ours, LONG).unwrap()
}

fn complaint(lines: &str) -> String {
    let mut client = scripted(lines);
    let error = client.execute("x", json!({})).unwrap_err();
    // The session is over.
    assert!(matches!(client.execute("x", json!({})), Err(ClientError::Closed)), "{error}");
    error.to_string()
}

#[test]
fn nonsense_ends_the_session() {
    let table = [
        "{\"return\": {}, \"id\": 3}",
        "{\"return\": {}, \"id\": \"2\"}",
        "{\"return\": {}}",
        "{\"id\": 2}",
        "{\"event\": 7}",
        "[\"return\"]",
        "{]",
    ]
    .map(|answer| complaint(answer) + "\n")
    .concat();
    insta::assert_snapshot!(table, @r#"
    the server does not speak QMP as expected: unexpected: {"return": {}, "id": 3}
    the server does not speak QMP as expected: unexpected: {"return": {}, "id": "2"}
    the server does not speak QMP as expected: unexpected: {"return": {}}
    the server does not speak QMP as expected: unexpected: {"id": 2}
    the server does not speak QMP as expected: unexpected: {"event": 7}
    the server does not speak QMP as expected: unexpected: ["return"]
    the server does not speak QMP as expected: JSON parse error, expecting value
    "#);
    let deep = complaint(&"[".repeat(2000));
    assert_eq!(deep, "the server does not speak QMP as expected: JSON nesting depth limit exceeded");
    let long = complaint(&format!("{{\"return\": \"{}", "x".repeat(9 << 20)));
    assert_eq!(long, "the server does not speak QMP as expected: JSON token size limit exceeded");
}

#[test]
fn errors_are_the_servers_own_even_if_odd() {
    let error = |line: &str| scripted(line).execute("x", json!({})).unwrap_err().to_string();
    assert_eq!(error("{\"id\": 2, \"error\": {\"class\": \"Odd\", \"desc\": \"no\"}}"), "x: no");
    assert_eq!(error("{\"error\": {\"desc\": \"JSON parse error\"}}"), "x: JSON parse error");
    assert_eq!(error("{\"error\": 7}"), "x: ");
}

#[test]
fn a_late_answer_is_passed_over() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(GREETING.as_bytes()).unwrap();
    theirs.write_all(b"{\"return\": {}, \"id\": 1}").unwrap();
    let mut client = Client::new(ours, LONG).unwrap();
    client.set_timeout(SHORT);
    let error = client.execute("slow", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "the server did not answer within 50ms: slow");
    theirs.write_all(b"{\"return\": \"late\", \"id\": 2} {\"return\": \"now\", \"id\": 3}").unwrap();
    client.set_timeout(LONG);
    assert_eq!(client.execute("next", json!({})).unwrap(), "now");
}

#[test]
fn nobody_who_talks_without_end_keeps_the_client() {
    for noise in [" \r\n", "{\"event\": \"X\"}", "{\"return\": {}, \"id\": 1}"] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let talk = thread::spawn(move || {
            theirs.write_all(GREETING.as_bytes()).unwrap();
            theirs.write_all(b"{\"return\": {}, \"id\": 1}").unwrap();
            while theirs.write_all(noise.repeat(100).as_bytes()).is_ok() {}
        });
        let mut client = Client::new(ours, LONG).unwrap();
        client.set_timeout(SHORT);
        assert!(matches!(client.execute("x", json!({})), Err(ClientError::Timeout { .. })), "{noise}");
        drop(client);
        talk.join().unwrap();
    }
}

#[test]
fn old_events_go_when_nobody_takes_them() {
    let event = |number: u32| format!("{{\"event\": \"E\", \"data\": {{\"n\": {number}}}}}\r\n");
    let events: String = (0..5000).map(event).collect();
    let mut client = scripted(events + "{\"return\": 1, \"id\": 2}");
    assert_eq!(client.execute("x", json!({})).unwrap(), 1);
    assert_eq!(client.dropped_events(), 5000 - 4096);
    assert_eq!(client.next_event(LONG).unwrap().unwrap().data["n"], 5000 - 4096);

    let fat = format!("{{\"event\": \"E\", \"data\": {{\"n\": \"{}\"}}}}\r\n", "x".repeat(300 << 10));
    let mut client = scripted(fat.repeat(10) + "{\"return\": 1, \"id\": 2}");
    assert_eq!(client.execute("x", json!({})).unwrap(), 1);
    assert_eq!(client.dropped_events(), 7);
}

#[test]
fn a_server_that_does_not_greet() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let error = Client::connect(&path, LONG).unwrap_err().to_string();
    assert!(error.ends_with("No such file or directory (os error 2)"), "{error}");
    let listener = UnixListener::bind(&path).unwrap();
    // It is connected, and waits for its turn.
    let error = Client::connect(&path, SHORT).unwrap_err().to_string();
    assert_eq!(error, "the server did not answer within 50ms: the greeting");
    for (greeting, complaint) in [
        ("SSH-2.0-OpenSSH_9.2\r\n", "JSON parse error, stray 'S'"),
        ("{\"jsonrpc\": \"2.0\"}", "no QMP greeting: {\"jsonrpc\": \"2.0\"}"),
        ("{\"QMP\": {\"version\": {\"qemu\": {\"major\": -1}}}}", "no QMP greeting: "),
    ] {
        let listener = listener.try_clone().unwrap();
        let serve = thread::spawn(move || {
            loop {
                let (mut client, _) = listener.accept().unwrap();
                if client.write_all(greeting.as_bytes()).is_ok() {
                    return client;
                }
            }
        });
        let error = Client::connect(&path, LONG).unwrap_err().to_string();
        assert!(error.contains(complaint), "{error}");
        drop(serve.join().unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Bytes of any kind in place of answers: a value or an error, never a panic, never for longer than the
    /// limit.
    #[test]
    fn whatever_a_server_sends(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let mut client = scripted(bytes);
        client.set_timeout(Duration::from_millis(5));
        for _ in 0..4 {
            let _ = client.execute("x", json!({}));
            let _ = client.next_event(Duration::from_millis(1));
        }
    }

    /// Pieces of the protocol in an order of their own.
    #[test]
    fn whatever_it_says_in_json(parts in proptest::collection::vec(0..9_usize, 0..30)) {
        let parts: Vec<_> = parts.into_iter().map(|part| [
            "{\"return\": {}, \"id\": 2}", "{\"event\": \"E\", \"timestamp\": {\"seconds\": 99999999999999999999, \"microseconds\": 1}}",
            "{\"error\": {\"class\": 1}, \"id\": 3}", "{\"id\": -1}", "{\"return\": {}, \"id\": 18446744073709551615}",
            "{\"event\": \"E\", \"data\": [], \"timestamp\": {\"seconds\": 18446744073709551615, \"microseconds\": 18446744073709551615}}",
            "{\"QMP\": {}}", "{", "null ",
        ][part]).collect();
        let mut client = scripted(parts.concat());
        client.set_timeout(Duration::from_millis(5));
        for _ in 0..4 {
            let _ = client.execute("x", json!({}));
            let _ = client.next_event(Duration::from_millis(1));
        }
    }
}
