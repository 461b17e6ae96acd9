//! The `-o` options of image creation: `key=value,key=value`, as `qemu-img create` spells them.
//!
//! The command line hands the text in; [`CreateSettings`] comes out, with each value typed and each error
//! naming the key. Which options qcow2 has, and what values, is in its own table
//! ([`blockmirror_qcow2::options`]). Whether the values fit together is the format's business.

use blockmirror_block::size::SizeError;
use blockmirror_qcow2::options::{self, OPTIONS, OptionKind, OptionValue, ValueError};
use blockmirror_qcow2::{CreateOptions, Preallocation};
use thiserror::Error;

use crate::Format;

/// What `-o` said; everything that was not said is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CreateSettings {
    /// `size`: the virtual size in bytes.
    pub size: Option<u64>,
    /// `backing_file`: the name to write into the header.
    pub backing_file: Option<String>,
    /// `backing_fmt`.
    pub backing_format: Option<Format>,
    /// `data_file`: the name to write into the header.
    pub data_file: Option<String>,
    /// `preallocation`.
    pub preallocation: Option<Preallocation>,
    /// Allocates in a new file what QEMU allocates there for zeros: the first block of a raw image, by which
    /// QEMU finds out how direct I/O has to be aligned, and whole clusters of a qcow2 image's header,
    /// refcounts and, while the image is filled by this process, L2 tables.
    pub allocated_as_qemu: bool,
    /// Takes a data file that is there already if it holds nothing but zeros: nothing is lost with it then.
    /// One with more than 1 GiB of data is not looked at to its end, and refused like one that holds
    /// something.
    pub blank_data_file: bool,
    /// What only qcow2 looks at: names of its table, each with a value of its kind.
    others: Vec<(&'static str, OptionValue)>,
}

/// Why the text of `-o` was not understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OptionError {
    /// A part is not `key=value`.
    #[error("option \"{part}\": expected key=value")]
    NotAPair {
        /// The part.
        part: String,
    },
    /// The format has no such option.
    #[error("option \"{key}\": {format} has no such option; it has {}", keys(*.format))]
    UnknownKey {
        /// The key.
        key: String,
        /// The format.
        format: Format,
    },
    /// The option exists, and is not supported.
    #[error("option {key}: {why} is not supported")]
    Unsupported {
        /// The key.
        key: String,
        /// What it would do.
        why: &'static str,
    },
    /// The option is one of new images only.
    #[error("option {key}: it can be given when an image is created, and not be changed")]
    OnlyAtCreation {
        /// The key.
        key: String,
    },
    /// The value is none of those allowed.
    #[error("option {key}: \"{value}\" is not valid, expected {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What would be allowed.
        expected: String,
    },
    /// The value is no size.
    #[error("option {key}: {cause}")]
    BadSize {
        /// The key.
        key: String,
        /// Why not.
        cause: SizeError,
    },
}

/// Why the settings about a backing file do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BackingSettingsError {
    /// A raw image has no header to name one.
    #[error("a raw image cannot have a backing file")]
    RawImage,
    /// The header of the image has to name the format: detected anew at each opening, a raw backing file
    /// could turn into whatever its guest writes into its first sector.
    #[error("the backing file's format is missing")]
    NoFormat,
    /// There is a format of no file.
    #[error("there is a backing format, but no backing file")]
    NoFile,
}

/// An option as the help lists it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OptionHelp {
    /// The key.
    pub key: &'static str,
    /// What values it takes.
    pub values: String,
    /// What it does.
    pub help: String,
}

/// An option of a format.
pub(crate) struct Row {
    pub(crate) key: &'static str,
    kind: OptionKind,
    pub(crate) help: &'static str,
    default: Option<&'static str>,
}

impl Row {
    /// What values it takes, for help texts.
    pub(crate) fn values(&self) -> String {
        self.kind.values()
    }

    /// The value that `text` stands for.
    pub(crate) fn parse(&self, text: &str) -> Result<OptionValue, OptionError> {
        self.kind.parse(text).map_err(|error| match error {
            ValueError::Size(cause) => OptionError::BadSize { key: self.key.to_owned(), cause },
            _ => self.bad(text, self.kind.expected()),
        })
    }

    fn bad(&self, text: &str, expected: String) -> OptionError {
        OptionError::BadValue { key: self.key.to_owned(), value: text.to_owned(), expected }
    }
}

