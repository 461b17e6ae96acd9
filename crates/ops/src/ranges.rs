//! Ranges of a disk as JSON lines: where a copy differs, and what is to be copied again. The format is that
//! of docs/ranges.md.
//!
//! What must hold: whatever is in a file, memory is bounded by the length of the disk (40 MiB for the bitmap)
//! and one line, and work by the length of the file.

use std::io::{self, BufRead, Read, Write};

use blockmirror_bitmap::{DirtyBitmap, affordable_granularity};
use blockmirror_block::ByteRange;
use serde_json::Value;

/// The longest line that is read.
const MAX_LINE: usize = 4096;

/// Why a file of ranges was not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RangesError {
    /// The file cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The disk is one that no bitmap is made for.
    #[error("a disk of {len} bytes is too long")]
    Disk {
        /// Its length.
        len: u64,
    },
    /// A line is wrong.
    #[error("line {line}: {why}")]
    Line {
        /// The number of the line, from 1 on.
        line: u64,
        /// What is wrong with it.
        why: RangeProblem,
    },
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeProblem {
    /// It has more bytes than a line may have.
    #[error("it is longer than {MAX_LINE} bytes")]
    TooLong,
    /// It is no object with the two members.
    #[error("it is no JSON object with the numbers \"start\" and \"length\"")]
    NoRange,
    /// The range has no bytes.
    #[error("the range is empty")]
    Empty,
    /// The range reaches past the end of the disk.
    #[error("{length} bytes at {start} reach past the end of the disk at {len}")]
    OutOfBounds {
        /// Where it starts.
        start: u64,
        /// Its length.
        length: u64,
        /// The length of the disk.
        len: u64,
    },
    /// The range starts before the end of the one before it.
    #[error("it starts at {start}, before the end of the previous range at {end}")]
    Order {
        /// Where it starts.
        start: u64,
        /// Where the previous one ends.
        end: u64,
    },
}

/// Writes `range` as one line.
///
/// # Errors
/// What `out` reports.
pub fn write_range(out: &mut impl Write, range: ByteRange) -> io::Result<()> {
    writeln!(out, "{{\"start\":{},\"length\":{}}}", range.start(), range.len())
}

/// Reads the ranges of a disk of `len` bytes, which are in order and do not overlap. Empty lines are left
/// out.
///
/// ```
/// use blockmirror_ops::read_ranges;
///
/// let text = "{\"start\":0,\"length\":512}\n{\"length\":4096,\"start\":65536}\n";
/// let ranges = read_ranges(&mut text.as_bytes(), 1 << 20)?;
/// assert_eq!(ranges.runs().collect::<Vec<_>>(), [0..512, 65536..69632]);
/// assert!(read_ranges(&mut text.as_bytes(), 1 << 16).is_err());
/// # Ok::<(), blockmirror_ops::RangesError>(())
/// ```
///
/// # Errors
/// [`RangesError`], with the line.
pub fn read_ranges(file: &mut dyn BufRead, len: u64) -> Result<DirtyBitmap, RangesError> {
    let bitmap = DirtyBitmap::new(len, affordable_granularity(len));
    let mut ranges = bitmap.map_err(|_| RangesError::Disk { len })?;
    let (mut text, mut end) = (Vec::new(), 0);
    for line in 1.. {
        text.clear();
        if file.take(MAX_LINE as u64 + 1).read_until(b'\n', &mut text)? == 0 {
            break;
        }
        let range = parse(&text, end, len).map_err(|why| RangesError::Line { line, why })?;
        if let Some(range) = range {
            ranges.set(range.start()..range.end());
            end = range.end();
        }
    }
    Ok(ranges)
}

