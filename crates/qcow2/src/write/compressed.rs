//! Writing clusters compressed: encode, place, write, publish.
//!
//! [`Qcow2::write_compressed`] encodes without any lock, so that callers on several threads compress at the
//! same time. The streams of a batch are then placed one behind the other, written in as few calls as there
//! are runs of them, and published together. The order on disk is that of all data: a stream and the
//! references of the host clusters that it touches are durable before an entry points at it. Clusters that do
//! not become smaller are written plainly.

use std::ops::Range;

use blockmirror_block::{ByteRange, Error, ErrorKind, Result, WriteFlags, cancel};

use crate::compress::bound;
use crate::compressors::Worker;
use crate::context::ImageContext;
use crate::failure::may_come_late;
use crate::format::entry::CompressedRun;
use crate::image::Qcow2;
use crate::meta::{Meta, references};
use crate::offset::{GuestCluster, GuestOffset, HostCluster, HostOffset};
use crate::refcounts::Missing;

/// Guest bytes that are compressed and published together, unless a cluster is larger.
const BATCH: u64 = 1 << 20;

/// What a disk writes as a whole.
const SECTOR: usize = 512;

/// A compressed cluster.
#[derive(Clone, Debug)]
struct Stream {
    cluster: GuestCluster,
    /// Its bytes in the worker's buffer.
    bytes: Range<usize>,
}

/// The place of a stream.
#[derive(Clone, Debug)]
struct Placed {
    at: HostOffset,
    /// What its entry will say.
    run: CompressedRun,
    /// Host clusters that lose a reference by it.
    drops: Range<HostCluster>,
}

/// Streams that have their places but are not visible yet. Dropped without a commit the places are given
/// back.
#[derive(Debug)]
struct CompressedGuard<'a> {
    image: &'a Qcow2,
    streams: &'a [Stream],
    /// Of the first streams, in order.
    placed: Vec<Placed>,
    /// A write to a place has failed and may still reach the disk.
    may_come_late: bool,
}

impl Qcow2 {
    /// Writes `buf` at `offset` in clusters that are stored compressed, by the compression type in the
    /// header. Both ends must lie on a border of clusters; the end of the disk is one.
    ///
    /// What the clusters held is replaced, not written over. A cluster that does not become smaller is stored
    /// as [`write_at`](blockmirror_block::BlockDevice::write_at) does. Durable after a flush. Compression
    /// runs in the calling thread: callers on several threads compress in parallel. Streams are packed: a
    /// call begins with a sector of 512 bytes, within it one stream follows the other by the byte.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use blockmirror_block::{BlockDevice, Storage, testing::MemoryStorage};
    /// use blockmirror_qcow2::{CreateOptions, OpenOptions};
    ///
    /// let storage = Arc::new(MemoryStorage::new());
    /// CreateOptions::new(1 << 20).create(&*storage, None)?;
    /// let disk = OpenOptions::new().writable(true).open(storage.clone())?;
    /// let before = storage.len()?;
    /// disk.write_compressed(&[7; 1 << 20], 0)?;
    /// disk.flush()?;
    /// // Metadata, and one cluster for all of the data.
    /// assert!(storage.len()? <= before + (4 << 16));
    /// let mut read = [0; 512];
    /// disk.read_at(&mut read, 700_000)?;
    /// assert_eq!(read, [7; 512]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with an external data file, [`ErrorKind::InvalidInput`] for a range that
    /// does not begin and end on borders; else as for a write. Each cluster is old or new then.
    pub fn write_compressed(&self, buf: &[u8], offset: u64) -> Result<()> {
        const WRITE: &str = "write compressed";
        let range = self.bounds(WRITE, ByteRange::checked(offset, buf.len()), offset, buf.len() as u64)?;
        self.check_writable(WRITE)?;
        let fail = |kind, why: &str| {
            Err(Error::new(kind, WRITE).in_file(self.ctx.name.clone()).at(offset).because(why))
        };
        if self.ctx.format.external_data {
            return fail(
                ErrorKind::Unsupported,
                "an image with an external data file has no compressed data",
            );
        }
        let cluster = self.ctx.cluster().bytes();
        let on_border = |at: u64| at.is_multiple_of(cluster) || at == self.ctx.size();
        let whole = range.start().is_multiple_of(cluster) && on_border(range.end());
        if !(range.is_empty() || whole) {
            return fail(ErrorKind::InvalidInput, "compressed data is written in whole clusters");
        }
        let mut rest = buf;
        for part in range.pieces(BATCH.max(cluster)) {
            // A piece of the buffer's range.
            let (now, later) = rest.split_at(part.len() as usize);
            self.write_batch(now, part)?;
            rest = later;
        }
        Ok(())
    }

