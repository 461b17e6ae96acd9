//! The queue of a virtual device: one thread with 32 requests in flight, which blocks in `poll` alone, while
//! its disk moves to another image, and on to a third.
//!
//! Its ring (here some threads, in a monitor io_uring) and the tap wake it by one eventfd. The verbs of
//! the job are another thread's.
//!
//! `cargo run -p blockmirror-mirror --example queue_thread`

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use blockmirror_block::testing::MemoryDisk;
use blockmirror_block::{self as block, BlockDevice, ByteRange, WriteFlags, ZeroFlags};
use blockmirror_mirror::{
    Begin, Change, CopyMode, Event, GuestQueue, MirrorJob, MirrorOptions, ReadTicket, Tap, WriteTicket,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

type AnyError = Box<dyn std::error::Error + Send + Sync>;

const LEN: u64 = 16 << 20;
const BLOCK: u64 = 4096;
const IN_FLIGHT: u64 = 32;

pub(crate) fn main() -> Result<(), AnyError> {
    let disk = |name: &str| Arc::new(MemoryDisk::new(LEN).named(name));
    let (old, new, newest) = (disk("old"), disk("new"), disk("newest"));
    let tap = Tap::new(Arc::clone(&old) as _);
    let stop = Arc::new(AtomicBool::new(false));
    let device = thread::spawn({
        let (tap, stop) = (Arc::clone(&tap), Arc::clone(&stop));
        move || Device::new(&tap)?.run(&stop)
    });
    let moved = move_over(&tap, &new, CopyMode::Background)
        .and_then(|()| move_over(&tap, &newest, CopyMode::WriteBlocking));
    stop.store(true, Ordering::Relaxed);
    let report = device.join().map_err(|_| "the queue panicked")??;
    moved?;
    for (index, byte) in report.content.iter().enumerate() {
        let mut found = [0; 1];
        newest.read_at(&mut found, index as u64 * BLOCK)?;
        assert_eq!(found[0], *byte, "block {index}");
    }
    let Report { requests, refused, longest, .. } = report;
    println!("{requests} requests, {refused} refusals, none lost; the longest turn took {longest:?}");
    Ok(())
}

/// What the thread of the verbs does.
fn move_over(tap: &Arc<Tap>, target: &Arc<MemoryDisk>, mode: CopyMode) -> Result<(), AnyError> {
    let job = MirrorJob::attach(tap, Arc::clone(target) as _, MirrorOptions::new().copy_mode(mode))?;
    while let Some(event) = job.control().next_event(None) {
        if event == Event::Ready {
            job.control().complete()?;
        }
    }
    job.wait()?;
    println!("{mode}: now on {:?}", tap.device().name());
    Ok(())
}

/// The requests of the guest. Each slot has blocks of its own.
#[derive(Clone, Copy)]
struct Request {
    /// `None`: it is a read.
    change: Option<Change>,
    block: u64,
    byte: u8,
}

impl Request {
    fn number(count: u64, slot: u64) -> Self {
        let change = match count % 8 {
            0 | 1 => None,
            2 => Some(Change::Zeroes),
            3 => Some(Change::Discard),
            _ => Some(Change::Data),
        };
        let block = (count * 7919 % (LEN / BLOCK / IN_FLIGHT)) * IN_FLIGHT + slot;
        Self { change, block, byte: (count % 255) as u8 + 1 }
    }

    fn range(self) -> ByteRange {
        ByteRange::at(self.block * BLOCK, BLOCK)
    }

    /// What a ring does with it at `disk`.
    fn perform(self, disk: &dyn BlockDevice) -> block::Result<()> {
        let range = self.range();
        match self.change {
            None => disk.read_at(&mut [0; BLOCK as usize], range.start()),
            Some(Change::Zeroes) => disk.write_zeroes(range, ZeroFlags::MAY_UNMAP),
            Some(Change::Discard) => disk.discard(range),
            Some(_) => disk.write_at(&[self.byte; BLOCK as usize], range.start(), WriteFlags::NONE),
        }
    }

    /// What a block reads as after it, for these disks.
    fn leaves(self) -> Option<u8> {
        self.change.map(|change| if change == Change::Data { self.byte } else { 0 })
    }
}

/// Where a request is. The tickets are owned: they are kept with it.
enum Slot {
    Idle,
    /// It would have had to wait.
    Refused(Request),
    Read(ReadTicket),
    AtSource(Request, WriteTicket),
    AtTarget(Request, WriteTicket),
}

struct Report {
    requests: u64,
    refused: u64,
    longest: Duration,
    content: Vec<u8>,
}

struct Device {
    tap: GuestQueue,
    ring: Ring,
    event: Arc<OwnedFd>,
    /// The tap's waker was called.
    woken: Arc<AtomicBool>,
    slots: Vec<Slot>,
    /// When a refused request is asked for again, if nothing wakes the thread before.
    ask_again: Option<Instant>,
    report: Report,
}

impl Device {
    fn new(tap: &Arc<Tap>) -> Result<Self, AnyError> {
        let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let woken = Arc::new(AtomicBool::new(false));
        let (flag, wakes) = (Arc::clone(&woken), Arc::clone(&event));
        let tap = tap.queue(move || {
            flag.store(true, Ordering::Release);
            signal(&wakes);
        });
        let ring = Ring::new(Arc::clone(&event));
        let slots = (0..IN_FLIGHT).map(|_| Slot::Idle).collect();
        let content = vec![0; (LEN / BLOCK) as usize];
        let report = Report { requests: 0, refused: 0, longest: Duration::ZERO, content };
        Ok(Self { tap, ring, event, woken, slots, ask_again: None, report })
    }

    fn run(mut self, stop: &AtomicBool) -> Result<Report, AnyError> {
        loop {
            let begun = Instant::now();
            while let Ok((slot, result)) = self.ring.done.try_recv() {
                self.completed(slot, result)?;
            }
            let in_time = self.ask_again.is_some_and(|at| at <= begun);
            let ask = self.woken.swap(false, Ordering::AcqRel) || in_time;
            if ask {
                self.ask_again = None;
            }
            for slot in 0..self.slots.len() {
                match self.slots[slot] {
                    Slot::Idle if !stop.load(Ordering::Relaxed) => {
                        self.report.requests += 1;
                        self.begin(slot, Request::number(self.report.requests, slot as u64))?;
                    }
                    Slot::Refused(request) if ask => self.begin(slot, request)?,
                    _ => {}
                }
            }
            self.report.longest = self.report.longest.max(begun.elapsed());
            if self.slots.iter().all(|slot| matches!(slot, Slot::Idle)) {
                return Ok(self.report);
            }
            self.sleep()?;
        }
    }

    /// The only place where the thread blocks.
    fn sleep(&self) -> Result<(), AnyError> {
        let left = self.ask_again.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.map(Timespec::try_from).transpose()?;
        let mut fds = [PollFd::new(&*self.event, PollFlags::IN)];
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // Not readable: its time is up.
        let _ = rustix::io::read(&*self.event, &mut [0; 8]);
        Ok(())
    }

    fn begin(&mut self, slot: usize, request: Request) -> block::Result<()> {
        let Some(change) = request.change else {
            let ticket = self.tap.begin_read();
            self.ring.submit(slot, request, Arc::clone(ticket.source()));
            self.slots[slot] = Slot::Read(ticket);
            return Ok(());
        };
        self.slots[slot] = match self.tap.try_begin_change(change, request.range())? {
            Begin::Go(ticket) => {
                self.ring.submit(slot, request, Arc::clone(ticket.source()));
                Slot::AtSource(request, ticket)
            }
            Begin::Wait { within } => {
                self.report.refused += 1;
                let at = within.map(|within| Instant::now() + within);
                self.ask_again = self.ask_again.into_iter().chain(at).min();
                Slot::Refused(request)
            }
        };
        Ok(())
    }

    /// The ring has performed what was submitted for this slot.
    fn completed(&mut self, slot: usize, result: block::Result<()>) -> block::Result<()> {
        match std::mem::replace(&mut self.slots[slot], Slot::Idle) {
            Slot::Idle | Slot::Refused(_) => {}
            Slot::Read(ticket) => {
                drop(ticket);
                return result;
            }
            Slot::AtSource(request, ticket) => {
                // What a discard leaves is read and written by the job here.
                let mirrors = result.is_ok() && ticket.change() != Change::Discard;
                if let Some(target) = mirrors.then(|| ticket.target()).flatten() {
                    self.ring.submit(slot, request, target);
                    self.slots[slot] = Slot::AtTarget(request, ticket);
                    return Ok(());
                }
                ticket.complete(result, None)?;
                self.written(request);
            }
            Slot::AtTarget(request, ticket) => {
                // A failure there is the job's affair.
                ticket.complete(Ok(()), Some(result))?;
                self.written(request);
            }
        }
        Ok(())
    }

    fn written(&mut self, request: Request) {
        if let Some(byte) = request.leaves() {
            self.report.content[request.block as usize] = byte;
        }
    }
}

fn signal(event: &OwnedFd) {
    // Any number will do; where the sum would be too large it is readable already.
    let _ = rustix::io::write(event, &1_u64.to_be_bytes());
}

/// A submission of the ring.
type Submission = (usize, Request, Arc<dyn BlockDevice>);

/// Stands for io_uring: takes submissions without blocking, and signals completions.
struct Ring {
    submissions: mpsc::Sender<Submission>,
    done: mpsc::Receiver<(usize, block::Result<()>)>,
}

impl Ring {
    fn new(event: Arc<OwnedFd>) -> Self {
        let ((submissions, taken), (completed, done)) = (mpsc::channel::<Submission>(), mpsc::channel());
        let taken = Arc::new(Mutex::new(taken));
        for _ in 0..2 {
            let (taken, completed, event) = (Arc::clone(&taken), completed.clone(), Arc::clone(&event));
            thread::spawn(move || {
                loop {
                    let next = taken.lock().ok().and_then(|taken| taken.recv().ok());
                    let Some((slot, request, disk)) = next else { return };
                    if completed.send((slot, request.perform(&*disk))).is_err() {
                        return;
                    }
                    signal(&event);
                }
            });
        }
        Self { submissions, done }
    }

    fn submit(&self, slot: usize, request: Request, disk: Arc<dyn BlockDevice>) {
        // Its threads end after this has gone.
        let _ = self.submissions.send((slot, request, disk));
    }
}
