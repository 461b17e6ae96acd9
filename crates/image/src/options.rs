//! The `-o` options of image creation: `key=value,key=value`, as `qemu-img create` spells them.
//!
//! The command line hands the text in; [`CreateSettings`] comes out, with each value typed and each error
//! naming the key. Whether the values fit together is the format's business.

use blockmirror_block::size::{SizeError, parse_size};
use blockmirror_qcow2::{Compression, Preallocation, Version};
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
    /// `cluster_size` in bytes.
    pub cluster_size: Option<u64>,
    /// `compat`.
    pub version: Option<Version>,
    /// `compression_type`.
    pub compression: Option<Compression>,
    /// `data_file`: the name to write into the header.
    pub data_file: Option<String>,
    /// `data_file_raw`.
    pub data_file_raw: Option<bool>,
    /// `extended_l2`.
    pub extended_l2: Option<bool>,
    /// `lazy_refcounts`.
    pub lazy_refcounts: Option<bool>,
    /// `preallocation`.
    pub preallocation: Option<Preallocation>,
    /// `refcount_bits`.
    pub refcount_bits: Option<u32>,
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
    /// The value is none of those allowed.
    #[error("option {key}: \"{value}\" is not valid, expected {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What would be allowed.
        expected: &'static str,
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
#[derive(Clone, Copy, Debug)]
pub struct OptionHelp {
    /// The key.
    pub key: &'static str,
    /// What values it takes.
    pub values: &'static str,
    /// What it does.
    pub help: &'static str,
}

const fn option(key: &'static str, values: &'static str, help: &'static str) -> OptionHelp {
    OptionHelp { key, values, help }
}

const RAW: &[OptionHelp] = &[
    option("preallocation", "off|falloc|full", "Space allocated at once"),
    option("size", "SIZE", "Virtual size"),
];

const QCOW2: &[OptionHelp] = &[
    option("backing_file", "NAME", "Name of the backing file, as it is to stand in the header"),
    option("backing_fmt", "FORMAT", "Format of the backing file"),
    option("cluster_size", "SIZE", "Cluster size, a power of two from 512 to 2M (default 64K)"),
    option("compat", "0.10|1.1|v2|v3", "Version of the format (default 1.1)"),
    option("compression_type", "zlib|zstd", "How compressed clusters are compressed (default zlib)"),
    option("data_file", "NAME", "Keep the guest data in this file"),
    option("data_file_raw", "on|off", "Keep the data file valid as a raw image"),
    option("extended_l2", "on|off", "32 subclusters in each cluster"),
    option("lazy_refcounts", "on|off", "Postpone refcount updates"),
    option("preallocation", "off|metadata|falloc|full", "Space allocated at once"),
    option("refcount_bits", "1|2|4|8|16|32|64", "Width of a refcount (default 16)"),
    option("size", "SIZE", "Virtual size"),
];

/// The options that images of `format` can be created with.
pub fn option_help(format: Format) -> &'static [OptionHelp] {
    match format {
        Format::Raw => RAW,
        Format::Qcow2 => QCOW2,
    }
}

fn keys(format: Format) -> String {
    option_help(format).iter().map(|option| option.key).collect::<Vec<_>>().join(", ")
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

    /// Reads `text` for `format` on top of what is there; a key given twice keeps its last value. In a value,
    /// two commas stand for one.
    ///
    /// # Errors
    /// [`OptionError`], naming the key.
    pub fn parse(&mut self, format: Format, text: &str) -> Result<(), OptionError> {
        for part in split_at_commas(text) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(OptionError::NotAPair { part });
            };
            if !option_help(format).iter().any(|option| option.key == key) {
                return Err(not_an_option(key, format));
            }
            self.set(key, value, format)?;
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &str, format: Format) -> Result<(), OptionError> {
        let bad = |expected| OptionError::BadValue { key: key.to_owned(), value: value.to_owned(), expected };
        let size = || parse_size(value).map_err(|cause| OptionError::BadSize { key: key.to_owned(), cause });
        let flag = || match value {
            "on" | "yes" | "true" | "y" => Ok(true),
            "off" | "no" | "false" | "n" => Ok(false),
            _ => Err(bad("on or off")),
        };
        match key {
            "size" => self.size = Some(size()?),
            "backing_file" => self.backing_file = Some(value.to_owned()),
            "backing_fmt" => {
                self.backing_format = Some(value.parse().map_err(|_| bad("raw or qcow2"))?);
            }
            "cluster_size" => self.cluster_size = Some(size()?),
            "compat" => {
                self.version = Some(match value {
                    "0.10" | "v2" => Version::V2,
                    "1.1" | "v3" => Version::V3,
                    _ => return Err(bad("0.10, 1.1, v2 or v3")),
                });
            }
            "compression_type" => {
                self.compression = Some(match value {
                    "zlib" => Compression::Deflate,
                    "zstd" => Compression::Zstd,
                    _ => return Err(bad("zlib or zstd")),
                });
            }
            "data_file" => self.data_file = Some(value.to_owned()),
            "data_file_raw" => self.data_file_raw = Some(flag()?),
            "extended_l2" => self.extended_l2 = Some(flag()?),
            "lazy_refcounts" => self.lazy_refcounts = Some(flag()?),
            "preallocation" => {
                self.preallocation = Some(match (value, format) {
                    ("off", _) => Preallocation::Off,
                    ("metadata", Format::Qcow2) => Preallocation::Metadata,
                    ("falloc", _) => Preallocation::Falloc,
                    ("full", _) => Preallocation::Full,
                    (_, Format::Raw) => return Err(bad("off, falloc or full")),
                    (_, Format::Qcow2) => return Err(bad("off, metadata, falloc or full")),
                });
            }
            "refcount_bits" => {
                let bits = value.parse().ok().filter(|bits: &u32| bits.is_power_of_two() && *bits <= 64);
                self.refcount_bits = Some(bits.ok_or_else(|| bad("1, 2, 4, 8, 16, 32 or 64"))?);
            }
            _ => return Err(not_an_option(key, format)),
        }
        Ok(())
    }
}

fn not_an_option(key: &str, format: Format) -> OptionError {
    let why = match key {
        "nocow" => "turning off copy-on-write in the host's file system",
        "extent_size_hint" => "an extent size hint for the host's file system",
        "encryption" => "encryption",
        _ if key.starts_with("encrypt.") => "encryption",
        _ => return OptionError::UnknownKey { key: key.to_owned(), format },
    };
    OptionError::Unsupported { key: key.to_owned(), why }
}

/// Parts between single commas, each with its double commas made single.
fn split_at_commas(text: &str) -> Vec<String> {
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
        let want = CreateSettings {
            size: Some(1 << 30),
            backing_file: Some("a,b.qcow2".into()),
            backing_format: Some(Format::Raw),
            cluster_size: Some(4096),
            version: Some(Version::V2),
            compression: Some(Compression::Zstd),
            data_file: Some("d.raw".into()),
            data_file_raw: Some(true),
            extended_l2: Some(false),
            lazy_refcounts: Some(true),
            preallocation: Some(Preallocation::Metadata),
            refcount_bits: Some(1),
        };
        assert_eq!(got, Ok(want));
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
        assert_eq!((settings.version, settings.cluster_size), (Some(Version::V3), Some(4096)));
    }

    #[test]
    fn errors_name_the_key_and_what_would_do() {
        for (format, text, message) in [
            (Format::Qcow2, "lazy_refcounts", "option \"lazy_refcounts\": expected key=value"),
            (
                Format::Raw,
                "cluster_size=4k",
                "option \"cluster_size\": raw has no such option; it has preallocation, size",
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
