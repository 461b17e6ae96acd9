//! A checker of qcow2 metadata that shares no code with the crate under test.
//!
//! Knows images without snapshots, bitmaps and compressed clusters, which is what the crash scenarios make.
//! Anything but a leak is an error.

use std::collections::HashSet;

/// "Refcount is exactly one" in L1 and L2 entries.
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What a sound image holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Findings {
    /// Clusters that are counted and that nothing refers to.
    pub(crate) leaks: u64,
    /// Guest clusters with a place in the file.
    pub(crate) allocated: u64,
}

struct Image<'a> {
    bytes: &'a [u8],
    cluster: u64,
    /// What lies in each cluster of the file, and how many refer to it.
    users: Vec<(Option<&'static str>, u64)>,
}

/// Checks the image in `bytes`.
///
/// # Errors
/// The first damage found, in words.
pub(crate) fn check(bytes: &[u8]) -> Result<Findings, String> {
    if be(bytes, 0, 4)? != 0x5146_49fb {
        return Err("no magic".into());
    }
    let version = be(bytes, 4, 4)?;
    let cluster = 1 << be(bytes, 20, 4)?;
    let (features, order) = match version {
        2 => (0, 4),
        3 => (be(bytes, 72, 8)?, be(bytes, 96, 4)?),
        other => return Err(format!("version {other}")),
    };
    let (extended, external) = match features {
        0 => (false, false),
        0x10 => (true, false),
        4 => (false, true),
        other => return Err(format!("incompatible features {other:#x}")),
    };
    let raw = external && be(bytes, 88, 8)? & 2 != 0;
    if be(bytes, 8, 8)? != 0 && be(bytes, 8, 8)? + be(bytes, 16, 4)? > cluster {
        return Err("the backing file's name leaves the first cluster".into());
    }
    let count = (bytes.len() as u64).div_ceil(cluster) as usize;
    let mut image = Image { bytes, cluster, users: vec![(None, 0); count] };
    image.refer("the header", 0, cluster)?;

    let (l1_at, l1_len) = (be(bytes, 40, 8)?, be(bytes, 36, 4)?);
    image.refer("the L1 table", l1_at, l1_len * 8)?;
    let (table_at, table_len) = (be(bytes, 48, 8)?, be(bytes, 56, 4)? * cluster / 8);
    image.refer("the refcount table", table_at, table_len * 8)?;
    let mut blocks = Vec::new();
    for index in 0..table_len {
        let block = be(bytes, table_at + index * 8, 8)?;
        if block & 511 != 0 {
            return Err(format!("refcount table entry {index} is {block:#x}"));
        }
        if block != 0 {
            image.refer("a refcount block", block, cluster)?;
        }
        blocks.push(block);
    }
    let refcount = |index: u64| -> Result<u64, String> {
        let per_block = (cluster * 8) >> order;
        match blocks.get((index / per_block) as usize) {
            Some(0) | None => Ok(0),
            Some(block) => entry_of(bytes, *block, index % per_block, order),
        }
    };
    let exactly_one = |what: &str, entry: u64| -> Result<(), String> {
        let count = refcount((entry & OFFSET) / cluster)?;
        match (entry & COPIED != 0, count) {
            (true, 1) => Ok(()),
            (false, count) if count > 1 => Ok(()),
            (copied, count) => Err(format!("{what} {entry:#x}: refcount {count}, COPIED is {copied}")),
        }
    };

    let mut findings = Findings::default();
    let entry_size = if extended { 16 } else { 8 };
    let mut in_data_file = HashSet::new();
    for l1_index in 0..l1_len {
        let l1 = be(bytes, l1_at + l1_index * 8, 8)?;
        if l1 == 0 {
            continue;
        }
        if l1 & !(COPIED | OFFSET) != 0 {
            return Err(format!("L1 entry {l1_index} is {l1:#x}"));
        }
        exactly_one("L1 entry", l1)?;
        let table = l1 & OFFSET;
        image.refer("an L2 table", table, cluster)?;
        for l2_index in 0..cluster / entry_size {
            let at = table + l2_index * entry_size;
            let l2 = be(bytes, at, 8)?;
            let subclusters = if extended { be(bytes, at + 8, 8)? } else { 0 };
            let place = format!("L2 entry {l2_index} of table {l1_index}, {l2:#x} {subclusters:#x},");
            let zero_flag = u64::from(version >= 3 && !extended);
            if l2 & !(COPIED | OFFSET | zero_flag) != 0 {
                return Err(format!("{place} has reserved bits"));
            }
            if subclusters >> 32 & subclusters != 0 {
                return Err(format!("{place} has subclusters both zero and allocated"));
            }
            if external {
                // Its clusters have no refcounts, and offset 0 is a place in it.
                if l2 & COPIED == 0 {
                    if l2 & OFFSET != 0 {
                        return Err(format!("{place} is not COPIED"));
                    }
                    continue;
                }
                let guest = (l1_index * (cluster / entry_size) + l2_index) * cluster;
                let host = l2 & OFFSET;
                if !host.is_multiple_of(cluster) || (raw && host != guest) || !in_data_file.insert(host) {
                    return Err(format!("{place} has no place of its own in the data file"));
                }
                findings.allocated += 1;
                continue;
            }
            if l2 & OFFSET == 0 {
                if l2 & COPIED != 0 || subclusters & 0xffff_ffff != 0 {
                    return Err(format!("{place} has no cluster"));
                }
                continue;
            }
            exactly_one(&place, l2)?;
            image.refer("guest data", l2 & OFFSET, cluster)?;
            findings.allocated += 1;
        }
    }

    for (index, (user, references)) in image.users.iter().enumerate() {
        let count = refcount(index as u64)?;
        if count < *references {
            return Err(format!(
                "cluster {index} ({user:?}) has {references} references and refcount {count}"
            ));
        }
        findings.leaks += u64::from(count > *references);
    }
    Ok(findings)
}

