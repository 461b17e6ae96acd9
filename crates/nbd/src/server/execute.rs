//! Runs requests: from header and payload to the bytes of the reply.
//!
//! Called by the reader of a connection for requests that run inline, and by workers for the others. Reads
//! differ in where the bytes go.

use blockmirror_block::{BlockDevice, ByteRange, ErrorKind, Visit, WriteFlags, ZeroFlags, zero};

use crate::proto::{Command, CommandFlags, Errno, ReplyFormat, Request};

use super::connection::Connection;
use super::memory::PooledBuf;
use super::negotiated_params::Failure;
use super::reply::{Encoder, Reply};
use super::status;

/// Reads of this length and more ask the device for holes first; shorter ones are read and scanned for zeros.
const LOOK_UP_HOLES: usize = 64 << 10;
/// How far beyond a read a format is asked for holes, so that the next read need not ask. A file without a
/// format is asked for all that follows: finding the end of a run costs the same however much is wanted, and
/// can be slow (tmpfs walks over every page).
const LOOK_AHEAD: u64 = 64 << 20;
/// Shorter holes are sent as data: a chunk of their own costs as much.
const SHORTEST_HOLE: u64 = 4096;
/// Long zeroing and trimming is cut into pieces of this size, between which a dead connection is noticed.
const PIECE: u64 = 256 << 20;
/// Caching reads this much at a time.
const CACHE_PIECE: u64 = 1 << 20;

/// Runs a request that is not a read, and appends its reply to `out`.
pub(crate) fn run(connection: &Connection, request: &Request, payload: &[u8], out: &mut Vec<u8>) {
    let encoder = connection.encoder();
    let result = match request.command {
        Command::BlockStatus => match status::run(connection, request, payload, out) {
            Ok(()) => return,
            Err(failure) => Err(failure),
        },
        _ => change(connection, request, payload),
    };
    match result {
        Ok(()) => encoder.done(out, request),
        Err(failure) => fail(connection, request, failure, out),
    }
}

/// Logs a failure and appends its reply to `out`.
fn fail(connection: &Connection, request: &Request, failure: Failure, out: &mut Vec<u8>) {
    let failure = failure.on_connection(connection.is_ending());
    connection.log_failure(request, &failure);
    connection.encoder().failure(out, request, &failure);
}

fn change(connection: &Connection, request: &Request, payload: &[u8]) -> Result<(), Failure> {
    let device = connection.device();
    let fua = request.flags.contains(CommandFlags::FUA);
    let range = ByteRange::at(request.offset, request.length);
    match request.command {
        Command::Write => {
            let flags = if fua { WriteFlags::FUA } else { WriteFlags::NONE };
            connection.export().write_at(payload, request.offset, flags)?;
        }
        // One of no bytes: others have a buffer and go another way.
        Command::Read => {}
        Command::Flush => device.flush()?,
        Command::Trim => {
            connection.forget_data(range);
            for piece in range.pieces(PIECE) {
                device.discard(piece)?;
                connection.check_ending()?;
            }
            if fua {
                device.flush()?;
            }
        }
        Command::WriteZeroes => {
            connection.forget_data(range);
            write_zeroes(connection, request, range)?;
        }
        Command::Cache => {
            let mut buf = vec![0; usize::try_from(range.len().min(CACHE_PIECE)).unwrap_or_default()];
            for piece in range.pieces(CACHE_PIECE) {
                // A piece is no longer than the buffer.
                connection
                    .read_at(&mut buf[..usize::try_from(piece.len()).unwrap_or_default()], piece.start())?;
                connection.check_ending()?;
            }
        }
        _ => return Err(Failure::new(Errno::INVAL, "not a command")),
    }
    Ok(())
}

fn write_zeroes(connection: &Connection, request: &Request, range: ByteRange) -> Result<(), Failure> {
    let export = connection.export();
    let mut flags = ZeroFlags::NONE;
    if !request.flags.contains(CommandFlags::NO_HOLE) {
        flags |= ZeroFlags::MAY_UNMAP;
    }
    if request.flags.contains(CommandFlags::FUA) {
        flags |= ZeroFlags::FUA;
    }
    if request.flags.contains(CommandFlags::FAST_ZERO) {
        // In one call: if the device knows that it cannot be done, nothing has been.
        return export.write_zeroes(range, flags | ZeroFlags::NO_FALLBACK).map_err(Failure::from);
    }
    for piece in range.pieces(PIECE) {
        export.write_zeroes(piece, flags).map_err(|e| match e.kind() {
            // Only a fast zero may be answered so.
            ErrorKind::Unsupported => Failure::new(Errno::INVAL, e.to_string()),
            _ => e.into(),
        })?;
        connection.check_ending()?;
    }
    Ok(())
}

