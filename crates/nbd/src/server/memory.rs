//! The buffer pool of a server: buffers of requests and replies, under one limit that is shared fairly.
//!
//! The reader of a connection allocates here before it receives a payload or has one read from a device. A
//! connection that finds no room is backpressured: its socket is not read.
//!
//! What must hold, whatever other clients do:
//! - A client that holds nothing gets a buffer of up to [`RESERVE`] at once. The room for that is kept free
//!   of longer buffers.
//! - One that holds something already may hold up to a quarter of what is still free (the "dynamic threshold"
//!   of shared switch buffers): the fuller it is, the less has one client of it.
//! - A client that holds nothing and asks for more than is free is *starved*. What the longest starved one
//!   asks for is given to no other meanwhile, and the acceptor aborts clients that are too slow then.
//!
//! Buffers are mappings of their own: freed ones go back to the system, which the allocator's arenas, one per
//! thread, do not do. Some are kept for the next request, because fresh memory costs a page fault every 4
//! KiB.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use blockmirror_block::sync::Mutex;
use memmap2::MmapMut;

/// Bytes of free buffers that stay mapped for the next request.
const KEPT: u64 = 64 << 20;
/// Smallest buffer.
const SMALLEST: usize = 4096;
/// What a client that holds nothing can always have, in one buffer.
pub(crate) const RESERVE: u64 = 2 << 20;
/// The part of what is free that a client may hold which holds something already.
const PART: u64 = 4;
/// One list per power of two from [`SMALLEST`] to 32 MiB.
const CLASSES: usize = 14;

/// What waits for room, and is resumed when there may be some.
pub(crate) trait Waiter: Send + Sync + 'static {
    /// There may be room. Called without a lock of this module.
    fn resume(self: Arc<Self>);
}

/// The buffers of one server.
pub(crate) struct Memory {
    /// Bytes of the limit that are no client's reserve.
    shared: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: u64,
    kept: u64,
    free: [Vec<MmapMut>; CLASSES],
    waiting: Vec<Weak<dyn Waiter>>,
    /// Clients that hold nothing and wait, the longest first.
    starved: Vec<Starved>,
}

struct Starved {
    account: Weak<Account>,
    size: u64,
    since: Instant,
}

impl Starved {
    fn is(&self, account: &Account) -> bool {
        std::ptr::eq(self.account.as_ptr(), account)
    }
}

impl Memory {
    /// Buffers of `limit` bytes in all, of which each of `clients` has its reserve. If the reserves are more
    /// than half of the limit, they come on top of that half.
    pub(crate) fn new(limit: u64, clients: usize) -> Arc<Self> {
        let reserves = (clients as u64).saturating_mul(RESERVE);
        let shared = limit.saturating_sub(reserves).max(limit / 2);
        Arc::new(Self { shared, state: Mutex::default() })
    }

    /// Bytes in use at present.
    pub(crate) fn used(&self) -> u64 {
        self.state.lock().used
    }

    /// How many bytes the longest starved client lacks, if it has been starved since `before` or longer.
    pub(crate) fn lacking(&self, before: Instant) -> Option<u64> {
        let state = self.state.lock();
        let free = self.shared.saturating_sub(state.used);
        let (first, since) = state.starved.first().map(|starved| (starved.size, starved.since))?;
        (since <= before && first > free).then(|| first - free)
    }

    /// Unmaps the free buffers if none is in use, and resumes the waiters: the system may have memory again.
    /// Called periodically, and when the last client has gone.
    pub(crate) fn trim(&self) {
        let (kept, waiting) = {
            let mut state = self.state.lock();
            let kept = (state.used == 0).then(|| {
                state.kept = 0;
                std::mem::take(&mut state.free)
            });
            (kept, std::mem::take(&mut state.waiting))
        };
        drop(kept);
        resume(&waiting);
    }

    fn release(&self, buf: MmapMut, account: &Account) {
        let size = buf.len() as u64;
        let mut state = self.state.lock();
        state.used -= size;
        account.held.fetch_sub(size, Ordering::Relaxed);
        let mut unmapped = Some(buf);
        if state.kept + size <= KEPT
            && let Some(list) = state.free.get_mut(class_of(size))
        {
            list.extend(unmapped.take());
            state.kept += size;
        }
        // All of them: a waiter that has gone meanwhile must not use the wake-up up.
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        drop(unmapped);
        resume(&waiting);
    }
}

impl State {
    /// Removes free buffers until `size` more bytes may be used without mapping more than `most` in all.
    fn release_kept(&mut self, size: u64, most: u64) -> Vec<MmapMut> {
        let mut released = Vec::new();
        for class in (0..CLASSES).rev() {
            while self.kept > 0 && self.used + self.kept + size > most {
                let Some(buf) = self.free.get_mut(class).and_then(Vec::pop) else { break };
                self.kept -= buf.len() as u64;
                released.push(buf);
            }
        }
        released
    }
}

