//! The table of options that an image is created with.
//!
//! One row says: both spellings of the name (`-o` of `qemu-img create`, and QMP),
//! the type with its range, the default, the help, and how the value gets into [`CreateOptions`] and comes
//! out of a [`Header`]. [`CreateOptions::check`] takes ranges and versions from here too. The front
//! ends name each option themselves as well: CONTRIBUTING.md lists the files of a new one.
//!
//! ```
//! use blockmirror_qcow2::CreateOptions;
//! use blockmirror_qcow2::options::{OptionValue, option};
//!
//! let mut options = CreateOptions::new(1 << 30);
//! let clusters = option("cluster_size").unwrap();
//! let value = clusters.parse("4096", &|text| text.parse().ok()).unwrap();
//! clusters.set(&mut options, value).unwrap();
//! assert_eq!(options.cluster_size, 4096);
//!
//! let compression = option("compression-type").unwrap();
//! assert_eq!(compression.values(), "zlib|zstd");
//! assert_eq!(compression.parse("lzo", &|_| None), Err("zlib or zstd".to_owned()));
//! assert_eq!(compression.get(&options), Some(OptionValue::Choice("zlib")));
//! ```

mod table;

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
    value: fn(&Header) -> Option<OptionValue>,
}

/// The option with this name, in either spelling.
pub fn option(name: &str) -> Option<&'static OptionDef> {
    OPTIONS.iter().find(|option| option.name == name || option.qmp_name == name)
}

/// What `info` shows of an image: QEMU's keys and the values. The options of version 3 are not there in an
/// image of version 2, but for those that QEMU shows.
pub fn shown(header: &Header) -> impl Iterator<Item = (&'static str, OptionValue)> {
    OPTIONS
        .iter()
        .filter_map(|option| option.shown)
        .filter_map(|shown| Some((shown.key, (shown.value)(header)?)))
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
    /// The value that `text` stands for. `size` reads sizes with their suffixes.
    ///
    /// # Errors
    /// What is expected, in words. Whether a number lies in its range is for [`CreateOptions::check`] to say.
    pub fn parse(&self, text: &str, size: &dyn Fn(&str) -> Option<u64>) -> Result<OptionValue, String> {
        let value = match self.kind {
            OptionKind::Flag => match text {
                "on" | "yes" | "true" | "y" => Some(OptionValue::Flag(true)),
                "off" | "no" | "false" | "n" => Some(OptionValue::Flag(false)),
                _ => None,
            },
            OptionKind::Size | OptionKind::PowerOfTwoSize { .. } => size(text).map(OptionValue::Number),
            OptionKind::PowerOfTwo { .. } => {
                text.parse().ok().filter(|n| self.allows(*n)).map(OptionValue::Number)
            }
            OptionKind::Choice(choices) => choices
                .iter()
                .find(|spellings| spellings.contains(&text))
                .and_then(|spellings| Some(OptionValue::Choice(spellings.first()?))),
            OptionKind::Name | OptionKind::Format => Some(OptionValue::Text(text.as_bytes().to_vec())),
        };
        value.ok_or_else(|| self.expected())
    }

    /// Sets the option in `options`.
    ///
    /// # Errors
    /// [`Error::Option`] for a value of another type.
    pub fn set(&self, options: &mut CreateOptions, value: OptionValue) -> Result<()> {
        let problem =
            || Error::Option { option: self.name, problem: format!("expected {}", self.expected()) };
        (self.set)(options, value).ok_or_else(problem)
    }

    /// The value of the option in `options`.
    pub fn get(&self, options: &CreateOptions) -> Option<OptionValue> {
        (self.get)(options)
    }

    /// Whether a number is in the range of the option.
    pub fn allows(&self, number: u64) -> bool {
        match self.kind {
            OptionKind::PowerOfTwoSize { least, most } | OptionKind::PowerOfTwo { least, most } => {
                number.is_power_of_two() && (least..=most).contains(&number)
            }
            _ => true,
        }
    }

    /// The values that it takes, for help texts: `on|off`, `SIZE`.
    pub fn values(&self) -> String {
        match self.kind {
            OptionKind::Flag => "on|off".into(),
            OptionKind::Size | OptionKind::PowerOfTwoSize { .. } => "SIZE".into(),
            OptionKind::Name => "NAME".into(),
            OptionKind::Format => "FORMAT".into(),
            OptionKind::PowerOfTwo { .. } | OptionKind::Choice(_) => self.spellings().join("|"),
        }
    }

    /// The same for error messages: `on or off`, `a size`.
    pub fn expected(&self) -> String {
        match self.kind {
            OptionKind::Flag => "on or off".into(),
            OptionKind::Size | OptionKind::PowerOfTwoSize { .. } => "a size".into(),
            OptionKind::Name => "a name".into(),
            OptionKind::Format => "the name of a format".into(),
            OptionKind::PowerOfTwo { .. } | OptionKind::Choice(_) => match self.spellings().split_last() {
                Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
                _ => self.spellings().concat(),
            },
        }
    }

    /// First spellings, then second ones.
    fn spellings(&self) -> Vec<String> {
        match self.kind {
            OptionKind::PowerOfTwo { least, most } => {
                let powers = std::iter::successors(Some(least), |n| n.checked_mul(2));
                powers.take_while(|n| *n <= most).map(|n| n.to_string()).collect()
            }
            OptionKind::Choice(choices) => {
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