/// An option of the host's file, which images of all formats have.
const EXTENT_SIZE_HINT: Row = Row {
    key: "extent_size_hint",
    kind: OptionKind::Size,
    help: "Extent size for the host's file system: a hint, accepted without effect",
    default: None,
};

/// The options of raw images.
const RAW: [Row; 2] = [
    Row {
        key: "preallocation",
        kind: OptionKind::Choice(&[&["off"], &["falloc"], &["full"]]),
        help: "Space allocated at once",
        default: Some("off"),
    },
    Row { key: "size", kind: OptionKind::Size, help: "Virtual size", default: None },
];

pub(crate) fn rows(format: Format) -> Vec<Row> {
    let mut rows: Vec<_> = match format {
        Format::Raw => RAW.into(),
        Format::Qcow2 => OPTIONS
            .iter()
            .map(|def| Row { key: def.name, kind: def.kind, help: def.help, default: def.default })
            .collect(),
    };
    rows.push(EXTENT_SIZE_HINT);
    rows
}

/// The options that images of `format` can be created with.
pub fn option_help(format: Format) -> Vec<OptionHelp> {
    let help = |row: &Row| match row.default {
        // What is off unless it is asked for needs no word.
        None | Some("off") => row.help.to_owned(),
        Some(default) => format!("{} (default {default})", row.help),
    };
    rows(format)
        .iter()
        .map(|row| OptionHelp { key: row.key, values: row.kind.values(), help: help(row) })
        .collect()
}

fn keys(format: Format) -> String {
    rows(format).iter().map(|row| row.key).collect::<Vec<_>>().join(", ")
}

impl CreateSettings {
    /// Whether name and format of the backing file fit together in an image of `format`.
    ///
    /// # Errors
    /// [`BackingSettingsError`].
    pub fn check_backing(&self, format: Format) -> Result<(), BackingSettingsError> {
        match (&self.backing_file, self.backing_format) {
            (Some(_), _) if format == Format::Raw => Err(BackingSettingsError::RawImage),
            (Some(_), None) => Err(BackingSettingsError::NoFormat),
            (None, Some(_)) => Err(BackingSettingsError::NoFile),
            _ => Ok(()),
        }
    }

    /// Reads `text` for `format` on top of what is there; a key given twice keeps its last value, and the key
    /// of an option that is on or off stands for on. In a value, two commas stand for one.
    ///
    /// # Errors
    /// [`OptionError`], naming the key.
    pub fn parse(&mut self, format: Format, text: &str) -> Result<(), OptionError> {
        for part in split_options(text) {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (&*part, None),
            };
            let row = rows(format).into_iter().find(|row| row.key == key);
            match (row, value) {
                (Some(row), Some(value)) => self.set(&row, value)?,
                (Some(row), None) if row.kind == OptionKind::Flag => self.set(&row, "on")?,
                (None, Some(_)) => return Err(not_an_option(key, format)),
                (_, None) => return Err(OptionError::NotAPair { part }),
            }
        }
        Ok(())
    }

    fn set(&mut self, row: &Row, text: &str) -> Result<(), OptionError> {
        match (row.key, row.parse(text)?) {
            ("size", OptionValue::Number(size)) => self.size = Some(size),
            ("backing_file", _) => self.backing_file = Some(text.to_owned()),
            ("backing_fmt", _) => {
                let expected = || "raw or qcow2".to_owned();
                self.backing_format = Some(text.parse().map_err(|_| row.bad(text, expected()))?);
            }
            ("data_file", _) => self.data_file = Some(text.to_owned()),
            // A hint: QEMU ignores it where the file system does not know it, too.
            ("extent_size_hint", _) => {}
            ("preallocation", OptionValue::Choice(mode)) => {
                self.preallocation = Preallocation::from_name(mode);
            }
            (key, value) => self.others.push((key, value)),
        }
        Ok(())
    }

    /// The options of a qcow2 image of `size` bytes.
    pub(crate) fn qcow2(&self, size: u64) -> CreateOptions {
        let mut options = CreateOptions::new(size);
        for (name, value) in &self.others {
            // Both come from the table: it takes them.
            let _ = options::option(name).map(|def| def.set(&mut options, value.clone()));
        }
        options.preallocation = self.preallocation.unwrap_or(options.preallocation);
        options.whole_metadata = self.allocated_as_qemu;
        options.backing_file = self.backing_file.clone().map(String::into_bytes);
        options.backing_format = self.backing_format.map(|format| format.to_string());
        options.data_file = self.data_file.clone().map(String::into_bytes);
        options
    }
}

