//! Crash replay: whenever the power fails, an image opens, leaks at most, and has every flushed byte.
//!
//! Called by the tests beside it for seconds and by `cargo xtask crash` for as long as one likes.
//! Sequences of operations are played over storages that record what was flushed; from their logs come all
//! images that a crash could have left (each prefix, unflushed writes missing singly and in groups, torn at
//! sectors). Each is opened, checked by a checker that shares no code with the product, and read: flushed
//! data must be there, every sector must hold an old or a new value, every snapshot that is listed what it
//! held when it was taken, and every bitmap that is not in use a bit for each write. Every few points a guest
//! goes on where the crash left off and what leaked is repaired, or QEMU's own check has its say. `faults`
//! fails each request of each operation in turn (`cargo xtask faults`).
//!
//! ```text
//!   Start --> Session (image + model) --> Recorder (log) --> Point --> checker, reading, go_on, qemu-img
//! ```

mod campaign;
mod checker;
mod damage;
mod directory;
mod faults;
mod files;
mod model;
mod op;
mod played;
mod reader;
mod recorder;
mod session;
mod start;

pub use campaign::{Sequence, Tally};
pub use checker::{Allowed, Findings, check};
pub use faults::{FaultTally, FaultyOp};
pub use op::{OPS, Op};
pub use start::{Contents, DataPlace, Start};
