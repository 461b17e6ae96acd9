//! The images that sequences start from: versions, cluster sizes, layers, and what is in them.

use std::fmt;
use std::sync::Arc;

use blockmirror_block::testing::{MemoryStorage, Rng};
use blockmirror_block::{BlockDevice, ByteRange, Result, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{BitmapOptions, CreateOptions, NewSnapshot, OpenOptions, Qcow2, Version};
use blockmirror_raw::{Raw, RawOptions};

use crate::damage;
use crate::files::{ImageFiles, PerFile};

/// The name that the header gives the backing file at first.
pub(crate) const BACKING_NAME: &str = "base.raw";
/// The name of the external data file.
pub(crate) const DATA_NAME: &str = "data.raw";

/// The image that a sequence starts from.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// The version of the format.
    pub version: Version,
    /// Bytes per cluster.
    pub cluster: u64,
    /// Whether clusters have subclusters.
    pub extended: bool,
    /// Whether there is a backing file.
    pub backed: bool,
    /// Where guest data lies.
    pub data: DataPlace,
    /// What is in the image.
    pub contents: Contents,
}

/// Where guest data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPlace {
    /// In the image.
    Inside,
    /// In an external data file.
    External,
    /// In an external data file that is a valid raw image.
    Raw,
}

/// What is in the image to begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Nothing.
    Empty,
    /// Data to overwrite, and freed clusters to use again.
    Populated,
    /// So much data that a few clusters more need a larger refcount table. For clusters of 512 bytes.
    TableFull,
    /// As populated, but the refcounts lag behind and the image is marked dirty: opening it repairs it.
    Dirty,
    /// As populated; then a snapshot was taken, and some of it overwritten.
    Snapshots,
    /// As populated, but refcounts and COPIED flags are wrong, and a refcount block is lost.
    Damaged,
    /// As populated; then persistent bitmaps have recorded a write, and a snapshot was taken if the image can
    /// have one.
    Bitmaps,
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "compat {}, clusters of {}", self.version.as_str(), self.cluster)?;
        let words = [
            (self.extended, "extended L2"),
            (self.backed, "backed"),
            (self.data == DataPlace::External, "data file"),
            (self.data == DataPlace::Raw, "raw data file"),
        ];
        for (_, word) in words.into_iter().filter(|(set, _)| *set) {
            write!(f, ", {word}")?;
        }
        write!(f, ", {:?}", self.contents)
    }
}

impl Start {
    /// An image of version 3 without layers, data inside.
    pub const fn new(cluster: u64, contents: Contents) -> Self {
        Self {
            version: Version::V3,
            cluster,
            extended: false,
            backed: false,
            data: DataPlace::Inside,
            contents,
        }
    }

    /// Every start of `cargo xtask crash`. The first is the one that sequences of three are played on.
    pub fn all() -> Vec<Self> {
        let mut starts = vec![Self::new(512, Contents::Populated)];
        let formats = [
            (Version::V3, 512, false),
            (Version::V3, 4096, false),
            (Version::V3, 16384, true),
            (Version::V2, 512, false),
            (Version::V2, 4096, false),
        ];
        for (version, cluster, extended) in formats {
            for backed in [false, true] {
                for contents in [Contents::Empty, Contents::Populated] {
                    let start = Self { version, extended, backed, ..Self::new(cluster, contents) };
                    starts.push(start);
                }
            }
        }
        starts.remove(2);
        for (cluster, backed, data) in [
            (512, false, DataPlace::External),
            (4096, true, DataPlace::External),
            (4096, false, DataPlace::Raw),
        ] {
            for contents in [Contents::Empty, Contents::Populated] {
                starts.push(Self { backed, data, ..Self::new(cluster, contents) });
            }
        }
        for (cluster, backed) in [(512, false), (4096, true)] {
            for contents in [Contents::Snapshots, Contents::Dirty, Contents::Damaged] {
                starts.push(Self { backed, ..Self::new(cluster, contents) });
            }
        }
        for (cluster, backed, data) in [
            (512, false, DataPlace::Inside),
            (4096, true, DataPlace::Inside),
            (4096, false, DataPlace::External),
        ] {
            starts.push(Self { backed, data, ..Self::new(cluster, Contents::Bitmaps) });
        }
        starts.push(Self { extended: true, data: DataPlace::Raw, ..Self::new(16384, Contents::Populated) });
        starts.push(Self { version: Version::V2, ..Self::new(512, Contents::Snapshots) });
        starts.push(Self { extended: true, backed: true, ..Self::new(16384, Contents::Snapshots) });
        starts.push(Self::new(512, Contents::TableFull));
        starts
    }

    /// The longest sequences that are played on it, all of them.
    pub(crate) fn longest(self) -> usize {
        if self.contents == Contents::TableFull { 1 } else { 2 }
    }

