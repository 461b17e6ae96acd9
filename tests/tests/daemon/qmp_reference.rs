//! docs/qmp.md: what it says of commands, events and types is what the daemon's schema says, all of it and no
//! more, and where it says nothing of QEMU it is what QEMU's schema says too.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is the point"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use blockmirror_daemon::Daemon;
use blockmirror_qmp::{Client, Connection};
use blockmirror_testing::qemu::have;
use blockmirror_testing::scratch::scratch;
use blockmirror_testing::workspace_root;
use serde_json::{Value, json};

/// Commands that QEMU has, and its storage daemon has not.
const OF_QEMU_ALONE: [&str; 1] = ["human-monitor-command"];

/// The part of the page that is not written by hand.
fn page() -> String {
    let text = fs::read_to_string(workspace_root().join("docs/qmp.md")).unwrap();
    let border = "<!-- From here on written by `cargo xtask docs`. -->\n\n";
    text.split_once(border).expect("the border is there").1.to_owned()
}

/// An entry of the page: a command, an event or a type.
#[derive(Debug, Default)]
struct Entry {
    /// Names in order, with what is said of each.
    members: Vec<(String, Member)>,
    /// A type whose members these are.
    boxed: Option<String>,
    answers: Option<String>,
    /// Values of an enum, and whether they are marked as ours.
    values: Vec<(String, bool)>,
    /// The tag of a union, and for its values the types with more members.
    tag: Option<String>,
    cases: BTreeMap<String, String>,
    /// The types of an alternate.
    one_of: Vec<String>,
    ours: bool,
    oob: bool,
    differs: String,
}

#[derive(Debug)]
struct Member {
    ty: String,
    required: bool,
    ours: bool,
}

#[derive(Debug, Default)]
struct Doc {
    commands: BTreeMap<String, Entry>,
    events: BTreeMap<String, Entry>,
    types: BTreeMap<String, Entry>,
}

/// A name in backquotes, and whether it is marked as ours.
fn name(text: &str) -> Option<(String, bool)> {
    let (name, rest) = text.strip_prefix('`')?.split_once('`')?;
    Some((name.to_owned(), rest.starts_with(" (ours)")))
}

fn parse(text: &str) -> Doc {
    let mut doc = Doc::default();
    let mut part = "";
    let mut entry = &mut Entry::default();
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            part = heading;
        } else if let Some(heading) = line.strip_prefix("### ") {
            let entries = match part {
                "Commands" => &mut doc.commands,
                "Events" => &mut doc.events,
                _ => &mut doc.types,
            };
            let old = entries.insert(heading.to_owned(), Entry::default());
            assert!(old.is_none(), "{heading} is there twice");
            entry = entries.get_mut(heading).unwrap();
        } else if let Some(row) = line.strip_prefix("| `") {
            let row = format!("`{}", row.replace("\\|", " "));
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            let [name_cell, ty, default, meaning, ""] = cells[..] else { panic!("{line}") };
            let (name, ours) = name(name_cell).unwrap();
            assert!(!meaning.is_empty() && !default.is_empty(), "{line}");
            let member = Member { ty: ty.to_owned(), required: default == "required", ours };
            entry.members.push((name, member));
        } else if let Some(ty) = line.strip_prefix("With the members of ") {
            entry.boxed = Some(ty.trim_end_matches('.').to_owned());
        } else if let Some(answer) = line.strip_prefix("Answers ") {
            entry.answers = Some(answer.split_once(": ").unwrap().0.to_owned());
        } else if let Some((case, ty)) = line.split_once(": also those of ") {
            let (tag, case) = case.strip_prefix("- `").unwrap().split_once("` is ").expect(line);
            entry.tag = Some(tag.to_owned());
            entry.cases.insert(case.trim_matches('`').to_owned(), ty.to_owned());
        } else if let Some(value) = line.strip_prefix("- ") {
            entry.values.push(name(value).unwrap());
        } else if let Some(types) = line.strip_prefix("One of: ") {
            entry.one_of = types.trim_end_matches('.').split(", ").map(str::to_owned).collect();
        } else if let Some(text) = line.strip_prefix("Unlike QEMU: ") {
            text.clone_into(&mut entry.differs);
        } else if line.starts_with("Ours: ") {
            entry.ours = true;
        } else if line == "May be run out of band." {
            entry.oob = true;
        }
    }
    doc
}

