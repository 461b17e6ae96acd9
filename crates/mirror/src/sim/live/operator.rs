//! The operator: asks for any verb at any time, and in the end for the end. A verb is refused exactly where
//! the table of states says.

use super::Sim;
use crate::machine::Ending;
use crate::progress::{IoStatus, Progress};
use crate::sim::environment::{MODES, SPEEDS};
use crate::sim::steps::Step;
use crate::state::{JobState, Refused, Verb};

impl Sim<'_> {
    /// Asks for something.
    pub(super) fn operator(&mut self) {
        let Progress { state, io_status, .. } = self.core.progress(self.now);
        if self.closing && !self.leaked.is_empty() {
            // Every other end waits for the writes under way.
            let _ = self.core.force_cancel();
            return;
        }
        if self.closing {
            let _ = self.core.resume();
            // Before it is ready a cancel gives the job up, and after a word for the pivot it takes that
            // back.
            let _ = match self.wish {
                Ending::Keep if state == JobState::Running => Ok(()),
                Ending::Keep => self.core.cancel(),
                _ => self.core.complete(),
            };
            let _ = self.core.finalize();
            return;
        }
        let verb = self.rng.pick(self.params.verbs);
        let fatal = verb == Verb::ForceCancel
            || (verb == Verb::Cancel && matches!(state, JobState::Running | JobState::Created));
        if fatal && (self.params.fatal == 0 || !self.rng.one_in(self.params.fatal))
            || verb == Verb::Pause && !self.rng.one_in(3)
        {
            return;
        }
        let answer = match verb {
            Verb::Cancel => self.core.cancel(),
            Verb::ForceCancel => self.core.force_cancel(),
            Verb::Pause => self.core.pause(),
            Verb::Resume => {
                self.workers.faults.make_room();
                let answer = self.core.resume();
                if answer.is_ok() {
                    assert_eq!(self.core.progress(self.now).io_status, IoStatus::Ok);
                }
                answer
            }
            Verb::SetSpeed => {
                let speed = self.rng.pick(&SPEEDS);
                self.core.set_speed(self.now, speed)
            }
            Verb::Change => {
                let mode = self.rng.pick(&MODES);
                self.core.change(mode)
            }
            Verb::Complete => self.core.complete(),
            Verb::Finalize => self.core.finalize(),
            Verb::Dismiss => self.core.dismiss(),
            verb => panic!("{verb} is not known here"),
        };
        self.trace.step(self.now, Step::Asks { verb, answer });
        // What an error has stopped can be resumed wherever it was.
        let stopped = io_status != IoStatus::Ok;
        let allowed = state.allows(verb) || (verb == Verb::Resume && state == JobState::Pending && stopped);
        let ending = matches!(answer, Err(Refused::State { state: JobState::Waiting, .. }));
        assert_eq!(
            matches!(answer, Err(Refused::State { .. })),
            !allowed || ending,
            "{state} {verb}: {answer:?}"
        );
    }
}
