//! A disk or a storage under rules.
//!
//! The two share `Blkdebug`: it cuts requests to the sizes that were asked for, tells the rules what happens,
//! and fails what they say. A request that is cut may so be done in part when it fails.

use std::io;
use std::sync::Arc;

use blockmirror_block::sync::Mutex;
use blockmirror_block::{
    BlockDevice, ByteRange, Error, ErrorKind, Extent, Geometry, Result, Storage, StorageEvent, StorageExtent,
    StorageInfo, Visit, WriteFlags, ZeroFlags,
};

use super::event::{Event, IoType};
use super::options::{BlkdebugError, BlkdebugOptions};
use super::rules::Rules;

/// Zeros that are written as data go in pieces of this.
const ZEROS: u64 = 64 << 10;

/// The rules and sizes of one node.
#[derive(Debug)]
struct Blkdebug {
    name: Arc<str>,
    options: BlkdebugOptions,
    /// Reads and writes of guest data are announced by the format above; otherwise each request is one.
    announced: bool,
    rules: Mutex<Rules>,
}

/// What zeroing a range comes to.
enum Zeroing {
    /// It is passed on as it is.
    Pass(ByteRange),
    /// Zero bytes are written.
    Write(ByteRange),
}

impl Blkdebug {
    fn new(name: &str, request_alignment: u32, mut options: BlkdebugOptions) -> Result<Self, BlkdebugError> {
        options.check(request_alignment)?;
        let inject = std::mem::take(&mut options.inject_error);
        let set = std::mem::take(&mut options.set_state);
        let rules = Mutex::new(Rules::new(inject, set));
        Ok(Self { name: Arc::from(name), options, announced: false, rules })
    }

    fn align(&self, child: u32) -> u32 {
        // Below 2^31, as was checked.
        child.max(self.options.align as u32)
    }

    /// Tells the rules of `events`, then asks them about a request.
    fn ask(
        &self,
        events: &[Event],
        io: IoType,
        range: Option<ByteRange>,
        operation: &'static str,
    ) -> Result<()> {
        let verdict = {
            let mut rules = self.rules.lock();
            if rules.is_empty() {
                return Ok(());
            }
            events.iter().for_each(|event| rules.happens(*event));
            rules.verdict(io, range)
        };
        let Some(errno) = verdict else { return Ok(()) };
        let error = Error::io(operation, io::Error::from_raw_os_error(errno)).in_file(Arc::clone(&self.name));
        Err(match range {
            Some(range) => error.at(range.start()),
            None => error,
        })
    }

    fn tell(&self, event: Event) {
        self.rules.lock().happens(event);
    }

    /// The parts of a request of `len` bytes at `offset`, with where each begins in its buffer.
    fn parts(&self, offset: u64, len: usize) -> impl Iterator<Item = (ByteRange, std::ops::Range<usize>)> {
        let whole = ByteRange::at(offset, len as u64);
        // An empty request is a request.
        let empty = whole.is_empty().then_some(whole);
        empty.into_iter().chain(whole.pieces(limit(self.options.max_transfer))).map(move |part| {
            let start = (part.start() - offset) as usize;
            (part, start..start + part.len() as usize)
        })
    }

