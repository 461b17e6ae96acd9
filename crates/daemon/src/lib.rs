//! Nodes, exports and jobs, driven by QMP: what `qemu-storage-daemon` is, for mirror work.
//!
//! | module | what it is |
//! |---|---|
//! | [`Daemon`], `startup` | the whole: made from [`Startup`] options, runs until `quit` |
//! | `command` | the commands, each with its schema; `locks`: which run beside each other |
//! | `job` | jobs by name, and the thread that turns each one's events into those of the protocol |
//! | `export` | the NBD server and what it serves |
//! | `driver`, `new_image` | how each kind of node is opened, and the files that commands create |
//! | `context` | what all of these share: graph, objects, locks, which files may be opened, events |
//! | `graph` | nodes, and who uses them for what |
//! | `object`, `exported_bitmaps` | what nodes and exports refer to by id; bitmaps that clients read |
//! | `events`, `schema` | what clients are sent; types of arguments that several layers share |
//! | `arguments`, `errors`, `ids`, `quit` | typed arguments, errors, forms of names, the wish to end |
//!
//! A module knows those below it in the table, and none above.
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
mod context;
mod daemon;
mod driver;
mod errors;
mod events;
mod export;
mod exported_bitmaps;
mod graph;
mod ids;
mod inherited;
mod job;
mod locks;
mod new_image;
mod object;
mod quit;
mod schema;
mod startup;
#[cfg(test)]
mod tests;

pub use daemon::Daemon;
pub use errors::StartupError;
pub use job::JobSummary;
pub use startup::Startup;

/// The target of log events that are shown to the user even where no log is asked for: one line each, rare,
/// on what the user has to know and no client is sent.
pub const NOTICE: &str = "blockmirror::notice";

/// What a command answers.
pub(crate) type Reply<T> = Result<T, blockmirror_qmp::QmpError>;

/// The rest of a command, while which others may run.
pub(crate) type Deferred = Box<dyn FnOnce() -> Reply<serde_json::Value>>;
