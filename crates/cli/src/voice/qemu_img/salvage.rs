//! What `convert --salvage` has lost, under the name `qemu-img`.
//!
//! QEMU asks for extents twice, first to count what is to be copied, and reads by sectors: it names what the
//! source does not map in each of the passes, and each sector that it cannot read.

use std::io;

use blockmirror_mirror::GivenUp;

use crate::qemu_words::system_text;

/// The smallest part that QEMU names.
const SECTOR: u64 = 512;
/// A longer range was not read by sectors, and is named once: it may be most of a disk.
const MOST: u64 = 64 << 10;

/// The lines about the sectors `failed`, and about those whose extents could not be had.
pub(super) fn lines(failed: &[GivenUp], unmapped: &[GivenUp]) -> Vec<String> {
    let status =
        |(at, why)| (at, 0, format!("warning: error while reading block status at offset {at}: {why}"));
    let read = |(at, why)| (at, 1, format!("warning: error while reading offset {at}: {why}"));
    let counting = sectors(unmapped).map(status).map(|(.., line)| line);
    let mut copying: Vec<_> = sectors(unmapped).map(status).chain(sectors(failed).map(read)).collect();
    copying.sort_by_key(|(at, order, _)| (*at, *order));
    counting.chain(copying.into_iter().map(|(.., line)| line)).collect()
}

/// The sectors of `ranges`, with what the system says of them.
fn sectors(ranges: &[GivenUp]) -> impl Iterator<Item = (u64, String)> {
    ranges.iter().flat_map(|failed| {
        let why = failed.os_error.map(|number| system_text(&io::Error::from_raw_os_error(number)));
        let why = why.unwrap_or_else(|| failed.message.clone());
        let step = if failed.range.len() > MOST { failed.range.len() } else { SECTOR };
        failed.range.pieces(step).map(move |sector| (sector.start(), why.clone()))
    })
}
