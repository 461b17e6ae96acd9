//! The QMP wire format, schema, server loop and client; knows nothing of disks.
//!
//! - [`json`]: the JSON dialect, as a stream;
//! - [`schema`]: commands, events and types as data; checked, introspected, printed;
//! - [`keyval`]: command line options by the same schema;
//! - [`Table`]: commands with their handlers;
//! - [`Monitors`]: sessions on sockets and pipes, and the events that all of them get;
//! - [`Client`]: the other end.
//!
//! ```
//! use std::io::{BufRead, BufReader, Write};
//! use std::os::unix::net::UnixStream;
//!
//! use blockmirror_qmp::schema::{Command, Event, Object, STR, Type, req};
//! use blockmirror_qmp::{Connection, ErrorClass, Monitors, QmpError, Table, Version};
//! use serde_json::json;
//!
//! static NODE: Object = Object::new("Node", "A node.", &[req("name", STR, "its name")]);
//! static FIND: Command = Command::new("find", "Finds a node.", &[req("name", STR, "which")])
//!     .returns(Type::Object(&NODE), "the node");
//! static FOUND: Event = Event::new("FOUND", "A node was found.", &[req("name", STR, "its name")]);
//!
//! # fn main() -> std::io::Result<()> {
//! let mut table = Table::new(Version::new(10, 0, 0, "my monitor"));
//! table
//!     .command(&FIND, |_session, args| match args.str("name")? {
//!         "disk" => Ok(json!({"name": "disk"})),
//!         other => Err(QmpError::new(ErrorClass::DeviceNotFound, format!("Cannot find node '{other}'"))),
//!     })
//!     .event(&FOUND);
//! let monitors = Monitors::new(table);
//!
//! // In earnest: `let listener = monitors.listen_unix("/run/my-monitor.sock")?;`
//! let (mut client, server) = UnixStream::pair()?;
//! monitors.serve(Connection::unix(server)?)?;
//!
//! client.write_all(b"{'execute': 'qmp_capabilities'}")?;
//! client.write_all(b"{'execute': 'find', 'arguments': {'name': 'x'}, 'id': 1}")?;
//! client.write_all(b"{'execute': 'find', 'arguments': {}}")?;
//! let mut lines = BufReader::new(client).lines();
//! let mut line = || lines.next().unwrap_or_else(|| Ok("hung up".into()));
//! assert!(line()?.starts_with(r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}"#));
//! assert_eq!(line()?, r#"{"return": {}}"#);
//! assert_eq!(line()?, r#"{"id": 1, "error": {"class": "DeviceNotFound", "desc": "Cannot find node 'x'"}}"#);
//! assert_eq!(line()?, r#"{"error": {"class": "GenericError", "desc": "Parameter 'name' is missing"}}"#);
//!
//! monitors.emit(&FOUND, [("name".into(), "disk".into())].into_iter().collect());
//! assert!(line()?.ends_with(r#""event": "FOUND", "data": {"name": "disk"}}"#));
//!
//! assert_eq!(monitors.stop(std::time::Duration::from_secs(1)), 0);
//! assert_eq!(line()?, "hung up");
//! # Ok(())
//! # }
//! ```
//!
//! # A session
//!
//! After the greeting a client negotiates by `qmp_capabilities`; with `"enable": ["oob"]` it may `exec-oob`
//! commands that allow it, past one that is running. Commands run one after the other on a thread of their
//! session; without out of band execution the next request is not looked at before the last is answered, with
//! it up to eight wait.
//!
//! A client that does not read keeps itself from having more commands run: once 256 KiB of answers wait, none
//! is begun. Events are kept for it up to 4096 or 1 MiB; then the oldest go. No other client waits for it.
//!
//! When a client has sent its last byte, what it has sent is still run and answered: `printf '...' | socat -
//! UNIX:...` sees every answer.

mod args;
pub mod client;
mod error;
pub mod json;
pub mod keyval;
mod number;
mod peer;
mod protocol;
pub mod schema;
mod server;
mod session;
mod sync;

pub use args::Args;
pub use client::{Client, ClientError};
pub use error::{ErrorClass, QmpError};
pub use peer::Peer;
pub use protocol::{Table, Version};
pub use server::{Connection, Listener, Monitors};
pub use session::Session;
