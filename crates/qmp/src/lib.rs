//! The QMP wire format, schema and server loop; knows nothing of disks.
//!
//! - [`json`]: the JSON dialect, as a stream;
//! - [`schema`]: commands, events and types as data; checked, introspected, printed;
//! - [`keyval`]: command line options by the same schema;
//! - [`Table`]: commands with their handlers;
//! - [`Monitors`]: sessions on sockets and pipes, and the events that all of them get.
//!
//! ```no_run
//! use blockmirror_qmp::schema::{Command, STR, req};
//! use blockmirror_qmp::{Monitors, Table, Version};
//! use serde_json::json;
//!
//! static ECHO: Command = Command::new("echo", "Says it again.", &[req("text", STR, "what to say")]);
//!
//! # fn main() -> std::io::Result<()> {
//! let mut table = Table::new(Version::new(10, 0, 0, "my monitor"));
//! table.command(&ECHO, |_session, args| Ok(json!({"text": args.str("text")?})));
//! let monitors = Monitors::new(table);
//! let listener = monitors.listen_unix("/run/my-monitor.sock")?;
//! listener.wait_first();
//! # Ok(())
//! # }
//! ```

mod args;
mod error;
pub mod json;
pub mod keyval;
mod protocol;
pub mod schema;
mod server;
mod sync;

pub use args::Args;
pub use error::{ErrorClass, QmpError};
pub use protocol::{Table, Version};
pub use server::{Connection, Listener, Monitors, Peer, Session, inherited_fd};