    fn write_batch(&self, buf: &[u8], range: ByteRange) -> Result<()> {
        self.maybe_write_back()?;
        let mut worker = self.compressors.take();
        let (streams, plain) = self.encode(&mut worker, buf, range);
        let written = self.note_damage(self.write_streams(&worker.out, range, &streams));
        self.compressors.put_back(worker);
        written?;
        for part in plain {
            let bytes = &buf[index(range, part.start())..index(range, part.end())];
            self.write_mapped(bytes, part, WriteFlags::NONE)?;
        }
        Ok(())
    }

    /// Compresses the clusters of `buf`, which is to lie at `range`; returns also what is to be written
    /// plainly.
    fn encode(&self, worker: &mut Worker, buf: &[u8], range: ByteRange) -> (Vec<Stream>, Vec<ByteRange>) {
        let size = self.ctx.cluster();
        // At most 2 MiB.
        let cluster_len = size.bytes() as usize;
        let (mut streams, mut plain): (Vec<Stream>, Vec<ByteRange>) = (Vec::new(), Vec::new());
        // The streams before one are shorter than their clusters.
        worker.out.resize(buf.len() + bound(cluster_len) + SECTOR, 0);
        let mut end = 0;
        for part in range.pieces(size.bytes()) {
            let bytes = &buf[index(range, part.start())..index(range, part.end())];
            let mut padded = Vec::new();
            let cluster = if bytes.len() == cluster_len {
                bytes
            } else {
                // The end of the disk.
                padded.extend_from_slice(bytes);
                padded.resize(cluster_len, 0);
                &padded
            };
            let room = &mut worker.out[end..end + bound(cluster_len)];
            match (worker.encoder.encode(cluster, room), plain.last_mut()) {
                (Some(len), _) => {
                    let cluster = size.index(GuestOffset(part.start()));
                    streams.push(Stream { cluster, bytes: end..end + len });
                    end += len;
                }
                (None, Some(last)) if last.end() == part.start() => {
                    *last = ByteRange::new(last.start(), part.end());
                }
                (None, _) => plain.push(part),
            }
        }
        // What lies behind the last stream in its last sector.
        worker.out[end..end + SECTOR].fill(0);
        (streams, plain)
    }

    /// Writes and publishes `streams`, whose bytes are in `out` and whose clusters lie in `range`.
    fn write_streams(&self, out: &[u8], range: ByteRange, streams: &[Stream]) -> Result<()> {
        if streams.is_empty() {
            return Ok(());
        }
        let _lock = self.ranges.lock_exclusive(range.align_outward(self.ctx.cluster().bytes()))?;
        self.record_write(range)?;
        let stop = self.stop_check("write compressed");
        let mut guard = CompressedGuard { image: self, streams, placed: Vec::new(), may_come_late: false };
        while let Some(missing) = guard.plan()? {
            self.provide(missing, &stop)?;
        }
        guard.write(out)?;
        guard.commit()
    }
}

impl Meta {
    /// Finds a place for `len` bytes, fewer than a cluster has. The inner error says what must come first.
    pub(crate) fn place(&mut self, ctx: &ImageContext, len: u64) -> Result<Result<HostOffset, Missing>> {
        if let Some(at) = self.refcounts(ctx)?.place(ctx, len, None)? {
            return Ok(Ok(at));
        }
        let grant = match self.allocate(ctx, 1)? {
            Ok(grant) => grant,
            Err(missing) => return Ok(Err(missing)),
        };
        let refcounts = self.refcounts(ctx)?;
        match refcounts.place(ctx, len, Some(grant.first)) {
            Ok(Some(at)) => Ok(Ok(at)),
            placed => {
                refcounts.release(ctx, grant.clusters())?;
                placed?;
                Err(Error::new(ErrorKind::Io, "allocate cluster").in_file(ctx.name.clone()))
            }
        }
    }
}

