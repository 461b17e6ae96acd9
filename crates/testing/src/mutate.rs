//! Damages qcow2 images, one field at a time: header, header extensions, L1, L2, refcount table, refcounts.
//!
//! Finds the fields with a reader of its own, so that what it damages does not depend on the code that is to
//! survive it.

/// A change to one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutation {
    /// Which field, and what it became.
    pub label: String,
    /// Where it lies in the file.
    pub offset: usize,
    /// What it was.
    pub old: Vec<u8>,
    /// What it becomes.
    pub new: Vec<u8>,
}

/// Name, offset and width of the header's fields; those from offset 72 exist in version 3 only.
const HEADER: [(&str, usize, usize); 19] = [
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
    ("incompatible_features", 72, 8),
    ("compatible_features", 80, 8),
    ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
];

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

struct Fields<'a> {
    image: &'a [u8],
    cluster: u64,
    found: Vec<Mutation>,
}

/// Every mutation of `image`, which must be a sound qcow2 file.
pub fn mutations(image: &[u8]) -> Vec<Mutation> {
    let mut fields = Fields { image, cluster: 0, found: Vec::new() };
    let v3 = fields.number(4, 4) == 3;
    fields.cluster = 1 << fields.number(20, 4);
    let header = if v3 { &HEADER[..] } else { &HEADER[..13] };
    for &(name, offset, width) in header {
        fields.mutate(&format!("header {name}"), offset, width, &[]);
    }
    fields.extensions(if v3 { fields.number(100, 4) as usize } else { 72 });
    fields.mapping();
    fields.refcounts(if v3 { 1 << fields.number(96, 4) } else { 16 });
    fields.found
}

impl Fields<'_> {
    fn number(&self, offset: usize, width: usize) -> u64 {
        let bytes = self.image.get(offset..offset + width).unwrap_or_default();
        bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b))
    }

    /// Adds what the field at `offset` may be turned into.
    fn mutate(&mut self, name: &str, offset: usize, width: usize, more: &[u64]) {
        let Some(old) = self.image.get(offset..offset + width) else { return };
        let was = self.number(offset, width);
        let all = u64::MAX >> (64 - 8 * width);
        let top = 1 << (8 * width - 1);
        let mut values = vec![
            0,
            1,
            2,
            was.wrapping_add(1),
            was.wrapping_sub(1),
            was ^ 8,
            was ^ top,
            was << 1,
            was.wrapping_add(self.cluster),
            all,
            all >> 1,
            top,
            self.cluster,
            (self.image.len() as u64).next_multiple_of(self.cluster.max(1)),
        ];
        values.extend(more);
        let mut seen = vec![was];
        for value in values.into_iter().map(|v| v & all) {
            if seen.contains(&value) {
                continue;
            }
            seen.push(value);
            let new = (0..width).rev().map(|i| (value >> (8 * i)) as u8).collect();
            let label = format!("{name} at {offset:#x}: {was:#x} -> {value:#x}");
            self.found.push(Mutation { label, offset, old: old.to_vec(), new });
        }
    }

    /// Type and length of the first header extensions.
    fn extensions(&mut self, mut at: usize) {
        for _ in 0..4 {
            let (kind, len) = (self.number(at, 4), self.number(at + 4, 4) as usize);
            self.mutate("extension type", at, 4, &[0x2385_2875, 0x0537_be77, 0x4441_5441, 0xe279_2aca]);
            self.mutate("extension length", at + 4, 4, &[]);
            if kind == 0 || len > 4096 {
                return;
            }
            self.mutate("extension data", at + 8, 4, &[]);
            at += 8 + len.next_multiple_of(8);
        }
    }

    /// Values that an entry with a host offset may be turned into.
    fn entry_values(&self, was: u64, table: u64) -> Vec<u64> {
        const COPIED: u64 = 1 << 63;
        const COMPRESSED: u64 = 1 << 62;
        let end = (self.image.len() as u64).next_multiple_of(self.cluster);
        vec![
            was ^ COPIED,
            was ^ COMPRESSED,
            was ^ 0x200,
            was ^ (1 << 57),
            was ^ (1 << 4),
            COPIED,
            table | COPIED,
            end | COPIED,
            (end - self.cluster) | COPIED,
            (1 << 55) | COPIED,
            self.cluster | COPIED,
            COMPRESSED | 0x3fff_ffff_ffff_ffff,
            COMPRESSED | end,
            COMPRESSED | 100,
        ]
    }

    /// L1 entries, and the L2 entries below the first of them.
    fn mapping(&mut self) {
        let (l1, entries) = (self.number(40, 8), self.number(36, 4) as usize);
        let extended = self.number(72, 8) & 0x10 != 0 && self.number(4, 4) == 3;
        let mut tables = Vec::new();
        for (i, at) in (0..entries.min(64)).map(|i| (i, l1 as usize + 8 * i)) {
            let entry = self.number(at, 8);
            if entry & OFFSET_MASK != 0 {
                tables.push(entry & OFFSET_MASK);
            }
            if i < 2 || (tables.len() < 3 && entry != 0) {
                self.mutate("L1 entry", at, 8, &self.entry_values(entry, l1));
            }
        }
        let width = if extended { 16 } else { 8 };
        let mut mutated = 0;
        for table in tables {
            for at in (0..self.cluster as usize / width).map(|i| table as usize + width * i) {
                let entry = self.number(at, 8);
                if mutated < 7 && (entry != 0 || mutated == 0) {
                    mutated += 1;
                    self.mutate("L2 entry", at, 8, &self.entry_values(entry, table));
                    if extended {
                        let bitmap = self.number(at + 8, 8);
                        let both = [bitmap | (bitmap << 32) | (1 << 32) | 1, u64::MAX << 32, 0xffff_ffff];
                        self.mutate("L2 subclusters", at + 8, 8, &both);
                    }
                }
            }
        }
    }

    /// The first refcount table entries, and refcounts of the first clusters.
    fn refcounts(&mut self, bits: usize) {
        let table = self.number(48, 8);
        let block = self.number(table as usize, 8);
        for i in 0..2 {
            let at = table as usize + 8 * i;
            self.mutate("refcount table entry", at, 8, &self.entry_values(self.number(at, 8), table));
        }
        let width = (bits / 8).max(1);
        for i in 0..6 {
            self.mutate("refcount", block as usize + width * i, width, &[]);
        }
    }
}