pub(crate) fn not_an_option(key: &str, format: Format) -> OptionError {
    let why = match key {
        "nocow" => "turning off copy-on-write in the host's file system",
        "encryption" => "encryption",
        _ if key.starts_with("encrypt.") => "encryption",
        _ => return OptionError::UnknownKey { key: key.to_owned(), format },
    };
    OptionError::Unsupported { key: key.to_owned(), why }
}

/// The parts of the text of `-o`: what stands between single commas, each with its double commas made
/// single.
pub fn split_options(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            part.push(c);
        } else if chars.next_if_eq(&',').is_some() {
            part.push(',');
        } else {
            parts.push(std::mem::take(&mut part));
        }
    }
    parts.push(part);
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use blockmirror_qcow2::{Compression, Version};

    use super::*;

    fn parse(format: Format, text: &str) -> Result<CreateSettings, String> {
        let mut settings = CreateSettings::default();
        settings.parse(format, text).map(|()| settings).map_err(|e| e.to_string())
    }

    #[test]
    fn every_option_is_read() {
        let got = parse(
            Format::Qcow2,
            "size=1G,backing_file=a,,b.qcow2,backing_fmt=raw,cluster_size=4k,compat=0.10,compression_type=zstd,\
             data_file=d.raw,data_file_raw=on,extended_l2=off,lazy_refcounts=yes,preallocation=metadata,\
             refcount_bits=1",
        );
        let settings = got.unwrap();
        assert_eq!((settings.size, settings.backing_format), (Some(1 << 30), Some(Format::Raw)));
        let mut want = CreateOptions::new(1 << 20);
        want.backing_file = Some(b"a,b.qcow2".to_vec());
        want.backing_format = Some("raw".to_owned());
        want.cluster_size = 4096;
        want.version = Version::V2;
        want.compression = Compression::Zstd;
        want.data_file = Some(b"d.raw".to_vec());
        want.data_file_raw = true;
        want.lazy_refcounts = true;
        want.preallocation = Preallocation::Metadata;
        want.refcount_bits = 1;
        assert_eq!(settings.qcow2(1 << 20), want);
    }

    #[test]
    fn the_list_of_options_and_the_parser_agree() {
        for format in Format::ALL {
            for option in option_help(format) {
                let error = parse(format, &format!("{}=\u{1}", option.key));
                let named =
                    error.as_ref().err().is_none_or(|e| e.contains(option.key) && !e.contains("no such"));
                assert!(named, "{error:?}");
            }
        }
    }

    #[test]
    fn the_last_value_stands() {
        let mut settings = CreateSettings::default();
        settings.parse(Format::Qcow2, "compat=v2,cluster_size=4K").unwrap();
        settings.parse(Format::Qcow2, "compat=v3").unwrap();
        let options = settings.qcow2(0);
        assert_eq!((options.version, options.cluster_size), (Version::V3, 4096));
    }

    #[test]
    fn errors_name_the_key_and_what_would_do() {
        for (format, text, message) in [
            (Format::Qcow2, "compat", "option \"compat\": expected key=value"),
            (
                Format::Raw,
                "cluster_size=4k",
                "option \"cluster_size\": raw has no such option; it has preallocation, size, extent_size_hint",
            ),
            (Format::Qcow2, "compat=4", "option compat: \"4\" is not valid, expected 0.10, 1.1, v2 or v3"),
            (
                Format::Raw,
                "preallocation=metadata",
                "option preallocation: \"metadata\" is not valid, expected off, falloc or full",
            ),
            (
                Format::Qcow2,
                "refcount_bits=3",
                "option refcount_bits: \"3\" is not valid, expected 1, 2, 4, 8, 16, 32 or 64",
            ),
            (Format::Qcow2, "encrypt.format=luks", "option encrypt.format: encryption is not supported"),
            (
                Format::Raw,
                "nocow=on",
                "option nocow: turning off copy-on-write in the host's file system is not supported",
            ),
        ] {
            assert_eq!(parse(format, text), Err(message.to_owned()));
        }
        assert!(parse(Format::Raw, "size=1Q").unwrap_err().starts_with("option size: \"1Q\" is not a size"));
    }
}
