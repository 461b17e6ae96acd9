//! The device: bounds, alignment to the server's blocks, splitting by its limits, extents.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockmirror_block::{
    Backing, BlockDevice, ByteRange, DiscardEffect, Error, ErrorKind, Extent, ExtentKind, ExtentMerger,
    Geometry, RangeLock, Result, Visit, WriteFlags, ZeroCost, ZeroFlags,
};

use super::connect::Connector;
use super::connection::Sink;
use super::connection_pool::ConnectionPool;
use super::error::ClientError;
use super::options::ClientOptions;
use super::refusal::Refusal;
use super::requests::Op;
use super::status::{Reading, Status};
use crate::NbdUri;
use crate::proto::{Command, CommandFlags, Errno, ReplyFormat, TransmissionFlags};

/// Longest request without a payload (zeroes, trim) where headers have 64-bit lengths. Older servers may
/// apply their payload limit to these too.
const LONG: u64 = 1 << 30;

/// Longest block status request: with 32-bit lengths, and with 64-bit ones.
const STATUS_COMPACT: u64 = 1 << 31;
const STATUS_EXTENDED: u64 = 1 << 36;

/// A server whose partial answers cover fewer bytes than this on average, over [`STATUS_SAMPLES`] of them, is
/// not asked any more: the rest counts as data.
const MIN_STATUS_BYTES: u64 = 4096;
const STATUS_SAMPLES: u64 = 1024;

/// Zero bytes to write where the server cannot zero.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// An export of an NBD server as a disk. Made by [`ClientOptions::open`].
///
/// # Lost connections
///
/// Requests under way wait for the server to come back as long as [`ClientOptions::reconnect_delay`] says,
/// and are done again then; a read or a write of the same bytes may so be done twice. If writes had been
/// completed and not flushed, the next flush fails once ([`ClientError::UnflushedLost`]): a server that was
/// killed has forgotten them, and the writer must write what was written since the last good flush again. If
/// the export has changed meanwhile (its size, whether it can be written), requests fail with
/// [`ClientError::Changed`].
pub struct Client {
    pool: Arc<ConnectionPool>,
    uri: NbdUri,
    name: Arc<str>,
    geometry: Geometry,
    /// Requests that the server refuses although it announced them.
    zeroes: Refusal,
    trim: Refusal,
    /// Orders writes of parts of a block against other writes of that block.
    blocks: RangeLock,
    /// Block status requests answered in part so far, and the bytes that those answers were about. Over all
    /// queries: a caller may end each of them early.
    answers: AtomicU64,
    answered: AtomicU64,
    /// How the flags of block status are read.
    reading: Reading,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("name", &self.name).field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.pool.close();
    }
}

/// A range in parts: whole blocks, and what is left of blocks before and after.
struct Parts {
    head: ByteRange,
    whole: ByteRange,
    tail: ByteRange,
}

impl ClientOptions {
    /// Connects.
    ///
    /// # Errors
    /// If the server cannot be reached, does not have the export, or breaks the protocol; the cause is a
    /// [`ClientError`](super::ClientError).
    pub fn open(self) -> Result<Client> {
        let name = self.uri.to_string();
        Client::connect(self).map_err(|e: Error| e.or_in_file(&name.into()))
    }
}

impl Client {
    fn connect(options: ClientOptions) -> Result<Self> {
        let (uri, writable) = (options.uri.clone(), options.writable);
        let reading = Reading::of(options.context.as_deref());
        let failed = |e: ClientError| Error::new(e.kind(), "open").caused_by(e);
        let pool = Connector::new(options).and_then(ConnectionPool::open).map_err(failed)?;
        let export = pool.export();
        let can = |flag| export.flags.contains(flag);
        if writable && can(TransmissionFlags::READ_ONLY) {
            pool.close();
            return Err(Error::new(ErrorKind::ReadOnly, "open").because("the export is read-only"));
        }
        let mut geometry = Geometry::plain();
        geometry.request_alignment = export.min_block;
        geometry.writable = writable;
        geometry.forgetful = true;
        geometry.backing = Backing::Remote { can_zero: can(TransmissionFlags::SEND_WRITE_ZEROES) };
        // Where zeros may be slow, they are no shortcut.
        if can(TransmissionFlags::SEND_WRITE_ZEROES) && can(TransmissionFlags::SEND_FAST_ZERO) {
            geometry.zero_cost = ZeroCost::Metadata;
        }
        geometry.can_flush = can(TransmissionFlags::SEND_FLUSH);
        if can(TransmissionFlags::SEND_TRIM) {
            geometry.discard = DiscardEffect::Frees;
        }
        Ok(Self {
            name: uri.to_string().into(),
            uri,
            pool,
            geometry,
            zeroes: Refusal::default(),
            trim: Refusal::default(),
            blocks: RangeLock::new(),
            answers: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            reading,
        })
    }

