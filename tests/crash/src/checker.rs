//! A checker of qcow2 metadata that shares no code with the crate under test.
//!
//! Knows snapshots, bitmaps and compressed clusters. Anything but a leak is an error; the first one ends the
//! check.

use std::collections::HashSet;

use crate::directory::{be, bitmap_directory, bitmaps, snapshot_table, snapshots};

/// "Refcount is exactly one" in L1 and L2 entries.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What a sound image holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Clusters that are counted more often than something refers to them.
    pub leaks: u64,
    /// Clusters of the disk with a place in the file.
    pub allocated: u64,
}

/// What may be wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// COPIED may be clear where the refcount is one: inside of a snapshot operation.
    pub copied_clear: bool,
}

/// What a cluster of the file is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// By one structure alone.
    Alone(&'static str),
    /// An L2 table, or guest data, of any number of L1 tables, each of which refers to it once.
    Shared(&'static str, u32),
    /// Compressed runs, any number.
    Compressed,
}

/// The image that is checked.
struct Image<'a> {
    bytes: &'a [u8],
    cluster: u64,
    order: u64,
    has_zero: bool,
    extended: bool,
    external: bool,
    raw: bool,
    /// Length of the disk.
    len: u64,
    refcount_blocks: Vec<u64>,
    /// What lies in each cluster of the file, and how many refer to it.
    users: Vec<(Option<Use>, u64)>,
    findings: Findings,
}

/// Checks the image in `bytes`.
///
/// # Errors
/// The first damage found, in words.
pub fn check(bytes: &[u8], allowed: Allowed) -> Result<Findings, String> {
    let mut image = Image::open(bytes)?;
    image.refer(Use::Alone("the header"), 0, image.cluster)?;
    image.count_refcounts()?;
    let (l1_at, l1_len) = (be(bytes, 40, 8)?, be(bytes, 36, 4)?);
    image.count_l1("the L1 table", 0, l1_at, l1_len)?;
    image.count_snapshots()?;
    image.count_bitmaps()?;
    image.check_copied(l1_at, l1_len, allowed)?;
    image.compare()
}

