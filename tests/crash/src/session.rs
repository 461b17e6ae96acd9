//! An image under a sequence of operations, and the model of what it holds.

mod bitmaps;
mod closed;
mod commit;
mod snapshots;

use std::sync::Arc;

use blockmirror_block::testing::{Fault, FaultStorage, Faults, OpKind};
use blockmirror_block::{
    BlockDevice, ByteRange, Error as BlockError, ErrorKind, Result as BlockResult, Storage, WriteFlags,
    ZeroFlags,
};
use blockmirror_qcow2::{Error as Qcow2Error, Qcow2};

use crate::files::ImageFiles;
use crate::model::{History, Span, State, possible, reachable};
use crate::op::Op;
use crate::reader::Layers;
use crate::start::{BACKING_NAME, Contents, Start, noise, pattern};

/// Why a step did not succeed.
#[derive(Debug)]
pub(crate) enum StepError {
    /// The operation failed, as it may if the storage does.
    Failed(BlockError),
    /// What must not happen.
    Wrong(String),
}

impl From<BlockError> for StepError {
    fn from(error: BlockError) -> Self {
        Self::Failed(error)
    }
}

impl From<Qcow2Error> for StepError {
    fn from(error: Qcow2Error) -> Self {
        Self::Failed(error.into())
    }
}

/// The open image and its model.
pub(crate) struct Session<'a> {
    start: Start,
    files: ImageFiles,
    /// The present moment.
    clock: &'a dyn Fn() -> usize,
    disk: Option<Qcow2>,
    /// Fails every request of the open image, once its process is killed.
    killed: Faults,
    /// What the guest reads.
    now: Vec<u8>,
    backing_name: Option<Vec<u8>>,
    history: History,
    /// Operations that were refused.
    pub(crate) refused: u64,
    /// Called when an operation has been answered, before anything is looked at.
    pub(crate) answered: Option<&'a dyn Fn()>,
}

impl<'a> Session<'a> {
    pub(crate) fn new(start: Start, files: ImageFiles, clock: &'a dyn Fn() -> usize) -> BlockResult<Self> {
        let now = read_all(&start.open(&files, false)?)?;
        let backing_name = start.backed.then(|| BACKING_NAME.into());
        let first =
            State { begun: 0, durable: 0, contents: now.clone(), backing_name: Option::clone(&backing_name) };
        let mut history = History { states: vec![first], ..History::default() };
        let image = read_file(&*files.image)?;
        let backing = files.backing.as_deref().map(read_file).transpose()?;
        let layers = Layers { image: &image, data: None, backing: backing.as_deref() };
        let listed = history.list_snapshots(layers).and_then(|()| history.list_bitmaps(&image));
        listed.map_err(|why| BlockError::new(ErrorKind::Corrupt, "list snapshots").because(why))?;
        let (killed, refused, answered) = (Faults::new(), 0, None);
        Ok(Self { start, files, clock, disk: None, killed, now, backing_name, history, refused, answered })
    }

