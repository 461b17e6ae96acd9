//! The cells: an image that QEMU makes, and an operation on it.

use std::fmt;
use std::path::Path;

use blockmirror_testing::Outcome;
use blockmirror_testing::qemu::Qemu;

/// The names of the files, in the folder of each program.
pub(super) const IMAGE: &str = "image.qcow2";
pub(super) const BASE: &str = "base.qcow2";

/// The cluster sizes.
const CLUSTERS: [u64; 5] = [512, 4 << 10, 16 << 10, 64 << 10, 2 << 20];

/// What is special about an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    /// Two snapshots, of disks of unequal length where version 3 allows it.
    Snapshots,
    /// Two bitmaps, one of them disabled.
    Bitmaps,
    Compressed,
    Subclusters,
    DataFile,
    DataFileRaw,
    LazyRefcounts,
    RefcountBits(u32),
    /// Over a backing file.
    Overlay,
}

const KINDS: [Kind; 13] = [
    Kind::Plain,
    Kind::Snapshots,
    Kind::Bitmaps,
    Kind::Compressed,
    Kind::Subclusters,
    Kind::DataFile,
    Kind::DataFileRaw,
    Kind::LazyRefcounts,
    Kind::RefcountBits(1),
    Kind::RefcountBits(2),
    Kind::RefcountBits(8),
    Kind::RefcountBits(64),
    Kind::Overlay,
];

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Guest requests: write, zeros or a discard at an offset, in clusters and bytes.
    Write,
    Zero,
    Unmap,
    Discard,
    /// A command of `qemu-img`: its words. `IMAGE` and `BASE` stand for the files.
    Command(&'static [&'static str]),
}

/// The commands, in the words of `qemu-img`, which are ours too.
const COMMANDS: &[&[&str]] = &[
    &["resize", "-q", "-f", "qcow2", "IMAGE", "+1M"],
    &["resize", "-q", "-f", "qcow2", "--shrink", "IMAGE", "-300k"],
    &["check", "-q", "-f", "qcow2", "IMAGE"],
];

/// A place in the matrix.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cell {
    pub(super) v3: bool,
    pub(super) cluster: u64,
    pub(super) kind: Kind,
    pub(super) action: Action,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let compat = if self.v3 { "1.1" } else { "0.10" };
        write!(f, "compat {compat}, clusters of {}, {:?}: ", self.cluster, self.kind)?;
        match self.action {
            Action::Command(words) => f.write_str(&words.join(" ")),
            action => write!(f, "{action:?}"),
        }
    }
}

/// Every cell whose image QEMU can make.
pub(super) fn cells() -> Vec<Cell> {
    let guest = [Action::Write, Action::Zero, Action::Unmap, Action::Discard];
    let actions: Vec<_> =
        guest.into_iter().chain(COMMANDS.iter().map(|words| Action::Command(words))).collect();
    let mut all = Vec::new();
    for v3 in [false, true] {
        for cluster in CLUSTERS {
            for kind in KINDS.into_iter().filter(|kind| kind.is_possible(v3, cluster)) {
                all.extend(actions.iter().map(|action| Cell { v3, cluster, kind, action: *action }));
            }
        }
    }
    all
}

impl Kind {
    fn is_possible(self, v3: bool, cluster: u64) -> bool {
        match self {
            Self::Plain | Self::Snapshots | Self::Compressed | Self::Overlay => true,
            Self::Subclusters => v3 && cluster >= 16 << 10,
            _ => v3,
        }
    }

    fn options(self) -> String {
        match self {
            Self::Subclusters => ",extended_l2=on".into(),
            Self::DataFile => ",data_file=data.raw".into(),
            Self::DataFileRaw => ",data_file=data.raw,data_file_raw=on".into(),
            Self::LazyRefcounts => ",lazy_refcounts=on".into(),
            Self::RefcountBits(bits) => format!(",refcount_bits={bits}"),
            _ => String::new(),
        }
    }
}

