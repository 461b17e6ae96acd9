//! How nodes are described in the schema: the options that all drivers have, those of each driver in the
//! table, and references to nodes.
//!
//! Options of nodes hold references to nodes, which are names or options: the types contain each other, by
//! [`Type::Later`].

use blockmirror_qmp::schema::{Alternate, Enum, EnumValue, Member, NULL, Object, STR, Type, Variant, value};
use serde_json::{Map, Value};

use super::{DRIVER_COUNT, DRIVER_TABLE, DriverEntry, driver_named};
use crate::Reply;
use crate::arguments::{Argument, Arguments, arguments, choice};

/// The names of the drivers.
static DRIVER_NAMES: [EnumValue; DRIVER_COUNT] = {
    let mut names = [value("", ""); DRIVER_COUNT];
    let mut at = 0;
    while at < DRIVER_COUNT {
        names[at] = value(DRIVER_TABLE[at].name(), DRIVER_TABLE[at].doc);
        at += 1;
    }
    names
};

static BLOCKDEV_DRIVER: Enum = Enum::new("BlockdevDriver", "What kind of node it is.", &DRIVER_NAMES)
    .differs("other drivers are not there");

/// A driver, by its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DriverName(pub(crate) &'static DriverEntry);

impl DriverName {
    /// The name.
    pub(crate) fn name(self) -> &'static str {
        self.0.name()
    }
}

impl Argument for DriverName {
    // Names and options of the drivers are put together from constants that contain nodes.
    const TYPE: Type = Type::Later(|| Type::Enum(&BLOCKDEV_DRIVER));

    fn read(value: &Value) -> Option<Self> {
        driver_named(value.as_str()?).map(Self)
    }
}

choice! {
    pub(crate) enum Discard("BlockdevDiscardOptions", "What becomes of discards.") {
        Ignore = "ignore", "nothing";
        Unmap = "unmap", "they are passed on";
    }
}

choice! {
    pub(crate) enum DetectZeroes("BlockdevDetectZeroesOptions", "Whether writes of zeros are looked for.") {
        Off = "off", "no";
        On = "on", "yes: they become zeroing";
        Unmap = "unmap", "yes, and they may give space back; needs `discard=unmap`";
    }
}

arguments! {
    pub(crate) struct Cache("BlockdevCacheOptions", "How the host's cache is used.") {
        direct: Option<bool> = "direct", "go past the host's page cache" [default "false"];
        no_flush: Option<bool> = "no-flush", "ignore flushes: fast, and unsafe if the host crashes"
            [default "false"];
    }
}

arguments! {
    /// The options that all drivers have.
    pub(crate) struct CommonOptions {
        driver: DriverName = "driver", "what kind of node" [reopen];
        node_name: Option<String> = "node-name", "its name, of at most 31 letters, digits, `-`, `.` and `_`"
            [default "one that starts with `#block`", reopen];
        discard: Option<Discard> = "discard", "what becomes of discards" [default "ignore", reopen];
        cache: Option<Cache> = "cache", "how the host's cache is used" [reopen];
        active: Option<bool> = "active", "refused if false" [default "true"];
        read_only: Option<bool> = "read-only", "whether writes are refused"
            [default "false; what stands above decides for a file", reopen];
        auto_read_only: Option<bool> = "auto-read-only", "whether what cannot be written is opened for \
         reading"
            [default "false", reopen];
        force_share: Option<bool> = "force-share", "whether others may write the image meanwhile; needs \
         `read-only`"
            [default "false"];
        detect_zeroes: Option<DetectZeroes> = "detect-zeroes", "whether writes of zeros are looked for"
            [default "off", reopen];
    }
}

/// The options of each driver.
static DRIVER_OPTIONS: [Variant; DRIVER_COUNT] = {
    let mut options = [DRIVER_TABLE[0].variant(); DRIVER_COUNT];
    let mut at = 0;
    while at < DRIVER_COUNT {
        options[at] = DRIVER_TABLE[at].variant();
        at += 1;
    }
    options
};

/// A node to be opened.
pub(crate) static BLOCKDEV_OPTIONS: Object = Object::union(
    "BlockdevOptions",
    "A node to be opened.",
    CommonOptions::MEMBERS,
    "driver",
    &DRIVER_OPTIONS,
);

/// All options of a node, which its driver reads.
#[derive(Clone, Debug)]
pub(crate) struct NodeOptions(pub(crate) Map<String, Value>);

impl Argument for NodeOptions {
    const TYPE: Type = Type::Later(|| Type::Object(&BLOCKDEV_OPTIONS));

    fn read(value: &Value) -> Option<Self> {
        value.as_object().cloned().map(Self)
    }
}

impl Arguments for NodeOptions {
    const MEMBERS: &'static [Member] = CommonOptions::MEMBERS;
    const CHANGEABLE: &'static [(&'static str, bool)] = CommonOptions::CHANGEABLE;

    fn parse(members: &Map<String, Value>) -> Reply<Self> {
        Ok(Self(members.clone()))
    }
}

/// A node that is there, or one to be opened.
#[derive(Clone, Debug)]
pub(crate) enum NodeRef {
    Name(String),
    Options(Map<String, Value>),
}

impl Argument for NodeRef {
    const TYPE: Type = {
        static BLOCKDEV_REF: Alternate = Alternate::new(
            "BlockdevRef",
            "A node: its name, or what it is opened with.",
            &[NodeOptions::TYPE, STR],
        );
        Type::Later(|| Type::Alternate(&BLOCKDEV_REF))
    };

    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::String(name) => Some(Self::Name(name.clone())),
            Value::Object(options) => Some(Self::Options(options.clone())),
            _ => None,
        }
    }
}

/// A node, or none.
#[derive(Clone, Debug)]
pub(crate) struct NodeRefOrNull(pub(crate) Option<NodeRef>);

impl Argument for NodeRefOrNull {
    const TYPE: Type = {
        static BLOCKDEV_REF_OR_NULL: Alternate =
            Alternate::new("BlockdevRefOrNull", "A node, or none.", &[NodeOptions::TYPE, STR, NULL]);
        Type::Later(|| Type::Alternate(&BLOCKDEV_REF_OR_NULL))
    };

    fn read(value: &Value) -> Option<Self> {
        match value {
            Value::Null => Some(Self(None)),
            value => NodeRef::read(value).map(|node| Self(Some(node))),
        }
    }
}
