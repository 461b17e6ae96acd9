//! Which edges of the format's code ran on this thread, and how often.
//!
//! `cargo xtask fuzz` builds the crate `blockmirror-qcow2`, and no other, with the compiler's pass
//! `sancov-module`: each edge of its control flow has a guard, a number, and calls
//! [`__sanitizer_cov_trace_pc_guard`] with it. Without that pass nothing is counted, and [`count`] is 0.
//!
//! The only `unsafe` here is what those calls are: functions that the compiler knows by name. Counters belong
//! to a thread, so that what one thread finds does not depend on others.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};

/// Edges that have a counter of their own; what lies beyond is not counted.
pub(crate) const MOST: usize = 1 << 16;

/// Guards that have a number. The first has 1, so that 0 is a guard without one.
static GUARDS: AtomicU32 = AtomicU32::new(0);

/// Counters of edges, and the edges whose counter is not zero.
struct Hits {
    times: [Cell<u8>; MOST],
    ran: [Cell<u16>; MOST],
    len: Cell<usize>,
}

thread_local! {
    static HITS: Hits = const {
        Hits {
            times: [const { Cell::new(0) }; MOST],
            ran: [const { Cell::new(0) }; MOST],
            len: Cell::new(0),
        }
    };
}

impl Hits {
    fn hit(&self, edge: u16) {
        let times = &self.times[usize::from(edge)];
        // Each edge is listed once, so there is room.
        if times.get() == 0 {
            self.ran[self.len.get()].set(edge);
            self.len.set(self.len.get() + 1);
        }
        times.set(times.get().saturating_add(1));
    }

    fn ran(&self) -> impl Iterator<Item = usize> {
        self.ran[..self.len.get()].iter().map(|edge| usize::from(edge.get()))
    }
}

/// Edges of the code that was built with counters.
pub(crate) fn count() -> usize {
    (GUARDS.load(Ordering::Relaxed) as usize).min(MOST - 1)
}

/// Forgets what ran on this thread.
pub(crate) fn clear() {
    HITS.with(|hits| {
        hits.ran().for_each(|edge| hits.times[edge].set(0));
        hits.len.set(0);
    });
}

/// Calls `visit` with each edge that ran on this thread, and how often, at most 255 times.
pub(crate) fn visit(mut visit: impl FnMut(usize, u8)) {
    HITS.with(|hits| hits.ran().for_each(|edge| visit(edge, hits.times[edge].get())));
}

/// The edge of `guard` runs.
#[expect(unsafe_code, reason = "the compiler calls it by this name")]
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_pc_guard(guard: &u32) {
    // The compiler passes the address of a guard, a static of four bytes that changes only below.
    if let Ok(edge) = u16::try_from(*guard) {
        HITS.with(|hits| hits.hit(edge));
    }
}

/// Before `main`, once or more for the same guards: numbers those from `start` to `stop`.
#[expect(unsafe_code, reason = "the compiler calls it by this name, with the ends of a static array")]
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_pc_guard_init(start: *mut u32, stop: *mut u32) {
    let mut guard = start;
    while guard < stop {
        // SAFETY: the compiler passes the start and the end of the array of all guards, which is a static, so
        // each place between them is a `u32` that can be written; constructors run before there are threads.
        unsafe {
            if *guard == 0 {
                *guard = GUARDS.fetch_add(1, Ordering::Relaxed) + 1;
            }
            guard = guard.add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_counted_until_they_are_cleared() {
        let seen = || {
            let mut all = Vec::new();
            visit(|edge, times| all.push((edge, times)));
            all
        };
        clear();
        [7, 9, 7].iter().for_each(|guard| __sanitizer_cov_trace_pc_guard(guard));
        (0..300).for_each(|_| __sanitizer_cov_trace_pc_guard(&u32::from(u16::MAX)));
        __sanitizer_cov_trace_pc_guard(&(1 << 16));
        assert_eq!(seen(), [(7, 2), (9, 1), (MOST - 1, 255)]);
        clear();
        assert_eq!(seen(), []);
    }

    #[test]
    fn guards_are_numbered_once() {
        let mut guards = [0_u32; 3];
        let range = guards.as_mut_ptr_range();
        __sanitizer_cov_trace_pc_guard_init(range.start, range.end);
        let first = guards;
        assert!(first[0] > 0 && first[1] == first[0] + 1 && first[2] == first[1] + 1);
        let range = guards.as_mut_ptr_range();
        __sanitizer_cov_trace_pc_guard_init(range.start, range.end);
        assert_eq!(guards, first);
    }
}
