//! `map`: what lies where, one row per run.
//!
//! Rows come out as the device reports its extents; nothing is collected, so that an image with millions of
//! runs costs no memory.

use std::io::{self, Write};

use blockmirror_block::{BlockDevice, ByteRange, Error, Extent, ExtentKind, ExtentMerger, HostRun, Visit};

/// One run, with the members of `qemu-img map --output=json`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapRow {
    /// First guest byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// The layer of the chain that answers; 0 is the image itself.
    pub depth: u32,
    /// Whether any layer says something about it.
    pub present: bool,
    /// Whether it is known to read as zeros.
    pub zero: bool,
    /// Whether bytes are stored for it. With `zero`: the format maps bytes that its file holds a hole for.
    pub data: bool,
    /// Whether it is stored compressed.
    pub compressed: bool,
    /// Where its bytes lie as they are, and in which file.
    pub host: Option<(u64, String)>,
}

impl MapRow {
    /// Writes the row as `qemu-img map --output=json` does, without what stands between two of them.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_json(&self, out: &mut dyn Write) -> io::Result<()> {
        write!(
            out,
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \
             \"compressed\": {}",
            self.start, self.length, self.depth, self.present, self.zero, self.data, self.compressed
        )?;
        if let Some((offset, _)) = &self.host {
            write!(out, ", \"offset\": {offset}")?;
        }
        out.write_all(b"}")
    }
}

/// Hands the rows of `range` of `device` to `visit`, in order.
///
/// `progress` hears up to which offset was looked, also inside a long row, and says whether to go on.
///
/// # Errors
/// What the device reports.
pub fn map(
    device: &dyn BlockDevice,
    range: ByteRange,
    progress: &mut dyn FnMut(u64) -> Visit,
    visit: &mut dyn FnMut(MapRow) -> Visit,
) -> Result<(), Error> {
    let range = range.intersect(ByteRange::new(0, device.len()));
    if range.is_empty() {
        return Ok(());
    }
    let mut row = |extent: Extent| {
        visit(MapRow {
            start: extent.range.start(),
            length: extent.range.len(),
            depth: extent.depth,
            present: !extent.kind.is_unallocated(),
            zero: extent.reads_as_zero(),
            data: extent.kind == ExtentKind::Data || extent.mapped_hole,
            compressed: extent.compressed,
            host: extent.host.map(HostRun::in_file).map(|run| (run.offset, run.storage.name().to_owned())),
        })
    };
    let mut merger = ExtentMerger::default();
    let mut stopped = false;
    device.extents(range, &mut |mut extent| {
        let end = extent.range.end();
        extent.partial = false;
        stopped = merger.push(extent, &mut row).is_break() || progress(end).is_break();
        if stopped { Visit::Break(()) } else { Visit::Continue(()) }
    })?;
    if !stopped {
        let _ = merger.finish(&mut row);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_looks_like_qemu_img() {
        let mut row = MapRow {
            start: 0,
            length: 512,
            depth: 1,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            host: Some((65536, "disk".to_owned())),
        };
        let shown = |row: &MapRow| {
            let mut out = Vec::new();
            row.write_json(&mut out).map(|()| String::from_utf8(out))
        };
        let want = r#"{ "start": 0, "length": 512, "depth": 1, "present": true, "zero": false, "data": true, "compressed": false, "offset": 65536}"#;
        assert!(matches!(shown(&row), Ok(Ok(text)) if text == want));
        row.host = None;
        assert!(matches!(shown(&row), Ok(Ok(text)) if text.ends_with(r#""compressed": false}"#)));
    }
}
