//! Errors of more than one layer: those that clients are answered, in the words that scripts know, and that
//! of the command line. Leaf: used by all layers above.

use blockmirror_qmp::QmpError;
use thiserror::Error;

use crate::Reply;

/// An option that could not be carried out.
#[derive(Debug, Error)]
#[error("{option} {text}: {reason}")]
#[non_exhaustive]
pub struct StartupError {
    /// Which option.
    pub option: &'static str,
    /// Its value, as typed.
    pub text: String,
    /// What is wrong.
    pub reason: String,
}

/// Refuses an option that is known and not implemented, by name.
pub(crate) fn refuse(is_given: bool, driver: &str, option: &str) -> Reply<()> {
    if is_given {
        return Err(QmpError::generic(format!("Driver '{driver}' does not support the option '{option}'")));
    }
    Ok(())
}

/// Why `blockdev-reopen` refuses an option.
pub(crate) fn cannot_change(option: &str) -> QmpError {
    QmpError::generic(format!("Cannot change the option '{option}'"))
}

/// Why nothing writes to a node, in the words that scripts know.
pub(crate) fn is_read_only() -> QmpError {
    QmpError::generic("Block node is read-only")
}

/// An error of a layer below, for a client.
pub(crate) fn qmp_error(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

/// What the system says went wrong, without its number.
pub(crate) fn system_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error ").map_or(text.clone(), |(words, _)| words.to_owned())
}
