//! The engine as the tap sees it: what guest writes wait for.

use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::cancel::{self, CancelScope};
use blockmirror_block::sync::MutexGuard;
use blockmirror_block::{self as block, BlockDevice, ByteRange};

use super::{Engine, State, Wake};
use crate::machine::{Admission, Core, TargetWriter};
use crate::tap::WriteObserver;

impl Engine {
    /// Waits until `admit` says something else than [`Admission::Wait`], which is the answer to a caller that
    /// is cancelled. `time_left` says when to ask again, if [`Engine::wake_waiters`] does not wake
    /// the thread before.
    fn wait_for_admission<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        admit: impl Fn(&mut Core) -> Admission,
        time_left: impl Fn(&Core) -> Option<Duration>,
    ) -> Admission {
        loop {
            self.advance_clock(&mut state, self.started.elapsed());
            match admit(&mut state.core) {
                Admission::Wait if !cancel::is_cancelled() => {
                    let overdue = state.core.overdue_at();
                    let overdue = overdue.map(|at| at.saturating_sub(self.started.elapsed()));
                    let timeout = overdue.or_else(|| time_left(&state.core));
                    let (unlocked, changed) = self.deliver_unlocked(state);
                    state = unlocked;
                    if changed {
                        continue;
                    }
                    state.guests_waiting += 1;
                    state = cancel::wait(&self.guests, state, timeout);
                    state.guests_waiting -= 1;
                    self.resume_if_overdue(&mut state);
                }
                admission => {
                    drop(state);
                    self.deliver();
                    return admission;
                }
            }
        }
    }

    /// Resumes the guest if it has been quiesced for longer than a write has to wait.
    fn resume_if_overdue(&self, state: &mut State) {
        if state.core.resume_if_overdue(self.started.elapsed()) {
            self.work.notify_all();
            self.wake_waiters(state);
        }
    }
}

impl WriteObserver for Engine {
    fn is_over(&self) -> bool {
        self.state.lock().core.is_concluded()
    }

    fn expect_pre_attach_writes(&self, count: usize) {
        self.with_core_locked(Wake::None, |core, _| core.expect_pre_attach_writes(count));
    }

    fn pre_attach_write_finished(&self, range: ByteRange) {
        self.with_core_locked(Wake::One, |core, _| core.pre_attach_write_finished(range));
    }

    fn begin_write(&self, range: ByteRange) -> (u64, Admission, Option<Duration>) {
        let mut state = self.state.lock();
        self.advance_clock(&mut state, self.started.elapsed());
        let id = state.core.on_guest_write(range);
        let admission =
            self.wait_for_admission(state, |core| core.guest_admit(id), |core| core.admission_time_left(id));
        if admission == Admission::Wait {
            // Others may have waited for this one.
            self.with_core(Wake::All, |core, _| core.forget_guest_write(id));
        }
        (id, admission, None)
    }

    /// Wakes no caller unless time has brought a change: those that are refused would wake each other for
    /// ever.
    fn try_begin_write(&self, range: ByteRange) -> (u64, Admission, Option<Duration>) {
        let mut state = self.state.lock();
        self.resume_if_overdue(&mut state);
        self.advance_clock(&mut state, self.started.elapsed());
        let answer = state.core.try_guest_write(range);
        drop(state);
        self.deliver();
        answer
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        self.state.lock().core.guest_would_wait(range)
    }

    fn flush_soon(&self) {
        let mut state = self.state.lock();
        // The write waits in the log, and the core does not know it.
        self.resume_if_overdue(&mut state);
        self.advance_clock(&mut state, self.started.elapsed());
        if state.core.flush_soon() {
            self.work.notify_all();
        }
        drop(state);
        self.deliver();
    }

    fn log_failed(&self, why: Arc<block::Error>) {
        self.fail_for_log(why);
    }

    fn write_reaches_target(&self, id: u64, writer: TargetWriter) -> Option<Arc<dyn BlockDevice>> {
        let mut state = self.state.lock();
        let granted = self.change(&mut state, Wake::None, |core, _| core.guest_at_target(id, writer));
        let target = state.target.clone().filter(|_| granted);
        drop(state);
        self.deliver();
        target
    }

    fn target_calls(&self) -> CancelScope {
        self.calls.enter()
    }

    fn end_write(&self, id: u64, source_ok: bool, target: Option<block::Result<()>>) {
        self.with_core_locked(Wake::One, |core, _| core.guest_finished(id, source_ok, target));
    }

    fn begin_copy_up(&self) -> Admission {
        self.wait_for_admission(self.state.lock(), Core::admit_copy_up, |_| None)
    }

    fn end_copy_up(&self) {
        self.with_core_locked(Wake::One, |core, _| core.copy_up_finished());
    }

    fn missing(&self) -> Vec<ByteRange> {
        self.with_core_locked(Wake::None, |core, _| core.missing())
    }

    fn renews_bitmap(&self) -> bool {
        self.attachment.as_ref().is_some_and(|attachment| attachment.renews_bitmap)
    }
}
