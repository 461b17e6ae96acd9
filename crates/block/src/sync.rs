//! Locks without poisoning, threads and a clock: what a model checker has to see.
//!
//! A panic in one thread must not turn into a panic in every other. State that a panic may have left half
//! changed is guarded by its owner (an explicit *poisoned* flag), not by the mutex.
//!
//! All crates take their locks from here. With `--cfg shuttle` the same names are those of a model checker,
//! which chooses who runs next at each of them: `cargo xtask model` runs such models. What goes round this
//! module it cannot see, so code that is modelled takes its threads, atomics and time from here too.

#[cfg(shuttle)]
mod model;
#[cfg(not(shuttle))]
mod real;

#[cfg(shuttle)]
pub use model::{Condvar, Instant, Mutex, MutexGuard, atomic, thread, thread_number};
#[cfg(not(shuttle))]
pub(crate) use real::locks_taken;
#[cfg(not(shuttle))]
pub use real::{Condvar, Instant, Mutex, MutexGuard, atomic, thread, thread_number};