/// The name of a type that has an entry of its own, from `[Name](#name)`.
fn linked(ty: &str) -> Option<&str> {
    let (name, anchor) = ty.strip_prefix('[')?.split_once("](#")?;
    assert_eq!(anchor, name.to_lowercase() + ")");
    Some(name)
}

/// What is at `ty`, in the words of a schema for what has no entry.
fn builtin(ty: &str) -> &str {
    match ty {
        "string" => "str",
        "int" | "int64" | "uint8" | "uint16" | "uint32" | "uint64" | "size" => "int",
        other => other,
    }
}

/// A schema as `query-qmp-schema` answers it.
struct Schema(BTreeMap<String, Value>);

impl Schema {
    fn new(answer: &Value) -> Self {
        let entities = answer.as_array().unwrap().iter();
        Self(entities.map(|entity| (entity["name"].as_str().unwrap().to_owned(), entity.clone())).collect())
    }

    fn get(&self, name: &Value) -> &Value {
        &self.0[name.as_str().unwrap()]
    }

    fn names(&self, kind: &str) -> BTreeSet<String> {
        let of_kind = self.0.values().filter(|entity| entity["meta-type"] == kind);
        of_kind.map(|entity| entity["name"].as_str().unwrap().to_owned()).collect()
    }
}

fn list<'a>(entity: &'a Value, key: &str) -> &'a [Value] {
    entity.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text<'a>(entity: &'a Value, key: &str) -> &'a str {
    entity.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// Walks the page and the daemon's schema side by side.
struct Same<'a> {
    doc: &'a Doc,
    schema: &'a Schema,
    seen: BTreeSet<&'a str>,
}

impl<'a> Same<'a> {
    fn ty(&mut self, place: &str, ty: &'a str, name: &Value) {
        let entity = self.schema.get(name);
        if let Some(item) = ty.strip_prefix("list of ") {
            assert_eq!(entity["meta-type"], "array", "{place}");
            return self.ty(place, item, &entity["element-type"]);
        }
        let Some(link) = linked(ty) else {
            assert_eq!(name, builtin(ty), "{place}");
            return;
        };
        let entry = self.doc.types.get(link).unwrap_or_else(|| panic!("{place}: {link} has no entry"));
        if self.seen.insert(link) {
            self.entry(link, entry, entity);
        }
    }

    fn entry(&mut self, place: &str, entry: &'a Entry, entity: &Value) {
        match text(entity, "meta-type") {
            "enum" => {
                let values: Vec<_> = entry.values.iter().map(|(name, _)| name.as_str()).collect();
                assert_eq!(json!(values), entity["values"], "{place}");
            }
            "alternate" => {
                let types = list(entity, "members");
                assert_eq!(entry.one_of.len(), types.len(), "{place}");
                for (ty, member) in entry.one_of.iter().zip(types) {
                    self.ty(place, ty, &member["type"]);
                }
            }
            "object" => {
                let members = list(entity, "members");
                let named: Vec<_> = entry.members.iter().map(|(name, _)| name.as_str()).collect();
                let there: Vec<_> = members.iter().map(|member| text(member, "name")).collect();
                assert_eq!(named, there, "{place}");
                for ((name, member), real) in entry.members.iter().zip(members) {
                    let place = format!("{place}: {name}");
                    assert_eq!(member.required, real.get("default").is_none(), "{place}");
                    self.ty(&place, &member.ty, &real["type"]);
                }
                let variants = list(entity, "variants").iter();
                let with_members = variants.filter(|variant| {
                    let object = self.schema.get(&variant["type"]);
                    !list(object, "members").is_empty()
                });
                let with_members: Vec<_> = with_members.collect();
                let mut cases: Vec<_> = with_members.iter().map(|variant| text(variant, "case")).collect();
                cases.sort_unstable();
                assert_eq!(entry.cases.keys().map(String::as_str).collect::<Vec<_>>(), cases, "{place}");
                assert_eq!(entry.tag.as_deref().unwrap_or_default(), text(entity, "tag"), "{place}");
                for variant in with_members {
                    self.ty(place, &entry.cases[text(variant, "case")], &variant["type"]);
                }
            }
            other => panic!("{place}: {other}"),
        }
    }

