//! The digests of the blocks of a disk, made by several threads and handed out in order.
//!
//! Threads take blocks in order and hash them at the same time; what they make is put together in order. The
//! window between the first block that is missing and the last one taken bounds what waits in memory. Called
//! by [`crate::DiskHash`] and [`crate::BlockDigests`].

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use blockmirror_block::cancel::{self, CancelSource};
use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::{BlockDevice, ByteRange, Error, ErrorKind, Visit, zero};

use crate::HashOptions;
use crate::walk::{BLOCK, Run, Walk, blocks_of};

/// The digest of a block: BLAKE3 of its bytes, or 32 bytes of zero if all of them are.
pub type BlockDigest = [u8; 32];
/// What stands for a block of zeros.
pub const ZERO_DIGEST: BlockDigest = [0; 32];
/// For each thread, what may be ready before a block that is missing.
const AHEAD: usize = 4;
/// More threads than any machine gains from.
const MOST_THREADS: usize = 64;
/// How often `progress` is called.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);

/// The digest of a block that holds `bytes`.
pub fn block_digest(bytes: &[u8]) -> BlockDigest {
    if zero::is_zero(bytes) { ZERO_DIGEST } else { *blake3::hash(bytes).as_bytes() }
}

/// What takes the digests, in order, all of them once.
pub(crate) trait Sink: Send {
    /// `count` blocks of zeros follow.
    fn zeros(&mut self, count: u64);

    /// One block follows.
    fn block(&mut self, digest: BlockDigest);
}

/// Hashes all blocks of `device` into `sink`, but for those whose digest is `known` by the number of the
/// block. `progress` gets the bytes that are done, some times a second on the caller's thread and at the end,
/// and says whether to go on; `None` if it stopped.
pub(crate) fn hash_blocks<S: Sink>(
    device: &dyn BlockDevice,
    options: &HashOptions,
    known: &(dyn Fn(u64) -> Option<BlockDigest> + Sync),
    sink: S,
    progress: &mut dyn FnMut(u64) -> Visit,
) -> Result<Option<S>, Error> {
    let blocks = usize::try_from(blocks_of(device.len())).unwrap_or(usize::MAX);
    let threads = options.threads.get().min(MOST_THREADS).min(blocks.max(1));
    let shared = Shared {
        device,
        known,
        window: AHEAD * threads,
        calls: CancelSource::new(),
        position: Mutex::new(Position { walk: Walk::new(device), taken: 0 }),
        state: Mutex::new(State { ready: BTreeMap::new(), joined: 0, sink, working: 0, end: None }),
        room: Condvar::new(),
        over: Condvar::new(),
    };
    thread::scope(|scope| {
        let _stop = StopOnPanic(&shared);
        for _ in 0..threads {
            shared.state.lock().working += 1;
            let name = "hash".to_owned();
            if let Err(error) = thread::Builder::new().name(name).spawn_scoped(scope, || shared.work()) {
                let mut state = shared.state.lock();
                state.working -= 1;
                // Those that there are do the work.
                if state.working == 0 && state.joined == 0 {
                    shared.stop(&mut state, End::Failed(Error::io("start a thread", error)));
                }
                break;
            }
        }
        shared.wait(progress);
    });
    let state = shared.state.into_inner();
    match state.end {
        Some(End::Failed(error)) => Err(error),
        Some(End::Stopped) => Ok(None),
        None if progress(device.len()).is_break() => Ok(None),
        None => Ok(Some(state.sink)),
    }
}

/// What became of some blocks in a row.
#[derive(Debug)]
enum Digests {
    /// So many blocks of zeros.
    Zero(u64),
    /// One block.
    Block(BlockDigest),
}

/// Why the work ended before the last block.
#[derive(Debug)]
enum End {
    Stopped,
    Failed(Error),
}

/// *Guards*: which block is next. *Order*: before the state. Extents are asked for under it.
struct Position<'a> {
    walk: Walk<'a>,
    /// Blocks that were given out.
    taken: u64,
}

/// *Guards*: the sink, and why it ends. *Not under it*: calls of the device.
struct State<S> {
    /// What has been hashed after blocks that have not, by the number of the first block.
    ready: BTreeMap<u64, Digests>,
    /// Blocks that the sink has.
    joined: u64,
    sink: S,
    working: usize,
    end: Option<End>,
}

