//! Changing the options of an existing image: the `-o` texts of `amend`, and the change itself.
//!
//! Called by the command. Which values the options take is in the table of `blockmirror_qcow2::options`; what
//! can be changed, and in which order, is [`blockmirror_qcow2::amend`]'s business.

use std::path::Path;

use blockmirror_block::Visit;
use blockmirror_qcow2::options::OptionValue;
use blockmirror_qcow2::{AmendOptions, Error as Qcow2Error, Header, Version};

use crate::disk_image::Note;
use crate::error::{Error, Result};
use crate::format::Format;
use crate::open::OpenOptions;
use crate::options::{OptionError, OptionHelp, not_an_option, rows, split_options};

/// The options that can be named. Those of a backing file have to be as they are.
const KEYS: [&str; 8] = [
    "backing_file",
    "backing_fmt",
    "compat",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
    "size",
];

/// What `-o` said; what was not said stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AmendSettings {
    options: AmendOptions,
    may_shrink: bool,
}

/// The options that images of `format` can have changed.
pub fn amend_option_help(format: Format) -> Vec<OptionHelp> {
    let rows = rows(format).into_iter().filter(|row| format == Format::Qcow2 && KEYS.contains(&row.key));
    rows.map(|row| OptionHelp { key: row.key, values: row.values(), help: row.help.to_owned() }).collect()
}

impl AmendSettings {
    /// Reads `text` on top of what is there; a key given twice keeps its last value. In a value, two commas
    /// stand for one.
    ///
    /// ```
    /// use blockmirror_image::AmendSettings;
    ///
    /// let mut settings = AmendSettings::default();
    /// settings.parse("compat=1.1,refcount_bits=64")?;
    /// let error = settings.parse("cluster_size=4K").unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "option cluster_size: it can be given when an image is created, and not be changed",
    /// );
    /// # Ok::<(), blockmirror_image::OptionError>(())
    /// ```
    ///
    /// # Errors
    /// [`OptionError`], naming the key.
    pub fn parse(&mut self, text: &str) -> Result<(), OptionError> {
        for part in split_options(text) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(OptionError::NotAPair { part });
            };
            let row = rows(Format::Qcow2).into_iter().find(|row| row.key == key);
            let row = row.ok_or_else(|| not_an_option(key, Format::Qcow2))?;
            if !KEYS.contains(&row.key) {
                return Err(OptionError::OnlyAtCreation { key: key.to_owned() });
            }
            self.set(row.key, row.parse(value)?);
        }
        Ok(())
    }

    /// Lets the disk become shorter, which loses what lies past its new end. By default such a `size` is
    /// refused.
    pub fn allow_shrink(&mut self, allow: bool) -> &mut Self {
        self.may_shrink = allow;
        self
    }

    fn set(&mut self, key: &str, value: OptionValue) {
        let options = &mut self.options;
        match (key, value) {
            ("compat", OptionValue::Choice(version)) => {
                options.version =
                    Some(if version == Version::V2.as_str() { Version::V2 } else { Version::V3 });
            }
            ("lazy_refcounts", OptionValue::Flag(lazy)) => options.lazy_refcounts = Some(lazy),
            ("data_file_raw", OptionValue::Flag(raw)) => options.data_file_raw = Some(raw),
            // Powers of two up to 64.
            ("refcount_bits", OptionValue::Number(bits)) => options.refcount_bits = Some(bits as u32),
            ("size", OptionValue::Number(size)) => options.size = Some(size),
            ("backing_file", OptionValue::Text(name)) => options.backing_file = Some(name),
            ("backing_fmt", OptionValue::Text(format)) => {
                options.backing_format = Some(String::from_utf8_lossy(&format).into_owned());
            }
            ("data_file", OptionValue::Text(name)) => options.data_file = Some(name),
            // Each key has a value of one kind.
            _ => {}
        }
    }
}

/// Changes the options of the image `path`, which nothing else may have open; what it stands on is opened for
/// reading. `progress` is called with how much of how much metadata has been worked through, and may break.
/// Returns what its owner should know.
///
/// # Errors
/// [`Error::Amend`] for what cannot be changed, and [`Error::WouldShrink`], before anything is; if a file
/// cannot be opened, read or written. The change can be repeated then.
pub fn amend(
    path: impl AsRef<Path>,
    options: &OpenOptions,
    settings: &AmendSettings,
    progress: &mut dyn FnMut(u64, u64) -> Visit,
) -> Result<Vec<Note>> {
    let path = path.as_ref();
    let Some(files) = options.clone().writable(true).open_files(path)? else {
        let why = "a raw image has no options".to_owned();
        return Err(Error::Amend { path: path.to_owned(), why });
    };
    let name = files.storage.name().into();
    if let Some(size) = settings.options.size.filter(|size| *size > 0 && !settings.may_shrink) {
        // What is wrong with the header the next step reports.
        let old = Header::read(&*files.storage).map_or(0, |header| header.virtual_size);
        if size < old {
            return Err(Error::WouldShrink { path: path.to_owned(), size, old });
        }
    }
    let amended = blockmirror_qcow2::amend(files.storage, &files.open, &settings.options, progress);
    amended.map_err(|error| match error {
        Qcow2Error::Option { .. } => Error::Amend { path: path.to_owned(), why: error.to_string() },
        error => error.in_file(&name).into(),
    })?;
    Ok(files.notes)
}