    /// A command or an event.
    fn top(&mut self, name: &str, entry: &'a Entry) {
        let entity = &self.schema.0[name];
        match &entry.boxed {
            Some(ty) => self.ty(name, ty, &entity["arg-type"]),
            None => self.entry(name, entry, self.schema.get(&entity["arg-type"])),
        }
        if entity["meta-type"] == "command" {
            match &entry.answers {
                Some(ty) => self.ty(name, ty, &entity["ret-type"]),
                None => assert_eq!(self.schema.get(&entity["ret-type"])["members"], json!([]), "{name}"),
            }
        }
        assert_eq!(entry.oob, entity.get("allow-oob").is_some(), "{name}");
    }
}

#[test]
fn the_page_is_what_the_schema_makes_it() {
    assert!(page() == Daemon::reference(), "docs/qmp.md is out of date: run `cargo xtask docs`");
}

#[test]
fn the_page_and_a_running_daemon_agree() {
    let daemon = Daemon::new(Vec::new());
    let (ours, theirs) = UnixStream::pair().unwrap();
    daemon.monitors().serve(Connection::unix(theirs).unwrap()).unwrap();
    let mut client = Client::new(ours, Duration::from_secs(60)).unwrap();
    let schema = Schema::new(&client.execute("query-qmp-schema", json!({})).unwrap());
    let doc = parse(&page());
    let commands = client.execute("query-commands", json!({})).unwrap();
    let commands: BTreeSet<_> =
        commands.as_array().unwrap().iter().map(|command| text(command, "name").to_owned()).collect();
    assert_eq!(doc.commands.keys().cloned().collect::<BTreeSet<_>>(), commands);
    assert_eq!(schema.names("command"), commands);
    assert_eq!(doc.events.keys().cloned().collect::<BTreeSet<_>>(), schema.names("event"));
    let mut same = Same { doc: &doc, schema: &schema, seen: BTreeSet::new() };
    for (name, entry) in doc.commands.iter().chain(&doc.events) {
        same.top(name, entry);
    }
    let all: BTreeSet<_> = doc.types.keys().map(String::as_str).collect();
    assert_eq!(same.seen, all, "every type belongs to something");
    // So that a parser that finds nothing does not pass.
    let granularity = &doc.commands["blockdev-mirror"].members.iter().find(|(name, _)| name == "granularity");
    assert_eq!(granularity.as_ref().map(|(_, member)| member.ty.as_str()), Some("uint32"));
    assert!(doc.types["MirrorCopyMode"].values.contains(&("auto".to_owned(), true)));
}

/// Walks the page and QEMU's schema side by side, and notes what is not mentioned.
struct Against<'a> {
    doc: &'a Doc,
    qemu: &'a Schema,
    seen: BTreeSet<(String, String)>,
    found: Vec<String>,
}

