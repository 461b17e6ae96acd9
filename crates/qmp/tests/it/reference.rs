//! What is made of a schema: the answer of `query-qmp-schema`, and the reference for people.

#![allow(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is the point")]

use blockmirror_qmp::schema::*;
use blockmirror_qmp::{Table, Version, json};
use serde_json::Value;

static DRIVER: Enum = Enum::new(
    "Driver",
    "What a node is made of.",
    &[value("file", "a file"), value("copy", "another node").ours()],
)
.differs("there are no other drivers");
static FILE: Object = Object::new("FileOptions", "A file.", &[req("filename", STR, "its path; `|` is fine")]);
static COPY: Object = Object::new(
    "CopyOptions",
    "Another node.",
    &[
        req("of", Type::Alternate(&NODE_REF), "which"),
        opt("more", Type::Array(&Type::Alternate(&NODE_REF)), "others"),
    ],
);
static NODE: Object = Object::union(
    "NodeOptions",
    "A node.",
    &[
        req("driver", Type::Enum(&DRIVER), "what it is made of"),
        opt("size", SIZE, "its length").default("the file's"),
        opt("colour", STR, "its colour").ours(),
    ],
    "driver",
    &[case("file", &FILE), case("copy", &COPY)],
);
static NODE_REF: Alternate =
    Alternate::new("NodeRef", "A node, by name or made here.", &[STR, Type::Object(&NODE)]);
static ADD: Command =
    Command::boxed("add", "Adds a node.", &NODE).features(&["unstable"]).differs("it is quick");
static LOOK: Command = Command::new("look", "Looks.", &[opt("at", STR, "where").default("all over")])
    .returns(Type::Array(&Type::Object(&NODE)), "what is there")
    .oob();
static GONE: Event = Event::new("GONE", "A node is gone.", &[req("name", STR, "its name")]).ours();

fn table() -> Table {
    let mut table = Table::new(Version::new(10, 0, 0, "test"));
    table.command(&ADD, |_, _| Ok(Value::Null)).command(&LOOK, |_, _| Ok(Value::Null)).event(&GONE);
    table
}

