//! A writer: random requests to the tap, and notes of what must be on the disk.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blockmirror_block::{self as block, BlockDevice, ByteRange, ErrorKind, WriteFlags, ZeroFlags};

use super::contended::{Kind, Note, Sight};
use super::layout::SECTOR;
use super::model::{Done, Model};
use super::world::World;
use super::{difference, paint, slice_of};
use blockmirror_block::testing::Rng;
use blockmirror_testing::Outcome;

/// While everything is kept a writer rests when it has kept so many bytes.
const MOST_KEPT: usize = 16 << 20;
/// The longest write.
const LONGEST: u64 = 64 << 10;
/// A request that fails because a fault was injected is repeated so often.
const TRIES: usize = 500;

/// Writes until the gate says that it is over.
pub(super) fn write(world: &World, writer: usize, seed: u64) {
    let mut writer = Writer { world, id: writer, rng: Rng::new(seed, 100 + writer as u64), buf: Vec::new() };
    while world.gate.pass() {
        if let Err(error) = writer.step() {
            world.failure.lock().get_or_insert(format!("writer {}: {error}", writer.id));
            break;
        }
        world.wait_a_bit();
    }
    world.gate.leave();
}

struct Writer<'a> {
    world: &'a World,
    id: usize,
    rng: Rng,
    buf: Vec<u8>,
}

