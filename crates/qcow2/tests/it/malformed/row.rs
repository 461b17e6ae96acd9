//! A row of the table of malformed images: a sound image, and what is wrong with it.

use std::sync::Arc;

use blockmirror_block::testing::MemoryStorage;
use blockmirror_block::{BlockDevice, WriteFlags};
use blockmirror_qcow2::{
    Compression, CreateOptions, Error, Header, NewSnapshot, OpenOptions, Qcow2, Version,
};

use crate::check::{SIZE, image};
use crate::raw_image::RawImage;

/// Bytes of a cluster, unless the image says otherwise.
pub(super) const CLUSTER: u64 = 4096;

/// What an image is before it is spoiled. Of [`SIZE`] bytes, with data, in version 3 with clusters of 4 KiB
/// and 16-bit refcounts unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sound {
    Plain,
    Version2,
    /// Clusters of 512 bytes, so that there are several L2 tables.
    Small,
    /// Clusters of 16 KiB.
    Subclusters,
    /// Refcounts of one bit.
    OneBit,
    /// The guest clusters 1 and 2 are compressed with deflate.
    Deflate,
    /// The guest cluster 1 is compressed with zstd.
    Zstd,
    /// One internal snapshot.
    Snapshot,
    /// Two persistent bitmaps.
    Bitmaps,
    DataFile,
    /// The header names a backing file.
    Backed,
}

/// What a writable image is asked for.
pub(super) type Ask = fn(&Qcow2) -> Result<(), Error>;

/// How the image of a row is made.
pub(super) enum Image {
    /// The numbers, of so many bytes each, at these places of a sound image.
    Numbers(Sound, &'static [(u64, usize, u64)]),
    Changed(Sound, fn(&mut RawImage)),
    /// Made at its full length, most of it holes.
    Sparse(fn() -> MemoryStorage),
}

/// A row.
pub(super) struct Row {
    pub(super) name: &'static str,
    image: Image,
    /// The named cap that it goes past.
    pub(super) cap: Option<&'static str>,
    /// The row of LIMITS.md that says what becomes of it.
    pub(super) limit: Option<&'static str>,
    /// What it is asked for once it is open for writing: by default, to write its first clusters.
    pub(super) ask: Ask,
    /// Opens it for reading in another way.
    pub(super) reading: fn(OpenOptions) -> OpenOptions,
}

impl Row {
    fn new(name: &'static str, image: Image) -> Self {
        Self { name, image, cap: None, limit: None, ask: write_first, reading: |options| options }
    }

    /// A plain image with `value` in the `len` bytes at `at`.
    pub(super) fn number(name: &'static str, numbers: &'static [(u64, usize, u64)]) -> Self {
        Self::numbers(name, Sound::Plain, numbers)
    }

    pub(super) fn numbers(name: &'static str, sound: Sound, all: &'static [(u64, usize, u64)]) -> Self {
        Self::new(name, Image::Numbers(sound, all))
    }

    pub(super) fn changed(name: &'static str, sound: Sound, change: fn(&mut RawImage)) -> Self {
        Self::new(name, Image::Changed(sound, change))
    }

    pub(super) fn sparse(name: &'static str, make: fn() -> MemoryStorage) -> Self {
        Self::new(name, Image::Sparse(make))
    }

    pub(super) fn cap(mut self, constant: &'static str) -> Self {
        self.cap = Some(constant);
        self
    }

    pub(super) fn limit(mut self, feature: &'static str) -> Self {
        self.limit = Some(feature);
        self
    }

    pub(super) fn asked(mut self, ask: Ask) -> Self {
        self.ask = ask;
        self
    }

    pub(super) fn read_by(mut self, reading: fn(OpenOptions) -> OpenOptions) -> Self {
        self.reading = reading;
        self
    }

    /// The image, made anew, and whether it has a data file.
    pub(super) fn make(&self) -> (Arc<MemoryStorage>, bool) {
        let (storage, sound) = match self.image {
            Image::Sparse(make) => (make(), Sound::Plain),
            Image::Changed(sound, change) => {
                let mut image = sound.make();
                change(&mut image);
                (MemoryStorage::with_contents(&image.0), sound)
            }
            Image::Numbers(sound, numbers) => {
                let mut image = sound.make();
                numbers.iter().for_each(|(at, len, value)| image.set_len(*at, *value, *len));
                (MemoryStorage::with_contents(&image.0), sound)
            }
        };
        (Arc::new(storage.named("image")), sound == Sound::DataFile)
    }
}

impl Sound {
    pub(super) fn make(self) -> RawImage {
        let plain = |change: fn(&mut CreateOptions)| {
            RawImage(image(|options| {
                options.cluster_size = CLUSTER;
                change(options);
            }))
        };
        let mut made = match self {
            Self::Version2 => plain(|o| o.version = Version::V2),
            Self::Small => plain(|o| o.cluster_size = 512),
            Self::Subclusters => plain(|o| (o.cluster_size, o.extended_l2) = (16384, true)),
            Self::OneBit => plain(|o| (o.cluster_size, o.refcount_bits) = (512, 1)),
            Self::Backed => {
                plain(|o| (o.backing_file, o.backing_format) = (Some(b"base".into()), Some("raw".into())))
            }
            Self::Zstd => zstd(),
            Self::DataFile => with_data_file(),
            Self::Plain | Self::Deflate | Self::Snapshot | Self::Bitmaps => plain(|_| ()),
        };
        match self {
            Self::Deflate => (1..3).for_each(|guest| made.compress(guest)),
            Self::Snapshot => made.add_snapshot(),
            Self::Bitmaps => made.add_bitmaps(),
            _ => {}
        }
        made
    }
}

fn zstd() -> RawImage {
    let storage = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(SIZE);
    (options.cluster_size, options.compression) = (CLUSTER, Compression::Zstd);
    options.create(&*storage, None).unwrap();
    let disk = OpenOptions::new().writable(true).open(storage.clone()).unwrap();
    disk.write_compressed(&[0x11; CLUSTER as usize], CLUSTER).unwrap();
    disk.flush().unwrap();
    RawImage(storage.to_vec())
}

fn with_data_file() -> RawImage {
    let (storage, data) = (Arc::new(MemoryStorage::new()), data_file());
    let mut options = CreateOptions::new(SIZE);
    (options.cluster_size, options.data_file) = (CLUSTER, Some(b"data".into()));
    options.create(&*storage, Some(&*data)).unwrap();
    let disk = OpenOptions::new().writable(true).data_file(data).open(storage.clone()).unwrap();
    disk.write_at(&[0x11; 70_000], 1000, WriteFlags::NONE).unwrap();
    disk.flush().unwrap();
    RawImage(storage.to_vec())
}

/// The data file of an image that has one.
pub(super) fn data_file() -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::with_contents(&vec![0x33; SIZE as usize]).named("data"))
}

fn write_first(disk: &Qcow2) -> Result<(), Error> {
    disk.write_at(&[0x5a; 3 * CLUSTER as usize], 0, WriteFlags::NONE)?;
    Ok(disk.flush()?)
}

/// Takes a snapshot.
pub(super) fn snapshot(disk: &Qcow2) -> Result<(), Error> {
    disk.create_snapshot(&NewSnapshot::new("new")).map(drop)
}

/// Where the directory of bitmaps lies.
pub(super) fn bitmap_directory(image: &RawImage) -> u64 {
    let header = Header::read(&MemoryStorage::with_contents(&image.0)).unwrap();
    header.bitmaps.unwrap().directory_offset
}
