//! Odd input on a QMP socket: `qmp/*.txt` holds what QEMU's storage daemon answered, and ours must say the
//! same, byte for byte. Where that daemon is installed the recordings are checked against it as well, and
//! `QMP_RECORD=1` makes them anew. The schema that is answered is held against QEMU's too, and the client
//! library from PyPI talks to ours.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use blockmirror_qmp::schema::{
    Alternate, BOOL, Command, Enum, Event, INT, INT64, NULL, Object, STR, Type, UINT32, UINT64, case, opt,
    req, value,
};
use blockmirror_qmp::{Connection, Monitors, Table, Version};
use blockmirror_testing::qemu::{Qemu, python};
use blockmirror_testing::scratch::scratch;
use serde_json::{Map, Value, json};

// As much of QEMU's schema as the recordings touch.

static NOTHING: Object = Object::new("Nothing", "", &[]);

static DISCARD: Enum = Enum::new("BlockdevDiscardOptions", "", &[value("ignore", ""), value("unmap", "")]);
static CACHE: Object =
    Object::new("BlockdevCacheOptions", "", &[opt("direct", BOOL, ""), opt("no-flush", BOOL, "")]);
static DRIVER: Enum = Enum::new(
    "BlockdevDriver",
    "",
    &[value("blkdebug", ""), value("file", ""), value("nbd", ""), value("null-co", ""), value("qcow2", "")],
);
static BLKDEBUG_EVENT: Enum =
    Enum::new("BlkdebugEvent", "", &[value("read_aio", ""), value("write_aio", "")]);
static INJECT_ERROR: Object = Object::new(
    "BlkdebugInjectErrorOptions",
    "",
    &[req("event", Type::Enum(&BLKDEBUG_EVENT), ""), opt("errno", INT, "")],
);
static BLKDEBUG: Object = Object::new(
    "BlockdevOptionsBlkdebug",
    "",
    &[
        req("image", Type::Alternate(&BLOCKDEV_REF), ""),
        opt("inject-error", Type::Array(&Type::Object(&INJECT_ERROR)), ""),
    ],
);
static FILE: Object = Object::new("BlockdevOptionsFile", "", &[req("filename", STR, "")]);
static ADDRESS_TYPE: Enum = Enum::new("SocketAddressType", "", &[value("inet", ""), value("unix", "")]);
static INET: Object = Object::new("InetSocketAddress", "", &[req("host", STR, ""), req("port", STR, "")]);
static UNIX: Object = Object::new("UnixSocketAddress", "", &[req("path", STR, "")]);
static ADDRESS: Object = Object::union(
    "SocketAddress",
    "",
    &[req("type", Type::Enum(&ADDRESS_TYPE), "")],
    "type",
    &[case("inet", &INET), case("unix", &UNIX)],
);
static NBD: Object = Object::new(
    "BlockdevOptionsNbd",
    "",
    &[req("server", Type::Object(&ADDRESS), ""), opt("reconnect-delay", UINT32, "")],
);
static NULL_CO: Object =
    Object::new("BlockdevOptionsNull", "", &[opt("size", INT, ""), opt("latency-ns", UINT64, "")]);
static QCOW2: Object = Object::new(
    "BlockdevOptionsQcow2",
    "",
    &[
        req("file", Type::Alternate(&BLOCKDEV_REF), ""),
        opt("backing", Type::Alternate(&BLOCKDEV_REF_OR_NULL), ""),
    ],
);
static BLOCKDEV_OPTIONS: Object = Object::union(
    "BlockdevOptions",
    "",
    &[
        req("driver", Type::Enum(&DRIVER), ""),
        opt("node-name", STR, ""),
        opt("discard", Type::Enum(&DISCARD), ""),
        opt("cache", Type::Object(&CACHE), ""),
        opt("read-only", BOOL, ""),
    ],
    "driver",
    &[
        case("blkdebug", &BLKDEBUG),
        case("file", &FILE),
        case("nbd", &NBD),
        case("null-co", &NULL_CO),
        case("qcow2", &QCOW2),
    ],
);
static BLOCKDEV_REF: Alternate = Alternate::new("BlockdevRef", "", &[Type::Object(&BLOCKDEV_OPTIONS), STR]);
static BLOCKDEV_REF_OR_NULL: Alternate =
    Alternate::new("BlockdevRefOrNull", "", &[Type::Object(&BLOCKDEV_OPTIONS), STR, NULL]);
static BLOCKDEV_ADD: Command = Command::boxed("blockdev-add", "", &BLOCKDEV_OPTIONS);

