//! The images of a stress: made in one folder, opened, judged by QEMU and by opening them again, removed.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockmirror_block::testing::{FaultDisk, FaultStorage, Faults, Rng};
use blockmirror_block::{BlockDevice, ByteRange, Storage, WriteFlags};
use blockmirror_file::{FileOptions, LockMode};
use blockmirror_qcow2::{CreateOptions, OpenOptions, Version};
use blockmirror_raw::{Raw, RawOptions};

use super::slow::SlowDisk;
use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ImageKind {
    pub(super) format: Format,
    pub(super) base: Base,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Raw,
    Qcow2 { cluster: u64, extended: bool, v2: bool },
}

/// What an image stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Base {
    Nothing,
    /// What the disk held at the beginning.
    Initial,
    /// Bytes that must never show.
    Garbage,
}

impl ImageKind {
    pub(super) fn draw(rng: &mut Rng) -> Self {
        let cluster = |rng: &mut Rng| rng.pick(&[4096, 16384, 65536, 65536, 65536, 1 << 20, 2 << 20]);
        let format = match rng.below(10) {
            0..3 => Format::Raw,
            3..5 => Format::Qcow2 {
                cluster: rng.pick(&[16384, 65536, 65536, 1 << 20]),
                extended: true,
                v2: false,
            },
            5 => Format::Qcow2 { cluster: cluster(rng), extended: false, v2: true },
            _ => Format::Qcow2 { cluster: cluster(rng), extended: false, v2: false },
        };
        Self { format, base: Base::Nothing }
    }
}

/// An open image.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) kind: ImageKind,
    /// The image itself, for the judge.
    image: Arc<dyn BlockDevice>,
    /// The image with faults and delays, for the job and the guest.
    device: Arc<dyn BlockDevice>,
    /// Faults above and below the format.
    pub(super) faults: Faults,
    pub(super) storage_faults: Faults,
}

impl Disk {
    /// For the job and the guest.
    pub(super) fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device)
    }

    /// For the judge.
    pub(super) fn image(&self) -> &dyn BlockDevice {
        &*self.image
    }

    pub(super) fn heal(&self) {
        self.faults.heal();
        self.storage_faults.heal();
    }
}

/// The folder they live in.
#[derive(Debug)]
pub(super) struct Images {
    dir: PathBuf,
    len: u64,
    made: u64,
    initial: Arc<dyn BlockDevice>,
    garbage: Arc<dyn BlockDevice>,
    qemu: Option<Qemu>,
}

const INITIAL: &str = "initial.raw";
const GARBAGE: &str = "garbage.raw";

impl Images {
    /// `initial` is what the disk holds at the beginning.
    pub(super) fn new(dir: &Path, initial: &[u8]) -> Outcome<Self> {
        fs::write(dir.join(INITIAL), initial)?;
        fs::write(dir.join(GARBAGE), vec![0x2a; initial.len()])?;
        let open = |name: &str| -> Outcome<Arc<dyn BlockDevice>> {
            let storage = FileOptions::new().lock(LockMode::Shared).open(dir.join(name))?;
            Ok(Arc::new(Raw::open(Arc::new(storage), RawOptions::new())?))
        };
        Ok(Self {
            dir: dir.to_owned(),
            len: initial.len() as u64,
            made: 0,
            initial: open(INITIAL)?,
            garbage: open(GARBAGE)?,
            qemu: Qemu::find("the stress of live jobs"),
        })
    }

    fn base(&self, base: Base) -> Option<(&'static str, Arc<dyn BlockDevice>)> {
        match base {
            Base::Nothing => None,
            Base::Initial => Some((INITIAL, Arc::clone(&self.initial))),
            Base::Garbage => Some((GARBAGE, Arc::clone(&self.garbage))),
        }
    }

