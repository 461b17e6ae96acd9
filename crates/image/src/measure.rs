//! How long the file of a new image becomes, by the source that it is to hold or by a size.
//!
//! Called by the command. The figures are those of `qemu-img measure`, and [`Measurement::to_json`] has its
//! members. Nothing is created.

use std::path::Path;
use std::sync::Arc;

use blockmirror_block::{ByteRange, ExtentKind, Visit};
use blockmirror_filter::WholeUnits;
use blockmirror_qcow2::Version;
use blockmirror_qcow2::format::bitmaps::{BitmapEntry, Bitmaps};
use blockmirror_raw::SECTOR;
use serde_json::{Map, Value, json};

use crate::create::CreateSpec;
use crate::disk_image::Image;
use crate::error::Result;
use crate::format::Format;
use crate::options::CreateSettings;

/// What the file of an image takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Measurement {
    /// The length of the file with the data of the source, or of an empty image.
    pub required: u64,
    /// The length of the file with data in every part of the disk.
    pub fully_allocated: u64,
    /// What copies of the source's bitmaps take besides, if both formats have bitmaps.
    pub bitmaps: Option<u64>,
}

impl Measurement {
    /// The members of `qemu-img measure --output=json`, in its order.
    pub fn to_json(&self) -> Value {
        let mut out = Map::new();
        if let Some(bitmaps) = self.bitmaps {
            out.insert("bitmaps".into(), json!(bitmaps));
        }
        out.insert("required".into(), json!(self.required));
        out.insert("fully-allocated".into(), json!(self.fully_allocated));
        Value::Object(out)
    }
}

impl Measurement {
    /// An empty image of `format` with `size` bytes and `settings`, whose own size does not count.
    ///
    /// ```
    /// use blockmirror_image::{CreateSettings, Format, Measurement};
    ///
    /// let mut settings = CreateSettings::default();
    /// settings.parse(Format::Qcow2, "cluster_size=4K")?;
    /// let measured = Measurement::of_size(10 << 30, Format::Qcow2, &settings)?;
    /// assert_eq!(measured.required, 26_288_128);
    /// assert_eq!(measured.fully_allocated, 10_763_706_368);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Settings that are invalid, or do not fit together.
    pub fn of_size(size: u64, format: Format, settings: &CreateSettings) -> Result<Self> {
        Self::new(size, 0, None, format, settings)
    }

    /// An image of `format` and `settings` that is to hold the disk of `source`. Data of its whole chain
    /// counts; of a target that is to have a backing file it is not known what they have in common, and all
    /// of the disk counts.
    ///
    /// # Errors
    /// As for [`of_size`](Self::of_size); and if the source cannot be read.
    pub fn of_image(source: &Image, format: Format, settings: &CreateSettings) -> Result<Self> {
        let len = source.device().len();
        let bitmaps = bitmaps(source)?;
        let mut written = 0;
        if format == Format::Qcow2 {
            let cluster = settings.qcow2(len).cluster_size;
            written = match settings.backing_file {
                Some(_) => u64::MAX,
                None => clusters_with_data(source, cluster.max(SECTOR))?,
            };
        }
        Self::new(len, written, bitmaps.as_deref(), format, settings)
    }

    fn new(
        size: u64,
        written: u64,
        bitmaps: Option<&[BitmapEntry]>,
        format: Format,
        settings: &CreateSettings,
    ) -> Result<Self> {
        let name = Path::new("measure");
        let mut plain = settings.clone();
        (plain.backing_file, plain.backing_format, plain.data_file) = (None, None, None);
        match format {
            Format::Raw => {
                CreateSpec::new(format, size, plain).check(name)?;
                let len = size.next_multiple_of(SECTOR);
                Ok(Self { required: len, fully_allocated: len, bitmaps: None })
            }
            Format::Qcow2 => {
                let options = settings.qcow2(size);
                let size = options.measure(written).map_err(|error| error.in_file(&"measure".into()))?;
                let bitmaps = bitmaps.filter(|_| options.version == Version::V3);
                Ok(Self {
                    required: size.required,
                    fully_allocated: size.fully_allocated,
                    bitmaps: bitmaps.map(|bitmaps| options.measure_bitmaps(bitmaps)),
                })
            }
        }
    }
}

/// The bitmaps of an image; `None` if its format has none.
fn bitmaps(source: &Image) -> Result<Option<Vec<BitmapEntry>>> {
    let Some(image) = source.qcow2().filter(|image| image.header().version >= 3) else { return Ok(None) };
    let header = image.header();
    let Some(extension) = header.bitmaps.as_ref().filter(|_| header.bitmaps_valid()) else {
        return Ok(Some(Vec::new()));
    };
    let name = image.storage().name().into();
    let read = Bitmaps::new(&**image.storage(), extension).and_then(Iterator::collect);
    Ok(Some(read.map_err(|error| error.in_file(&name))?))
}

/// How many clusters of a copy of `source` hold data, as far as its extents tell.
fn clusters_with_data(source: &Image, cluster: u64) -> Result<u64> {
    let device = WholeUnits::new(Arc::clone(source.device()), cluster);
    let len = source.device().len();
    let mut clusters = 0;
    blockmirror_block::BlockDevice::extents(&device, ByteRange::new(0, len), &mut |extent| {
        if extent.kind == ExtentKind::Data {
            clusters += extent.range.len().div_ceil(cluster);
        }
        Visit::Continue(())
    })?;
    Ok(clusters)
}
