//! This library under the live benchmark: a tap in this very process.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_image::{CreateSettings, CreateSpec, Format, NewImage, OpenOptions};
use blockmirror_mirror::{JobState, MirrorJob, MirrorOptions, Tap};
use blockmirror_testing::Outcome;

use super::guest::Writer;
use super::{ALL_MODES, Ask, Mode, State, Subject};

pub(super) struct Library {
    tap: Arc<Tap>,
    target: PathBuf,
    job: Option<MirrorJob>,
}

impl Library {
    pub(super) fn open(source: &Path, dir: &Path) -> Outcome<Self> {
        let image = OpenOptions::new().format(Format::Qcow2).writable(true).open(source)?;
        Ok(Self { tap: Tap::new(Arc::clone(image.device())), target: dir.join("target.qcow2"), job: None })
    }
}

struct Tapped(Arc<Tap>);

impl Writer for Tapped {
    fn write(&mut self, offset: u64, block: &[u8]) -> Outcome {
        Ok(self.0.write_at(block, offset, WriteFlags::NONE)?)
    }
}

impl Subject for Library {
    fn writer(&self) -> Outcome<Box<dyn Writer>> {
        Ok(Box::new(Tapped(Arc::clone(&self.tap))))
    }

    fn modes(&self) -> &'static [Mode] {
        &ALL_MODES
    }

    fn start(&mut self, ask: Ask) -> Outcome {
        let spec = CreateSpec::new(Format::Qcow2, self.tap.len(), CreateSettings::default());
        NewImage::create(&self.target, &spec)?.persist()?;
        let image = OpenOptions::new().format(Format::Qcow2).writable(true).open(&self.target)?;
        let options = MirrorOptions::new().granularity(ask.granularity).copy_mode(ask.mode.into());
        self.job = Some(MirrorJob::attach(&self.tap, Arc::clone(image.device()), options)?);
        Ok(())
    }

    fn state(&mut self) -> Outcome<State> {
        let progress = self.job.as_ref().ok_or("no job")?.control().progress();
        match progress.state {
            JobState::Running | JobState::Ready => {}
            state => return Err(format!("the job is {state}").into()),
        }
        Ok(State { ready: progress.state == JobState::Ready, offset: progress.offset, len: progress.len })
    }

    fn stop(&mut self) -> Outcome {
        drop(self.job.take());
        Ok(std::fs::remove_file(&self.target)?)
    }
}
