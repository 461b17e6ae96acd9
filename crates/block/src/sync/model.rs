//! The same names for the model checker: each lock, wait and wake-up is a point at which it chooses who runs
//! next.
//!
//! Time does not pass by itself: it moves when a thread waits for it, and a wait with a limit either runs it
//! out or wakes for nothing, as the checker chooses. Who waits without a limit waits for ever, so that a
//! wake-up that was forgotten shows as a deadlock.

use std::ops::{Add, Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, TryLockError};
use std::time::Duration;

use shuttle::rand::Rng;
pub use shuttle::sync::atomic;
pub use shuttle::thread;

/// See the standard library's; this one ignores poisoning.
#[derive(Debug, Default)]
pub struct Mutex<T: ?Sized>(shuttle::sync::Mutex<T>);

/// Holds a [`Mutex`] until dropped.
#[derive(Debug)]
pub struct MutexGuard<'a, T: ?Sized> {
    mutex: &'a Mutex<T>,
    inner: shuttle::sync::MutexGuard<'a, T>,
}

impl<T> Mutex<T> {
    /// A new, free lock around `value`.
    pub const fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    /// Takes the value out.
    pub fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        MutexGuard { mutex: self, inner }
    }

    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let inner = match self.0.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(MutexGuard { mutex: self, inner })
    }

    /// The value, without locking: the exclusive borrow proves that no other thread holds it.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// A condition variable to go with [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar(shuttle::sync::Condvar);

impl Condvar {
    /// A condition without waiters.
    pub const fn new() -> Self {
        Self(shuttle::sync::Condvar::new())
    }

    /// Lets the lock go and waits.
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        let MutexGuard { mutex, inner } = guard;
        let inner = self.0.wait(inner).unwrap_or_else(PoisonError::into_inner);
        MutexGuard { mutex, inner }
    }

    /// Waits at most `timeout`; true if that ran out.
    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        timeout: Duration,
    ) -> (MutexGuard<'a, T>, bool) {
        let mutex = guard.mutex;
        drop(guard);
        thread::yield_now();
        let ran_out = shuttle::rand::thread_rng().gen_bool(0.5);
        if ran_out {
            Instant::advance(timeout);
        }
        (mutex.lock(), ran_out)
    }

    /// Wakes one waiter.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes every waiter.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// An instant of the model's clock, in nanoseconds. Only differences mean anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(u64);

static NOW: AtomicU64 = AtomicU64::new(0);

impl Instant {
    /// The present.
    pub fn now() -> Self {
        Self(NOW.load(Ordering::SeqCst))
    }

    fn advance(by: Duration) {
        // A wait of a day must not use up the clock of those after it.
        let by = by.min(Duration::from_secs(60));
        NOW.fetch_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }

    /// Time from this instant until now.
    pub fn elapsed(&self) -> Duration {
        Self::now().saturating_duration_since(*self)
    }

    /// Time from `earlier` to this instant; none if it is the other way round.
    pub fn saturating_duration_since(&self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Time from `earlier` to this instant; none if it is the other way round.
    pub fn duration_since(&self, earlier: Self) -> Duration {
        self.saturating_duration_since(earlier)
    }

    /// The instant `after` this one, unless the clock ends before.
    pub fn checked_add(&self, after: Duration) -> Option<Self> {
        self.0.checked_add(u64::try_from(after.as_nanos()).ok()?).map(Self)
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, after: Duration) -> Self {
        self.checked_add(after).unwrap_or(Self(u64::MAX))
    }
}

/// A number of the calling thread, the same at each call: they are given out in turn. Good to spread threads
/// over lanes.
pub fn thread_number() -> usize {
    usize::from(thread::current().id())
}
