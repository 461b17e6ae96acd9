//! JSON as it is spoken on a QMP socket: a stream of values without separators, with single-quoted strings.
//!
//! [`Parser`] takes bytes as they arrive and gives values as they are complete; [`parse`] reads one value
//! from one string; [`write()`] and [`to_string`] give text. Called by the sessions and by [`crate::keyval`].
//!
//! Values are [`serde_json::Value`]. Integers are kept exactly if they fit 64 bits, signed or unsigned;
//! others become a double. A number too large for a double is refused (QEMU takes it as infinity, which JSON
//! cannot spell).

mod build;
mod lex;
mod parser;
mod text;
mod utf8;

pub use parser::{JsonError, Limits, Parser, parse};
pub use text::{to_string, write};
