//! Zeroing and discarding: changes of the mapping without data.
//!
//! Both work an L2 table at a time under an exclusive lock on the guest range. What cannot be said in
//! metadata (part of a subcluster; version 2, which has no zero flag) is zeroed with data, or left alone by a
//! discard.

use blockmirror_block::{ByteRange, Error, ErrorKind, Result, WriteFlags, ZeroFlags};

use crate::context::ImageContext;
use crate::format::entry::{Entry, PlainEntry};
use crate::image::Qcow2;
use crate::meta::{Mapping, Meta, references};
use crate::offset::GuestOffset;
use crate::refcounts::Missing;

/// Zeros that are written at once where they must be written.
const ZERO_CHUNK: u64 = 1 << 20;

/// Runs of the mapping that are looked at in one go.
const LOOK: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purpose {
    /// Must read as zeros afterwards; if `explicit`, by statement of this image, whatever lies below it now.
    Zero { may_unmap: bool, explicit: bool, lost_as_zeros: bool },
    /// Must read as zeros in a disk that grows. What shows zeros because the layer below is shorter stays
    /// unallocated, as in an overlay that is created longer than its backing file.
    Grow,
    /// Frees the space. Reads as zeros afterwards where the mapping can say so, also where only the layer
    /// below has something, as with QEMU.
    Discard,
}

impl Purpose {
    /// Whether clusters may be freed.
    fn unmaps(self) -> bool {
        !matches!(self, Self::Zero { may_unmap: false, .. })
    }

    fn is_explicit(self) -> bool {
        matches!(self, Self::Zero { explicit: true, .. })
    }

    /// Of a write of zero bytes.
    fn write_flags(self) -> WriteFlags {
        match self {
            Self::Zero { lost_as_zeros: true, .. } => WriteFlags::LOST_AS_ZEROS,
            _ => WriteFlags::NONE,
        }
    }
}

/// What is to become of one cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Change {
    /// It reads as zeros already, or may stay as it is.
    Nothing,
    /// The entry changes; the host clusters of the old one lose a reference if `frees`.
    Set { entry: PlainEntry, frees: bool },
    /// Only data can do it.
    Data,
}

impl Qcow2 {
    /// Makes `range`, inside the disk, read as zeros.
    pub(crate) fn zero(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.check_writable("write zeroes")?;
        let explicit = flags.contains(ZeroFlags::EXPLICIT);
        let lost_as_zeros = flags.contains(ZeroFlags::LOST_AS_ZEROS);
        let may_unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let purpose = Purpose::Zero { may_unmap, explicit, lost_as_zeros };
        let whole = self.whole_subclusters(range);
        let edges = [ByteRange::new(range.start(), whole.start()), ByteRange::new(whole.end(), range.end())];
        if flags.contains(ZeroFlags::NO_FALLBACK) {
            for edge in edges {
                if !self.is_zero_by_itself(edge, explicit)? {
                    return Err(self.only_data(range));
                }
            }
            self.check_metadata_zero(whole, purpose)?;
        }
        if self.raw_data_file() {
            return self.zero_raw_data_file(range, flags);
        }
        for edge in edges {
            self.record_request(edge)?;
            self.zero_with_data(edge, purpose)?;
        }
        self.change(whole, purpose)
    }

    /// Makes `range`, which begins with a cluster and ends with a disk that grows, read as zeros.
    pub(crate) fn zero_grown(&self, range: ByteRange) -> Result<()> {
        self.change(range, Purpose::Grow)
    }

    /// Frees the space of `range`, inside the disk, where whole (sub)clusters are covered.
    pub(crate) fn discard_mapped(&self, range: ByteRange) -> Result<()> {
        self.check_writable("discard")?;
        self.record_request(range)?;
        if self.raw_data_file() {
            // The raw file must stay what the guest sees; its own holes are the only way to give space back.
            return self.zero_raw_data_file(self.whole_subclusters(range), ZeroFlags::MAY_UNMAP);
        }
        self.change(self.whole_subclusters(range), Purpose::Discard)
    }

    /// The part of `range` that covers whole subclusters. What lies past the end of the disk does not matter,
    /// so a range that ends with the disk ends on a border; an empty result lies at the start of `range`.
    fn whole_subclusters(&self, range: ByteRange) -> ByteRange {
        let size = self.ctx.format.subcluster_size();
        let start = range.start().next_multiple_of(size);
        let end = if range.end() == self.ctx.size() { range.end() } else { range.end() & !(size - 1) };
        if start >= end { ByteRange::new(range.start(), range.start()) } else { ByteRange::new(start, end) }
    }

    fn only_data(&self, range: ByteRange) -> Error {
        Error::new(ErrorKind::Unsupported, "write zeroes")
            .in_file(self.ctx.name.clone())
            .at(range.start())
            .because("the range can only be zeroed by writing zeros")
    }