static BITMAP_ADD_MEMBERS: Object = Object::new(
    "BlockDirtyBitmapAdd",
    "",
    &[
        req("node", STR, ""),
        req("name", STR, ""),
        opt("granularity", UINT32, ""),
        opt("persistent", BOOL, ""),
        opt("disabled", BOOL, ""),
    ],
);
static BITMAP_ADD: Command = Command::boxed("block-dirty-bitmap-add", "", &BITMAP_ADD_MEMBERS);
static BITMAP: Object = Object::new("BlockDirtyBitmap", "", &[req("node", STR, ""), req("name", STR, "")]);
static BITMAP_OR_STR: Alternate = Alternate::new("BlockDirtyBitmapOrStr", "", &[STR, Type::Object(&BITMAP)]);
static BITMAP_MERGE: Command = Command::new(
    "block-dirty-bitmap-merge",
    "",
    &[
        req("node", STR, ""),
        req("target", STR, ""),
        req("bitmaps", Type::Array(&Type::Alternate(&BITMAP_OR_STR)), ""),
    ],
);
static SET_SPEED: Command =
    Command::new("block-job-set-speed", "", &[req("device", STR, ""), req("speed", INT64, "")]);

static ACTION_KIND: Enum =
    Enum::new("TransactionActionKind", "", &[value("abort", ""), value("block-dirty-bitmap-add", "")]);
static ABORT: Object = Object::new("AbortWrapper", "", &[req("data", Type::Object(&NOTHING), "")]);
static ADD: Object = Object::new("AddWrapper", "", &[req("data", Type::Object(&BITMAP_ADD_MEMBERS), "")]);
static ACTION: Object = Object::union(
    "TransactionAction",
    "",
    &[req("type", Type::Enum(&ACTION_KIND), "")],
    "type",
    &[case("abort", &ABORT), case("block-dirty-bitmap-add", &ADD)],
);
static COMPLETION: Enum =
    Enum::new("ActionCompletionMode", "", &[value("individual", ""), value("grouped", "")]);
static PROPERTIES: Object =
    Object::new("TransactionProperties", "", &[opt("completion-mode", Type::Enum(&COMPLETION), "")]);
static TRANSACTION: Command = Command::new(
    "transaction",
    "",
    &[
        req("actions", Type::Array(&Type::Object(&ACTION)), ""),
        opt("properties", Type::Object(&PROPERTIES), ""),
    ],
);
static QUIT: Command = Command::new("quit", "", &[]);

// Two that QEMU does not have.

static SAID: Object = Object::new("Said", "", &[req("text", STR, "")]);
static SAY: Command = Command::new("say", "", &[req("text", STR, "")]).returns(Type::Object(&SAID), "");
static PING: Command = Command::new("ping", "", &[]).oob();
static DONE: Event = Event::new("DONE", "", &[req("length", INT, "")]);

fn table() -> Table {
    let mut table = Table::new(Version::new(10, 0, 2, "Debian 1:10.0.2+ds-2+deb13u1~bpo12+1"));
    let commands = [&BLOCKDEV_ADD, &BITMAP_ADD, &BITMAP_MERGE, &SET_SPEED, &TRANSACTION, &QUIT];
    for command in commands {
        table.command(command, |_, _| Ok(Value::Null));
    }
    table
}

fn ours() -> Monitors {
    Monitors::new(table())
}

/// QEMU's daemon, until dropped.
struct Qsd {
    child: Child,
    socket: PathBuf,
}

impl Qsd {
    fn start(folder: &Path) -> Option<Self> {
        let socket = folder.join("qsd.sock");
        // The monitor is open before the pid file is written.
        let pidfile = folder.join("qsd.pid");
        let child = Process::new("qemu-storage-daemon")
            .arg("--chardev")
            .arg(format!("socket,id=c,path={},server=on,wait=off", socket.display()))
            .args(["--monitor", "chardev=c", "--pidfile"])
            .arg(&pidfile)
            .stdin(Stdio::null())
            .spawn()
            .ok()?;
        let mut qsd = Self { child, socket };
        while !pidfile.exists() {
            assert!(qsd.child.try_wait().unwrap().is_none(), "the storage daemon ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(qsd)
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Inputs and what came back for each.
struct Recording {
    head: String,
    cases: Vec<(String, String)>,
}

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/daemon/qmp").join(name)
}

fn load(name: &str) -> Recording {
    let text = std::fs::read_to_string(path(name)).unwrap();
    let mut recording = Recording { head: String::new(), cases: Vec::new() };
    for line in text.lines() {
        match (line.strip_prefix("> "), line.strip_prefix("< ")) {
            (Some(input), _) => recording.cases.push((input.into(), String::new())),
            (_, Some(answer)) => {
                let (_, answers) = recording.cases.last_mut().expect("an answer follows an input");
                writeln!(answers, "{answer}").unwrap();
            }
            _ => writeln!(recording.head, "{line}").unwrap(),
        }
    }
    assert!(!recording.cases.is_empty());
    recording
}

fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            bytes.push(u8::try_from(c).unwrap());
            continue;
        }
        bytes.push(match chars.next().unwrap() {
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'x' => u8::from_str_radix(&chars.by_ref().take(2).collect::<String>(), 16).unwrap(),
            c => u8::try_from(c).unwrap(),
        });
    }
    bytes
}