impl Writer<'_> {
    fn step(&mut self) -> Outcome {
        match self.rng.below(100) {
            0 => self.guest("flush", |world| world.tap.flush()),
            1..20 => self.read_own(),
            20..25 => self.read_shared(),
            _ => self.change(),
        }
    }

    /// Does a request, again if it failed because of an injected fault.
    fn guest(&self, what: &str, request: impl Fn(&World) -> block::Result<()>) -> Outcome {
        let counts = &self.world.counts;
        for _ in 0..TRIES {
            let start = Instant::now();
            let result = request(self.world);
            let took = start.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
            counts.longest.fetch_max(took, Ordering::Relaxed);
            match result {
                Ok(()) => return Ok(()),
                Err(error) => {
                    let injected = matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace);
                    if !injected || !self.world.faulty.load(Ordering::Relaxed) {
                        return Err(format!("{what}: {error}").into());
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(format!("{what} failed {TRIES} times").into())
    }

    fn read_own(&mut self) -> Outcome {
        let world = self.world;
        let model = world.models[self.id].lock();
        let stripe = &model.stripes[self.rng.below(model.stripes.len() as u64) as usize];
        let range = self.part(stripe.range);
        let found = self.read(range)?;
        world.counts.reads.fetch_add(1, Ordering::Relaxed);
        match difference(&found, &stripe.bytes[slice_of(stripe.range, range)], range.start()) {
            Some(difference) => Err(format!("reads its own part wrong {difference}").into()),
            None => Ok(()),
        }
    }

    fn read_shared(&mut self) -> Outcome {
        let world = self.world;
        let range = self.sectors();
        let began = world.tick();
        let found = self.read(range)?;
        let ended = world.tick();
        world.counts.reads.fetch_add(1, Ordering::Relaxed);
        let sight = |note: &Note| match note {
            note if note.end < began => Sight::Must,
            note if note.begin < ended => Sight::May,
            _ => Sight::Not,
        };
        match world.contended.judge(range, &found, sight) {
            Some(wrong) => Err(format!("reads in {began}..{ended}: {wrong}").into()),
            None => Ok(()),
        }
    }

    fn read(&self, range: ByteRange) -> Outcome<Vec<u8>> {
        let mut found = vec![0xee; range.len() as usize];
        let cell = std::cell::RefCell::new(&mut found);
        self.guest("read", |world| world.tap.read_at(&mut cell.borrow_mut(), range.start()))?;
        Ok(found)
    }

    /// A numbered operation: a mark, or something else.
    fn change(&mut self) -> Outcome {
        let world = self.world;
        let keep_all = world.recording.load(Ordering::SeqCst);
        let mut model = world.models[self.id].lock();
        if keep_all && model.kept > MOST_KEPT {
            drop(model);
            std::thread::sleep(Duration::from_millis(1));
            return Ok(());
        }
        let n = model.n + 1;
        world.counts.operations.fetch_add(1, Ordering::Relaxed);
        if n.is_multiple_of(2) {
            let stripe = (n / 2 % 2) as usize;
            let range = model.stripes[stripe].range;
            self.change_own(&mut model, n, stripe, range, Kind::Write, keep_all)?;
        } else if self.rng.chance(25) {
            self.change_shared(&mut model, n, keep_all)?;
        } else {
            let count = model.stripes.len() as u64;
            // Half of the time one of a few hot ones.
            let stripe = 2 + if self.rng.chance(50) { self.rng.below(4) } else { self.rng.below(count - 2) };
            let range = self.part(model.stripes[stripe as usize].range);
            let kind = self.kind();
            self.change_own(&mut model, n, stripe as usize, range, kind, keep_all)?;
        }
        model.n = n;
        Ok(())
    }

    fn kind(&mut self) -> Kind {
        match self.rng.below(100) {
            0..12 => Kind::Zero,
            12..20 => Kind::Discard,
            _ => Kind::Write,
        }
    }

    fn change_own(
        &mut self,
        model: &mut Model,
        n: u64,
        stripe: usize,
        range: ByteRange,
        kind: Kind,
        keep_all: bool,
    ) -> Outcome {
        let place = slice_of(model.stripes[stripe].range, range);
        let old = model.stripes[stripe].bytes[place.clone()].to_vec();
        let begin = self.world.tick();
        model.push(Done { n, begin, end: u64::MAX, change: Some((range, old)) }, keep_all);
        self.request(n, range, kind)?;
        if let Some(done) = model.undo.back_mut() {
            done.end = self.world.tick();
        }
        let bytes = &mut model.stripes[stripe].bytes[place];
        match kind {
            Kind::Write => paint(bytes, range.start(), self.id, n),
            Kind::Zero => bytes.fill(0),
            Kind::Discard => {
                let found = self.read(range)?;
                if let Some(at) = found.iter().zip(&*bytes).position(|(new, old)| new != old && *new != 0) {
                    let place = range.start() + at as u64;
                    return Err(format!(
                        "discarded {range}; {place} holds {}, neither old nor zero",
                        super::describe(&found[at..], place)
                    )
                    .into());
                }
                bytes.copy_from_slice(&found);
            }
        }
        Ok(())
    }

    fn change_shared(&mut self, model: &mut Model, n: u64, keep_all: bool) -> Outcome {
        let world = self.world;
        let (range, kind) = (self.sectors(), self.kind());
        let begin = world.tick();
        let note = Note { writer: self.id, n, kind, range, begin, end: u64::MAX };
        model.push(Done { n, begin, end: u64::MAX, change: None }, keep_all);
        world.contended.begin(note);
        self.request(n, range, kind)?;
        let end = world.tick();
        world.contended.end(note, end);
        if let Some(done) = model.undo.back_mut() {
            done.end = end;
        }
        Ok(())
    }

    fn request(&mut self, n: u64, range: ByteRange, kind: Kind) -> Outcome {
        let mut buf = std::mem::take(&mut self.buf);
        match kind {
            Kind::Write => {
                buf.resize(range.len() as usize, 0);
                paint(&mut buf, range.start(), self.id, n);
                let (at, way) = (range.start(), self.rng.below(100));
                self.guest("write", |world| match way {
                    0..5 => world.tap.write_at(&buf, at, WriteFlags::FUA),
                    // As a VMM does that moves data in its own way; in the second case it knows nothing of
                    // targets.
                    5..15 => {
                        let ticket = world.tap.begin_write(range)?;
                        let result = ticket.source().write_at(&buf, at, WriteFlags::NONE);
                        let target = result.is_ok().then(|| ticket.target()).flatten();
                        let target = target.map(|target| target.write_at(&buf, at, WriteFlags::NONE));
                        ticket.complete(result, target)
                    }
                    15..20 => {
                        let ticket = world.tap.begin_write(range)?;
                        let result = ticket.source().write_at(&buf, at, WriteFlags::NONE);
                        ticket.complete(result, None)
                    }
                    20..22 => {
                        let ticket = world.tap.begin_write(range)?;
                        ticket.source().write_at(&buf, at, WriteFlags::NONE)
                    }
                    _ => world.tap.write_at(&buf, at, WriteFlags::NONE),
                })?;
                self.world.counts.written.fetch_add(range.len(), Ordering::Relaxed);
            }
            Kind::Zero => {
                let flags = self.rng.pick(&[ZeroFlags::NONE, ZeroFlags::MAY_UNMAP, ZeroFlags::FUA]);
                self.guest("write zeroes", |world| world.tap.write_zeroes(range, flags))?;
            }
            Kind::Discard => self.guest("discard", |world| world.tap.discard(range))?,
        }
        self.buf = buf;
        Ok(())
    }

    /// A part of a stripe, at odd bytes or in whole units of 4 KiB.
    fn part(&mut self, stripe: ByteRange) -> ByteRange {
        if stripe.len() <= SECTOR {
            return stripe;
        }
        let len = match self.rng.below(10) {
            0 => self.rng.range(1, 600),
            1..6 => self.rng.range(512, 8192),
            6..9 => self.rng.range(4096, 20_000),
            _ => self.rng.range(4096, LONGEST),
        };
        let len = len.min(stripe.len());
        let part = ByteRange::at(stripe.start() + self.rng.below(stripe.len() - len + 1), len);
        let whole = part.align_outward(4096);
        if stripe.contains_range(whole) && self.rng.chance(60) { whole } else { part }
    }

    /// Whole sectors of the part that all write to.
    fn sectors(&mut self) -> ByteRange {
        let shared = self.world.layout.shared;
        // Half of the time in its first block.
        let within = if self.rng.chance(50) { LONGEST } else { shared.len() };
        let most = if self.rng.chance(80) { 16 } else { LONGEST / SECTOR };
        let start = self.rng.below(within / SECTOR) * SECTOR;
        let len = (self.rng.range(1, most) * SECTOR).min(shared.len() - start);
        ByteRange::at(shared.start() + start, len)
    }
}