    /// Length of the disk. Ends inside a cluster where clusters are larger than a sector; has more than one
    /// L2 table where they are small.
    pub(crate) fn len(self) -> u64 {
        self.base() + if self.cluster == 512 { 80 << 10 } else { self.cluster * 9 + 512 }
    }

    /// Where operations go; all before it is data.
    pub(crate) fn base(self) -> u64 {
        if self.contents == Contents::TableFull { 2_029_568 } else { 0 }
    }

    fn options(self) -> CreateOptions {
        let mut options = CreateOptions::new(self.len());
        options.version = self.version;
        options.cluster_size = self.cluster;
        // Wide entries make many refcount blocks, narrow ones share bytes.
        options.refcount_bits = match (self.version, self.cluster) {
            (Version::V3, 512) => 64,
            (Version::V3, 4096) => 4,
            _ => 16,
        };
        options.extended_l2 = self.extended;
        options.backing_file = self.backed.then(|| BACKING_NAME.into());
        options.backing_format = self.backed.then(|| "raw".to_owned());
        options.data_file = (self.data != DataPlace::Inside).then(|| DATA_NAME.into());
        options.data_file_raw = self.data == DataPlace::Raw;
        options
    }

    /// The disk below, a little shorter than the one above.
    fn backing_contents(self) -> Vec<u8> {
        pattern(0xb0, 0, self.len() - self.cluster)
    }

    /// Opens `files` as an image of this kind.
    pub(crate) fn open(self, files: &ImageFiles, writable: bool) -> Result<Qcow2> {
        Ok(open_options(files)?.writable(writable).open(Arc::clone(&files.image))?)
    }

    /// The files to begin with.
    pub(crate) fn make(self) -> Result<PerFile<Vec<u8>>> {
        let empty = || Arc::new(MemoryStorage::new());
        let files = PerFile {
            image: empty(),
            data: (self.data != DataPlace::Inside).then(empty),
            backing: self.backed.then(|| Arc::new(MemoryStorage::with_contents(&self.backing_contents()))),
        };
        let data = files.data.as_deref().map(|data| data as &dyn Storage);
        self.options().create(&*files.image, data)?;
        if self.contents != Contents::Empty {
            self.populate(&self.open(&files.storages(), true)?)?;
        }
        let mut files = files.map(|file| file.to_vec());
        match self.contents {
            Contents::Dirty => damage::make_dirty(&mut files.image),
            Contents::Damaged => damage::damage(&mut files.image),
            _ => {}
        }
        Ok(files)
    }

    fn populate(self, disk: &Qcow2) -> Result<()> {
        let written = if self.contents == Contents::TableFull { self.base() } else { 6 * self.cluster };
        disk.write_at(&pattern(0x50, 0, written), 0, WriteFlags::NONE)?;
        disk.flush()?;
        if self.contents == Contents::TableFull {
            return Ok(());
        }
        let range = |n: u64| ByteRange::at(self.cluster * n, self.cluster);
        disk.write_zeroes(range(1), ZeroFlags::MAY_UNMAP)?;
        disk.discard(range(4))?;
        let has_bitmaps = self.contents == Contents::Bitmaps;
        if has_bitmaps {
            disk.add_bitmap("on", &BitmapOptions::new().granularity(512))?;
            disk.add_bitmap("off", &BitmapOptions::new().granularity(2048))?;
        }
        if self.contents == Contents::Snapshots || (has_bitmaps && self.data == DataPlace::Inside) {
            disk.create_snapshot(&NewSnapshot::new("start"))?;
        }
        if has_bitmaps || self.contents == Contents::Snapshots {
            disk.write_at(&pattern(0x51, 0, 2 * self.cluster), self.cluster * 2, WriteFlags::NONE)?;
        }
        if has_bitmaps {
            disk.disable_bitmap("off")?;
            disk.store_bitmaps()?;
        }
        disk.flush()
    }
}

/// What lies below the image in `files`, and beside it.
pub(crate) fn open_options(files: &ImageFiles) -> Result<OpenOptions> {
    let mut options = OpenOptions::new();
    if let Some(backing) = &files.backing {
        let disk: Arc<dyn BlockDevice> = Arc::new(Raw::open(Arc::clone(backing), RawOptions::new())?);
        options = options.backing(disk);
    }
    if let Some(data) = &files.data {
        options = options.data_file(Arc::clone(data));
    }
    Ok(options)
}

/// Bytes that depend on `who` wrote them and on where they belong. None is zero.
pub(crate) fn pattern(who: u8, at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(|i| who ^ (i / 512 * 37 + i % 7) as u8 | 1).collect()
}

/// The same of bytes that do not become smaller by compression.
pub(crate) fn noise(who: u8, at: u64, len: u64) -> Vec<u8> {
    Rng::new(at, u64::from(who)).nonzero_bytes(len)
}