/// A client that can tell when all is answered.
struct Client(BufReader<UnixStream>);

impl Client {
    fn new(socket: UnixStream) -> Self {
        let mut client = Self(BufReader::new(socket));
        assert!(client.line().starts_with("{\"QMP\": "), "a greeting comes first");
        client
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.strip_suffix("\r\n").expect("lines end so").into()
    }

    fn execute(&mut self, command: &str) -> Value {
        self.0.get_mut().write_all(format!("{{'execute': '{command}'}}").as_bytes()).unwrap();
        let answer: Value = serde_json::from_str(&self.line()).unwrap();
        answer["return"].clone()
    }

    /// Sends `bytes`, then what puts any parser in step again and a command that fails in a known way; gives
    /// the lines that came before that failure. The first of `\xff` is an error of its own, and part of what
    /// is recorded.
    fn ask(&mut self, bytes: &[u8]) -> String {
        let all = [bytes, b"\xff{'execute': 'the-end', 'id': 'the-end'}"].concat();
        self.0.get_mut().write_all(&all).unwrap();
        let mut answers = String::new();
        loop {
            let line = self.line();
            if line.starts_with("{\"id\": \"the-end\", \"error\"") {
                return answers;
            }
            writeln!(answers, "{line}").unwrap();
        }
    }
}

/// Answers to all inputs of a recording.
fn replay(recording: &Recording, negotiation: Option<&str>, connect: &dyn Fn() -> UnixStream) -> Vec<String> {
    let mut shared = negotiation.map(|negotiation| {
        let mut client = Client::new(connect());
        client.ask(negotiation.as_bytes());
        client
    });
    let inputs = recording.cases.iter().map(|(input, _)| unescape(input));
    inputs
        .map(|input| match &mut shared {
            Some(client) => client.ask(&input),
            None => Client::new(connect()).ask(&input),
        })
        .collect()
}

fn same(name: &str, recording: &Recording, answers: &[String]) {
    for ((input, recorded), answer) in recording.cases.iter().zip(answers) {
        assert_eq!(answer, recorded, "{name}: {input}");
    }
    assert_eq!(answers.len(), recording.cases.len());
}

fn check(name: &str, negotiation: Option<&str>) {
    let mut recording = load(name);
    let folder = scratch().unwrap();
    if Qemu::find(name).is_some()
        && let Some(qsd) = Qsd::start(folder.path())
    {
        let answers = replay(&recording, negotiation, &|| UnixStream::connect(&qsd.socket).unwrap());
        if std::env::var_os("QMP_RECORD").is_some() {
            let mut text = recording.head.clone();
            for ((input, recorded), answer) in recording.cases.iter_mut().zip(answers) {
                writeln!(text, "> {input}").unwrap();
                for line in answer.lines() {
                    writeln!(text, "< {line}").unwrap();
                }
                *recorded = answer;
            }
            std::fs::write(path(name), text).unwrap();
        } else {
            same("the storage daemon", &recording, &answers);
        }
    }
    let monitors = ours();
    let answers = replay(&recording, negotiation, &|| {
        let (client, server) = UnixStream::pair().unwrap();
        monitors.serve(Connection::unix(server).unwrap()).unwrap();
        client
    });
    same("ours", &recording, &answers);
}

#[test]
fn before_negotiation() {
    check("fresh.txt", None);
}

#[test]
fn requests() {
    check("protocol.txt", Some("{'execute': 'qmp_capabilities'}"));
}

#[test]
fn out_of_band_requests() {
    check("oob.txt", Some("{'execute': 'qmp_capabilities', 'arguments': {'enable': ['oob']}}"));
}