/// Resumes `waiting`, without a lock of this module.
fn resume(waiting: &[Weak<dyn Waiter>]) {
    waiting.iter().filter_map(Weak::upgrade).for_each(Waiter::resume);
}

fn class_of(size: u64) -> usize {
    (size.trailing_zeros() - SMALLEST.trailing_zeros()) as usize
}

/// What one client holds.
pub(crate) struct Account {
    memory: Arc<Memory>,
    /// Changes under the lock of the memory's state.
    held: AtomicU64,
}

impl Account {
    pub(crate) fn new(memory: &Arc<Memory>) -> Arc<Self> {
        Arc::new(Self { memory: Arc::clone(memory), held: AtomicU64::new(0) })
    }

    /// Bytes that the client holds.
    pub(crate) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// The client asks for nothing any more: what is reserved for it is free for others.
    pub(crate) fn withdraw(&self) {
        let waiting = {
            let mut state = self.memory.state.lock();
            let before = state.starved.len();
            state.starved.retain(|starved| !starved.is(self));
            if state.starved.len() == before {
                return;
            }
            std::mem::take(&mut state.waiting)
        };
        resume(&waiting);
    }

    /// A buffer of `len` bytes with unspecified contents, or `None` if there is no room: then `asked_by` is
    /// resumed when there may be.
    pub(crate) fn alloc(self: &Arc<Self>, len: usize, asked_by: &Arc<impl Waiter>) -> Option<PooledBuf> {
        let size = len.max(SMALLEST).next_power_of_two() as u64;
        let memory = &self.memory;
        let waiter = || Arc::downgrade(asked_by) as Weak<dyn Waiter>;
        let (buf, released) = {
            let mut state = memory.state.lock();
            let held = self.held();
            let is_self = |starved: &Starved| starved.is(self);
            let reserved = match state.starved.first() {
                Some(starved) if !is_self(starved) => starved.size,
                _ => 0,
            };
            let free = memory.shared.saturating_sub(state.used).saturating_sub(reserved);
            let always = state.used == 0 || (held == 0 && size <= RESERVE);
            let fits = if held == 0 { size <= free } else { held.saturating_add(size) <= free / PART };
            if !always && !fits {
                state.waiting.push(waiter());
                if held == 0 && !state.starved.iter().any(is_self) {
                    let account = Arc::downgrade(self);
                    state.starved.push(Starved { account, size, since: Instant::now() });
                }
                return None;
            }
            state.starved.retain(|starved| !is_self(starved));
            state.used += size;
            self.held.fetch_add(size, Ordering::Relaxed);
            match state.free.get_mut(class_of(size)).and_then(Vec::pop) {
                Some(buf) => {
                    state.kept -= size;
                    (Some(buf), Vec::new())
                }
                None => (None, state.release_kept(0, memory.shared)),
            }
        };
        // Unmapping takes time: not under the lock.
        drop(released);
        match buf.map_or_else(|| MmapMut::map_anon(usize::try_from(size).unwrap_or(usize::MAX)), Ok) {
            Ok(buf) => Some(PooledBuf { buf: Some(buf), len, account: Arc::clone(self) }),
            Err(_) => {
                // The system has no memory now: the same as if others used it.
                let mut state = memory.state.lock();
                state.used -= size;
                self.held.fetch_sub(size, Ordering::Relaxed);
                state.waiting.push(waiter());
                None
            }
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// A buffer of the pool; released when dropped.
pub(crate) struct PooledBuf {
    /// There until it is dropped.
    buf: Option<MmapMut>,
    len: usize,
    account: Arc<Account>,
}

impl PooledBuf {
    /// Truncates to `len` bytes; the whole buffer stays in use.
    pub(crate) fn shorten(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Holds just `bytes` from now on; false, unchanged, if they do not fit.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> bool {
        let Some(room) = self.buf.as_deref_mut().and_then(|buf| buf.get_mut(..bytes.len())) else {
            return false;
        };
        room.copy_from_slice(bytes);
        self.len = bytes.len();
        true
    }
}

impl Deref for PooledBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buf.as_deref().and_then(|buf| buf.get(..self.len)).unwrap_or_default()
    }
}

impl DerefMut for PooledBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        self.buf.as_deref_mut().and_then(|buf| buf.get_mut(..len)).unwrap_or_default()
    }
}