impl<'a> Image<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self, String> {
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
        // External data, compression type, extended L2.
        if features & !0x1c != 0 {
            return Err(format!("incompatible features {features:#x}"));
        }
        let external = features & 4 != 0;
        let raw = external && be(bytes, 88, 8)? & 2 != 0;
        if be(bytes, 8, 8)? != 0 && be(bytes, 8, 8)? + be(bytes, 16, 4)? > cluster {
            return Err("the backing file's name leaves the first cluster".into());
        }
        let count = (bytes.len() as u64).div_ceil(cluster) as usize;
        Ok(Self {
            bytes,
            cluster,
            order,
            has_zero: version >= 3,
            extended: features & 0x10 != 0,
            external,
            raw,
            len: be(bytes, 24, 8)?,
            refcount_blocks: Vec::new(),
            users: vec![(None, 0); count],
            findings: Findings::default(),
        })
    }

    fn word(&self, at: u64) -> Result<u64, String> {
        be(self.bytes, at, 8)
    }

    fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    fn count_refcounts(&mut self) -> Result<(), String> {
        let (table, len) = (self.word(48)?, be(self.bytes, 56, 4)? * self.cluster / 8);
        self.refer(Use::Alone("the refcount table"), table, len * 8)?;
        for index in 0..len {
            let block = self.word(table + index * 8)?;
            if block & 511 != 0 {
                return Err(format!("refcount table entry {index} is {block:#x}"));
            }
            if block != 0 {
                self.refer(Use::Alone("a refcount block"), block, self.cluster)?;
            }
            self.refcount_blocks.push(block);
        }
        Ok(())
    }

    fn refcount(&self, index: u64) -> Result<u64, String> {
        let per_block = (self.cluster * 8) >> self.order;
        match self.refcount_blocks.get((index / per_block) as usize) {
            Some(0) | None => Ok(0),
            Some(block) => entry_of(self.bytes, *block, index % per_block, self.order),
        }
    }

    /// Counts an L1 table and all that it refers to. Tree 0 is the active one.
    fn count_l1(&mut self, what: &'static str, tree: u32, at: u64, len: u64) -> Result<(), String> {
        self.refer(Use::Alone(what), at, len * 8)?;
        let per_table = self.cluster / self.entry_size();
        let mut in_data_file = HashSet::new();
        for l1_index in 0..len {
            let l1 = self.word(at + l1_index * 8)?;
            if l1 == 0 {
                self.check_unmapped(l1_index * per_table * self.cluster)?;
                continue;
            }
            if l1 & !(COPIED | OFFSET) != 0 {
                return Err(format!("{what}: entry {l1_index} is {l1:#x}"));
            }
            let table = l1 & OFFSET;
            self.refer(Use::Shared("an L2 table", tree), table, self.cluster)?;
            for l2_index in 0..per_table {
                let entry = table + l2_index * self.entry_size();
                let guest = (l1_index * per_table + l2_index) * self.cluster;
                let found = self.count_entry(tree, entry, guest, &mut in_data_file);
                let allocated = found.map_err(|why| {
                    format!("{what}: entry {l2_index} of the L2 table of entry {l1_index}: {why}")
                })?;
                self.findings.allocated += u64::from(tree == 0 && allocated);
            }
        }
        Ok(())
    }

    /// Counts what the L2 entry at `at` refers to; whether that is anything.
    fn count_entry(
        &mut self,
        tree: u32,
        at: u64,
        guest: u64,
        in_data_file: &mut HashSet<u64>,
    ) -> Result<bool, String> {
        let l2 = self.word(at)?;
        let subclusters = if self.extended { self.word(at + 8)? } else { 0 };
        let place = format!("{l2:#x} {subclusters:#x}");
        if l2 & COMPRESSED != 0 {
            if l2 & COPIED != 0 || subclusters != 0 || self.external {
                return Err(format!("{place} is compressed"));
            }
            let shift = 62 - (self.cluster.trailing_zeros() - 8);
            let (from, sectors) = (l2 & ((1 << shift) - 1), (l2 & (COMPRESSED - 1)) >> shift);
            let (first, end) = (from / self.cluster, from / 512 * 512 + (sectors + 1) * 512);
            for cluster in first..=(end - 1) / self.cluster {
                self.refer_once(Use::Compressed, cluster)?;
            }
            return Ok(true);
        }
        let zero_flag = u64::from(self.has_zero && !self.extended);
        if l2 & !(COPIED | OFFSET | zero_flag) != 0 {
            return Err(format!("{place} has reserved bits"));
        }
        if subclusters >> 32 & subclusters != 0 {
            return Err(format!("{place} has subclusters both zero and allocated"));
        }
        if self.external {
            // Its clusters have no refcounts, and offset 0 is a place in it.
            if l2 & COPIED == 0 {
                self.check_unmapped(guest)?;
                return if l2 & OFFSET == 0 { Ok(false) } else { Err(format!("{place} is not COPIED")) };
            }
            let host = l2 & OFFSET;
            if !host.is_multiple_of(self.cluster) || (self.raw && host != guest) || !in_data_file.insert(host)
            {
                return Err(format!("{place} has no place of its own in the data file"));
            }
            return Ok(true);
        }
        if l2 & OFFSET == 0 {
            let empty = l2 & COPIED == 0 && subclusters & 0xffff_ffff == 0;
            return if empty { Ok(false) } else { Err(format!("{place} has no cluster")) };
        }
        self.refer(Use::Shared("guest data", tree), l2 & OFFSET, self.cluster)?;
        Ok(true)
    }

    /// A raw data file is mapped as a whole: what a guest writes there the image shows at once.
    fn check_unmapped(&self, guest: u64) -> Result<(), String> {
        if self.raw && guest < self.len {
            return Err(format!("the raw data file is not mapped at {guest:#x}"));
        }
        Ok(())
    }

    fn count_snapshots(&mut self) -> Result<(), String> {
        for (index, snapshot) in snapshots(self.bytes)?.iter().enumerate() {
            self.count_l1("the L1 table of a snapshot", index as u32 + 1, snapshot.l1_at, snapshot.l1_len)?;
        }
        let (at, len) = snapshot_table(self.bytes)?;
        self.refer(Use::Alone("the snapshot table"), at, len)
    }

    fn count_bitmaps(&mut self) -> Result<(), String> {
        let Some((at, len)) = bitmap_directory(self.bytes)? else { return Ok(()) };
        self.refer(Use::Alone("the bitmap directory"), at, len)?;
        for bitmap in bitmaps(self.bytes)? {
            self.refer(Use::Alone("a bitmap table"), bitmap.table_at, bitmap.table_len * 8)?;
            for index in 0..bitmap.table_len {
                let entry = self.word(bitmap.table_at + index * 8)?;
                if entry & OFFSET != 0 {
                    self.refer(Use::Alone("bitmap data"), entry & OFFSET, self.cluster)?;
                }
            }
        }
        Ok(())
    }

    /// COPIED says of active entries whether their refcount is one.
    fn check_copied(&self, l1_at: u64, l1_len: u64, allowed: Allowed) -> Result<(), String> {
        let agrees = |what: &str, entry: u64| -> Result<(), String> {
            let count = self.refcount((entry & OFFSET) / self.cluster)?;
            match (entry & COPIED != 0, count) {
                (true, 1) => Ok(()),
                (false, count) if count > 1 || (count == 1 && allowed.copied_clear) => Ok(()),
                (copied, count) => Err(format!("{what} {entry:#x}: refcount {count}, COPIED is {copied}")),
            }
        };
        for index in 0..l1_len {
            let l1 = self.word(l1_at + index * 8)?;
            if l1 == 0 {
                continue;
            }
            agrees("L1 entry", l1)?;
            for at in (0..self.cluster).step_by(self.entry_size() as usize) {
                let l2 = self.word((l1 & OFFSET) + at)?;
                if l2 & OFFSET != 0 && l2 & COMPRESSED == 0 && !self.external {
                    agrees("L2 entry", l2)?;
                }
            }
        }
        Ok(())
    }

    fn compare(mut self) -> Result<Findings, String> {
        for (index, (user, references)) in self.users.iter().enumerate() {
            let count = self.refcount(index as u64)?;
            if count < *references {
                return Err(format!(
                    "cluster {index} ({user:?}) has {references} references and refcount {count}"
                ));
            }
            self.findings.leaks += u64::from(count > *references);
        }
        Ok(self.findings)
    }

    /// Notes that what is used so lies in `len` bytes at `at`.
    fn refer(&mut self, what: Use, at: u64, len: u64) -> Result<(), String> {
        if !at.is_multiple_of(self.cluster) {
            return Err(format!("{what:?} at {at:#x} is not aligned"));
        }
        if len == 0 {
            return Ok(());
        }
        // Data may be cut by the end of the file inside its cluster; a table may not.
        let is_data = matches!(what, Use::Shared("guest data", _) | Use::Alone("bitmap data"));
        let needed = if is_data { at + 1 } else { at + len };
        if needed > self.bytes.len() as u64 {
            let end = self.bytes.len();
            return Err(format!("{what:?} at {at:#x} lies past the end of the file at {end:#x}"));
        }
        (at / self.cluster..(at + len).div_ceil(self.cluster))
            .try_for_each(|cluster| self.refer_once(what, cluster))
    }

    fn refer_once(&mut self, what: Use, cluster: u64) -> Result<(), String> {
        let Some((user, references)) = self.users.get_mut(cluster as usize) else {
            return Err(format!("{what:?} lies past the end of the file, in cluster {cluster}"));
        };
        let fits = match (*user, what) {
            (None, _) | (Some(Use::Compressed), Use::Compressed) => true,
            // Trees are counted one after the other.
            (Some(Use::Shared(other, last)), Use::Shared(kind, tree)) => other == kind && last != tree,
            _ => false,
        };
        if !fits {
            return Err(format!("{what:?} and {user:?} share cluster {cluster}"));
        }
        *user = Some(what);
        *references += 1;
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
