//! How a command ends: exit codes, and errors as one line.

mod detail;

use std::fmt::Display;
use std::io;
use std::path::Path;

use signal_hook::consts::SIGPIPE;

use crate::quote::shell_word;
use crate::{foreign, qemu_words};

pub(crate) use detail::{Detail, object, remark};

/// The exit codes, as the help documents them: the one table, which a test compares with the help's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done; of `compare`, the images are the same.
    Done,
    /// Failed; of `compare`, the images differ.
    Failed,
    /// The command line is wrong.
    Usage,
    /// Of `compare`: the images could not be compared.
    NotCompared,
    /// The same: one was not read.
    NotRead,
    /// The same: one did not say where it has data.
    NotMapped,
    /// Done, except for ranges that were given up.
    Incomplete,
    /// Of `inspect`: something was found that is not allowed.
    Refused,
    /// Copied, and the target is not equal to the source.
    Mismatch,
    /// Of `check`: the image is corrupt.
    Corrupt,
    /// Of `check`: the image has leaks, and nothing else is wrong.
    Leaks,
    /// Of `check`: the format has nothing to check.
    NoChecks,
    /// Ended by a signal; the copy can be gone on with.
    Resumable,
    /// Ended by this signal.
    Signal(i32),
    /// The reader of the standard output went away. The code is that of a program that SIGPIPE ends.
    BrokenPipe,
}

impl Exit {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage | Self::NotCompared | Self::NotRead | Self::NotMapped | Self::Corrupt => 2,
            Self::Incomplete | Self::Leaks => 3,
            Self::Refused => 4,
            Self::Mismatch => 5,
            Self::Resumable => 6,
            Self::NoChecks => 63,
            Self::Signal(signal) => 128 | u8::try_from(signal).unwrap_or(0),
            Self::BrokenPipe => Self::Signal(SIGPIPE).code(),
        }
    }
}

/// Why a command did not end well: the line to print, if any, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: Option<String>,
    /// The same in the words of `qemu-img`, where they differ.
    pub(crate) in_qemu: Option<String>,
    /// What programs learn of it besides.
    pub(crate) detail: Option<Box<Detail>>,
}

/// The result of a command.
pub(crate) type Outcome<T = Exit> = Result<T, Failure>;

impl Failure {
    /// The operation failed.
    pub(crate) fn failed(message: impl Display) -> Self {
        Self { exit: Exit::Failed, message: Some(message.to_string()), in_qemu: None, detail: None }
    }

    /// The command line asks for something that makes no sense.
    pub(crate) fn usage(message: impl Display) -> Self {
        Self { exit: Exit::Usage, ..Self::failed(message) }
    }

    /// The standard output cannot be written. A reader that went away (`blockmirror map disk | head`) wants
    /// no message.
    pub(crate) fn output(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self { exit: Exit::BrokenPipe, message: None, in_qemu: None, detail: None };
        }
        Self::failed(format_args!("write: standard output: {error}"))
    }

    /// What `qemu-img` says of it.
    pub(crate) fn in_qemu(mut self, words: impl Display) -> Self {
        self.in_qemu = Some(words.to_string());
        self
    }

    /// The same with the file before it in QEMU's words.
    pub(crate) fn named_in_qemu(mut self, path: &Path) -> Self {
        self.in_qemu = self.in_qemu.map(|words| format!("{}: {words}", path.display()));
        self
    }

    /// The same failure, which `error` of a disk or a file has caused, if it is known.
    pub(crate) fn caused_by(mut self, error: Option<&blockmirror_block::Error>) -> Self {
        self.detail = error.map(|error| Box::new(Detail::of(error))).or(self.detail);
        self
    }

    /// The same failure with another exit code.
    pub(crate) fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }
}

impl From<blockmirror_image::Error> for Failure {
    fn from(error: blockmirror_image::Error) -> Self {
        use blockmirror_block::ErrorKind;
        use blockmirror_image::{Error, ReferenceRefusal};
        let hint = match &error {
            Error::Reference(refused) => match &refused.reason {
                ReferenceRefusal::Outside { directory } => {
                    Some(format!("to allow it: --allow-backing {}", shell_word(&directory.to_string_lossy())))
                }
                ReferenceRefusal::NotAPath if is_protocol(&refused.name) => {
                    Some("--allow-protocols opens it".to_owned())
                }
                ReferenceRefusal::Guessed => Some("give it with -O".to_owned()),
                _ => None,
            },
            Error::TargetUnclear { .. } => Some("--in-place writes into it, --atomic replaces it".to_owned()),
            Error::DataFileExists { .. } => Some("--force overwrites it".to_owned()),
            Error::Block(error) if is_claimed(error) => Some("--force overrides this".to_owned()),
            Error::ForeignFormat { path, format } => Some(match foreign::suggestion(path, format) {
                Some(command) => {
                    format!("{command} reads it, and so does --via qemu-nbd; -f raw opens it as raw")
                }
                None => "-f raw opens it as raw".to_owned(),
            }),
            // Another user of the image is of another kind.
            Error::Block(error) if error.operation() == "lock" && error.kind() == ErrorKind::Io => {
                Some("--lock off disables locking".to_owned())
            }
            _ => None,
        };
        let failed = match hint {
            Some(hint) => Self::failed(format_args!("{error}; {hint}")),
            None => Self::failed(&error),
        };
        Self { in_qemu: qemu_words::of_image(&error), ..failed }.caused_by(error.device_error())
    }
}

/// Whether `name` is one of those that `--allow-protocols` is for.
fn is_protocol(name: &Path) -> bool {
    let name = name.as_os_str().as_encoded_bytes();
    name == b"null-co://" || name.starts_with(b"blkdebug:")
}

/// Whether a block device was refused because it is mounted or held.
fn is_claimed(error: &blockmirror_block::Error) -> bool {
    let system = error.cause().and_then(|source| source.downcast_ref::<io::Error>());
    system.is_some_and(|source| source.kind() == io::ErrorKind::ResourceBusy)
}

impl From<blockmirror_block::Error> for Failure {
    fn from(error: blockmirror_block::Error) -> Self {
        let in_qemu = qemu_words::of_disk(&error);
        Self { in_qemu, ..Self::failed(&error) }.caused_by(Some(&error))
    }
}

/// `text` with what would break a line or drive a terminal made visible. File names may hold anything, also
/// those inside of images.
pub(crate) fn one_line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_stays_on_one_line() {
        assert_eq!(one_line("a\nb\u{1b}[2Jc\u{202e}d ü"), "a\\nb\\u{1b}[2Jc\\u{202e}d ü");
    }
}
