//! Broken, cut and mixed-up requests by the hundred thousand, through parser, request and schema: each run of
//! bytes gets answers or nothing, never a panic. `QMP_STORM` is how many; 20 million take minutes in a
//! release build.

#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is the point")]

use std::io::{self, Write};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use blockmirror_block::testing::Rng;
use blockmirror_qmp::json::Parser;
use blockmirror_qmp::keyval;
use blockmirror_qmp::schema::*;
use blockmirror_qmp::{Connection, Monitors, Table, Version};
use serde_json::Value;

static KIND: Enum = Enum::new("Kind", "", &[value("leaf", ""), value("pair", "")]);
static LEAF: Object =
    Object::new("Leaf", "", &[opt("n", UINT8, ""), opt("size", SIZE, ""), opt("x", NUMBER, "")]);
static PAIR: Object = Object::new(
    "Pair",
    "",
    &[req("a", Type::Alternate(&TREE_REF), ""), opt("b", Type::Array(&Type::Object(&TREE)), "")],
);
static TREE: Object = Object::union(
    "Tree",
    "",
    &[req("kind", Type::Enum(&KIND), ""), opt("on", BOOL, "")],
    "kind",
    &[case("leaf", &LEAF), case("pair", &PAIR)],
);
static TREE_REF: Alternate = Alternate::new("TreeRef", "", &[STR, Type::Object(&TREE), NULL]);
static PLANT: Command = Command::boxed("plant", "", &TREE).oob();

const SEEDS: [&str; 8] = [
    "{'execute':'plant','arguments':{'kind':'leaf','n':1,'size':2,'x':1.5e3},'id':[1,{'a':null}]}",
    "{\"execute\":\"plant\",\"arguments\":{\"kind\":\"pair\",\"a\":{\"kind\":\"pair\",\"a\":\"x\",\"b\":[{\"kind\":\"leaf\"}]}}}",
    "{'exec-oob':'plant','arguments':{'kind':'pair','a':null,'on':true}}",
    "{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}",
    "\u{ff}{'execute':'query-commands'}",
    "kind=pair,a.kind=leaf,a.size=1.5k,b.0.kind=leaf,b.1.kind=pair,b.1.a=x,,y,on=off",
    "leaf,n=0x10,x=1e3,size=16E",
    "{'execute':'\\u0041\\ud83d\\ude00','id':-9223372036854775808}",
];

/// One of the seeds, or two grafted together, with some bytes changed, cut out or doubled.
fn mutate(rng: &mut Rng, out: &mut Vec<u8>) {
    out.clear();
    let first = SEEDS[rng.index(SEEDS.len())].as_bytes();
    let second = SEEDS[rng.index(SEEDS.len())].as_bytes();
    out.extend_from_slice(&first[..rng.index(first.len() + 1)]);
    out.extend_from_slice(&second[rng.index(second.len())..]);
    for _ in 0..rng.index(4) {
        let at = rng.index(out.len());
        match rng.index(4) {
            0 => out[at] = u8::try_from(rng.index(256)).unwrap(),
            1 => out[at] = b"{}[],:'\"\\ \n.0123-e=\xff"[rng.index(20)],
            2 => drop(out.drain(at..(at + rng.index(8)).min(out.len()))),
            _ => out.extend_from_within(at..),
        }
        if out.is_empty() {
            out.push(b'{');
        }
    }
}

fn rounds(default: usize) -> usize {
    std::env::var("QMP_STORM").map_or(default, |n| n.parse().unwrap())
}

#[test]
fn parser_schema_and_options_survive() {
    let mut rng = Rng::new(1, 0);
    let mut parser = Parser::default();
    let mut bytes = Vec::new();
    let (mut values, mut errors, mut trees) = (0_u64, 0_u64, 0_u64);
    for _ in 0..rounds(50_000) {
        mutate(&mut rng, &mut bytes);
        let mut input = bytes.as_slice();
        while let Some(item) = parser.next(&mut input) {
            match item {
                Ok(mut value) => {
                    values += 1;
                    let arguments = value.get_mut("arguments").map(Value::take).unwrap_or_default();
                    trees += u64::from(check(Type::Object(&TREE), arguments).is_ok());
                }
                Err(error) => {
                    errors += 1;
                    assert!(error.to_string().starts_with("JSON "));
                }
            }
        }
        if let Ok(text) = std::str::from_utf8(&bytes) {
            trees += u64::from(keyval::options(text, &TREE, Some("kind")).is_ok());
        }
    }
    assert!(values > 0 && errors > 0 && trees > 0, "{values} values, {errors} errors, {trees} trees");
}

#[test]
fn a_session_survives() {
    /// Counts lines.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<u64>>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            assert!(bytes.is_ascii());
            *self.0.lock().unwrap() += u64::try_from(bytes.iter().filter(|b| **b == b'\n').count()).unwrap();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    /// Makes requests until it has made enough.
    struct Storm {
        rng: Rng,
        left: usize,
        bytes: Vec<u8>,
    }
    impl io::Read for Storm {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.left == 0 {
                return Ok(0);
            }
            self.left -= 1;
            mutate(&mut self.rng, &mut self.bytes);
            let n = self.bytes.len().min(buffer.len());
            buffer[..n].copy_from_slice(&self.bytes[..n]);
            Ok(n)
        }
    }
    let mut table = Table::new(Version::new(10, 0, 0, "storm"));
    table.command(&PLANT, |_, _| Ok(Value::Null));
    let monitors = Monitors::new(table);
    let lines = Lines::default();
    let (ended, end) = channel();
    let ended = Mutex::new(ended);
    let close = move || {
        let _ = ended.lock().unwrap().send(());
    };
    let storm = Storm { rng: Rng::new(7, 0), left: rounds(50_000) / 10, bytes: Vec::new() };
    monitors.serve(Connection::new(storm, lines.clone(), close)).unwrap();
    end.recv().unwrap();
    assert!(*lines.0.lock().unwrap() > 100);
}
