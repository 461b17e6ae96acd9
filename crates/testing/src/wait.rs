//! Waiting for a state that another thread or process reaches.

use std::thread;
use std::time::{Duration, Instant};

/// Nothing that a test waits for takes longer on a machine that works at all.
const LIMIT: Duration = Duration::from_secs(120);

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not hold within two minutes; the message has `what`.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "not reached: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}