    fn read(&self, buf: &mut [u8], offset: u64, read: impl Fn(&mut [u8], u64) -> Result<()>) -> Result<()> {
        for (part, bytes) in self.parts(offset, buf.len()) {
            let events: &[Event] = if self.announced { &[] } else { &[Event::ReadAio] };
            self.ask(events, IoType::Read, Some(part), "read")?;
            read(&mut buf[bytes], part.start())?;
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64, write: impl Fn(&[u8], u64) -> Result<()>) -> Result<()> {
        for (part, bytes) in self.parts(offset, buf.len()) {
            let events: &[Event] =
                if self.announced { &[Event::Pwritev] } else { &[Event::WriteAio, Event::Pwritev] };
            let done = self
                .ask(events, IoType::Write, Some(part), "write")
                .and_then(|()| write(&buf[bytes], part.start()));
            self.tell(Event::PwritevDone);
            done?;
        }
        Ok(())
    }

    fn zero(
        &self,
        range: ByteRange,
        flags: ZeroFlags,
        zero: impl Fn(ByteRange) -> Result<()>,
        write: impl Fn(&[u8], u64) -> Result<()>,
    ) -> Result<()> {
        let parts = self.zeroing(range);
        let falls_back = |part: &Zeroing| matches!(part, Zeroing::Write(_));
        if flags.contains(ZeroFlags::NO_FALLBACK) && parts.iter().any(falls_back) {
            let error = Error::new(ErrorKind::Unsupported, "write zeroes").at(range.start());
            return Err(error.in_file(Arc::clone(&self.name)).because(format!(
                "the range is not aligned to opt-write-zero {}",
                self.options.opt_write_zero
            )));
        }
        for part in parts {
            match part {
                Zeroing::Pass(part) => {
                    for part in part.pieces(limit(self.options.max_write_zero)) {
                        let done = self
                            .ask(&[Event::PwritevZero], IoType::WriteZeroes, Some(part), "write zeroes")
                            .and_then(|()| zero(part));
                        self.tell(Event::PwritevDone);
                        done?;
                    }
                }
                Zeroing::Write(part) => {
                    for part in part.pieces(ZEROS) {
                        // At most 64 KiB.
                        self.write(&vec![0; part.len() as usize], part.start(), &write)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn zeroing(&self, range: ByteRange) -> Vec<Zeroing> {
        let unit = self.options.opt_write_zero.max(1);
        let whole = inward(range, unit);
        if whole.is_empty() {
            return vec![if unit == 1 { Zeroing::Pass(range) } else { Zeroing::Write(range) }];
        }
        let head = ByteRange::new(range.start(), whole.start());
        let tail = ByteRange::new(whole.end(), range.end());
        vec![Zeroing::Write(head), Zeroing::Pass(whole), Zeroing::Write(tail)]
            .into_iter()
            .filter(|part| !matches!(part, Zeroing::Write(part) if part.is_empty()))
            .collect()
    }

    fn discard(&self, range: ByteRange, discard: impl Fn(ByteRange) -> Result<()>) -> Result<()> {
        // A discard is a hint: what is not aligned is left as it is.
        for part in inward(range, self.options.opt_discard.max(1)).pieces(limit(self.options.max_discard)) {
            self.ask(&[], IoType::Discard, Some(part), "discard")?;
            discard(part)?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.ask(&[Event::FlushToOs, Event::FlushToDisk], IoType::Flush, None, "flush")
    }
}

fn limit(size: u64) -> u64 {
    if size == 0 { u64::MAX } else { size }
}

/// The whole `unit`s (any number) inside `range`.
fn inward(range: ByteRange, unit: u64) -> ByteRange {
    let start = range.start().checked_next_multiple_of(unit).unwrap_or(range.end());
    ByteRange::new(start.min(range.end()), range.end() - range.end() % unit)
}

/// A disk under rules.
#[derive(Debug)]
pub struct BlkdebugDisk {
    child: Arc<dyn BlockDevice>,
    core: Blkdebug,
}

impl BlkdebugDisk {
    /// `child` under the rules of `options`.
    ///
    /// # Errors
    /// Options that make no sense together, or on this child.
    pub fn new(child: Arc<dyn BlockDevice>, options: BlkdebugOptions) -> Result<Self, BlkdebugError> {
        let core = Blkdebug::new(child.name(), child.geometry().request_alignment, options)?;
        Ok(Self { child, core })
    }

    /// The device below.
    pub fn child(&self) -> &Arc<dyn BlockDevice> {
        &self.child
    }
}

impl BlockDevice for BlkdebugDisk {
    fn len(&self) -> u64 {
        self.child.len()
    }

    fn name(&self) -> &str {
        self.child.name()
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.child.geometry();
        geometry.request_alignment = self.core.align(geometry.request_alignment);
        geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.core.read(buf, offset, |buf, at| self.child.read_at(buf, at))
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        self.core.write(buf, offset, |buf, at| self.child.write_at(buf, at, flags))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.core.zero(
            range,
            flags,
            |part| self.child.write_zeroes(part, flags),
            |buf, at| self.child.write_at(buf, at, flags.into()),
        )
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.core.discard(range, |part| self.child.discard(part))
    }

    fn flush(&self) -> Result<()> {
        self.core.flush()?;
        self.child.flush()
    }

    /// Without places in host files: no rule would see who reads there.
    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        self.core.ask(&[], IoType::BlockStatus, Some(range), "map")?;
        self.child.extents(range, &mut |mut extent| {
            extent.host = None;
            visit(extent)
        })
    }

    fn resize(&self, len: u64, may_shrink: bool) -> Result<()> {
        self.child.resize(len, may_shrink)
    }

    fn copy_up(&self, range: ByteRange, max_depth: u32) -> Result<u64> {
        self.core.ask(&[Event::CorWrite], IoType::Write, Some(range), "copy up")?;
        self.child.copy_up(range, max_depth)
    }

    fn forwards_to(&self) -> Option<Arc<dyn BlockDevice>> {
        Some(Arc::clone(&self.child))
    }

    fn write_would_wait(&self, range: ByteRange) -> bool {
        self.child.write_would_wait(range)
    }

    fn cancel_in_flight(&self) {
        self.child.cancel_in_flight();
    }
}

/// A storage under rules. Changes of its length and reservations have no rules.
#[derive(Debug)]
pub struct BlkdebugStorage {
    child: Arc<dyn Storage>,
    core: Blkdebug,
}

impl BlkdebugStorage {
    /// `child` under the rules of `options`.
    ///
    /// # Errors
    /// Options that make no sense together, or on this child.
    pub fn new(child: Arc<dyn Storage>, options: BlkdebugOptions) -> Result<Self, BlkdebugError> {
        let core = Blkdebug::new(child.name(), child.info().request_alignment, options)?;
        Ok(Self { child, core })
    }

    /// The format above announces its reads and writes of guest data ([`Storage::announce`]): the events
    /// [`ReadAio`](Event::ReadAio) and [`WriteAio`](Event::WriteAio) are these, and not all requests.
    #[must_use]
    pub fn announced(mut self) -> Self {
        self.core.announced = true;
        self
    }
}

impl Storage for BlkdebugStorage {
    fn name(&self) -> &str {
        self.child.name()
    }

    fn len(&self) -> Result<u64> {
        self.child.len()
    }

    fn info(&self) -> StorageInfo {
        let mut info = self.child.info();
        info.request_alignment = self.core.align(info.request_alignment);
        info
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.core.read(buf, offset, |buf, at| self.child.read_at(buf, at))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.core.write(buf, offset, |buf, at| self.child.write_at(buf, at))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.core.zero(
            range,
            flags,
            |part| self.child.write_zeroes(part, flags),
            |buf, at| self.child.write_at(buf, at),
        )
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.core.discard(range, |part| self.child.discard(part))
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.child.allocate(range)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.child.set_len(len)
    }

    fn flush(&self) -> Result<()> {
        self.core.flush()?;
        self.child.flush()
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(StorageExtent) -> Visit) -> Result<()> {
        self.core.ask(&[], IoType::BlockStatus, Some(range), "map")?;
        self.child.extents(range, visit)
    }

    fn cancel_in_flight(&self) {
        self.child.cancel_in_flight();
    }

    fn announce(&self, event: StorageEvent) {
        match event {
            StorageEvent::ReadAio | StorageEvent::WriteAio if !self.core.announced => {}
            StorageEvent::ReadAio => self.core.tell(Event::ReadAio),
            StorageEvent::WriteAio => self.core.tell(Event::WriteAio),
            event => self.core.tell(Event::Format(event)),
        }
    }

    fn allocated_bytes(&self) -> Result<Option<u64>> {
        self.child.allocated_bytes()
    }
}

#[cfg(test)]
mod tests {
    use blockmirror_block::testing::{DiskOp, MemoryDisk, MemoryStorage};

    use super::super::options::InjectError;
    use super::*;

    fn disk(options: BlkdebugOptions) -> (Arc<MemoryDisk>, BlkdebugDisk) {
        let child = Arc::new(MemoryDisk::new(1 << 20).with_cluster_size(4096).named("d").logged());
        let disk = BlkdebugDisk::new(Arc::clone(&child) as _, options).unwrap();
        (child, disk)
    }

    #[test]
    fn requests_are_cut_to_the_sizes_asked_for() {
        let (child, disk) = disk(BlkdebugOptions {
            align: 4096,
            max_transfer: 8192,
            opt_write_zero: 16384,
            max_write_zero: 32768,
            opt_discard: 4096,
            max_discard: 8192,
            ..Default::default()
        });
        assert_eq!(disk.geometry().request_alignment, 4096);
        assert_eq!(disk.geometry().cluster_size, Some(4096));
        let r = ByteRange::new;
        disk.write_at(&[1; 12288], 4096, WriteFlags::NONE).unwrap();
        let none = WriteFlags::NONE;
        assert_eq!(
            child.take_log(),
            [DiskOp::Write(r(4096, 8192), none), DiskOp::Write(r(8192, 16384), none)]
        );
        disk.write_zeroes(r(12288, 98304), ZeroFlags::NONE).unwrap();
        assert_eq!(
            child.take_log(),
            [
                DiskOp::Write(r(12288, 16384), none),
                DiskOp::WriteZeroes(r(16384, 32768), ZeroFlags::NONE),
                DiskOp::WriteZeroes(r(32768, 65536), ZeroFlags::NONE),
                DiskOp::WriteZeroes(r(65536, 98304), ZeroFlags::NONE),
            ]
        );
        let refused = disk.write_zeroes(r(12288, 98304), ZeroFlags::NO_FALLBACK).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        disk.discard(r(1, 12288)).unwrap();
        assert_eq!(child.take_log(), [DiskOp::Discard(r(4096, 8192)), DiskOp::Discard(r(8192, 12288))]);
    }

    #[test]
    fn a_rule_fails_the_request_and_names_it() {
        let rule =
            InjectError { errno: 28, sector: Some(8), once: true, ..InjectError::new(Event::WriteAio) };
        let (child, disk) = disk(BlkdebugOptions { inject_error: vec![rule], ..Default::default() });
        disk.write_at(&[1; 4096], 0, WriteFlags::NONE).unwrap();
        let error = disk.write_at(&[1; 4096], 4096, WriteFlags::NONE).unwrap_err();
        assert_eq!(error.to_string(), "write: d at 4096: No space left on device (os error 28)");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        disk.write_at(&[1; 4096], 4096, WriteFlags::NONE).unwrap();
        assert_eq!(child.take_log().len(), 2);
    }

    #[test]
    fn a_flush_fails_by_its_event() {
        let rule = InjectError { once: true, ..InjectError::new(Event::FlushToDisk) };
        let (child, disk) = disk(BlkdebugOptions { inject_error: vec![rule], ..Default::default() });
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::Io);
        disk.flush().unwrap();
        assert_eq!(child.take_log(), [DiskOp::Flush]);
    }

    /// The rule is armed by the step, and then fails requests of every kind.
    #[test]
    fn a_step_of_the_format_arms_a_rule() {
        let rule = InjectError::new(Event::from_name("cluster_free").unwrap());
        let options = BlkdebugOptions { inject_error: vec![rule], ..Default::default() };
        let storage = BlkdebugStorage::new(Arc::new(MemoryStorage::new()), options).unwrap();
        storage.announce(StorageEvent::L2Load);
        storage.write_at(&[1; 512], 0).unwrap();
        storage.announce(StorageEvent::ClusterFree);
        assert_eq!(storage.write_at(&[1; 512], 0).unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(storage.read_at(&mut [0; 512], 0).unwrap_err().kind(), ErrorKind::Io);
    }

    #[test]
    fn reads_of_guest_data_are_those_that_the_format_announces() {
        let rule = InjectError { once: true, ..InjectError::new(Event::ReadAio) };
        let options = BlkdebugOptions { inject_error: vec![rule], ..Default::default() };
        let storage = BlkdebugStorage::new(Arc::new(MemoryStorage::new()), options).unwrap().announced();
        storage.read_at(&mut [0; 512], 0).unwrap();
        storage.announce(StorageEvent::ReadAio);
        storage.read_at(&mut [0; 512], 0).unwrap_err();
        storage.read_at(&mut [0; 512], 0).unwrap();
    }

    #[test]
    fn sizes_that_are_no_power_of_two_align_too() {
        let r = ByteRange::new;
        assert_eq!(inward(r(1, 1000), 300), r(300, 900));
        assert!(inward(r(1, 299), 300).is_empty());
        assert!(inward(r(u64::MAX - 1, u64::MAX), 300).is_empty());
    }
}