    /// Fails if any cluster of `whole` would need data, having looked at the runs of the mapping.
    fn check_metadata_zero(&self, whole: ByteRange, purpose: Purpose) -> Result<()> {
        if self.raw_data_file() {
            return Err(self.only_data(whole));
        }
        let cluster = self.ctx.cluster().bytes();
        // Where the entries can say it, part of a compressed cluster is the one thing that takes data; it can
        // lie only at the ends.
        let inner = whole.align_inward(cluster);
        let ends = [ByteRange::new(whole.start(), inner.start()), ByteRange::new(inner.end(), whole.end())];
        let doubtful = ends.into_iter().map(|end| end.intersect(whole));
        for part in doubtful.flat_map(|end| end.pieces(cluster)) {
            let entry =
                self.meta.lock().entry(&self.ctx, self.ctx.cluster().index(GuestOffset(part.start())))?;
            if self.decide(entry, part, purpose) == Change::Data {
                return Err(self.only_data(whole));
            }
        }
        let backed = shows_below(&self.ctx, inner, purpose);
        if self.ctx.format.has_zero || (!backed && purpose.unmaps()) {
            return Ok(());
        }
        // Without a zero flag, only what is unallocated anyway is zero.
        let stop = self.stop_check("write zeroes");
        let mut at = inner.start();
        while at < inner.end() {
            stop.check()?;
            let runs = self.meta.lock().runs(&self.ctx, ByteRange::new(at, inner.end()), LOOK)?;
            for run in runs {
                if backed || run.mapping != Mapping::Unallocated {
                    return Err(self.only_data(whole));
                }
                at = run.range.end();
            }
        }
        Ok(())
    }

    /// Applies `purpose` to `whole`, which covers whole subclusters.
    fn change(&self, whole: ByteRange, purpose: Purpose) -> Result<()> {
        let table_bytes = self.ctx.l2_entries() << self.ctx.cluster().bits();
        let stop = self.stop_check("write zeroes");
        for part in whole.pieces(table_bytes) {
            stop.check()?;
            self.maybe_write_back()?;
            let by_data = self.change_in_table(part, purpose)?;
            for range in by_data {
                self.zero_with_data(range, purpose)?;
            }
        }
        Ok(())
    }

    /// Changes the entries of `part`, which lies in one L2 table; returns what is left for data.
    fn change_in_table(&self, part: ByteRange, purpose: Purpose) -> Result<Vec<ByteRange>> {
        let _lock = self.ranges.lock_exclusive(part.align_outward(self.ctx.cluster().bytes()))?;
        self.record_write(part)?;
        self.change_held(part, purpose)
    }

    /// The same where the caller holds the clusters exclusively.
    fn change_held(&self, part: ByteRange, purpose: Purpose) -> Result<Vec<ByteRange>> {
        let ctx = &self.ctx;
        if let (Some(data_file), true) = (&ctx.data_file, purpose.unmaps()) {
            // A hint, and before the entries change: a discarded range reads as before or as zeros.
            data_file.discard(part)?;
        }
        let stop = self.stop_check("write zeroes");
        let slice_bytes = (ctx.slice_size() as u64 / ctx.format.entry_size()) << ctx.cluster().bits();
        let mut by_data = Vec::new();
        for piece in part.pieces(slice_bytes) {
            loop {
                let changed = {
                    let mut meta = self.meta.lock();
                    meta.check_poison(ctx, "write zeroes")?;
                    self.change_locked(&mut meta, piece, purpose)
                };
                match self.note_damage(changed)? {
                    Ok(found) => {
                        by_data.extend(found);
                        break;
                    }
                    Err(missing) => self.note_damage(self.provide(missing, &stop))?,
                }
            }
        }
        Ok(by_data)
    }

    /// Under the lock, for `part` of one slice of a table. The inner error says what must come first.
    fn change_locked(
        &self,
        meta: &mut Meta,
        part: ByteRange,
        purpose: Purpose,
    ) -> Result<Result<Vec<ByteRange>, Missing>> {
        let ctx = &self.ctx;
        let mut by_data: Vec<ByteRange> = Vec::new();
        let first = ctx.cluster().index(GuestOffset(part.start()));
        let no_table = meta.l1_entry(ctx, first)?.1.table().is_none();
        if no_table && !shows_below(ctx, part, purpose) {
            return Ok(Ok(by_data));
        }
        let mut table_ready = false;
        for piece in part.pieces(ctx.cluster().bytes()) {
            let cluster = ctx.cluster().index(GuestOffset(piece.start()));
            let old = meta.entry_to_write(ctx, cluster)?;
            match self.decide(old, piece, purpose) {
                Change::Nothing => {}
                Change::Data => match by_data.last_mut() {
                    Some(last) if last.end() == piece.start() => {
                        *last = ByteRange::new(last.start(), piece.end())
                    }
                    _ => by_data.push(piece),
                },
                Change::Set { entry, frees } => {
                    if !table_ready {
                        if let Some(missing) = meta.missing_l2_table(ctx, cluster)? {
                            return Ok(Err(missing));
                        }
                        table_ready = true;
                    }
                    meta.set_entry(ctx, cluster, entry)?;
                    if frees {
                        meta.refcounts(ctx)?.defer_unref(ctx, references(ctx, &old));
                    }
                }
            }
        }
        Ok(Ok(by_data))
    }

