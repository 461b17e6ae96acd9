//! The integration tests of this crate, in one program.

mod amend;
mod bitmap;
mod chain;
mod chain_signals;
mod common;
mod compress;
mod copy;
mod ctl_watch;
mod daemon_kill;
mod dd;
mod hash;
mod inspect;
mod kill;
mod limits;
mod log;
mod measure;
mod output;
mod process;
mod qemu;
mod qemu_name;
mod resize;
mod serve;
mod snapshot;
mod target_kinds;
mod transcripts;
mod verify;
