//! The integration tests of this crate, in one program.

mod bitmaps;
mod checkpoints;
mod conformance;
mod drain;
mod group;
mod job;
mod known_bugs;
mod live_log;
mod locks;
mod queue;
mod reflink;
mod tap;
mod tap_failures;
mod waits;
mod workers;
