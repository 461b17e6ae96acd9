//! The integration tests of this crate, in one program.

mod client_blame;
mod client_cancel;
mod client_lies;
mod client_reconnect;
mod client_retired;
mod client_server;
mod client_zeroes;
#[path = "../common/mod.rs"]
mod common;
mod fake;
mod server_handshake;
mod server_life;
mod server_requests;
mod server_tls;
