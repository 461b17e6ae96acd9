//! Sessions on sockets and pipes, and the events that all of them get.

mod connection;
mod hub;
mod listen;
mod outgoing;
mod session;

pub use connection::{Connection, Peer};
pub use hub::Monitors;
pub use listen::Listener;
pub use session::Session;