/// The range of a line; `previous` is the end of the one before.
fn parse(text: &[u8], previous: u64, len: u64) -> Result<Option<ByteRange>, RangeProblem> {
    if text.len() > MAX_LINE {
        return Err(RangeProblem::TooLong);
    }
    let text = text.trim_ascii();
    if text.is_empty() {
        return Ok(None);
    }
    let value: Value = serde_json::from_slice(text).map_err(|_| RangeProblem::NoRange)?;
    let member = |name: &str| value.get(name).and_then(Value::as_u64).ok_or(RangeProblem::NoRange);
    let (start, length) = (member("start")?, member("length")?);
    if length == 0 {
        return Err(RangeProblem::Empty);
    }
    match start.checked_add(length) {
        Some(end) if end <= len => {}
        _ => return Err(RangeProblem::OutOfBounds { start, length, len }),
    }
    if start < previous {
        return Err(RangeProblem::Order { start, end: previous });
    }
    Ok(Some(ByteRange::at(start, length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 1 << 20;

    fn problem(text: &[u8]) -> (u64, RangeProblem) {
        match read_ranges(&mut &*text, LEN) {
            Err(RangesError::Line { line, why }) => (line, why),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let ranges = [ByteRange::new(0, 512), ByteRange::new(512, 1024), ByteRange::new(LEN - 512, LEN)];
        let mut text = Vec::new();
        for range in ranges {
            write_range(&mut text, range).unwrap();
        }
        assert!(text.starts_with(b"{\"start\":0,\"length\":512}\n"));
        let read = read_ranges(&mut &*text, LEN).unwrap();
        assert_eq!(read.runs().collect::<Vec<_>>(), [0..1024, LEN - 512..LEN]);
        let relaxed = b"\n { \"why\" : [1], \"length\": 512, \"start\": 0 } \r\n";
        assert_eq!(read_ranges(&mut &relaxed[..], LEN).unwrap().dirty_bytes(), 512);
        assert!(read_ranges(&mut &b""[..], LEN).unwrap().is_clean());
    }

    #[test]
    fn hostile_lines_are_refused_each_for_its_reason() {
        for text in [
            "1",
            "[]",
            "null",
            "{}",
            "{\"start\":0}",
            "x",
            "{\"start\":-1,\"length\":1}",
            "{\"start\":0.5,\"length\":1}",
            "{\"start\":\"0\",\"length\":1}",
            "{\"start\":18446744073709551616,\"length\":1}",
            "{\"start\":0,\"length\":1} {}",
            "\u{0}",
        ] {
            assert_eq!(problem(text.as_bytes()), (1, RangeProblem::NoRange), "{text}");
        }
        assert_eq!(problem(&[0xff]), (1, RangeProblem::NoRange));
        assert_eq!(problem(b"\n{\"start\":5,\"length\":0}"), (2, RangeProblem::Empty));
        for (start, length) in [(LEN, 1), (0, LEN + 1), (u64::MAX, 1), (1, u64::MAX)] {
            let text = format!("{{\"start\":{start},\"length\":{length}}}");
            let why = RangeProblem::OutOfBounds { start, length, len: LEN };
            assert_eq!(problem(text.as_bytes()), (1, why));
        }
        let back = b"{\"start\":4096,\"length\":512}\n{\"start\":0,\"length\":512}";
        assert_eq!(problem(back), (2, RangeProblem::Order { start: 0, end: 4608 }));
        let overlap = b"{\"start\":0,\"length\":512}\n{\"start\":511,\"length\":1}";
        assert_eq!(problem(overlap), (2, RangeProblem::Order { start: 511, end: 512 }));
        let deep = "[".repeat(3000);
        assert_eq!(problem(deep.as_bytes()), (1, RangeProblem::NoRange));
    }

    /// A file without an end of line must not be read into memory.
    #[test]
    fn a_line_without_an_end_is_refused_at_its_bound() {
        let mut endless = io::BufReader::new(io::repeat(b' '));
        match read_ranges(&mut endless, LEN) {
            Err(RangesError::Line { line: 1, why: RangeProblem::TooLong }) => {}
            other => panic!("{other:?}"),
        }
        let mut line = "{\"start\":0,\"length\":512}".to_owned();
        line += &" ".repeat(MAX_LINE - line.len());
        assert_eq!(read_ranges(&mut line.as_bytes(), LEN).unwrap().dirty_bytes(), 512);
    }
}
