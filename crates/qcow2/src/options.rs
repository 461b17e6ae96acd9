//! The table of options that an image is created with.
//!
//! One row says: both spellings of the name (`-o` of `qemu-img create`, and QMP),
//! the type with its range, the default, the help, and how the value gets into [`CreateOptions`] and comes
//! out of a [`Header`]. [`CreateOptions::check`] takes ranges and versions from here, the command line its
//! options and their help, QMP its values, and `info` what it shows.
//!
//! ```
//! use blockmirror_qcow2::CreateOptions;
//! use blockmirror_qcow2::options::{OptionValue, option};
//!
//! let mut options = CreateOptions::new(1 << 30);
//! let clusters = option("cluster_size").unwrap();
//! let value = clusters.kind.parse("4K").unwrap();
//! clusters.set(&mut options, value).unwrap();
//! assert_eq!(options.cluster_size, 4096);
//!
//! let compression = option("compression-type").unwrap();
//! assert_eq!(compression.kind.values(), "zlib|zstd");
//! assert_eq!(compression.kind.parse("lzo").unwrap_err().to_string(), "expected zlib or zstd");
//! assert_eq!(compression.get(&options), Some(OptionValue::Choice("zlib")));
//! ```

mod table;

use blockmirror_block::size::{SizeError, parse_size};

pub use table::OPTIONS;

use crate::create_options::CreateOptions;
use crate::error::{Error, Result};
use crate::format::header::Header;

/// The value of an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// On or off.
    Flag(bool),
    /// A number, or a size in bytes.
    Number(u64),
    /// One of the choices of [`OptionKind::Choice`], by its first spelling.
    Choice(&'static str),
    /// A name or a format, as it stands in the image.
    Text(Vec<u8>),
}

/// What values an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionKind {
    /// On or off.
    Flag,
    /// A number of bytes.
    Size,
    /// A number of bytes that is a power of two in a range.
    PowerOfTwoSize {
        /// The smallest.
        least: u64,
        /// The largest.
        most: u64,
    },
    /// A power of two in a range.
    PowerOfTwo {
        /// The smallest.
        least: u64,
        /// The largest.
        most: u64,
    },
    /// One of these, each with its spellings; the first is the one that is shown.
    Choice(&'static [&'static [&'static str]]),
    /// The name of a file.
    Name,
    /// The name of a format.
    Format,
}

/// Why a text is no value of an option.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ValueError {
    /// What is expected, in words.
    #[error("expected {0}")]
    Expected(String),
    /// It is no size.
    #[error(transparent)]
    Size(#[from] SizeError),
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct OptionDef {
    /// The key of `-o`.
    pub name: &'static str,
    /// The member of QMP's `BlockdevCreateOptionsQcow2`.
    pub qmp_name: &'static str,
    /// What values it takes.
    pub kind: OptionKind,
    /// The default, if there is one.
    pub default: Option<&'static str>,
    /// What it does, for help texts.
    pub help: &'static str,
    /// It exists in version 3 of the format only.
    pub needs_v3: bool,
    set: fn(&mut CreateOptions, OptionValue) -> Option<()>,
    get: fn(&CreateOptions) -> Option<OptionValue>,
    shown: Option<Shown>,
}

/// How `info` shows an option of an image.
#[derive(Clone, Copy, Debug)]
struct Shown {
    /// Its key in QEMU's `ImageInfoSpecificQCow2`.
    key: &'static str,
    /// Its place there; what QEMU does not have comes last.
    place: u8,
    value: fn(&Header) -> Option<OptionValue>,
}

/// What `info` shows beside the options.
const CORRUPT: Shown = Shown {
    key: "corrupt",
    place: 6,
    value: |header| (header.version >= 3).then_some(OptionValue::Flag(header.is_corrupt())),
};

/// The option with this name, in either spelling.
pub fn option(name: &str) -> Option<&'static OptionDef> {
    OPTIONS.iter().find(|option| option.name == name || option.qmp_name == name)
}

/// What `info` shows of an image: QEMU's keys and the values, in QEMU's order. The options of version 3 are
/// not there in an image of version 2, but for those that QEMU shows.
pub fn shown(header: &Header) -> impl Iterator<Item = (&'static str, OptionValue)> {
    let mut all: Vec<_> = OPTIONS.iter().filter_map(|option| option.shown).chain([CORRUPT]).collect();
    all.sort_by_key(|shown| shown.place);
    all.into_iter().filter_map(|shown| Some((shown.key, (shown.value)(header)?)))
}

impl OptionValue {
    fn into_flag(self) -> Option<bool> {
        if let Self::Flag(on) = self { Some(on) } else { None }
    }

    fn into_number(self) -> Option<u64> {
        if let Self::Number(number) = self { Some(number) } else { None }
    }

    fn into_choice(self) -> Option<&'static str> {
        if let Self::Choice(choice) = self { Some(choice) } else { None }
    }

    fn into_text(self) -> Option<Vec<u8>> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }
}