    /// Where the export is.
    pub fn uri(&self) -> &NbdUri {
        &self.uri
    }

    /// What the server says that the export can do.
    pub fn flags(&self) -> TransmissionFlags {
        self.pool.export().flags
    }

    /// Whether the server answers block status; if not, all counts as data.
    pub fn has_block_status(&self) -> bool {
        self.pool.export().base.is_some()
    }

    fn can(&self, flag: TransmissionFlags) -> bool {
        self.flags().contains(flag)
    }

    fn unit(&self) -> u64 {
        u64::from(self.pool.export().min_block)
    }

    fn check(&self, offset: u64, len: u64, operation: &'static str) -> Result<ByteRange> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(ByteRange::new(offset, end)),
            _ => {
                Err(Error::out_of_bounds(operation, offset, len, self.len()).in_file(Arc::clone(&self.name)))
            }
        }
    }

    fn check_write(&self, offset: u64, len: u64, operation: &'static str) -> Result<ByteRange> {
        if !self.geometry.writable {
            return Err(Error::new(ErrorKind::ReadOnly, operation)
                .in_file(Arc::clone(&self.name))
                .because("it was opened for reading only"));
        }
        self.check(offset, len, operation)
    }

    fn failed(&self, operation: &'static str, offset: u64, error: ClientError) -> Error {
        let refused = error.is_definite();
        let failed = Error::new(error.kind(), operation).in_file(Arc::clone(&self.name)).at(offset);
        failed.refused(refused).caused_by(error)
    }

    fn parts(&self, range: ByteRange) -> Parts {
        let whole = range.align_inward(self.unit());
        if whole.is_empty() {
            return Parts { head: range, whole, tail: ByteRange::default() };
        }
        Parts {
            head: ByteRange::new(range.start(), whole.start()),
            whole,
            tail: ByteRange::new(whole.end(), range.end()),
        }
    }

    fn call(
        &self,
        command: Command,
        flags: CommandFlags,
        range: ByteRange,
        payload: &[u8],
        sink: Sink<'_>,
    ) -> Result<(), ClientError> {
        self.pool.call(Op { command, flags, range }, payload, sink)
    }

    /// Reads whole blocks, in requests that the server takes.
    fn read_blocks(&self, range: ByteRange, mut buf: &mut [u8]) -> Result<()> {
        for piece in pieces(range, u64::from(self.pool.export().max_payload)) {
            let (now, rest) = buf.split_at_mut(piece.len() as usize);
            buf = rest;
            self.call(Command::Read, CommandFlags::NONE, piece, &[], Sink::Bytes(now))
                .map_err(|e| self.failed("read", piece.start(), e))?;
        }
        Ok(())
    }

    /// Reads the blocks that `part`, shorter than two of them, lies in.
    fn read_around(&self, part: ByteRange) -> Result<(ByteRange, Vec<u8>)> {
        let around = part.align_outward(self.unit());
        let mut buf = vec![0; around.len() as usize];
        self.read_blocks(around, &mut buf)?;
        Ok((around, buf))
    }

    fn write_blocks(&self, range: ByteRange, mut buf: &[u8], flags: CommandFlags) -> Result<()> {
        for piece in pieces(range, u64::from(self.pool.export().max_payload)) {
            let (now, rest) = buf.split_at(piece.len() as usize);
            buf = rest;
            self.call(Command::Write, flags, piece, now, Sink::Nothing)
                .map_err(|e| self.failed("write", piece.start(), e))?;
        }
        Ok(())
    }

    /// Changes `part`, shorter than two blocks, and nothing else of the blocks that it lies in.
    fn change_blocks(
        &self,
        part: ByteRange,
        flags: CommandFlags,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let _held = self.blocks.lock_exclusive(part.align_outward(self.unit()))?;
        let (around, mut buf) = self.read_around(part)?;
        let start = (part.start() - around.start()) as usize;
        change(&mut buf[start..start + part.len() as usize]);
        self.write_blocks(around, &buf, flags)
    }

    fn write_parts(&self, range: ByteRange, buf: &[u8], flags: CommandFlags) -> Result<()> {
        let Parts { head, whole, tail } = self.parts(range);
        let of = |part: ByteRange| {
            let start = (part.start() - range.start()) as usize;
            &buf[start..start + part.len() as usize]
        };
        self.change_blocks(head, flags, |bytes| bytes.copy_from_slice(of(head)))?;
        if !whole.is_empty() {
            let _held = (self.unit() > 1).then(|| self.blocks.lock_shared(whole)).transpose()?;
            self.write_blocks(whole, of(whole), flags)?;
        }
        if !tail.is_empty() {
            self.change_blocks(tail, flags, |bytes| bytes.copy_from_slice(of(tail)))?;
        }
        Ok(())
    }

    /// The command flag for `wanted`, or whether a flush has to follow instead.
    fn fua(&self, wanted: bool) -> (CommandFlags, bool) {
        match wanted {
            true if self.can(TransmissionFlags::SEND_FUA) => (CommandFlags::FUA, false),
            wanted => (CommandFlags::NONE, wanted),
        }
    }

    fn zero_parts(&self, range: ByteRange, flags: ZeroFlags, fua: CommandFlags) -> Result<()> {
        let mut quickly = flags.contains(ZeroFlags::NO_FALLBACK);
        let Parts { head, whole, tail } = self.parts(range);
        let fast = self.can(TransmissionFlags::SEND_FAST_ZERO) && !whole.is_empty();
        let refused = self.zeroes.holds(&self.pool);
        if !self.can(TransmissionFlags::SEND_WRITE_ZEROES) || refused || (quickly && !fast) {
            if quickly {
                return Err(self.cannot_zero_quickly(range.start()));
            }
            return self.write_zero_bytes(range, fua);
        }
        let mut command = fua;
        if !flags.contains(ZeroFlags::MAY_UNMAP) {
            command = command | CommandFlags::NO_HOLE;
        }
        // The blocks first: if the server cannot do the first of them quickly, nothing has been written. If
        // it refuses a later one, that and what follows is zeroed as well as it can be.
        if !whole.is_empty() {
            let held = (self.unit() > 1).then(|| self.blocks.lock_shared(whole)).transpose()?;
            for piece in pieces(whole, self.longest_without_payload()) {
                let zero = |command| self.call(Command::WriteZeroes, command, piece, &[], Sink::Nothing);
                let mut result = zero(if quickly { command | CommandFlags::FAST_ZERO } else { command });
                // Which is the answer where it cannot be done quickly.
                if let Err(ClientError::Server { error: Errno::NOTSUP, .. }) = result
                    && quickly
                {
                    if piece.start() == whole.start() {
                        return Err(self.cannot_zero_quickly(piece.start()));
                    }
                    quickly = false;
                    result = zero(command);
                }
                match result {
                    Ok(()) => self.zeroes.note_performed(&self.pool),
                    Err(error) if self.zeroes.is_believed(&error, &self.pool) => {
                        self.zeroes.note(&self.pool);
                        if quickly && piece.start() == whole.start() {
                            return Err(self.cannot_zero_quickly(piece.start()));
                        }
                        drop(held);
                        self.write_zero_bytes(ByteRange::new(piece.start(), range.end()), fua)?;
                        return self.change_blocks(head, fua, |bytes| bytes.fill(0));
                    }
                    Err(error) => return Err(self.failed("write zeroes", piece.start(), error)),
                }
            }
        }
        self.change_blocks(head, fua, |bytes| bytes.fill(0))?;
        self.change_blocks(tail, fua, |bytes| bytes.fill(0))
    }

    fn cannot_zero_quickly(&self, offset: u64) -> Error {
        Error::new(ErrorKind::Unsupported, "write zeroes")
            .in_file(Arc::clone(&self.name))
            .at(offset)
            .because("the server does not say when it can zero quickly")
    }

    fn write_zero_bytes(&self, range: ByteRange, flags: CommandFlags) -> Result<()> {
        for piece in range.pieces(ZEROS.len() as u64) {
            self.write_parts(piece, &ZEROS[..piece.len() as usize], flags)?;
        }
        Ok(())
    }

    fn longest_without_payload(&self) -> u64 {
        match self.pool.export().format {
            ReplyFormat::Extended => LONG,
            _ => u64::from(self.pool.export().max_payload),
        }
    }
}

