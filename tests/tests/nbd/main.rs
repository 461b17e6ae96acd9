//! NBD clients and servers of others and ours, in one program.

mod client;
mod clients_table;
#[path = "../common/mod.rs"]
mod common;
mod images;
mod mirror;
mod serve;
mod server;
mod verify;