    /// Does `op` to the image and to the model.
    pub(crate) fn step(&mut self, op: Op) -> Result<(), StepError> {
        let (begun, step) = ((self.clock)(), self.history.spans.len() as u64);
        let mut wanted = State {
            begun,
            durable: usize::MAX,
            contents: self.now.clone(),
            backing_name: self.backing_name.clone(),
        };
        let changed = self.changed(op, step);
        self.history.begin_change(changed, begun);
        let result = self.act(op, step, &mut wanted);
        if result.is_ok() {
            self.history.end_change(changed, (self.clock)());
        }
        self.history.spans.push(Span { op, begun, ended: (self.clock)(), done: result.is_ok() });
        if let Some(answered) = self.answered {
            answered();
        }
        match result {
            Ok(()) => {
                let found = read_all(self.disk()?)?;
                if found != wanted.contents {
                    let at = (0..found.len()).find(|at| wanted.contents.get(*at) != found.get(*at));
                    return Err(StepError::Wrong(format!(
                        "wrong without any crash after {op:?}, byte {at:?}"
                    )));
                }
                self.now.clone_from(&wanted.contents);
                self.backing_name.clone_from(&wanted.backing_name);
                self.history.states.push(wanted);
                self.check_open_bitmaps()
            }
            // An operation that is refused changes nothing.
            Err(StepError::Failed(error))
                if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput) =>
            {
                self.refused += 1;
                Ok(())
            }
            Err(StepError::Failed(error)) => {
                self.history.states.push(wanted);
                self.look_again()?;
                Err(StepError::Failed(error))
            }
            wrong => wrong,
        }
    }

    /// What the image held when, and what was done when. The process is killed.
    pub(crate) fn history(mut self) -> History {
        self.kill();
        self.history
    }

    /// Whether the image is open and has refused to be written since an operation failed.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.disk.as_ref().is_some_and(Qcow2::is_poisoned)
    }

    /// Whether the image is open.
    pub(crate) fn is_open(&self) -> bool {
        self.disk.is_some()
    }

    /// The process is killed. `files` are what is opened from now on.
    pub(crate) fn restart(&mut self, files: ImageFiles) -> Result<(), StepError> {
        self.kill();
        self.files = files;
        self.look_again()
    }

    /// The image, which a failure has poisoned, is opened anew by the process that has it open.
    pub(crate) fn reopen(&mut self) -> Result<(), StepError> {
        if let Some(disk) = &self.disk {
            self.disk = Some(disk.reopen()?);
        }
        self.look_again()
    }

    /// What the open image would still do at its end does not reach the files.
    fn kill(&mut self) {
        self.killed.inject(Fault::on(OpKind::Any).forever());
        self.disk = None;
    }

    /// After an operation that failed, or an end without a flush: of what is not durable any part may be
    /// there.
    fn look_again(&mut self) -> Result<(), StepError> {
        let Ok(disk) = self.start.open_or(self.disk.as_ref(), &self.files) else { return Ok(()) };
        let found = read_all(disk.get())?;
        possible(&reachable(&self.history.states, (self.clock)()), &found).map_err(StepError::Wrong)?;
        let header = disk.get().header();
        self.backing_name = header.backing.as_ref().map(|backing| backing.name.as_bytes().to_vec());
        self.now.clone_from(&found);
        let (begun, backing_name) = ((self.clock)(), self.backing_name.clone());
        self.history.states.push(State { begun, durable: usize::MAX, contents: found, backing_name });
        let listed = disk.get().bitmaps()?;
        for bitmap in &mut self.history.bitmaps {
            bitmap.was_found(listed.iter().any(|entry| entry.name == bitmap.name && entry.auto));
        }
        Ok(())
    }

    /// The image, opened for writing if it is not.
    fn disk(&mut self) -> BlockResult<&Qcow2> {
        if self.disk.is_none() {
            self.killed = Faults::new();
            let files = self.files.map(|file| {
                Arc::new(FaultStorage::new(Arc::clone(file), self.killed.clone())) as Arc<dyn Storage>
            });
            self.disk = Some(self.start.open(&files, true)?);
        }
        self.disk.as_ref().ok_or_else(|| BlockError::new(ErrorKind::Io, "open"))
    }

    /// The guest bytes that `op` writes.
    fn changed(&self, op: Op, step: u64) -> ByteRange {
        let len = self.now.len() as u64;
        match op {
            Op::Grow => ByteRange::new(len, op.new_len(self.start, step, len)),
            _ => op.range(self.start, step, len),
        }
    }

    fn act(&mut self, op: Op, step: u64, wanted: &mut State) -> Result<(), StepError> {
        let len = self.now.len() as u64;
        let range = op.range(self.start, step, len);
        let bytes = range.start() as usize..range.end() as usize;
        if self.start.contents == Contents::Dirty {
            self.disk()?;
        }
        match op {
            Op::Write4K | Op::WriteCluster | Op::WriteAcross => {
                let data = pattern(step as u8 + 1, range.start(), range.len());
                wanted.contents[bytes].copy_from_slice(&data);
                self.disk()?.write_at(&data, range.start(), WriteFlags::NONE)?;
            }
            Op::WriteCompressed => {
                let make = if step % 3 == 1 { noise } else { pattern };
                let data = make(step as u8 + 1, range.start(), range.len());
                wanted.contents[bytes].copy_from_slice(&data);
                self.disk()?.write_compressed(&data, range.start())?;
            }
            Op::Zero => {
                wanted.contents[bytes].fill(0);
                let flags = if step.is_multiple_of(2) { ZeroFlags::MAY_UNMAP } else { ZeroFlags::NONE };
                self.disk()?.write_zeroes(range, flags)?;
            }
            Op::Discard => self.discard(range, wanted)?,
            Op::Flush => self.flush(wanted)?,
            Op::Grow | Op::Shrink => {
                let (begun, new_len) = ((self.clock)(), op.new_len(self.start, step, len));
                self.history.cut_bitmaps(new_len, begun);
                wanted.contents.resize(new_len as usize, 0);
                self.disk()?.resize(new_len, true)?;
                wanted.durable = (self.clock)();
            }
            Op::Rename => {
                let name = format!("other{step}").into_bytes();
                wanted.backing_name = Some(name.clone());
                self.disk()?.set_backing_file(Some(&name), Some("raw"))?;
                wanted.durable = (self.clock)();
            }
            Op::Commit => self.commit(wanted)?,
            Op::Snapshot | Op::Apply | Op::DeleteSnapshot => self.snapshot_operation(op, step, wanted)?,
            Op::AddBitmap => self.add_bitmap(step, wanted)?,
            Op::RemoveBitmap | Op::ToggleBitmap | Op::MergeBitmap => self.change_bitmap(op, wanted)?,
            Op::StoreBitmaps => self.disk()?.store_bitmaps()?,
            Op::Repair => self.repair(wanted)?,
            Op::AmendVersion | Op::AmendWidth => self.amend(op, wanted)?,
            Op::Kill | Op::Close => self.end(op, wanted)?,
            Op::OpenDirty => self.open_dirty(wanted)?,
        }
        Ok(())
    }

    fn flush(&mut self, wanted: &mut State) -> Result<(), StepError> {
        self.disk()?.flush()?;
        wanted.durable = (self.clock)();
        Ok(())
    }

    /// Either answer is right for what was discarded, also after a crash.
    fn discard(&mut self, range: ByteRange, wanted: &mut State) -> Result<(), StepError> {
        let bytes = range.start() as usize..range.end() as usize;
        wanted.contents[bytes.clone()].fill(0);
        self.history.states.push(wanted.clone());
        self.disk()?.discard(range)?;
        let mut found = vec![0; bytes.len()];
        self.disk()?.read_at(&mut found, range.start())?;
        if found.iter().zip(&self.now[bytes.clone()]).any(|(found, old)| found != old && *found != 0) {
            return Err(StepError::Wrong("a discard left neither the old data nor zeros".into()));
        }
        wanted.contents[bytes].copy_from_slice(&found);
        Ok(())
    }
}

/// An image that is open, or that was opened to look into it.
pub(crate) enum Seen<'a> {
    Open(&'a Qcow2),
    Again(Box<Qcow2>),
}

impl Seen<'_> {
    pub(crate) fn get(&self) -> &Qcow2 {
        match self {
            Self::Open(disk) => disk,
            Self::Again(disk) => disk,
        }
    }
}

impl Start {
    fn open_or<'a>(self, disk: Option<&'a Qcow2>, files: &ImageFiles) -> BlockResult<Seen<'a>> {
        match disk {
            Some(disk) => Ok(Seen::Open(disk)),
            None => Ok(Seen::Again(Box::new(self.open(files, false)?))),
        }
    }
}

fn read_file(storage: &dyn Storage) -> BlockResult<Vec<u8>> {
    let mut bytes = vec![0; storage.len()? as usize];
    storage.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// All bytes of the disk.
pub(crate) fn read_all(disk: &Qcow2) -> BlockResult<Vec<u8>> {
    let mut contents = vec![0; disk.len() as usize];
    disk.read_at(&mut contents, 0)?;
    Ok(contents)
}
