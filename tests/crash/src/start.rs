//! The images that sequences start from: versions, cluster sizes, layers, and what is in them.

use std::fmt;
use std::sync::Arc;

use blockmirror_block::testing::{MemoryDisk, MemoryStorage};
use blockmirror_block::{BlockDevice, ByteRange, Result, Storage, WriteFlags, ZeroFlags};
use blockmirror_qcow2::{CreateOptions, NewSnapshot, OpenOptions, Qcow2, Version};

use crate::damage;

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

/// The storages of an image.
#[derive(Clone, Debug)]
pub(crate) struct ImageFiles {
    pub(crate) image: Arc<dyn Storage>,
    /// The external data file.
    pub(crate) data: Option<Arc<dyn Storage>>,
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
    pub(crate) fn backing_contents(self) -> Option<Vec<u8>> {
        self.backed.then(|| pattern(0xb0, 0, self.len() - self.cluster))
    }

    /// Opens `files` as an image of this kind.
    pub(crate) fn open(self, files: ImageFiles, writable: bool) -> Result<Qcow2> {
        let image = Arc::clone(&files.image);
        Ok(self.open_options(files).writable(writable).open(image)?)
    }

    /// What lies below the image, and beside it.
    pub(crate) fn open_options(self, files: ImageFiles) -> OpenOptions {
        let mut options = OpenOptions::new();
        if let Some(contents) = self.backing_contents() {
            let backing: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::with_contents(&contents).read_only());
            options = options.backing(backing);
        }
        if let Some(data) = files.data {
            options = options.data_file(data);
        }
        options
    }

    /// The files to begin with: the image, and the data file if there is one.
    pub(crate) fn make(self) -> Result<Vec<Vec<u8>>> {
        let image = Arc::new(MemoryStorage::new());
        let data = (self.data != DataPlace::Inside).then(|| Arc::new(MemoryStorage::new()));
        self.options().create(&*image, data.as_ref().map(|data| &**data as &dyn Storage))?;
        if self.contents != Contents::Empty {
            let files =
                ImageFiles { image: image.clone(), data: data.clone().map(|data| data as Arc<dyn Storage>) };
            self.populate(&self.open(files, true)?)?;
        }
        let mut files = vec![image.to_vec()];
        match self.contents {
            Contents::Dirty => damage::make_dirty(&mut files[0]),
            Contents::Damaged => damage::damage(&mut files[0]),
            _ => {}
        }
        files.extend(data.map(|data| data.to_vec()));
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
        if self.contents == Contents::Snapshots {
            disk.create_snapshot(&NewSnapshot::new("start"))?;
            disk.write_at(&pattern(0x51, 0, 2 * self.cluster), self.cluster * 2, WriteFlags::NONE)?;
        }
        disk.flush()
    }
}

/// Bytes that depend on `who` wrote them and on where they belong. None is zero.
pub(crate) fn pattern(who: u8, at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(|i| who ^ (i / 512 * 37 + i % 7) as u8 | 1).collect()
}
