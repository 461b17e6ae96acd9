//! Sessions on sockets and pipes, and the events that all of them get.

mod connection;
mod hub;
mod listen;
mod outgoing;
mod threads;

pub use connection::Connection;
pub use hub::Monitors;
pub use listen::Listener;
