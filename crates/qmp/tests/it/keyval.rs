//! Options on a command line. Texts of errors are what qemu-storage-daemon 10.0 prints for the same options.

#![allow(clippy::unwrap_used, reason = "in a test a failure is the point")]

use blockmirror_qmp::keyval::{flat, options, parse};
use blockmirror_qmp::schema::*;
use proptest::prelude::*;
use serde_json::{Value, json};

static DRIVER: Enum = Enum::new(
    "BlockdevDriver",
    "",
    &[value("null-co", ""), value("qcow2", ""), value("quorum", ""), value("nbd", "")],
);
static CACHE: Object = Object::new("Cache", "", &[opt("direct", BOOL, ""), opt("no-flush", BOOL, "")]);
static NULL_CO: Object =
    Object::new("Null", "", &[opt("size", INT, ""), opt("latency-ns", UINT64, ""), opt("block", SIZE, "")]);
static QCOW2: Object = Object::new(
    "Qcow2",
    "",
    &[req("file", Type::Alternate(&REF), ""), opt("backing", Type::Alternate(&REF_OR_NULL), "")],
);
static QUORUM: Object = Object::new(
    "Quorum",
    "",
    &[req("children", Type::Array(&Type::Alternate(&REF)), ""), req("vote-threshold", INT, "")],
);
static NBD: Object = Object::new(
    "Nbd",
    "",
    &[opt("reconnect-delay", UINT32, ""), opt("queues", UINT16, ""), opt("ratio", NUMBER, "")],
);
static NODE: Object = Object::union(
    "Node",
    "",
    &[
        req("driver", Type::Enum(&DRIVER), ""),
        opt("node-name", STR, ""),
        opt("cache", Type::Object(&CACHE), ""),
        opt("read-only", BOOL, ""),
    ],
    "driver",
    &[case("null-co", &NULL_CO), case("qcow2", &QCOW2), case("quorum", &QUORUM), case("nbd", &NBD)],
);
static REF: Alternate = Alternate::new("BlockdevRef", "", &[Type::Object(&NODE), STR]);
static REF_OR_NULL: Alternate = Alternate::new("BlockdevRefOrNull", "", &[Type::Object(&NODE), STR, NULL]);

fn read(text: &str) -> Result<Value, String> {
    options(text, &NODE, Some("driver"))
        .map(|args| Value::Object(args.into_map()))
        .map_err(|error| error.desc)
}

#[test]
fn values_get_their_types() {
    for (text, value) in [
        ("null-co", json!({"driver": "null-co"})),
        (
            "driver=null-co,size=0x10,read-only=yes",
            json!({"driver": "null-co", "read-only": true, "size": 16}),
        ),
        (
            "driver=null-co,block=1.5k,latency-ns=-1",
            json!({"driver": "null-co", "latency-ns": u64::MAX, "block": 1536}),
        ),
        ("null-co,node-name=a,,b,", json!({"driver": "null-co", "node-name": "a,b"})),
        ("null-co,node-name=a,node-name=b", json!({"driver": "null-co", "node-name": "b"})),
        ("null-co,node-name=a=b", json!({"driver": "null-co", "node-name": "a=b"})),
        ("null-co,node-name=", json!({"driver": "null-co", "node-name": ""})),
        ("qcow2,file=x,backing=y", json!({"driver": "qcow2", "file": "x", "backing": "y"})),
        (
            "driver=qcow2,file.driver=null-co,file.cache.direct=off",
            json!({"driver": "qcow2", "file": {"driver": "null-co", "cache": {"direct": false}}}),
        ),
        (
            "quorum,vote-threshold=1,children.1=b,children.0.driver=null-co,children.0.size=5",
            json!({"driver": "quorum", "children": [{"driver": "null-co", "size": 5}, "b"], "vote-threshold": 1}),
        ),
        (
            "quorum,vote-threshold=010,children.00=a",
            json!({"driver": "quorum", "children": ["a"], "vote-threshold": 8}),
        ),
        (
            "nbd,reconnect-delay=4294967295,ratio=0.5",
            json!({"driver": "nbd", "reconnect-delay": u32::MAX, "ratio": 0.5}),
        ),
        (
            "{'driver': 'qcow2', 'file': 'x', 'backing': null}",
            json!({"driver": "qcow2", "file": "x", "backing": null}),
        ),
    ] {
        assert_eq!(read(text), Ok(value), "{text}");
    }
}

