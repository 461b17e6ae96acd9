//! The options of `--image-opts` and `json:` by dotted names, read as a tree of nodes: fault injection over a
//! format over a part over fault injection over a file, an export or nothing. Called by the parent module.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use blockmirror_block::size::parse_size;
use blockmirror_filter::{BlkdebugOptions, Event, InjectError, IoType, MAX_RULES, SetState};
use blockmirror_qcow2::OverlapChecks;
use blockmirror_raw::Part;
use serde_json::{Map, Value};

use super::{ImageName, NameError, as_path};
use crate::format::Format;
use crate::node_options::{FaultRules, NodeOptions, NullOptions, TypedBacking};
use crate::open::MAX_CHAIN_DEPTH;
use crate::protocol_id::NULL;

/// Options that change no content, of a qcow2 image and of any node.
const QCOW2_HINTS: [&str; 10] = [
    "cache-clean-interval",
    "cache-size",
    "discard-no-unref",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "refcount-cache-size",
];
const HINTS: [&str; 2] = ["cache.no-flush", "node-name"];

type Result<T> = std::result::Result<T, NameError>;

/// Options that nothing has asked for yet.
pub(super) struct Options {
    values: BTreeMap<String, String>,
    nulls: BTreeSet<String>,
}

impl Options {
    pub(super) fn new(options: &Map<String, Value>) -> Self {
        let (mut values, mut nulls) = (BTreeMap::new(), BTreeSet::new());
        let mut open: Vec<_> = options.iter().map(|(name, value)| (name.clone(), value)).collect();
        while let Some((name, value)) = open.pop() {
            match value {
                Value::Object(members) => {
                    open.extend(members.iter().map(|(member, value)| (format!("{name}.{member}"), value)));
                }
                Value::Array(items) => {
                    open.extend(items.iter().enumerate().map(|(i, value)| (format!("{name}.{i}"), value)));
                }
                Value::String(text) => {
                    values.insert(name, text.clone());
                }
                Value::Null => {
                    nulls.insert(name);
                }
                value => {
                    values.insert(name, value.to_string());
                }
            }
        }
        Self { values, nulls }
    }

    /// The disk that the options with `prefix` describe.
    pub(super) fn disk(&mut self, prefix: &str) -> Result<ImageName> {
        let driver = self.take(prefix, "driver");
        if driver.as_deref() != Some("blkdebug") {
            return self.formatted(prefix, driver);
        }
        let rules = Box::new(self.rules(prefix)?);
        let image = format!("{prefix}image.");
        let driver = self.take(&image, "driver");
        let is_file = driver.as_deref().is_some_and(|driver| format_of(driver).is_none());
        let mut name = self.formatted(&image, driver)?;
        match is_file {
            true => name.node.file_rules = Some(rules),
            false => name.node.disk_rules = Some(rules),
        }
        Ok(name)
    }

    /// An image, or a file without a format.
    fn formatted(&mut self, prefix: &str, driver: Option<String>) -> Result<ImageName> {
        let mut name = ImageName::from(PathBuf::new());
        name.format = driver.as_deref().and_then(format_of);
        if driver.is_some() && name.format.is_none() {
            name.format = Some(Format::Raw);
            name.path = self.protocol(prefix, driver, &mut name.node)?;
            return Ok(name);
        }
        if driver.is_none() && self.values.contains_key(&format!("{prefix}filename")) {
            // A file whose format is not given.
            name.path = self.protocol(prefix, driver, &mut name.node)?;
            return Ok(name);
        }
        let mut file = format!("{prefix}file");
        if self.values.contains_key(&file) {
            // There are no nodes that it could name.
            return Err(NameError::Option(file));
        }
        self.common(prefix, &mut name.node)?;
        file.push('.');
        // A format may lie in a part of a file; a raw disk is one by its own options.
        let mut protocol = self.take(&file, "driver");
        match name.format {
            Some(Format::Raw) => name.node.part = self.part(prefix)?,
            Some(_) if protocol.as_deref() == Some("raw") => {
                name.node.part = self.part(&file)?;
                self.common(&file, &mut name.node)?;
                file.push_str("file.");
                protocol = self.take(&file, "driver");
            }
            _ => {}
        }
        if protocol.as_deref() == Some("blkdebug") {
            name.node.file_rules = Some(Box::new(self.rules(&file)?));
            file.push_str("image.");
            protocol = self.take(&file, "driver");
        }
        if name.format == Some(Format::Qcow2) {
            name.node.overlap_checks = self.overlap_checks(prefix)?;
            name.node.no_backing = self.nulls.remove(&format!("{prefix}backing"));
            name.node.backing = self.backing(prefix)?;
            QCOW2_HINTS.iter().for_each(|hint| drop(self.take(prefix, hint)));
        }
        name.path = self.protocol(&file, protocol, &mut name.node)?;
        Ok(name)
    }

