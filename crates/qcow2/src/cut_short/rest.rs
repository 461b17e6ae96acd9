//! The L2 tables that the bounded look at opening does not come to, in a writable image whose refcounts reach
//! past the end of its file.
//!
//! A crash leaves such counts, and so does a file that was cut short. Which of the two it is only the entries
//! can tell. Until all of them have been looked at the end is *doubtful*, and nothing makes the file longer:
//! no cluster is handed out, and none that reaches past the end is written. The first operation that needs
//! one has the look made ([`Missing::RestOfTables`](crate::refcounts::Missing)). It costs one read of the L2
//! tables, is made without the metadata lock, and can be cancelled.

use blockmirror_block::{ByteRange, Error, ErrorKind, Result};

use super::CutShort;
use crate::context::ImageContext;
use crate::format::entry::{Entry, PlainEntry};
use crate::holes::HoleCursor;
use crate::image::Qcow2;
use crate::meta::{Meta, decode_at};
use crate::offset::{GuestCluster, HostOffset};
use crate::stop::StopCheck;

impl Meta {
    /// Whether a write to the host cluster at `host` must wait until it is known that the file was not cut
    /// short.
    pub(crate) fn doubts(&self, ctx: &ImageContext, host: HostOffset) -> bool {
        self.doubtful_end.is_some_and(|end| host.plus(ctx.cluster().bytes()) > end)
    }
}

impl Qcow2 {
    /// Looks for an L2 table that the file, of `file_len` bytes, does not hold. If there is none the end of
    /// the file is doubtful from now on.
    pub(super) fn leave_rest(&self, file_len: u64) -> Option<CutShort> {
        let ctx = &self.ctx;
        let table_bytes = ctx.l2_entries() << ctx.cluster().bits();
        let mut meta = self.meta.lock();
        let ends_at = |table: HostOffset| table.0.saturating_add(ctx.cluster().bytes());
        let lost = meta.l1().iter().position(|l1| l1.table().is_some_and(|at| ends_at(at) > file_len));
        // usize to u64 is exact here.
        let Some(first) = lost.map(|index| index as u64 * table_bytes) else {
            meta.doubtful_end = Some(HostOffset(file_len));
            return None;
        };
        Some(CutShort { file_len, first, missing: table_bytes, complete: false })
    }

    /// Looks through all L2 tables, unless another thread has. If nothing is missing the file may become
    /// longer.
    ///
    /// # Errors
    /// [`CutShort`](blockmirror_block::ErrorKind::CutShort) if something is missing. A table that cannot be
    /// read.
    pub(crate) fn look_at_rest(&self, stop: &StopCheck<'_>) -> Result<()> {
        let ctx = &self.ctx;
        let _one_at_a_time = self.tables.lock();
        // As long as the end is doubtful no table is new, and what changes in one maps no other cluster. So
        // what is on disk is looked at.
        let mut holes = HoleCursor::default();
        // At most 2 MiB.
        let mut data = vec![0; ctx.cluster().bytes() as usize];
        for index in 0.. {
            stop.check()?;
            let (end, l1) = {
                let meta = self.meta.lock();
                let Some(end) = meta.doubtful_end else { return Ok(()) };
                (end, meta.l1().get(index).copied())
            };
            let Some(l1) = l1 else { break };
            let Some(table) = l1.table() else { continue };
            // usize to u64 is exact here.
            ctx.check_table("read L1 table", table, index as u64)?;
            if !holes.is_hole(ctx, ByteRange::at(table.0, ctx.cluster().bytes())) {
                ctx.storage.read_at(&mut data, table.0)?;
                check_table(ctx, &data, GuestCluster(index as u64 * ctx.l2_entries()), table, end)?;
            }
        }
        self.look_at_snapshots(stop, &mut holes, &mut data)?;
        self.meta.lock().doubtful_end = None;
        Ok(())
    }

    /// The same for the tables that only snapshots have; `data` has room for one.
    fn look_at_snapshots(&self, stop: &StopCheck<'_>, holes: &mut HoleCursor, data: &mut [u8]) -> Result<()> {
        let ctx = &self.ctx;
        let (end, tables) = {
            let mut meta = self.meta.lock();
            let Some(end) = meta.doubtful_end else { return Ok(()) };
            (end, meta.refcounts(ctx)?.metadata.only_inactive_l2())
        };
        for table in tables {
            stop.check()?;
            let at = ctx.cluster().start(table);
            if !holes.is_hole(ctx, ByteRange::at(at.0, ctx.cluster().bytes())) {
                ctx.storage.read_at(data, at.0)?;
                // What the table maps is not known here.
                check_table(ctx, data, GuestCluster(0), at, end).map_err(|error| match error.kind() {
                    ErrorKind::CutShort => {
                        Error::new(ErrorKind::CutShort, "write").in_file(ctx.name.clone()).because(format!(
                            "the file ends at {}, and what a snapshot has lies past that: it was cut short \
                             and is for reading only, since a write would make zeros of what is missing",
                            end.0
                        ))
                    }
                    _ => error,
                })?;
            }
        }
        Ok(())
    }
}

/// Fails if `data`, the L2 table at `table`, maps for the guest clusters from `first` on what begins at or
/// past `end`. An entry that makes no sense maps nothing.
fn check_table(
    ctx: &ImageContext,
    data: &[u8],
    first: GuestCluster,
    table: HostOffset,
    end: HostOffset,
) -> Result<()> {
    let step = ctx.format.entry_size() as usize;
    for (at, guest) in (0..data.len()).step_by(step).zip((first.0..).map(GuestCluster)) {
        let last = match decode_at(ctx, data, at, guest, table) {
            Ok(Entry::Compressed(run)) => run.offset,
            Ok(Entry::Plain(PlainEntry { host: Some(host), allocated, .. })) if allocated != 0 => {
                host.plus(u64::from(allocated.ilog2()) * ctx.format.subcluster_size())
            }
            _ => continue,
        };
        if last >= end {
            let (first, missing) = (ctx.cluster().start(guest).0, ctx.cluster().bytes());
            let cut = CutShort { file_len: end.0, first, missing, complete: false };
            return Err(cut.refusal("write", &ctx.name));
        }
    }
    Ok(())
}
