//! A header that says something else: another backing file, another directory of bitmaps. Which bytes of the
//! first cluster change, in which order.
//!
//! Pure: the first cluster comes in, writes come out, each to be durable before the next. The fixed fields
//! lie in the first sector, which changes at once; what does not fit there is prepared first:
//!
//! 1. the name of the backing file, if there is an old one, at a place near the end of the cluster that the
//!    old one does not use; otherwise it follows the extensions, and is a part of what follows;
//! 2. if extensions past the first sector change: a shorter list of them that ends in the first sector
//!    (without the names of features, which no reader needs), still with what the header says now; then the
//!    new rest, with the names of features before extensions that are not known, as QEMU has them;
//! 3. the first sector, with the name's place, the autoclear bits and the extensions.
//!
//! So whatever a crash leaves, the header says the old or the new. Clusters below 4 KiB have no room for two
//! names; in an image with a backing file all is one write there, which a crash may tear where it is longer
//! than a sector.

use byteorder::{BigEndian, ByteOrder};

use super::extension::{
    self, BACKING_FORMAT, BITMAPS, BitmapsExtension, DATA_FILE, ENCRYPTION, END, FEATURE_NAMES,
};
use super::feature::AUTOCLEAR_BITMAPS;
use crate::error::{Error, Result};
use crate::limits::{MAX_BACKING_FORMAT, MAX_BACKING_NAME};

/// What a disk writes as a whole.
pub(super) const SECTOR: usize = 512;
/// Where the header holds the name's offset (8 bytes) and length (4 bytes).
const NAME_FIELD: std::ops::Range<usize> = 8..20;
/// Where a version 3 header holds the autoclear features.
const AUTOCLEAR_FIELD: std::ops::Range<usize> = 88..96;
/// Room for one name.
const SLOT: usize = 1024;
/// An old name, wherever it lies, touches at most two of three places.
const SLOTS: usize = 3;

/// A write into the first cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) at: usize,
    pub(crate) bytes: Vec<u8>,
}

/// The backing file that a header is to name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewBacking<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) format: Option<&'a str>,
}

impl NewBacking<'_> {
    /// # Errors
    /// A name or a format that cannot stand in a header.
    pub(crate) fn check(&self) -> Result<()> {
        let error = |option, problem| Err(Error::Option { option, problem });
        let (len, limit) = (self.name.len(), MAX_BACKING_NAME as usize);
        if len == 0 || len > limit {
            return error("backing_file", format!("the name has {len} bytes, 1 to {limit} are allowed"));
        }
        if self.name.contains(&0) {
            return error("backing_file", "the name has a NUL byte".into());
        }
        let format = self.format.unwrap_or("raw");
        if !(1..=MAX_BACKING_FORMAT).contains(&format.len()) || !format.bytes().all(|b| b.is_ascii_graphic())
        {
            return error("backing_fmt", format!("{format:?} is not the name of a format"));
        }
        Ok(())
    }
}

/// What may change in a header.
#[derive(Clone, Copy, Debug)]
struct Content<'a> {
    /// The backing file's name, empty for none.
    name: &'a [u8],
    format: Option<&'a [u8]>,
    /// The extension with the place of the bitmaps.
    bitmaps: Option<&'a [u8]>,
    /// Whether the autoclear bit of the bitmaps is set.
    bitmaps_valid: bool,
}

/// The parts of a header.
pub(super) struct Parts<'a> {
    pub(super) cluster: &'a [u8],
    fixed: &'a [u8],
    pub(super) records: Vec<(u32, &'a [u8])>,
    /// The old name's place in the cluster.
    pub(super) old: std::ops::Range<usize>,
}

/// The writes that make the header in `cluster`, the whole first cluster, name `new` as its backing file. The
/// header was found to be sound.
///
/// # Errors
/// A name that does not fit.
pub(crate) fn change_backing(
    cluster: &[u8],
    header_length: usize,
    new: Option<NewBacking<'_>>,
) -> Result<Vec<Step>> {
    let parts = Parts::new(cluster, header_length)?;
    let format = new.and_then(|new| new.format).map(str::as_bytes);
    let name = new.map_or(&[][..], |new| new.name);
    parts.steps(&Content { name, format, ..parts.content() }).ok_or_else(|| {
        let problem = format!("the name does not fit into a cluster of {} bytes", cluster.len());
        Error::Option { option: "backing_file", problem }
    })
}

/// The writes that make the header in `cluster` lead to the directory `new` of valid bitmaps, or to none.
///
/// # Errors
/// The extension does not fit.
pub(crate) fn change_bitmaps(
    cluster: &[u8],
    header_length: usize,
    new: Option<&BitmapsExtension>,
) -> Result<Vec<Step>> {
    let parts = Parts::new(cluster, header_length)?;
    let record = new.map(BitmapsExtension::encode);
    let bitmaps = record.as_ref().map(|record| &record[..]);
    parts.steps(&Content { bitmaps, bitmaps_valid: new.is_some(), ..parts.content() }).ok_or_else(|| {
        let problem = format!("it does not fit into a cluster of {} bytes", cluster.len());
        Error::Extension { name: "bitmaps", problem }
    })
}

impl<'a> Parts<'a> {
    pub(super) fn new(cluster: &'a [u8], header_length: usize) -> Result<Self> {
        let place = |range: std::ops::Range<usize>| &cluster[range];
        let offset = BigEndian::read_u64(place(NAME_FIELD.start..NAME_FIELD.start + 8)) as usize;
        let len = BigEndian::read_u32(place(NAME_FIELD.start + 8..NAME_FIELD.end)) as usize;
        let room_end = if offset == 0 { cluster.len() } else { offset };
        let old = if offset == 0 || len == 0 { 0..0 } else { offset..offset + len };
        Ok(Self {
            cluster,
            fixed: place(0..header_length),
            records: extension::records(place(header_length..room_end))?,
            old,
        })
    }