#[test]
fn introspection() {
    let schema = table().introspect();
    let lines: Vec<_> = schema.as_array().unwrap().iter().map(json::to_string).collect();
    insta::assert_snapshot!(lines.join("\n"), @r##"
    {"name": "qmp_capabilities", "ret-type": "0", "meta-type": "command", "arg-type": "1"}
    {"name": "query-version", "ret-type": "2", "meta-type": "command", "arg-type": "0"}
    {"name": "query-commands", "ret-type": "[3]", "meta-type": "command", "arg-type": "0"}
    {"name": "query-qmp-schema", "ret-type": "[any]", "meta-type": "command", "arg-type": "0"}
    {"name": "add", "ret-type": "0", "meta-type": "command", "arg-type": "4", "features": ["unstable"]}
    {"name": "look", "ret-type": "[4]", "meta-type": "command", "arg-type": "5", "allow-oob": true}
    {"name": "GONE", "meta-type": "event", "arg-type": "6"}
    {"name": "0", "members": [], "meta-type": "object"}
    {"name": "1", "members": [{"name": "enable", "default": null, "type": "[7]"}], "meta-type": "object"}
    {"name": "2", "members": [{"name": "qemu", "type": "8"}, {"name": "package", "type": "str"}], "meta-type": "object"}
    {"name": "3", "members": [{"name": "name", "type": "str"}], "meta-type": "object"}
    {"name": "[3]", "element-type": "3", "meta-type": "array"}
    {"name": "any", "json-type": "value", "meta-type": "builtin"}
    {"name": "[any]", "element-type": "any", "meta-type": "array"}
    {"name": "4", "tag": "driver", "variants": [{"case": "file", "type": "10"}, {"case": "copy", "type": "11"}], "members": [{"name": "driver", "type": "9"}, {"name": "size", "default": null, "type": "int"}, {"name": "colour", "default": null, "type": "str"}], "meta-type": "object"}
    {"name": "[4]", "element-type": "4", "meta-type": "array"}
    {"name": "5", "members": [{"name": "at", "default": null, "type": "str"}], "meta-type": "object"}
    {"name": "6", "members": [{"name": "name", "type": "str"}], "meta-type": "object"}
    {"name": "7", "members": [{"name": "oob"}], "meta-type": "enum", "values": ["oob"]}
    {"name": "[7]", "element-type": "7", "meta-type": "array"}
    {"name": "8", "members": [{"name": "major", "type": "int"}, {"name": "minor", "type": "int"}, {"name": "micro", "type": "int"}], "meta-type": "object"}
    {"name": "str", "json-type": "string", "meta-type": "builtin"}
    {"name": "9", "members": [{"name": "file"}, {"name": "copy"}], "meta-type": "enum", "values": ["file", "copy"]}
    {"name": "int", "json-type": "int", "meta-type": "builtin"}
    {"name": "10", "members": [{"name": "filename", "type": "str"}], "meta-type": "object"}
    {"name": "11", "members": [{"name": "of", "type": "12"}, {"name": "more", "default": null, "type": "[12]"}], "meta-type": "object"}
    {"name": "12", "members": [{"type": "str"}, {"type": "4"}], "meta-type": "alternate"}
    {"name": "[12]", "element-type": "12", "meta-type": "array"}
    "##);
}

#[test]
fn reference() {
    let text = table().markdown();
    let (_, ours) = text.split_once("### add").unwrap();
    insta::assert_snapshot!(ours, @r##"
    Adds a node.

    Unlike QEMU: it is quick.

    Features: unstable.

    With the members of [NodeOptions](#nodeoptions).

    ### look

    Looks.

    May be run out of band.

    | argument | type | default | meaning |
    |---|---|---|---|
    | `at` | string | all over | where |

    Answers list of [NodeOptions](#nodeoptions): what is there.

    ## Events

    [GONE](#gone)

    ### GONE

    A node is gone.

    Ours: QEMU has no such event.

    | member | type | default | meaning |
    |---|---|---|---|
    | `name` | string | required | its name |

    ## Types

    ### CommandInfo

    A command.

    | member | type | default | meaning |
    |---|---|---|---|
    | `name` | string | required | its name |

    ### CopyOptions

    Another node.

    | member | type | default | meaning |
    |---|---|---|---|
    | `of` | [NodeRef](#noderef) | required | which |
    | `more` | list of [NodeRef](#noderef) | - | others |

    ### Driver

    What a node is made of.

    Unlike QEMU: there are no other drivers.

    - `file`: a file.
    - `copy` (ours): another node.

    ### FileOptions

    A file.

    | member | type | default | meaning |
    |---|---|---|---|
    | `filename` | string | required | its path; `\|` is fine |

    ### NodeOptions

    A node.

    | member | type | default | meaning |
    |---|---|---|---|
    | `driver` | [Driver](#driver) | required | what it is made of |
    | `size` | size | the file's | its length |
    | `colour` (ours) | string | - | its colour |

    - `driver` is `file`: also those of [FileOptions](#fileoptions)
    - `driver` is `copy`: also those of [CopyOptions](#copyoptions)

    ### NodeRef

    A node, by name or made here.

    One of: string, [NodeOptions](#nodeoptions).

    ### QMPCapability

    What a client may switch on.

    - `oob`: commands out of band, by `exec-oob`.

    ### VersionInfo

    A version.

    | member | type | default | meaning |
    |---|---|---|---|
    | `qemu` | [VersionTriple](#versiontriple) | required | the version of QEMU whose protocol is spoken |
    | `package` | string | required | who speaks it |

    ### VersionTriple

    A version number.

    | member | type | default | meaning |
    |---|---|---|---|
    | `major` | int | required | the major number |
    | `minor` | int | required | the minor number |
    | `micro` | int | required | the last number |
    "##);
}

#[test]
fn mistakes_are_found() {
    assert_eq!(lint(table().commands(), table().events()), [""; 0]);

    static TWICE: Enum = Enum::new("Driver", "Another of the same name.", &[value("file", "a file")]);
    static BAD_TAG: Object = Object::union("BadTag", "", &[req("a", STR, "x"), req("a", STR, "")], "a", &[]);
    static BAD_CASE: Object = Object::union(
        "BadCase",
        "Has a case that the tag has not.",
        &[opt("driver", Type::Enum(&DRIVER), "x"), opt("filename", STR, "x")],
        "driver",
        &[case("file", &FILE), case("disk", &COPY)],
    );
    static TWO_STRINGS: Alternate = Alternate::new("TwoStrings", "x", &[STR, Type::Enum(&TWICE)]);
    static BAD: Command = Command::new("bad", "Bad.", &[req("x", Type::Array(&Type::Object(&BAD_TAG)), "x")])
        .returns(Type::Object(&BAD_CASE), "");
    static WORSE: Event = Event::new("bad", "Worse.", &[req("y", Type::Alternate(&TWO_STRINGS), "x")]);
    insta::assert_snapshot!(lint([&BAD], [&WORSE]).join("\n"), @r"
    BadTag: nothing is said about it
    BadTag: 'a' is there twice
    BadTag: 'a': nothing is said about it
    BadTag: the tag 'a' is not a member that is an enum
    BadCase: the tag 'driver' is optional
    BadCase: 'filename' is there twice
    BadCase: Driver has no 'disk'
    the table: 'bad' is there twice
    Driver: two types have this name
    TwoStrings: 'string' is there twice
    ");
}
