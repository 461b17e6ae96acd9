//! Images as callers name them: a path, a URI, `file:PATH`, `blkdebug:RULES:PATH`, `null-co://`, a `json:`
//! description, or options (`options`).
//!
//! Called with what a person has typed, never with a name out of an image.
//!
//! What must hold: an option that is not understood is refused by name, so that none is silently without
//! effect.

mod options;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use thiserror::Error;

use crate::format::Format;
use crate::node_options::{FaultRules, NodeOptions, NullOptions};
use crate::protocol_id::NULL;
use options::Options;

/// An image that a caller has named.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageName {
    /// Its path, or the URI of its export.
    pub path: PathBuf,
    /// Its format, where the name says it.
    pub format: Option<Format>,
    /// What else it says.
    pub node: NodeOptions,
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
    Missing(String),
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
        Self { path: path.as_ref().to_owned(), format: None, node: NodeOptions::default() }
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
        if name == NULL {
            let node = NodeOptions { null: Some(NullOptions::default()), ..NodeOptions::default() };
            return Ok(Self { path: name.to_owned(), format: None, node });
        }
        if let Some((rules, image)) = blkdebug(name) {
            let config = (!rules.as_os_str().is_empty()).then_some(rules);
            let mut named = Self::from(without_file_prefix(&image).map_or(image, as_path));
            named.node.file_rules = Some(Box::new(FaultRules { config, ..FaultRules::default() }));
            return Ok(named);
        }
        Ok(Self::from(without_file_prefix(name).map_or_else(|| name.to_owned(), as_path)))
    }

    /// Reads the options of `--image-opts` and `json:`, nested or with dots.
    ///
    /// # Errors
    /// [`NameError`].
    pub fn from_options(options: &Map<String, Value>) -> Result<Self, NameError> {
        let mut options = Options::new(options);
        let name = options.disk("")?;
        options.all_taken()?;
        Ok(name)
    }
}

/// The rest of a name that begins with `file:`.
fn without_file_prefix(name: &Path) -> Option<PathBuf> {
    let rest = name.as_os_str().as_bytes().strip_prefix(b"file:")?;
    Some(PathBuf::from(OsStr::from_bytes(rest)))
}

/// The two parts of a name `blkdebug:RULES:IMAGE`; the first may be empty.
fn blkdebug(name: &Path) -> Option<(PathBuf, PathBuf)> {
    let rest = name.as_os_str().as_bytes().strip_prefix(b"blkdebug:")?;
    let (rules, image) = rest.split_at(rest.iter().position(|byte| *byte == b':')?);
    let path = |bytes| PathBuf::from(OsStr::from_bytes(bytes));
    Some((path(rules), path(&image[1..])))
}

/// A path that looks like something else is written so that it does not.
fn as_path(path: PathBuf) -> PathBuf {
    let first = path.as_os_str().as_encoded_bytes().split(|byte| *byte == b'/').next().unwrap_or_default();
    if first.contains(&b':') { Path::new(".").join(path) } else { path }
}

#[cfg(test)]
mod tests {
    use blockmirror_qcow2::OverlapChecks;
    use blockmirror_raw::Part;

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
            let found = ImageName::parse(Path::new(&json)).map(|name| name.node.overlap_checks);
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
            assert_eq!((name.format, name.node.part), (Some(format), Part::new(offset, size)), "{json}");
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
            (r#"{"driver":"qcow2","backing":"base","file":{"filename":"a"}}"#, "\"backing\""),
            (r#"{"driver":"raw","backing":null,"file":{"filename":"a"}}"#, "\"backing\""),
            (r#"{"driver":"qcow2","cache":{"direct":"maybe"},"file":{"filename":"a"}}"#, "\"cache.direct\""),
            (r#"{"driver":"null-co","size":"many"}"#, "\"size\" cannot be \"many\""),
            (r#"{"driver":"null-co","filename":"a"}"#, "\"filename\""),
            (
                r#"{"driver":"blkdebug","inject-error":[{"errno":5}],"image":{"filename":"a"}}"#,
                "inject-error.0.event",
            ),
            (
                r#"{"driver":"blkdebug","inject-error":[{"event":"x"}],"image":{"filename":"a"}}"#,
                "\"inject-error.0.event\" cannot be \"x\"",
            ),
            (
                r#"{"driver":"blkdebug","set-state":[{"event":"none"}],"image":{"filename":"a"}}"#,
                "\"set-state.0.new_state\"",
            ),
            (
                r#"{"driver":"blkdebug","inject-error":[{"event":"none","often":1}],"image":{"filename":"a"}}"#,
                "\"inject-error.0.often\"",
            ),
            (
                r#"{"driver":"blkdebug","image":{"driver":"blkdebug","image":{"filename":"a"}}}"#,
                "\"image.driver\"",
            ),
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

    #[test]
    fn files_may_have_faults_and_disks_may_have_no_file() {
        let parse = |name: &str| ImageName::parse(Path::new(name)).unwrap();
        let name = parse("blkdebug:rules:file:nbd:disk");
        assert_eq!((name.path.to_str(), name.format), (Some("./nbd:disk"), None));
        assert_eq!(name.node.file_rules.unwrap().config.as_deref(), Some(Path::new("rules")));
        assert_eq!(parse("blkdebug::disk").node.file_rules.unwrap().config, None);
        assert_eq!(parse("./blkdebug::disk").node, NodeOptions::default());
        assert_eq!(parse("null-co://").node.null, Some(NullOptions::default()));

        let rules =
            r#""inject-error":[{"event":"none","sector":7},{"event":"read_aio","errno":28}],"align":4096"#;
        let below = r#"json:{"driver":"qcow2","file":{"driver":"blkdebug","image":{"filename":"a"},RULES}}"#;
        let above = r#"json:{"driver":"blkdebug","image":{"driver":"qcow2","file.filename":"a"},RULES}"#;
        let below = parse(&below.replace("RULES", rules));
        let above = parse(&above.replace("RULES", rules));
        assert_eq!((&below.path, below.format), (&above.path, above.format));
        assert_eq!(below.node.file_rules, above.node.disk_rules);
        let found = &above.node.disk_rules.as_ref().unwrap().options;
        assert_eq!((found.inject_error.len(), found.inject_error[1].errno, found.align), (2, 28, 4096));
        assert!(below.node.disk_rules.is_none() && above.node.file_rules.is_none());

        let zeros = parse(r#"json:{"driver":"null-co","size":"1M","read-zeroes":true}"#);
        let null = zeros.node.null.unwrap();
        assert_eq!((zeros.format, null.size, null.read_zeroes), (Some(Format::Raw), 1 << 20, true));
        let null = parse(r#"json:{"driver":"qcow2","file.driver":"null-co"}"#).node.null;
        assert_eq!(null, Some(NullOptions::default()));
    }

    #[test]
    fn caches_and_backing_files_are_options() {
        let parse = |options: &str| {
            let name = format!(r#"json:{{"driver":"qcow2","file":{{"filename":"a"}},{options}}}"#);
            ImageName::parse(Path::new(&name)).unwrap().node
        };
        assert!(parse(r#""cache":{"direct":true,"no-flush":false}"#).direct);
        assert!(parse(r#""file.cache.direct":"on""#).direct);
        assert!(!parse(r#""cache.direct":"off""#).direct);
        assert!(parse(r#""backing":null"#).no_backing);
        assert_eq!(parse(r#""l2-cache-entry-size":4096,"node-name":"n""#), NodeOptions::default());
    }
}
