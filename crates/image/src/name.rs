//! Images as callers name them: a path, a URI, `file:PATH`, a `json:` description, or options.
//!
//! Called with what a person has typed, never with a name out of an image.
//!
//! What must hold: an option that is not understood is refused by name, so that none is silently without
//! effect.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use thiserror::Error;

use blockmirror_block::size::parse_size;
use blockmirror_qcow2::OverlapChecks;
use blockmirror_raw::Part;

use crate::format::Format;

/// An image that a caller has named.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageName {
    /// Its path, or the URI of its export.
    pub path: PathBuf,
    /// Its format, where the name says it.
    pub format: Option<Format>,
    /// The part of the file, or of the export, that it lies in.
    pub part: Part,
    /// Which kinds of metadata writes to it are checked against, if it is a qcow2 image.
    pub overlap_checks: OverlapChecks,
}

/// Why the description of an image was not understood.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NameError {
    /// What follows `json:` is not a JSON object.
    #[error("after \"json:\" there is not a JSON object: {0}")]
    Json(String),
    /// An option is missing.
    #[error("the option \"{0}\" is missing")]
    Missing(&'static str),
    /// The option exists in QEMU at most.
    #[error("the option \"{0}\" is not supported here")]
    Option(String),
    /// The option has another value.
    #[error("the option \"{option}\" cannot be \"{value}\" here")]
    Value {
        /// The option.
        option: String,
        /// Its value.
        value: String,
    },
}

impl<P: AsRef<Path>> From<P> for ImageName {
    /// A path or a URI, as it is.
    fn from(path: P) -> Self {
        let path = path.as_ref().to_owned();
        Self { path, format: None, part: Part::default(), overlap_checks: OverlapChecks::default() }
    }
}

impl ImageName {
    /// Reads a name that a person has typed.
    ///
    /// # Errors
    /// [`NameError`], of a `json:` description only.
    pub fn parse(name: &Path) -> Result<Self, NameError> {
        let text = name.as_os_str().to_string_lossy();
        if let Some(json) = text.strip_prefix("json:") {
            return match serde_json::from_str(json) {
                Ok(Value::Object(options)) => Self::from_options(&options),
                Ok(_) => Err(NameError::Json("it is another value".to_owned())),
                Err(error) => Err(NameError::Json(error.to_string())),
            };
        }
        Ok(Self::from(without_file_prefix(name).map_or_else(|| name.to_owned(), as_path)))
    }

    /// Reads the options of `--image-opts` and `json:`, nested or with dots.
    ///
    /// # Errors
    /// [`NameError`].
    pub fn from_options(options: &Map<String, Value>) -> Result<Self, NameError> {
        let mut options = Options::new(options);
        let driver = options.take("driver");
        let format = match driver.as_deref() {
            Some("raw") => Some(Format::Raw),
            Some("qcow2") => Some(Format::Qcow2),
            None => None,
            // The file itself, without a format.
            Some(protocol) => {
                let path = options.protocol("", Some(protocol.to_owned()))?;
                options.all_taken()?;
                return Ok(Self { format: Some(Format::Raw), ..Self::from(path) });
            }
        };
        if options.0.contains_key("file") {
            // There are no nodes that it could name.
            return Err(NameError::Option("file".to_owned()));
        }
        // A format may lie in a part of a file; a raw disk is one by its own options.
        let (mut part, mut prefix) = (Part::default(), "file.");
        let mut protocol = options.take("file.driver");
        match format {
            Some(Format::Raw) => part = options.part("")?,
            Some(_) if protocol.as_deref() == Some("raw") => {
                part = options.part(prefix)?;
                prefix = "file.file.";
                protocol = options.take("file.file.driver");
            }
            _ => {}
        }
        let checks =
            if format == Some(Format::Qcow2) { options.overlap_checks()? } else { OverlapChecks::default() };
        let path = options.protocol(prefix, protocol)?;
        options.all_taken()?;
        Ok(Self { path, format, part, overlap_checks: checks })
    }
}

/// The rest of a name that begins with `file:`.
fn without_file_prefix(name: &Path) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let rest = name.as_os_str().as_bytes().strip_prefix(b"file:")?;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(rest)))
}

/// A path that looks like something else is written so that it does not.
fn as_path(path: PathBuf) -> PathBuf {
    let first = path.as_os_str().as_encoded_bytes().split(|byte| *byte == b'/').next().unwrap_or_default();
    if first.contains(&b':') { Path::new(".").join(path) } else { path }
}

