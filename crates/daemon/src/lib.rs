//! Nodes, exports and jobs, driven by QMP: what `qemu-storage-daemon` is, for mirror work.
//!
//! | module | what it is |
//! |---|---|
//! | [`Daemon`] | the whole: made from [`Startup`] options, runs until `quit` |
//! | `arguments` | typed arguments: struct, schema and parser from one declaration |
//! | `graph`, `driver` | nodes, who uses them for what, and how each kind is opened |
//! | `export` | the NBD server and what it serves |
//! | `job` | jobs by name, and the thread that turns each one's events into those of the protocol |
//! | `command` | the commands, each with its schema |
//!
//! The daemon holds no logic of disks: it puts together what the crates below do. Lock order: the nodes that
//! a command works on, then exports, jobs, objects, graph; no I/O under any but the first. A file that hangs
//! keeps only those waiting who use it: a command locks its own nodes alone, opening a node locks none, and
//! what the host says of files is asked under no lock.
//!
//! Logs by `tracing`: a span `command` for each QMP command, `connection` for each NBD client, `job` for each
//! job. Nothing is logged for a request that succeeds. What carries the target [`NOTICE`] is for the user in
//! any case.
//!
//! ```
//! use std::os::unix::net::UnixStream;
//! use std::time::Duration;
//! use blockmirror_daemon::{Daemon, Startup};
//! use blockmirror_qmp::{Client, Connection};
//!
//! let daemon = Daemon::new(Vec::new());
//! let mut startup = Startup::default();
//! startup.blockdevs.push("driver=null-co,node-name=disk,size=1048576".into());
//! startup.apply(&daemon)?;
//!
//! let (ours, theirs) = UnixStream::pair()?;
//! daemon.monitors().serve(Connection::unix(theirs)?)?;
//! let mut client = Client::new(ours, Duration::from_secs(60))?;
//! let nodes = client.execute("query-named-block-nodes", serde_json::json!({}))?;
//! assert_eq!(nodes[0]["node-name"], "disk");
//! client.execute("quit", serde_json::json!({}))?;
//! daemon.run();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod arguments;
mod command;
mod daemon;
mod driver;
mod errors;
mod events;
mod export;
mod graph;
mod inherited;
mod job;
mod new_image;
mod object;
mod schema;
mod startup;
#[cfg(test)]
mod tests;

pub use daemon::Daemon;
pub use startup::{Startup, StartupError};

/// The target of log events that are shown to the user even where no log is asked for: one line each, rare,
/// on what the user has to know and no client is sent.
pub const NOTICE: &str = "blockmirror::notice";

/// What a command answers.
pub(crate) type Reply<T> = Result<T, blockmirror_qmp::QmpError>;
