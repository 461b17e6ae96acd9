//! A simple job follows the rules of all jobs.

use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};

use blockmirror_job::testing::{Disk, Features, Kind, Setup, Subject};
use blockmirror_mirror::CopyMode;

use super::*;
use crate::job::job_span;

struct Create;

struct Creating {
    job: SimpleJob,
    /// Work that is held waits for it to be dropped.
    held: Mutex<Option<Sender<()>>>,
}

impl Kind for Create {
    fn features(&self) -> Features {
        // The commands for the missing verbs find jobs that move data only.
        let lacks = &[Verb::SetSpeed, Verb::Change];
        Features { ready: false, interruptible: false, on_error: false, lacks, ..Features::ALL }
    }

    fn start(&self, setup: Setup) -> Box<dyn Subject> {
        let options = JobOptions {
            id: "c".to_owned(),
            kind: "create",
            speed: 0,
            auto_finalize: setup.auto_finalize,
            auto_dismiss: setup.auto_dismiss,
            span: job_span("c", "create"),
        };
        let (held, hold) = channel();
        let (begins, begun) = channel();
        let job = SimpleJob::start(&options, move || {
            begins.send(()).unwrap();
            match setup.disk {
                Disk::Sound => Ok(()),
                Disk::Blocks => hold.recv().or(Ok(())),
                Disk::Fails => Err("a broken disk".to_owned()),
            }
        });
        begun.recv().unwrap();
        Box::new(Creating { job, held: Mutex::new(Some(held)) })
    }
}

impl Subject for Creating {
    fn state(&self) -> JobState {
        self.job.0.state.lock().state
    }

    fn request(&self, verb: Verb) -> Result<(), Refused> {
        self.job.request(match verb {
            Verb::Cancel => JobCommand::Cancel(false),
            Verb::ForceCancel => JobCommand::Cancel(true),
            Verb::Pause => JobCommand::Pause,
            Verb::Resume => JobCommand::Resume,
            Verb::SetSpeed => JobCommand::SetSpeed(0),
            Verb::Change => JobCommand::Change(CopyMode::Background),
            Verb::Complete => JobCommand::Complete,
            Verb::Finalize => JobCommand::Finalize,
            Verb::Dismiss => JobCommand::Dismiss,
            _ => panic!("no command for {verb}"),
        })
    }

    fn next_event(&self, timeout: Duration) -> Option<Event> {
        self.job.next_event(Some(timeout))
    }

    fn failure(&self) -> Option<String> {
        self.job.failure()
    }

    fn unblock(&self) {
        self.held.lock().unwrap().take();
    }
}

blockmirror_job::conformance!(Create);

/// As QEMU's: the state of a job at work does not show it.
#[test]
fn a_pause_and_a_cancel_are_noted_while_it_works() {
    let setup =
        Setup { auto_finalize: true, auto_dismiss: false, on_error: Default::default(), disk: Disk::Blocks };
    let job = Create.start(setup);
    job.request(Verb::Pause).unwrap();
    assert_eq!(job.state(), JobState::Running);
    for verb in [Verb::Pause, Verb::Cancel] {
        assert_eq!(job.request(verb), Err(Refused::Paused { verb }));
    }
    job.request(Verb::Resume).unwrap();
    assert_eq!(job.request(Verb::Resume), Err(Refused::NotPaused));
    job.request(Verb::ForceCancel).unwrap();
    job.request(Verb::Pause).unwrap();
    assert_eq!((job.state(), job.failure()), (JobState::Running, None));
    job.unblock();
    let events = std::iter::from_fn(|| job.next_event(Duration::from_secs(60)));
    let status = |event: &Event| matches!(event, Event::Status(JobState::Concluded));
    let events: Vec<_> = events.take_while(|event| !status(event)).skip(2).collect();
    assert_eq!(events, [Event::Status(JobState::Aborting), Event::Cancelled]);
    assert_eq!(job.failure().as_deref(), Some(CANCELLED));
}