/// Runs a short read and appends its reply to `out`.
pub(crate) fn read_inline(connection: &Connection, request: &Request, out: &mut Vec<u8>, len: usize) {
    let encoder = connection.encoder();
    if len == 0 {
        return encoder.done(out, request);
    }
    let start = out.len();
    encoder.data_head(out, request, request.offset, len, true);
    let head_end = out.len();
    out.resize(head_end + len, 0);
    match connection.read_at(&mut out[head_end..], request.offset) {
        Ok(()) => {
            if may_be_sparse(encoder, request) && zero::is_zero(&out[head_end..]) {
                out.truncate(start);
                encoder.hole(out, request, request.offset, u32::try_from(len).unwrap_or(u32::MAX), true);
            }
        }
        Err(error) => {
            out.truncate(start);
            fail(connection, request, error.into(), out);
        }
    }
}

/// Runs a read into `buf`, which has its length.
pub(crate) fn read(connection: &Connection, request: &Request, buf: PooledBuf) -> Reply {
    match try_read(connection, request, buf) {
        Ok(reply) => reply,
        Err(failure) => {
            let mut out = Vec::new();
            fail(connection, request, failure, &mut out);
            Reply::bytes(out)
        }
    }
}

fn try_read(connection: &Connection, request: &Request, mut buf: PooledBuf) -> Result<Reply, Failure> {
    let encoder = connection.encoder();
    let device = connection.device();
    let range = ByteRange::at(request.offset, request.length);
    let sparse = may_be_sparse(encoder, request);
    let mut heads = Vec::with_capacity(encoder.data_head_len());
    if !sparse || buf.len() < LOOK_UP_HOLES || connection.is_known_data(range) {
        connection.read_at(&mut buf, request.offset)?;
        if sparse && zero::is_zero(&buf) {
            encoder.hole(
                &mut heads,
                request,
                request.offset,
                u32::try_from(buf.len()).unwrap_or(u32::MAX),
                true,
            );
            return Ok(Reply::bytes(heads));
        }
        encoder.data_head(&mut heads, request, request.offset, buf.len(), true);
        let all = (heads.len(), 0..buf.len());
        return Ok(Reply::with_data(heads, buf, vec![all]));
    }
    let runs = runs(connection, device, range)?;
    let mut pieces = Vec::with_capacity(runs.len());
    for (i, run) in runs.iter().enumerate() {
        let done = i + 1 == runs.len();
        // Inside the request, which is no longer than the buffer.
        let start = usize::try_from(run.range.start() - range.start()).unwrap_or_default();
        let end = usize::try_from(run.range.end() - range.start()).unwrap_or_default();
        if run.zero {
            let len = u32::try_from(run.range.len()).unwrap_or(u32::MAX);
            encoder.hole(&mut heads, request, run.range.start(), len, done);
            pieces.push((heads.len(), 0..0));
        } else {
            connection.read_at(&mut buf[start..end], run.range.start())?;
            encoder.data_head(&mut heads, request, run.range.start(), end - start, done);
            pieces.push((heads.len(), start..end));
        }
    }
    Ok(Reply::with_data(heads, buf, pieces))
}

fn may_be_sparse(encoder: Encoder, request: &Request) -> bool {
    encoder.0 >= ReplyFormat::Structured && !request.flags.contains(CommandFlags::DF)
}

struct Run {
    range: ByteRange,
    zero: bool,
}

/// Cuts `range` into data and holes, without gaps, and remembers where data goes on behind it.
fn runs(connection: &Connection, device: &dyn BlockDevice, range: ByteRange) -> Result<Vec<Run>, Failure> {
    let mut runs: Vec<Run> = Vec::new();
    let mut at = range.start();
    let ahead = if device.geometry().cluster_size.is_none() { u64::MAX } else { LOOK_AHEAD };
    let asked = ByteRange::at(range.start(), range.len().max(ahead));
    let asked = asked.intersect(ByteRange::new(0, connection.size()));
    device.extents(asked, &mut |extent| {
        let end = extent.range.end().min(range.end());
        if end <= at {
            return Visit::Continue(());
        }
        let part = ByteRange::new(at, end);
        at = end;
        let zero = extent.reads_as_zero() && part.len() >= SHORTEST_HOLE;
        match runs.last_mut() {
            Some(last) if last.zero == zero => last.range = ByteRange::new(last.range.start(), end),
            _ => runs.push(Run { range: part, zero }),
        }
        if end < range.end() {
            return if connection.is_ending() { Visit::Break(()) } else { Visit::Continue(()) };
        }
        if !extent.reads_as_zero() {
            connection.remember_data(extent.range);
        }
        Visit::Break(())
    })?;
    // What the device did not answer counts as data.
    if at < range.end() {
        runs.push(Run { range: ByteRange::new(at, range.end()), zero: false });
    }
    Ok(runs)
}
