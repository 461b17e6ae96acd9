//! Mirror jobs follow the rules of all jobs: one on a tap, and one that copies a disk and ends by itself.

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use blockmirror_block::testing::MemoryDisk;
use blockmirror_job::testing::{Features, Kind, Setup, Subject, TestDisk};
use blockmirror_mirror::{CopyMode, Event, JobState, MirrorJob, MirrorOptions, Refused, Tap, Verb};

struct Mirror {
    // Before the job, which waits for what is held: it opens the gate when it is dropped.
    disk: TestDisk,
    job: MirrorJob,
}

impl Subject for Mirror {
    fn state(&self) -> JobState {
        self.job.control().progress().state
    }

    fn request(&self, verb: Verb) -> Result<(), Refused> {
        let control = self.job.control();
        match verb {
            Verb::Cancel => control.keep_copy(),
            Verb::ForceCancel => control.force_cancel(),
            Verb::Pause => control.pause(),
            Verb::Resume => control.resume(),
            Verb::SetSpeed => control.set_speed(1 << 30),
            Verb::Change => control.change(CopyMode::WriteBlocking),
            Verb::Complete => control.complete(),
            Verb::Finalize => control.finalize(),
            Verb::Dismiss => control.dismiss(),
            _ => panic!("no call for {verb}"),
        }
    }

    fn next_event(&self, timeout: Duration) -> Option<Event> {
        self.job.control().next_event(Some(timeout))
    }

    fn failure(&self) -> Option<String> {
        self.job.control().failure().map(|(_, message)| message)
    }

    fn unblock(&self) {
        self.disk.unblock();
    }
}

/// One thread has one operation in flight: an error is reported once.
fn options(setup: Setup) -> MirrorOptions {
    MirrorOptions::new()
        .threads(NonZeroUsize::MIN)
        .on_source_error(setup.on_error)
        .auto_finalize(setup.auto_finalize)
        .auto_dismiss(setup.auto_dismiss)
}

fn target(disk: &TestDisk) -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(disk.device().len()))
}

mod on_a_tap {
    use super::*;

    struct OnATap;

    impl Kind for OnATap {
        fn features(&self) -> Features {
            Features::ALL
        }

        fn start(&self, setup: Setup) -> Box<dyn Subject> {
            let disk = TestDisk::new(setup.disk);
            let tap = Tap::new(disk.device());
            let job = MirrorJob::attach(&tap, target(&disk), options(setup)).unwrap();
            disk.wait_until_blocked();
            Box::new(Mirror { disk, job })
        }
    }

    blockmirror_job::conformance!(OnATap);
}

mod of_a_disk {
    use super::*;

    /// Waits neither for `finalize` nor vanishes: its caller waits for it.
    struct OfADisk;

    impl Kind for OfADisk {
        fn features(&self) -> Features {
            Features { ready: false, finalizes: false, dismisses_itself: false, ..Features::ALL }
        }

        fn start(&self, setup: Setup) -> Box<dyn Subject> {
            let disk = TestDisk::new(setup.disk);
            let job = MirrorJob::start(disk.device(), target(&disk), options(setup)).unwrap();
            disk.wait_until_blocked();
            Box::new(Mirror { disk, job })
        }
    }

    blockmirror_job::conformance!(OfADisk);
}
