//! The hash of a disk by its blocks, on several threads.
//!
//! Threads take blocks in order and hash them at the same time; what they make is put together in order. The
//! window between the first block that is missing and the last one taken bounds what waits in memory.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use blake3::Hasher;
use blockmirror_block::cancel::{self, CancelSource};
use blockmirror_block::sync::{Condvar, Mutex};
use blockmirror_block::{BlockDevice, ByteRange, Error, ErrorKind, Visit, zero};

use crate::HashOptions;
use crate::text::{ParseHashError, read_hex, write_hex};
use crate::walk::{BLOCK, Run, Walk};

/// What [`DiskHash`] derives its key from.
pub const CONTEXT: &str = "blockmirror bm1 2026: length and digests of the 1 MiB blocks of a disk";
/// What a disk hash begins with as text.
const PREFIX: &str = "bm1:";
/// What stands for a block of zeros.
const ZERO_DIGEST: [u8; 32] = [0; 32];
/// For each thread, what may be ready before a block that is missing.
const AHEAD: usize = 4;
/// More threads than any machine gains from.
const MOST_THREADS: usize = 64;
/// How often `progress` is called.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);

/// A hash over the length of a disk and the digests of its blocks; see [the crate](crate).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DiskHash([u8; 32]);

impl DiskHash {
    /// Hashes what `device` holds. `progress` gets the bytes that are done, some times a second on the
    /// caller's thread and at the end, and says whether to go on; `None` if it stopped.
    ///
    /// # Errors
    /// What the device reports.
    pub fn of(
        device: &dyn BlockDevice,
        options: &HashOptions,
        progress: &mut dyn FnMut(u64) -> Visit,
    ) -> Result<Option<Self>, Error> {
        let blocks = usize::try_from(blocks_of(device.len())).unwrap_or(usize::MAX);
        let threads = options.threads.get().min(MOST_THREADS).min(blocks.max(1));
        let shared = Shared {
            device,
            window: AHEAD * threads,
            calls: CancelSource::new(),
            position: Mutex::new(Position { walk: Walk::new(device), taken: 0 }),
            state: Mutex::new(State {
                ready: BTreeMap::new(),
                joined: 0,
                hasher: length_hasher(device.len()),
                working: 0,
                end: None,
            }),
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
            None => Ok(Some(Self(*state.hasher.finalize().as_bytes()))),
        }
    }

    /// The hash of a disk of `len` bytes, all of them zero. Hashes 32 bytes for each MiB of it.
    pub fn of_zeros(len: u64) -> Self {
        let mut hasher = length_hasher(len);
        add_zero_blocks(&mut hasher, blocks_of(len));
        Self(*hasher.finalize().as_bytes())
    }
}

#[expect(clippy::little_endian_bytes, reason = "the hash begins with the length in this order")]
fn length_hasher(len: u64) -> Hasher {
    let mut hasher = Hasher::new_derive_key(CONTEXT);
    hasher.update(&len.to_le_bytes());
    hasher
}

fn blocks_of(len: u64) -> u64 {
    len.div_ceil(BLOCK)
}

fn add_zero_blocks(hasher: &mut Hasher, count: u64) {
    static MANY: [u8; 32 << 11] = [0; 32 << 11];
    let mut left = count;
    while left > 0 {
        let some = left.min(MANY.len() as u64 / 32);
        hasher.update(&MANY[..32 * some as usize]);
        left -= some;
    }
}

/// What became of some blocks in a row.
#[derive(Debug)]
enum Digests {
    /// So many blocks of zeros.
    Zero(u64),
    /// One block.
    Block([u8; 32]),
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

/// *Guards*: the hash, and why it ends. *Not under it*: calls of the device.
struct State {
    /// What has been hashed after blocks that have not, by the number of the first block.
    ready: BTreeMap<u64, Digests>,
    /// Blocks that are in the hash.
    joined: u64,
    hasher: Hasher,
    working: usize,
    end: Option<End>,
}

struct Shared<'a> {
    device: &'a dyn BlockDevice,
    /// How many blocks and runs of zeros may be ready before a block that is missing.
    window: usize,
    /// The calls of all threads.
    calls: CancelSource,
    position: Mutex<Position<'a>>,
    state: Mutex<State>,
    /// `joined` has grown, or the work has ended.
    room: Condvar,
    /// A thread has ended.
    over: Condvar,
}

impl Shared<'_> {
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
            let digest = self.digest(range, &mut buffer);
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

    fn digest(&self, range: ByteRange, buffer: &mut Vec<u8>) -> Result<[u8; 32], Error> {
        // At most BLOCK bytes.
        buffer.resize(range.len() as usize, 0);
        self.device.read_at(buffer, range.start())?;
        Ok(if zero::is_zero(buffer) { ZERO_DIGEST } else { *blake3::hash(buffer).as_bytes() })
    }

    /// Puts what has been hashed from block `number` on into the hash, as soon as all before it is there.
    fn join(&self, state: &mut State, number: u64, digests: Digests) {
        state.ready.insert(number, digests);
        while let Some(digests) = state.ready.remove(&state.joined) {
            match digests {
                Digests::Zero(count) => {
                    add_zero_blocks(&mut state.hasher, count);
                    state.joined += count;
                }
                Digests::Block(digest) => {
                    state.hasher.update(&digest);
                    state.joined += 1;
                }
            }
        }
        self.room.notify_all();
    }

    /// Ends the work, and the calls of the device; the first reason counts.
    fn stop(&self, state: &mut State, end: End) {
        state.end.get_or_insert(end);
        self.calls.cancel();
        self.room.notify_all();
    }
}

/// Ends the work if the caller's thread panics, in `progress` for example.
struct StopOnPanic<'a, 'b>(&'b Shared<'a>);

impl Drop for StopOnPanic<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop(&mut self.0.state.lock(), End::Stopped);
        }
    }
}

/// A thread that works. When it ends, by a panic of the device too, nothing waits for it.
struct Working<'a, 'b>(&'b Shared<'a>);

impl Drop for Working<'_, '_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.working -= 1;
        if thread::panicking() {
            self.0.stop(&mut state, End::Stopped);
        }
        self.0.over.notify_all();
    }
}

impl fmt::Display for DiskHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        write_hex(&self.0, f)
    }
}

impl fmt::Debug for DiskHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DiskHash {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, ParseHashError> {
        let bytes = text.strip_prefix(PREFIX).and_then(read_hex);
        bytes.map(Self).ok_or_else(|| ParseHashError {
            text: text.to_owned(),
            expected: "`bm1:` and 64 hexadecimal digits",
        })
    }
}
