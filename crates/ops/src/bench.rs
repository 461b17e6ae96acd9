//! A simple benchmark of a disk: a number of requests of one kind, so many at a time. It is what
//! `blockmirror bench` measures.
//!
//! Each request in flight has a thread, which takes the next offset from a counter under a short mutex. A
//! flush that drains is a barrier: no request begins while it waits for those in flight, or runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::{self as block, AlignedBuf, BlockDevice, WriteFlags};

/// The most requests in flight, each with a thread of its own.
pub const MAX_BENCH_DEPTH: u32 = 1024;

/// The most bytes of all requests in flight together, 1 GiB.
pub const MAX_BENCH_BYTES: u64 = 1 << 30;

/// A benchmark. The default reads 75,000 times 4 KiB one after the other, 64 requests at a time.
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::AtomicBool;
/// use blockmirror_block::{BlockDevice, testing::MemoryDisk};
/// use blockmirror_ops::Bench;
///
/// let disk: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::new(1 << 20));
/// let outcome = Bench::new().count(100).depth(4).run(&disk, &AtomicBool::new(false))?;
/// assert_eq!(outcome.requests, 100);
/// # Ok::<(), blockmirror_ops::BenchError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bench {
    count: u32,
    depth: u32,
    bytes: u32,
    offset: u64,
    step: Option<u64>,
    pattern: Option<u8>,
    flush_interval: u32,
    drain: bool,
}

/// Why a [`Bench`] did not start, or did not end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// An option has a value that it cannot have, or that does not fit another.
    #[error("{0}")]
    Option(String),
    /// A request failed.
    #[error(transparent)]
    Request(#[from] block::Error),
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The operating system gave not a single thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// What a [`Bench`] has measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BenchOutcome {
    /// Requests, without flushes.
    pub requests: u32,
    /// From the first to the last, with flushes.
    pub elapsed: Duration,
}

impl Default for Bench {
    fn default() -> Self {
        Self {
            count: 75_000,
            depth: 64,
            bytes: 4096,
            offset: 0,
            step: None,
            pattern: None,
            flush_interval: 0,
            drain: true,
        }
    }
}

impl Bench {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many requests. Default: 75,000.
    #[must_use]
    pub fn count(mut self, requests: u32) -> Self {
        self.count = requests;
        self
    }

    /// How many at a time. Default: 64.
    #[must_use]
    pub fn depth(mut self, requests: u32) -> Self {
        self.depth = requests;
        self
    }

    /// Bytes of a request. Default: 4096.
    #[must_use]
    pub fn request_bytes(mut self, bytes: u32) -> Self {
        self.bytes = bytes;
        self
    }

    /// Where the first one begins. Default: 0.
    #[must_use]
    pub fn offset(mut self, offset: u64) -> Self {
        self.offset = offset;
        self
    }

    /// From one request's start to the next's, modulo the disk's length. 0 and `None`, the default, are the
    /// bytes of a request.
    #[must_use]
    pub fn step(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.step = bytes.into().filter(|bytes| *bytes > 0);
        self
    }

    /// Writes this byte instead of reading; `None`, the default, reads. What the disk held is lost.
    #[must_use]
    pub fn write(mut self, pattern: impl Into<Option<u8>>) -> Self {
        self.pattern = pattern.into();
        self
    }

    /// Flushes after so many writes; 0, the default, never. With `drain` no write begins until those before
    /// the flush, and the flush, have ended.
    #[must_use]
    pub fn flush_interval(mut self, requests: u32, drain: bool) -> Self {
        (self.flush_interval, self.drain) = (requests, drain);
        self
    }

    /// From one request's start to the next's.
    pub fn step_bytes(&self) -> u64 {
        self.step.unwrap_or(self.bytes.into())
    }

    /// Whether the options have possible values and fit together.
    ///
    /// # Errors
    /// [`BenchError::Option`].
    pub fn check(&self) -> Result<(), BenchError> {
        let wrong = |text: String| Err(BenchError::Option(text));
        match self {
            Self { count: 0, .. } => wrong("the number of requests cannot be 0".into()),
            Self { bytes: 0, .. } => wrong("a request cannot have 0 bytes".into()),
            Self { depth, .. } if !(1..=MAX_BENCH_DEPTH).contains(depth) => {
                wrong(format!("{depth} requests at a time: it can be 1 to {MAX_BENCH_DEPTH}"))
            }
            Self { flush_interval: 1.., pattern: None, .. } => wrong("only writes are flushed".into()),
            Self { flush_interval: interval @ 1.., depth, .. } if interval < depth => {
                wrong(format!("a flush every {interval} requests, with {depth} of them at a time"))
            }
            Self { depth, bytes, .. } if u64::from(*depth) * u64::from(*bytes) > MAX_BENCH_BYTES => wrong(
                format!("{depth} requests of {bytes} bytes are more than {MAX_BENCH_BYTES} bytes at a time"),
            ),
            _ => Ok(()),
        }
    }

