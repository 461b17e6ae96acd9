//! The daemon as its users meet it, in one program.

mod activation;
mod as_qemu_qmp;
mod commands;
#[path = "../common/mod.rs"]
mod common;
mod ctl;
mod ctl_chain;
mod ctl_mirror;
mod guest;
mod live_log;
mod nbd;
mod qmp_library;
mod qmp_reference;
mod random;
mod target_cow;
