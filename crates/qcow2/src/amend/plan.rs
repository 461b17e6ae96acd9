//! What an amendment will do, or why it is refused. Nothing is changed here.

use super::{AmendOptions, Meter, snapshots, width};
use crate::create_options::Version;
use crate::error::{Error, Result};
use crate::format::feature;
use crate::format::header::{Compression, Header};
use crate::image::Qcow2;
use crate::limits::MAX_BACKING_NAME;

/// The length of a disk is a multiple of this.
const SECTOR: u64 = 512;

/// The parts that change something.
#[derive(Debug)]
pub(super) struct Plan {
    /// The version before and after.
    version: (Version, Version),
    pub(super) lazy_refcounts: Option<bool>,
    pub(super) refcount_order: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) data_file: Option<Vec<u8>>,
    pub(super) data_file_not_raw: bool,
}

impl Plan {
    pub(super) fn new(image: &Qcow2, options: &AmendOptions, meter: &mut Meter<'_>) -> Result<Self> {
        let header = &*image.header();
        let before = if header.version == 2 { Version::V2 } else { Version::V3 };
        let mut plan = Self {
            version: (before, options.version.unwrap_or(before)),
            lazy_refcounts: None,
            refcount_order: None,
            size: options.size.filter(|size| *size > 0),
            data_file: None,
            data_file_not_raw: false,
        };
        check_backing(header, options)?;
        plan.take_lazy_refcounts(header, options)?;
        plan.take_refcount_bits(header, options)?;
        plan.take_data_file(header, options)?;
        if plan.size.is_some_and(|size| !size.is_multiple_of(SECTOR)) {
            return Err(refused("size", "it must be a multiple of 512"));
        }
        if plan.downgrades() {
            check_downgrade(image, header, plan.size.unwrap_or(header.virtual_size))?;
        }
        if let Some(order) = plan.refcount_order {
            width::check(&**image.storage(), header, order, meter)?;
        }
        Ok(plan)
    }

    /// Whether version 2 becomes 3.
    pub(super) fn upgrades(&self) -> bool {
        self.version == (Version::V2, Version::V3)
    }

    /// Whether version 3 becomes 2.
    pub(super) fn downgrades(&self) -> bool {
        self.version == (Version::V3, Version::V2)
    }

    fn take_lazy_refcounts(&mut self, header: &Header, options: &AmendOptions) -> Result<()> {
        let Some(lazy) = options.lazy_refcounts else { return Ok(()) };
        if lazy && self.version.1 == Version::V2 {
            return Err(refused("lazy_refcounts", "it needs compat=1.1, not 0.10"));
        }
        self.lazy_refcounts = (lazy != header.lazy_refcounts()).then_some(lazy);
        Ok(())
    }

    fn take_refcount_bits(&mut self, header: &Header, options: &AmendOptions) -> Result<()> {
        let bits = options.refcount_bits.unwrap_or(header.refcount_bits());
        if !bits.is_power_of_two() || bits > 64 {
            return Err(refused("refcount_bits", "1, 2, 4, 8, 16, 32 or 64 is allowed"));
        }
        if bits == 1 && header.snapshot_count > 0 {
            return Err(refused(
                "refcount_bits",
                "with 1 nothing can be shared, and the image has snapshots",
            ));
        }
        if bits != 16 && self.version.1 == Version::V2 {
            let (option, problem) = match options.refcount_bits {
                Some(_) => ("refcount_bits", "any but 16 needs compat=1.1, not 0.10"),
                None => ("compat", "0.10 needs refcount_bits=16"),
            };
            return Err(refused(option, problem));
        }
        let order = bits.trailing_zeros();
        self.refcount_order = (order != header.refcount_order).then_some(order);
        Ok(())
    }

    fn take_data_file(&mut self, header: &Header, options: &AmendOptions) -> Result<()> {
        let is_raw = header.data_file.as_ref().is_some_and(|data| data.raw);
        if options.data_file_raw == Some(true) && !is_raw {
            return Err(refused("data_file_raw", "it cannot be turned on in an existing image"));
        }
        self.data_file_not_raw = options.data_file_raw == Some(false) && is_raw;
        let Some(name) = &options.data_file else { return Ok(()) };
        let Some(data) = &header.data_file else {
            return Err(refused("data_file", "the image has no external data file"));
        };
        if name.is_empty() || name.len() > MAX_BACKING_NAME as usize || name.contains(&0) {
            return Err(refused("data_file", "a name has 1 to 1023 bytes, none of them NUL"));
        }
        let is_new = data.name.as_ref().is_none_or(|old| old.as_bytes() != name);
        self.data_file = is_new.then(|| name.clone());
        Ok(())
    }
}

fn refused(option: &'static str, problem: &str) -> Error {
    Error::Option { option, problem: problem.to_owned() }
}

/// The backing file can be named, and not changed.
fn check_backing(header: &Header, options: &AmendOptions) -> Result<()> {
    if options.backing_file.is_none() && options.backing_format.is_none() {
        return Ok(());
    }
    let old = header.backing.as_ref();
    let same_name = old.map(|backing| backing.name.as_bytes()) == options.backing_file.as_deref();
    let same_format = old.and_then(|backing| backing.format.as_ref()) == options.backing_format.as_ref();
    if same_name && same_format {
        return Ok(());
    }
    Err(refused("backing_file", "the backing file cannot be amended; a rebase changes it"))
}

/// Whether version 2 can say what the image holds.
fn check_downgrade(image: &Qcow2, header: &Header, size: u64) -> Result<()> {
    let features = header.incompatible & !feature::INCOMPATIBLE_COMPRESSION;
    if features != 0 {
        let problem = format!("0.10 cannot have the incompatible features {features:#x} of the image");
        return Err(refused("compat", &problem));
    }
    if header.bitmaps_valid() {
        return Err(refused("compat", "0.10 cannot have persistent bitmaps"));
    }
    if header.unknown_fields.iter().any(|byte| *byte != 0) {
        return Err(refused("compat", "the header has fields that 0.10 cannot have"));
    }
    if header.compression != Compression::Deflate && image.has_compressed_clusters()? {
        return Err(refused("compat", "0.10 cannot have zstd clusters, and the image has some"));
    }
    snapshots::check_downgrade(&**image.storage(), header, size)
}