    /// What becomes of the cluster with entry `old`, of which `part` is to change.
    fn decide(&self, old: Entry, part: ByteRange, purpose: Purpose) -> Change {
        let ctx = &self.ctx;
        let format = ctx.format;
        let within = ctx.cluster().within(GuestOffset(part.start()));
        // Up to the end of the disk is up to the end of the cluster.
        let end = if part.end() == ctx.size() { ctx.cluster().bytes() } else { within + part.len() };
        let mask = format.covered(within, end);
        let backed = shows_below(ctx, part, purpose);
        let whole = mask == format.all();
        let plain = match old {
            Entry::Compressed(_) if whole => PlainEntry { allocated: format.all(), ..PlainEntry::default() },
            Entry::Compressed(_) if purpose == Purpose::Discard => return Change::Nothing,
            Entry::Compressed(_) => return Change::Data,
            Entry::Plain(plain) => plain,
        };
        // Subclusters that may show something else than zeros.
        let shows = mask & if backed { !plain.zero } else { plain.allocated };
        if shows == 0 {
            return Change::Nothing;
        }
        if !format.has_zero {
            return match purpose {
                _ if !backed && purpose.unmaps() => Change::Set { entry: PlainEntry::default(), frees: true },
                // Without a zero flag the backing device would show.
                Purpose::Discard => Change::Nothing,
                Purpose::Zero { .. } | Purpose::Grow => Change::Data,
            };
        }
        let keeps_place =
            plain.host.is_some() && (format.external_data || !whole || (plain.copied && !purpose.unmaps()));
        if keeps_place {
            let entry = PlainEntry {
                allocated: plain.allocated & !mask,
                zero: (plain.zero | mask) & format.all(),
                ..plain
            };
            return Change::Set { entry, frees: false };
        }
        // A discarded cluster with nothing below it is simply unallocated.
        let zero = if purpose == Purpose::Discard && !backed { 0 } else { plain.zero | mask };
        let frees = plain.host.is_some() || matches!(old, Entry::Compressed(_));
        Change::Set { entry: PlainEntry { zero, ..PlainEntry::default() }, frees }
    }

    /// Makes `range` of whole subclusters, nothing of which is allocated and whose clusters the caller holds,
    /// zero by statement of this image. The format has a zero flag.
    pub(crate) fn zero_held(&self, range: ByteRange) -> Result<()> {
        for part in range.pieces(self.ctx.l2_entries() << self.ctx.cluster().bits()) {
            let purpose = Purpose::Zero { may_unmap: true, explicit: true, lost_as_zeros: false };
            self.change_held(part, purpose)?;
        }
        Ok(())
    }

    /// Writes zeros where the range does not read as zeros already.
    fn zero_with_data(&self, range: ByteRange, purpose: Purpose) -> Result<()> {
        // At most a chunk.
        let zeros = vec![0; range.len().min(ZERO_CHUNK) as usize];
        for part in range.pieces(ZERO_CHUNK) {
            if !self.is_zero_by_itself(part, purpose.is_explicit())? {
                self.write_mapped(&zeros[..part.len() as usize], part, purpose.write_flags())?;
            }
        }
        Ok(())
    }

    /// The data file is a raw image by itself: the zeros must be in it. The mapping does not change.
    fn zero_raw_data_file(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let Some(data_file) = &self.ctx.data_file else { return Ok(()) };
        self.meta.lock().check_poison(&self.ctx, "write zeroes")?;
        for part in range.pieces(self.ctx.l2_entries() << self.ctx.cluster().bits()) {
            let _lock = self.ranges.lock_exclusive(part.align_outward(self.ctx.cluster().bytes()))?;
            self.record_write(part)?;
            data_file.write_zeroes(part, flags.difference(ZeroFlags::FUA))?;
        }
        self.ctx.known_data.forget();
        Ok(())
    }
}

/// Whether something other than zeros may show in `part` where nothing is allocated, as far as `purpose`
/// cares.
fn shows_below(ctx: &ImageContext, part: ByteRange, purpose: Purpose) -> bool {
    match purpose {
        Purpose::Zero { explicit: true, .. } => true,
        Purpose::Grow => ctx.backing_covers(part),
        Purpose::Zero { .. } | Purpose::Discard => ctx.backed(),
    }
}
