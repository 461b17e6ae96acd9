//! The integration tests of this crate, in one program.

mod bitmaps;
mod changes;
mod checkpoints;
mod conformance;
mod drain;
mod embed;
mod group;
mod job;
mod known_bugs;
mod live_log;
mod locks;
mod queue;
#[path = "../../examples/queue_thread.rs"]
mod queue_thread;
mod reads;
mod reflink;
mod tap;
mod tap_failures;
mod waits;
mod workers;
