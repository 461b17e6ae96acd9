//! Whether an image has more clusters than its file holds: it was preallocated, and holes of the file below
//! mapped clusters are many. QEMU looks for such holes in these images only, by the same figures.
//!
//! Called when an image is opened with [`crate::OpenOptions::holes_if_preallocated`]. What must hold: the
//! refcounts are read at most once, and no further than the clusters of the file.

use blockmirror_block::Storage;

use crate::check::{Block, Checker, Reporting};
use crate::error::Result;

/// Bytes of a refcount block that are read at once.
const PIECE: u64 = 64 << 10;

/// Whether the image in `storage` has clusters in use that its file holds nothing for: a ninth more than it
/// holds, and at least two. Not if the storage does not tell what it holds, or a refcount cannot be read.
pub(crate) fn is_preallocated(storage: &dyn Storage) -> Result<bool> {
    let Some(allocated) = storage.allocated_bytes()? else { return Ok(false) };
    let mut observer = ();
    let checker = Checker::open(storage, &mut observer, Reporting::Silent)?;
    let size = checker.cluster_size();
    let held = allocated / size;
    let wanted = (held.saturating_mul(10) / 9).max(held + 2);
    let (per_block, clusters, width) =
        (checker.disk.per_block(), checker.file_clusters(), checker.disk.width());
    let piece = PIECE.min(size);
    let per_piece = width.entries(piece);
    // At most PIECE.
    let mut buf = vec![0; piece as usize];
    let mut used = 0;
    for index in 0..clusters.div_ceil(per_block) {
        let (first, last) = (index * per_block, ((index + 1) * per_block).min(clusters));
        let offset = match checker.disk.block(index) {
            Block::None => continue,
            Block::Bad(_) => return Ok(false),
            Block::At(offset) => offset,
        };
        for (at, start) in (offset..).step_by(piece as usize).zip((first..last).step_by(per_piece as usize)) {
            storage.read_at(&mut buf, at)?;
            let entries = (start..(start + per_piece).min(last)).enumerate();
            used += entries.filter(|(index, _)| width.get(&buf, *index) > 0).count() as u64;
            if used >= wanted {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
