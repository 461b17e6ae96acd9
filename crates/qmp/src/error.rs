//! The error answer of a command: a class that programs match and a text for people.

use std::fmt;

use thiserror::Error;

/// The classes of the protocol. All but [`ErrorClass::GenericError`] exist because some client once wanted to
/// tell that case from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorClass {
    /// Everything else.
    GenericError,
    /// No such command, or not now.
    CommandNotFound,
    /// The device is not in a state where this makes sense: there is no such job, for example.
    DeviceNotActive,
    /// No such device or node.
    DeviceNotFound,
    /// A feature of the host is missing.
    KvmMissingCap,
}

impl ErrorClass {
    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::KvmMissingCap => "KVMMissingCap",
        }
    }

    /// The class of that name; an unknown one is [`ErrorClass::GenericError`].
    pub fn from_name(name: &str) -> Self {
        let all = [Self::CommandNotFound, Self::DeviceNotActive, Self::DeviceNotFound, Self::KvmMissingCap];
        all.into_iter().find(|class| class.name() == name).unwrap_or(Self::GenericError)
    }
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A failed command.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{desc}")]
#[non_exhaustive]
pub struct QmpError {
    /// What programs match.
    pub class: ErrorClass,
    /// What people read.
    pub desc: String,
}

impl QmpError {
    /// An error of the class everything is that has none of its own.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// An error of `class`.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        Self { class, desc: desc.into() }
    }
}

impl From<crate::json::JsonError> for QmpError {
    fn from(error: crate::json::JsonError) -> Self {
        Self::generic(error.to_string())
    }
}
