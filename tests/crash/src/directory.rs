//! The directories of an image, snapshots and bitmaps, read without the crate under test.

/// A snapshot, as the snapshot table lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListedSnapshot {
    pub(crate) id: Vec<u8>,
    pub(crate) name: Vec<u8>,
    pub(crate) l1_at: u64,
    pub(crate) l1_len: u64,
    /// Length of the disk, if the entry has it.
    pub(crate) disk_size: Option<u64>,
}

/// A bitmap, as the directory lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListedBitmap {
    pub(crate) name: Vec<u8>,
    pub(crate) table_at: u64,
    pub(crate) table_len: u64,
    pub(crate) in_use: bool,
    /// Whether it records.
    pub(crate) auto: bool,
    pub(crate) granularity: u64,
}

/// A big-endian number of `n` bytes at `at`.
pub(crate) fn be(bytes: &[u8], at: u64, n: u64) -> Result<u64, String> {
    let field = slice(bytes, at, n)?;
    Ok(field.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn slice(bytes: &[u8], at: u64, n: u64) -> Result<&[u8], String> {
    let field = usize::try_from(at).ok().and_then(|at| bytes.get(at..at.checked_add(n as usize)?));
    field.ok_or_else(|| format!("{n} bytes at {at:#x} lie past the end of the file"))
}

/// All snapshots of the image in `bytes`.
pub(crate) fn snapshots(bytes: &[u8]) -> Result<Vec<ListedSnapshot>, String> {
    Ok(read_snapshots(bytes)?.0)
}

/// Where the snapshot table lies, and its length.
pub(crate) fn snapshot_table(bytes: &[u8]) -> Result<(u64, u64), String> {
    let (list, end) = read_snapshots(bytes)?;
    let start = be(bytes, 64, 8)?;
    Ok(if list.is_empty() { (0, 0) } else { (start, end - start) })
}

fn read_snapshots(bytes: &[u8]) -> Result<(Vec<ListedSnapshot>, u64), String> {
    let mut list = Vec::new();
    let mut at = be(bytes, 64, 8)?;
    for _ in 0..be(bytes, 60, 4)? {
        let (id, name, extra) = (be(bytes, at + 12, 2)?, be(bytes, at + 14, 2)?, be(bytes, at + 36, 4)?);
        let names = at + 40 + extra;
        list.push(ListedSnapshot {
            id: slice(bytes, names, id)?.to_vec(),
            name: slice(bytes, names + id, name)?.to_vec(),
            l1_at: be(bytes, at, 8)?,
            l1_len: be(bytes, at + 8, 4)?,
            disk_size: if extra >= 16 { Some(be(bytes, at + 48, 8)?) } else { None },
        });
        at = (names + id + name).next_multiple_of(8);
    }
    Ok((list, at))
}

/// Where the directory of valid bitmaps lies, and its length.
pub(crate) fn bitmap_directory(bytes: &[u8]) -> Result<Option<(u64, u64)>, String> {
    if be(bytes, 4, 4)? < 3 || be(bytes, 88, 8)? & 1 == 0 {
        return Ok(None);
    }
    let mut at = be(bytes, 100, 4)?;
    loop {
        match (be(bytes, at, 4)?, be(bytes, at + 4, 4)?) {
            (0, _) => return Ok(None),
            (0x2385_2875, _) => return Ok(Some((be(bytes, at + 24, 8)?, be(bytes, at + 16, 8)?))),
            (_, len) => at += 8 + len.next_multiple_of(8),
        }
    }
}

/// All valid bitmaps of the image in `bytes`.
pub(crate) fn bitmaps(bytes: &[u8]) -> Result<Vec<ListedBitmap>, String> {
    let Some((mut at, len)) = bitmap_directory(bytes)? else { return Ok(Vec::new()) };
    let end = at + len;
    let mut list = Vec::new();
    while at < end {
        let (name, extra) = (be(bytes, at + 18, 2)?, be(bytes, at + 20, 4)?);
        list.push(ListedBitmap {
            name: slice(bytes, at + 24 + extra, name)?.to_vec(),
            table_at: be(bytes, at, 8)?,
            table_len: be(bytes, at + 8, 4)?,
            in_use: be(bytes, at + 12, 4)? & 1 != 0,
            auto: be(bytes, at + 12, 4)? & 2 != 0,
            granularity: 1 << be(bytes, at + 17, 1)?,
        });
        at = (at + 24 + extra + name).next_multiple_of(8);
    }
    Ok(list)
}

/// The bits of `bitmap`, of the disk in the image in `bytes`.
pub(crate) fn bits(bytes: &[u8], bitmap: &ListedBitmap) -> Result<Vec<bool>, String> {
    let (cluster, size) = (1_u64 << be(bytes, 20, 4)?, be(bytes, 24, 8)?);
    let granules = size.div_ceil(bitmap.granularity);
    let needed = granules.div_ceil(8).div_ceil(cluster);
    if bitmap.table_len != needed {
        return Err(format!("a bitmap table of {} entries, where {needed} are needed", bitmap.table_len));
    }
    let mut bits = Vec::new();
    for granule in 0..granules {
        let (index, byte) = (granule / 8 / cluster, granule / 8 % cluster);
        let entry = be(bytes, bitmap.table_at + index * 8, 8)?;
        bits.push(match entry & 0x00ff_ffff_ffff_fe00 {
            0 => entry & 1 != 0,
            // What lies past the end of the file is zeros.
            at => be(bytes, at + byte, 1).unwrap_or(0) >> (granule % 8) & 1 != 0,
        });
    }
    Ok(bits)
}
