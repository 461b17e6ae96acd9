//! How much memory a function takes at most, counted by the allocator of this program.
//!
//! Counts belong to a thread: what is measured starts no other, and frees what it allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes that this thread has allocated and not freed, and the most there were.
    static NOW: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

/// The system's allocator, counting.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `run` returns, and the bytes that it had allocated at once, at most.
pub(crate) fn peak_of<T>(run: impl FnOnce() -> T) -> (T, u64) {
    let before = NOW.get();
    PEAK.set(before);
    let result = run();
    // Never below `before`.
    (result, PEAK.get().abs_diff(before))
}

fn count(bytes: usize, freed: usize) {
    // A layout has at most `isize::MAX` bytes.
    let now = NOW.get() + bytes as i64 - freed as i64;
    NOW.set(now);
    PEAK.set(PEAK.get().max(now));
}

// SAFETY: each call is passed to the system's allocator as it is; counting allocates nothing, since the
// counters are initialised by constants and have no destructor.
#[expect(unsafe_code, reason = "an allocator is an unsafe trait")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: the caller's promise is the same.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(at, layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_what_there_was_at_once() {
        let (len, peak) = peak_of(|| {
            drop(std::hint::black_box(vec![0_u8; 3 << 20]));
            std::hint::black_box(vec![1_u8; 2 << 20]).len()
        });
        assert_eq!((len, peak >> 20), (2 << 20, 3));
    }
}