/// Consecutive pieces of at most `max` bytes, which are multiples of a block.
fn pieces(range: ByteRange, max: u64) -> impl Iterator<Item = ByteRange> {
    let mut at = range.start();
    std::iter::from_fn(move || {
        let piece = ByteRange::new(at, at.saturating_add(max).min(range.end()));
        at = piece.end();
        (!piece.is_empty()).then_some(piece)
    })
}

impl BlockDevice for Client {
    fn len(&self) -> u64 {
        self.pool.export().size
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let range = self.check(offset, buf.len() as u64, "read")?;
        let Parts { head, whole, tail } = self.parts(range);
        let (first, rest) = buf.split_at_mut(head.len() as usize);
        let (middle, last) = rest.split_at_mut(whole.len() as usize);
        for (part, bytes) in [(head, first), (tail, last)] {
            if !part.is_empty() {
                let (around, blocks) = self.read_around(part)?;
                let start = (part.start() - around.start()) as usize;
                bytes.copy_from_slice(&blocks[start..start + bytes.len()]);
            }
        }
        self.read_blocks(whole, middle)
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> Result<()> {
        let range = self.check_write(offset, buf.len() as u64, "write")?;
        let (fua, flush) = self.fua(flags.contains(WriteFlags::FUA));
        self.write_parts(range, buf, fua)?;
        if flush { self.flush() } else { Ok(()) }
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let range = self.check_write(range.start(), range.len(), "write zeroes")?;
        if range.is_empty() {
            return Ok(());
        }
        let (fua, flush) = self.fua(flags.contains(ZeroFlags::FUA));
        self.zero_parts(range, flags, fua)?;
        if flush { self.flush() } else { Ok(()) }
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        let range = self.check_write(range.start(), range.len(), "discard")?;
        if !self.can(TransmissionFlags::SEND_TRIM) || self.trim.holds(&self.pool) {
            return Ok(());
        }
        let whole = range.align_inward(self.unit());
        let _held = (self.unit() > 1).then(|| self.blocks.lock_shared(whole)).transpose()?;
        for piece in pieces(whole, self.longest_without_payload()) {
            match self.call(Command::Trim, CommandFlags::NONE, piece, &[], Sink::Nothing) {
                Ok(()) => self.trim.note_performed(&self.pool),
                // Advice that the server does not take.
                Err(error) if self.trim.is_believed(&error, &self.pool) => {
                    self.trim.note(&self.pool);
                    return Ok(());
                }
                Err(error) => return Err(self.failed("discard", piece.start(), error)),
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        if !self.geometry.writable {
            return Ok(());
        }
        self.pool.flush().map_err(|e| {
            let kind = e.kind();
            Error::new(kind, "flush").in_file(Arc::clone(&self.name)).caused_by(e)
        })
    }

    fn extents(&self, range: ByteRange, visit: &mut dyn FnMut(Extent) -> Visit) -> Result<()> {
        let range = self.check(range.start(), range.len(), "get extents")?;
        if range.is_empty() {
            return Ok(());
        }
        let mut merger = ExtentMerger::default();
        let mut at =
            if self.has_block_status() { range.align_outward(self.unit()).start() } else { range.end() };
        let end = range.align_outward(self.unit()).end();
        if !self.has_block_status() {
            let _ = visit(Extent::new(range, ExtentKind::Data));
            return Ok(());
        }
        let longest = match self.pool.export().format {
            ReplyFormat::Extended => STATUS_EXTENDED,
            _ => STATUS_COMPACT,
        };
        while at < end {
            let piece = ByteRange::new(at, end.min(at.saturating_add(longest)));
            let mut found = Vec::new();
            let (answers, answered) =
                (self.answers.load(Ordering::Relaxed), self.answered.load(Ordering::Relaxed));
            if answers >= STATUS_SAMPLES && answered / answers < MIN_STATUS_BYTES {
                found.push(Extent::new(ByteRange::new(at, end), ExtentKind::Data));
                at = end;
            } else {
                let mut status = Status::default();
                self.call(Command::BlockStatus, CommandFlags::NONE, piece, &[], Sink::Status(&mut status))
                    .map_err(|e| self.failed("get extents", piece.start(), e))?;
                at = status.extents(piece, self.unit(), self.reading, &mut |extent| found.push(extent));
                if at < piece.end() {
                    self.answers.fetch_add(1, Ordering::Relaxed);
                    self.answered.fetch_add(at - piece.start(), Ordering::Relaxed);
                }
            }
            // No lock is held and no connection in use here: the visitor may read and write.
            for extent in found.iter().filter_map(|extent| extent.clip(range)) {
                if merger.push(extent, visit).is_break() {
                    return Ok(());
                }
            }
            if at < end && merger.cut(visit).is_break() {
                return Ok(());
            }
        }
        let _ = merger.finish(visit);
        Ok(())
    }

    fn cancel_in_flight(&self) {
        self.pool.cancel();
    }
}