impl Cell {
    /// Length of the disk: some L2 tables where clusters are small; it ends inside a cluster.
    fn len(&self) -> u64 {
        if self.cluster >= 2 << 20 { (9 << 20) + 512 } else { (1 << 20) + 1536 }
    }

    /// Lets QEMU make the image in `dir`.
    pub(super) fn make(&self, qemu: Qemu, dir: &Path) -> Outcome {
        let compat = if self.v3 { "1.1" } else { "0.10" };
        let options = format!("compat={compat},cluster_size={}{}", self.cluster, self.kind.options());
        let len = self.len().to_string();
        let mut words = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if self.kind == Kind::Overlay {
            qemu.img_in(dir, ["create", "-q", "-f", "qcow2", BASE, &len])?;
            qemu.io("qcow2", &dir.join(BASE), &["write -q -P 9 0 900k"])?;
            words.extend(["-b", BASE, "-F", "qcow2"]);
        }
        words.extend([IMAGE, &len]);
        qemu.img_in(dir, words)?;
        let compressed = self.kind == Kind::Compressed;
        let write = |pattern: u32, at: u64, len: u64| {
            let flag = if compressed { "-c " } else { "" };
            format!("write -q {flag}-P {pattern} {at} {len}")
        };
        let c = self.cluster;
        let fill = [write(1, 0, 3 * c), write(2, 4 * c, 256 << 10), format!("write -q -z {} {c}", 2 * c)];
        // Compressed requests are whole clusters.
        let fill = if c >= 2 << 20 { &fill[..1] } else { &fill[..] };
        let script: Vec<_> = fill.iter().map(String::as_str).collect();
        self.io(qemu, dir, &script)?;
        match self.kind {
            Kind::Snapshots => {
                qemu.img_in(dir, ["snapshot", "-c", "one", IMAGE])?;
                self.io(qemu, dir, &["write -q -P 3 1000 90k"])?;
                if self.v3 {
                    qemu.img_in(dir, ["resize", "-q", "-f", "qcow2", IMAGE, "+100k"])?;
                }
                qemu.img_in(dir, ["snapshot", "-c", "two", IMAGE])?;
                self.io(qemu, dir, &["write -q -P 4 50k 3k"])?;
            }
            Kind::Bitmaps => {
                qemu.img_in(dir, ["bitmap", "--add", "-f", "qcow2", IMAGE, "one"])?;
                qemu.img_in(dir, ["bitmap", "--add", "--disable", "-f", "qcow2", IMAGE, "two"])?;
                self.io(qemu, dir, &["write -q -P 3 1000 90k"])?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Guest requests by QEMU, which obeys discards only where `discard=unmap` is set, and takes the name of
    /// a data file as relative to where it runs.
    pub(super) fn io(&self, qemu: Qemu, dir: &Path, script: &[&str]) -> Outcome {
        let (image, data) = (dir.join(IMAGE), dir.join("data.raw"));
        let mut node = format!(
            "driver=qcow2,discard=unmap,file.driver=file,file.discard=unmap,file.filename={}",
            image.display()
        );
        if matches!(self.kind, Kind::DataFile | Kind::DataFileRaw) {
            node += &format!(
                ",data-file.driver=file,data-file.discard=unmap,data-file.filename={}",
                data.display()
            );
        }
        qemu.io_on(&node, script).map(drop)
    }

    /// Where a guest request goes, and how long it is: across clusters, cutting sectors at both ends.
    pub(super) fn request(&self) -> (u64, u64) {
        let end = self.len();
        let (at, len) = (self.cluster / 2 + 100, 3 * self.cluster + 700);
        (at, len.min(end - at))
    }

    /// The same in whole clusters, for zeros and discards.
    pub(super) fn aligned(&self) -> (u64, u64) {
        (self.cluster, 3 * self.cluster)
    }
}