/// Texts, and QEMU's error for each.
const ERRORS: &[(&str, &str)] = &[
    ("", "Parameter 'driver' is missing"),
    ("driver", "Parameter 'driver' does not accept value 'driver'"),
    ("driver=", "Parameter 'driver' does not accept value ''"),
    (",", "Invalid parameter ''"),
    ("=a", "Invalid parameter ''"),
    ("a,b", "Expected '=' after parameter 'b'"),
    ("a%,b=1", "Expected"),
    ("null-co,a%b", "Invalid parameter 'a%b'"),
    ("null-co,read-only", "Expected '=' after parameter 'read-only'"),
    ("null-co,size=1k", "Parameter 'size' expects integer"),
    ("null-co,size=", "Parameter 'size' expects integer"),
    ("null-co,size=99999999999999999999", "Parameter 'size' expects integer"),
    ("null-co,latency-ns=abc", "Parameter 'latency-ns' expects integer"),
    ("null-co,block=1.5", "Parameter 'block' expects size"),
    ("null-co,read-only=1", "Parameter 'read-only' expects 'on' or 'off'"),
    ("null-co,read-only=ON", "Parameter 'read-only' expects 'on' or 'off'"),
    ("null-co,cache=1", "Invalid parameter type for 'cache', expected: object"),
    ("null-co,cache.direct=1", "Parameter 'cache.direct' expects 'on' or 'off'"),
    ("null-co,cache.foo=1,bar=2", "Parameter 'cache.foo' is unexpected"),
    ("null-co,foo.bar=1", "Parameter 'foo' is unexpected"),
    ("null-co,foo.bar=1,foo=2", "Parameters 'foo.*' used inconsistently"),
    ("null-co,foo=2,foo.bar=1", "Parameters 'foo.*' used inconsistently"),
    ("null-co,foo=2,foo.bar", "Parameters 'foo.*' used inconsistently"),
    ("null-co,foo.bar=1,foo.bar.x=2,zz", "Parameters 'foo.bar.*' used inconsistently"),
    ("null-co,a.0=1,a.b=2", "Parameters 'a.*' used inconsistently"),
    ("null-co,foo.1=1", "Parameter 'foo.0' missing"),
    ("null-co,a.0.b.1=1", "Parameter 'a.0.b.0' missing"),
    ("null-co,a..b=1", "Invalid parameter 'a..b'"),
    ("null-co,.a=1", "Invalid parameter '.a'"),
    ("null-co,a.=1", "Invalid parameter 'a.'"),
    ("null-co,0=1", "Invalid parameter '0'"),
    ("null-co,a.1a=1", "Invalid parameter 'a.1a'"),
    ("null-co,_a=1", "Invalid parameter '_a'"),
    ("null-co,é=1", "Invalid parameter 'é'"),
    ("null-co,A_b-c=1", "Parameter 'A_b-c' is unexpected"),
    ("null-co,__org.qemu_x.y=1", "Parameter '__org.qemu_x' is unexpected"),
    ("null-co,help", "Help is not available for this option"),
    ("?", "Help is not available for this option"),
    ("null-co,,", "Parameter 'driver' does not accept value 'null-co,'"),
    ("driver.x=1", "Parameters 'driver.*' are unexpected"),
    ("null-co,size.x=1", "Parameters 'size.*' are unexpected"),
    ("null-co,read-only.0=1", "Parameters 'read-only.*' are unexpected"),
    ("qcow2,file.driver.x=1", "Parameters 'file.driver.*' are unexpected"),
    ("qcow2,file.0=a", "Invalid parameter type for 'file', expected: BlockdevRef"),
    ("qcow2,file=x,backing.0=1", "Invalid parameter type for 'backing', expected: BlockdevRefOrNull"),
    ("quorum,vote-threshold=1,children=a", "Invalid parameter type for 'children', expected: array"),
    ("quorum,vote-threshold=1,children.1=b", "Parameter 'children.0' missing"),
    ("quorum,vote-threshold=1,children.99999999999999999999=a", "Parameter 'children.0' missing"),
    ("quorum,vote-threshold=1,children.0=a,children.x=b", "Parameters 'children.*' used inconsistently"),
    ("quorum,vote-threshold=1,children.-1=a", "Invalid parameter 'children.-1'"),
    (
        "quorum,vote-threshold=1,children.0.driver=null-co,children.0.x=b",
        "Parameter 'children.0.x' is unexpected",
    ),
    ("nbd,reconnect-delay=4294967296", "Parameter 'reconnect-delay' expects uint32_t"),
    ("nbd,reconnect-delay=abc", "Parameter 'reconnect-delay' expects integer"),
    ("nbd,queues=-1", "Parameter 'queues' expects uint16_t"),
    ("{", "JSON parse error, premature EOI"),
    ("{\"driver\":\"nu", "JSON parse error, stray '\"nu'"),
    ("{}", "Parameter 'driver' is missing"),
    ("{} x", "Expecting at most one JSON value"),
    ("{}{}", "Expecting at most one JSON value"),
    ("{'driver':'null-co','size':'1k'}", "Invalid parameter type for 'size', expected: integer"),
    ("[]", "Parameter 'driver' does not accept value '[]'"),
];