/// Options by dotted names that nothing has asked for yet.
struct Options(BTreeMap<String, String>);

impl Options {
    fn new(options: &Map<String, Value>) -> Self {
        let mut flat = BTreeMap::new();
        let mut open: Vec<_> = options.iter().map(|(name, value)| (name.clone(), value)).collect();
        while let Some((name, value)) = open.pop() {
            match value {
                Value::Object(members) => {
                    open.extend(members.iter().map(|(member, value)| (format!("{name}.{member}"), value)));
                }
                Value::String(text) => {
                    flat.insert(name, text.clone());
                }
                value => {
                    flat.insert(name, value.to_string());
                }
            }
        }
        Self(flat)
    }

    fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    /// The part of a file that the options of a raw disk with `prefix` describe.
    fn part(&mut self, prefix: &str) -> Result<Part, NameError> {
        let mut size = |member: &str| {
            let option = format!("{prefix}{member}");
            let Some(value) = self.take(&option) else { return Ok(None) };
            parse_size(&value).map(Some).map_err(|_| NameError::Value { option, value })
        };
        Ok(Part::new(size("offset")?.unwrap_or(0), size("size")?))
    }

    /// What writes to a qcow2 image are checked against.
    fn overlap_checks(&mut self) -> Result<OverlapChecks, NameError> {
        let is_one = |name: &String| name == "overlap-check" || name.starts_with("overlap-check.");
        let names: Vec<_> = self.0.keys().filter(|name| is_one(name)).cloned().collect();
        let taken: Vec<_> = names.into_iter().filter_map(|name| self.0.remove_entry(&name)).collect();
        let checks = OverlapChecks::from_options(taken.iter().map(|(name, value)| (&**name, &**value)));
        checks.map_err(|option| {
            let value = taken.iter().find(|(name, _)| name == option).map(|(_, value)| value.clone());
            NameError::Value { option: option.to_owned(), value: value.unwrap_or_default() }
        })
    }

    /// The file or export that the options with `prefix` describe.
    fn protocol(&mut self, prefix: &'static str, driver: Option<String>) -> Result<PathBuf, NameError> {
        let name = |member: &str| format!("{prefix}{member}");
        match driver.as_deref() {
            None | Some("file" | "host_device") => {
                let missing = match prefix {
                    "" => "filename",
                    "file." => "file.filename",
                    _ => "file.file.filename",
                };
                let path = self.take(&name("filename")).ok_or(NameError::Missing(missing))?;
                Ok(as_path(path.into()))
            }
            #[cfg(feature = "nbd")]
            Some("nbd") => self.export(prefix),
            Some(other) => Err(NameError::Value { option: name("driver"), value: other.to_owned() }),
        }
    }

