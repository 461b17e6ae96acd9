//! A job without an owner, and what is left of one as a bitmap.

use blockmirror_bitmap::DirtyBitmap;
use blockmirror_block::sync::thread;

use super::{MirrorControl, MirrorJob};
use crate::engine::Wake;
use crate::error::Error;

impl MirrorJob {
    /// Gives up the ownership of the job: it goes on, and ends by the verbs of the control that is returned.
    /// How it has ended is in its events, and in [`MirrorControl::failure`] until then.
    ///
    /// A thread of its own waits for its end.
    ///
    /// # Errors
    /// [`Error::Thread`] if the system gives none: the job is cancelled then.
    pub fn detach(self) -> Result<MirrorControl, Error> {
        let control = self.control.clone();
        let wait = move || drop(self.wait());
        thread::Builder::new().name("mirror-owner".into()).spawn(wait).map_err(Error::Thread)?;
        Ok(control)
    }
}

impl MirrorControl {
    /// What the target does not have, as things are, and would not have after a crash: a bitmap for another
    /// job that goes on from here ([`MirrorOptions::only`](crate::MirrorOptions::only)).
    ///
    /// Of a job on a tap that is not all: writes under way, and those after its end, are not in it. Another
    /// job on the tap needs it merged with a bitmap of the tap that recorded from before this job on, as
    /// it is when no write is under way.
    pub fn remaining(&self) -> DirtyBitmap {
        self.engine().with_core(Wake::None, |core, _| core.remaining())
    }
}
