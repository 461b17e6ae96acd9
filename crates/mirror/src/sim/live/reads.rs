//! The last step of a job, reads of the guest that keep the old disk in use after it, and copy-ups into the
//! source, which the last step waits for.

use super::Sim;
use crate::machine::{Admission, Done, Ending};

impl Sim<'_> {
    /// The last step, by the action `id`. A pivot may leave reads under way at the old disk.
    pub(super) fn perform_end(&mut self, id: u64, ending: Ending) {
        self.end(ending);
        let reads = ending == Ending::Pivot && self.params.workload.reads && self.rng.one_in(2);
        self.core.on_completion(self.now, id, Ok(if reads { Done::StillRead } else { Done::Ended }));
        if reads {
            self.core.guest_has_moved();
            self.still_read = Some(id);
        }
    }

    /// The last of these reads ends, at times; whether it does.
    pub(super) fn reads_end(&mut self) -> bool {
        if self.still_read.is_none() || !self.rng.one_in(20) {
            return false;
        }
        // After a cancel the job is over already, and this says nothing to it.
        if let Some(id) = self.still_read.take() {
            self.core.on_completion(self.now, id, Ok(Done::Ended));
        }
        true
    }

    /// A copy-up ends, or one begins if the job admits it.
    pub(super) fn copy_up(&mut self) {
        if self.copy_ups > 0 && (self.closing || self.rng.one_in(2)) {
            self.core.copy_up_finished();
            self.copy_ups -= 1;
        } else if !self.closing && self.core.admit_copy_up() == Admission::SourceOnly {
            self.copy_ups += 1;
        }
    }
}