struct Shared<'a, S> {
    device: &'a dyn BlockDevice,
    known: &'a (dyn Fn(u64) -> Option<BlockDigest> + Sync),
    /// How many blocks and runs of zeros may be ready before a block that is missing.
    window: usize,
    /// The calls of all threads.
    calls: CancelSource,
    position: Mutex<Position<'a>>,
    state: Mutex<State<S>>,
    /// `joined` has grown, or the work has ended.
    room: Condvar,
    /// A thread has ended.
    over: Condvar,
}

impl<S: Sink> Shared<'_, S> {
    /// Waits for the threads, on the caller's, which `progress` may stop, and who cancels the caller.
    fn wait(&self, progress: &mut dyn FnMut(u64) -> Visit) {
        let mut state = self.state.lock();
        while state.working > 0 {
            state = self.over.wait_timeout(state, PROGRESS_INTERVAL).0;
            let done = (state.joined * BLOCK).min(self.device.len());
            drop(state);
            let go_on = progress(done);
            state = self.state.lock();
            if go_on.is_break() {
                self.stop(&mut state, End::Stopped);
            } else if cancel::is_cancelled() {
                self.stop(&mut state, End::Failed(Error::new(ErrorKind::Cancelled, "hash")));
            }
        }
    }

    fn work(&self) {
        let _working = Working(self);
        let _calls = self.calls.enter();
        let mut buffer = Vec::new();
        while let Some((number, range)) = self.take() {
            let digest = match (self.known)(number) {
                Some(digest) => Ok(digest),
                None => self.digest(range, &mut buffer),
            };
            let mut state = self.state.lock();
            match digest {
                Ok(digest) => self.join(&mut state, number, Digests::Block(digest)),
                Err(error) => self.stop(&mut state, End::Failed(error)),
            }
        }
    }

    /// Takes the next block that is to be read, and its number. Waits while too much is ahead of the block
    /// that is missing.
    fn take(&self) -> Option<(u64, ByteRange)> {
        let mut position = self.position.lock();
        loop {
            let mut state = self.state.lock();
            while state.end.is_none() && state.ready.len() >= self.window {
                state = self.room.wait(state);
            }
            if state.end.is_some() {
                return None;
            }
            drop(state);
            let number = position.taken;
            match position.walk.next() {
                Ok(None) => return None,
                Ok(Some(Run::Block(range))) => {
                    position.taken += 1;
                    return Some((number, range));
                }
                Ok(Some(Run::Zero(range))) => {
                    let count = blocks_of(range.len());
                    position.taken += count;
                    self.join(&mut self.state.lock(), number, Digests::Zero(count));
                }
                Err(error) => self.stop(&mut self.state.lock(), End::Failed(error)),
            }
        }
    }

    fn digest(&self, range: ByteRange, buffer: &mut Vec<u8>) -> Result<BlockDigest, Error> {
        // At most BLOCK bytes.
        buffer.resize(range.len() as usize, 0);
        self.device.read_at(buffer, range.start())?;
        Ok(block_digest(buffer))
    }

    /// Gives what has been hashed from block `number` on to the sink, as soon as all before it is there.
    fn join(&self, state: &mut State<S>, number: u64, digests: Digests) {
        state.ready.insert(number, digests);
        while let Some(digests) = state.ready.remove(&state.joined) {
            match digests {
                Digests::Zero(count) => {
                    state.sink.zeros(count);
                    state.joined += count;
                }
                Digests::Block(digest) => {
                    state.sink.block(digest);
                    state.joined += 1;
                }
            }
        }
        self.room.notify_all();
    }

    /// Ends the work, and the calls of the device; the first reason counts.
    fn stop(&self, state: &mut State<S>, end: End) {
        state.end.get_or_insert(end);
        self.calls.cancel();
        self.room.notify_all();
    }
}

/// Ends the work if the caller's thread panics, in `progress` for example.
struct StopOnPanic<'a, 'b, S: Sink>(&'b Shared<'a, S>);

impl<S: Sink> Drop for StopOnPanic<'_, '_, S> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop(&mut self.0.state.lock(), End::Stopped);
        }
    }
}

/// A thread that works. When it ends, by a panic of the device too, nothing waits for it.
struct Working<'a, 'b, S: Sink>(&'b Shared<'a, S>);

impl<S: Sink> Drop for Working<'_, '_, S> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.working -= 1;
        if thread::panicking() {
            self.0.stop(&mut state, End::Stopped);
        }
        self.0.over.notify_all();
    }
}