impl Drop for PooledBuf {
    fn drop(&mut self) {
        if let Some(buf) = self.buf.take() {
            self.account.memory.release(buf, &self.account);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// Counts how often it is resumed.
    #[derive(Default)]
    struct Resumed(AtomicU64);

    impl Waiter for Resumed {
        fn resume(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Resumed {
        fn count(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }
    }

    /// Takes buffers of 1 MiB until there is no room.
    fn take_all(account: &Arc<Account>) -> Vec<PooledBuf> {
        let waiter = Arc::new(Resumed::default());
        std::iter::from_fn(|| account.alloc(MIB, &waiter)).collect()
    }

    fn held(account: &Account) -> usize {
        account.held() as usize / MIB
    }

    /// Of what is free before each buffer: with all that is free one client would hold half of the memory,
    /// and with half of it a third.
    #[test]
    fn a_client_that_holds_something_gets_a_quarter_of_what_is_free() {
        let memory = Memory::new(102 * MIB as u64, 1);
        let clients: Vec<_> = (0..3).map(|_| Account::new(&memory)).collect();
        let mut buffers = Vec::new();
        let mut free = 100;
        for (client, most) in clients.iter().zip([20, 16, 13]) {
            buffers.extend(take_all(client));
            assert_eq!(held(client), most, "of {free} MiB");
            free -= most;
        }
        assert_eq!(memory.used(), (100 - free as u64) << 20);
        // What the first frees is free for the last.
        buffers.drain(..20);
        assert_eq!(held(&clients[0]), 0);
        buffers.extend(take_all(&clients[2]));
        assert_eq!(held(&clients[2]), 17);
    }

    #[test]
    fn a_client_that_holds_nothing_gets_its_reserve_at_once() {
        let memory = Memory::new(8 * MIB as u64, 2);
        let waiter = Arc::new(Resumed::default());
        let whole = Account::new(&memory).alloc(4 * MIB, &waiter);
        assert!(whole.is_some() && Account::new(&memory).alloc(4 * MIB, &waiter).is_none());
        let reserves: Vec<_> = (0..2).map(|_| Account::new(&memory).alloc(2 * MIB, &waiter)).collect();
        assert!(reserves.iter().all(Option::is_some));
    }

    #[test]
    fn what_a_starved_client_lacks_is_not_given_to_others() {
        let memory = Memory::new(34 * MIB as u64, 1);
        let waiter = Arc::new(Resumed::default());
        let [first, starved, other] = [(); 3].map(|()| Account::new(&memory));
        let whole = first.alloc(16 * MIB, &waiter);
        assert!(whole.is_some() && starved.alloc(32 * MIB, &waiter).is_none());
        assert_eq!(memory.lacking(Instant::now()), Some(memory.used()));
        // 16 MiB are free.
        assert!(other.alloc(4 * MIB, &waiter).is_none(), "reserved for the starved one");
        drop(whole);
        assert!(waiter.count() > 0);
        assert!(starved.alloc(32 * MIB, &waiter).is_some());
        assert_eq!(memory.lacking(Instant::now()), None);
    }

    /// Others once waited until a buffer was released, although what they asked for was free.
    #[test]
    fn what_is_reserved_for_a_client_that_gives_up_is_free_for_others() {
        let memory = Memory::new(34 * MIB as u64, 1);
        let [first, other] = [(); 2].map(|()| Account::new(&memory));
        let whole = first.alloc(16 * MIB, &Arc::new(Resumed::default()));
        let withdraws: fn(Arc<Account>) -> Option<Arc<Account>> = |account| {
            account.withdraw();
            Some(account)
        };
        for gives_up in [withdraws, |_| None] {
            let (waiter, starved) = (Arc::new(Resumed::default()), Account::new(&memory));
            assert!(starved.alloc(32 * MIB, &Arc::new(Resumed::default())).is_none());
            assert!(other.alloc(4 * MIB, &waiter).is_none());
            let still_there = gives_up(starved);
            assert_eq!(waiter.count(), 1);
            assert!(other.alloc(4 * MIB, &waiter).is_some());
            assert_eq!(memory.lacking(Instant::now()), None);
            drop(still_there);
        }
        drop(whole);
    }

    /// What frees memory of the system is not known here.
    #[test]
    fn waiters_try_again_periodically_while_others_hold_buffers() {
        let memory = Memory::new(8 * MIB as u64, 1);
        let waiter = Arc::new(Resumed::default());
        let buffer = Account::new(&memory).alloc(4 * MIB, &waiter);
        assert!(Account::new(&memory).alloc(4 * MIB, &waiter).is_none());
        memory.trim();
        assert_eq!(waiter.count(), 1);
        drop(buffer);
    }

    #[test]
    fn a_waiter_is_resumed_by_what_is_given_back() {
        let memory = Memory::new(8 * MIB as u64, 1);
        let (waiter, account) = (Arc::new(Resumed::default()), Account::new(&memory));
        let buffer = account.alloc(4 * MIB, &waiter);
        assert!(account.alloc(4 * MIB, &waiter).is_none());
        assert_eq!(waiter.count(), 0);
        drop(buffer);
        assert_eq!(waiter.count(), 1);
        assert!(account.alloc(4 * MIB, &waiter).is_some());
    }
}
