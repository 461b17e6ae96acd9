//! A throttle group: requests of several members wait here for their turn.
//!
//! Waiters of one direction go by turns, one of each member that has any, so that a member with many requests
//! does not keep the others from theirs. Reads and writes wait apart, unless both could go: then they
//! alternate.
//!
//! A request whose caller is cancelled passes, accounted but not held: the abort of a job needs it out of the
//! way. So do all that wait when the member itself is cancelled.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockmirror_block::cancel;
use blockmirror_block::sync::{Condvar, Mutex};

use super::bucket::{Buckets, Direction};
use super::limits::{ThrottleError, ThrottleLimits};

/// No single wait is longer, whatever the arithmetic says.
const LONGEST_NAP: Duration = Duration::from_secs(3600);

/// Limits that several members share. Their number is bounded by the devices that exist.
#[derive(Debug)]
pub struct ThrottleGroup {
    started: Instant,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    buckets: Buckets,
    limiting: bool,
    members: BTreeMap<u64, Member>,
    next_member: u64,
    next_ticket: u64,
    /// The member whose waiter went last, for each direction.
    last_member: [u64; 2],
    /// The direction that went last.
    last: Direction,
}

#[derive(Debug, Default)]
struct Member {
    /// Tickets of waiters, oldest first, for each direction.
    waiting: [VecDeque<u64>; 2],
    /// Tickets below this may pass.
    let_go: u64,
}

impl State {
    /// The ticket whose turn it is.
    fn head(&self, direction: Direction) -> Option<u64> {
        let front = |(_, member): (&u64, &Member)| member.waiting[direction.index()].front().copied();
        let last = self.last_member[direction.index()];
        let mut later = self.members.range(last.saturating_add(1)..);
        later.find_map(front).or_else(|| self.members.range(..=last).find_map(front))
    }

    fn remove(&mut self, member: u64, direction: Direction, ticket: u64) {
        if let Some(member) = self.members.get_mut(&member) {
            member.waiting[direction.index()].retain(|t| *t != ticket);
        }
    }

    fn is_let_go(&self, member: u64, ticket: u64) -> bool {
        self.members.get(&member).is_none_or(|member| ticket < member.let_go)
    }

    /// How long the head of `direction` has to wait; `None` if it must be the other direction's turn first.
    fn delay(&mut self, now: Duration, direction: Direction) -> Option<Duration> {
        let delay = self.buckets.delay(now, direction);
        let other = direction.other();
        let yields = delay.is_zero()
            && self.last == direction
            && self.head(other).is_some()
            && self.buckets.delay(now, other).is_zero();
        if yields { None } else { Some(delay) }
    }
}

impl ThrottleGroup {
    /// A group under `limits`.
    ///
    /// # Errors
    /// Limits that make no sense.
    pub fn new(limits: ThrottleLimits) -> Result<Arc<Self>, ThrottleError> {
        limits.check()?;
        Ok(Arc::new(Self {
            started: Instant::now(),
            state: Mutex::new(State {
                buckets: Buckets::new(limits, Duration::ZERO),
                limiting: limits.is_limiting(),
                members: BTreeMap::new(),
                next_member: 1,
                next_ticket: 0,
                last_member: [0; 2],
                last: Direction::Write,
            }),
            changed: Condvar::new(),
        }))
    }

    /// The limits in force.
    pub fn limits(&self) -> ThrottleLimits {
        self.state.lock().buckets.limits()
    }