    /// What the header says now.
    fn content(&self) -> Content<'a> {
        let record = |wanted| self.records.iter().find(|(magic, _)| *magic == wanted).map(|(_, data)| *data);
        let autoclear = self.fixed.get(AUTOCLEAR_FIELD).map_or(0, BigEndian::read_u64);
        Content {
            name: &self.cluster[self.old.clone()],
            format: record(BACKING_FORMAT),
            bitmaps: record(BITMAPS),
            bitmaps_valid: autoclear & AUTOCLEAR_BITMAPS != 0,
        }
    }

    /// The writes that make the header say `new`; `None` if that does not fit.
    fn steps(&self, new: &Content<'_>) -> Option<Vec<Step>> {
        let whole = self.list(new, true);
        let unnamed = new.name.is_empty() && self.old.is_empty();
        let room = if unnamed { 0 } else { SLOTS * SLOT };
        let steps = (whole.len() + room <= self.cluster.len()).then(|| self.careful_steps(&whole, new));
        if let Some(steps) = steps.flatten() {
            return Some(steps);
        }
        let short = self.list(new, false);
        let fits = |head: &Vec<u8>| head.len() + new.name.len() <= self.cluster.len();
        let mut head = [whole, short].into_iter().find(fits)?;
        let at = head.len();
        point_at(&mut head, at, new.name.len());
        head.extend(new.name);
        Some(vec![Step { at: 0, bytes: head }])
    }

    /// Fixed fields and extensions, the known ones first; with or without the names of features.
    fn list(&self, content: &Content<'_>, names: bool) -> Vec<u8> {
        let mut out = self.fixed.to_vec();
        if let Some(field) = out.get_mut(AUTOCLEAR_FIELD) {
            let others = BigEndian::read_u64(field) & !AUTOCLEAR_BITMAPS;
            let valid = if content.bitmaps_valid { AUTOCLEAR_BITMAPS } else { 0 };
            BigEndian::write_u64(field, others | valid);
        }
        for (magic, data) in [(BACKING_FORMAT, content.format), (BITMAPS, content.bitmaps)] {
            if let Some(data) = data {
                extension::append(&mut out, magic, data);
            }
        }
        let rank = |magic: u32| match magic {
            BACKING_FORMAT | BITMAPS => None,
            ENCRYPTION | DATA_FILE => Some(0),
            FEATURE_NAMES => names.then_some(1),
            _ => Some(2),
        };
        for now in 0..=2 {
            for (magic, data) in self.records.iter().filter(|(magic, _)| rank(*magic) == Some(now)) {
                extension::append(&mut out, *magic, data);
            }
        }
        extension::append(&mut out, END, &[]);
        out
    }

    /// The steps for a cluster with room; `None` if what is needed in the first sector does not fit there.
    fn careful_steps(&self, whole: &[u8], new: &Content<'_>) -> Option<Vec<Step>> {
        let mut free = (1..=SLOTS)
            .filter_map(|i| self.cluster.len().checked_sub(i * SLOT))
            .filter(|at| self.old.end <= *at || at + SLOT <= self.old.start);
        let mut steps = Vec::new();
        let mut new_at = 0;
        let mut whole = whole.to_vec();
        if self.old.is_empty() && !new.name.is_empty() {
            // Behind the extensions, as QEMU has it: no old name is in the way.
            new_at = whole.len();
            whole.extend(new.name);
        } else if !new.name.is_empty() {
            new_at = free.next()?;
            steps.push(Step { at: new_at, bytes: new.name.to_vec() });
        }
        let rest = whole.get(SECTOR..).unwrap_or_default();
        if self.cluster[SECTOR..].get(..rest.len()) != Some(rest) {
            let mut short = self.list(&self.content(), false);
            if short.len() > SECTOR {
                return None;
            }
            // A list that has no end of its own ends where the name begins, so ours may reach into it.
            let cuts_name = !self.old.is_empty() && short.len() > self.old.start;
            let in_the_way = cuts_name || self.old.start < whole.len() && self.old.end > SECTOR;
            if in_the_way {
                let moved = free.next()?;
                steps.push(Step { at: moved, bytes: self.cluster[self.old.clone()].to_vec() });
                point_at(&mut short, moved, self.old.len());
            }
            steps.push(self.first_sector(short));
            steps.push(Step { at: SECTOR, bytes: rest.to_vec() });
        }
        let mut first = whole[..whole.len().min(SECTOR)].to_vec();
        point_at(&mut first, new_at, new.name.len());
        steps.push(self.first_sector(first));
        Some(steps)
    }

    /// A write of the first sector that begins with `head`. What follows is kept: the old name may lie there.
    fn first_sector(&self, mut head: Vec<u8>) -> Step {
        head.extend(&self.cluster[head.len()..SECTOR]);
        Step { at: 0, bytes: head }
    }
}

/// Puts the place of the name into the fixed fields; none if it is empty.
pub(super) fn point_at(head: &mut [u8], at: usize, len: usize) {
    let at = if len == 0 { 0 } else { at };
    BigEndian::write_u64(&mut head[NAME_FIELD.start..], at as u64);
    // At most 1023.
    BigEndian::write_u32(&mut head[NAME_FIELD.start + 8..], len as u32);
}