impl OptionDef {
    /// Sets the option in `options`.
    ///
    /// # Errors
    /// [`Error::Option`] for a value of another type.
    pub fn set(&self, options: &mut CreateOptions, value: OptionValue) -> Result<()> {
        let problem =
            || Error::Option { option: self.name, problem: format!("expected {}", self.kind.expected()) };
        (self.set)(options, value).ok_or_else(problem)
    }

    /// The value of the option in `options`.
    pub fn get(&self, options: &CreateOptions) -> Option<OptionValue> {
        (self.get)(options)
    }
}

impl OptionKind {
    /// The value that `text` stands for.
    ///
    /// # Errors
    /// [`ValueError`]. Whether a size lies in its range is for [`CreateOptions::check`] to say.
    pub fn parse(&self, text: &str) -> Result<OptionValue, ValueError> {
        let value = match self {
            Self::Flag => match text {
                "on" | "yes" | "true" | "y" => Some(OptionValue::Flag(true)),
                "off" | "no" | "false" | "n" => Some(OptionValue::Flag(false)),
                _ => None,
            },
            Self::Size | Self::PowerOfTwoSize { .. } => Some(OptionValue::Number(parse_size(text)?)),
            Self::PowerOfTwo { .. } => text.parse().ok().filter(|n| self.allows(*n)).map(OptionValue::Number),
            Self::Choice(choices) => choices
                .iter()
                .find(|spellings| spellings.contains(&text))
                .and_then(|spellings| Some(OptionValue::Choice(spellings.first()?))),
            Self::Name | Self::Format => Some(OptionValue::Text(text.as_bytes().to_vec())),
        };
        value.ok_or_else(|| ValueError::Expected(self.expected()))
    }

    /// Whether a number is in the range of the option.
    pub fn allows(&self, number: u64) -> bool {
        match *self {
            Self::PowerOfTwoSize { least, most } | Self::PowerOfTwo { least, most } => {
                number.is_power_of_two() && (least..=most).contains(&number)
            }
            _ => true,
        }
    }

    /// The values that it takes, for help texts: `on|off`, `SIZE`.
    pub fn values(&self) -> String {
        match *self {
            Self::Flag => "on|off".into(),
            Self::Size | Self::PowerOfTwoSize { .. } => "SIZE".into(),
            Self::Name => "NAME".into(),
            Self::Format => "FORMAT".into(),
            Self::PowerOfTwo { .. } | Self::Choice(_) => self.spellings().join("|"),
        }
    }

    /// The same for error messages: `on or off`, `a size`.
    pub fn expected(&self) -> String {
        match *self {
            Self::Flag => "on or off".into(),
            Self::Size | Self::PowerOfTwoSize { .. } => "a size".into(),
            Self::Name => "a name".into(),
            Self::Format => "the name of a format".into(),
            Self::PowerOfTwo { .. } | Self::Choice(_) => match self.spellings().split_last() {
                Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
                _ => self.spellings().concat(),
            },
        }
    }

    /// First spellings, then second ones.
    fn spellings(&self) -> Vec<String> {
        match *self {
            Self::PowerOfTwo { least, most } => {
                let powers = std::iter::successors(Some(least), |n| n.checked_mul(2));
                powers.take_while(|n| *n <= most).map(|n| n.to_string()).collect()
            }
            Self::Choice(choices) => {
                let most = choices.iter().map(|spellings| spellings.len()).max().unwrap_or(0);
                let nth = |n| choices.iter().filter_map(move |spellings| spellings.get(n));
                (0..most).flat_map(nth).map(|text| (*text).to_owned()).collect()
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