#[test]
fn json() {
    check("json.txt", Some("{'execute': 'qmp_capabilities'}"));
}

#[test]
fn arguments() {
    check("arguments.txt", Some("{'execute': 'qmp_capabilities'}"));
}

/// A type, or the arguments of a command, with the types inside in place of their names.
fn expand(schema: &Value, name: &str) -> Value {
    let entity = schema.as_array().unwrap().iter().find(|entity| entity["name"] == name).unwrap();
    let expand_in = |mut value: Value, key: &str| {
        value[key] = expand(schema, value[key].as_str().unwrap());
        value
    };
    let mut entity = entity.clone();
    match entity["meta-type"].as_str().unwrap() {
        "command" => {
            return expand_in(expand_in(entity, "arg-type"), "ret-type");
        }
        "array" => entity = expand_in(entity, "element-type"),
        "object" | "alternate" => {
            let members = entity["members"].as_array().unwrap().clone();
            let mut members: Vec<_> = members.into_iter().map(|member| expand_in(member, "type")).collect();
            members.sort_by_key(|member| member["name"].to_string() + &member["type"].to_string());
            entity["members"] = members.into();
        }
        "builtin" => return entity,
        _ => {}
    }
    // Names of types are numbers, and ours are others.
    entity["name"] = "*".into();
    entity
}

#[test]
fn introspection() {
    let folder = scratch().unwrap();
    let Some(_) = Qemu::find("introspection") else { return };
    let Some(qsd) = Qsd::start(folder.path()) else { return };
    let mut client = Client::new(UnixStream::connect(&qsd.socket).unwrap());
    client.execute("qmp_capabilities");
    let theirs = client.execute("query-qmp-schema");
    let ours = table().introspect();
    for command in [
        "qmp_capabilities",
        "query-version",
        "query-commands",
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-merge",
        "block-job-set-speed",
        "quit",
    ] {
        assert_eq!(expand(&ours, command), expand(&theirs, command), "{command}");
    }
    // Every entity has the members that QEMU's of the same kind have.
    for entity in ours.as_array().unwrap() {
        let keys = |entity: &Value| {
            let mut keys: Vec<_> = entity.as_object().unwrap().keys().cloned().collect();
            keys.sort();
            keys
        };
        let same_kind = |other: &&Value| {
            let kinds = ["meta-type", "tag", "allow-oob", "features"].map(|key| match key {
                "meta-type" => entity[key] == other[key],
                _ => entity.get(key).is_some() == other.get(key).is_some(),
            });
            kinds == [true; 4]
        };
        let other = theirs.as_array().unwrap().iter().find(same_kind).expect("QEMU has such entities");
        assert_eq!(keys(entity), keys(other), "{entity}");
    }
}

#[test]
fn the_client_library_from_pypi() {
    let Some(python) = python("the_client_library_from_pypi") else { return };
    static MONITORS: OnceLock<Monitors> = OnceLock::new();
    let mut table = table();
    table
        .command(&SAY, |_, args| {
            let text = args.str("text")?;
            let length = text.chars().count().into();
            MONITORS.get().unwrap().emit(&DONE, Map::from_iter([("length".into(), length)]));
            Ok(json!({"text": text}))
        })
        .command(&PING, |_, _| Ok(Value::Null))
        .event(&DONE);
    let monitors = MONITORS.get_or_init(|| Monitors::new(table));
    let folder = scratch().unwrap();
    let socket = folder.path().join("qmp.sock");
    let listener = monitors.listen_unix(&socket).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("qmp_client.py");
    let output = Process::new(&python).arg(script).arg(&socket).output().unwrap();
    drop(listener);
    let printed = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    insta::assert_snapshot!(printed, @r#"
    greeting {"QMP": {"capabilities": ["oob"], "version": {"package": "Debian 1:10.0.2+ds-2+deb13u1~bpo12+1", "qemu": {"major": 10, "micro": 2, "minor": 0}}}}
    version {"package": "Debian 1:10.0.2+ds-2+deb13u1~bpo12+1", "qemu": {"major": 10, "micro": 2, "minor": 0}}
    say {"text": "h\u00e9 \ud83d\ude00"}
    event {"data": {"length": 4}, "event": "DONE"}
    error {"class": "GenericError", "desc": "Invalid parameter type for 'speed', expected: integer"}
    both [{"text": "1"}, {"text": "2"}]
    oob {}
    schema ["DONE"]
    "#);
    assert!(output.status.success());
}