    #[cfg(feature = "nbd")]
    fn export(&mut self, prefix: &str) -> Result<PathBuf, NameError> {
        use blockmirror_nbd::{NbdAddress, NbdUri};
        let mut take = |member: &str| self.take(&format!("{prefix}{member}"));
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
                return Err(NameError::Value {
                    option: format!("{prefix}server.type"),
                    value: other.to_owned(),
                });
            }
            _ => return Err(NameError::Missing("server.path or server.host")),
        };
        Ok(NbdUri::new(address, export).to_string().into())
    }

    fn all_taken(&self) -> Result<(), NameError> {
        match self.0.keys().next() {
            Some(name) => Err(NameError::Option(name.clone())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Result<(String, Option<Format>), String> {
        let name = ImageName::parse(Path::new(name)).map_err(|error| error.to_string())?;
        Ok((name.path.to_str().unwrap().to_owned(), name.format))
    }

    #[test]
    fn names_are_paths_unless_they_say_otherwise() {
        for (name, path) in [
            ("disk", "disk"),
            ("file:disk", "disk"),
            ("file:/a/disk", "/a/disk"),
            ("file:nbd:disk", "./nbd:disk"),
            ("./json:{}", "./json:{}"),
        ] {
            assert_eq!(parse(name), Ok((path.to_owned(), None)), "{name}");
        }
    }

    #[test]
    fn descriptions_say_file_and_format() {
        for (json, path, format) in [
            (r#"{"driver":"qcow2","file":{"driver":"file","filename":"a"}}"#, "a", Some(Format::Qcow2)),
            (r#"{"driver":"qcow2","file.filename":"a"}"#, "a", Some(Format::Qcow2)),
            (r#"{"file":{"driver":"host_device","filename":"/dev/x"}}"#, "/dev/x", None),
            (r#"{"driver":"file","filename":"json:{}"}"#, "./json:{}", Some(Format::Raw)),
        ] {
            assert_eq!(parse(&format!("json:{json}")), Ok((path.to_owned(), format)), "{json}");
        }
    }

    #[test]
    fn a_qcow2_image_says_what_writes_are_checked_against() {
        for (options, want) in [
            ("", Ok(OverlapChecks::CACHED)),
            (r#""overlap-check":"none","#, Ok(OverlapChecks::NONE)),
            (r#""overlap-check":{"template":"all","inactive-l2":false},"#, Ok(OverlapChecks::CACHED)),
            (r#""overlap-check":"most","#, Err("the option \"overlap-check\" cannot be \"most\" here")),
            (
                r#""overlap-check.main-head":"on","#,
                Err("the option \"overlap-check.main-head\" cannot be \"on\" here"),
            ),
        ] {
            let json = format!(r#"json:{{"driver":"qcow2",{options}"file.filename":"a"}}"#);
            let found = ImageName::parse(Path::new(&json)).map(|name| name.overlap_checks);
            assert_eq!(found.map_err(|error| error.to_string()), want.map_err(str::to_owned), "{json}");
        }
        assert!(parse(r#"json:{"driver":"raw","overlap-check":"none","file.filename":"a"}"#).is_err());
    }

    #[test]
    fn a_raw_disk_may_be_a_part_of_a_file() {
        for (json, format, offset, size) in [
            (r#"{"driver":"raw","offset":512,"file":{"filename":"a"}}"#, Format::Raw, 512, None),
            (r#"{"driver":"raw","size":"1k","file.filename":"a"}"#, Format::Raw, 0, Some(1024)),
            (
                r#"{"driver":"qcow2","file":{"driver":"raw","offset":"1M","size":4096,"file":{"filename":"a"}}}"#,
                Format::Qcow2,
                1 << 20,
                Some(4096),
            ),
        ] {
            let name = ImageName::parse(Path::new(&format!("json:{json}"))).unwrap();
            assert_eq!((name.format, name.part), (Some(format), Part::new(offset, size)), "{json}");
            assert_eq!(name.path, Path::new("a"), "{json}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (json, word) in [
            ("[1]", "another value"),
            ("{", "JSON"),
            (r#"{"driver":"qcow2","file":"node"}"#, "\"file\""),
            (r#"{"driver":"qcow2"}"#, "\"file.filename\""),
            (r#"{"driver":"vmdk","file":{"filename":"a"}}"#, "\"vmdk\""),
            (r#"{"driver":"qcow2","backing":null,"file":{"filename":"a"}}"#, "\"backing\""),
            (r#"{"driver":"qcow2","file":{"filename":"a","locking":"off"}}"#, "\"file.locking\""),
            (r#"{"driver":"qcow2","offset":512,"file":{"filename":"a"}}"#, "\"offset\""),
            (r#"{"driver":"raw","offset":-1,"file":{"filename":"a"}}"#, "\"offset\" cannot be \"-1\""),
            (r#"{"driver":"raw","size":1.5,"file":{"filename":"a"}}"#, "\"size\" cannot be \"1.5\""),
            (r#"{"driver":"raw","file":{"driver":"raw","file":{"filename":"a"}}}"#, "\"file.driver\""),
            (r#"{"driver":"file","offset":512,"filename":"a"}"#, "\"offset\""),
            (r#"{"driver":"qcow2","file":{"driver":"raw","offset":1}}"#, "\"file.file.filename\""),
            (r#"{"driver":"qcow2","file":{"driver":"https","url":"x"}}"#, "\"https\""),
        ] {
            let error = parse(&format!("json:{json}")).unwrap_err();
            assert!(error.contains(word), "{json}: {error}");
        }
    }

    #[cfg(feature = "nbd")]
    #[test]
    fn exports_become_uris() {
        let unix = r#"json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"unix","path":"/run/a b"},"export":"d"}}"#;
        assert_eq!(parse(unix).unwrap().0, "nbd+unix:///d?socket=/run/a%20b");
        let tcp = r#"json:{"driver":"nbd","host":"h","port":"1"}"#;
        assert_eq!(parse(tcp).unwrap(), ("nbd://h:1/".to_owned(), Some(Format::Raw)));
        assert!(parse(r#"json:{"driver":"nbd"}"#).is_err());
    }
}