impl CompressedGuard<'_> {
    /// Finds places from where the last call stopped; `Some` says what must come first.
    fn plan(&mut self) -> Result<Option<Missing>> {
        let image = self.image;
        let ctx = &image.ctx;
        let mut meta = image.meta.lock();
        meta.check_poison(ctx, "write compressed")?;
        let mut table = None;
        for stream in self.streams {
            // The tables first, so that they do not lie between the data.
            if table.replace(stream.cluster.0 / ctx.l2_entries()) != Some(stream.cluster.0 / ctx.l2_entries())
                && let Some(missing) = meta.missing_l2_table(ctx, stream.cluster)?
            {
                return Ok(Some(missing));
            }
        }
        meta.refcounts(ctx)?.begin_batch(ctx);
        for stream in &self.streams[self.placed.len()..] {
            let drops = references(ctx, &meta.entry_to_write(ctx, stream.cluster)?);
            let len = stream.bytes.len() as u64;
            match meta.place(ctx, len)? {
                Err(missing) => return Ok(Some(missing)),
                Ok(at) => {
                    let run = CompressedRun::of(at, len);
                    self.placed.push(Placed { at, run, drops });
                    if !ctx.format.holds_compressed(run) {
                        let error = Error::new(ErrorKind::NoSpace, "write compressed").at(at.0);
                        return Err(error.in_file(ctx.name.clone()).because("no entry can point so far"));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Writes the streams, one call for each run of them, which ends with a sector.
    fn write(&mut self, out: &[u8]) -> Result<()> {
        let mut first = 0;
        while first < self.placed.len() {
            let end_of = |i: usize| self.placed[i].at.plus(self.streams[i].bytes.len() as u64);
            let mut last = first;
            while last + 1 < self.placed.len() && self.placed[last + 1].at == end_of(last) {
                last += 1;
            }
            let (start, end) = (self.streams[first].bytes.start, self.streams[last].bytes.end);
            // A run begins with a sector.
            let padded = (end - start).next_multiple_of(SECTOR);
            let at = self.placed[first].at.0;
            let storage = &self.image.ctx.storage;
            let written = if last + 1 == self.placed.len() {
                storage.write_at(&out[start..start + padded], at)
            } else {
                let mut bytes = out[start..end].to_vec();
                bytes.resize(padded, 0);
                storage.write_at(&bytes, at)
            };
            if let Err(error) = written {
                self.may_come_late = may_come_late(&error);
                return Err(error);
            }
            first = last + 1;
        }
        Ok(())
    }

    /// Makes the write visible.
    fn commit(mut self) -> Result<()> {
        let image = self.image;
        let ctx = &image.ctx;
        // The data is there: a caller that is cancelled now does not leave half of it published.
        let _shield = cancel::shield();
        // From here on the places belong to the image. Should publishing one of them fail they leak.
        let placed = std::mem::take(&mut self.placed);
        image.decompressors.forget(placed.iter().map(|placed| placed.run));
        let mut meta = image.meta.lock();
        for (stream, placed) in self.streams.iter().zip(placed) {
            meta.set_compressed(ctx, stream.cluster, placed.run)?;
            meta.refcounts(ctx)?.defer_unref(ctx, placed.drops);
        }
        Ok(())
    }
}

impl Drop for CompressedGuard<'_> {
    fn drop(&mut self) {
        if self.placed.is_empty() {
            return;
        }
        let ctx = &self.image.ctx;
        let _shield = cancel::shield();
        let mut meta = self.image.meta.lock();
        if let Ok(refcounts) = meta.refcounts(ctx) {
            for (stream, placed) in self.streams.iter().zip(&self.placed) {
                let clusters = ctx.cluster().touched(placed.at, stream.bytes.len() as u64);
                // If the refcounts cannot be read the clusters leak, which is harmless.
                let _ = refcounts.unplace(ctx, clusters, self.may_come_late);
            }
        }
    }
}

/// Where `offset` lies in a buffer that holds `range`.
fn index(range: ByteRange, offset: u64) -> usize {
    // No buffer is longer than `usize`.
    (offset - range.start()) as usize
}