impl Against<'_> {
    fn ty(&mut self, place: &str, ty: &str, name: &Value, input: bool, differs: &str) {
        let entity = self.qemu.get(name);
        match (ty.strip_prefix("list of "), linked(ty)) {
            (Some(item), _) if entity["meta-type"] == "array" => {
                self.ty(place, item, &entity["element-type"], input, differs);
            }
            (_, Some(link)) => {
                if self.seen.insert((link.to_owned(), name.to_string())) {
                    let entry = &self.doc.types[link];
                    self.entry(link, entry, entity, input, differs);
                }
            }
            // Ours takes any text and refuses some later, or tells more than it promises.
            (None, None) if ty == "any" || (ty == "string" && entity["meta-type"] == "enum") => {}
            (None, None) if name == builtin(ty) => {}
            _ => self.found.push(format!("{place}: {ty} is {} there", entity["meta-type"])),
        }
    }

    fn entry(&mut self, place: &str, entry: &Entry, entity: &Value, input: bool, differs: &str) {
        let differs = format!("{differs} {}", entry.differs);
        let mentioned = |name: &str| differs.contains(&format!("`{name}`"));
        match text(entity, "meta-type") {
            "enum" => {
                for (value, ours) in &entry.values {
                    if *ours == list(entity, "values").contains(&json!(value)) {
                        self.found.push(format!("{place}: `{value}` is marked wrongly"));
                    }
                }
            }
            "object" => {
                let members = list(entity, "members");
                for (name, member) in &entry.members {
                    let place = format!("{place}: {name}");
                    let real = members.iter().find(|real| text(real, "name") == name);
                    if member.ours == real.is_some() {
                        self.found.push(format!("{place} is marked wrongly"));
                    }
                    let Some(real) = real else { continue };
                    let optional = real.get("default").is_some();
                    // What may be left out there may be here; what is always present there is here.
                    if (input && optional && member.required) || (!input && !optional && !member.required) {
                        self.found.push(format!("{place} is required on one side only"));
                    }
                    self.ty(&place, &member.ty, &real["type"], input, "");
                }
                for real in members.iter().filter(|_| input) {
                    let name = text(real, "name");
                    if !mentioned(name) && !entry.members.iter().any(|(ours, _)| ours == name) {
                        self.found.push(format!("{place}: nothing is said of `{name}`"));
                    }
                }
                for variant in list(entity, "variants") {
                    if let Some(ty) = entry.cases.get(text(variant, "case")) {
                        self.ty(place, ty, &variant["type"], input, "");
                    }
                }
            }
            "alternate" => {
                for ty in &entry.one_of {
                    let kind = |entity: &Value| match text(entity, "meta-type") {
                        "builtin" => text(entity, "json-type").to_owned(),
                        "enum" => "string".to_owned(),
                        other => other.to_owned(),
                    };
                    let ours = match linked(ty) {
                        Some(link) if self.doc.types[link].values.is_empty() => "object",
                        Some(_) => "string",
                        None => ty.as_str(),
                    };
                    let real = list(entity, "members");
                    match real.iter().find(|real| kind(self.qemu.get(&real["type"])) == ours) {
                        Some(real) => self.ty(place, ty, &real["type"].clone(), input, ""),
                        None => self.found.push(format!("{place}: {ty} is not one of them there")),
                    }
                }
            }
            other => self.found.push(format!("{place}: {other} there")),
        }
    }
}

fn qemus_schema(dir: &Path) -> Schema {
    let (socket, pidfile) = (dir.join("qmp"), dir.join("pid"));
    let mut qsd = Command::new("qemu-storage-daemon")
        .arg("--chardev")
        .arg(format!("socket,id=c,path={},server=on,wait=off", socket.display()))
        .args(["--monitor", "chardev=c", "--pidfile"])
        .arg(&pidfile)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    while !pidfile.exists() {
        assert!(qsd.try_wait().unwrap().is_none(), "the storage daemon ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut client = Client::connect(&socket, Duration::from_secs(60)).unwrap();
    let schema = Schema::new(&client.execute("query-qmp-schema", json!({})).unwrap());
    qsd.kill().unwrap();
    qsd.wait().unwrap();
    schema
}

#[test]
fn what_is_ours_is_marked_and_what_is_not_there_is_said() {
    if !have("what_is_ours_is_marked_and_what_is_not_there_is_said", &["qemu-storage-daemon"]) {
        return;
    }
    let dir = scratch().unwrap();
    let qemu = qemus_schema(dir.path());
    let doc = parse(&page());
    let mut against = Against { doc: &doc, qemu: &qemu, seen: BTreeSet::new(), found: Vec::new() };
    for (name, entry) in doc.commands.iter().chain(&doc.events) {
        let there = qemu.0.get(name).filter(|entity| entity.get("arg-type").is_some());
        let known = there.is_some() || OF_QEMU_ALONE.contains(&name.as_str());
        if entry.ours == known {
            against.found.push(format!("{name} is marked wrongly"));
        }
        let Some(entity) = there else { continue };
        let input = entity["meta-type"] == "command";
        match &entry.boxed {
            Some(ty) => against.ty(name, ty, &entity["arg-type"], input, &entry.differs),
            None => against.entry(name, entry, qemu.get(&entity["arg-type"]), input, ""),
        }
        if let Some(ty) = &entry.answers {
            against.ty(name, ty, &entity["ret-type"], false, "");
        }
    }
    assert_eq!(against.found, [""; 0], "of {} types", against.seen.len());
    assert!(against.seen.len() > 50, "{}", against.seen.len());
}