impl Image<'_> {
    /// Notes that `what` lies at `at`; nothing else may.
    fn refer(&mut self, what: &'static str, at: u64, len: u64) -> Result<(), String> {
        if !at.is_multiple_of(self.cluster) {
            return Err(format!("{what} at {at:#x} is not aligned"));
        }
        if len == 0 {
            return Ok(());
        }
        // Data may be cut by the end of the file inside its cluster; a table may not.
        let needed = if what == "guest data" { at + 1 } else { at + len };
        if needed > self.bytes.len() as u64 {
            return Err(format!(
                "{what} at {at:#x} lies past the end of the file at {:#x}",
                self.bytes.len()
            ));
        }
        for index in at / self.cluster..(at + len).div_ceil(self.cluster) {
            let user = &mut self.users[index as usize];
            if let (Some(other), _) = user {
                return Err(format!("{what} and {other} share the cluster at {:#x}", index * self.cluster));
            }
            *user = (Some(what), 1);
        }
        Ok(())
    }
}

/// Entry `index` of the refcount block at `block`, `1 << order` bits wide.
fn entry_of(bytes: &[u8], block: u64, index: u64, order: u64) -> Result<u64, String> {
    if order >= 3 {
        let width = 1 << (order - 3);
        return be(bytes, block + index * width, width);
    }
    let bit = index << order;
    let byte = be(bytes, block + bit / 8, 1)?;
    Ok(byte >> (bit % 8) & ((1 << (1 << order)) - 1))
}

/// A big-endian number of `n` bytes at `at`.
fn be(bytes: &[u8], at: u64, n: u64) -> Result<u64, String> {
    let field = usize::try_from(at).ok().and_then(|at| bytes.get(at..at.checked_add(n as usize)?));
    let field = field.ok_or_else(|| format!("{n} bytes at {at:#x} lie past the end of the file"))?;
    Ok(field.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}