    /// What a qcow2 image stands on by its name. Names of nodes lead nowhere: there are none.
    fn backing(&mut self, prefix: &str) -> Result<Option<Box<TypedBacking>>> {
        let backing = format!("{prefix}backing.");
        if !self.has(&backing) && !self.nulls.iter().any(|name| name.starts_with(&backing)) {
            return Ok(None);
        }
        if prefix.matches("backing.").count() >= MAX_CHAIN_DEPTH as usize {
            return Err(NameError::Option(backing));
        }
        let ImageName { path, format, node } = self.disk(&backing)?;
        Ok(Some(Box::new(TypedBacking { path, format, node })))
    }

    fn take(&mut self, prefix: &str, member: &str) -> Option<String> {
        self.values.remove(&format!("{prefix}{member}"))
    }

    /// The value of `member` as `read` reads it.
    fn read<T>(
        &mut self,
        prefix: &str,
        member: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>> {
        let option = format!("{prefix}{member}");
        let Some(value) = self.values.remove(&option) else { return Ok(None) };
        match read(&value) {
            Some(read) => Ok(Some(read)),
            None => Err(NameError::Value { option, value }),
        }
    }

    fn size(&mut self, prefix: &str, member: &str) -> Result<Option<u64>> {
        self.read(prefix, member, |text| parse_size(text).ok())
    }

    /// What every node may have.
    fn common(&mut self, prefix: &str, node: &mut NodeOptions) -> Result<()> {
        node.direct |= self.read(prefix, "cache.direct", switch)?.unwrap_or(false);
        HINTS.iter().for_each(|hint| drop(self.take(prefix, hint)));
        Ok(())
    }

    /// The part of a file that the options of a raw disk describe.
    fn part(&mut self, prefix: &str) -> Result<Part> {
        Ok(Part::new(self.size(prefix, "offset")?.unwrap_or(0), self.size(prefix, "size")?))
    }

    /// What writes to a qcow2 image are checked against.
    fn overlap_checks(&mut self, prefix: &str) -> Result<OverlapChecks> {
        let own = |name: &String| Some(name.strip_prefix(prefix)?.to_owned());
        let is_one = |name: &str| name == "overlap-check" || name.starts_with("overlap-check.");
        let names: Vec<_> = self.values.keys().filter_map(own).filter(|name| is_one(name)).collect();
        let taken: Vec<_> = names
            .into_iter()
            .filter_map(|name| self.take(prefix, &name).map(|value| (name, value)))
            .collect();
        let checks = OverlapChecks::from_options(taken.iter().map(|(name, value)| (&**name, &**value)));
        checks.map_err(|option| {
            let value = taken.iter().find(|(name, _)| name == option).map(|(_, value)| value.clone());
            NameError::Value { option: format!("{prefix}{option}"), value: value.unwrap_or_default() }
        })
    }

    /// The rules of fault injection.
    fn rules(&mut self, prefix: &str) -> Result<FaultRules> {
        let config = self.take(prefix, "config").map(PathBuf::from);
        let mut options = BlkdebugOptions::default();
        for (member, field) in [
            ("align", &mut options.align),
            ("max-transfer", &mut options.max_transfer),
            ("opt-write-zero", &mut options.opt_write_zero),
            ("max-write-zero", &mut options.max_write_zero),
            ("opt-discard", &mut options.opt_discard),
            ("max-discard", &mut options.max_discard),
        ] {
            *field = self.size(prefix, member)?.unwrap_or(0);
        }
        for index in 0..=MAX_RULES {
            let rule = format!("{prefix}inject-error.{index}.");
            if !self.has(&rule) {
                break;
            }
            let rule = self.inject_error(&rule)?;
            options.inject_error.push(rule);
        }
        for index in 0..=MAX_RULES {
            let rule = format!("{prefix}set-state.{index}.");
            if !self.has(&rule) {
                break;
            }
            options.set_state.push(SetState {
                event: self.event(&rule)?,
                state: self.read(&rule, "state", |text| text.parse().ok())?,
                new_state: self.needed(&rule, "new_state", |text| text.parse().ok())?,
            });
        }
        Ok(FaultRules { config, options })
    }

    fn inject_error(&mut self, rule: &str) -> Result<InjectError> {
        let number = |text: &str| text.parse().ok();
        Ok(InjectError {
            state: self.read(rule, "state", number)?,
            iotype: self.read(rule, "iotype", IoType::from_name)?,
            errno: self.read(rule, "errno", number)?.unwrap_or(5),
            sector: self.read(rule, "sector", |text| text.parse().ok())?,
            once: self.read(rule, "once", switch)?.unwrap_or(false),
            immediately: self.read(rule, "immediately", switch)?.unwrap_or(false),
            ..InjectError::new(self.event(rule)?)
        })
    }

    fn event(&mut self, rule: &str) -> Result<Event> {
        self.needed(rule, "event", Event::from_name)
    }

    fn needed<T>(&mut self, prefix: &str, member: &str, read: impl FnOnce(&str) -> Option<T>) -> Result<T> {
        let found = self.read(prefix, member, read)?;
        found.ok_or_else(|| NameError::Missing(format!("{prefix}{member}")))
    }

    /// Whether there are options with `prefix`.
    fn has(&self, prefix: &str) -> bool {
        let mut following = self.values.range(prefix.to_owned()..);
        following.next().is_some_and(|(name, _)| name.starts_with(prefix))
    }

    /// The file, or what is in its place, that the options with `prefix` describe.
    fn protocol(&mut self, prefix: &str, driver: Option<String>, node: &mut NodeOptions) -> Result<PathBuf> {
        self.common(prefix, node)?;
        match driver.as_deref() {
            None | Some("file" | "host_device") => {
                let path = self.needed(prefix, "filename", |text| Some(PathBuf::from(text)))?;
                Ok(as_path(path))
            }
            Some("null-co") => {
                let default = NullOptions::default();
                let latency = self.read(prefix, "latency-ns", |text| text.parse().ok())?;
                node.null = Some(NullOptions {
                    size: self.size(prefix, "size")?.unwrap_or(default.size),
                    read_zeroes: self.read(prefix, "read-zeroes", switch)?.unwrap_or(default.read_zeroes),
                    latency: latency.map_or(default.latency, Duration::from_nanos),
                });
                Ok(NULL.into())
            }
            #[cfg(feature = "nbd")]
            Some("nbd") => {
                node.context = self.take(prefix, "x-dirty-bitmap");
                self.export(prefix)
            }
            Some(other) => {
                Err(NameError::Value { option: format!("{prefix}driver"), value: other.to_owned() })
            }
        }
    }

    #[cfg(feature = "nbd")]
    fn export(&mut self, prefix: &str) -> Result<PathBuf> {
        use blockmirror_nbd::{NbdAddress, NbdUri};
        let mut take = |member: &str| self.take(prefix, member);
        let kind = take("server.type");
        let path = take("server.path").or_else(|| take("path"));
        let host = take("server.host").or_else(|| take("host"));
        let port = take("server.port").or_else(|| take("port"));
        let export = take("export").unwrap_or_default();
        let address = match (kind.as_deref(), path, host) {
            (None | Some("unix"), Some(path), None) if port.is_none() => NbdAddress::Unix(path.into()),
            (None | Some("inet"), None, Some(host)) => {
                let port = port.unwrap_or_else(|| "10809".to_owned());
                let number = port.parse();
                let port = number.map_err(|_| NameError::Value { option: "port".to_owned(), value: port })?;
                NbdAddress::Tcp { host, port }
            }
            (Some(other), ..) if !matches!(other, "unix" | "inet") => {
                let option = format!("{prefix}server.type");
                return Err(NameError::Value { option, value: other.to_owned() });
            }
            _ => return Err(NameError::Missing("server.path or server.host".to_owned())),
        };
        Ok(NbdUri::new(address, export).to_string().into())
    }

    pub(super) fn all_taken(&self) -> Result<()> {
        match self.values.keys().chain(&self.nulls).next() {
            Some(name) => Err(NameError::Option(name.clone())),
            None => Ok(()),
        }
    }
}

fn format_of(driver: &str) -> Option<Format> {
    match driver {
        "raw" => Some(Format::Raw),
        "qcow2" => Some(Format::Qcow2),
        _ => None,
    }
}

/// A value that is on or off.
fn switch(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" => Some(true),
        "off" | "no" | "false" => Some(false),
        _ => None,
    }
}
