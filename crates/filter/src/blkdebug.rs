//! Fault injection by rules, with the keys of QEMU's `blkdebug` driver.
//!
//! `event` names what happens, `options` is what can be asked for, `config` reads rules from a file, `rules`
//! decides which request fails, and `member` puts that in front of a disk or a storage.

mod config;
mod event;
mod member;
mod options;
mod rules;

pub use config::MAX_CONFIG_BYTES;
pub use event::{Event, IoType};
pub use member::{BlkdebugDisk, BlkdebugStorage};
pub use options::{BlkdebugError, BlkdebugOptions, InjectError, MAX_RULES, SetState};