    /// Runs it on `device`. What was written is flushed at the end, which is not measured. Once `cancel` is
    /// true it ends with an error.
    ///
    /// # Errors
    /// [`BenchError`]; the first request that failed.
    pub fn run(
        &self,
        device: &Arc<dyn BlockDevice>,
        cancel: &AtomicBool,
    ) -> Result<BenchOutcome, BenchError> {
        self.check()?;
        let run = Run {
            bench: self,
            device: &**device,
            cancel,
            state: Mutex::new(State { offset: self.offset, ..State::default() }),
            changed: Condvar::new(),
        };
        let began = Instant::now();
        thread::scope(|scope| {
            for index in 0..self.depth.min(self.count) {
                let thread = thread::Builder::new().name("bench".into()).spawn_scoped(scope, || run.work());
                match thread {
                    Ok(_) => {}
                    // Fewer threads than asked for do the same requests.
                    Err(_) if index > 0 => break,
                    Err(error) => return Err(BenchError::Thread(error)),
                }
            }
            Ok(())
        })?;
        let elapsed = began.elapsed();
        if let Some(error) = run.state.into_inner().failed {
            return Err(error);
        }
        if self.pattern.is_some() {
            device.flush()?;
        }
        Ok(BenchOutcome { requests: self.count, elapsed })
    }
}

/// What the threads share.
struct Run<'a> {
    bench: &'a Bench,
    device: &'a dyn BlockDevice,
    cancel: &'a AtomicBool,
    /// *Guards* what comes next and what is in flight. *Order*: leaf. *Not under it*: requests.
    state: Mutex<State>,
    /// A barrier was lifted, or a request failed.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    begun: u32,
    /// Of the next request.
    offset: u64,
    in_flight: u32,
    /// A flush is due once nothing is in flight; nothing begins before.
    barrier: bool,
    failed: Option<BenchError>,
}

/// A request to be made.
struct Request {
    offset: u64,
    /// A flush that drains nothing follows it.
    then_flush: bool,
}