#[test]
fn errors_are_qemus() {
    let long = "y".repeat(128);
    let too_long = format!("Parameter '{long}' is too long");
    assert_eq!(read(&format!("null-co,{long}=1")), Err(too_long));
    let too_long = format!("Parameter fragment '{long}' is too long");
    assert_eq!(read(&format!("null-co,a.{long}.c=1")), Err(too_long));
    for (text, error) in ERRORS {
        if *error == "Expected" {
            // The implied key takes whatever stands there.
            assert_eq!(read(text), Err("Parameter 'driver' does not accept value 'a%'".into()));
            continue;
        }
        assert_eq!(read(text), Err((*error).into()), "{text}");
    }
}

#[test]
fn flat_options_have_flags() {
    static SOCKET: Object = Object::new(
        "Socket",
        "",
        &[
            opt("backend", STR, ""),
            opt("id", STR, ""),
            opt("path", STR, ""),
            opt("server", BOOL, ""),
            opt("wait", BOOL, ""),
            opt("notes", BOOL, ""),
        ],
    );
    let read = |text| {
        let args = flat(text, &SOCKET, Some("backend"));
        args.map(|args| Value::Object(args.into_map())).map_err(|error| error.desc)
    };
    assert_eq!(
        read("socket,id=x,path=/a,,b,server=on,wait=off"),
        Ok(json!({"backend": "socket", "id": "x", "path": "/a,b", "server": true, "wait": false})),
    );
    assert_eq!(
        read("socket,server,nowait,notes"),
        Ok(json!({"backend": "socket", "server": true, "wait": false, "notes": true})),
    );
    for (text, error) in [
        ("socket,a.b=1", "Invalid parameter 'a.b'"),
        ("socket,foo", "Invalid parameter 'foo'"),
        ("socket,=1", "Invalid parameter ''"),
        ("socket,wait=bad", "Parameter 'wait' expects 'on' or 'off'"),
        ("{\"id\":\"x\"}", "Parameter"),
    ] {
        match error {
            // Not JSON: the whole is the first value.
            "Parameter" => assert_eq!(read(text), Ok(json!({"backend": "{\"id\":\"x\"}"}))),
            _ => assert_eq!(read(text), Err(error.into()), "{text}"),
        }
    }
}

#[test]
fn depth_is_bounded() {
    let deep = "a.".repeat(100_000) + "b=1";
    assert_eq!(read(&deep), Err("A parameter has too many parts".into()));
    let deepest = "a.".repeat(1023) + "b=1";
    assert_eq!(read(&deepest), Err("Parameter 'driver' is missing".into()));
}

proptest! {
    #[test]
    fn any_text_is_an_answer(text in "[a-c0-2{}'\":.,=_?%é-]{0,40}") {
        // No panic, and the same twice.
        prop_assert_eq!(read(&text), read(&text));
    }

    #[test]
    fn commas_are_kept(values in proptest::collection::vec("[a,=.]{0,6}", 1..5)) {
        let text: Vec<_> =
            values.iter().enumerate().map(|(i, value)| format!("k.v{i}={}", value.replace(',', ",,"))).collect();
        let parsed = parse(&text.join(","), None).unwrap();
        for (i, value) in values.iter().enumerate() {
            prop_assert_eq!(&parsed["k"][format!("v{i}")], value);
        }
    }
}