    /// Puts other limits in force. Buckets start empty, and waiting requests look again.
    ///
    /// # Errors
    /// Limits that make no sense; the old ones stay.
    pub fn set_limits(&self, limits: ThrottleLimits) -> Result<(), ThrottleError> {
        limits.check()?;
        let mut state = self.state.lock();
        state.buckets = Buckets::new(limits, self.started.elapsed());
        state.limiting = limits.is_limiting();
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Requests that wait at present.
    pub fn waiting(&self) -> usize {
        self.state.lock().members.values().map(|m| m.waiting.iter().map(VecDeque::len).sum::<usize>()).sum()
    }

    pub(super) fn join(self: &Arc<Self>) -> Membership {
        let mut state = self.state.lock();
        let id = state.next_member;
        state.next_member += 1;
        state.members.insert(id, Member::default());
        Membership { group: Arc::clone(self), id }
    }

    /// Waits until a request of `bytes` may go.
    fn admit(&self, member: u64, direction: Direction, bytes: u64) {
        let mut state = self.state.lock();
        if !state.limiting {
            return;
        }
        let nobody_waits = state.head(direction).is_none();
        if nobody_waits && state.delay(self.started.elapsed(), direction) == Some(Duration::ZERO) {
            state.last = direction;
            return state.buckets.account(direction, bytes);
        }
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        if let Some(member) = state.members.get_mut(&member) {
            member.waiting[direction.index()].push_back(ticket);
        }
        while state.limiting && !state.is_let_go(member, ticket) && !cancel::is_hurried() {
            if state.head(direction) != Some(ticket) {
                state = cancel::wait(&self.changed, state, None);
                continue;
            }
            match state.delay(self.started.elapsed(), direction) {
                Some(Duration::ZERO) => {
                    state.last_member[direction.index()] = member;
                    state.last = direction;
                    break;
                }
                Some(delay) => {
                    state = cancel::wait(&self.changed, state, Some(delay.min(LONGEST_NAP)));
                }
                None => {
                    self.changed.notify_all();
                    state = cancel::wait(&self.changed, state, None);
                }
            }
        }
        state.remove(member, direction, ticket);
        state.buckets.account(direction, bytes);
        drop(state);
        self.changed.notify_all();
    }

    /// Accounts bytes that have moved already.
    fn charge(&self, direction: Direction, bytes: u64) {
        let mut state = self.state.lock();
        // The buckets have to leak up to now before something is poured in.
        let _ = state.buckets.delay(self.started.elapsed(), direction);
        state.buckets.account(direction, bytes);
    }

    fn let_go(&self, member: u64) {
        let mut state = self.state.lock();
        let next = state.next_ticket;
        if let Some(member) = state.members.get_mut(&member) {
            member.let_go = next;
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// A place in a group, given up when dropped.
#[derive(Debug)]
pub(super) struct Membership {
    group: Arc<ThrottleGroup>,
    id: u64,
}

impl Membership {
    pub(super) fn group(&self) -> &Arc<ThrottleGroup> {
        &self.group
    }

    pub(super) fn admit(&self, direction: Direction, bytes: u64) {
        self.group.admit(self.id, direction, bytes);
    }

    pub(super) fn charge(&self, direction: Direction, bytes: u64) {
        self.group.charge(direction, bytes);
    }

    pub(super) fn let_go(&self) {
        self.group.let_go(self.id);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.group.state.lock().members.remove(&self.id);
        self.group.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use blockmirror_block::cancel::CancelSource;

    use super::super::limits::Rate;
    use super::*;

    fn group(iops: u64) -> Arc<ThrottleGroup> {
        ThrottleGroup::new(ThrottleLimits { iops_total: Rate::per_second(iops), ..Default::default() })
            .unwrap()
    }

    fn wait_for(group: &ThrottleGroup, waiting: usize) {
        while group.waiting() != waiting {
            thread::yield_now();
        }
    }

    #[test]
    fn a_request_whose_caller_is_cancelled_passes_alone() {
        let group = group(1);
        let member = group.join();
        for _ in 0..1000 {
            member.charge(Direction::Read, 1);
        }
        let job = CancelSource::new();
        thread::scope(|s| {
            let cancelled = s.spawn(|| {
                let _calls = job.enter();
                member.admit(Direction::Read, 1);
            });
            s.spawn(|| member.admit(Direction::Read, 1));
            wait_for(&group, 2);
            job.cancel();
            cancelled.join().unwrap();
            assert_eq!(group.waiting(), 1);
            member.let_go();
        });
    }

    #[test]
    fn members_take_turns() {
        let group = group(1);
        let (busy, modest) = (group.join(), group.join());
        for _ in 0..1000 {
            busy.charge(Direction::Read, 1);
        }
        thread::scope(|s| {
            for n in 1..=5 {
                s.spawn(|| busy.admit(Direction::Read, 1));
                wait_for(&group, n);
            }
            s.spawn(|| modest.admit(Direction::Read, 1));
            wait_for(&group, 6);
            // Who would go if each had its way now, without waiting for it.
            let mut turns = Vec::new();
            let mut state = group.state.lock();
            while let Some(ticket) = state.head(Direction::Read) {
                turns.push(ticket);
                let member = if ticket == 5 { modest.id } else { busy.id };
                state.remove(member, Direction::Read, ticket);
                state.last_member[Direction::Read.index()] = member;
            }
            assert_eq!(turns, [0, 5, 1, 2, 3, 4], "the second turn is the other member's");
            drop(state);
            group.set_limits(ThrottleLimits::default()).unwrap();
        });
        assert_eq!(group.waiting(), 0);
    }

    #[test]
    fn new_limits_reach_those_who_wait() {
        let group = group(1);
        let member = group.join();
        member.admit(Direction::Write, 1);
        thread::scope(|s| {
            // At one request a second the first alone would take a second: they end because the limits
            // change.
            for _ in 0..100 {
                s.spawn(|| member.admit(Direction::Write, 1));
            }
            wait_for(&group, 100);
            assert!(group.set_limits(ThrottleLimits { iops_size: 1, ..Default::default() }).is_err());
            group.set_limits(ThrottleLimits::default()).unwrap();
        });
        assert_eq!(group.waiting(), 0);
    }

    #[test]
    fn a_member_that_lets_go_does_not_wait_and_the_others_still_do() {
        let group = group(1);
        let (given_up, other) = (group.join(), group.join());
        for _ in 0..1000 {
            other.charge(Direction::Read, 1);
        }
        thread::scope(|s| {
            s.spawn(|| other.admit(Direction::Read, 1));
            let first = s.spawn(|| given_up.admit(Direction::Read, 1));
            wait_for(&group, 2);
            given_up.let_go();
            first.join().unwrap();
            assert_eq!(group.waiting(), 1);
            // What comes later waits again.
            s.spawn(|| given_up.admit(Direction::Read, 1));
            wait_for(&group, 2);
            group.set_limits(ThrottleLimits::default()).unwrap();
        });
        assert_eq!(group.waiting(), 0);
    }
}