    /// Makes an empty image and opens it, with delays that `rng` draws.
    pub(super) fn make(&mut self, kind: ImageKind, rng: &mut Rng) -> Outcome<Disk> {
        self.made += 1;
        let path = self.dir.join(format!("disk-{}", self.made));
        let file: Arc<dyn Storage> = Arc::new(FileOptions::new().create_new(true).open(&path)?);
        let (faults, storage_faults) = (Faults::new(), Faults::new());
        let storage: Arc<dyn Storage> = match rng.chance(50) {
            true => Arc::new(FaultStorage::new(file, storage_faults.clone())),
            false => file,
        };
        match kind.format {
            Format::Raw => storage.set_len(self.len)?,
            Format::Qcow2 { cluster, extended, v2 } => {
                let mut options = CreateOptions::new(self.len);
                options.cluster_size = cluster;
                options.extended_l2 = extended;
                if v2 {
                    options.version = Version::V2;
                }
                if let Some((name, _)) = self.base(kind.base) {
                    options.backing_file = Some(name.into());
                    options.backing_format = Some("raw".into());
                }
                options.create(&*storage, None)?;
            }
        }
        let image = self.open_in(kind, storage, true)?;
        let mut device = Arc::clone(&image);
        if rng.chance(50) {
            let (percent, most) = rng.pick(&[(1, 100_000), (1, 20_000), (20, 500), (60, 200)]);
            device = Arc::new(SlowDisk::new(device, percent, most, rng.next()));
        }
        device = Arc::new(FaultDisk::new(device, faults.clone()));
        Ok(Disk { path, kind, image, device, faults, storage_faults })
    }

    fn open_in(
        &self,
        kind: ImageKind,
        storage: Arc<dyn Storage>,
        writable: bool,
    ) -> Outcome<Arc<dyn BlockDevice>> {
        Ok(match kind.format {
            Format::Raw => Arc::new(Raw::open(storage, RawOptions::new())?),
            Format::Qcow2 { .. } => {
                let mut options = OpenOptions::new().writable(writable);
                if let Some((_, base)) = self.base(kind.base) {
                    options = options.backing(base);
                }
                Arc::new(options.open(storage)?)
            }
        })
    }

    /// Opens the file once more, beside its present users, for `look`.
    pub(super) fn reopen(&self, disk: &Disk, look: impl FnOnce(&dyn BlockDevice) -> Outcome) -> Outcome {
        let storage = FileOptions::new().lock(LockMode::Off).open(&disk.path)?;
        look(&*self.open_in(disk.kind, Arc::new(storage), false)?)
    }

    /// Writes the disk's first contents into an image that stands on nothing.
    pub(super) fn fill(disk: &Disk, contents: &[u8]) -> Outcome {
        for part in ByteRange::new(0, contents.len() as u64).pieces(4096) {
            let bytes = &contents[part.start() as usize..part.end() as usize];
            if bytes.iter().any(|&b| b != 0) {
                disk.image.write_at(bytes, part.start(), WriteFlags::NONE)?;
            }
        }
        Ok(disk.image.flush()?)
    }

    /// Writes bytes that must not stay.
    pub(super) fn soil(disk: &Disk, rng: &mut Rng) -> Outcome {
        for _ in 0..rng.range(1, 12) {
            let len = rng.range(1, 1 << 20).min(disk.image.len());
            let at = rng.below(disk.image.len() - len + 1);
            disk.image.write_at(&vec![0x2a; len as usize], at, WriteFlags::NONE)?;
        }
        Ok(())
    }

    /// Flushes the image, closes it, has QEMU check it, and removes it. It must be open nowhere else any
    /// more.
    pub(super) fn retire(&self, what: &str, disk: Disk, has_failed: bool) -> Outcome {
        disk.heal();
        let flushed = disk.image.flush();
        if !has_failed {
            flushed.map_err(|e| format!("{what}: {e}"))?;
        }
        let Disk { path, kind, image, device, .. } = disk;
        drop(device);
        if Arc::strong_count(&image) > 1 {
            return Err(format!("{what}: the image is still held after the end").into());
        }
        drop(image);
        // After a failed flush or write an image may leak.
        if let (Some(qemu), Format::Qcow2 { .. }, false) = (self.qemu, kind.format, has_failed) {
            qemu.check(&path).map_err(|e| format!("{what}, {kind:?}: {e}"))?;
        }
        Ok(fs::remove_file(path)?)
    }
}