impl Run<'_> {
    fn work(&self) {
        // At most MAX_BENCH_BYTES for all threads.
        let mut buffer = AlignedBuf::default();
        while let Some(request) = self.next() {
            let mut done = self.request(&request, &mut buffer);
            if done.is_ok() && request.then_flush {
                done = self.device.flush();
            }
            if self.ended(done) {
                let flushed = self.device.flush();
                self.lift(flushed);
            }
        }
    }

    /// The next request, once it may begin; `None` if there is none.
    fn next(&self) -> Option<Request> {
        let bench = self.bench;
        let mut state = self.state.lock();
        while state.barrier && state.failed.is_none() {
            state = self.changed.wait(state);
        }
        if self.cancel.load(Ordering::Relaxed) {
            state.failed.get_or_insert(BenchError::Cancelled);
        }
        if state.failed.is_some() || state.begun == bench.count {
            return None;
        }
        let offset = state.offset;
        // Longer than any disk can be: such a request fails.
        state.offset = offset.saturating_add(bench.step_bytes()) % self.device.len().max(1);
        state.begun += 1;
        state.in_flight += 1;
        let flush = bench.flush_interval > 0 && state.begun.is_multiple_of(bench.flush_interval);
        state.barrier = flush && bench.drain;
        Some(Request { offset, then_flush: flush && !bench.drain })
    }

    fn request(&self, request: &Request, buffer: &mut AlignedBuf) -> block::Result<()> {
        let (offset, len) = (request.offset, u64::from(self.bench.bytes));
        if offset.checked_add(len).is_none_or(|end| end > self.device.len()) {
            let operation = if self.bench.pattern.is_some() { "write" } else { "read" };
            let error = block::Error::out_of_bounds(operation, offset, len, self.device.len());
            return Err(error.in_file(self.device.name()));
        }
        let is_new = buffer.is_empty();
        let bytes = buffer.at_least(self.bench.bytes as usize);
        match self.bench.pattern {
            None => self.device.read_at(bytes, offset),
            Some(pattern) => {
                if is_new {
                    bytes.fill(pattern);
                }
                self.device.write_at(bytes, offset, WriteFlags::NONE)
            }
        }
    }

    /// Counts a request that has ended; whether the caller is to flush, as the last one before a barrier.
    fn ended(&self, done: block::Result<()>) -> bool {
        let mut state = self.state.lock();
        state.in_flight -= 1;
        if let Err(error) = done {
            state.failed.get_or_insert(error.into());
            self.changed.notify_all();
        }
        state.barrier && state.in_flight == 0 && state.failed.is_none()
    }

    /// The flush at a barrier has ended.
    fn lift(&self, flushed: block::Result<()>) {
        let mut state = self.state.lock();
        if let Err(error) = flushed {
            state.failed.get_or_insert(error.into());
        }
        state.barrier = false;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use blockmirror_block::ErrorKind;
    use blockmirror_block::testing::{Fault, FaultDisk, Faults, MemoryDisk, OpKind};

    use super::*;

    fn run(bench: Bench, disk: &Arc<dyn BlockDevice>) -> Result<BenchOutcome, BenchError> {
        bench.run(disk, &AtomicBool::new(false))
    }

    #[test]
    fn writes_cover_the_disk_and_begin_again() {
        for (interval, drain) in [(0, true), (8, true), (8, false)] {
            let disk: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::new(1 << 20));
            let bench = Bench::new().count(300).depth(8).write(7).flush_interval(interval, drain);
            assert_eq!(run(bench, &disk).unwrap().requests, 300);
            let mut all = vec![0; 1 << 20];
            disk.read_at(&mut all, 0).unwrap();
            assert!(all.iter().all(|byte| *byte == 7));
        }
    }

    #[test]
    fn offset_and_step_say_where() {
        let disk: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::new(1 << 20));
        let bench = Bench::new().count(3).depth(2).request_bytes(512).offset(1024).step(300 << 10).write(1);
        run(bench, &disk).unwrap();
        let mut all = vec![0; 1 << 20];
        disk.read_at(&mut all, 0).unwrap();
        let written: Vec<_> = (0..all.len()).filter(|at| all[*at] == 1).collect();
        let want: Vec<_> = (0..3).flat_map(|n| (0..512).map(move |at| 1024 + n * (300 << 10) + at)).collect();
        assert_eq!(written, want);
    }

    #[test]
    fn a_request_past_the_end_fails_and_so_does_a_flush() {
        let memory = Arc::new(MemoryDisk::new(1 << 20));
        let disk = Arc::clone(&memory) as Arc<dyn BlockDevice>;
        for bench in [
            Bench::new().request_bytes(2 << 20).depth(2),
            Bench::new().offset(u64::MAX),
            Bench::new().request_bytes(3000).count(1000),
        ] {
            let error = run(bench, &disk).unwrap_err();
            assert!(
                matches!(&error, BenchError::Request(e) if e.kind() == ErrorKind::OutOfBounds),
                "{error}"
            );
        }
        let faults = Faults::new();
        let disk: Arc<dyn BlockDevice> = Arc::new(FaultDisk::new(memory as _, faults.clone()));
        for drain in [true, false] {
            faults.inject(Fault::on(OpKind::Flush).after(1));
            let bench = Bench::new().count(1000).depth(4).write(1).flush_interval(4, drain);
            assert!(matches!(run(bench, &disk), Err(BenchError::Request(_))), "{drain}");
        }
    }

    #[test]
    fn options_that_do_not_fit_are_refused_and_a_cancelled_one_ends() {
        for bench in [
            Bench::new().count(0),
            Bench::new().depth(0),
            Bench::new().depth(MAX_BENCH_DEPTH + 1),
            Bench::new().request_bytes(0),
            Bench::new().request_bytes(1 << 30),
            Bench::new().flush_interval(100, true),
            Bench::new().write(1).flush_interval(63, false),
        ] {
            assert!(matches!(bench.check(), Err(BenchError::Option(_))), "{bench:?}");
        }
        let disk: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::new(1 << 20));
        let ended = Bench::new().run(&disk, &AtomicBool::new(true));
        assert!(matches!(ended, Err(BenchError::Cancelled)));
    }

    #[test]
    fn an_empty_disk_has_no_room_for_a_request() {
        let disk: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::new(0));
        assert!(matches!(run(Bench::new(), &disk), Err(BenchError::Request(_))));
    }
}
